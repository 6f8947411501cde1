"""Numbers in a config that no model has: one error, at once, before anything is allocated."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from gptq_ao import gptq_config, load_quantized, quantize_, quantize_checkpoint, save_quantized
from gptq_ao.errors import CheckpointError
from gptq_ao.model.empty import empty_model
from gptq_ao.model.limits import Limits

from ..checkpoint.test_directories import EXPERTS
from ..models import seeded, tiny_llama

RTN = gptq_config(bits=4, group_size=32, method="rtn")
LOADERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "native": ("native", load_quantized),
    "gptq": ("gptq", load_quantized),
    "from_pretrained": ("gptq", AutoModelForCausalLM.from_pretrained),
    "quantize_checkpoint": ("dense", lambda path: quantize_checkpoint(path, path / "out", RTN)),
    "bare config": ("dense", empty_model),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    experts = transformers.MixtralForCausalLM._from_config(transformers.MixtralConfig(**EXPERTS), dtype=torch.float32)
    for name, model in (("llama", tiny_llama()), ("mixtral", seeded(experts))):
        quantize_(model, RTN)
        for format in ("native", "gptq", "dense"):
            save_quantized(model, folder / name / format, format=format)
    return folder


def changed(saved: Path, path: Path, change: dict[str, Any]) -> Path:
    shutil.copytree(saved, path)
    config = path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    return path


SIZES: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 2**40}, r"config.json says hidden_size = 1099511627776, which cannot be"),
    ({"intermediate_size": 2**60}, r"says intermediate_size = "),
    ({"head_dim": 2**40}, r"says head_dim = "),
    ({"vocab_size": 2**40}, r"says vocab_size = "),
    ({"vocab_size": -5}, r"says vocab_size = -5, which cannot be: at least 0, at most 2147483647"),
    ({"num_hidden_layers": 10**9}, r"says num_hidden_layers = 1000000000, which cannot be: at least 0, at most 2000"),
    ({"num_hidden_layers": -1}, r"says num_hidden_layers = -1"),
    ({"num_key_value_heads": -2}, r"says num_key_value_heads = -2"),
    ({"text_config": {"num_hidden_layers": 10**9}}, r"says num_hidden_layers"),
    ({"of_tomorrow_layers": 10**9}, r"says of_tomorrow_layers = 1000000000"),
]


@pytest.mark.parametrize(("change", "message"), SIZES, ids=[str(change) for change, _ in SIZES])
@pytest.mark.parametrize("loader", LOADERS)
def test_sizes(loader: str, change: dict[str, Any], message: str, saved: Path, tmp_path: Path, loaders: None) -> None:
    format, load = LOADERS[loader]
    path = changed(saved / "llama" / format, tmp_path / "a", change)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=message):
        load(path)
    assert time.monotonic() - begin < 5
    assert not (path / "out").exists()


@pytest.mark.parametrize("loader", ["native", "gptq", "from_pretrained", "quantize_checkpoint", "bare config"])
def test_experts(loader: str, saved: Path, tmp_path: Path, loaders: None) -> None:
    format, load = LOADERS[loader]
    path = changed(saved / "mixtral" / format, tmp_path / "a", {"num_local_experts": 2**40})
    with pytest.raises(CheckpointError, match=r"says num_local_experts = 1099511627776"):
        load(path)
    # As a stack of 2^31 matrices it would be 2^44 numbers.
    path = changed(saved / "mixtral" / format, tmp_path / "b", {"num_local_experts": 2**31 - 1})
    with pytest.raises(CheckpointError, match=r"describes a tensor of shape \[2147483647|has shape|cannot be put"):
        load(path)


KINDS: list[dict[str, Any]] = [{"vocab_size": 96.5}, {"hidden_size": "64"}, {"num_hidden_layers": None}]
KINDS += [{"hidden_size": [64]}, {"num_hidden_layers": True}, {"num_attention_heads": 0}]


@pytest.mark.parametrize("change", KINDS, ids=str)
@pytest.mark.parametrize("loader", ["native", "gptq", "quantize_checkpoint", "bare config"])
def test_other_kinds_of_values(loader: str, change: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    format, load = LOADERS[loader]
    path = changed(saved / "llama" / format, tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=r"transformers .* cannot read .*config\.json: \w+Error: "):
        load(path)


def test_a_size_that_only_the_files_contradict(saved: Path, tmp_path: Path) -> None:
    """2^24 · 128 numbers are possible, of 65 thousand that are stored not."""
    for loader in ("native", "gptq", "quantize_checkpoint"):
        format, load = LOADERS[loader]
        path = changed(saved / "llama" / format, tmp_path / loader, {"hidden_size": 2**24})
        with pytest.raises(CheckpointError, match=r"describes a tensor of shape \[\d+, \d+\], which cannot be"):
            load(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(2**20, 2**20),
        lambda: torch.zeros((2**20, 2**20)),
        lambda: torch.ones(size=(2**20, 2**20)),
        lambda: torch.full((2**40,), 1.0),
        lambda: torch.randn(2**40),
        lambda: torch.arange(2**40),
        lambda: torch.arange(5, 2**40),
        lambda: torch.arange(end=2**40),
        lambda: torch.empty(-1, 4),
        lambda: torch.nn.Linear(2**20, 2**20),
        lambda: torch.nn.Embedding(2**20, 2**20),
    ],
)
def test_every_way_to_make_a_tensor(make: Callable[[], Any]) -> None:
    with (
        Limits([[4, 4]], "config.json"),
        pytest.raises(CheckpointError, match=r"config.json describes a tensor of shape"),
    ):
        make()


def test_the_number_of_parameters() -> None:
    limits = Limits([[4, 4]] * 3000, "config.json")
    for _ in range(8 * 3000):
        limits.count_parameter()
    with pytest.raises(CheckpointError, match="more parameters than there can be"):
        limits.count_parameter()


def test_what_is_right_is_built() -> None:
    with Limits([[4, 4]], "config.json"):
        assert torch.arange(0, 10, 2).tolist() == [0, 2, 4, 6, 8]
        assert torch.full((2,), 1.5).tolist() == [1.5, 1.5]
        assert torch.empty(0, 4).shape == (0, 4)
        assert torch.zeros(size=(2,)).tolist() == [0, 0]
        assert torch.zeros(torch.Size([1, 2])).shape == (1, 2)
        assert torch.arange(2.5).tolist() == [0, 1, 2]
