"""What goes wrong in practice, and the one error that says so. Afterwards the model is as it was, or the error tells"""

from typing import Any

import pytest
import torch
import torchao.quantization
from torch import Tensor, nn

from gptq_ao import gptq_config, quantize_
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
    with pytest.raises(ConfigError, match=r"already quantized: 7 of its parameters, such as .*Int4GroupTensor"):
        quantize_(model, config)


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
