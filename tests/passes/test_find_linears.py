from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_ao.calibration.batches import as_batch
from gptq_ao.config import gptq_config
from gptq_ao.errors import ConfigError, NoLinearError
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.choose_weights import choose_weights
from gptq_ao.passes.find_linears import find_linears
from gptq_ao.passes.records import Excluded, Layout, LinearSite, Rows

from ..models import seeded, tiny_llama, token_batches


def found(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> tuple[dict[str, LinearSite], dict[str, Excluded]]:
    program = canonicalize(capture(model, as_batch(kwargs or args)))
    sites, excluded = find_linears(program)
    return {s.weight: s for s in sites}, {e.weight: e for e in excluded}


def test_every_matrix_of_a_llama_is_a_site_or_listed() -> None:
    model = tiny_llama()
    sites, excluded = found(model, **token_batches()[0])
    assert len(sites) == 15
    assert {n for n, p in model.named_parameters() if p.dim() >= 2} == set(sites) | set(excluded)
    assert excluded["model.embed_tokens.weight"].reason == "embedding table"
    assert sites["lm_head.weight"].left_out == "output head"
    block = "model.layers.0.self_attn."
    assert len({sites[f"{block}{n}_proj.weight"].rows for n in "qkv"}) == 1
    assert sites["model.layers.0.mlp.gate_proj.weight"].rows == sites["model.layers.0.mlp.up_proj.weight"].rows
    assert sites[f"{block}k_proj.weight"].layout == Layout((32, 64), 1, 32, 64, False)


def test_a_head_tied_to_the_embedding() -> None:
    sites, excluded = found(tiny_llama(tied=True), **token_batches()[0])
    assert {n: s.left_out for n, s in sites.items() if s.left_out} == {
        "model.embed_tokens.weight": "also the embedding table"
    }
    assert excluded == {}


class Products(nn.Module):
    """One activation, five ways to multiply it by a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.conv1d_bias = nn.Parameter(torch.zeros(4))
        self.conv1d = nn.Parameter(torch.zeros(8, 4))  # [in, out], as in GPT-2
        self.matmul = nn.Parameter(torch.zeros(8, 4))
        self.transposed = nn.Parameter(torch.zeros(4, 8))
        self.numpy_t = nn.Parameter(torch.zeros(4, 8))
        self.twice = nn.Parameter(torch.zeros(8, 4))
        self.shaped = nn.Parameter(torch.zeros(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.addmm(self.conv1d_bias, rows, self.conv1d).view(x.shape[0], x.shape[1], 4)
        y = y + self.linear(x) + x @ self.matmul + x.matmul(self.transposed.t()) + x @ self.numpy_t.T
        return y + rows.mm(self.twice.transpose(0, 1).transpose(0, 1)).view_as(y) + x @ self.shaped.view(8, 4)


def test_all_spellings_of_a_product_share_one_activation() -> None:
    model = seeded(Products())
    sites, excluded = found(model, torch.ones(2, 3, 8))
    assert len({s.rows for s in sites.values()}) == 1
    assert {n: s.layout.transposed for n, s in sites.items()} == {
        "linear.weight": False,
        "conv1d": True,
        "matmul": True,
        "transposed": False,
        "numpy_t": False,
        "twice": True,
    }
    assert all((s.layout.out_features, s.layout.in_features) == (4, 8) for s in sites.values())
    assert all(s.part == (0, 4) for s in sites.values())
    assert not excluded["shaped"].expected
    assert excluded["shaped"].reason == "aten::matmul reads it across its rows and input features"


class Odd(nn.Module):
    """Matrices that cannot be quantized, or that are no product's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.columns = nn.Parameter(torch.zeros(8, 16))
        self.scaled = nn.Parameter(torch.zeros(8, 8))
        self.chosen = nn.Parameter(torch.zeros(4, 8, 8))
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.table = nn.Parameter(torch.zeros(4, 8))
        self.a, self.b = nn.Parameter(torch.zeros(8, 2)), nn.Parameter(torch.zeros(2, 8))
        self.grouped = nn.ConvTranspose1d(4, 4, 1, groups=2)
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor, which: Tensor) -> Tensor:  # [B, 4, 8], [B]
        x = self.linear(x + self.table) + x @ self.columns[:, 8:].t() + x @ (self.scaled * 2) + x @ (self.a @ self.b)
        x = torch.bmm(x, self.chosen[which]) + self.bilinear(x, x) + self.lstm(x)[0]
        return self.grouped(x)


def test_what_is_not_supported_is_listed_with_the_operator() -> None:
    sites, excluded = found(seeded(Odd()), torch.ones(2, 4, 8), torch.zeros(2, dtype=torch.long))
    assert set(sites) == {"linear.weight"}
    unsupported = {n: e.reason for n, e in excluded.items() if not e.expected}
    form = "in a form that is not supported"
    assert unsupported == {
        "columns": "aten::matmul reads it across its rows and input features",
        "scaled": f"aten::matmul multiplies by what aten::mul makes of it, {form}",
        "chosen": f"aten::bmm multiplies by what aten::index makes of it, {form}",
        "bilinear.weight": f"aten::bilinear multiplies by it, {form}",
        "a": "aten::matmul multiplies it by other parameters, not by an activation",
        "b": "aten::matmul multiplies it by other parameters, not by an activation",
        "grouped.weight": f"aten::conv_transpose1d multiplies by it, {form}",
        "lstm.weight_ih_l0": f"aten::lstm multiplies by it, {form}",
        "lstm.weight_hh_l0": f"aten::lstm multiplies by it, {form}",
    }
    assert {n: e.reason for n, e in excluded.items() if e.expected} == {
        "table": "not a matrix of a product, used by aten::add",
        "unused.weight": "not used by the captured forward",
    }


class Shapes(nn.Module):
    """Weights that are no plain matrix, or only part of one."""

    def __init__(self) -> None:
        super().__init__()
        self.merged = nn.Parameter(torch.zeros(48, 8))  # chunked, its last third left alone
        self.in_out = nn.Parameter(torch.zeros(8, 48))  # sliced along its outputs
        self.loop = nn.Parameter(torch.zeros(3, 16, 8))
        self.batch = nn.Parameter(torch.zeros(4, 8, 16))
        self.every = nn.Parameter(torch.zeros(3, 8, 16))
        self.left = nn.Parameter(torch.zeros(16, 4))
        self.conv = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose1d(8, 16, 2)
        self.heads = nn.Parameter(torch.zeros(4, 8, 2))  # one matrix per head, one activation
        self.joint = nn.Parameter(torch.zeros(4, 2, 8))  # two contracted axes
        self.each = nn.Parameter(torch.zeros(4, 2, 8))  # a batched einsum

    def forward(self, x: Tensor) -> Any:  # [B, 4, 8]
        q, k, _ = self.merged.chunk(3)
        y = [x @ q.t(), nn.functional.linear(x, k), x @ self.in_out[:, 16:32]]
        y += [x @ self.loop[e].t() for e in range(3)]
        y += [torch.bmm(x.transpose(0, 1), self.batch), x.unsqueeze(1) @ self.every, self.left @ x]
        image = x.transpose(1, 2).unsqueeze(-1)
        y += [self.conv(image), self.depthwise(image.squeeze(-1)), self.up(image.squeeze(-1))]
        h = torch.einsum("btd,hdk->bhtk", x, self.heads)
        y += [torch.einsum("bhtk,hko->bto", h, self.joint), torch.einsum("bhtk,hko->bhto", h, self.each)]
        return y


def test_weights_of_every_shape() -> None:
    program = canonicalize(capture(seeded(Shapes()), as_batch(torch.ones(2, 4, 8))))
    sites, excluded = find_linears(program)
    assert not excluded
    parts: dict[str, list[tuple[int, int]]] = {}
    for s in sites:
        parts.setdefault(s.weight, []).append(s.part)
    assert parts["merged"] == [(0, 16), (16, 32)]
    assert parts["in_out"] == [(16, 32)]
    assert parts["loop"] == [(0, 16), (16, 32), (32, 48)]
    one = {s.weight: s for s in sites}
    assert {n: s.experts for n, s in one.items() if s.experts > 1} == {
        "batch": 4,
        "conv.weight": 2,
        "each": 4,
        "depthwise.weight": 8,
    }
    assert {n: s.layout for n, s in one.items()} == {
        "merged": Layout((48, 8), 1, 48, 8, False),
        "in_out": Layout((8, 48), 1, 48, 8, True),
        "loop": Layout((3, 16, 8), 3, 16, 8, False),
        "batch": Layout((4, 8, 16), 4, 16, 8, True),
        "every": Layout((3, 8, 16), 3, 16, 8, True),
        "left": Layout((16, 4), 1, 16, 4, False),
        "conv.weight": Layout((16, 4, 3, 3), 1, 16, 36, False),
        "depthwise.weight": Layout((8, 1, 3), 8, 1, 3, False),
        "up.weight": Layout((8, 16, 2), 1, 32, 8, True),
        "heads": Layout((4, 8, 2), 4, 2, 8, True),
        "joint": Layout((4, 2, 8), 1, 8, 8, True),
        "each": Layout((4, 2, 8), 4, 8, 2, True),
    }
    assert one["depthwise.weight"].left_out == "depthwise convolution: a filter sees one channel only"


def test_a_router_is_left_out() -> None:
    class Routes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.value = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            weights, index = self.router(x).softmax(-1).topk(2)
            return self.value(x).gather(-1, index) * weights

    sites, _ = found(seeded(Routes()), torch.ones(2, 8))
    assert sites["router.weight"].left_out == "router: decides which experts run"
    assert sites["value.weight"].left_out is None


def test_padding_masks_speak_of_positions_only() -> None:
    batch = {**token_batches()[0], "attention_mask": torch.ones(2, 40, dtype=torch.long)}
    sites, _ = found(tiny_llama(layers=1), **batch)
    assert {s.rows[0].mask for s in sites.values()} == {"attention_mask"}


def site(name: str, left_out: str | None = None, shape: tuple[int, int] = (8, 96)) -> LinearSite:
    layout = Layout(shape, 1, *shape, transposed=False)
    return LinearSite(f"{name}.weight", name, layout, (0, shape[0]), (Rows("x"),), left_out=left_out)


SITES = (site("a.q"), site("a.k"), site("lm_head", "output head"))
OTHER = (Excluded("embed.weight", "embedding table", True),)


def test_rules_in_order_by_module_by_parameter_and_by_pattern() -> None:
    rules = {"a.q": {"bits": 8}, "re:a\\..*": {"group_size": -1}, "lm_head.weight": {"bits": 8}}
    chosen = choose_weights(SITES, OTHER, gptq_config(4, 32, rules=rules))
    assert {n: (c.bits, c.group_size) for n, c in chosen.settings.items()} == {
        "a.q.weight": (8, 32),
        "a.k.weight": (4, -1),
        "lm_head.weight": (8, 32),
    }
    assert [e.weight for e in chosen.excluded] == ["embed.weight"]


def test_defaults_none_and_filter_are_listed_with_the_reason() -> None:
    config = gptq_config(4, 32, rules={"a.k": None})
    chosen = choose_weights((*SITES, site("b")), OTHER, config, lambda name: name != "b.weight")
    assert {e.weight: e.reason for e in chosen.excluded} == {
        "embed.weight": "embedding table",
        "a.k.weight": "rule 'a.k'",
        "lm_head.weight": "output head",
        "b.weight": "left out by filter_fn",
    }
    assert {s.weight for s in chosen.sites} == set(chosen.settings) == {"a.q.weight"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"mlp": {"bits": 8}}, r"rule 'mlp' matches no weight.*Names look like 'a.q.weight'"),
        ({"re:a.*": None, "a.q": None}, r"rule 'a.q' matches no weight, or only such as an earlier rule"),
        ({"embed": {"bits": 8}}, r"rule 'embed' asks to quantize 'embed.weight', which cannot be: embedding table"),
        (
            {"a.q": {"group_size": 64}},
            r"group_size does not divide.*\n  64 does not divide 96, the input features of 'a.q.weight'",
        ),
    ],
)
def test_rules_that_cannot_be_followed(rules: dict[str, dict[str, int] | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_weights(SITES, OTHER, gptq_config(4, 32, rules=rules))


def test_a_rule_cannot_quantize_an_embedding() -> None:
    tied = (site("a"), site("embed", "also the embedding table"))
    with pytest.raises(ConfigError, match=r"'embed.weight', which is also the embedding table: untie them first"):
        choose_weights(tied, (), gptq_config(4, 32, rules={"embed": {"bits": 8}}))


def test_a_rule_for_another_name_of_a_tied_weight_says_so() -> None:
    names = {"a.weight": "a.weight", "head.weight": "a.weight"}
    with pytest.raises(
        ConfigError, match=r"rule 'head' is for 'head.weight', which is tied to 'a.weight': they are one"
    ):
        choose_weights((site("a"),), (), gptq_config(4, 32, rules={"head": {"bits": 8}}), first_names=names)


def test_nothing_left() -> None:
    with pytest.raises(NoLinearError, match=r"no weight to quantize:\n  embed.weight: embedding table\n  lm_head"):
        choose_weights((SITES[2],), OTHER, gptq_config())
    with pytest.raises(NoLinearError, match="it multiplies no activation by a parameter"):
        choose_weights((), (), gptq_config())
