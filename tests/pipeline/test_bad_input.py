"""What goes wrong in practice, and the one error that says so. Afterwards the model is as it was, or the error tells"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchao.quantization
from torch import Tensor, nn

from gptq_ao import gptq_config, plan, quantize_
from gptq_ao.errors import CalibrationError, CaptureError, ConfigError, NoLinearError, NonFiniteError
from gptq_ao.tensor import GroupTensor

from ..models import seeded, tiny_llama, token_batches


def mlp() -> nn.Sequential:
    return seeded(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)))


def rows(count: int = 20) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(0))


def unquantized(model: nn.Module) -> bool:
    return not any(isinstance(p, GroupTensor) for p in model.parameters())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, r"no calibration data: GPTQ needs typical inputs"),
        ([], r"no calibration data: the collection of batches is empty"),
        (iter(()), r"no calibration data: .*already read"),
        (list, r"no calibration data"),
        ([torch.ones(2, 64), torch.ones(0, 64)], r"calibration batch 1 is empty: a tensor in it has shape \(0, 64\)"),
        ([torch.ones(2, 64), {"x": torch.ones(2, 64)}], r"calibration batch 1 has the inputs \['x'\]"),
        ([torch.ones(2, 64), (torch.ones(2, 64),) * 2], r"calibration batch 1 has the structure"),
        ([torch.ones(2, 64), torch.ones(2, 63)], r"calibration batch 1: input .* has 63 elements along axis 1"),
        ([torch.ones(2, 64), torch.ones(2, 64).long()], r"calibration batch 1: input .* is torch.int64"),
        (torch.ones(2, 64), r"calibration is a Tensor, not a collection"),
    ],
    ids=[
        "none",
        "empty-list",
        "empty-iterator",
        "empty-callable",
        "empty-batch",
        "names",
        "structure",
        "size",
        "dtype",
        "tensor",
    ],
)
def test_calibration_data(calibration: Any, message: str) -> None:
    model = mlp()
    with pytest.raises(CalibrationError, match=message):
        quantize_(model, gptq_config(4, 32, calibration=calibration))
    assert unquantized(model)


def test_a_batch_the_model_cannot_take() -> None:
    said = r"(?s)First check that model\(\*args, \*\*kwargs\) runs on a calibration batch.*Nor can it run.*mat1"
    with pytest.raises(CaptureError, match=said):
        quantize_(mlp(), gptq_config(4, 32, calibration=[torch.ones(2, 5)]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    model = mlp()
    model.get_parameter("2.weight").data[3, 5] = bad
    with pytest.raises(NonFiniteError, match=r"1 elements of '2.weight' \(32, 96\) are NaN or infinite: repair"):
        quantize_(model, gptq_config(4, 32, calibration=[rows()]))
    assert unquantized(model)


def test_an_infinite_activation_is_named_by_layer_and_batch() -> None:
    class Explodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) / x.abs().amin(-1, keepdim=True))

    batches = [rows(), rows(), rows()]
    batches[1] = batches[1].clone()
    batches[1][4, 4] = 0.0
    model = seeded(Explodes())
    with pytest.raises(NonFiniteError, match=r"the input of second.weight is NaN or infinite in calibration batch 1"):
        quantize_(model, gptq_config(4, 32, calibration=batches))
    assert unquantized(model)


def test_a_group_size_that_does_not_divide_names_every_layer_before_any_work() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match=r"(?s)48 does not divide 64, the input features of '0.weight'.*rules=\{name"):
        quantize_(model, gptq_config(4, 48, calibration=[rows()]))
    with pytest.raises(ConfigError, match=r"64 does not divide 96, the input features of '2.weight'"):
        quantize_(model, gptq_config(4, 64, method="rtn"))
    with pytest.raises(ConfigError, match=r"48 does not divide 64, the input features of 'weight'"):
        torchao.quantization.quantize_(model, gptq_config(4, 48))
    assert unquantized(model)


def test_bits_5() -> None:
    with pytest.raises(ConfigError, match="bits is 5: give one of 2, 3, 4, 8"):
        gptq_config(bits=5)


def test_a_rule_that_matches_nothing() -> None:
    model = mlp()
    with pytest.raises(
        ConfigError, match=r"rule 'down_proj' matches no weight.*Names look like '0.weight', '2.weight'"
    ):
        quantize_(model, gptq_config(4, 32, rules={"down_proj": None}, calibration=[rows()]))
    assert unquantized(model)


def test_a_model_with_no_linear() -> None:
    with pytest.raises(NoLinearError, match="multiplies no activation by a parameter"):
        quantize_(seeded(nn.Sequential(nn.LayerNorm(8))), gptq_config(4, 32, calibration=[torch.ones(2, 8)]))
    embedding = seeded(nn.Sequential(nn.Embedding(8, 8)))
    with pytest.raises(NoLinearError, match=r"no weight to quantize:\n  0.weight: embedding table"):
        quantize_(embedding, gptq_config(4, 32, calibration=[torch.zeros(2, 3, dtype=torch.long)]))


def test_a_model_without_parameters_or_without_values() -> None:
    with pytest.raises(NoLinearError, match=r"the model \(ReLU\) has no parameters"):
        quantize_(nn.ReLU(), gptq_config(4, 32, calibration=[rows()]))
    with pytest.raises(ConfigError, match=r"'0.weight' is on the meta device, it has no values: load the weights"):
        quantize_(mlp().to("meta"), gptq_config(4, 32, method="rtn"))


def test_quantizing_twice() -> None:
    model = tiny_llama(layers=1)
    config = gptq_config(4, 32, calibration=token_batches())
    quantize_(model, config)
    with pytest.raises(ConfigError, match=r"already quantized: 7 of its weights, such as .*Int4GroupTensor"):
        quantize_(model, config)


class Params4bit(nn.Parameter):
    """What bitsandbytes calls its parameters; quanto's and torchao's are recognized by their classes' names, too."""


class QTensor(Params4bit):
    pass


class Packed(nn.Module):
    """As GPTQ, AWQ and HQQ store weights: no parameter is called `weight`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_buffer(name, torch.ones(8, 64, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x


def with_weight(weight: Tensor) -> nn.Sequential:
    class Dequantizes(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight.to(input.dtype))

    model = nn.Sequential(Dequantizes(64, 64, bias=False), nn.Linear(64, 64))
    model[0].weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    return model


QUANTIZED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bitsandbytes": (lambda: with_weight(Params4bit(torch.ones(64, 64))), r"'0.weight' \(Params4bit\)"),
    "quanto": (lambda: with_weight(QTensor(torch.ones(64, 64))), r"'0.weight' \(QTensor\)"),
    "int8": (lambda: with_weight(torch.ones(64, 64, dtype=torch.int8)), r"'0.weight' \(torch.int8\)"),
    "uint8": (lambda: with_weight(torch.ones(64, 64, dtype=torch.uint8)), r"'0.weight' \(torch.uint8\)"),
    "fp8": (lambda: with_weight(torch.ones(64, 64).to(torch.float8_e4m3fn)), r"'0.weight' \(torch.float8_e4m3fn\)"),
    "gptq": (lambda: nn.Sequential(Packed("qweight"), nn.Linear(64, 64)), r"'0.qweight' \(torch.int32\)"),
    "compressed": (
        lambda: nn.Sequential(Packed("weight_packed"), nn.Linear(64, 64)),
        r"'0.weight_packed' \(torch.int32",
    ),
}


@pytest.mark.parametrize("settings", [{"method": "rtn"}, {"calibration": [rows()]}], ids=["rtn", "gptq"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_weights_that_another_library_has_quantized(kind: str, settings: dict[str, Any]) -> None:
    make, said = QUANTIZED[kind]
    model = make()
    before = [(id(p), p.detach().clone()) for p in model.parameters()]
    config = gptq_config(4, 32, **settings)
    for refuses in (quantize_, plan):
        with pytest.raises(
            ConfigError, match=f"already quantized: 1 of its weights, such as {said}.* original weights"
        ):
            refuses(model, config)
    assert all(id(p) == i and torch.equal(p, t) for p, (i, t) in zip(model.parameters(), before, strict=True))
    # Left out by whoever knows of them, they stay; the report lists them.
    report = quantize_(model, config, filter_fn=lambda module, name: name == "1")
    assert report is not None
    assert [w.name for w in report.weights] == ["1.weight"]
    assert id(next(model.parameters())) == before[0][0] or kind in ("gptq", "compressed")
    if kind in ("int8", "fp8"):
        report = quantize_(make(), gptq_config(4, 32, rules={"0": None}, **settings))
        assert report is not None
        assert report.excluded == {"0.weight": "rule '0'"}


def test_single_layers_and_modules_that_hold_no_tensors() -> None:
    with pytest.raises(ConfigError, match=r"already quantized: 1 of its weights, such as 'weight' \(torch.int8\)"):
        torchao.quantization.quantize_(with_weight(torch.ones(64, 64, dtype=torch.int8)), gptq_config(4, 32))
    with pytest.raises(ConfigError, match=r"'0.weight' has no shape yet: run the model once"):
        quantize_(nn.Sequential(nn.LazyLinear(4)), gptq_config(4, 32, method="rtn"))


def test_half_of_a_model_first_and_the_other_half_later() -> None:
    model = tiny_llama(layers=2)
    for half in ("layers.0", "layers.1"):
        config = gptq_config(4, 32, effort="fast", calibration=token_batches(2))
        report = quantize_(model, config, filter_fn=lambda module, name, half=half: half in name)  # type: ignore[misc]
        assert report is not None
        assert len(report.weights) == 7
    assert sum(isinstance(p, GroupTensor) for p in model.parameters()) == 14


def test_a_whole_model_config_on_single_linears() -> None:
    with pytest.raises(ConfigError, match=r"filter_fn=gptq_ao.whole_model"):
        torchao.quantization.quantize_(mlp(), gptq_config(4, 32, calibration=[rows()]))


def test_strict_fails_before_work_when_a_matrix_is_not_supported() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.merged = nn.Linear(64, 64), nn.Parameter(torch.ones(64, 128))

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.merged.chunk(2, dim=1)
            return self.linear(x) @ a.t() + x @ b.t()

    model = seeded(Columns())
    with pytest.raises(ConfigError, match=r"(?s)strict=True.*merged: aten::matmul reads it across.*by a rule"):
        quantize_(model, gptq_config(4, 32, calibration=[rows()], strict=True))
    assert unquantized(model)
    report = quantize_(model, gptq_config(4, 32, calibration=[rows()], strict=True, rules={"merged": None}))
    assert report is not None
    assert "merged" in report.excluded


def test_weights_too_large_for_an_fp16_scale() -> None:
    model = mlp()
    model.get_parameter("0.weight").data[0, 0] = 1e7
    with pytest.raises(NonFiniteError, match=r"the weights reach 1e\+07: a scale for them is not a finite fp16 number"):
        quantize_(model, gptq_config(4, 32, calibration=[rows()]))


def test_a_vector_cannot_be_quantized() -> None:
    config = torchao.quantization.FqnToConfig({"0.bias": gptq_config(4, 32)})
    with pytest.raises(ConfigError, match=r"parameter 'bias' has shape \(96,\): only matrices"):
        torchao.quantization.quantize_(mlp(), config, filter_fn=None)
