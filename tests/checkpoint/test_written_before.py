"""Files are written as they always were: for fixed weights the same tensors, by the same names, and the same config.

The digests in `written_before.json` are of the version before the package was divided into rooms.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from gptq_ao import load_quantized, save_quantized
from gptq_ao.tensor import tensor_class
from gptq_ao.version import VERSION

FIXED = Path(__file__).with_name("written_before.json")
FORMATS = ("native", "gptq", "gptq_v2", "compressed-tensors", "dense")


def model(bits: int, format: str) -> nn.Sequential:
    """Two layers with weights that follow from their place. No random numbers: those of torch may change."""
    layers = [nn.Linear(64, 96).half(), nn.Linear(96, 32, bias=False).half()]
    for layer in layers:
        n, k = layer.weight.shape
        codes = (torch.arange(n * k) * 7 % 2**bits).view(n, k).to(torch.uint8)
        scale = (1 + torch.arange(n * k // 32) % 13).view(n, -1).half() / 64
        zero_point = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
        if format == "native":
            zero_point = (torch.arange(zero_point.numel()) % 2**bits).view(scale.shape).to(torch.uint8)
        weight = tensor_class(bits).from_codes(codes, scale, zero_point, dtype=torch.float16)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    layers[0].bias.data.copy_(torch.arange(96) / 8)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def digest(directory: Path) -> str:
    """Of all tensors and all JSON, but for the index, which follows from both."""
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                t = file.get_tensor(name)
                found.update(f"{path.name} {name} {t.dtype} {tuple(t.shape)}".encode())
                found.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    for path in sorted(directory.glob("*.json")):
        if not path.name.endswith(".index.json"):
            # The version that wrote it is the one thing that may be another.
            content = path.read_bytes().replace(f'"gptq_ao:{VERSION}"'.encode(), b'"gptq_ao:0.1.0"')
            found.update(path.name.encode() + content)
    return found.hexdigest()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_same_is_written(bits: int, format: str, tmp_path: Path) -> None:
    save_quantized(model(bits, format), tmp_path / "out", format=format)
    assert digest(tmp_path / "out") == json.loads(FIXED.read_text())[f"{format}-{bits}"]


def test_the_digest_sees_a_change(tmp_path: Path) -> None:
    changed, again = model(4, "native"), model(4, "native")
    bias = changed.get_parameter("0.bias").data
    bias[3] += 1
    save_quantized(changed, tmp_path / "out")
    assert digest(tmp_path / "out") != json.loads(FIXED.read_text())["native-4"]
    load_quantized(again, tmp_path / "out")
    assert torch.equal(again.get_parameter("0.bias"), bias)
