"""Adapters that are solved together with the codes, and their way to PEFT."""

import copy
import dataclasses
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gptq_ao import GptqAoConfig, GPTQConfig, gptq_config, quantize_, quantize_checkpoint, whole_model
from gptq_ao.adapter import LowRank
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.report import Report
from gptq_ao.training import attach_adapter, save_adapter
from tests.ranks import some

from ..models import Attention, seeded, tiny_llama, token_batches

# What PEFT says of any quantized model and of GPT-2, and of the base model's name.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.is_gradient_checkpointing.:FutureWarning")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Two(nn.Module):
    """Two layers; `branch` makes it one that torch.export cannot follow."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.branch = nn.Linear(32, 48), nn.Linear(48, 16), branch

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.branch and y.mean().item() > 1e9:
            y = -y
        return self.second(y.relu())


def quantized(model: nn.Module, config: GPTQConfig) -> Report:
    report = quantize_(model, config)
    assert report is not None
    return report


def total_error(report: Report) -> float:
    return sum(w.error or 0.0 for w in report.weights)


def dense_with(model: nn.Module, adapter: dict[str, LowRank]) -> nn.Module:
    """The model with Ŵ + BA as its weights."""
    same = copy.deepcopy(model)
    for name, pair in adapter.items():
        owner, _, own = name.rpartition(".")
        weight: Any = same.get_parameter(name)
        change = pair.B @ pair.A
        change = change.mT if weight.transposed else change
        value = (weight.dequantize(torch.float32) + change).to(weight.dtype)
        setattr(same.get_submodule(owner), own, nn.Parameter(value))
    return same


@pytest.mark.parametrize("bits", some([3, 2, 4, 8]))
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_an_adapter_takes_error_away_and_a_second_round_more(bits: int, effort: str) -> None:
    batches = [randn(64, 32, seed=i) @ randn(32, 32, seed=9) for i in range(4)]
    errors = []
    tries: tuple[dict[str, Any], ...] = ({}, {"adapter_rank": 4, "adapter_rounds": 1}, {"adapter_rank": 4})
    for settings in tries:
        report = quantized(
            model := seeded(Two()), gptq_config(bits, 16, effort=effort, calibration=batches, **settings)
        )
        errors.append(total_error(report))
    assert errors[1] < errors[0]
    # At 8 bits nearly nothing is left to correct, and the choice of scales decides.
    assert errors[2] < errors[1] * (1.1 if bits == 8 else 1)
    assert {n: (p.A.shape, p.B.shape) for n, p in report.adapter.items()} == {
        "first.weight": ((4, 32), (48, 4)),
        "second.weight": ((4, 48), (16, 4)),
    }
    # 4·(48 + 32) + 4·(16 + 48) = 576 numbers beside 48·32 + 16·48 = 2304 weights.
    assert report.adapter_bits_per_weight == report.to_dict()["adapter_bits_per_weight"] == 576 * 32 / 2304 == 8
    assert report.to_dict()["adapter_bytes"] == 576 * 4
    assert "report.adapter: of rank 4 for 2 weights, 0.0 MiB in fp32, 8.000 bits per weight more\n" in str(report)
    assert [layer["adapter_rank"] for layer in json.loads(json.dumps(report.to_dict()))["layers"]] == [4, 4]
    assert type(model.first.weight).__name__ == f"Int{bits}GroupTensor"


@pytest.mark.parametrize("branch", [False, True], ids=["graph", "replay"])
@pytest.mark.parametrize("act_order", ["group_aware", "group"])
def test_later_layers_are_solved_for_what_codes_and_adapter_make(branch: bool, act_order: str) -> None:
    batches = [randn(64, 32, seed=i) for i in range(4)]
    settings: dict[str, Any] = {"act_order": act_order, "compensate": "none", "calibration": batches}
    model: Any = seeded(Two(branch))
    report = quantized(model, gptq_config(2, 16, adapter_rank=6, **settings))
    assert report.capture == ("replay" if branch else "export")
    only = {"first.weight": report.adapter["first.weight"]}
    after: Any = dense_with(model, only)
    after.second = copy.deepcopy(seeded(Two(branch)).second)
    quantized(after, gptq_config(2, 16, adapter_rank=6, rules={"first": None}, **settings))
    # The same activations but for the order of fp32 sums: nearly all codes are the same.
    same = (after.second.weight.codes() == model.second.weight.codes()).float().mean()
    assert same > 0.99


def test_peft_computes_the_quantized_weight_plus_the_adapter(tmp_path: Path) -> None:
    batches = token_batches()
    model = tiny_llama()
    report = quantized(model, gptq_config(2, 32, adapter_rank=8, calibration=batches))
    expected = dense_with(model, report.adapter)(**batches[0]).logits
    save_adapter(model, report.adapter, tmp_path / "adapter")
    state = torch.random.get_rng_state()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter"), is_trainable=True)
    torch.random.set_rng_state(state)
    attached = attach_adapter(model, report.adapter)
    assert torch.equal(torch.random.get_rng_state(), state)
    for made in (attached, loaded):
        assert torch.allclose(made(**batches[0]).logits, expected, atol=1e-5)
        trained = {n for n, p in made.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * len(report.adapter) == 28
        made(**batches[0]).logits.square().mean().backward()
        gradients = [p.grad for n, p in made.named_parameters() if n in trained]
        assert all(g is not None and g.abs().max() > 0 for g in gradients)
    attached.save_pretrained(str(tmp_path / "by_peft"))
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "by_peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_gpt2_whose_weights_are_transposed(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=64)
    model = seeded(transformers.GPT2LMHeadModel(config))
    batches = token_batches()
    report = quantized(model, gptq_config(3, 32, adapter_rank=4, calibration=batches))
    assert {n.split(".", 3)[-1] for n in report.adapter} == {
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }
    expected = dense_with(model, report.adapter)(**batches[0]).logits
    save_adapter(model, report.adapter, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    assert torch.allclose(loaded(**batches[0]).logits, expected, atol=1e-5)


def test_rules_give_ranks_and_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    """In PEFT the name `first` also stands for `inner.first`, `up` for `down.up`."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(32, 32), Two()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.first(x).relu())

    model, x = seeded(Nested()), randn(64, 32)
    ranks: dict[str, Any] = {"first": {"adapter_rank": 3}, "inner.first": {"adapter_rank": 0}}
    report = quantized(model, gptq_config(3, 16, adapter_rank=5, rules=ranks, calibration=[x]))
    assert {n: p.rank for n, p in report.adapter.items()} == {"first.weight": 3, "inner.second.weight": 5}
    assert report.notes == () or not any("adapter" in note for note in report.notes)
    expected = dense_with(model, report.adapter)(x)
    save_adapter(model, report.adapter, tmp_path / "adapter")
    for made in (
        peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter")),
        attach_adapter(model, report.adapter),
    ):
        assert torch.allclose(made(x), expected, atol=1e-5)


def test_streamed_it_is_the_same(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    batches = token_batches()
    config = gptq_config(3, 32, effort="fast", adapter_rank=4, calibration=batches)
    streamed = quantize_checkpoint(tmp_path / "model", tmp_path / "out", config)
    report = quantized(tiny_llama(), config)
    assert streamed.adapter.keys() == report.adapter.keys()
    for name, pair in report.adapter.items():
        assert torch.equal(pair.A, streamed.adapter[name].A), name
        assert torch.equal(pair.B, streamed.adapter[name].B), name


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Own(nn.Module):
    """A parameter of its own, and one that is multiplied in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.part, self.last = nn.Parameter(torch.empty(32, 32)), nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = (x @ self.matrix).relu()
        y = nn.functional.linear(y, self.part.weight[:32]).relu()
        return self.last(nn.functional.linear(y, self.part.weight[32:]).relu())


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.last = nn.MultiheadAttention(32, 2, batch_first=True), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (4, -1))
        return self.last(self.heads(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    ("model", "has", "message"),
    [
        (Tied(), {"b.weight"}, r"no adapter can be put beside a\.weight \(the weight of several modules\)"),
        (Own(), {"last.weight"}, r"matrix \(not .* that is called\); part\.weight \(made of parts with Hessians of"),
        (Heads(), {"last.weight"}, r"heads\.in_proj_weight, heads\.out_proj\.weight \(not .* that is called\)"),
    ],
    ids=["tied", "own", "heads"],
)
def test_what_peft_has_no_adapter_for_is_in_the_notes(model: nn.Module, has: set[str], message: str) -> None:
    report = quantized(seeded(model), gptq_config(3, 16, adapter_rank=4, calibration=[randn(64, 32)]))
    assert report.adapter.keys() == has
    (note,) = (note for note in report.notes if "adapter" in note)
    assert re.search(message, note)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"adapter_rank": 33},
            r"adapter_rank is 33, and 'first\.weight' \[48, 32\] has no more than rank 32: give less",
        ),
        ({"adapter_rank": 17}, r"'second\.weight' \[16, 48\] has no more than rank 16: .*'adapter_rank': 0"),
        ({"adapter_rank": -1}, r"adapter_rank is -1: give a number of columns of B and rows of A in an adapter, 0"),
        ({"adapter_rank": 2.5}, r"adapter_rank is 2\.5: "),
        ({"adapter_rank": True}, r"adapter_rank is True: "),
        ({"adapter_rank": 4, "adapter_rounds": 0}, r"adapter_rounds is 0: give a number of rounds, 1 or more"),
        ({"adapter_rank": 4, "method": "rtn"}, r"adapter_rank=4 needs method=\"gptq\", not 'rtn'"),
        ({"adapter_rank": 4, "rules": {"first": {"method": "rtn"}}}, r"rule 'first': adapter_rank=4 needs method"),
    ],
)
def test_what_cannot_be_is_said_before_anything_changes(settings: dict[str, Any], message: str) -> None:
    model = seeded(Two())
    with pytest.raises(ConfigError, match=message):
        quantize_(model, gptq_config(4, 16, calibration=[randn(64, 32)], **settings))
    assert type(model.first.weight) is nn.Parameter


def test_an_error_where_no_weight_can_have_one() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.empty(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix

    with pytest.raises(
        ConfigError, match=r"no weight can have an adapter: 'matrix' is not the weight of an nn\.Linear"
    ):
        quantize_(seeded(Alone()), gptq_config(4, 16, adapter_rank=4, calibration=[randn(64, 32)]))


@pytest.mark.parametrize("how", ["torchao", "torchao with data", "transformers"])
def test_callers_that_would_lose_the_adapter_refuse(how: str) -> None:
    from torchao.quantization import quantize_ as torchao_quantize_

    data = [randn(64, 32)]
    config = gptq_config(4, 16, adapter_rank=4, calibration=None if how == "torchao" else data)
    filter_fn = None if how == "torchao" else whole_model
    calls: dict[str, Any] = {"transformers": lambda: GptqAoConfig(4, 16, adapter_rank=4, calibration=data)}
    call = calls.get(how, lambda: torchao_quantize_(seeded(Two()), config, filter_fn=filter_fn))
    with pytest.raises(ConfigError, match=r"need the adapter of the report, and .* would lose it: call gptq_ao\.quant"):
        call()


def test_automatic_precision_chooses_bits_and_then_adapters_are_solved() -> None:
    model, batches = seeded(Two()), [randn(64, 32, seed=i) for i in range(2)]
    report = quantized(model, gptq_config(target_bits=10, group_size=16, adapter_rank=4, calibration=batches))
    assert report.precision
    assert report.adapter.keys() == {w.name for w in report.weights}


def test_a_weight_that_no_data_reaches_is_a_fallback_without_adapter() -> None:
    x = torch.zeros(16, 32)
    report = quantized(seeded(Two()), gptq_config(4, 16, adapter_rank=4, rules={"second": None}, calibration=[x]))
    assert report.adapter == {}
    assert report.fallbacks == {"first.weight": "no calibration row reached it"}


@pytest.mark.parametrize("function", ["attach", "save"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {}, r"the adapter is empty: quantize with gptq_config\(adapter_rank=16"),
        (lambda a: {"third.weight": a["first.weight"]}, r"has 'third\.weight' \[48, 32\], the Two has no such weight"),
        (
            lambda a: {"second.weight": a["first.weight"]},
            r"\[48, 32\], the Two has \[16, 48\] there: give the model that",
        ),
    ],
    ids=["empty", "unknown", "shape"],
)
def test_an_adapter_of_another_model(function: str, change: Any, message: str, tmp_path: Path) -> None:
    model = seeded(Two())
    report = quantized(model, gptq_config(4, 16, adapter_rank=4, calibration=[randn(64, 32)]))
    call: Any = attach_adapter if function == "attach" else partial(save_adapter, directory=tmp_path / "adapter")
    with pytest.raises(ConfigError, match=message):
        call(model, change(report.adapter))
    assert not (tmp_path / "adapter").exists()
    assert type(model.first) is nn.Linear


def test_a_directory_that_holds_something_and_no_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = {"first.weight": LowRank(torch.zeros(2, 32), torch.zeros(48, 2))}
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        save_adapter(Two(), adapter, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="PEFT, which is not installed: pip install peft"):
        save_adapter(Two(), adapter, tmp_path / "new")
    with pytest.raises(ConfigError, match="PEFT, which is not installed: pip install peft"):
        attach_adapter(Two(), adapter)


def test_attention_of_plain_torch_and_the_report_compares() -> None:
    model = seeded(Attention(32))
    report = quantized(model, gptq_config(3, 16, adapter_rank=4, calibration=[randn(2, 16, 32)]))
    assert len(report.adapter) == 4
    assert report == dataclasses.replace(report)
