"""A state dict that only rank 0 has, into models spread over ranks."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from gptq_ao.training import load_full_state_dict
from tests.ranks import device, on_ranks, outcomes
from tests.tensor.test_distributed_checkpoint import arranged, logits
from tests.tensor.test_fsdp import quantized


def from_rank0(how: str, settings: dict[str, Any]) -> None:
    model = quantized(**settings)
    expected, state = logits(model), copy.deepcopy(model).state_dict() if dist.get_rank() == 0 else {}
    other = quantized(**settings, seed=1 + dist.get_rank())
    if how == "meta":
        other = arranged(copy.deepcopy(model).to("meta"), "sharded").to_empty(device=device())
        for made, given in zip(other.buffers(), model.buffers(), strict=True):
            made.copy_(given)  # what is no part of a state dict
    else:
        arranged(other, how)
    load_full_state_dict(other, state, from_rank0=True)
    close = {"rtol": 1e-4, "atol": 1e-4} if how == "tensor parallel" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(other), expected, **close)


@pytest.mark.parametrize(
    ("how", "settings"),
    [
        ("whole", {"dtype": torch.bfloat16}),
        ("sharded", {"act_order": "group"}),
        ("meta", {"bits": 3, "act_order": "group"}),
        ("tensor parallel", {"act_order": "none"}),
    ],
    ids=str,
)
def test_only_rank_0_has_it(how: str, settings: dict[str, Any]) -> None:
    on_ranks(from_rank0, how, settings)


def wrong(what: str) -> None:
    model = quantized()
    state = model.state_dict() if dist.get_rank() == 0 else {}
    if what == "lacks":
        state.pop("model.layers.0.mlp.up_proj.weight", None)
    elif what == "dense" and state:
        state["model.layers.0.mlp.up_proj.weight"] = torch.ones(256, 128)
    elif what == "meta":
        model = model.to("meta")
    load_full_state_dict(arranged(model, "sharded"), state, from_rank0=True)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("lacks", "it lacks ['model.layers.0.mlp.up_proj.weight'], and has []"),
        ("dense", "'model.layers.0.mlp.up_proj.weight' is a Int4GroupTensor (256, 128) in the model, and a Tensor"),
        ("meta", "is on meta: make room for the model first, by model.to_empty"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(what: str, message: str) -> None:
    for found in outcomes(wrong, what):
        assert found.error is not None
        assert message in found.error


def with_torch() -> None:
    model = quantized()
    state = model.state_dict() if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(arranged(model, "sharded"), state, options=options)


def test_torch_names_the_way_that_works() -> None:
    """Its other ranks wait for dense tensors, until rank 0 is gone."""
    first, second = outcomes(with_torch, seconds=20)
    assert first.error is not None
    assert "load a state dict that only rank 0 has by gptq_ao.training.load_full_state_dict" in first.error
    assert second.error is not None
