"""Checkpoints that GPTQModel 7.7 and llm-compressor 0.14 wrote mean here what they mean there.

`peers.tar.xz` holds six checkpoints of small Llamas (three whole, of three only the matrices of the first layer) and
beside each SHA-256 digests of codes and dequantized weights as their writer reads them back: GPTQModel's float(scale)·
(q − z) in fp32, llm-compressor's decompressed bf16 weights. One has logits that GPTQModel computed.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptq_ao import load_quantized, save_quantized
from gptq_ao.checkpoint.formats import open_quantized
from gptq_ao.tensor import GroupTensor

CHECKPOINTS = [
    "gptqmodel-7.7-v1-3bit-asym-actorder",
    "gptqmodel-7.7-v1-4bit-asym",
    "gptqmodel-7.7-v1-4bit-sym-actorder",
    "gptqmodel-7.7-v2-4bit-asym-actorder",
    "llm-compressor-0.14-4bit-asym",
    "llm-compressor-0.14-4bit-sym",
]


GPTQ_KEYS = ("quant_method", "bits", "group_size", "desc_act", "sym", "lm_head", "checkpoint_format", "pack_dtype")


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("conformance")
    with tarfile.open(Path(__file__).with_name("peers.tar.xz")) as archive:
        archive.extractall(directory, filter="data")
    return directory / "peers"


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def natural(weight: GroupTensor) -> Tensor:
    """Codes in the order of the input features."""
    codes = weight.codes()
    return codes if weight.perm is None else torch.empty_like(codes).index_copy_(1, weight.perm.long(), codes)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_codes_and_weights_are_exact(name: str, peers: Path) -> None:
    expected = json.loads((peers / name / "expected.json").read_text())
    found: dict[str, dict[str, str]] = {}
    files = open_quantized(peers / name)
    for key, tensor in files.tensors.items():
        weight = tensor.read()
        if isinstance(weight, GroupTensor):
            dtype = torch.float32 if name.startswith("gptqmodel") else torch.bfloat16
            digests = {"codes": digest(natural(weight)), "weight": digest(weight.dequantize(dtype))}
            found[key.removesuffix(".weight")] = digests
            assert (weight.perm is not None) == ("actorder" in name)
    assert len(found) >= 7
    assert found == expected
    assert files.rounding.changes == {}


def test_logits(peers: Path) -> None:
    name = "gptqmodel-7.7-v1-4bit-sym-actorder"
    probe = load_file(peers / f"{name}.logits.st")
    model: Any = load_quantized(peers / name)
    assert model.dtype == torch.float16
    assert not any(p.requires_grad for p in model.parameters() if isinstance(p, GroupTensor))
    with torch.no_grad():
        logits = model.float()(probe["input_ids"]).logits[:, ::8]
    # GPTQModel ran in fp16 and returned fp32: some 2^-11 of the largest logit per rounding, a few roundings deep.
    assert (logits - probe["logits"]).abs().max() < 8 * 2**-11 * probe["logits"].abs().max()
    with torch.no_grad():
        scrambled = model(probe["input_ids"].flip(1)).logits[:, ::8]
    assert (scrambled - probe["logits"]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llm-compressor-0.14-4bit-asym", "llm-compressor-0.14-4bit-sym"])
def test_a_whole_model_of_llm_compressor(name: str, peers: Path) -> None:
    model: Any = load_quantized(peers / name)
    packed = [n for n, p in model.named_parameters() if isinstance(p, GroupTensor)]
    assert len(packed) == 14
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (12, 64)
    assert model.model.layers[0].self_attn.k_proj.bias.abs().sum() > 0
    ids = torch.arange(12)[None]
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("gptqmodel-7.7-v1-4bit-sym-actorder", "gptq"),
        ("llm-compressor-0.14-4bit-asym", "compressed-tensors"),
        ("llm-compressor-0.14-4bit-sym", "compressed-tensors"),
    ],
)
def test_what_is_read_is_written_with_the_same_bytes(name: str, format: str, peers: Path, tmp_path: Path) -> None:
    save_quantized(load_quantized(peers / name), tmp_path / "out", format=format)
    before, after = (load_file(next(d.glob("*.safetensors"))) for d in (peers / name, tmp_path / "out"))
    assert set(before) == set(after)
    assert all(before[n].dtype == t.dtype and torch.equal(before[n], t) for n, t in after.items())
    quantization = json.loads((peers / name / "config.json").read_text())["quantization_config"]
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if format == "gptq":
        assert {k: written[k] for k in GPTQ_KEYS} == {k: quantization[k] for k in GPTQ_KEYS}
    else:
        weights = written["config_groups"]["group_0"]["weights"]
        assert weights.items() <= quantization["config_groups"]["group_0"]["weights"].items()
        assert written["ignore"] == quantization["ignore"]
