"""What cannot be calibrated on is found before the first weight changes, and named by batch and input."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptq_ao import gptq_config, plan, quantize_
from gptq_ao.data import text_batches
from gptq_ao.errors import CalibrationError, CaptureError, ConfigError
from gptq_ao.tensor import GroupTensor

from ..models import seeded, tiny_llama, token_batches
from .test_quantize import language_model

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return seeded(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))).to(dtype)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def refused(model: nn.Module, batches: list[Any], message: str, error: type[Exception] = CalibrationError) -> None:
    """By `quantize_`, which changes nothing, and by `plan`."""
    before = [(n, id(p)) for n, p in model.named_parameters()]
    config = gptq_config(4, 32, effort="fast", calibration=batches)
    with pytest.raises(error, match=message):
        plan(model, config)
    with pytest.raises(error, match=message) as e:
        quantize_(model, config)
    assert not hasattr(e.value, "__notes__")
    assert [(n, id(p)) for n, p in model.named_parameters()] == before


@pytest.mark.parametrize("given", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_another_floating_dtype(given: torch.dtype, dtype: torch.dtype) -> None:
    if given == dtype:
        assert quantize_(mlp(dtype), gptq_config(4, 32, calibration=[rows(dtype)])) is not None
        return
    said = rf"input 'arg0' of the calibration batches is {given}, .* '0.weight', which is {dtype}: .*arg0.to\({dtype}\)"
    refused(mlp(dtype), [rows(given)], said)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.filters = nn.GroupNorm(1, 4), nn.Conv1d(4, 8, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.filters(self.norm(pixels))
        return out


class Casts(nn.Module):
    """Converts its input itself, or lets autocast do it."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.linear, self.autocast = nn.Linear(64, 64), autocast

    def forward(self, x: Tensor) -> Tensor:
        if not self.autocast:
            return F.relu(self.linear(x.to(self.linear.weight.dtype)))
        with torch.autocast("cpu", torch.bfloat16):
            return F.relu(self.linear(x))


def test_dtypes_are_followed_through_the_model() -> None:
    images = torch.randn(2, 4, 16, dtype=torch.float64)
    with pytest.raises(
        CaptureError, match=r"(?s)Nor can it run.*An input is torch.float64, and the model is torch.float32"
    ):
        quantize_(seeded(Convolution()), gptq_config(4, 32, calibration=[{"pixels": images}]))
    for model in (Casts(False).bfloat16(), Casts(True)):
        report = quantize_(seeded(model), gptq_config(4, 32, calibration=[rows()]))
        assert report is not None
        assert len(report.weights) == 1
    halves = mlp()
    halves.get_submodule("2").bfloat16()
    refused(halves, [rows()], r"multiplies torch.float32 by '2.weight', which is torch.bfloat16", ConfigError)


IDS = token_batches(3)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            torch.full((2, 8), 96),
            r"batch 3: input 'input_ids' has the id 96, and 'table.weight' has 96 rows",
        ),
        (torch.full((2, 8), -1), r"batch 3: input 'input_ids' has the id -1, .*a padding id such as -1 or -100"),
        (torch.full((2, 8), -100), r"batch 3: input 'input_ids' has the id -100, "),
        (torch.tensor([[0, 1, 2, 2**40]]), r"batch 3: input 'input_ids' has the id 1099511627776, .*tokenizer of this"),
    ],
)
@pytest.mark.parametrize("data", ["graph", "replay"])
def test_tokens_outside_of_the_vocabulary(data: str, ids: Tensor, message: str) -> None:
    batches = [*IDS, {"input_ids": ids}]
    if data == "graph":
        refused(seeded(Tokens()), batches, message)
        return
    model = seeded(Tokens(branches=True))
    message = message.replace("input 'input_ids' has the id", "the model looks up row").partition(",")[0]
    with pytest.raises(CalibrationError, match=f"{message} of 'table.weight', which has 96 rows"):
        quantize_(model, gptq_config(4, 32, calibration=batches))
    assert not any(isinstance(p, GroupTensor) for p in model.parameters())


class Tokens(nn.Module):
    """One that branches on values has no graph, and is replayed."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.table, self.linear, self.branches = nn.Embedding(96, 64), nn.Linear(64, 64), branches

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        return self.linear(x) if not self.branches or x.mean().item() > -1e9 else x


def test_ids_of_the_last_row_and_of_a_tokenizer_that_is_too_large() -> None:
    assert (
        quantize_(seeded(Tokens()), gptq_config(4, 32, calibration=[{"input_ids": torch.tensor([[0, 95]])}]))
        is not None
    )

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    refused(
        tiny_llama(layers=1), list(text_batches(tokenizer, ["xyz" * 9], seq_len=8)), "has the id 122, .*use the tok"
    )


class Positions(nn.Module):
    """Learned positions, a table in a buffer, and kinds of tokens that are clamped before they are looked up."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.tokens, self.kinds, self.linear = nn.Embedding(96, 64), nn.Embedding(2, 64), nn.Linear(64, 64)
        self.register_buffer("sines", torch.randn(size, 64))

    def forward(self, ids: Tensor, kind: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device) + 2
        out: Tensor = self.linear(self.tokens(ids) + self.get_buffer("sines")[places] + self.kinds(kind.clamp(0, 1)))
        return out


def test_positions_and_what_is_computed_from_ids() -> None:
    gpt2 = language_model("GPT2", n_embd=64, n_layer=1, n_head=4)  # of 64 positions
    said = (
        r"batch 1: the model looks up row 64 of 'transformer.wpe.weight', which has 64 rows: give it shorter sequences"
    )
    refused(gpt2, [*token_batches(1, length=64), *token_batches(1, length=65)], said)

    def inputs(length: int, kind: int) -> dict[str, Tensor]:
        return {"ids": torch.zeros(2, length, dtype=torch.long), "kind": torch.full((2, length), kind)}

    report = quantize_(seeded(Positions()), gptq_config(4, 32, calibration=[inputs(5, 0), inputs(14, 300)]))
    assert report is not None
    refused(seeded(Positions()), [inputs(5, 0), inputs(15, 0)], r"batch 1: the model looks up row 16 of 'sines'")


def test_batches_without_values_can_be_planned() -> None:
    empty = [{"input_ids": torch.empty(2, 8, dtype=torch.long, device="meta")}]
    assert len(plan(tiny_llama(layers=1), gptq_config(4, 32, calibration=empty)).weights) == 7


def batch(rows: int, length: int, **more: Any) -> dict[str, Any]:
    ids = torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, **more}


@pytest.mark.parametrize(
    "sizes", [[(1, 8), (3, 8)], [(3, 8), (1, 8)], [(4, 8), (4, 8), (1, 8)], [(1, 8), (2, 17), (1, 1)]]
)
def test_batches_of_other_sizes(sizes: list[tuple[int, int]]) -> None:
    report = quantize_(tiny_llama(layers=1), gptq_config(4, 32, effort="fast", calibration=[batch(*s) for s in sizes]))
    assert report is not None
    assert report.weights[0].rows == sum(rows * length for rows, length in sizes)


MASK = torch.ones(2, 8, dtype=torch.long)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([batch(2, 8), batch(2, 8, attention_mask=MASK)], r"batch 1 has the inputs \['attention_mask', 'input_ids'\]"),
        ([batch(2, 8, attention_mask=MASK), batch(2, 8)], r"batch 1 has the inputs \['input_ids'\], the model was"),
        ([batch(2, 8), batch(2, 8, attention_mask=None)], r"batch 1 has the inputs"),
        ([batch(2, 8), (batch(2, 8)["input_ids"],)], r"batch 1 has the inputs \[\]"),
        ([batch(2, 8), {"input_ids": MASK[None]}], r"batch 1: input 'input_ids' is torch.int64 \(1, 2, 8\)"),
        ([batch(2, 8), {"input_ids": MASK.int()}], r"batch 1: input 'input_ids' is torch.int32 \(2, 8\)"),
        ([batch(2, 8), {"input_ids": MASK.float()}], r"batch 1: input 'input_ids' is torch.float32 \(2, 8\)"),
        ([batch(2, 1), batch(2, 9)], r"batch 1: input 'input_ids' has 9 elements along axis 1; the model fixed"),
    ],
    ids=["more", "fewer", "None", "tuple", "rank", "int32", "floats", "length 1 first"],
)
def test_batches_that_differ_in_more_than_size(batches: list[Any], message: str) -> None:
    model = tiny_llama(layers=1)
    with pytest.raises(CalibrationError, match=message):
        quantize_(model, gptq_config(4, 32, calibration=batches))
    assert not any(isinstance(p, GroupTensor) for p in model.parameters())


def test_a_batch_without_a_batch_dimension_is_suspected() -> None:
    with pytest.raises(
        CaptureError, match=r"(?s)Nor can it run .*An input has one dimension, \(32,\): .*unsqueeze\(0\)"
    ):
        quantize_(tiny_llama(layers=1), gptq_config(4, 32, calibration=[torch.arange(32)]))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"effort": "fast", "sym": False}, {"act_order": "group"}, {"method": "rtn"}])
def test_the_default_dtype_decides_nothing(settings: dict[str, Any], default: torch.dtype) -> None:
    """`torch.set_default_dtype`, which also numbers in torch's formulas follow."""
    if "method" not in settings:
        settings = {**settings, "calibration": [rows()]}
    models, sizes = [mlp(), mlp()], []
    for model, dtype in zip(models, (torch.float32, default), strict=True):
        torch.set_default_dtype(dtype)
        try:
            sizes.append(plan(model, gptq_config(4, 32, **settings)).peak_bytes)
            quantize_(model, gptq_config(4, 32, **settings))
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)
    assert sizes[0] == sizes[1]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a.dequantize(), b.dequantize())
