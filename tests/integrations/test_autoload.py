"""Programs that never import gptq_ao: `import torch` calls our entry point, and `from_pretrained` finds our loader."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import gptq_ao_autoload
from gptq_ao import gptq_config, quantize_, save_quantized
from gptq_ao.checkpoint.formats import FORMATS
from tests.ranks import some

from ..models import tiny_llama

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PYTHONPATH of an environment where gptq_ao is installed with the entry points that pyproject.toml has."""
    folder = tmp_path_factory.mktemp("site")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{n} = {at}\n" for n, at in of.items()) for group, of in groups.items()]
    # Before the real one, which may be another version: the first of a name counts.
    (folder / "gptq_ao-0.dist-info").mkdir()
    (folder / "gptq_ao-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: gptq_ao\nVersion: 0\n")
    (folder / "gptq_ao-0.dist-info" / "entry_points.txt").write_text("\n".join(lines))
    return os.pathsep.join([str(folder), str(ROOT)])


def run(code: str, path: str, *arguments: str, **environment: str) -> str:
    """What a new process prints that has never heard of gptq_ao."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_alone_imports_nothing_of_ours(installed: str) -> None:
    printed = run("import torch, sys\nprint(*sorted({m.partition('.')[0] for m in sys.modules}))", installed).split()
    assert "gptq_ao_autoload" in printed
    assert not {"gptq_ao", "torchao", "transformers"} & set(printed)


def test_a_dense_model_imports_nothing_of_ours(installed: str, tmp_path: Path) -> None:
    tiny_llama(layers=1).save_pretrained(tmp_path / "dense")
    code = f"""
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(tmp_path / "dense")!r})
print("gptq_ao" in sys.modules, "gptq_ao_autoload" in sys.modules)
"""
    assert run(code, installed).split() == ["False", "True"]


@pytest.mark.parametrize("format", some(["native", "gptq", "compressed-tensors"]))
def test_a_quantized_checkpoint_is_loaded_and_generates(format: str, installed: str, tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    quantize_(model, gptq_config(bits=4, group_size=32, method="rtn"))
    save_quantized(model, tmp_path / "q", format=format)
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
for load in (1, 2):
    model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "q")!r})
print(type(model.lm_head.weight).__name__, type(model.model.layers[0].mlp.up_proj.weight).__name__)
print(*model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0].tolist())
"""
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0].tolist()
    # Not with the loaders of other packages, which may be installed.
    kinds, tokens = run(code, installed).splitlines()[-2:]
    assert kinds == "Parameter Int4GroupTensor"
    assert list(map(int, tokens.split())) == expected


def test_the_methods_are_those_of_the_formats() -> None:
    assert set(gptq_ao_autoload.METHODS) == {f.quant_method for f in FORMATS.values()}


@pytest.mark.parametrize(
    "first", ["gptq_ao", "torch", "transformers.modeling_utils", "transformers.quantizers.auto", "importlib"]
)
def test_whatever_is_imported_first_the_loader_is_found(first: str, installed: str, tmp_path: Path) -> None:
    """What imports torch may be transformers, in the middle of the import of one of its modules."""
    model = tiny_llama(layers=1)
    quantize_(model, gptq_config(bits=4, group_size=32, method="rtn"))
    save_quantized(model, tmp_path / "q")
    code = f"""
import {first}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "q")!r})
print(type(model.model.layers[0].mlp.up_proj.weight).__name__)
"""
    assert run(code, installed).split() == ["Int4GroupTensor"]


def test_without_the_entry_point_the_switch_of_the_documents_does_it(installed: str, tmp_path: Path) -> None:
    """`python -c "import gptq_ao, runpy; …" MODULE ARGUMENTS`, where entry points are switched off."""
    model = tiny_llama(layers=1)
    quantize_(model, gptq_config(bits=4, group_size=32, method="rtn"))
    save_quantized(model, tmp_path / "q")
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__main__.py").write_text(
        f"""
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "q")!r})
print(type(model.model.layers[0].mlp.up_proj.weight).__name__, sys.argv[1])
"""
    )
    line = next(line for line in (ROOT / "docs/formats.md").read_text().splitlines() if "runpy" in line)
    code = line.split('"')[1]
    path = os.pathsep.join([installed, str(tmp_path)])
    assert run(code, path, "program", "7", TORCH_DEVICE_BACKEND_AUTOLOAD="0").split() == ["Int4GroupTensor", "7"]


class Text:
    """A config, as far as `choose` looks at it."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def get_text_config(self, decoder: bool) -> "Text":
        return getattr(self, "text", self)


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        (Text(), False),
        (Text(quantization_config=None), False),
        (Text(quantization_config={"quant_method": "bitsandbytes"}), False),
        (Text(quantization_config={"quant_method": "gptq"}), True),
        (Text(quantization_config=Text(quant_method="gptq_ao")), True),
        (Text(text=Text(quantization_config={"quant_method": "compressed-tensors"})), True),
        (Text(compression_config={"format": "pack-quantized"}), True),
    ],
)
def test_which_checkpoints_are_ours(config: Text, ours: bool) -> None:
    assert gptq_ao_autoload._is_ours(config) == ours
