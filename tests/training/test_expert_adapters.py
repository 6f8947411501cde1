"""Adapters of stacked experts, which PEFT puts beside parameters (`target_parameters`)."""

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from gptq_ao import gptq_config, quantize_checkpoint
from gptq_ao.model.empty import empty_model
from gptq_ao.training import attach_adapter, save_adapter

from ..families.tiny import seeded_model, tiny_config
from ..models import seeded, token_batches
from .test_adapters import dense_with, quantized, randn

# What PEFT says of any quantized model, and of the base model's name.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.is_gradient_checkpointing.:FutureWarning")


def with_experts(family: str) -> Any:
    """4 experts, 64 wide and 96 inside."""
    more = {"layer_types": ["full_attention"]} if family == "GptOss" else {}
    config = tiny_config(getattr(transformers, f"{family}Config"), num_hidden_layers=1, **more)
    return seeded_model(getattr(transformers, f"{family}ForCausalLM"), config)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # not true
@pytest.mark.parametrize(
    ("family", "settings", "up", "down"),
    [
        ("Mixtral", {}, 4, 4),
        ("GptOss", {}, 4, 4),
        ("Mixtral", {"calibrate_all_experts": True}, 4, 4),
        ("Mixtral", {"expert_min_rows": 0, "rules": {"re:.*gate_up_proj": {"adapter_rank": 2}}}, 2, 4),
        ("Mixtral", {"rules": {"re:.*self_attn.*": {"adapter_rank": 2}}}, 4, 4),
        ("Mixtral", {"rules": {"re:.*(down_proj|self_attn).*": {"adapter_rank": 0}}}, 4, 0),
    ],
    ids=["stack", "transposed", "shared Hessian", "two ranks", "rank of layers", "one stack alone"],
)
def test_stacked_experts_get_one_each(
    family: str, settings: dict[str, Any], up: int, down: int, tmp_path: Path
) -> None:
    model, batches = with_experts(family), token_batches()
    report = quantized(model, gptq_config(2, 32, effort="fast", adapter_rank=4, calibration=batches, **settings))
    stacks = {n.rsplit(".", 1)[-1]: (p.B.shape, p.A.shape) for n, p in report.adapter.items() if p.A.dim() == 3}
    assert stacks.get("gate_up_proj") == ((4, 192, up), (4, up, 64))
    assert stacks.get("down_proj") == (((4, 64, down), (4, down, 96)) if down else None)
    with torch.no_grad():
        expected = dense_with(model, report.adapter)(**batches[0]).logits
        assert not torch.allclose(model(**batches[0]).logits, expected, atol=1e-2)
        save_adapter(model, report.adapter, tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter"))
        attached = attach_adapter(model, report.adapter)
        for made in (loaded, attached):
            assert torch.allclose(made(**batches[0]).logits, expected, atol=1e-5)
    attached.save_pretrained(str(tmp_path / "by_peft"))
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "by_peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


class Stack(nn.Module):
    """Expert i multiplies the rows of the i-th sequence. `is_transposed` is what PEFT goes by."""

    def __init__(self, experts: int = 3, branch: bool = False, transposed: bool = False) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.empty(experts, *((32, 24) if transposed else (24, 32))))
        self.first, self.last = nn.Linear(32, 32), nn.Linear(24, 16)
        self.branch, self.transposed, self.is_transposed = branch, transposed, transposed

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.branch and x.mean().item() > 1e9:  # torch.export cannot follow that
            x = -x
        return self.last(torch.bmm(x, self.stack if self.transposed else self.stack.mT).relu())


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
@pytest.mark.parametrize("branch", [False, True], ids=["graph", "replay"])
def test_later_layers_are_solved_for_what_codes_and_adapters_make(branch: bool, transposed: bool) -> None:
    settings: dict[str, Any] = {"compensate": "none", "calibration": [randn(3, 64, 32)], "expert_min_rows": 0}
    model: Any = seeded(Around(Stack(branch=branch, transposed=transposed)))
    rules: dict[str, Any] = {"inner.first": None}
    report = quantized(model, gptq_config(2, 8, adapter_rank=6, rules=rules, **settings))
    assert report.capture == ("replay" if branch else "export")
    after: Any = dense_with(model, {"inner.stack": report.adapter["inner.stack"]})
    after.inner.last = copy.deepcopy(seeded(Around(Stack(branch=branch, transposed=transposed))).inner.last)
    quantized(after, gptq_config(2, 8, adapter_rank=6, rules={**rules, "inner.stack": None}, **settings))
    # The same activations but for the order of fp32 sums: nearly all codes are the same.
    same = (after.inner.last.weight.codes() == model.inner.last.weight.codes()).float().mean()
    assert same > 0.99


@pytest.mark.parametrize("branch", [False, True], ids=["graph", "replay"])
def test_an_expert_that_no_data_reaches_gets_one_that_adds_nothing(branch: bool) -> None:
    x = randn(3, 64, 32)
    model: Any = seeded(Around(Stack(branch=branch)))
    model.inner.first.bias.data.zero_()
    x[1] = 0
    rules: dict[str, Any] = {"inner.first": None}
    report = quantized(model, gptq_config(2, 8, adapter_rank=4, expert_min_rows=0, calibration=[x], rules=rules))
    pair = report.adapter["inner.stack"]
    assert report.capture == ("replay" if branch else "export")
    used, errors = pair.dense().view(3, 24, 32).abs().amax((1, 2)), [w.error for w in report.weights]
    assert used[0] > 0 < used[2]
    assert used[1] == 0 < pair.B[1].norm(dim=0).min()  # A pair of zeros would have no gradient, ever.
    assert "rows 24:48: no calibration row reached it" in report.fallbacks["inner.stack"]
    plain = quantized(
        seeded(Around(Stack(branch=branch))),
        gptq_config(2, 8, expert_min_rows=0, calibration=[x], rules=rules),
    )
    assert errors[0] is not None
    assert errors[0] < (plain.weights[0].error or 0)


def untold() -> nn.Module:
    model: Any = Around(Stack(transposed=True))
    del model.inner.is_transposed
    return model


class NamedAlike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = Stack(), Around(Stack())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.outer(x)


@pytest.mark.parametrize(
    ("model", "experts", "without", "message"),
    [
        (Stack(), 3, "stack", r"stack \(a parameter of the model itself, for which PEFT has no adapters\)"),
        (NamedAlike(), 3, "inner.stack", r"inner\.stack \(of a name that another ends with, which PEFT cannot tell"),
        (untold(), 3, "inner.stack", r"inner\.stack \(stored the other way round than PEFT takes it for\)"),
        (Around(Stack(1)), 1, "inner.stack", r"inner\.stack \(not the weight .* that is called\)"),
    ],
    ids=["top", "names", "transposed", "one expert"],
)
def test_stacks_that_peft_cannot_adapt_are_in_the_notes(
    model: nn.Module, experts: int, without: str, message: str
) -> None:
    report = quantized(seeded(model), gptq_config(4, 8, adapter_rank=4, calibration=[randn(experts, 64, 32)]))
    assert without not in report.adapter
    (note,) = (note for note in report.notes if "adapter" in note)
    assert re.search(message, note)


def test_streamed_they_are_the_same_and_a_model_without_values_is_enough_to_save(tmp_path: Path) -> None:
    with_experts("Mixtral").save_pretrained(tmp_path / "model")
    config = gptq_config(3, 32, effort="fast", adapter_rank=4, calibration=token_batches())
    streamed = quantize_checkpoint(tmp_path / "model", tmp_path / "out", config)
    report = quantized(model := with_experts("Mixtral"), config)
    assert streamed.adapter.keys() == report.adapter.keys()
    save_adapter(model, report.adapter, tmp_path / "adapter")
    save_adapter(empty_model(tmp_path / "model"), streamed.adapter, tmp_path / "streamed")
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "streamed"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
