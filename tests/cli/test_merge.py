"""Adapters from the command line: solved with the codes, and merged into them."""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from typer.testing import CliRunner

from gptq_ao import gptq_config, load_quantized, quantize_, save_quantized
from gptq_ao.cli import app
from gptq_ao.data import token_chunks
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.integrations.transformers import load_model, load_tokenizer
from gptq_ao.tensor import GroupTensor
from gptq_ao.tiny_lm.corpus import documents

from ..models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.is_gradient_checkpointing.:FutureWarning")

TINY = str(Path(__file__).parents[2] / "examples" / "tiny_lm")
DATA = ("--num-samples", "4", "--seq-len", "64", "--effort", "fast", "--device", "cpu")


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": d}) for d in documents("heldout")[:4]))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("base") / "q"
    model = load_model(TINY)
    quantize_(model, gptq_config(3, 64, method="rtn"))
    save_quantized(model, directory)
    return str(directory)


@pytest.fixture(scope="module")
def adapter(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(0)
    made = peft.get_peft_model(load_quantized(base), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, p in made.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.1, generator=generator)
    made.save_pretrained(str(directory))
    return str(directory)


def test_merge(base: str, adapter: str, text: str, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    facts = run("merge", base, adapter, str(out), "--calibration", text, *DATA)
    assert (facts["base"], facts["adapter"], facts["out"]) == (base, adapter, str(out))
    assert {(w["bits"], w["group_size"]) for w in facts["layers"]} == {(3, 64)}
    merged, before = load_quantized(out), load_quantized(base)
    both = peft.PeftModel.from_pretrained(load_quantized(base), adapter)
    ids = token_chunks(load_tokenizer(TINY), documents("heldout")[:4], 64)[:8]
    with torch.no_grad():
        logits = [m(input_ids=ids).logits for m in (both, merged, before)]
    errors = [(x - logits[0]).square().mean().item() for x in logits[1:]]
    assert errors[0] < errors[1]
    changed = {w["name"] for w in facts["layers"]}
    for name, p in merged.named_parameters():
        if isinstance(p, GroupTensor):
            old: Any = before.get_parameter(name)
            assert torch.equal(p.codes(), old.codes()) == (name not in changed)


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["in memory", "streamed"])
def test_quantize_writes_the_adapter_beside_the_model(stream: tuple[str, ...], text: str, tmp_path: Path) -> None:
    out = tmp_path / "q"
    facts = run("quantize", TINY, str(out), "--calibration", text, "--adapter-rank", "4", *DATA, *stream)
    assert {w["adapter_rank"] for w in facts["layers"]} == {4}
    # transformers would take a directory with an adapter_config.json for an adapter.
    assert not (out / "adapter_config.json").exists()
    made = peft.PeftModel.from_pretrained(load_quantized(out), str(out / "adapter"))
    assert sum("lora_A" in name for name, _ in made.named_parameters()) == len(facts["layers"])


def other(path: Path) -> None:
    made = peft.get_peft_model(tiny_llama(layers=1), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    made.save_pretrained(str(path))


def other_names(path: Path) -> None:
    made = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    made.save_pretrained(str(path))


def without_values(path: Path) -> None:
    other(path)
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").touch()


def damaged(path: Path) -> None:
    other(path)
    (path / "adapter_model.safetensors").write_bytes(b"no")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.mkdir(), r"has no adapter_config\.json: give a directory that PEFT's save_pretrained wrote"),
        (without_values, r"has no adapter_model\.safetensors: give a directory that PEFT"),
        (damaged, r"adapter_model\.safetensors is truncated, or not a safetensors file: "),
        (other, r"the adapter in .* does not fit the LlamaForCausalLM: Error\(s\) in loading|size mismatch"),
        (other_names, r"does not fit the LlamaForCausalLM: Target module "),
    ],
    ids=["empty", "no safetensors", "damaged", "other sizes", "other names"],
)
def test_directories_that_hold_no_fitting_adapter(
    make: Any, message: str, base: str, text: str, tmp_path: Path
) -> None:
    make(tmp_path / "adapter")
    arguments = ["merge", base, str(tmp_path / "adapter"), str(tmp_path / "out"), "--calibration", text, *DATA]
    with pytest.raises(CheckpointError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_of_fewer_layers(base: str, adapter: str, text: str, tmp_path: Path) -> None:
    """PEFT would warn, and go on with random numbers."""
    from safetensors.torch import load_file, save_file

    own = tmp_path / "adapter"
    own.mkdir()
    (own / "adapter_config.json").write_bytes((Path(adapter) / "adapter_config.json").read_bytes())
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if "layers.0." not in n}, own / "adapter_model.safetensors")
    arguments = ["merge", base, str(own), str(tmp_path / "out"), "--calibration", text, *DATA]
    with pytest.raises(CheckpointError, match=r"tensors are only in one of them, such as '.*layers\.0\."):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "BASE", "ADAPTER", "OUT"], r"to merge takes calibration data like that of the training: --calib"),
        (
            ["merge", TINY, "ADAPTER", "OUT", "--calibration", "TEXT", *DATA],
            r"change no quantized weight: merge them wi",
        ),
    ],
    ids=["no data", "dense base"],
)
def test_wrong_arguments(
    arguments: list[str], message: str, base: str, adapter: str, text: str, tmp_path: Path
) -> None:
    words = {"BASE": base, "ADAPTER": adapter, "OUT": str(tmp_path / "out"), "TEXT": text}
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, [words.get(a, a) for a in arguments], catch_exceptions=False)


def test_options_that_would_contradict_the_weights_are_not_there(base: str, adapter: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["merge", base, adapter, str(tmp_path / "out"), "--bits", "3"])
    assert result.exit_code == 2
    assert "No such option" in result.output


def test_without_peft(base: str, adapter: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for command in (["merge", base, adapter], ["quantize", TINY, "--adapter-rank", "4"]):
        arguments = [*command, str(tmp_path / "out"), "--calibration", text, *DATA]
        with pytest.raises(ConfigError, match="PEFT, which is not installed: pip install peft"):
            CliRunner().invoke(app, arguments, catch_exceptions=False)
