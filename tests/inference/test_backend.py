"""torch.compile(backend="gptq_ao"): what its passes find in models, and that these compute what they did."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule

from gptq_ao import fuse_projections_, gptq_config, quantize_
from gptq_ao.inference import patterns
from gptq_ao.inference.around_products import around_products
from gptq_ao.inference.attend_once import attend_once
from gptq_ao.inference.backend import backend
from gptq_ao.kernels import cuda_decoding

from ..models import seeded, tiny_llama

BF16 = torch.bfloat16


def rounded(model: nn.Module) -> Any:
    quantize_(model, gptq_config(bits=4, group_size=32, method="rtn"))
    return model.eval().requires_grad_(False)


def always(*_: Any) -> bool:
    """In place of the question whether there is a GPU with kernels."""
    return True


def tried(
    function: Callable[..., Tensor], *inputs: Tensor, runs: Callable[..., bool] = always
) -> tuple[dict[str, int], Tensor]:
    """How much was changed in the graphs of a function, and its result by the changed graphs, whose operators are not
    compiled further."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    changed = {"norms": 0, "gates": 0, "sums": 0, "attention": 0}

    def compile_(graph: GraphModule, _: Any) -> Any:
        for kind, count in around_products(graph.graph, runs).items():
            changed[kind] += count
        graph.graph.lint()
        graph.recompile()
        return make_boxed_func(graph.forward)

    def traced(graph: GraphModule, examples: Any) -> Any:
        changed["attention"] += attend_once(graph.graph, runs)
        graph.graph.lint()
        graph.recompile()
        return aot_autograd(fw_compiler=compile_, decompositions=select_decomp_table)(graph, examples)

    torch._dynamo.reset()
    with torch.no_grad():
        return changed, torch.compile(function, backend=traced, fullgraph=True)(*inputs)


def a_step(kind: str, **settings: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """One step of decoding of a small model with two layers, after four tokens: to be compiled, and as it is."""
    from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

    width = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"vocab_size": 96, "max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 32}
    config = AutoConfig.for_model(kind, **{**width, **sizes, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=BF16)
    with torch.no_grad():
        for p in seeded(model).parameters():
            p += p.dim() == 1  # weights of norms are about one
    rounded(model)

    def after_four_tokens() -> Callable[[Tensor], Tensor]:
        cache = StaticCache(config=config, max_cache_len=32)
        with torch.no_grad():
            model(torch.tensor([[5, 6, 7, 8]]), past_key_values=cache)
        return lambda ids: model(ids, past_key_values=cache).logits

    return after_four_tokens(), after_four_tokens()


# Of two layers each: norms before q, k and v and before gate and up; gates; sums after o and down; attention.
LANGUAGE: list[tuple[str, dict[str, Any], tuple[int, int, int, int]]] = [
    ("llama", {}, (4, 2, 4, 2)),
    ("mistral", {"sliding_window": None}, (4, 2, 4, 2)),
    ("qwen2", {}, (4, 2, 4, 2)),  # with biases
    ("qwen3", {}, (4, 2, 4, 2)),  # norms of q and k besides, which are not multiplied by a weight
    ("gemma2", {"query_pre_attn_scalar": 32}, (4, 2, 0, 0)),  # scores are capped; norms between products and sums
    ("gemma3_text", {}, (4, 2, 0, 2)),
    # The router, which is not quantized, takes the second norm as well; experts are another operator.
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, (2, 0, 2, 2)),
    ("gpt_neox", {}, (0, 0, 0, 2)),  # LayerNorm, and one sum of three
]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a:UserWarning")  # in Transformers' experts
@pytest.mark.parametrize(("kind", "settings", "expected"), LANGUAGE, ids=[kind for kind, *_ in LANGUAGE])
def test_what_is_found_in_language_models(kind: str, settings: dict[str, Any], expected: tuple[int, ...]) -> None:
    step, as_it_is = a_step(kind, **settings)
    ids = torch.tensor([[9]])
    changed, logits = tried(step, ids)
    assert tuple(changed.values()) == expected
    with torch.no_grad():
        plain = as_it_is(ids)
    # bf16 rounds what comes between products elsewhere: some 2⁻⁸ of what is typical at each of a dozen places.
    assert (logits - plain).float().norm() <= 2**-5 * plain.float().norm()
    assert torch.equal(logits.argmax(-1), plain.argmax(-1))


def test_nothing_is_found_for_many_rows_nor_without_kernels() -> None:
    step, _ = a_step("llama")
    assert set(tried(step, torch.tensor([[9]]), runs=lambda *_: False)[0].values()) == {0}
    model = rounded(tiny_llama(dtype=BF16))
    changed, _ = tried(lambda ids: model(ids).logits, torch.zeros(2, 40, dtype=torch.long), runs=cuda_decoding.runs)
    assert set(changed.values()) == {0}  # and causal attention of many tokens at once, besides


def test_kernels_are_asked_for_what_they_would_be_given() -> None:
    asked: list[tuple[Any, ...]] = []

    def ask(*tensors: Any) -> bool:
        asked.append(tuple(None if t is None else tuple(t.shape) for t in tensors))
        return False

    tried(a_step("llama")[0], torch.tensor([[9]]), runs=ask)
    attention = [shapes for shapes in asked if len(shapes) == 4]
    # Heads of the cache as they are, not repeated.
    assert attention == [((1, 4, 1, 32), (1, 2, 32, 32), (1, 2, 32, 32), (1, 1, 1, 32))] * 2
    assert {shapes for shapes in asked if len(shapes) == 1} == {((1, 1, 64),), ((1, 1, 128),)}


def test_sizes_that_change_are_never_few() -> None:
    layer = rounded(nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 32))).to(BF16)
    x = torch.randn(3, 64, dtype=BF16)
    assert tried(layer, x)[0]["norms"] == 1
    torch._dynamo.mark_dynamic(x, 0)
    assert tried(layer, x)[0]["norms"] == 0


class Vision(nn.Module):
    """A block of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_a_block_of_a_vision_transformer_has_only_sums() -> None:
    model = rounded(seeded(Vision())).to(BF16)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
    changed, y = tried(model, x)
    assert changed == {"norms": 0, "gates": 0, "sums": 1, "attention": 0}
    torch.testing.assert_close(y, model(x), rtol=2**-6, atol=2**-5)


def test_gates_however_they_are_written() -> None:
    layer = rounded(seeded(nn.Linear(64, 32))).to(BF16)

    def of(activation: Callable[[Tensor], Tensor], flipped: bool = False) -> int:
        def gated(g: Tensor, x: Tensor) -> Tensor:
            return layer(x * activation(g)) if flipped else layer(activation(g) * x)

        g, x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
        changed, y = tried(gated, g, x)
        torch.testing.assert_close(y, gated(g, x), rtol=2**-6, atol=2**-5)
        return changed["gates"]

    assert of(F.silu) == of(F.silu, flipped=True) == of(nn.SiLU()) == 1
    assert of(lambda g: g * torch.sigmoid(g)) == 1
    assert of(F.gelu) == of(lambda g: F.gelu(g, approximate="tanh"), flipped=True) == 1
    # x³ by products, as some models write it.
    assert of(lambda g: 0.5 * g * (1 + torch.tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)))) == 1
    assert of(torch.relu) == of(F.mish) == of(torch.sigmoid) == 0
    assert of(lambda g: F.silu(1.702 * g)) == 1  # of a gate that is computed first
    assert of(lambda g: g * torch.sigmoid(1.702 * g)) == 0  # of two different numbers
    assert of(lambda g: 0.5 * g * (1 + torch.tanh(0.79 * (g + 0.044715 * g**3)))) == 0


def test_norms_however_they_are_written() -> None:
    layer = rounded(seeded(nn.Linear(64, 32))).to(BF16)
    weight = torch.linspace(0.5, 1.5, 64).to(BF16)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(BF16)

    def of(norm: Callable[[Tensor], Tensor]) -> int:
        changed, y = tried(lambda x: layer(norm(x)), x)
        torch.testing.assert_close(y, layer(norm(x)), rtol=2**-6, atol=2**-5)
        return changed["norms"]

    def root(x: Tensor, eps: float = 1e-5) -> Tensor:
        return torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)

    assert of(lambda x: F.rms_norm(x, (64,), weight, 1e-5)) == 1
    assert of(lambda x: weight * (x.float() * root(x.float())).to(BF16)) == 1
    assert of(lambda x: (root(x.float()) * x.float() * (1 + weight.float())).to(BF16)) == 1
    assert of(lambda x: x * root(x) * weight) == 1  # in bf16 throughout
    # Not those: no weight, the mean over something else, of something else, and with another root.
    assert of(lambda x: F.rms_norm(x, (64,), None, 1e-5)) == 0
    assert of(lambda x: x * torch.rsqrt((x * x).mean(0, keepdim=True) + 1e-5) * weight) == 0
    assert of(lambda x: x * root(x + 1) * weight) == 0
    assert of(lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-5) * weight) == 0
    assert of(lambda x: x * root(x) * weight[:1]) == 0


def test_sums_are_left_alone_unless_the_product_is_only_added() -> None:
    layer = rounded(seeded(nn.Linear(64, 32))).to(BF16)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
    other = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).to(BF16)

    def of(function: Callable[..., Tensor], *more: Tensor) -> int:
        changed, y = tried(function, x, *more)
        torch.testing.assert_close(y, function(x, *more), rtol=2**-6, atol=2**-5)
        return changed["sums"]

    assert of(lambda x, r: layer(x) + r, other) == of(lambda x, r: r + layer(x), other) == 1
    assert of(lambda x, r: layer(x) + layer(x * 2) + r, other) == 1  # one of the two adds the other, which is there
    assert of(lambda x, r: (lambda y: y + r + y.relu())(layer(x)), other) == 0  # used twice
    assert of(lambda x, r: layer(x) + r, other[:1]) == 0  # spread over rows
    assert of(lambda x, r: layer(x) + r, other.float()) == 0
    assert of(lambda x, r: torch.add(layer(x), r, alpha=2), other) == 0
    assert of(lambda x: layer(x) + 1) == 0
    assert of(lambda x: (lambda y: y + y)(layer(x))) == 0


def test_attention_that_is_left_alone() -> None:
    def of(function: Callable[..., Tensor], *inputs: Tensor) -> int:
        return tried(function, *inputs)[0]["attention"]

    q, k = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 9, 32)
    attend = F.scaled_dot_product_attention

    def repeated(k: Tensor, last: int = 9) -> Tensor:
        return k[:, :, None, :, :].expand(1, 2, 2, 9, 32).reshape(1, 4, last, 32)

    assert of(lambda q, k: attend(q, repeated(k), repeated(k)), q, k) == 1
    assert of(lambda q, k: attend(q, k, k, enable_gqa=True), q, k) == 1
    assert of(lambda q, k: attend(q, repeated(k), repeated(k), None, 0.0, True), q, k) == 0  # causal
    assert of(lambda q, k: attend(q, repeated(k), repeated(k), dropout_p=0.1), q, k) == 0
    # Repeated in another order: each head of q meets another one. It is not undone.
    tiled, plain = (lambda k: k.repeat(1, 2, 1, 1)), q.new_zeros(1, 4, 1, 32)
    changed, y = tried(lambda q, k: attend(q, tiled(k), tiled(k)), q, k)
    assert changed["attention"] == 1
    torch.testing.assert_close(y, attend(q, tiled(k), tiled(k)))
    assert plain.shape == y.shape


def test_patterns_read_nothing_into_other_graphs() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(operator.add, (x, 1))
    assert patterns.rms_norm(x) is patterns.rms_norm(y) is None
    assert patterns.gate(x) is patterns.gate(y) is None
    assert patterns.added(x) is None


def test_by_name_with_modes_and_options_and_gradients() -> None:
    """Compiled by inductor, with all that its settings are for others as they were."""
    import torch._inductor.config as settings

    assert "gptq_ao" in torch._dynamo.list_backends()
    layer = rounded(seeded(nn.Sequential(nn.RMSNorm(32), nn.Linear(32, 16))))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    before = settings.save_config_portable()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = layer(x)
        for how in ({}, {"mode": "max-autotune-no-cudagraphs"}, {"options": {"epilogue_fusion": False}}):
            run: Any = torch.compile(layer, backend=backend, fullgraph=True, **how)
            torch.testing.assert_close(run(x), expected)
    leaf = x.clone().requires_grad_()
    torch.compile(layer, backend=backend)(leaf).sum().backward()
    assert leaf.grad is not None
    assert settings.save_config_portable() == before


def test_generate_takes_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CompileConfig

    from gptq_ao.inference import backend as module

    graphs: list[Any] = []
    monkeypatch.setattr(module, "attend_once", graphs.append)
    model = rounded(tiny_llama())
    ids = torch.arange(6)[None]
    settings: Any = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    config = CompileConfig(backend="gptq_ao", fullgraph=True)
    config._compile_all_devices = True  # `generate` leaves it at GPUs otherwise
    torch._dynamo.reset()
    found = model.generate(ids, **settings, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected)
    assert len(graphs) == 1  # the step, for all tokens


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_generated_tokens_are_those_of_inductor(fused: bool) -> None:
    from transformers import StaticCache

    model = rounded(tiny_llama(dtype=BF16, width=256)).cuda()
    ids = torch.arange(12, device="cuda")[None]
    if fused:
        fuse_projections_(model, ids)

    def generate(how: Any) -> tuple[list[int], Tensor]:
        torch._dynamo.reset()
        cache = StaticCache(config=model.config, max_cache_len=64)
        logits = model(ids, past_key_values=cache).logits[:, -1:]
        step = torch.compile(lambda t: model(t, past_key_values=cache).logits, fullgraph=True, backend=how)
        tokens = []
        for token in range(20, 40):  # the same tokens for all, as one near tie would change the rest
            logits = step(torch.tensor([[token]], device="cuda"))
            tokens.append(int(logits.argmax()))
        return tokens, logits

    found, logits = generate(backend)
    expected, plain = generate("inductor")
    assert (logits - plain).float().norm() <= 2**-5 * plain.float().norm()
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 18


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_the_kernels_are_used() -> None:
    names = {"rms_norm", "gated", "linear_add", "attend_once"}
    from transformers import StaticCache

    model = rounded(tiny_llama(dtype=BF16, width=256)).cuda()
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(torch.zeros(1, 4, dtype=torch.long, device="cuda"), past_key_values=cache)
    torch._dynamo.reset()
    step = torch.compile(lambda t: model(t, past_key_values=cache).logits, fullgraph=True, backend=backend)
    step(torch.zeros(1, 1, dtype=torch.long, device="cuda"))
    # Not a dispatch mode: with one, TorchDynamo runs what was compiled as it was before.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        step(torch.zeros(1, 1, dtype=torch.long, device="cuda"))
    seen = {event.key for event in profile.key_averages()}
    assert {f"gptq_ao::{name}" for name in names} <= seen
