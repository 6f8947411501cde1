"""A state dict that only rank 0 has, into models spread over ranks."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from gptq_ao.training import load_full_state_dict
from tests.models import tiny_llama
from tests.ranks import on_ranks, outcomes, some
from tests.tensor.test_distributed_checkpoint import arranged, logits
from tests.tensor.test_fsdp import quantized, with_lora

FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def from_rank0(how: str, settings: dict[str, Any], by: str) -> None:
    model = quantized(**settings)
    expected, state = logits(model), copy.deepcopy(model).state_dict() if dist.get_rank() == 0 else {}
    other = quantized(**settings, seed=1 + dist.get_rank())
    if how == "meta":
        other = arranged(copy.deepcopy(model).to("meta"), "sharded")
        if by == "gptq_ao":
            other.to_empty(device="cpu")
        other.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # what is no part of a state dict
    else:
        arranged(other, how)
    if by == "gptq_ao":
        load_full_state_dict(other, state, from_rank0=True)
    else:
        set_model_state_dict(other, state, options=FROM_RANK_0)
    close = {"rtol": 1e-4, "atol": 1e-4} if how == "tensor parallel" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(other), expected, **close)


@pytest.mark.parametrize("by", some(["gptq_ao", "torch"]))
@pytest.mark.parametrize(
    ("how", "settings"),
    some(
        [
            ("whole", {"dtype": torch.bfloat16}),
            ("sharded", {"act_order": "group"}),
            ("meta", {"bits": 3, "act_order": "group"}),
            ("tensor parallel", {"act_order": "none"}),
        ]
    ),
    ids=str,
)
def test_only_rank_0_has_it(how: str, settings: dict[str, Any], by: str) -> None:
    on_ranks(from_rank0, how, settings, by)


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


def with_torch(what: str) -> None:
    model = arranged(tiny_llama(width=128, layers=1) if what == "dense model" else quantized(), "sharded")
    state = (tiny_llama(width=128, layers=1) if what == "dense state" else quantized()).state_dict()
    set_model_state_dict(model, state if dist.get_rank() == 0 else {}, options=FROM_RANK_0)


@pytest.mark.parametrize(
    ("what", "message"),
    some(
        [
            (
                "dense state",
                "q_proj.weight' is a Int4GroupTensor (128, 128) in the model, and a Tensor (128, 128) in the",
            ),
            (
                "dense model",
                "q_proj.weight' is a Tensor (128, 128) in the model, and a Int4GroupTensor (128, 128) in the",
            ),
        ]
    ),
)
def test_torch_refuses_what_does_not_fit_on_every_rank(what: str, message: str) -> None:
    for found in outcomes(with_torch, what, seconds=20):
        assert found.error is not None
        assert message in found.error


def adapters_alone() -> None:
    """The names that the state dict lacks keep what they have."""
    trained, other = with_lora(quantized()), arranged(with_lora(quantized(seed=1)), "sharded")
    weights = {n: p for n, p in other.named_parameters() if "lora_" not in n}
    before = {n: p.full_tensor().clone() for n, p in weights.items()}
    state: dict[str, Any] = {n: torch.ones_like(t) for n, t in trained.state_dict().items() if "lora_" in n}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(other, state if dist.get_rank() == 0 else {}, options=options)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter.full_tensor(), before.get(name, torch.ones(parameter.shape)))


@pytest.mark.long
def test_a_state_dict_of_adapters() -> None:
    on_ranks(adapters_alone)
