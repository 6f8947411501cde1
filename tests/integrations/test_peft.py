"""Adapters of PEFT on quantized weights: made, trained, merged, taken out again."""

import copy
import dataclasses
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from gptq_ao import GPTQConfig, gptq_config, quantize_
from gptq_ao.errors import NonFiniteError
from gptq_ao.tensor import GroupTensor
from gptq_ao.tensor.requantize import nearest

from ..models import seeded, tiny_llama, token_batches

pytestmark = [
    # PEFT's own, of a method whatever the weights are.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.usefixtures("one_thread"),
]

IDS = token_batches(1)[0]["input_ids"]
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, **TARGETS, **settings})


# Adapters that change nothing at first (but for AdaLoRA and VB-LoRA, which draw all of their matrices).
METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lora,
    "rsLoRA": lambda: lora(use_rslora=True),
    "DoRA": lambda: lora(use_dora=True),
    "LoRA, gaussian": lambda: lora(init_lora_weights="gaussian"),
    "LoRA, orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "MiCA": lambda: lora(init_lora_weights="mica"),
    "all linear layers": lambda: lora(target_modules="all-linear"),
    "a dense head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "copies": lambda: lora(modules_to_save=["lm_head", "o_proj"]),
    "tokens": lambda: lora(trainable_token_indices=[1, 2]),
    "VeRA": lambda: peft.VeraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, **TARGETS),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "LoHa": lambda: peft.LoHaConfig(r=4, **TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=4, **TARGETS),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, total_step=10, **TARGETS),
    "HRA": lambda: peft.HRAConfig(r=4, **TARGETS),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=32, **TARGETS),
    "MiSS": lambda: peft.MissConfig(r=4, **TARGETS),
    "SHiRA": lambda: peft.ShiraConfig(r=4, **TARGETS),
}
METHOD = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)

FORMS: dict[str, dict[str, Any]] = {
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3},
    "8 bits": {"bits": 8},
    "asymmetric": {"sym": False},
    "an order of columns": {"act_order": "group", "method": "gptq", "calibration": token_batches(2), "effort": "fast"},
    "one group": {"group_size": -1},
    "a quantized head": {"rules": {"lm_head": {"bits": 8}}},
}


def settings(**change: Any) -> GPTQConfig:
    return gptq_config(**{"bits": 4, "group_size": 32, "method": "rtn", **change})


def quantized(**change: Any) -> Any:
    model = tiny_llama(layers=1)
    quantize_(model, settings(**change))
    return model


def adapted(model: nn.Module, config: peft.PeftConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)


def dense_twin(model: nn.Module) -> Any:
    """A model of the values that the quantized weights stand for."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, p in module._parameters.items():
            if isinstance(p, GroupTensor):
                module._parameters[name] = nn.Parameter(p.dequantize())
    return twin


def shaken(model: Any) -> Any:
    """Every parameter that trains gets another value, the same for the same model."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, which is the same with and without layers of PEFT around a module."""
    named = ((n.removeprefix("base_model.model."), p.detach()) for n, p in model.named_parameters())
    return {n.replace("base_layer.", "").replace("original_module.", ""): p for n, p in named}


def weights(model: nn.Module) -> dict[str, GroupTensor]:
    """Those that are quantized, as they are now: a later change does not show in them."""
    return {n: p.replace() for n, p in values_of(model).items() if isinstance(p, GroupTensor)}


def same(a: dict[str, GroupTensor], b: dict[str, GroupTensor]) -> bool:
    pairs = (zip(a[name].parts().values(), b[name].parts().values(), strict=True) for name in a)
    return a.keys() == b.keys() and all(torch.equal(x, y) for pair in pairs for x, y in pair)


def loss_of(model: Any) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def losses(model: Any, steps: int = 3) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def merging() -> Any:
    return pytest.warns(UserWarning, match=r"is merged into quantized weights .*merge_and_requantize_")


@METHOD
def test_trains_from_where_the_model_is(config: Callable[[], peft.PeftConfig]) -> None:
    model = quantized()
    start, before = loss_of(model).item(), weights(model)
    model = adapted(model, config())
    found = losses(model)
    if not isinstance(model.active_peft_config, peft.AdaLoraConfig | peft.VBLoRAConfig):
        assert found[0] == pytest.approx(start, abs=1e-5)
    assert found[-1] < found[0]
    frozen = weights(model)
    assert same({name: before[name] for name in frozen}, frozen)
    # A copy that trains is one more, and dense.
    assert all(not isinstance(p, GroupTensor) for p in model.parameters() if p.requires_grad)


@METHOD
def test_merging_rounds_what_a_dense_model_would_have(config: Callable[[], peft.PeftConfig]) -> None:
    base = quantized()
    model, twin = shaken(adapted(base, config())), shaken(adapted(dense_twin(quantized()), config()))
    before, expected = weights(model), model(input_ids=IDS).logits
    twin.merge_adapter()
    values = values_of(twin)
    with merging():
        model.merge_adapter()
    merged = weights(model)
    assert not same(merged, before)
    rounded = {n: w if torch.equal(w.dequantize(), values[n]) else nearest(w, values[n]) for n, w in before.items()}
    assert same(merged, rounded)

    model.unmerge_adapter()
    assert same(weights(model), before)
    assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-6)

    with merging():
        plain = model.merge_and_unload()
    assert all(torch.equal(w.qdata, merged[n].qdata) for n, w in weights(plain).items())
    assert not any("gptq_ao" in name for module in plain.modules() for name in vars(module))  # no codes are kept


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_merging_into_weights_of_any_form(form: dict[str, Any], dora: bool) -> None:
    config = lora(target_modules=["q_proj", "lm_head"], use_dora=dora)
    model = quantized(**form)
    twin = shaken(adapted(dense_twin(model), config))
    model = shaken(adapted(model, config))
    before = weights(model)
    twin.merge_adapter()
    with merging():
        model.merge_adapter()
    for name, w in weights(model).items():
        layer = twin.base_model.model.get_submodule(name.removesuffix(".weight"))
        value = getattr(layer, "base_layer", layer).weight
        assert w.__tensor_flatten__() == before[name].__tensor_flatten__()
        assert torch.equal(w.qdata, nearest(before[name], value).qdata)
        assert (w.dequantize() - value).norm() <= (before[name].dequantize() - value).norm()
    model.unmerge_adapter()
    assert same(weights(model), before)


# Initializations that take the adapter's part out of the weight.
RESIDUALS: dict[str, Callable[[], peft.PeftConfig]] = {
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "PiSSA, iterated": lambda: lora(init_lora_weights="pissa_niter_4"),
    "OLoRA": lambda: lora(init_lora_weights="olora"),
}


@pytest.mark.parametrize("config", RESIDUALS.values(), ids=RESIDUALS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_left_is_rounded_and_said(config: Callable[[], peft.PeftConfig], bits: int) -> None:
    model = quantized(bits=bits)
    values = {name: w.dequantize() for name, w in weights(model).items()}
    with pytest.warns(UserWarning, match=r"takes a part out of quantized weights \(2 of them\).* quantize_ leaves"):
        model = adapted(model, config())
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert len(layers) == 2
    for name, layer in layers.items():
        w, part = layer.base_layer.weight, layer.get_delta_weight("default")
        assert isinstance(w, GroupTensor)
        assert part.norm() > 0.1 * values[f"{name}.weight"].norm()
        left = values[f"{name}.weight"] - part
        assert torch.allclose(w.dequantize(), nearest(w, left).dequantize(), atol=1e-6)
        # With the adapter it is the weight from before, within the rounding of what is left.
        rms = (w.dequantize() + part - values[f"{name}.weight"]).norm() / math.sqrt(w.numel())
        assert rms <= w.scale.abs().max() / math.sqrt(3)
    found = losses(model)
    assert found[-1] < found[0]


def test_gradients_of_quantized_weights_for_lora_ga() -> None:
    model, config = quantized(), lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    before = weights(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook")  # PEFT's own
        preprocess_loraga(model, config, lambda: loss_of(model).backward())
    assert same(weights(model), before)
    twin = dense_twin(quantized())
    loss_of(twin).backward()
    assert torch.allclose(
        model.model.layers[0].mlp.down_proj._peft_loraga_grad, twin.model.layers[0].mlp.down_proj.weight.grad
    )
    with pytest.warns(UserWarning, match="takes a part out of quantized weights"):
        model = adapted(model, config)
    found = losses(model)
    assert found[-1] < found[0]


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage")  # PEFT's advice
def test_initialized_by_the_inputs_of_the_layers() -> None:
    """EVA, which leaves the weights as they are."""
    model, config = quantized(), lora(init_lora_weights="eva", eva_config=peft.EvaConfig())
    start, before = loss_of(model).item(), weights(model)
    model = adapted(model, config)
    drawn = model.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].weight.clone()
    ones = torch.ones_like(IDS)
    peft.initialize_lora_eva_weights(
        model, [{"attention_mask": ones, **b} for b in token_batches()], show_progress_bar=False
    )
    assert not torch.equal(model.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].weight, drawn)
    found = losses(model)
    assert found[0] == pytest.approx(start, abs=1e-5)
    assert found[-1] < found[0]
    assert same(weights(model), before)


def test_initialized_by_covariances(monkeypatch: pytest.MonkeyPatch) -> None:
    """CorDA, which takes a part out of the weights."""
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # for its decorator, in a package that may be missing
    from peft.tuners.lora.corda import preprocess_corda

    model, config = quantized(), lora(init_lora_weights="corda", corda_config=CordaConfig())
    start = loss_of(model).item()
    rows = [b["input_ids"][:1] for b in token_batches()]

    @torch.no_grad()
    def run() -> None:
        for row in rows:
            model(row)

    preprocess_corda(model, config, run_model=run)
    with pytest.warns(UserWarning, match=r"takes a part out of quantized weights \(2 of them\)"):
        model = adapted(model, config)
    found = losses(model)
    assert found[0] == pytest.approx(start, abs=0.02)
    assert found[-1] < found[0]


def test_transposed_weights_with_biases() -> None:
    """GPT-2's; lora_bias adds to a bias, which stays dense."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=64, **ids))
    quantize_(seeded(gpt2), gptq_config(4, 32, calibration=token_batches(1), effort="fast"))
    assert gpt2.transformer.h[0].mlp.c_fc.weight.transposed
    config = lora(target_modules=["c_fc"], lora_bias=True, fan_in_fan_out=True)
    twin, model = shaken(adapted(dense_twin(gpt2), config)), shaken(adapted(gpt2, config))
    before, bias = weights(model), gpt2.transformer.h[0].mlp.c_fc.base_layer.bias.clone()
    twin.merge_adapter()
    with merging():
        model.merge_adapter()
    layer, dense = (m.base_model.model.transformer.h[0].mlp.c_fc.base_layer for m in (model, twin))
    assert torch.equal(layer.weight.qdata, nearest(before["transformer.h.0.mlp.c_fc.weight"], dense.weight).qdata)
    assert torch.equal(layer.bias, dense.bias)
    model.unmerge_adapter()
    assert same(weights(model), before)
    assert torch.allclose(layer.bias, bias)


CONVOLVED: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=["0", "1"], use_dora=True),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=["0", "1"]),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=["0", "1"]),
}


@pytest.mark.parametrize("config", CONVOLVED.values(), ids=CONVOLVED)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_convolutions(config: Callable[[], peft.PeftConfig], kind: Any) -> None:
    x = torch.randn(2, 8, *[6] * (2 if kind is nn.Conv2d else 1), generator=torch.Generator().manual_seed(2))
    model = seeded(nn.Sequential(kind(8, 16, 4), kind(16, 8, 1)))
    quantize_(model, gptq_config(4, calibration=[x], effort="fast"))
    twin, model = shaken(adapted(dense_twin(model), config())), shaken(adapted(model, config()))
    before, y = weights(model), model(x)
    assert len(before) == 2
    assert torch.allclose(y, twin(x), atol=1e-5)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    twin.merge_adapter()
    with merging():
        model.merge_adapter()
    values = values_of(twin)
    assert all(torch.equal(w.qdata, nearest(before[n], values[n]).qdata) for n, w in weights(model).items())
    model.unmerge_adapter()
    assert same(weights(model), before)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "vocab_size": 96, "num_local_experts": 4, "max_position_embeddings": 64}
    model = seeded(MixtralForCausalLM(MixtralConfig(**sizes, **more)))
    quantize_(model, gptq_config(4, 32, calibration=token_batches(1), effort="fast"))
    return model


def test_stacked_experts() -> None:
    model = mixtral()
    start, before = loss_of(model).item(), weights(model)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(model, peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names))
    found = losses(model)
    assert found[0] == pytest.approx(start, abs=1e-5)
    assert found[-1] < found[0]
    assert same(weights(model), before)
    with pytest.warns(UserWarning, match=r"merged into quantized weights \(3 of them\)"):
        model.merge_adapter()
    changed = {n for n, w in weights(model).items() if not torch.equal(w.qdata, before[n].qdata)}
    assert changed == {n for n in before if "experts" in n or "q_proj" in n}
    model.unmerge_adapter()
    assert same(weights(model), before)


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, x, x, need_weights=False)[0]


@pytest.mark.filterwarnings("ignore:All adapters are already merged", "ignore:Already unmerged")  # of its out_proj
def test_attention_whose_weights_are_merged_in_each_forward() -> None:
    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(2))
    model = seeded(Mixes())
    quantize_(model, gptq_config(4, 32, calibration=[x], effort="fast"))
    config = peft.LoraConfig(r=4, target_modules=["mix"])
    twin, model = shaken(adapted(dense_twin(model), config)), shaken(adapted(model, config))
    before = weights(model)
    assert len(before) == 2
    y = model(x)
    y.sum().backward()
    assert torch.allclose(y, twin(x), atol=1e-5)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert same(weights(model), before)
    with merging():
        model.merge_adapter()
    assert all(not torch.equal(w.qdata, before[n].qdata) for n, w in weights(model).items())
    model.unmerge_adapter()
    assert same(weights(model), before)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_two_adapters(dora: bool) -> None:
    config = lora(init_lora_weights=False, use_dora=dora)
    model = adapted(quantized(), config)
    model.add_adapter("other", config)
    before = weights(model)
    model.base_model.set_adapter(["default", "other"])
    with merging():
        model.merge_adapter()
    both = weights(model)
    model.unmerge_adapter()
    assert same(weights(model), before)
    with merging():
        model.merge_adapter(["default"])
    one = weights(model)
    # Once more from the codes of before: nothing is rounded twice.
    with merging(), pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    assert not same(weights(model), one)
    assert same(weights(model), both)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter(["other"])
    assert same(weights(model), both)
    with model.disable_adapter():  # takes them out by itself
        assert torch.equal(model(input_ids=IDS).logits, quantized()(input_ids=IDS).logits)
    assert same(weights(model), before)


def test_adapters_that_are_switched_and_mixed() -> None:
    model = adapted(quantized(), lora(init_lora_weights=False))
    model.add_adapter("other", lora(init_lora_weights=False))
    of = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        of[name] = model(input_ids=IDS).logits
    model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "mixed", combination_type="cat")
    model.set_adapter("mixed")
    assert not torch.allclose(of["default"], of["other"], atol=1e-3)
    assert torch.allclose(model(input_ids=IDS).logits, of["default"], atol=1e-4)
    assert torch.equal(model.unload()(input_ids=IDS).logits, quantized()(input_ids=IDS).logits)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def mixed() -> Any:
    model = peft.PeftMixedModel(quantized(), lora(init_lora_weights=False), "a")
    model.add_adapter("b", peft.LoHaConfig(r=4, init_weights=False, **TARGETS))
    model.set_adapter(["a", "b"])
    return model


def tied() -> Any:
    model = seeded(Twice())
    quantize_(model, settings())
    return shaken(adapted(model, peft.LoraConfig(r=4, target_modules=["first", "second"])))


@pytest.mark.parametrize("make", [mixed, tied])
def test_two_layers_that_merge_into_one_weight(make: Callable[[], Any]) -> None:
    """They are taken out in the order in which they were merged, so neither finds the codes that it left."""
    model = make()
    before = {n: w.dequantize() for n, w in weights(model).items()}
    with merging():
        model.merge_adapter()
    steps = {n: w.scale.abs().max() for n, w in weights(model).items()}
    with pytest.warns(UserWarning, match="into which another one was merged"):
        model.unmerge_adapter()
    for name, w in weights(model).items():
        # Two merges and two times out of them: on average at most four times half of the largest step.
        rms = (w.dequantize() - before[name]).norm() / math.sqrt(w.numel())
        assert rms <= 2 * torch.max(steps[name], w.scale.abs().max())


def test_codes_that_were_replaced_after_the_merge() -> None:
    """Unmerging does not bring back what they had been before."""
    model = shaken(adapted(quantized(), lora()))
    with merging():
        model.merge_adapter()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    other = nearest(layer.base_layer.weight, 2 * layer.base_layer.weight.dequantize())
    layer.base_layer.weight = nn.Parameter(other, requires_grad=False)
    expected = nearest(other, other.dequantize() - layer.get_delta_weight("default").detach())
    with pytest.warns(UserWarning, match="an adapter is taken out of weights"):
        model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight.dequantize(), expected.dequantize())


def test_an_adapter_of_nothing_changes_nothing() -> None:
    model = adapted(quantized(), lora())
    before = weights(model)
    model.merge_adapter()  # without a warning
    assert same(weights(model), before)
    model.unmerge_adapter()
    assert same(weights(model), before)


@pytest.mark.parametrize("safe", [True, False])
def test_a_broken_adapter_leaves_the_model_as_it_was(safe: bool) -> None:
    config = lora(init_lora_weights=False)
    model = adapted(quantized(), config)
    model.add_adapter("broken", config)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.lora_B["broken"].weight.data[0, 0] = float("nan")
    with merging():
        layer.merge(adapter_names=["default"])
    before = weights(model)
    error = (ValueError, "NaNs detected in the merged weights") if safe else (NonFiniteError, "the weights reach nan")
    with (
        pytest.raises(error[0], match=error[1]),
        pytest.warns(UserWarning, match="additionally merging|merged into quantized"),
    ):
        layer.merge(safe_merge=safe, adapter_names=["broken"])
    assert layer.merged_adapters == ["default"]
    assert same(weights(model), before)


def test_merged_weights_that_were_moved_and_cast() -> None:
    model = shaken(adapted(quantized(), lora()))
    before = weights(model)
    with merging():
        model.merge_adapter()
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.unmerge_adapter()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert same({n: w.to(torch.bfloat16) for n, w in before.items()}, weights(model))


def test_tied_weights_stay_tied() -> None:
    model = seeded(Twice())
    quantize_(model, settings())
    model = shaken(adapted(model, peft.LoraConfig(r=4, target_modules=["first"])))
    with merging():
        plain = model.merge_and_unload()
    assert isinstance(plain.first.weight, GroupTensor)
    assert plain.first.weight is plain.second.weight
