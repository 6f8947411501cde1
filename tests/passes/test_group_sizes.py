"""The group size of each weight: chosen where none is given, refused where the given one does not divide."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torchao.quantization
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict

from gptq_ao import gptq_config, plan, quantize_
from gptq_ao.errors import ConfigError
from gptq_ao.passes.choose_weights import choose_weights
from gptq_ao.passes.products.group_sizes import smaller_groups
from gptq_ao.passes.records import Layout, LinearSite, Rows

from ..models import seeded


def site(name: str, width: int, rows: str = "x") -> LinearSite:
    return LinearSite(name, name, Layout((8, width), 1, 8, width, False), (0, 8), (Rows(rows),))


def sizes(sites: list[LinearSite], **settings: Any) -> dict[str, int | None]:
    chosen = choose_weights(tuple(sites), (), gptq_config(**settings))
    return {name: c.group_size for name, c in chosen.settings.items()}


def mlp(*widths: int) -> nn.Sequential:
    return seeded(nn.Sequential(*(nn.Linear(k, n) for k, n in pairwise(widths))))


@pytest.mark.parametrize(
    ("width", "size"),
    [(128, 128), (4096, 128), (576, 64), (64, 64), (96, 32), (48, 16), (16, 16), (8, -1), (100, -1), (27, -1), (1, -1)],
)
def test_the_largest_that_divides(width: int, size: int) -> None:
    assert sizes([site("a.weight", width)]) == {"a.weight": size}


def test_weights_that_engines_fuse_get_the_same() -> None:
    """Experts are one set, although those that come out of them have another width; q, k and v have one width."""
    experts = [site(f"l.experts.{e}.{n}.weight", k, n) for e in range(2) for n, k in (("up", 256), ("down", 96))]
    others = [site("l.attn.q.weight", 256), site("l.attn.k.weight", 256), site("l.o.weight", 96, "y")]
    assert set(sizes(experts).values()) == {32}
    assert list(sizes([*others, *experts]).values()) == [128, 128, 32, 32, 32, 32, 32]
    stacked = [site("l.experts.gate_up_proj", 256, "x"), site("l.experts.down_proj", 36, "y")]
    assert set(sizes(stacked).values()) == {-1}
    # One that a rule leaves as it is, or gives a size, has no say.
    assert sizes(stacked, rules={"l.experts.down_proj": None}) == {"l.experts.gate_up_proj": 128}
    assert list(sizes(stacked, rules={"re:.*down_proj": {"group_size": 12}}).values()) == [128, 12]


def test_rules_and_presets_give_sizes_or_leave_them_open() -> None:
    sites = [site("a.weight", 192), site("b.weight", 128, "y")]
    assert list(sizes(sites, rules={"a": {"group_size": 96}}).values()) == [96, 128]
    assert list(sizes(sites, group_size=-1, rules={"a": {"group_size": None}}).values()) == [64, -1]
    assert list(sizes(sites, preset="4bit-32-act").values()) == [32, 32]
    with pytest.raises(ConfigError, match=r"128 does not divide 192, the input features of 'a.weight'"):
        sizes(sites, preset="4bit-128")


def test_all_ways_choose_the_same_and_say_so() -> None:
    """quantize_ with and without data, plan, automatic precision, torchao's own `quantize_`, a serialized config."""
    batches = [torch.randn(40, 576, generator=torch.Generator().manual_seed(0))]
    fast: dict[str, Any] = {"effort": "fast", "calibration": batches}
    expected, widths = [64, 128, 64, 12], (576, 256, 64, 12, 4)
    reports = [
        quantize_(mlp(*widths), gptq_config(**fast)),
        quantize_(mlp(*widths), gptq_config(method="rtn")),
        quantize_(mlp(*widths), gptq_config(target_bits=6.5, candidates=(4, 8), **fast)),
    ]
    for report in reports:
        assert report is not None
        assert [w.group_size for w in report.weights] == expected
        (note,) = (n for n in report.notes if n.startswith("group_size"))
        assert note == (
            "group_size: 128 does not divide the input features of 3 weights, or of some that engines fuse with them, "
            "which got groups of 64 (1 of 576 input features), groups of 64 (1 of 64 input features), "
            "one scale per row (1 of 12 input features)"
        )
        assert report.recipe == {} or "group_size by width" in report.recipe["recipe"]
    assert [w.group_size for w in plan(mlp(*widths), gptq_config(**fast)).weights] == expected
    model = mlp(*widths)
    torchao.quantization.quantize_(model, config_from_dict(config_to_dict(gptq_config())))
    assert [module.weight.group_size for module in model] == expected  # type: ignore[union-attr]


def test_where_128_divides_nothing_changes_and_nothing_is_said() -> None:
    batches = [torch.randn(40, 256, generator=torch.Generator().manual_seed(0))]
    models, reports = [mlp(256, 128, 8), mlp(256, 128, 8)], []
    for model, size in zip(models, (128, None), strict=True):
        reports.append(quantize_(model, gptq_config(4, size, effort="fast", calibration=batches)))
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert type(a) is type(b)
        assert torch.equal(a.dequantize(), b.dequantize()) if a.dim() == 2 else torch.equal(a, b)
    assert all(r is not None and not any("group_size" in n for n in r.notes) for r in reports)


def test_a_note_has_few_widths() -> None:
    widths = {f"{k}.weight": k for k in range(40, 60)}
    chosen = choose_weights(tuple(site(n, k, n) for n, k in widths.items()), (), gptq_config())
    note = smaller_groups(widths, chosen.settings, gptq_config())
    assert note is not None
    assert "of 20 weights" in note
    assert note.endswith(", and others, of 16 more widths")
    assert smaller_groups(widths, chosen.settings, gptq_config(group_size=-1)) is None


@pytest.mark.parametrize(
    ("widths", "given", "said", "fitting"),
    [
        (
            [576] * 180 + [1536] * 30,
            128,
            r"of 180 of 210 weights:\n  128 .* of 180 weights such as '0.w'\n",
            "64, 32, 16, ",
        ),
        ([48, 64, 4], 32, r"of 2 of 3 weights:\n  32 .* 48, .* of '0.w'\n  32 .* 4, .* of '2.w'\n", ""),
        (list(range(20, 60)), 128, r"of 40 of 40 weights:\n(.*\n){4}  and 36 more such widths\n", ""),
        ([96], 64, r"of 1 of 1 weights:\n  64 does not divide 96, the input features of '0.w'\n", "32, 16, "),
        ([128], 256, r"of 1 of 1 weights", "128, 64, 32, 16, "),
    ],
)
def test_one_short_error_whose_advice_can_be_followed(widths: list[int], given: int, said: str, fitting: str) -> None:
    sites = [site(f"{i}.w", k, str(i)) for i, k in enumerate(widths)]
    with pytest.raises(ConfigError, match=said) as e:
        sizes(sites, group_size=given)
    message = str(e.value)
    assert len(message.splitlines()) <= 10
    assert f": {fitting}-1 (one scale per row). Give one of them, or leave group_size out" in message
    for advised in (*(int(s) for s in fitting.split(", ") if s), -1, None):
        assert set(sizes(sites, group_size=advised)) == {s.weight for s in sites}
    assert "{'group_size': None}" in message
    assert sizes(sites, group_size=given, rules={"re:.*": {"group_size": None}}) == sizes(sites)


def test_sizes_of_rules_are_listed_apart_and_the_advice_fits_all_of_them() -> None:
    sites = [site("a.weight", 192), site("b.weight", 1024), site("c.weight", 96, "y")]
    with pytest.raises(ConfigError, match=r"(?s)128 .* 192, .* of 'a.*64 .* 96, .* of 'c.*these sizes: 32, 16, -1"):
        sizes(sites, group_size=128, rules={"c": {"group_size": 64}})
    # b has another size than the one that does not divide: it needs no regard.
    with pytest.raises(ConfigError, match=r"of 1 of 3 weights:\n  100 .* 192, .* of 'a.weight'\n.*: 64, 32, 16, -1"):
        sizes(sites, group_size=32, rules={"a": {"group_size": 100}})
