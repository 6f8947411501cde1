"""Layers that are alike are traced twice and copied: the graph is that of the whole trace, node by node."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

from gptq_ao.calibration.batches import as_batch
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.records import Program
from gptq_ao.passes.tracing import layer_calls

from ..models import seeded

TOKENS = {"input_ids": torch.randint(0, 90, (2, 40), generator=torch.Generator().manual_seed(0))}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def traced_wholly(model: nn.Module, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> Program:
    with monkeypatch.context() as patch:
        patch.setattr(layer_calls, "alike_layers", lambda model: [])
        return capture(model, as_batch(inputs))


def assert_equal(one: Program, other: Program) -> None:
    """Nodes in order: operators, arguments, forms of the results, names of weights; and the sizes they are valid for.
    The same constant may be one in one graph, and several in the other."""
    assert [n for n in one.placeholders if n not in one.constants] == [
        n for n in other.placeholders if n not in other.constants
    ]
    assert (one.parameters, one.buffers, one.inputs, one.spec, one.outputs) == (
        other.parameters,
        other.buffers,
        other.inputs,
        other.spec,
        other.outputs,
    )
    assert str(one.ranges) == str(other.ranges)
    assert sorted(map(str, one.guards)) == sorted(map(str, other.guards))
    first, second = canonicalize(one), canonicalize(other)
    match: dict[fx.Node, fx.Node] = {}

    def form(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [form(v) for v in value]
        if isinstance(value, Tensor):
            return value.dtype, value.device, str(tuple(value.shape)), str(value.stride())
        return str(value)

    def is_size(n: Any) -> bool:
        return not isinstance(n.meta["val"], Tensor | tuple | list | None)

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a.name in first.constants and b.name in second.constants:
                return torch.equal(first.constants[a.name], second.constants[b.name])
            # The first of all that need a size computes it.
            return form(a.meta["val"]) == form(b.meta["val"]) if is_size(a) and is_size(b) else match[a] is b
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(same, a, b))
        return type(a) is type(b) and repr(a) == repr(b)

    def rest(program: Program) -> list[fx.Node]:
        return [
            n for n in program.graph.nodes if n.name not in program.constants and (n.op == "output" or not is_size(n))
        ]

    assert len(rest(first)) == len(rest(second))
    for a, b in zip(rest(first), rest(second), strict=True):
        assert (a.op, a.target if a.op != "placeholder" else a.name) == (
            b.op,
            b.target if b.op != "placeholder" else b.name,
        )
        assert same(a.args, b.args), (a.format_node(), b.format_node())
        assert sorted(a.kwargs) == sorted(b.kwargs)
        assert all(same(v, b.kwargs[k]) for k, v in a.kwargs.items()), (a.format_node(), b.format_node())
        assert form(a.meta.get("val")) == form(b.meta.get("val"))
        match[a] = b


def of_transformers(kind: str, **settings: Any) -> nn.Module:
    config = transformers.AutoConfig.for_model(kind, vocab_size=96, **settings)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    return auto.from_config(config).eval()


BERT = {k: SMALL[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Settings, and how many layers are repeated.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "llama": ({**SMALL, "num_hidden_layers": 5}, 3),
    "llama, hidden states, by hooks in its layers": (
        {**SMALL, "num_hidden_layers": 4, "output_hidden_states": True},
        0,
    ),
    "llama, attention weights, by hooks in its layers": (
        {**SMALL, "num_hidden_layers": 4, "output_attentions": True, "attn_implementation": "eager"},
        0,
    ),
    "gpt2": ({"n_embd": 32, "n_head": 4, "n_layer": 5}, 3),
    "gpt2, scaled by the number of the layer": (
        {"n_embd": 32, "n_head": 4, "n_layer": 4, "scale_attn_by_inverse_layer_idx": True},
        0,
    ),
    "opt": ({**BERT, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 4}, 2),
    "bert": ({**BERT, "num_hidden_layers": 4}, 2),
    "t5, a bias that all layers hand on": ({"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 5, "num_heads": 4}, 4),
    "qwen3_moe, one layer without experts": ({**SMALL, **MOE, "num_hidden_layers": 6, "mlp_only_layers": [1]}, 3),
    "gemma2, every other layer": ({**SMALL, "num_hidden_layers": 6, "sliding_window": 8}, 2),
    "gemma3_text, every third layer": (
        {**SMALL, "num_hidden_layers": 9, "sliding_window": 8, "sliding_window_pattern": 3},
        5,
    ),
}
SHORT = ("llama", "gpt2")


@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in MODELS])
def test_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, repeated = MODELS[name]
    model = seeded(of_transformers(name.partition(",")[0], **settings))
    inputs = {**TOKENS, "decoder_input_ids": TOKENS["input_ids"][:, :16]} if name.startswith("t5") else TOKENS
    found = capture(model, as_batch(inputs))
    assert not any(m._forward_hooks for m in model.modules())  # transformers adds some in the first forward
    assert_equal(found, traced_wholly(model, inputs, monkeypatch))
    assert found.repeated == repeated


class Layer(nn.Module):
    """Its number differs from layer to layer, and is not read."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).relu()


class Stack(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Behind(nn.Module):
    """What comes first decides how wide the input is, so that all layers get the same."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(self.first(x))


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {}


def case(repeated: int, stack: type[Stack] = Stack, count: int = 6, **attributes: Any) -> Callable[[Any], Any]:
    """Layers with the decorated forward, in a stack; or a stack with the decorated forward of usual layers, if that is
    its first argument's name. `attributes`: functions of a layer's number."""

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        def build() -> nn.Module:
            names = forward.__code__.co_varnames
            kind = Layer if names[0] == "model" else type("Own", (Layer,), {"forward": forward})
            layers = [kind(i) for i in range(count)]
            for i, layer in enumerate(layers):
                for name, value in attributes.items():
                    setattr(layer, name, value(i))
            of = type("OwnStack", (stack,), {"forward": forward}) if names[0] == "model" else stack
            return of(layers)

        CASES[forward.__name__] = (build, repeated)
        return forward

    return register


@case(4)
def number_not_read(self: Any, x: Tensor) -> Tensor:
    return self.linear(x)


@case(0)
def number_in_the_graph(self: Any, x: Tensor) -> Tensor:
    return self.linear(x) * self.number


@case(0)
def number_in_a_branch(self: Any, x: Tensor) -> Tensor:
    return self.linear(x).relu() if self.number > 3 else self.linear(x)


@case(0)
def number_as_an_index(self: Any, x: Tensor) -> Tensor:
    return self.linear(x) * [1.0, 1.0, 1.0, 2.0, 3.0, 4.0][self.number]


@case(2, period=lambda i: i % 2)
def every_other_layer(self: Any, x: Tensor) -> Tensor:
    return self.linear(x).relu() if self.period else self.linear(x).tanh()


@case(3, period=lambda i: i == 3)
def one_layer_of_another_kind(self: Any, x: Tensor) -> Tensor:
    return self.linear(x).relu() if self.period else self.linear(x).tanh()


@case(0, scale=lambda i: torch.tensor(1.0 + i))
def constants_of_their_own(self: Any, x: Tensor) -> Tensor:
    return self.linear(x) * self.scale


@case(4)
def constants_made_in_the_forward(self: Any, x: Tensor) -> Tensor:
    return self.linear(x) + torch.tensor([1.0] * 8, dtype=x.dtype)


@case(0, shared=lambda i, calls=[]: calls)
def counts_its_calls_in_a_list_of_all(self: Any, x: Tensor) -> Tensor:
    self.shared.append(1)
    try:
        return self.linear(x) * len(self.shared)
    finally:
        self.shared.clear() if len(self.shared) == 6 else None


@case(0)
def asks_for_what_only_some_have(self: Any, x: Tensor) -> Tensor:
    return self.linear(x) * (2 if hasattr(self, f"only_{self.number}") else 1)


@case(3)
def gives_back_its_input_too(self: Any, x: Any) -> Any:
    x, y = x if isinstance(x, tuple) else (x, x + 1)
    return self.linear(x), y


@case(0)
def gives_back_a_view_of_its_input(self: Any, x: Tensor) -> Tensor:
    return x.transpose(0, 1)


@case(0)
def writes_to_its_input(self: Any, x: Tensor) -> Tensor:
    return x.add_(self.linear(x))


@case(4)
def writes_to_its_own(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    y[:, 2:4].mul_(2)
    return y.add_(x)


@case(0)
def stores_what_it_has_seen(self: Any, x: Tensor) -> Tensor:
    self.last = x
    return self.linear(x)


@case(4)
def another_mode_inside(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self.linear(x)


@case(3)
def one_module_in_all_places(model: Any, x: Tensor) -> Tensor:
    for _ in range(5):
        x = model.layers[0](x)
    return x


@case(4)
def all_outputs_are_collected(model: Any, x: Tensor) -> list[Tensor]:
    seen = [x]
    for layer in model.layers:
        seen.append(layer(seen[-1]))
    return seen


@case(2)
def ends_early(model: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(model.layers):
        x = layer(x)
        if i == 3:
            break
    return x


@case(4)
def writes_to_outputs_of_layers(model: Any, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(x)
        x += 1
        x[:, :2].mul_(3)
    return x


@case(0)
def tells_the_layers_where_they_are(model: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(model.layers):
        layer.now = i
        x = layer(x)
    return x


@case(0)
def sizes_that_grow(model: Any, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = torch.cat([layer(x), x])
    return x


@case(4)
def a_chain_of_values_beside(model: Any, x: Tensor) -> Tensor:
    before = x
    for layer in model.layers:
        x, before = layer(x) + before, x
    return x


SEEN: list[Tensor] = []


class Leaking(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        SEEN.append(y)
        return y.relu()


class OfLeaks(Stack):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.clear()
        x = super().forward(x)
        y = sum(SEEN)
        SEEN.clear()
        return x + y


class Cached(Layer):
    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        if "key" not in cache:
            cache["key"] = self.linear(x)
        return x + cache["key"]


class WithCache(Stack):
    def forward(self, x: Tensor) -> Tensor:
        cache: dict[str, Tensor] = {}
        for layer in self.layers:
            x = layer(x, cache)
        return x


class Chained(Layer):
    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        cache["last"] = self.linear(x) + cache.get("last", x)
        return x + cache["last"]


class Buffered(Layer):
    count: Tensor

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x) + self.count


class Typed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2 if type(self) is Typed and self.__class__ is Typed else 3)


class Found(Layer):
    """What is not there is looked for elsewhere."""

    def __getattr__(self, name: str) -> Any:
        return 2.0 if name == "factor" else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor


class TwoLevels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Stack([Layer(i) for i in range(n)]) for n in (3, 4, 5)])

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def hooked() -> nn.Module:
    layers = [Layer(i) for i in range(5)]
    layers[3].linear.register_forward_hook(lambda module, args, out: out * 2)
    return Stack(layers)


def tied() -> nn.Module:
    layers = [Layer(i) for i in range(6)]
    layers[4].linear.weight = layers[2].linear.weight
    return Stack(layers)


CASES |= {
    "tensors that leave through a list": (lambda: OfLeaks([Leaking(i) for i in range(5)]), 0),
    "a cache that the first layer fills": (lambda: WithCache([Cached(i) for i in range(5)]), 2),
    "a cache that all layers write": (lambda: WithCache([Chained(i) for i in range(5)]), 0),
    "a buffer that layers write": (lambda: Stack([Buffered(i) for i in range(5)]), 0),
    "layers that ask for their class": (lambda: Stack([Typed(i) for i in range(5)]), 3),
    "attributes that a layer's own function finds": (lambda: Stack([Found(i) for i in range(5)]), 0),
    "layers in stages": (TwoLevels, 1 + 2 + 3),
    "a hook in one layer": (hooked, 2),
    "one module in a list five times": (lambda: Stack([Layer(0)] * 5), 3),
    "a sequence": (lambda: nn.Sequential(*(Layer(i) for i in range(5))), 3),
    "a sequence of operators": (lambda: nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.GELU()))), 4),
    "two layers with one weight": (tied, 4),
    "layers of two sizes": (
        lambda: Stack([*(Layer(i) for i in range(4)), nn.Linear(8, 8), *(Layer(i) for i in range(2))]),
        4,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, repeated = CASES[name]
    model = seeded(Behind(build()))
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    found = capture(model, as_batch((x,)))
    assert [(type(m), vars(m)) for m in model.modules()] == before
    assert_equal(found, traced_wholly(model, (x,), monkeypatch))
    program = canonicalize(found)
    values: dict[str, Any] = {p: model.get_parameter(n).detach() for p, n in program.parameters.items()}
    values |= {p: model.get_buffer(n) for p, n in program.buffers.items()} | dict(program.constants)
    (name_of_x,) = program.inputs
    assert name_of_x is not None
    values[name_of_x] = x.clone()
    got = program.module(*(values[p] for p in program.placeholders))
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(model(x.clone()))
    assert len(got) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert found.repeated == repeated
