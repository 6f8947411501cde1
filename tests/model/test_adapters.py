"""Which parameters are an adapter's."""

from collections.abc import Callable

import peft
import pytest
from torch import nn

from gptq_ao.model.adapters import adapter_names

CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=["0"]),
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=["0"], use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["0"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=2, total_step=10, target_modules=["0"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["0"]),
    "a copy": lambda: peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]),
    "tokens": lambda: peft.LoraConfig(r=2, target_modules=["0"], trainable_token_indices={"2": [1]}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_peft_adds(config: Callable[[], peft.PeftConfig]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(4, 8))
    before = {id(p) for p in model.parameters()}
    assert adapter_names(model) == set()
    adapted = peft.get_peft_model(model, config())
    assert adapter_names(adapted) == {name for name, p in adapted.named_parameters() if id(p) not in before}
    assert adapter_names(adapted) >= {name for name, p in adapted.named_parameters() if p.requires_grad} != set()


def test_another_adapter_that_does_not_train() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), CONFIGS["LoRA"]())
    model.add_adapter("other", CONFIGS["LoRA"]())
    assert {name.split(".")[-2] for name in adapter_names(model)} == {"default", "other"}


def test_one_adapter_around_another() -> None:
    linear = nn.Linear(8, 8)
    model = peft.PeftMixedModel(nn.Sequential(linear), CONFIGS["LoRA"](), "a")
    model.add_adapter("b", CONFIGS["LoHa"]())
    before = {id(linear.weight), id(linear.bias)}
    assert adapter_names(model) == {name for name, p in model.named_parameters() if id(p) not in before}
