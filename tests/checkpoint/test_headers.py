"""The header of a shard is read in one place, and once."""

import ast
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import gptq_ao
from gptq_ao import cli, gptq_config, load_quantized, quantize_checkpoint, save_quantized
from gptq_ao.checkpoint.convert import convert_checkpoint
from gptq_ao.checkpoint.files import shards
from gptq_ao.checkpoint.files.shards import read_header
from gptq_ao.errors import CheckpointError
from gptq_ao.integrations import transformers as integration

from ..models import tiny_llama
from .test_directories import FORMATS, quantized


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each file was opened for its header."""
    counts: Counter[Path] = Counter()
    open_file = shards.safe_open

    def counted(path: Path, **options: Any) -> Any:
        counts[Path(path)] += 1
        return open_file(path, **options)

    monkeypatch.setattr(shards, "safe_open", counted)
    return counts


def load_into_a_model(directory: Path) -> nn.Module:
    return load_quantized(tiny_llama(), directory)


def convert(directory: Path) -> None:
    convert_checkpoint(directory, directory.parent / "converted", "native")


READERS: dict[str, Callable[[Path], Any]] = {
    "load_quantized": load_quantized,
    "into-a-model": load_into_a_model,
    "load_model": lambda directory: integration.load_model(str(directory)),
    "from_pretrained": AutoModelForCausalLM.from_pretrained,  # what transformers itself opens is not counted
    "convert": convert,
    "inspect": cli.inspect,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("format", FORMATS)
def test_each_header_is_read_once(format: str, reader: str, loaders: None, read: Counter[Path], tmp_path: Path) -> None:
    integration.load_with_gptq_ao("gptq", "compressed-tensors")
    save_quantized(quantized(), tmp_path / "a", format=format, max_shard_bytes=60_000)
    read.clear()
    READERS[reader](tmp_path / "a")
    files = [path.resolve() for path in (tmp_path / "a").glob("*.safetensors")]
    assert len(files) > 1
    # `convert` loads, and then looks once more, for what the model does not have.
    assert read == dict.fromkeys(files, 2 if reader == "convert" else 1)


def test_streaming_reads_no_header_twice(read: Counter[Path], tmp_path: Path) -> None:
    """Neither of the source nor of what has been written: weights are read back when a later segment needs them."""
    tiny_llama().save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    config = gptq_config(group_size=32, effort="fast", calibration=[torch.arange(64)[None]])
    quantize_checkpoint(tmp_path / "dense", tmp_path / "q", config, max_shard_bytes=20_000)
    sources = {path.resolve() for path in (tmp_path / "dense").glob("*.safetensors")}
    assert sources < set(read)
    assert set(read.values()) == {1}


def test_nothing_else_opens_a_shard() -> None:
    root = Path(gptq_ao.__file__).parent
    using = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.alias) and node.name == "safe_open"
    }
    assert using == {"checkpoint/files/shards.py"}


def test_a_header_says_where_tensors_lie(tmp_path: Path) -> None:
    """Odd sizes, none and one: each tensor begins where the one before ends."""
    tensors = {
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "none": torch.zeros(3, 0, dtype=torch.bool),
        "half": torch.arange(6).view(2, 3).bfloat16(),
        "flags": torch.tensor([True, False, True]),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"key": "value"})
    stored = read_header(tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + size])
    assert set(stored) == set(tensors)
    for name, tensor in tensors.items():
        assert stored[name].offset == 8 + size + entries[name]["data_offsets"][0]
        assert torch.equal(stored[name].read(), tensor), name
    assert [stored[n].offset for n in stored] == sorted(t.offset for t in stored.values())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.complex64])
def test_a_dtype_that_is_not_supported(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2).to(dtype)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a.safetensors: tensor 'b' is of type \w+, which is not supported"):
        read_header(tmp_path / "a.safetensors")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors") == {}
