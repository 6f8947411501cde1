"""What a checkpoint has that the model does not: tensors that its class ignores, files that are not weights."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from gptq_ao import GptqAoConfig, Report, gptq_config, load_quantized, quantize_, quantize_checkpoint, save_quantized
from gptq_ao.checkpoint.convert import convert_checkpoint
from gptq_ao.checkpoint.files import side_files
from gptq_ao.checkpoint.origin import origin_of
from gptq_ao.errors import CheckpointError, StrictError
from gptq_ao.integrations.transformers import load_with_gptq_ao

from ..models import seeded, tiny_llama

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def glm() -> Any:
    """Its layer 92 predicts a second token."""
    experts = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    return seeded(Glm4MoeForCausalLM(Glm4MoeConfig(**SIZES, **HEADS, **experts, first_k_dense_replace=1)))


def qwen() -> Any:
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    layers = ["full_attention", "full_attention"]
    return seeded(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SIZES, **HEADS, **linear, layer_types=layers)))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


# A family → its model, and tensors of its checkpoints that transformers does not load.
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "glm4_moe": (
        glm,
        {
            "model.layers.92.eh_proj.weight": random(64, 128),
            "model.layers.92.mlp.experts.0.gate_proj.weight": random(32, 64),
            "model.layers.92.enorm.weight": random(64, dtype=torch.bfloat16),
        },
    ),
    "qwen3_5": (qwen, {"mtp.fc.weight": random(64, 128), "mtp.count": torch.tensor(3)}),
}
CONFIG = gptq_config(4, 32, method="rtn")


@pytest.fixture(autouse=True)
def _loaders(loaders: None) -> None:
    load_with_gptq_ao("gptq", "compressed-tensors")


def source(directory: Path, model: nn.Module, more: dict[str, Tensor]) -> Path:
    """A checkpoint with tensors of which the model knows nothing."""
    model.save_pretrained(directory)  # type: ignore[operator]
    file = directory / "model.safetensors"
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    return directory


def quantize(directory: Path, out: Path, mode: str) -> Report:
    """The checkpoint in `directory`, quantized: written in a format from memory, or streamed."""
    if mode == "streamed":
        return quantize_checkpoint(directory, out, CONFIG)
    model = AutoModelForCausalLM.from_pretrained(directory)
    report = quantize_(model, CONFIG)
    assert report is not None
    save_quantized(model, out, format=mode, report=report)
    return report


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("mode", ["native", "gptq", "compressed-tensors", "dense", "streamed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_that_the_class_ignores_come_along(family: str, mode: str, tmp_path: Path) -> None:
    make, more = FAMILIES[family]
    report = quantize(source(tmp_path / "a", make(), more), tmp_path / "b", mode)
    assert set(report.ignored) == set(more)
    assert report.lost == ()
    assert f"{len(more)} tensors of {tmp_path / 'a'} that {type(make()).__name__} does not use" in str(report)
    written = tensors(tmp_path / "b")
    for name, value in more.items():
        assert written[name].dtype == value.dtype, name
        assert torch.equal(written[name], value), name
    # They are in nobody's way.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    ids = torch.arange(8)[None]
    if mode != "dense":
        assert torch.equal(load_quantized(tmp_path / "b")(ids).logits, loaded(ids).logits)
        # Nor lost when transformers saves it again, nor on the way into another format.
        loaded.save_pretrained(tmp_path / "d")
        assert {name for name in tensors(tmp_path / "d") if name in more} == set(more)
        convert_checkpoint(tmp_path / "b", tmp_path / "c", "dense")
        assert {name for name in tensors(tmp_path / "c") if name in more} == set(more)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_engines_are_told_that_such_a_matrix_is_not_quantized(format: str, tmp_path: Path) -> None:
    make, more = FAMILIES["qwen3_5"]
    quantize(source(tmp_path / "a", make(), more), tmp_path / "b", format)
    settings = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    excluded = settings["ignore"] if format == "compressed-tensors" else [*settings["dynamic"]]
    assert any("mtp" in pattern and "fc" in pattern for pattern in excluded)


def test_a_manifest_says_what_is_not_used(tmp_path: Path) -> None:
    make, more = FAMILIES["qwen3_5"]
    quantize(source(tmp_path / "a", make(), more), tmp_path / "b", "native")
    path = tmp_path / "b" / "gptq_ao.json"
    manifest = json.loads(path.read_text())
    assert manifest["format_version"] == 3
    assert manifest["ignored"] == {
        "mtp.fc.weight": {"dtype": "F32", "shape": [64, 128]},
        "mtp.count": {"dtype": "I64", "shape": []},
    }
    # Also a parameter: it cannot be both.
    manifest["ignored"]["lm_head.weight"] = manifest["dense"]["lm_head.weight"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="a name is listed twice"):
        load_quantized(tmp_path / "b")


def test_a_model_that_is_a_part_of_a_checkpoint_says_what_is_lost(tmp_path: Path) -> None:
    """The class declares nothing of such tensors: they are of another model."""
    more = {"vision.weight": random(8, 8), "vision.bias": random(8), "audio.0": random(2), "audio.1": random(2)}
    directory = source(tmp_path / "a", tiny_llama(), more)
    report = quantize(directory, tmp_path / "b", "native")
    assert set(report.lost) == set(more)
    assert "4 tensors of" in str(report)
    assert "are not in this LlamaForCausalLM, so they are not saved: audio.0, audio.1, vision.bias and 1 more" in str(
        report
    )
    assert not set(tensors(tmp_path / "b")) & set(more)
    model = AutoModelForCausalLM.from_pretrained(directory)
    before = model.lm_head.weight.clone()
    with pytest.raises(StrictError, match=r"strict=True, and 4 tensors of .* are not in this LlamaForCausalLM"):
        quantize_(model, gptq_config(4, 32, method="rtn", strict=True))
    assert torch.equal(model.lm_head.weight, before)
    with pytest.raises(CheckpointError, match=r"does not fit the LlamaForCausalLM: it has 'audio.0' \(and 3 more\)"):
        quantize_checkpoint(directory, tmp_path / "c", CONFIG)


def test_a_body_without_its_head_says_so(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    report = quantize_(LlamaModel.from_pretrained(tmp_path), CONFIG)
    assert report is not None
    assert report.lost == ("lm_head.weight",)


@pytest.mark.parametrize("kind", ["config", "plain"])
def test_a_model_from_nowhere_has_no_origin(kind: str) -> None:
    assert origin_of(tiny_llama() if kind == "config" else nn.Linear(4, 4)) is None


@pytest.mark.parametrize("kind", ["gone", "no config", "subfolder", "another cache", "too long", "no path"])
def test_a_directory_that_is_not_found_is_said(kind: str, tmp_path: Path) -> None:
    """Since nothing of it can come along."""
    tiny_llama().save_pretrained(tmp_path / "a" / "part")
    part = {"pretrained_model_name_or_path": tmp_path / "a", "subfolder": "part"}
    whole = {"pretrained_model_name_or_path": tmp_path / "a" / "part"}
    model = AutoModelForCausalLM.from_pretrained(**(part if kind == "subfolder" else whole))
    if kind == "gone":
        shutil.rmtree(tmp_path / "a")
    elif kind == "no config":
        (tmp_path / "a" / "part" / "config.json").unlink()
    elif kind != "subfolder":
        place = {"another cache": "someone/model", "too long": "x" * 5000, "no path": "\0"}[kind]
        model.config._name_or_path = place
    report = quantize_(model, CONFIG)
    assert report is not None
    said = r"whether .* has tensors that this LlamaForCausalLM has not is unknown: there is no config\.json"
    assert re.search(said, str(report))
    with pytest.warns(UserWarning, match=said):
        save_quantized(model, tmp_path / "b")
    assert torch.equal(load_quantized(tmp_path / "b").state_dict()["lm_head.weight"], model.lm_head.weight)


@pytest.mark.parametrize("second", ["native", "gptq", "dense"])
@pytest.mark.parametrize("loader", ["from_pretrained", "subfolder", "load_quantized", "given", "wrapped"])
@pytest.mark.parametrize("first", ["native", "gptq", "compressed-tensors"])
def test_a_quantized_checkpoint_that_is_saved_again(first: str, loader: str, second: str, tmp_path: Path) -> None:
    make, more = FAMILIES["qwen3_5"]
    directory = tmp_path / "a" / "part"
    quantize(source(tmp_path / "source", make(), more), directory, first)
    (directory / "LICENSE").write_text("free")
    model: Any = make()
    if loader == "from_pretrained":
        model = AutoModelForCausalLM.from_pretrained(directory)
    elif loader == "subfolder":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", subfolder="part")
    elif loader == "load_quantized":
        model = load_quantized(directory)
    else:
        load_quantized(nn.DataParallel(model) if loader == "wrapped" else model, directory)
    save_quantized(model, tmp_path / "b", format=second)
    written = tensors(tmp_path / "b")
    assert all(torch.equal(written[name], value) for name, value in more.items())
    assert (tmp_path / "b" / "LICENSE").read_text() == "free"


def test_quantized_while_it_is_loaded(tmp_path: Path) -> None:
    make, more = FAMILIES["qwen3_5"]
    source(tmp_path / "a", make(), more)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", quantization_config=GptqAoConfig(4, 32, method="rtn"))
    save_quantized(model, tmp_path / "b")
    assert set(more) <= set(tensors(tmp_path / "b"))


def test_an_origin_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots link to blobs. Nothing is fetched."""
    commit, name = "0" * 40, "models--someone--model"
    snapshot = tmp_path / name / "snapshots" / commit
    make, more = FAMILIES["qwen3_5"]
    source(tmp_path / "a", make(), more)
    (tmp_path / "a" / "LICENSE").write_text("free")
    snapshot.mkdir(parents=True)
    (tmp_path / name / "blobs").mkdir()
    for number, file in enumerate(sorted((tmp_path / "a").iterdir())):
        blob = tmp_path / name / "blobs" / str(number)
        file.rename(blob)
        (snapshot / file.name).symlink_to(blob)
    (tmp_path / name / "refs").mkdir()
    (tmp_path / name / "refs" / "main").write_text(commit)
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    model.config._name_or_path = "someone/model"  # as `from_pretrained("someone/model")` has it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    origin = origin_of(model)
    assert origin is not None
    assert origin.directory == snapshot
    assert set(origin.ignored) == set(more)
    assert "LICENSE" in origin.files


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    """Such as pickles, which transformers loads (it may have dropped some tensors of them)."""
    tiny_llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    report = quantize_(model, CONFIG)
    assert report is not None
    assert f"whether {tmp_path} has tensors that this LlamaForCausalLM has not is unknown: " in str(report)
    assert "no safetensors to read" in str(report)


BESIDE = {
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "preprocessor_config.json": '{"size": 2}',
    "processor_config.json": "{}",
    "generation_config.json": '{"max_length": 7}',
    "modeling_own.py": "raise AssertionError('code of a checkpoint was run')",
    "LICENSE": "free",
    "NOTICE.txt": "ü",
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "vocab.txt": "a\nb\n",
}


@pytest.mark.parametrize("mode", ["native", "gptq", "compressed-tensors", "dense", "streamed", "converted"])
def test_files_that_are_not_weights_come_along(mode: str, tmp_path: Path) -> None:
    directory, out = tmp_path / "a", tmp_path / "b"
    tiny_llama().save_pretrained(directory)
    for name, text in {**BESIDE, "README.md": "of the original", ".secret": "x", ".git/config": "x"}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    if mode == "converted":
        quantize(directory, tmp_path / "q", "native")
        shutil.rmtree(directory)
        convert_checkpoint(tmp_path / "q", out, "gptq")
    else:
        quantize(directory, out, mode)
    for name, text in BESIDE.items():
        # Saved by transformers itself, with its version.
        if name == "generation_config.json":
            assert json.loads((out / name).read_text())["max_length"] == 7
        else:
            assert (out / name).read_text(encoding="utf-8") == text, name
    assert not (out / ".secret").exists()
    assert not (out / ".git").exists()
    assert "of the original" not in (out / "README.md").read_text()  # the model card


def test_other_weights_are_named_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other frameworks, adapters, parts with weights of their own; links out of the directory; large files."""
    monkeypatch.setattr(side_files, "_MAX_BYTES", 1000)
    directory = tmp_path / "a"
    tiny_llama().save_pretrained(directory)
    left = ("adapter_model.safetensors", "onnx/model.onnx", "2_Dense/model.safetensors", "pytorch_model.bin", "big.txt")
    for name in (*left, "2_Dense/config.json", "small.txt"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("x" * (1001 if name == "big.txt" else 1000))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    (directory / "link.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    (directory / "linked").symlink_to(tmp_path / "outside")
    report = quantize(directory, tmp_path / "b", "streamed")
    (note,) = (n for n in report.notes if n.startswith("not copied"))
    for name in ("2_Dense", "adapter_model.safetensors", "big.txt"):
        assert name in note
    model = AutoModelForCausalLM.from_pretrained(directory)
    origin = origin_of(model)
    assert origin is not None
    expected = {"2_Dense", "adapter_model.safetensors", "big.txt", "link.txt", "linked", "onnx", "pytorch_model.bin"}
    assert set(origin.left) == expected
    assert {p.name for p in (tmp_path / "b").iterdir()} & {*expected, "small.txt"} == {"small.txt"}
