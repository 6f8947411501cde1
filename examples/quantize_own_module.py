"""A module of one's own, quantized, saved, and loaded into a new one: python examples/quantize_own_module.py"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from gptq_ao import gptq_config, load_quantized, plan, quantize_, save_quantized


class Forecast(nn.Module):
    """Nothing here is a class that a library would know: one parameter for three projections, multiplied by `@`."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * features, features) / features**0.5)
        self.mix = nn.Sequential(nn.Linear(features, 128), nn.GELU(), nn.Linear(128, features))
        self.bias = nn.Parameter(torch.zeros(features, features))
        self.head = nn.Linear(features, 3)

    def forward(self, series: Tensor, known: Tensor | None = None) -> Tensor:
        q, k, v = (series @ weight.t() for weight in self.qkv.chunk(3))
        y = nn.functional.scaled_dot_product_attention(q, k, v) + self.bias[0]
        if known is not None:
            y = y + known
        return self.head(self.mix(y)[:, -1])


def main() -> None:
    torch.manual_seed(0)
    model = Forecast().eval()
    # A batch is what the model is called with: a tensor, a tuple of arguments, or a dict of them by name.
    batches = [(torch.randn(16, 20, 64), torch.randn(16, 20, 64)) for _ in range(8)]
    config = gptq_config(bits=4, group_size=32, rules={"head": {"bits": 8}}, calibration=batches)
    print(plan(model, config))  # nothing is computed yet: what will be quantized, in which order, and what it takes

    report = quantize_(model, config)
    print(report)
    assert {weight.name: weight.bits for weight in report.weights}["head.weight"] == 8
    assert list(report.excluded) == ["bias"]  # with the reason: it is added, not multiplied

    out = Path(tempfile.mkdtemp()) / "forecast"
    save_quantized(model, out)
    with torch.device("meta"):  # the values come from the file
        empty = Forecast()
    again = load_quantized(empty, out).eval()
    with torch.no_grad():
        assert torch.equal(again(*batches[0]), model(*batches[0]))


if __name__ == "__main__":
    main()
