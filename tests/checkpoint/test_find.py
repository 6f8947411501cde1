"""Where `load_quantized` and `from_pretrained` find a checkpoint, and what they say if there is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from torch import nn
from transformers import AutoModelForCausalLM

from gptq_ao import load_quantized, save_quantized
from gptq_ao.checkpoint.convert import convert_checkpoint
from gptq_ao.errors import CheckpointError

from ..models import tiny_llama
from .test_directories import FORMATS, assert_same_weights, quantized

COMMIT, OTHER = "0" * 39 + "1", "0" * 39 + "2"


@pytest.fixture(autouse=True)
def offline(loaders: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats are loaded by this package, and from what is on this machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def hub_cache(cache: Path, name: str, *commits: tuple[str, Path]) -> None:
    """As the hub's client lays it out: files are links into `blobs`. The first commit is `main`, the second a tag."""
    model = cache / f"models--{name.replace('/', '--')}"
    for branch, (commit, files) in zip(("main", "v1"), commits, strict=False):
        (model / "refs").mkdir(parents=True, exist_ok=True)
        (model / "refs" / branch).write_text(commit)
        for number, file in enumerate(sorted(p for p in files.rglob("*") if p.is_file())):
            blob, link = model / "blobs" / f"{commit}-{number}", model / "snapshots" / commit / file.relative_to(files)
            for path in (blob, link):
                path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            link.symlink_to(blob)


def from_pretrained(*args: Any, **kwargs: Any) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(*args, **kwargs)
    return model


@pytest.mark.parametrize("subfolder", ["", "inner", "a/b"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("load", [load_quantized, from_pretrained])
def test_a_folder_of_a_directory_and_of_a_hub_cache(
    load: Callable[..., nn.Module], format: str, subfolder: str, tmp_path: Path
) -> None:
    other: dict[str, Any] = {"group_size": 16} if format == "awq" else {"bits": 8}
    first, second = quantized(), quantized(**other)
    save_quantized(first, tmp_path / "first" / subfolder, format=format, max_shard_bytes=60_000)
    save_quantized(second, tmp_path / "second" / subfolder, format=format)
    hub_cache(tmp_path / "hub", "org/name", (COMMIT, tmp_path / "first"), (OTHER, tmp_path / "second"))
    assert assert_same_weights(first, load(tmp_path / "first", subfolder=subfolder)) == 14
    cached: dict[str, Any] = {"subfolder": subfolder, "cache_dir": tmp_path / "hub"}
    assert assert_same_weights(first, load("org/name", **cached)) == 14
    for revision in ("v1", OTHER):
        assert assert_same_weights(second, load("org/name", revision=revision, **cached)) == 14
    if load is load_quantized:
        filled = load_quantized(tiny_llama(seed=1), "org/name", **cached)
        assert assert_same_weights(first, filled) == 14


def test_what_there_is_none_of(tmp_path: Path) -> None:
    save_quantized(quantized(), tmp_path / "a")
    hub_cache(tmp_path / "hub", "org/name", (COMMIT, tmp_path / "a"))
    (tmp_path / "empty").mkdir()
    cases: list[tuple[str | Path, dict[str, Any], str]] = [
        (tmp_path / "nothing", {}, "nothing does not exist: give a directory, or the id of a model on the hub"),
        ("./nothing", {}, "does not exist"),
        (tmp_path / "a" / "config.json", {}, r"config.json is a file: give the directory that it is in"),
        (tmp_path / "a", {"subfolder": "b"}, "has no folder 'b'"),
        (tmp_path / "a", {"subfolder": "../a"}, r"subfolder is '\.\./a': give the path of a folder inside of"),
        (tmp_path / "a", {"subfolder": "/etc"}, "subfolder is '/etc'"),
        ("org/other", {}, "'org/other' is neither a directory here, nor a model of the hub that can be read: "),
        ("org/name", {"revision": "v9"}, "the hub that can be read at revision 'v9': "),
        ("org/name", {"subfolder": "b"}, "org/name has no folder 'b'"),
        (tmp_path / "empty", {}, r"empty has no gptq_ao\.json: not a checkpoint of gptq_ao, or one whose writing"),
    ]
    for source, options, message in cases:
        with pytest.raises(CheckpointError, match=message):
            load_quantized(source, cache_dir=tmp_path / "hub", **options)


def test_what_is_no_quantized_checkpoint(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    tiny_llama().save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    for name in ("dense", "shards"):
        with pytest.raises(CheckpointError, match=r"is not quantized: load it with `from_pretrained`"):
            load_quantized(tmp_path / name)
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    torch.save(tiny_llama().state_dict(), pickles / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, a pickle, which can run code: convert it"):
        load_quantized(pickles)
    save_quantized(quantized(), tmp_path / "q", format="gptq")
    shutil.copyfile(tmp_path / "q" / "config.json", pickles / "config.json")
    with pytest.raises(
        CheckpointError, match=r"no safetensors to read\. Its weights are in pytorch_model.bin, a pickle"
    ):
        load_quantized(pickles)


def test_an_index_cannot_lead_out_of_a_subfolder(tmp_path: Path) -> None:
    for format in FORMATS:
        inner = tmp_path / format / "inner"
        save_quantized(quantized(), inner, format=format)
        file = next(inner.glob("*.safetensors"))
        file.rename(tmp_path / format / "secret.safetensors")
        index = inner / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"] = dict.fromkeys(content["weight_map"], "../secret.safetensors")
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"names files outside of it|only plain \*\.safetensors names|lacks"):
            from_pretrained(tmp_path / format, subfolder="inner")


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MyConfig(LlamaConfig):
    model_type = "mine"
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


@pytest.mark.parametrize("format", FORMATS)
def test_code_of_a_checkpoint_runs_only_if_it_is_trusted(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    path = tmp_path / "a"
    save_quantized(quantized(), path, format=format)
    (path / "mine.py").write_text(CODE)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MyModel"]}
    config["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    (path / "config.json").write_text(json.dumps(config))
    message = r"made by code of its own, which is not run: if you trust it, give trust_remote_code=True; or build"
    with pytest.raises(CheckpointError, match=message):
        load_quantized(path)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(path, tmp_path / "b", "dense")
    model = load_quantized(path, trust_remote_code=True)
    assert type(model).__name__ == "MyModel"
    assert assert_same_weights(quantized(), model) == 14
    assert assert_same_weights(quantized(), load_quantized(tiny_llama(), path)) == 14  # a model that the caller built
    hub_cache(tmp_path / "hub", "org/mine", (COMMIT, path))
    again = load_quantized("org/mine", cache_dir=tmp_path / "hub", trust_remote_code=True)
    assert assert_same_weights(quantized(), again) == 14


def test_generation_settings_stay(tmp_path: Path) -> None:
    for format in FORMATS:
        save_quantized(quantized(), tmp_path / format, format=format)
        file = tmp_path / format / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "max_new_tokens": 7}))
        model: Any = load_quantized(tmp_path / format)
        assert model.generation_config.max_new_tokens == 7


def test_a_config_that_transformers_cannot_read(tmp_path: Path) -> None:
    save_quantized(quantized(), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "model_type": "of-tomorrow"}))
    with pytest.raises(CheckpointError, match=r"transformers .* cannot read .*config.json: .*of-tomorrow"):
        load_quantized(tmp_path / "a")
