"""Programs that never import gptq_ao: `import torch` calls our entry point, and `from_pretrained` finds our loader."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import gptq_ao_autoload
from gptq_ao import gptq_config, load_quantized, quantize_, quantize_checkpoint, save_quantized
from gptq_ao.checkpoint.convert import convert_checkpoint
from gptq_ao.checkpoint.formats import FORMATS
from tests.ranks import some

from ..checkpoint.test_directories import assert_same_weights, quantized
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


def test_without_gptq_ao_transformers_stops(tmp_path: Path) -> None:
    """Instead of initializing what it takes for missing. Whoever has written the files, whatever is in them: matrices,
    stacks of experts, codes of a byte each; as the class that was saved, or another one."""
    directories = []
    for name, bits in (("llama", 4), ("llama", 8), ("mixtral", 4)):
        here = tmp_path / f"{name}-{bits}"
        save_quantized(quantized(name, bits=bits), here / "saved")
        load_quantized(here / "saved").save_pretrained(here / "by transformers")  # type: ignore[operator]
        AutoModelForCausalLM.from_pretrained(here / "saved").save_pretrained(here / "again")
        directories += [here / "saved", here / "by transformers", here / "again"]
    tiny_llama(layers=1).save_pretrained(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "streamed", gptq_config(method="rtn", group_size=32))
    convert_checkpoint(tmp_path / "llama-4" / "saved", tmp_path / "gptq", "gptq")
    convert_checkpoint(tmp_path / "gptq", tmp_path / "converted", "native")
    directories += [tmp_path / "streamed", tmp_path / "converted"]
    code = """
import sys
sys.modules["gptq_ao"] = sys.modules["gptq_ao_autoload"] = None
from transformers import AutoModel, AutoModelForCausalLM
for directory in sys.argv[1:]:
    for kind in (AutoModelForCausalLM, AutoModel):
        for options in ({}, {"ignore_mismatched_sizes": True}):
            try:
                kind.from_pretrained(directory, **options)
            except ValueError as e:
                print(e)
"""
    printed = run(code, "", *map(str, directories), TORCH_DEVICE_BACKEND_AUTOLOAD="0").splitlines()
    assert len(printed) == 4 * len(directories) == 4 * 11
    assert all("has no `quant_method` attribute" in line for line in printed)


def test_files_that_name_a_method_are_still_read(tmp_path: Path) -> None:
    """As earlier versions wrote them, with a manifest and without."""
    model = quantized()
    save_quantized(model, tmp_path / "a")
    load_quantized(tmp_path / "a").save_pretrained(tmp_path / "b")  # type: ignore[operator]
    for directory in (tmp_path / "a", tmp_path / "b"):
        config = json.loads((directory / "config.json").read_text())
        del config["quantization_config"]["format"]
        config["quantization_config"]["quant_method"] = "gptq_ao"
        (directory / "config.json").write_text(json.dumps(config))
        assert_same_weights(model, load_quantized(directory))
        assert_same_weights(model, AutoModelForCausalLM.from_pretrained(directory))


@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_config_that_is_parsed_before_the_model_is_loaded(switch: str, installed: str, tmp_path: Path) -> None:
    """As lm-eval does it, before transformers' models are imported: with the entry point, or with the import."""
    for format in FORMATS:
        save_quantized(quantized(), tmp_path / format, format=format)
    code = f"""
{"import gptq_ao" if switch == "0" else ""}
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoQuantizationConfig
for directory in sys.argv[1:]:
    stored = AutoConfig.from_pretrained(directory).quantization_config
    assert isinstance(stored, dict)
    parsed = AutoQuantizationConfig.from_dict(stored)
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=parsed)
    print(parsed.quant_method, type(model.model.layers[0].mlp.up_proj.weight).__name__)
"""
    printed = run(code, installed, *(str(tmp_path / f) for f in FORMATS), TORCH_DEVICE_BACKEND_AUTOLOAD=switch)
    assert printed.splitlines() == [f"{format.quant_method} Int4GroupTensor" for format in FORMATS.values()]


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
        (Text(quantization_config={"format": "gptq_ao"}), True),
        (Text(quantization_config={"format": "pack-quantized"}), False),
        (Text(text=Text(quantization_config={"quant_method": "compressed-tensors"})), True),
        (Text(compression_config={"format": "pack-quantized"}), True),
    ],
)
def test_which_checkpoints_are_ours(config: Text, ours: bool) -> None:
    assert gptq_ao_autoload._is_ours(config) == ours
