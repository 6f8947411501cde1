"""Trained adapters of PEFT, merged into quantized weights, which are quantized anew."""

import copy
import re
import sys
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.errors import CalibrationError, ConfigError, NonFiniteError
from gptq_ao.report import Report
from gptq_ao.tensor import GroupTensor
from gptq_ao.training import merge_and_requantize_
from gptq_ao.training.peft_layers import PlainModel
from tests.ranks import some

from ..models import seeded, tiny_llama, token_batches

# What PEFT says of any quantized model, of GPT-2, and of the base model's name.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.is_gradient_checkpointing.:FutureWarning")

BATCHES = token_batches()
ALL = "all-linear"


def trained(model: nn.Module, size: float = 0.02, seed: int = 0) -> Any:
    """Every parameter that trains moved a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model.eval()


def quantized_llama(bits: int = 4, group: int = 32, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = tiny_llama(layers=1, dtype=dtype)
    how: dict[str, Any] = {"calibration": BATCHES} if settings.get("act_order") == "group" else {"method": "rtn"}
    quantize_(model, gptq_config(bits, group, effort="fast", **how, **settings))
    return model


def adapted(model: nn.Module, size: float = 0.02, **settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = peft.get_peft_model(model, peft.LoraConfig(r=4, **{"target_modules": ALL, **settings}))
    return trained(made, size)


def merge(model: nn.Module, **settings: Any) -> tuple[Any, Report]:
    return merge_and_requantize_(model, gptq_config(calibration=BATCHES, **settings))


def dense_of(model: nn.Module) -> Any:
    same = copy.deepcopy(model)
    for module in same.modules():
        for name, p in module._parameters.items():
            if isinstance(p, GroupTensor):
                values: Any = p.dequantize(torch.float32)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
    return same


def two_active(model: nn.Module, config: peft.LoraConfig) -> Any:
    made: Any = peft.get_peft_model(model, config)
    made.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    made.base_model.set_adapter(["default", "second"])
    return made


KINDS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, target_modules=ALL),
    "alpha": peft.LoraConfig(r=4, lora_alpha=64, target_modules=["k_proj", "down_proj"]),
    "rslora": peft.LoraConfig(r=4, use_rslora=True, target_modules=ALL),
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=ALL),
    "ranks": peft.LoraConfig(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5}, target_modules=ALL),
    "two": peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "loha": peft.LoHaConfig(r=4, target_modules=["q_proj", "up_proj"]),
    "lokr": peft.LoKrConfig(r=4, target_modules=["q_proj", "up_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_is_what_peft_makes_of_dense_weights(kind: str) -> None:
    model = quantized_llama()
    make = two_active if kind == "two" else peft.get_peft_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made, dense = (trained(make(m, copy.deepcopy(KINDS[kind]))) for m in (model, dense_of(model)))
    # Their first values are random, and different: the same for both.
    values = dict(dense.named_parameters())
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.requires_grad:
                p.copy_(values[name])
    expected = dense.merge_and_unload()
    plain = PlainModel.of(made)
    assert plain.adapted
    for name, w in plain.adapted.items():
        assert torch.allclose(w.merged(), expected.get_parameter(name), atol=1e-6), name
    unchanged = [n for n, p in plain.model.named_parameters() if isinstance(p, GroupTensor) and n not in plain.adapted]
    for name in unchanged:
        assert torch.equal(plain.model.get_parameter(name).dequantize(), expected.get_parameter(name)), name


@pytest.mark.parametrize(
    "settings", some([{}, {"use_dora": True}, {"use_rslora": True}]), ids=["lora", "dora", "rslora"]
)
@pytest.mark.parametrize(
    ("bits", "group", "own"),
    [
        (2, 16, {}),
        (3, 32, {"sym": False}),
        (4, 32, {"act_order": "group"}),
        (4, -1, {}),
        (8, 64, {"act_order": "static", "sym": False}),
    ],
    ids=["2", "3 asym", "4 permuted", "4 per row", "8 static asym"],
)
def test_each_weight_keeps_its_kind_and_gptq_is_nearer_than_nearest(
    bits: int, group: int, own: dict[str, Any], settings: dict[str, Any]
) -> None:
    model = quantized_llama(bits, group, **own)
    made = adapted(model, **settings)
    expected = made(**BATCHES[0]).logits
    before = {n: p.spec for n, p in made.get_base_model().named_parameters() if isinstance(p, GroupTensor)}
    nearest = PlainModel.of(copy.deepcopy(made))
    for name, w in nearest.adapted.items():
        owner, _, leaf = name.rpartition(".")
        nearest.model.get_submodule(owner)._parameters[leaf] = nn.Parameter(w.merged(), requires_grad=False)
    quantize_(nearest.model, gptq_config(bits, group, sym=own.get("sym", True), method="rtn"))
    result, report = merge(made)
    after = {n: p.spec for n, p in result.named_parameters() if isinstance(p, GroupTensor)}
    assert {n.replace(".base_layer", ""): s for n, s in before.items()} == after
    assert {w.name for w in report.weights} == after.keys()
    errors = [(m(**BATCHES[0]).logits - expected).square().mean().item() for m in (result, nearest.model)]
    assert errors[0] < errors[1]
    assert not any("peft" in type(m).__module__ for m in result.modules())
    assert not hasattr(result, "peft_config")
    assert report.warnings == ()


def test_weights_without_adapters_keep_their_codes() -> None:
    model = quantized_llama(3)
    codes = {n: p.codes() for n, p in model.named_parameters() if isinstance(p, GroupTensor)}
    result, report = merge(adapted(model, target_modules=["q_proj", "down_proj"]))
    changed = {w.name for w in report.weights}
    assert len(changed) == 2
    for name, before in codes.items():
        same = torch.equal(result.get_parameter(name).codes(), before)
        assert same != (name in changed), name
        assert (report.excluded.get(name) == "no adapter changes it: its codes stay") == same
    # Engines fuse them with others, which have the same settings.
    assert report.warnings == ()
    assert "adapters merged" in report.recipe["recipe"]
    assert "rules" not in report.recipe


def test_rows_that_an_adapter_leaves_alone_stay_exactly_as_they_are() -> None:
    """Their scales are kept, on which they have no error at all; new ones would round them anew."""
    model = quantized_llama(3)
    before = model.model.layers[0].mlp.down_proj.weight.dequantize()
    made = adapted(model, target_modules=["down_proj"])
    for name, p in made.named_parameters():
        if "lora_B" in name:
            p.data[5:] = 0
    result, _ = merge(made, compensate="none")
    after = result.model.layers[0].mlp.down_proj.weight.dequantize()
    assert torch.equal(after[5:], before[5:])
    assert not torch.equal(after[:5], before[:5])


def test_an_adapter_that_changes_nothing_is_said() -> None:
    """As PEFT makes it, before training: B is zero."""
    made = peft.get_peft_model(quantized_llama(), peft.LoraConfig(target_modules=ALL))
    with pytest.raises(ConfigError, match=r"the adapters change no quantized weight: merge them with PEFT"):
        merge(made)
    assert isinstance(made, peft.PeftModel)
    assert any("lora" in n for n, _ in made.named_parameters())


def test_what_was_trained_as_a_whole_or_is_dense_takes_its_place() -> None:
    """Heads and norms of modules_to_save, single tokens, LoRA on dense layers."""
    model = quantized_llama()
    made = adapted(model, target_modules=["q_proj", "lm_head"], modules_to_save=["norm"])
    expected = made(**BATCHES[0]).logits
    head = made.get_base_model().lm_head.get_base_layer().weight.clone()
    delta = made.get_base_model().lm_head.get_delta_weight("default")
    result, report = merge(made)
    assert type(result.model.norm).__name__ == "LlamaRMSNorm"
    assert not torch.equal(result.model.norm.weight, torch.ones(64))
    assert torch.allclose(result.lm_head.weight, head + delta, atol=1e-6)
    assert {w.name for w in report.weights} == {"model.layers.0.self_attn.q_proj.weight"}
    assert (result(**BATCHES[0]).logits - expected).square().mean() < 1e-2 * expected.square().mean()


def test_single_tokens_that_were_trained() -> None:
    made = adapted(quantized_llama(), trainable_token_indices=[3, 5])
    expected = made(**BATCHES[0]).logits
    before = tiny_llama(layers=1).model.embed_tokens.weight
    result, _ = merge(made)
    changed = (result.model.embed_tokens.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [3, 5]
    assert (result(**BATCHES[0]).logits - expected).square().mean() < 1e-2 * expected.square().mean()


def test_a_head_that_was_tied_and_is_trained_gets_a_weight_of_its_own() -> None:
    model = tiny_llama(layers=1, tied=True)
    quantize_(model, gptq_config(4, 32, method="rtn"))
    made = adapted(model, target_modules=["q_proj", "lm_head"])
    expected = made(**BATCHES[0]).logits
    result, report = merge(made)
    assert result.config.tie_word_embeddings is False
    assert result.lm_head.weight is not result.model.embed_tokens.weight
    assert any("tie_word_embeddings" in note for note in report.notes)
    assert (result(**BATCHES[0]).logits - expected).square().mean() < 1e-2 * expected.square().mean()


def test_transposed_weights_and_biases() -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=64)
    model = seeded(transformers.GPT2LMHeadModel(config))
    quantize_(model, gptq_config(4, 32, effort="fast", calibration=BATCHES))
    made = adapted(model, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    expected = made(**BATCHES[0]).logits
    result, report = merge(made)
    assert len(report.weights) == 2
    assert all(result.get_parameter(w.name).transposed for w in report.weights)
    assert (result(**BATCHES[0]).logits - expected).square().mean() < 2e-2 * expected.square().mean()


class Branching(nn.Module):
    """Not one graph. `unused` is in no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.second(y if y.mean().item() < 1e9 else -y)


class Straight(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("kind", [Branching, Straight], ids=["replay", "graph"])
def test_replayed_forwards_and_layers_that_no_batch_reaches(kind: type[Branching]) -> None:
    model, x = seeded(kind()), torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    quantize_(model, gptq_config(4, 16, method="rtn"))
    made = adapted(model, target_modules=["first", "second", "unused"])
    expected, unused = made(x), PlainModel.of(copy.deepcopy(made)).adapted["unused.weight"].merged()
    result: Any
    result, report = merge_and_requantize_(made, gptq_config(calibration=[x]))
    assert report.capture == ("replay" if kind is Branching else "export")
    assert (result(x) - expected).square().mean() < 1e-2 * expected.square().mean()
    assert list(report.fallbacks) == ["unused.weight"]
    # At most half a step of the grid away.
    step = result.unused.weight.scale.float().abs().repeat_interleave(16, -1)
    inside = (result.unused.weight.codes() > 0) & (result.unused.weight.codes() < 15)
    assert ((result.unused.weight.dequantize() - unused).abs() <= step * 0.5001)[inside].all()


def test_stacked_experts() -> None:
    from ..pipeline.test_experts import DOWN, UP, mixture

    model = mixture()
    quantize_(model, gptq_config(4, -1, effort="fast", calibration=BATCHES))
    made = adapted(model, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    expected = made(**BATCHES[0]).logits
    result, report = merge(made, expert_min_rows=1)
    assert {UP, DOWN} <= {w.name for w in report.weights}
    assert (result(**BATCHES[0]).logits - expected).square().mean() < 2e-2 * expected.square().mean()


def test_adapters_that_transformers_put_into_the_model() -> None:
    model = quantized_llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    trained(model)
    expected = model(**BATCHES[0]).logits
    result, report = merge(model)
    assert result is model
    assert len(report.weights) == 1
    assert not getattr(model, "_hf_peft_config_loaded", False)
    assert (result(**BATCHES[0]).logits - expected).square().mean() < 1e-2 * expected.square().mean()


def test_rules_give_other_settings() -> None:
    made = adapted(quantized_llama(3, 32))
    result, report = merge(made, rules={"re:.*down_proj": {"bits": 8, "group_size": 64}, "re:.*o_proj": {"sym": False}})
    assert {(w.bits, w.group_size) for w in report.weights if "down_proj" in w.name} == {(8, 64)}
    assert {(w.bits, w.group_size) for w in report.weights if "down_proj" not in w.name} == {(3, 32)}
    assert not result.model.layers[0].self_attn.o_proj.weight.symmetric
    assert result.model.layers[0].self_attn.q_proj.weight.symmetric


def snapshot(model: nn.Module) -> dict[str, Any]:
    values = {
        n: (id(p), p.codes().clone() if isinstance(p, GroupTensor) else p.clone()) for n, p in model.named_parameters()
    }
    return {**values, "modules": [(n, id(m)) for n, m in model.named_modules()]}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a.keys() != b.keys() or a["modules"] != b["modules"]:
        return False
    return all(a[n][0] == b[n][0] and torch.equal(a[n][1], b[n][1]) for n in a if n != "modules")


def test_if_it_fails_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last stage, when most of it is done."""
    from gptq_ao.pipeline import run_plan

    model = tiny_llama(layers=1, tied=True)
    quantize_(model, gptq_config(4, 32, method="rtn"))
    made = adapted(model, target_modules=["q_proj", "down_proj", "lm_head"], modules_to_save=["norm"])
    before, logits = snapshot(made), made(**BATCHES[0]).logits
    real, calls = run_plan.rewrite, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(run_plan, "rewrite", failing)
    with pytest.raises(KeyboardInterrupt):
        merge(made)
    assert same(before, snapshot(made))
    assert torch.equal(made(**BATCHES[0]).logits, logits)
    assert model.config.tie_word_embeddings is True
    monkeypatch.undo()
    _, report = merge(made)
    assert len(report.weights) == 2


def disabled(model: Any) -> Any:
    model.disable_adapter_layers()
    return model


def nan_adapter(model: Any) -> Any:
    model.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight.data[3] = float("nan")
    return model


def prompt(model: Any) -> Any:
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("make", "settings", "error", "message"),
    [
        (lambda: quantized_llama(), {}, ConfigError, r"the LlamaForCausalLM has no adapters of PEFT: nothing to merge"),
        (
            lambda: adapted(tiny_llama(layers=1)),
            {},
            ConfigError,
            r"change no quantized weight: .* \(`merge_and_unload`\), then",
        ),
        (lambda: disabled(adapted(quantized_llama())), {}, ConfigError, r"q_proj' are disabled: model\.enable_adapter"),
        (
            lambda: nan_adapter(adapted(quantized_llama())),
            {},
            NonFiniteError,
            r"layers\.0\.mlp\.up_proj\.weight has el",
        ),
        (lambda: prompt(quantized_llama()), {}, ConfigError, r"PROMPT_TUNING.* adds inputs: there is nothing to merge"),
        (
            lambda: adapted(quantized_llama()),
            {"target_bits": 5},
            ConfigError,
            r"target_bits chooses the bits of weights",
        ),
        (
            lambda: adapted(quantized_llama()),
            {"rules": {"no": {"bits": 8}}},
            ConfigError,
            r"rule 'no' is for no quantiz",
        ),
        (
            lambda: adapted(quantized_llama()),
            {"rules": {"re:.*q_proj": None}},
            ConfigError,
            r"its adapter would be lost",
        ),
        (lambda: adapted(quantized_llama()), {"calibration": None}, CalibrationError, r"no calibration data"),
    ],
    ids=["none", "dense", "disabled", "nan", "prompt", "target_bits", "rule", "rule None", "no data"],
)
def test_bad_input(make: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make()
    before = [(n, id(m)) for n, m in model.named_modules()]
    with pytest.raises(error, match=message):
        merge_and_requantize_(model, gptq_config(**{"calibration": BATCHES, **settings}))
    assert [(n, id(m)) for n, m in model.named_modules()] == before


def test_adapters_that_are_merged_already() -> None:
    model = quantized_llama()
    made = adapted(model)
    layer = made.get_base_model().model.layers[0].self_attn.q_proj
    layer.merged_adapters.append("default")
    with pytest.raises(ConfigError, match=r"q_proj' has adapters that are merged already: model\.unmerge_adapter\(\)"):
        merge(made)


def test_one_quantized_weight_of_two_layers_with_an_adapter_on_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    model, x = seeded(Tied()), torch.ones(4, 32)
    quantize_(model, gptq_config(4, 16, method="rtn"))
    made = adapted(model, target_modules=["a"])
    with pytest.raises(ConfigError, match=re.escape("'a.weight' and 'b.weight' are one quantized weight")):
        merge_and_requantize_(made, gptq_config(calibration=[x]))


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized_llama()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="PEFT, which is not installed: pip install peft"):
        merge(model)


def test_beside_the_weight_an_adapter_is_exact_and_compiles_into_one_graph() -> None:
    model = quantized_llama()
    made = adapted(model, target_modules=["q_proj", "down_proj"])
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = made(**BATCHES[0], use_cache=False).logits
        compiled = torch.compile(made, fullgraph=True, backend=backend)
        assert torch.allclose(compiled(**BATCHES[0], use_cache=False).logits, expected, atol=1e-5)
    assert len(graphs) == 1
