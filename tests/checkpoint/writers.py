"""Checkpoints as other libraries write them, packed code by code from the formats' definitions: slow, independent."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from gptq_ao.checkpoint.exchange.grouped_weight import GroupedWeight


def words(row: list[int], bits: int) -> list[int]:
    """One little-endian stream of bits, cut into words of 32."""
    stream = sum(code << (bits * j) for j, code in enumerate(row))
    return [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]


def int32(rows: list[list[int]]) -> Tensor:
    return torch.tensor([[w - 2**32 if w >= 2**31 else w for w in row] for row in rows], dtype=torch.int32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    return int32([words(row, bits) for row in codes.tolist()])


def decremented(zero_point: Tensor, bits: int, writer: str) -> Tensor:
    """Zero points [G, N] of version 1, packed, as the two libraries do it."""
    if writer == "gptqmodel" and bits != 3:
        ones = sum(1 << (bits * j) for j in range(32 // bits))
        return int32([[(w - ones) % 2**32 for w in words(row, bits)] for row in zero_point.tolist()])
    if writer == "gptqmodel":
        return pack_rows((zero_point.int() - 1) % 8, bits)
    assert bits != 3
    rows = []
    for row in zero_point.tolist():
        row += [1] * (-len(row) % (32 // bits))
        packed = [0] * (len(row) * bits // 32)
        for j, zero in enumerate(row):  # uint32: −1 is all ones, and sets all bits above
            packed[j * bits // 32] |= (((zero - 1) % 2**32) << (j * bits % 32)) % 2**32
        rows.append(packed)
    return int32(rows)


def gptq_tensors(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_of: Tensor,
    bits: int,
    version: int = 1,
    writer: str = "gptqmodel",
) -> dict[str, Tensor]:
    """codes [N, K]; scale and zero_point [N, G]; group_of [K]."""
    zeros = zero_point.T.contiguous()
    return {
        "qweight": pack_rows(codes, bits).T.contiguous(),
        "qzeros": pack_rows(zeros, bits) if version == 2 else decremented(zeros, bits, writer),
        "scales": scale.T.contiguous(),
        "g_idx": group_of.to(torch.int32),
    }


def compressed_tensors(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_of: Tensor | None = None
) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": pack_rows(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape),
    }
    if zero_point is not None:
        tensors["weight_zero_point"] = pack_rows(zero_point.T, bits).T.contiguous()
    return tensors if group_of is None else {**tensors, "weight_g_idx": group_of.to(torch.int32)}


def mlx_tensors(codes: Tensor, scales: Tensor, biases: Tensor, bits: int) -> dict[str, Tensor]:
    """codes [N, K]; scales and biases [N, G]. What `mx.quantize` returns: a stream of bits in unsigned words."""
    return {"weight": pack_rows(codes, bits).view(torch.uint32), "scales": scales, "biases": biases}


def dense(codes: Tensor, scale: Tensor, zero_point: Tensor, group_of: Tensor) -> Tensor:
    """fp32 [N, K], from the definition."""
    return scale.float()[:, group_of] * (codes.int() - zero_point.int()[:, group_of])


def meant(weight: GroupedWeight) -> Tensor:
    """The same of what was read."""
    k = weight.codes.shape[1]
    groups = (weight.codes.int() - weight.zero_point.int().repeat_interleave(k // weight.scale.shape[1], 1)).float()
    w = groups * weight.scale.float().repeat_interleave(k // weight.scale.shape[1], 1)
    return w if weight.perm is None else torch.empty_like(w).index_copy_(1, weight.perm.long(), w)


def write(directory: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None, config: Any = None) -> Path:
    """A directory with `model.safetensors` and `config.json`."""
    directory.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    content = {} if config is None else {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    if quantization is not None:
        content["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def prefixed(module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{name}": t for name, t in tensors.items()}


def awq_tensors(codes: Tensor, scale: Tensor, zero_point: Tensor) -> dict[str, Tensor]:
    """codes [N, K]; scale and zero_point [N, G]. AutoAWQ's loop, number by number: field i of word j is the output
    feature 8j + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""

    def interleaved(rows: np.ndarray) -> Tensor:
        words = np.zeros((len(rows), rows.shape[1] // 8), dtype=np.uint32)
        for word in range(words.shape[1]):
            for field, feature in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, word] |= rows[:, 8 * word + feature].astype(np.uint32) << np.uint32(4 * field)
        return torch.from_numpy(words.view(np.int32))

    return {
        "qweight": interleaved(codes.numpy().T),
        "qzeros": interleaved(zero_point.numpy().T),
        "scales": scale.T.contiguous(),
    }
