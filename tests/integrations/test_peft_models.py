"""Models with adapters as a whole: loaded, prepared, saved, and quantized with the adapters in place."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from gptq_ao import gptq_config, plan, quantize_, save_quantized
from gptq_ao.errors import ConfigError
from gptq_ao.integrations.transformers import load_with_gptq_ao
from gptq_ao.tensor import GroupTensor

from ..models import seeded, tiny_llama, token_batches

pytestmark = pytest.mark.usefixtures("one_thread", "loaders")

IDS = token_batches(1)[0]["input_ids"]
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
FORMATS = pytest.mark.parametrize("format", ["native", "gptq", "compressed-tensors"])


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "init_lora_weights": False, **TARGETS, **settings})


def adapted(model: nn.Module, config: peft.PeftConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)


def quantized(**change: Any) -> Any:
    model = tiny_llama(layers=1)
    quantize_(model, gptq_config(**{"bits": 4, "group_size": 32, "method": "rtn", **change}))
    return model


def codes(model: nn.Module) -> list[torch.Tensor]:
    return [p.qdata for p in model.parameters() if isinstance(p, GroupTensor)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model, root = quantized(), tmp_path_factory.mktemp("models")
    for format in ("native", "gptq", "compressed-tensors"):
        save_quantized(model, root / format, format=format)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def _ours() -> None:
    load_with_gptq_ao("gptq", "compressed-tensors")


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("_ours")
def test_what_from_pretrained_gives(
    format: str, dtype: torch.dtype, directories: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(directories[format], dtype=dtype)
    before = codes(model)
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.is_gradient_checkpointing
    assert not any(p.requires_grad for p in model.parameters())
    model = adapted(model, lora(use_dora=True))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.warns(UserWarning, match=r"is merged into quantized weights \(2 of them\)"):
        model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    assert all(map(torch.equal, codes(model), before))
    with pytest.warns(UserWarning, match="is merged into quantized weights"):
        plain = model.merge_and_unload()
    assert torch.equal(logits(plain), merged)
    # It is a checkpoint like the one that was loaded.
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert again.config.quantization_config.quant_method == plain.config.quantization_config.quant_method
    assert torch.equal(logits(again), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_was_quantized_in_memory_is_prepared(dtype: torch.dtype) -> None:
    assert peft.utils.other.prepare_model_for_kbit_training is peft.prepare_model_for_kbit_training
    model = tiny_llama(layers=1, dtype=dtype)
    quantize_(model, gptq_config(4, 32, method="rtn"))
    attributes = set(vars(model))
    model = peft.prepare_model_for_kbit_training(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.is_gradient_checkpointing
    assert "quantization_method" not in set(vars(model)) - attributes


def test_a_dense_model_is_prepared_as_ever() -> None:
    model = peft.prepare_model_for_kbit_training(tiny_llama(layers=1, dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


LOADERS: dict[str, Callable[[Any, Path], Any]] = {
    "PeftModel": lambda model, path: peft.PeftModel.from_pretrained(model, path),
    "PeftModel, by way of meta": lambda model, path: peft.PeftModel.from_pretrained(
        model, path, low_cpu_mem_usage=True
    ),
    "load_adapter": lambda model, path: (model.load_adapter(path), model)[1],
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_adapters_are_saved_and_loaded(load: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    model = adapted(quantized(), lora())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(quantized(), tmp_path)), logits(model))


def test_a_model_and_its_adapter_in_one_call(directories: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(directories["native"]), lora())
    model.save_pretrained(tmp_path)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(loaded.unload()), logits(quantized()))


def test_what_takes_a_part_out_of_the_weights_does_so_again_when_it_is_loaded(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="takes a part out of quantized weights"):
        model = adapted(quantized(), lora(init_lora_weights="pissa"))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="takes a part out of quantized weights"):
        loaded = peft.PeftModel.from_pretrained(quantized(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_by_transformers_own_methods(tmp_path: Path) -> None:
    model = quantized()
    model.add_adapter(lora(), "mine")
    changed = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(quantized()))
    model.enable_adapters()
    assert torch.equal(logits(model), changed)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


# Quantized with the adapters in place.

METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lora,
    "LoRA as wide as a group": lambda: lora(r=32),
    "DoRA": lambda: lora(use_dora=True),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "LoHa": lambda: peft.LoHaConfig(r=32, init_weights=False, **TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=4, init_weights=False, **TARGETS),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, init_weights=False, **TARGETS),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=32, total_step=10, **TARGETS),
    "MiSS": lambda: peft.MissConfig(r=32, **TARGETS),
    "copies": lambda: lora(modules_to_save=["lm_head", "o_proj"]),
    "tokens": lambda: lora(trainable_token_indices=[1, 2]),
    "an adapter of the head": lambda: lora(target_modules=["q_proj", "lm_head"], r=32),
}


# What the graph has, or does not have, besides a product for each weight.
CAPTURED = ("LoRA", "DoRA", "LoHa", "OFT", "copies", "tokens", "an adapter of the head")


@pytest.mark.parametrize(
    ("config", "method"),
    [
        *(pytest.param(config, "rtn", id=name) for name, config in METHODS.items()),
        *(pytest.param(METHODS[name], "gptq", id=f"{name}, calibrated") for name in CAPTURED),
    ],
)
def test_quantize_leaves_adapters_alone(config: Callable[[], peft.PeftConfig], method: str) -> None:
    base = tiny_llama(layers=1)
    of_base = {id(p) for p in base.parameters()}
    model = adapted(base, config())
    adapters = {n: p for n, p in model.named_parameters() if id(p) not in of_base}
    values = {n: p.detach().clone() for n, p in adapters.items()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = logits(model)
    data = {"calibration": token_batches(2), "effort": "fast"} if method == "gptq" else {"method": "rtn"}
    report = quantize_(model, gptq_config(4, 32, strict=True, **data))
    assert report is not None

    named = dict(model.named_parameters())
    assert all(named[n] is p and torch.equal(p, values[n]) for n, p in adapters.items())
    assert {n for n, p in named.items() if p.requires_grad} == trained
    assert {n: r for n, r in report.excluded.items() if n in adapters} == {
        n: "part of an adapter" for n, p in adapters.items() if p.dim() > 1
    }
    # All 7 linear layers, but for the one of which a copy is trained if nothing reaches it.
    assert len(codes(model)) == (6 if method == "gptq" and isinstance(trained_copy(model), nn.Module) else 7)
    assert (logits(model) - before).norm() < 0.2 * before.norm()
    model.train()(input_ids=IDS, labels=IDS).loss.backward()

    kept = codes(model)
    for n, p in adapters.items():
        if "ranknum" not in n:  # a count
            p.data += 0.1  # some do nothing at first
    expected = logits(model)
    with pytest.warns(UserWarning, match="is merged into quantized weights"):
        model.merge_adapter()
    assert not all(map(torch.equal, codes(model), kept))
    model.unmerge_adapter()
    assert all(map(torch.equal, codes(model), kept))
    assert torch.allclose(logits(model), expected, atol=1e-6)


def trained_copy(model: Any) -> Any:
    return getattr(model.base_model.model.model.layers[0].self_attn.o_proj, "modules_to_save", None)


class Branches(nn.Module):
    """A program that torch.export cannot capture: it depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y if y.sum().item() > 0 else -y)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_without_a_graph_adapters_are_left_alone_too(dora: bool) -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    config = peft.LoraConfig(r=32, target_modules=["first", "second"], use_dora=dora, init_lora_weights=False)
    model = adapted(seeded(Branches()), config)
    before = model(x)
    report = quantize_(model, gptq_config(4, 32, calibration=[x], effort="fast", strict=True))
    assert report is not None
    assert report.capture == "replay"
    assert len(codes(model)) == 2
    assert set(report.excluded.values()) == {"part of an adapter"}
    assert (model(x) - before).norm() < 0.2 * before.norm()


def test_the_rounding_is_compensated_with_the_adapter_in_the_forward() -> None:
    """Calibration rows are those of the adapted model: an adapter that is large shows in later weights."""
    config = gptq_config(4, 32, calibration=token_batches(2), effort="fast")
    model, plain = adapted(tiny_llama(layers=1), lora(target_modules=["v_proj"])), tiny_llama(layers=1)
    for p in model.parameters():
        if p.requires_grad:
            p.data *= 20
    quantize_(model, config)
    quantize_(plain, config)
    of = [m.model.layers[0].self_attn for m in (model.base_model.model, plain)]
    assert torch.equal(of[0].q_proj.weight.qdata, of[1].q_proj.weight.qdata)
    assert not torch.equal(of[0].o_proj.weight.qdata, of[1].o_proj.weight.qdata)


def test_rules_for_adapters_and_rules_for_layers() -> None:
    model = adapted(tiny_llama(layers=1), lora(r=32))
    for_layer, for_adapter = {"re:.*q_proj.*": {"bits": 8}}, {"re:.*down_proj.lora_A.*": {"bits": 8}}
    report = quantize_(model, gptq_config(4, 32, method="rtn", rules=for_layer | for_adapter))
    assert report is not None
    found = {n: p.bits for n, p in model.named_parameters() if isinstance(p, GroupTensor)}
    prefix = "base_model.model.model.layers.0"
    assert found[f"{prefix}.self_attn.q_proj.base_layer.weight"] == 8
    assert found[f"{prefix}.mlp.down_proj.base_layer.weight"] == 4
    assert {n: bits for n, bits in found.items() if "lora" in n} == {f"{prefix}.mlp.down_proj.lora_A.default.weight": 8}
    assert report.excluded[f"{prefix}.self_attn.q_proj.lora_A.default.weight"] == "part of an adapter"


def test_a_rule_for_a_matrix_of_an_adapter_that_multiplies_no_activation() -> None:
    model = adapted(tiny_llama(layers=1), peft.LoHaConfig(r=32, init_weights=False, **TARGETS))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"hada_w1_a.*which cannot be"):
        quantize_(model, gptq_config(4, 32, method="rtn", rules={"re:.*hada_w1_a.*": {"bits": 8}}))
    assert all(map(torch.equal, model.state_dict().values(), before.values()))


def test_a_plan_says_what_is_left_alone() -> None:
    text = str(plan(adapted(tiny_llama(layers=1), lora()), gptq_config(4, 32, calibration=token_batches(1))))
    assert "q_proj.lora_A.default.weight" in text
    assert "part of an adapter" in text


def test_layers_that_were_merged_before_they_were_quantized() -> None:
    model = adapted(tiny_llama(layers=1), lora())
    model.merge_adapter()
    merged = logits(model)
    quantize_(model, gptq_config(8, 32, method="rtn"))
    assert (logits(model) - merged).norm() < 0.02 * merged.norm()
    with pytest.warns(UserWarning, match=r"an adapter is taken out of weights \(2 of them\) that were quantized"):
        model.unmerge_adapter()
    assert (logits(model) - merged).norm() < 0.02 * merged.norm()  # with the adapter beside the weights again
