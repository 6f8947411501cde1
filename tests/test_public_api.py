"""What `import gptq_ao` offers, what it costs, and that it needs neither Triton nor a GPU."""

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import gptq_ao
from gptq_ao import errors

PUBLIC = {
    "Fusion",
    "GPTQConfig",
    "GptqAoConfig",
    "Int2GroupTensor",
    "Int3GroupTensor",
    "Int4GroupTensor",
    "Int8GroupTensor",
    "QualityCheck",
    "QuantizationPlan",
    "Report",
    "data",
    "errors",
    "fuse_projections_",
    "gptq_config",
    "load_quantized",
    "plan",
    "quantize_",
    "quantize_checkpoint",
    "save_quantized",
    "tune",
    "unfuse_projections_",
    "whole_model",
}


# Modules that the documentation imports from, or that files written by `torch.save` and `config_to_dict` name.
DOCUMENTED = {
    "config": {"GPTQConfig", "gptq_config"},
    "data": {"text_batches", "token_chunks"},
    "errors": {"CheckpointError", "ConfigError", "FusedSettingsWarning"},
    "evaluate": {"evaluate"},
    "integrations.transformers": {"GptqAoConfig", "load_model", "load_tokenizer", "load_with_gptq_ao"},
    "tensor": {"GroupTensor", "Int2GroupTensor", "Int3GroupTensor", "Int4GroupTensor", "Int8GroupTensor"},
}


def fresh(code: str) -> str:
    """Output of `code` in a new interpreter, where warnings do not matter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_surface() -> None:
    assert set(gptq_ao.__all__) == PUBLIC
    assert all(getattr(gptq_ao, name).__doc__ for name in PUBLIC)


def test_nothing_else_is_in_the_namespace() -> None:
    """A room has one word, and no function has the same: it would hide the room, or be hidden by it."""
    names = {n for n in dir(gptq_ao) if not n.startswith("_")}
    modules = {n for n in names if isinstance(getattr(gptq_ao, n), ModuleType)}
    assert names - modules == PUBLIC - {"data", "errors"}
    assert modules >= {"data", "errors"}
    assert not {"plan", "tune"} & modules
    with pytest.raises(AttributeError, match="'quantise_'"):
        _ = gptq_ao.quantise_
    with pytest.raises(AttributeError, match="'__path_of__'"):
        _ = gptq_ao.__path_of__


def test_importing_says_nothing_of_other_libraries() -> None:
    """torchao warns of its libraries for other machines; whoever imports it alone is told as before."""
    code = """
import logging, sys
import gptq_ao
assert all(not logging.getLogger(name).filters for name in ("torchao", "torch.utils._pytree"))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize("module", DOCUMENTED)
def test_documented_paths(module: str) -> None:
    found = importlib.import_module(f"gptq_ao.{module}")
    assert set(dir(found)) >= DOCUMENTED[module]


ROOT = Path(__file__).parents[1]
API = re.findall(
    r"^\.\. auto\w+:: gptq_ao\.([\w.]+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE
)


def found(path: str) -> object:
    """What `gptq_ao.path` is, whether or not the modules on the way have been imported."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"gptq_ao.{module}" if module else "gptq_ao"), name)


def imported_by_pages() -> Iterator[str]:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "tutorials").glob("*.md")]
    for page in [*pages, *(ROOT / "examples").glob("*.py"), *(ROOT / "examples" / "training").glob("*.py")]:
        text = page.read_text(encoding="utf-8")
        for module, names in re.findall(r"^ *from gptq_ao(?:\.([\w.]+))? import ([\w, ]+)", text, re.MULTILINE):
            # The embedded model's own text; and what cannot be imported without torchtitan, nor described by Sphinx.
            if not module.startswith(("tiny_lm", "integrations.torchtitan")):
                yield from (f"{module}.{name}" if module else name for name in names.split(", "))


def test_every_public_name_is_in_the_api_reference_once() -> None:
    """Those above, those that any page or example imports, and every error; a name may be that of another module."""
    listed = [id(found(name)) for name in API]
    assert len(listed) == len(set(listed))
    named = {*PUBLIC, *(f"{m}.{n}" for m in DOCUMENTED if m != "errors" for n in DOCUMENTED[m]), *imported_by_pages()}
    assert [n for n in sorted(named) if id(found(n)) not in listed and not n.startswith("errors.")] == []
    assert "errors" in API  # with all its members


@pytest.mark.parametrize("name", API)
def test_docstrings_say_what_is_raised_in_the_form_that_the_reference_reads(name: str) -> None:
    """`Class, Class: when`, each in one line, and indented where it goes on; nothing else stands there."""
    section = re.search(r"^Raises:\n((?:    .*\n?)+)", inspect.getdoc(found(name)) or "", re.MULTILINE)
    for line in section[1].splitlines() if section else ():
        assert re.match(r"    (    |(?:\w+(?:Error), )*\w+Error: )", line), line
        for error in re.findall(r"\w+Error", line.split(":")[0] if line[4] != " " else ""):
            assert issubclass(getattr(errors, error), errors.GPTQError)


def test_every_public_function_documents_what_it_raises() -> None:
    functions = (gptq_ao.gptq_config, gptq_ao.quantize_, gptq_ao.save_quantized, gptq_ao.load_quantized)
    for function in (*functions, gptq_ao.quantize_checkpoint, gptq_ao.plan):
        assert "Raises:" in (function.__doc__ or "")


def test_import_and_quantize_without_triton_and_without_touching_cuda() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, gptq_ao
from gptq_ao import gptq_config, quantize_
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
report = quantize_(model, gptq_config(4, 32, calibration=[torch.randn(20, 64)]))
assert len(report.weights) == 2
assert not torch.cuda.is_initialized()
print("fine")
"""
    assert fresh(code).strip() == "fine"


def test_strict_compile_can_be_the_first_call() -> None:
    code = """
import torch
from gptq_ao import Int4GroupTensor
codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8)
scale, zero_point = torch.ones(32, 2).half(), torch.full((32, 2), 8, dtype=torch.uint8)
weight = Int4GroupTensor.from_codes(codes, scale, zero_point, dtype=torch.float32)
linear = torch.nn.Linear(64, 32, bias=False)
linear.weight = torch.nn.Parameter(weight, requires_grad=False)
y = torch.compile(linear, fullgraph=True)(torch.ones(3, 64))
assert torch.equal(y, linear(torch.ones(3, 64)))
print("fine")
"""
    assert fresh(code).strip() == "fine"


def test_importing_changes_no_global_state() -> None:
    code = """
import torch, torchao, transformers
state = lambda: (torch.get_rng_state().sum().item(), torch.backends.cuda.matmul.fp32_precision,
                 torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype(),
                 torch._inductor.config.save_config_portable())
import torch._inductor.config
before = state()
import gptq_ao
assert state() == before
print("fine")
"""
    assert fresh(code).strip() == "fine"


def test_transformers_is_imported_by_those_who_use_it() -> None:
    code = """
import importlib.util, sys
finders = len(sys.meta_path)
import gptq_ao
assert "transformers" not in sys.modules
assert importlib.util.find_spec("transformers.modeling_utils") is not None  # who only looks changes nothing
assert "gptq_ao.integrations.transformers" not in sys.modules
from transformers import LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from gptq_ao.integrations.hf_quantizer import GptqAoQuantizer
assert AUTO_QUANTIZER_MAPPING["gptq_ao"] is GptqAoQuantizer
waiting = lambda: [f.module for f in sys.meta_path if "gptq_ao" in type(f).__module__]
assert "peft" in waiting() and "peft" not in sys.modules
import peft, accelerate.utils.fsdp_utils, torch.distributed.checkpoint.state_dict
assert not waiting()
print("fine")
"""
    assert fresh(code).strip() == "fine"


def test_the_integration_is_there_whichever_comes_first() -> None:
    after = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
assert "gptq_ao" in AUTO_QUANTIZATION_CONFIG_MAPPING
print("fine")
"""
    for first in ("import transformers.modeling_utils, gptq_ao", "from gptq_ao import GptqAoConfig"):
        assert fresh(first + after).strip() == "fine"


@pytest.mark.parametrize("first", ["import gptq_ao, peft", "import peft, gptq_ao"])
def test_peft_knows_of_quantized_weights_whichever_comes_first(first: str) -> None:
    after = """
assert peft.tuners.lora.Linear.merge.__code__.co_filename.endswith("integrations/peft.py")
print("fine")
"""
    assert fresh(first + after).strip() == "fine"
