"""What vLLM and SGLang ask of a checkpoint, as rules taken from their loaders' source, applied to what is written here.

They are written down in docs/serving.md. No server runs in these tests.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_ao import save_quantized

from ..checkpoint.test_directories import contents, quantized

MARLIN_GROUPS = (-1, 32, 64, 128)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def saved(directory: Path, name: str, format: str, **settings: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    save_quantized(quantized(name, **settings), directory, format=format)
    return json.loads((directory / "config.json").read_text())["quantization_config"], contents(directory)


def modules(tensors: dict[str, Tensor], part: str) -> list[str]:
    return [n.removesuffix(f".{part}") for n in tensors if n.endswith(f".{part}")]


def gptq_problems(config: dict[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    """vLLM's AutoGPTQConfig with Marlin, and SGLang's gptq_marlin."""
    found = []
    if config["quant_method"] != "gptq" or config["checkpoint_format"] != "gptq":
        found.append("not the version that is served")
    if config["bits"] not in (4, 8) or config["sym"] is not True or config["group_size"] not in MARLIN_GROUPS:
        found.append("no Marlin kernel")
    if config["desc_act"]:
        found.append("desc_act")
    for m in modules(tensors, "qweight"):
        k, n = tensors[f"{m}.g_idx"].shape[0], tensors[f"{m}.scales"].shape[1]
        bits, size = config["bits"], k if config["group_size"] == -1 else config["group_size"]
        shapes = {"qweight": (k * bits // 32, n), "qzeros": (k // size, n * bits // 32), "scales": (k // size, n)}
        if any(tensors[f"{m}.{part}"].shape != shape for part, shape in shapes.items()):
            found.append(f"shapes of {m}")
        if [tensors[f"{m}.{p}"].dtype for p in shapes] != [torch.int32, torch.int32, torch.float16]:
            found.append(f"dtypes of {m}")
    skipped = [p[2:] for p in config.get("dynamic", {}) if p.startswith("-:")]
    return found + mixed(tensors, "qweight", lambda module: any(re.match(p, module) for p in skipped))


def compressed_problems(config: dict[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    """vLLM's and SGLang's CompressedTensorsWNA16."""
    found = []
    if (config["quant_method"], config["format"]) != ("compressed-tensors", "pack-quantized"):
        found.append("not packed")
    for group in config["config_groups"].values():
        # The arguments of a scheme are a closed set: a key that a reader does not know is an error there.
        if set(group["weights"]) - {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"}:
            found.append("unknown keys")
    (weights,) = [g["weights"] for g in config["config_groups"].values() if g["targets"] == ["Linear"]]
    bits = weights["num_bits"]
    for m in modules(tensors, "weight_packed"):
        n, k = tensors[f"{m}.weight_shape"].tolist()
        size = weights.get("group_size", k)
        shapes = {"weight_packed": (n, k * bits // 32), "weight_scale": (n, k // size)}
        if not weights["symmetric"]:
            shapes["weight_zero_point"] = (n * bits // 32, k // size)
        if any(tensors[f"{m}.{part}"].shape != shape for part, shape in shapes.items()):
            found.append(f"shapes of {m}")
        if weights["symmetric"] and f"{m}.weight_zero_point" in tensors:
            found.append(f"zero points of {m}")
        if f"{m}.weight_g_idx" in tensors or tensors[f"{m}.weight_packed"].dtype != torch.int32:
            found.append(f"tensors of {m}")
    return found + mixed(tensors, "weight_packed", lambda module: module in config["ignore"])


def mixed(tensors: dict[str, Tensor], part: str, is_skipped: Any) -> list[str]:
    """Layers that are fused are quantized all or none, and what is not quantized is said to be so."""
    quantized, found = set(modules(tensors, part)), []
    for dense in modules(tensors, "weight"):
        if dense.endswith("_proj") and not is_skipped(dense):
            found.append(f"{dense} is dense and nothing says so")
        parent, _, leaf = dense.rpartition(".")
        others = next((names for names in FUSED.values() if leaf in names), ())
        if any(f"{parent}.{o}" in quantized for o in others):
            found.append(f"{dense} is dense, what it is fused with is not")
    return found


@pytest.mark.parametrize(
    ("name", "bits", "group_size"),
    [
        *(("llama", bits, group_size) for bits in (4, 8) for group_size in (32, -1)),
        # Neither depends on the architecture: each once.
        *((name, *s) for name in ("llama-tied", "mixtral", "qwen3_moe") for s in ((4, 32), (8, -1))),
    ],
)
def test_what_is_served(name: str, bits: int, group_size: int, tmp_path: Path) -> None:
    settings = {"bits": bits, "group_size": group_size}
    assert gptq_problems(*saved(tmp_path / "a", name, "gptq", **settings)) == []
    assert compressed_problems(*saved(tmp_path / "b", name, "compressed-tensors", **settings)) == []
    if name == "llama":
        assert compressed_problems(*saved(tmp_path / "c", name, "compressed-tensors", **settings, sym=False)) == []


def test_layers_that_are_left_out_whole(tmp_path: Path) -> None:
    rules = {"re:.*layers.0.self_attn.*": None}
    config, tensors = saved(tmp_path / "a", "llama", "gptq", rules=rules)
    assert gptq_problems(config, tensors) == []
    assert compressed_problems(*saved(tmp_path / "b", "llama", "compressed-tensors", rules=rules)) == []
    fused = [p[2:] for p in config["dynamic"]]
    assert any(re.match(p, "model.layers.0.self_attn.qkv_proj") for p in fused)
    assert not any(re.match(p, "model.layers.1.self_attn.qkv_proj") for p in fused)


def test_the_rules_see_what_is_not_served(tmp_path: Path) -> None:
    assert gptq_problems(*saved(tmp_path / "v2", "llama", "gptq_v2", sym=False))[:2] == [
        "not the version that is served",
        "no Marlin kernel",
    ]
    assert "no Marlin kernel" in gptq_problems(*saved(tmp_path / "3", "llama", "gptq", bits=3))
    part = saved(tmp_path / "part", "llama", "gptq", rules={"re:.*layers.0.self_attn.q_proj.*": None})
    assert any("what it is fused with is not" in p for p in gptq_problems(*part))
