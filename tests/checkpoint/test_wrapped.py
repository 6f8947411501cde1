"""Models inside of wrappers: what is written is the model, or nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import AutoModelForCausalLM

from gptq_ao import gptq_config, load_quantized, quantize_, save_quantized
from gptq_ao.errors import CheckpointError, TrainingWarning

from ..models import tiny_llama, token_batches
from .test_directories import assert_same_weights

# PEFT asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Logits(nn.Module):
    """A module around a model, with the model's config."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config


class WithValueHead(Logits):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.value = nn.Linear(64, 1)


def quantized() -> Any:
    """Its output head is not quantized."""
    model = tiny_llama()
    quantize_(model, gptq_config(bits=4, group_size=32, method="rtn"))
    return model


def with_compiled_layers(model: Any) -> Any:
    model.model.layers[0] = torch.compile(model.model.layers[0])
    model.lm_head = torch.compile(model.lm_head)
    return model


def compiled_in_place(model: Any) -> Any:
    model.compile()
    return model


def lora() -> Any:
    return peft.LoraConfig(r=2, target_modules=["lm_head"])


def with_an_adapter(model: Any) -> Any:
    model.add_adapter(lora())
    return model


def without_its_adapter(model: Any) -> Any:
    model.add_adapter(lora())
    model.delete_adapter("default")
    return model


TRANSPARENT: dict[str, Callable[[Any], Any]] = {
    "compile": torch.compile,
    "compiled submodules": with_compiled_layers,
    "compiled in place": compiled_in_place,
    "DataParallel": DataParallel,
    "compiled DataParallel": lambda m: torch.compile(DataParallel(m)),
    "a parent": Logits,
    "Sequential": nn.Sequential,
    "a parent of a compiled model": lambda m: Logits(torch.compile(m)),
    "a deleted adapter": without_its_adapter,
    "an unloaded adapter": lambda m: peft.get_peft_model(m, lora()).unload(),
}
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "get_peft_model": (lambda m: peft.get_peft_model(m, lora()), "the model is a PeftModel: .* merge it before"),
    "add_adapter": (with_an_adapter, r"'lm_head' is a Linear: .*`model\.delete_adapter\(name\)"),
    "inject_adapter": (lambda m: peft.inject_adapter_in_model(lora(), m), "'lm_head' is a Linear: .* by itself"),
    "compiled adapter": (lambda m: torch.compile(with_an_adapter(m)), "'lm_head' is a Linear: "),
    "a parent with more": (WithValueHead, "parameters of its own, such as 'value.weight', that no loader would find"),
}


@pytest.mark.parametrize("format", ["native", "gptq", "compressed-tensors", "dense"])
@pytest.mark.parametrize("wrapper", TRANSPARENT)
def test_the_model_inside_is_written(wrapper: str, format: str, tmp_path: Path, loaders: None) -> None:
    model = quantized()
    wrapped = TRANSPARENT[wrapper](quantized())
    modules = dict(wrapped.named_modules())
    save_quantized(wrapped, tmp_path / "a", format=format)
    assert dict(wrapped.named_modules()) == modules
    save_quantized(model, tmp_path / "b", format=format)
    for file in (tmp_path / "b").iterdir():
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes(), file.name
    if format != "dense":
        assert assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "a")) == 14


@pytest.mark.parametrize("format", ["native", "gptq", "compressed-tensors", "dense"])
@pytest.mark.parametrize("wrapper", REFUSED)
def test_what_would_load_as_random_weights_is_refused(wrapper: str, format: str, tmp_path: Path) -> None:
    wrap, message = REFUSED[wrapper]
    with pytest.raises(CheckpointError, match=message):
        save_quantized(wrap(quantized()), tmp_path / "a", format=format)
    assert not list(tmp_path.iterdir())


def test_distributed_data_parallel(tmp_path: Path, one_process: None) -> None:
    wrapped = DistributedDataParallel(tiny_llama())
    with pytest.warns(TrainingWarning, match="DistributedDataParallel had been given"):
        quantize_(wrapped, gptq_config(bits=4, group_size=32, method="rtn"))
    save_quantized(wrapped, tmp_path / "a")
    assert assert_same_weights(quantized(), load_quantized(tmp_path / "a")) == 14


@pytest.mark.parametrize("kind", ["FSDP1", "FSDP2", "FSDP2 of a part"])
@pytest.mark.filterwarnings("ignore:FSDP is now backed by:FutureWarning", "ignore:.*`NO_SHARD` sharding:FutureWarning")
def test_sharded_models_are_refused(kind: str, tmp_path: Path, one_process: None) -> None:
    model: Any = quantized() if kind == "FSDP2 of a part" else tiny_llama()
    if kind == "FSDP1":
        model = FullyShardedDataParallel(model, None, ShardingStrategy.NO_SHARD, device_id=torch.device("cpu"))
    else:
        fully_shard(model.lm_head if kind == "FSDP2 of a part" else model)
    with pytest.raises(CheckpointError, match=r"each process has a part: gather the values first"):
        save_quantized(model, tmp_path / "a")


@pytest.mark.parametrize("format", ["native", "gptq"])
@pytest.mark.parametrize("wrap", [torch.compile, DataParallel, Logits], ids=["compile", "DataParallel", "a parent"])
def test_loading_fills_the_model_inside(wrap: Callable[[Any], Any], format: str, tmp_path: Path) -> None:
    model = quantized()
    save_quantized(model, tmp_path / "a", format=format)
    empty = tiny_llama(seed=1)
    wrapped = wrap(empty)
    assert load_quantized(wrapped, tmp_path / "a") is wrapped
    assert assert_same_weights(model, empty) == 14


@pytest.mark.parametrize("wrap", [torch.compile, DataParallel], ids=["compile", "DataParallel"])
def test_quantizing_a_wrapped_model_quantizes_the_one_inside(wrap: Callable[[Any], Any]) -> None:
    config = gptq_config(bits=4, group_size=32, calibration=token_batches(1))
    expected, model = tiny_llama(), tiny_llama()
    quantize_(expected, config)
    report: Any = quantize_(wrap(model), config)
    assert {w.name for w in report.weights} == {n for n, p in expected.named_parameters() if p.dim() == 2} - {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert assert_same_weights(expected, model) == 14
