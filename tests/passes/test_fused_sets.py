"""Which weights an engine would fuse, and when that is said."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from gptq_ao import gptq_config, plan, quantize_
from gptq_ao.errors import FusedSettingsWarning
from gptq_ao.passes.choose_weights import choose_weights
from gptq_ao.passes.products.fused_sets import mixed_sets
from gptq_ao.passes.records import Layout, LinearSite, Rows

from ..models import seeded, tiny_llama, token_batches


def site(weight: str, rows: str, left_out: str | None = None) -> LinearSite:
    return LinearSite(weight, weight, Layout((64, 64), 1, 64, 64, False), (0, 64), (Rows(rows),), left_out=left_out)


def sets(sites: list[LinearSite], rules: dict[str, Any], wanted: Any = lambda name: True) -> tuple[str, ...]:
    return mixed_sets(sites, choose_weights(tuple(sites), (), gptq_config(4, 32, rules=rules), wanted))


ATTENTION = [site(f"l.0.attn.{n}.weight", "x") for n in "qkv"] + [site("l.0.attn.o.weight", "y")]
EXPERTS = [site(f"l.0.mlp.experts.{e}.{n}.weight", f"{e}{n == 'down'}") for e in range(4) for n in ("up", "down")]


def test_siblings_that_multiply_the_same_rows() -> None:
    assert sets(ATTENTION, {}) == ()
    assert sets(ATTENTION, {"re:.*attn.[qkv]": {"bits": 8}}) == ()  # alike among themselves
    assert sets(ATTENTION, {"l.0.attn.o": None}) == ()
    assert sets(ATTENTION, {"re:.*attn.v": {"act_order": "none", "damp_percent": 0.1}}) == ()  # the solver's business
    (line,) = sets(ATTENTION, {"re:.*attn.v": {"bits": 8}})
    assert line == (
        "l.0.attn.q.weight, l.0.attn.k.weight: 4 bits, group_size 32, symmetric; "
        "l.0.attn.v.weight: 8 bits, group_size 32, symmetric"
    )
    assert "k.weight: 4 bits, group_size 64, symmetric" in sets(ATTENTION, {"l.0.attn.k": {"group_size": 64}})[0]
    assert "k.weight: 4 bits, group_size 32, asymmetric" in sets(ATTENTION, {"l.0.attn.k": {"sym": False}})[0]
    assert "k.weight: not quantized" in sets(ATTENTION, {"l.0.attn.k": None})[0]
    assert "k.weight: not quantized" in sets(ATTENTION, {}, lambda name: ".k." not in name)[0]


def test_same_rows_in_different_modules_and_different_rows_in_one_are_not_fused() -> None:
    sites = [site("l.0.attn.q.weight", "x"), site("l.0.mlp.up.weight", "x"), site("l.0.attn.o.weight", "y")]
    assert sets(sites, {"l.0.mlp.up": {"bits": 8}, "l.0.attn.o": {"bits": 2}}) == ()


def test_all_experts_of_a_layer_are_one_set() -> None:
    assert sets(EXPERTS, {}) == ()
    (line,) = sets(EXPERTS, {"re:.*experts.2.*": {"bits": 8}})
    assert line == (
        "l.0.mlp.experts.0.up.weight, l.0.mlp.experts.0.down.weight and 4 more: 4 bits, group_size 32, symmetric; "
        "l.0.mlp.experts.2.up.weight, l.0.mlp.experts.2.down.weight: 8 bits, group_size 32, symmetric"
    )
    stacked = [site("l.0.mlp.experts.gate_up_proj", "x"), site("l.0.mlp.experts.down_proj", "y")]
    assert len(sets(stacked, {"re:.*down_proj": None})) == 1
    assert sets(stacked, {"re:.*l.0.*": {"bits": 3}}) == ()


def test_a_router_or_head_is_a_product_of_its_own() -> None:
    sites = [site("mlp.shared.weight", "x"), site("mlp.gate.weight", "x", left_out="router")]
    assert sets(sites, {}) == ()
    assert sets(sites, {"mlp.gate": {"bits": 8}}) == ()


@pytest.mark.parametrize("call", [quantize_, plan])
def test_one_warning_at_the_line_of_the_caller(call: Any) -> None:
    rules = {"re:.*v_proj": {"bits": 8}, "re:.*gate_proj": None, "re:.*down_proj": {"bits": 2}}
    with pytest.warns(FusedSettingsWarning, match=r"fused by inference engines such as vLLM") as caught:
        result = call(tiny_llama(), gptq_config(4, 32, rules=rules, calibration=token_batches(1)))
    (warning,) = caught
    assert warning.filename == __file__
    assert str(warning.message).count("\n") == 4  # two layers, attention and MLP
    assert len([w for w in result.warnings if not w.startswith("calibration data: ")]) == 4
    assert result.to_dict()["warnings"] == list(result.warnings)
    assert all(f"warning: {text}" in str(result) for text in result.warnings)
    assert "layers.1.mlp.gate_proj.weight: not quantized" in result.warnings[3]


def test_without_a_graph_names_are_all_there_is() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)
            self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum((e(self.q(x)) for e in self.experts), self.k(x))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(seeded(Mixture()), gptq_config(4, 32, method="rtn", rules={"q": {"bits": 8}}))
    top = nn.ModuleDict({"mlp": seeded(Mixture())})
    with pytest.warns(
        FusedSettingsWarning, match=r"mlp.experts.0.weight, mlp.experts.1.weight: 4 bits.*; mlp.experts.2"
    ):
        quantize_(top, gptq_config(4, 32, method="rtn", rules={"mlp.experts.2": {"bits": 8}}))
