"""What is found is what happens when a weight is restored by hand; the weight that was spoiled is named."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.diagnosis.diagnose import diagnose
from gptq_ao.errors import CalibrationError, ConfigError
from gptq_ao.evaluate import evaluate
from gptq_ao.model.weights import replace_parameter

from ..models import tiny_llama
from ..pipeline.test_experts import mixture

CHUNKS = torch.randint(0, 96, (5, 40), generator=torch.Generator().manual_seed(3))
SPOILED = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A model of which one weight has 2 bits and all others 8, and its original."""
    original = tiny_llama()
    model = copy.deepcopy(original)
    quantize_(model, gptq_config(8, 32, method="rtn", rules={SPOILED: {"bits": 2}}))
    return model, original


def test_the_weight_that_hurts_is_named(pair: tuple[Any, Any]) -> None:
    model, original = pair
    before = dict(model.named_parameters())
    found = diagnose(model, original, CHUNKS, add_bits=3.0, batch_size=2)
    assert found.kl == pytest.approx(evaluate(model, CHUNKS, original).kl, rel=1e-4)
    assert found.tokens == 5 * 39
    assert found.weights[0].what == f"{SPOILED}.weight"
    assert found.layers[0].what == "layer 1"
    assert found.kinds[0].what == "model.layers.*.mlp.down_proj"
    # By hand.
    restored = copy.deepcopy(model)
    replace_parameter(restored, f"{SPOILED}.weight", original.get_parameter(f"{SPOILED}.weight").detach())
    assert found.weights[0].kl == pytest.approx(evaluate(restored, CHUNKS, original).kl, rel=1e-3)
    # Of what engines fuse, all or nothing.
    sets = [r.names for r in found.weights]
    assert tuple(f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv") in sets
    assert sorted(n for names in sets for n in names) == sorted(n for n, p in before.items() if hasattr(p, "bits"))
    # The model is what it was.
    assert all(
        before[n] is not None and torch.equal(p.dequantize(), before[n].dequantize())
        for n, p in model.named_parameters()
        if hasattr(p, "bits")
    )
    advice = found.advice
    assert advice is not None
    assert SPOILED in advice.rules
    assert advice.rules[SPOILED]["bits"] > 2
    assert 0 < advice.added_bits <= 3.0
    assert advice.kl < 0.5 * found.kl
    assert advice.restored < 0.5 * found.kl
    assert f"{SPOILED} at" in found.summary
    assert found.summary in str(found)


def test_positions_and_worst_predictions_add_up(pair: tuple[Any, Any]) -> None:
    found = diagnose(*pair, CHUNKS, decode=lambda ids: ",".join(map(str, ids)))
    sizes = [p.stop - p.start for p in found.positions]
    assert [(p.start, p.stop) for p in found.positions] == [(1, 17), (17, 40)]
    mean = sum(p.kl * n for p, n in zip(found.positions, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(found.kl, rel=1e-9)
    assert len(found.worst) == 10
    assert [w.kl for w in found.worst] == sorted((w.kl for w in found.worst), reverse=True)
    text = [",".join(map(str, row)) for row in CHUNKS.tolist()]
    assert all(any(f"{w.before},{w.token}" in row for row in text) for w in found.worst)


def test_following_the_advice_helps(pair: tuple[Any, Any]) -> None:
    model, original = pair
    advice = diagnose(model, original, CHUNKS, add_bits=0.5).advice
    assert advice is not None
    better = copy.deepcopy(original)
    rules: dict[str, Any] = {**advice.rules, SPOILED: advice.rules.get(SPOILED, {"bits": 2})}
    report = quantize_(better, gptq_config(8, 32, method="rtn", rules=rules))
    assert report is not None
    before, after = (evaluate(each, CHUNKS, original).kl for each in (model, better))
    assert before is not None
    assert after is not None
    assert after < 0.6 * before


def test_experts_are_one_unit() -> None:
    original = mixture()
    model = copy.deepcopy(original)
    quantize_(model, gptq_config(3, -1, calibration=[{"input_ids": CHUNKS}], effort="fast"))
    found = diagnose(model, original, CHUNKS[:2])
    experts = [r for r in found.weights if "experts" in r.what]
    assert [len(r.names) for r in experts] == [2]


def test_nothing_can_get_more_bits() -> None:
    original = tiny_llama(layers=1)
    model = copy.deepcopy(original)
    quantize_(model, gptq_config(8, 32, method="rtn"))
    found = diagnose(model, original, CHUNKS[:1])
    assert found.advice is None
    assert "advice: no weight gains enough within the bits" in str(found)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("both original", r"the model has no quantized weight"),
        ("both quantized", r"has a Int8GroupTensor .* as .*unquantized model"),
        ("another", r"the reference has a Parameter \\(128, 128\\) as"),
        ("other names", r"the reference has no 'model.layers.0"),
    ],
)
def test_a_reference_that_is_none(which: str, message: str, pair: tuple[Any, Any]) -> None:
    model, original = pair
    given: dict[str, tuple[nn.Module, nn.Module]] = {
        "both original": (original, original),
        "both quantized": (model, model),
        "another": (model, tiny_llama(width=128)),
        "other names": (model, mixture().model),
    }
    with pytest.raises(ConfigError, match=message.replace("\\\\", "\\")):
        diagnose(*given[which], CHUNKS)


def test_nothing_to_predict(pair: tuple[Any, Any]) -> None:
    with pytest.raises(CalibrationError, match=r"nothing to predict"):
        diagnose(*pair, CHUNKS[:, :1])
    with pytest.raises(ConfigError, match=r"add_bits is 0: give a positive number"):
        diagnose(*pair, CHUNKS, add_bits=0)
