"""Which names are names of one tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file
from torch import nn

from gptq_ao import gptq_config, quantize_, save_quantized
from gptq_ao.model.state import state_names
from gptq_ao.tensor import GroupTensor

from ..models import tiny_llama

TIED = [["model.embed_tokens.weight", "lm_head.weight"]]


def ties(model: nn.Module) -> list[list[str]]:
    return [names for names in state_names(model) if len(names) > 1]


def offloaded(model: Any, where: str, folder: Path) -> Any:
    if where == "cpu":
        cpu_offload(model)
    if where == "disk":
        disk_offload(model, folder)
    return model


@pytest.mark.parametrize("where", ["memory", "cpu", "disk"])
@pytest.mark.parametrize("how", ["tied", "untied", "never tied", "by data"])
def test_ties_wherever_the_weights_are(where: str, how: str, tmp_path: Path) -> None:
    model = tiny_llama(tied=how in ("tied", "untied"))
    if how == "untied":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    if how == "by data":
        model.lm_head.weight.data = model.model.embed_tokens.weight.data
    found = ties(offloaded(model, where, tmp_path))
    # In files, nothing shows what was never declared: both are written.
    assert found == (TIED if how == "tied" or (how == "by data" and where != "disk") else [])


@pytest.mark.parametrize("format", ["native", "gptq", "compressed-tensors", "dense"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_tied_head_of_an_offloaded_model_is_written_once(where: str, format: str, tmp_path: Path) -> None:
    model = offloaded(tiny_llama(tied=True), where, tmp_path / "off")
    quantize_(model, gptq_config(bits=4, group_size=32, method="rtn"))
    save_quantized(model, tmp_path / "a", format=format)
    names = set(load_file(next((tmp_path / "a").glob("*.safetensors"))))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_parts_of_one_tensor_are_not_tied() -> None:
    both = torch.arange(32.0).view(4, 8)
    model = nn.Module()
    model.a, model.b = nn.Parameter(both[:2]), nn.Parameter(both[2:])
    model.c, model.d = nn.Parameter(both[:2].view(8, 2)), nn.Parameter(both[:2])
    model.register_buffer("e", both[:2].view(torch.int32))
    model.register_buffer("f", torch.empty(0))
    model.register_buffer("g", torch.empty(0))
    assert ties(model) == [["a", "d"]]


def test_quantized_weights_are_tied_by_all_that_they_are_made_of() -> None:
    model = tiny_llama()
    quantize_(model, gptq_config(bits=4, group_size=32, method="rtn"))
    attention = model.model.layers[0].self_attn
    weight = attention.q_proj.weight
    assert isinstance(weight, GroupTensor)
    attention.o_proj.weight = nn.Parameter(weight.detach(), requires_grad=False)  # another object, the same codes
    assert ties(model) == [[f"model.layers.0.self_attn.{name}.weight" for name in ("q_proj", "o_proj")]]
    attention.o_proj.weight = nn.Parameter(weight.clone(), requires_grad=False)
    assert ties(model) == []
    attention.o_proj.weight = nn.Parameter(weight.mT, requires_grad=False)  # the same codes, read otherwise
    assert ties(model) == []


def test_on_meta_objects_tell() -> None:
    with torch.device("meta"):
        assert ties(tiny_llama(tied=True)) == TIED
        assert ties(tiny_llama()) == []
