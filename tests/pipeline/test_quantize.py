"""quantize_ on whole models: what it changes, what it does not, and what it says."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchao.quantization
from torch import Tensor, nn

import gptq_ao
from gptq_ao import Int4GroupTensor, gptq_config, quantize_, whole_model
from gptq_ao.calibration.batches import as_batch
from gptq_ao.passes.calibrate import run_segment
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.choose_weights import choose_weights
from gptq_ao.passes.find_linears import find_linears
from gptq_ao.passes.schedule import schedule
from gptq_ao.tensor import GroupTensor

from ..models import Attention, seeded, tiny_llama, token_batches


class Policy(nn.Module):
    """Plain torch: an attention block and a head, keyword inputs, a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(64), Attention()
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, state: Tensor, goal: Tensor) -> dict[str, Tensor]:
        x = state + self.attention(self.norm(state + goal))
        return {"action": self.mlp(x)}


def policy_batches() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [{n: torch.randn(2, 30, 64, generator=g) for n in ("state", "goal")} for _ in range(3)]


def language_model(family: str, **settings: Any) -> Any:
    """A tiny random causal language model by the prefix of its class names in transformers."""
    import transformers

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = getattr(transformers, f"{family}Config")(**{**sizes, **settings})
    architecture = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, architecture)(config).eval()


def gpt2() -> Any:
    return language_model("GPT2", n_embd=64, n_layer=2, n_head=4, n_positions=64)


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], list[Any]], int]] = {
    "llama": (tiny_llama, token_batches, 14),
    "llama-tied": (lambda: tiny_llama(tied=True), token_batches, 14),
    "llama-bf16": (lambda: tiny_llama(dtype=torch.bfloat16), lambda: token_batches(rows=8), 14),
    "qwen3": (lambda: language_model("Qwen3"), token_batches, 14),
    "gemma2": (lambda: language_model("Gemma2"), token_batches, 14),
    "phi-parallel": (lambda: language_model("Phi"), token_batches, 12),
    "opt": (lambda: language_model("OPT", ffn_dim=128, word_embed_proj_dim=64), token_batches, 12),
    "gpt2-conv1d": (gpt2, token_batches, 8),
    "policy": (lambda: seeded(Policy()), policy_batches, 6),
    "mha": (
        lambda: seeded(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)),
        lambda: [torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)],
        4,
    ),
}


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    b = as_batch(batch)
    with torch.no_grad():
        out = model(*b.args, **b.kwargs)
    return [t for t in torch.utils._pytree.tree_leaves(getattr(out, "logits", out)) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_the_quantized_model_is_the_segmented_graph_bit_for_bit(name: str) -> None:
    make, batches, count = MODELS[name]
    model = make()
    data = batches()
    # The graph, cut as for calibration, captured before anything is quantized.
    program = canonicalize(capture(model, as_batch(data[0])))
    heads = frozenset({"lm_head.weight"})
    plan = schedule(program, choose_weights(*find_linears(program, heads), gptq_config(4, 32)))

    report = quantize_(model, gptq_config(4, 32, calibration=data))
    assert report is not None
    assert len(report.weights) == count
    assert {w.method for w in report.weights} == {"gptq"}
    for w in report.weights:
        assert isinstance(model.get_parameter(w.name), Int4GroupTensor)

    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    where = {**program.parameters, **program.buffers}
    # nn.TransformerEncoderLayer has a fused inference path of its own, in which quantized weights cannot take part.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for batch in data:
            values: dict[str, Any] = dict(program.bind(as_batch(batch), "batch"))
            for segment in (*plan.segments, plan.tail):
                statics = []
                for placeholder in segment.statics:
                    t = (
                        program.constants[placeholder]
                        if placeholder in program.constants
                        else state[where[placeholder]]
                    )
                    statics.append(t.dequantize() if isinstance(t, GroupTensor) else t)
                written = dict(zip(segment.writes, run_segment(segment, values, statics), strict=True))
                values = {n: written.get(n, values.get(n)) for n in segment.keeps}
            eager = outputs(model, batch)
            graph = [t for t in written.values() if isinstance(t, Tensor)]
            assert torch.equal(eager[0], graph[0])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_nothing_but_the_weights_changes() -> None:
    model = tiny_llama().train()
    model.model.norm.eval()
    config_before = copy.deepcopy(model.config)
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    objects = {n: id(p) for n, p in model.named_parameters()}
    attributes = {n: {k for k in vars(m) if not k.startswith("_")} for n, m in model.named_modules()}
    flags = (
        torch.get_rng_state(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )
    batches = token_batches()
    originals = copy.deepcopy(batches)

    report = quantize_(model, gptq_config(4, 32, calibration=batches))

    assert report is not None
    quantized = {w.name for w in report.weights}
    for name, p in model.named_parameters():
        if name in quantized:
            assert type(p) is Int4GroupTensor
            assert p.shape == dense[name].shape
            assert p.dtype == dense[name].dtype
            assert not p.requires_grad
        else:
            assert id(p) == objects[name]
            assert torch.equal(p, dense[name])
            assert p.requires_grad
    assert [m.training for m in model.modules()] == modes
    assert model.config.to_dict() == config_before.to_dict()
    assert {n: {k for k in vars(m) if not k.startswith("_")} for n, m in model.named_modules()} == attributes
    assert torch.equal(torch.get_rng_state(), flags[0])
    assert flags[1:] == (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, originals, strict=True))


def test_same_inputs_give_the_same_bytes() -> None:
    models = [tiny_llama(), tiny_llama()]
    for model in models:
        quantize_(model, gptq_config(3, 32, sym=False, calibration=token_batches()))
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        parts = [
            [getattr(t, n) for n in t.__tensor_flatten__()[0]] if isinstance(t, GroupTensor) else [t] for t in (a, b)
        ]
        assert all(torch.equal(x, y) for x, y in zip(*parts, strict=True)), name


@pytest.mark.parametrize("act_order", ["static", "none", "group"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_setting_beats_rounding_to_nearest(bits: int, sym: bool, act_order: str) -> None:
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    batches = [x @ torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) for _ in range(2)]  # correlated
    models = {m: seeded(nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))) for m in ("fp", "rtn", "gptq")}
    for method in ("rtn", "gptq"):
        config = gptq_config(bits, 32, sym=sym, act_order=act_order, method=method, calibration=batches)
        quantize_(models[method], config)
    error = {
        m: (outputs(models[m], batches[0])[0] - outputs(models["fp"], batches[0])[0]).square().mean() for m in models
    }
    assert 0 < error["gptq"] < 0.9 * error["rtn"]
    names = [type(p).__name__ for p in models["gptq"].parameters() if isinstance(p, GroupTensor)]
    assert names == [f"Int{bits}GroupTensor"] * 2


def test_conv1d_weights_keep_their_orientation() -> None:
    model = gpt2()
    dense = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    quantize_(model, gptq_config(8, 32, calibration=token_batches()))
    weight = model.transformer.h[0].attn.c_attn.weight
    assert weight.shape == dense.shape == (64, 192)
    assert weight.transposed
    step = weight.scale.float().max()
    assert (weight.dequantize() - dense).abs().max() <= 4 * step  # GPTQ moves weights by a few steps at most
    ids = token_batches()[0]["input_ids"]
    assert model.generate(ids[:, :5], attention_mask=torch.ones(2, 5), max_new_tokens=3, pad_token_id=0).shape == (2, 8)


def test_generate_with_a_cache_works_afterwards() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    quantize_(model, gptq_config(4, 32, calibration=token_batches()))
    ids = token_batches()[0]["input_ids"][:, :8]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert out.shape == (2, 14)


def test_rules_choose_bits_and_leave_weights_out() -> None:
    model = tiny_llama()
    rules = {"re:.*down_proj": {"bits": 8}, "re:.*layers.0.*": None, "lm_head": {"bits": 8, "method": "rtn"}}
    report = quantize_(model, gptq_config(4, 32, rules=rules, calibration=token_batches()))
    assert report is not None
    bits = {w.name: (w.bits, w.method) for w in report.weights}
    assert bits["model.layers.0.mlp.down_proj.weight"] == (8, "gptq")
    assert bits["lm_head.weight"] == (8, "rtn")
    assert bits["model.layers.1.mlp.up_proj.weight"] == (4, "gptq")
    assert len(bits) == 9
    assert report.excluded["model.layers.0.mlp.up_proj.weight"] == "rule 're:.*layers.0.*'"


def test_filter_fn_sees_modules_and_names() -> None:
    seen: list[str] = []

    def attention_only(module: nn.Module, name: str) -> bool:
        seen.append(name)
        return isinstance(module, nn.Linear) and "self_attn" in name

    model = tiny_llama()
    report = quantize_(model, gptq_config(4, 32, calibration=token_batches()), attention_only)
    assert report is not None
    assert len(report.weights) == 8
    assert report.excluded["model.layers.0.mlp.up_proj.weight"] == "left out by filter_fn"
    assert "" in seen


def test_through_torchao() -> None:
    ours, theirs = tiny_llama(), tiny_llama()
    config = gptq_config(4, 32, calibration=token_batches())
    quantize_(ours, config)
    torchao.quantization.quantize_(theirs, config, filter_fn=whole_model)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert type(a) is type(b), name
        if isinstance(a, GroupTensor):
            assert isinstance(b, GroupTensor)
            assert torch.equal(a.qdata, b.qdata)


def test_torchao_per_linear_without_data_rounds_to_nearest_and_is_idempotent() -> None:
    model: Any = seeded(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)))
    dense = model[0].weight.detach().clone()
    torchao.quantization.quantize_(model, gptq_config(8, 32))
    once = model[0].weight
    assert isinstance(once, gptq_ao.Int8GroupTensor)
    # Half a step, and the fp16 rounding of the scale, which moves the ends of the grid by up to 2^-11 of 127 steps.
    assert (once.dequantize() - dense).abs().max() <= once.scale.float().max() * (0.5 + 127 * 2**-11)
    torchao.quantization.quantize_(model, gptq_config(4, 32))
    assert model[0].weight is once


def test_torchao_parameter_level_config() -> None:
    model = seeded(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)))
    config = torchao.quantization.FqnToConfig({"0.weight": gptq_config(4, 32), "re:1": gptq_config(8, 32)})
    torchao.quantization.quantize_(model, config, filter_fn=None)
    assert [type(m.weight).__name__ for m in model] == ["Int4GroupTensor", "Int8GroupTensor"]


def test_another_librarys_config_is_handed_on() -> None:
    model = seeded(nn.Sequential(nn.Linear(64, 32)))
    config = torchao.quantization.Int8WeightOnlyConfig(version=2)  # torchao 0.17 warns of its default, version 1
    assert quantize_(model, config) is None
    assert type(model[0].weight) is not nn.Parameter


def test_round_to_nearest_without_data() -> None:
    model = tiny_llama()
    report = quantize_(model, gptq_config(4, 32, method="rtn"))
    assert report is not None
    assert len(report.weights) == 14
    assert report.excluded["lm_head.weight"] == "output head"
    assert "not the weight of an nn.Linear" in report.excluded["model.embed_tokens.weight"]
    with_graph = tiny_llama()
    quantize_(with_graph, gptq_config(4, 32, method="rtn", calibration=token_batches(1)))
    a, b = (m.model.layers[1].mlp.up_proj.weight for m in (model, with_graph))
    assert torch.equal(a.qdata, b.qdata)


def test_a_layer_that_no_data_reaches_is_rounded_and_reported() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.second((self.first(x) * 0).relu())

    batches = [torch.ones(4, 32)]
    report = quantize_(seeded(Dead()), gptq_config(4, 32, calibration=batches))
    assert report is not None
    assert report.fallbacks == {"second.weight": "no calibration row reached it"}
    assert "fallback: no calibration row reached it" in str(report)
    with pytest.raises(gptq_ao.errors.SolverError, match=r"second.weight: no calibration row .* strict=True forbids"):
        quantize_(seeded(Dead()), gptq_config(4, 32, calibration=batches, strict=True))


def test_report() -> None:
    model = tiny_llama()
    report = quantize_(model, gptq_config(4, 32, calibration=token_batches()))
    assert report is not None
    facts = report.to_dict()
    assert facts["stages"] == facts["hessians"] == 8
    assert facts["weights"] == len(facts["layers"]) == 14
    assert facts["bits_per_weight"] == pytest.approx(5.0)  # 4 + 32 bits of scale and zero point for 32 weights
    assert facts["original_bytes"] == sum(
        4 * p.numel() for n, p in model.named_parameters() if isinstance(p, GroupTensor)
    )
    assert set(facts["seconds"]) == {"capture", "plan", "calibrate", "solve"}
    assert all(0 < layer["error"] < 0.1 for layer in facts["layers"])
    assert all(layer["rows"] == 4 * 2 * 40 for layer in facts["layers"])
    text = str(report)
    assert "14 weights in 8 stages" in text
    assert "left as it is: lm_head.weight (output head)" in text
    assert all(w.name in text for w in report.weights)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_rule_for_a_tied_head_says_that_it_is_tied(method: str) -> None:
    data = token_batches(1) if method == "gptq" else None
    config = gptq_config(4, 32, method=method, calibration=data, rules={"lm_head": {"bits": 8}})
    with pytest.raises(
        gptq_ao.errors.ConfigError, match=r"'lm_head.weight', which is tied to 'model.embed_tokens.weight': .* Untie"
    ):
        quantize_(tiny_llama(tied=True), config)
