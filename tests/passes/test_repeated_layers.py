"""Layers that are alike are traced twice and copied: the graph is that of the whole trace, node by node."""

from collections.abc import Callable
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
    "vocab_size": 96,
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


def of_transformers(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = transformers.AutoConfig.for_model(kind, **settings)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    return build


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "llama": (of_transformers("llama", **SMALL, num_hidden_layers=5), 3),
    "llama, all hidden states, by hooks in the layers": (of_transformers("llama", **SMALL, num_hidden_layers=4, output_hidden_states=True), 0),
    "llama, attention weights, by hooks in the layers": (
        of_transformers("llama", **SMALL, num_hidden_layers=4, output_attentions=True, attn_implementation="eager"),
        0,
    ),
    "gpt2": (of_transformers("gpt2", vocab_size=96, n_embd=32, n_head=4, n_layer=5), 3),
    "gpt2, scaled by the number of the layer": (
        of_transformers(
            "gpt2", vocab_size=96, n_embd=32, n_head=4, n_layer=4, scale_attn_by_inverse_layer_idx=True
        ),
        0,
    ),
    "opt": (
        of_transformers(
            "opt", vocab_size=96, hidden_size=32, ffn_dim=48, num_attention_heads=4, num_hidden_layers=4,
            word_embed_proj_dim=32,
        ),
        2,
    ),
    "bert": (
        of_transformers(
            "bert", vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=4
        ),
        2,
    ),
    "qwen3_moe": (
        of_transformers(
            "qwen3_moe", **SMALL, num_hidden_layers=6, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            mlp_only_layers=[1],
        ),
        3,
    ),
    "gemma3_text, sliding and full attention": (
        of_transformers("gemma3_text", **SMALL, num_hidden_layers=9, sliding_window=8, sliding_window_pattern=3), 5
    ),
    "gemma2": (of_transformers("gemma2", **SMALL, num_hidden_layers=6, sliding_window=8), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, repeated = MODELS[name]
    model = seeded(build())
    found = capture(model, as_batch(TOKENS))
    assert_equal(found, traced_wholly(model, TOKENS, monkeypatch))
    assert found.repeated == repeated
