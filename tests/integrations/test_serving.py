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
    (weights,) = [g["weights"] for g in config["config_groups"].values() if "Linear" in g["targets"]]
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


Setting = tuple[int, int] | None  # bits and group size (−1: one scale per row); None: dense


def held(tensors: dict[str, Tensor]) -> dict[str, tuple[int, int, int] | None]:
    """Module → bits, number of groups and of input features that the files hold, going by shapes; None: dense."""
    found: dict[str, tuple[int, int, int] | None] = {}
    for name, t in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and t.dim() == 2:
            found[module] = None
        elif part == "qweight":
            k = len(tensors[f"{module}.g_idx"])
            found[module] = (t.shape[0] * 32 // k, len(tensors[f"{module}.scales"]), k)
        elif part == "weight_packed":
            k = int(tensors[f"{module}.weight_shape"][1])
            found[module] = (t.shape[1] * 32 // k, tensors[f"{module}.weight_scale"].shape[1], k)
    return found


def fits(setting: Setting, part: tuple[int, int, int] | None) -> bool:
    if setting is None or part is None:
        return setting is part
    bits, groups, k = part
    return setting == (bits, k // groups) or (setting == (bits, -1) and groups == 1)


def engine_modules(modules: Any) -> dict[str, list[str]]:
    """Module of an engine → its parts in the files. Embeddings and norms are looked up under no setting."""
    found: dict[str, list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        fused = next((f for f, names in FUSED.items() if leaf in names), leaf)
        whole = module.partition(".experts.")[0] + ".experts" if ".experts." in module else f"{parent}.{fused}"
        if not leaf.startswith(("embed", "norm")):
            found.setdefault(whole.removeprefix("."), []).append(module)
    return found


def gptq_decision(config: dict[str, Any], name: str, linear: bool) -> Setting:
    """vLLM 0.32's `get_dynamic_override`, which SGLang's is too: `re.match`, the first pattern counts."""
    for pattern, values in config.get("dynamic", {}).items():
        if re.match(pattern[2:], name):
            return None if pattern[0] == "-" else (values["bits"], values["group_size"])
    # The output head, which is no linear layer.
    return (config["bits"], config["group_size"]) if linear or config["lm_head"] else None


def compressed_decision(config: dict[str, Any], name: str, linear: bool, parts: list[str], mapped: bool) -> Setting:
    """vLLM 0.32's `should_ignore_layer` and `find_matched_target`; SGLang 0.5.23's are the same without `mapped`, as it
    does not know what Llama's fused layers are made of. Experts are asked for as three parts of the first."""
    if name.endswith(".experts"):
        found = {compressed_decision(config, p, linear, [p], mapped) for p in parts if ".experts.0." in p}
        assert len(found) == 1, "All MoE projections need to have same quantization scheme but found multiple"
        return found.pop()
    names = parts if mapped else [name]
    ignored = {n in config["ignore"] for n in names}
    assert len(ignored) == 1, f"Found different quantization schemes for the shards of {name}"
    if ignored == {True}:
        return None
    schemes = {t: g["weights"] for g in config["config_groups"].values() for t in g["targets"]}
    targets = [t for t in schemes if t == name or (t.startswith("re:") and re.match(t[3:], name))]
    targets += [t for t in schemes if t == parts[0]] if mapped and all(p in schemes for p in parts) else []
    targets += ["Linear"] if linear else []
    return (schemes[targets[0]]["num_bits"], schemes[targets[0]].get("group_size", -1)) if targets else None


def transformers_decision(config: dict[str, Any]) -> Setting:
    """transformers 5.23's `get_experts_scheme`, one for all experts."""
    groups = list(config["config_groups"].values())
    named = [g for g in groups if any(t.startswith("re:") and "experts" in t for t in g["targets"])]
    weights = [*named, *groups][0]["weights"]
    return weights["num_bits"], weights.get("group_size", -1)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "rules",
    [{}, {"re:.*experts.*": {"bits": 8}}, {"re:.*self_attn.*": {"bits": 8}}, {"re:.*1.self_attn.*": {"sym": False}}],
)
def test_transformers_finds_the_scheme_of_experts(name: str, rules: dict[str, Any], tmp_path: Path) -> None:
    """Most weights have it, or few do."""
    config, tensors = saved(tmp_path / "a", name, "compressed-tensors", rules=rules)
    experts = [part for module, part in held(tensors).items() if ".experts." in module]
    assert len(experts) == 24
    assert all(fits(transformers_decision(config), part) for part in experts)


MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "a dense block": ("llama", {"re:.*layers.0.*": None}),
    "dense attention, other gate and up": (
        "llama",
        {"re:.*layers.0.self_attn.*": None, "re:.*1.mlp.(g|u).*": {"bits": 8}},
    ),
    "a head": ("llama", {"lm_head": {"bits": 4}, "re:.*layers.0.mlp.*": None}),
    "a head with settings of its own": ("llama", {"lm_head": {"bits": 8, "group_size": -1}}),
    "a head and most others": ("llama", {"re:lm_head|.*(mlp|o_proj).*": {"bits": 8}}),
    **{
        f"{what} of {name}": (name, {f"re:.*layers.{layer}.*experts.*": setting})
        for name in ("mixtral", "qwen3_moe")
        for what, layer, setting in (
            ("dense experts", 0, None),
            ("all experts, dense", ".", None),
            ("experts with other settings", 1, {"bits": 8, "group_size": -1}),
        )
    },
}


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("case", MIXED)
def test_engines_find_what_is_there(case: str, format: str, tmp_path: Path) -> None:
    """Every module of an engine gets the setting that its parts have in the files: layers that it fuses, experts, which
    are one module for it, the output head, which is no linear layer, and what is dense."""
    name, rules = MIXED[case]
    config, tensors = saved(tmp_path / "a", name, format, rules=rules)
    found = held(tensors)
    seen = set()
    for module, parts in engine_modules(found).items():
        linear = module != "lm_head"
        if format == "gptq":
            decisions = [gptq_decision(config, module, linear)]
        else:
            decisions = [compressed_decision(config, module, linear, parts, mapped) for mapped in (True, False)]
        assert all(fits(d, found[p]) for d in decisions for p in parts), module
        seen |= {*decisions}
    assert len(seen) >= 2


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_experts_that_differ_are_named_one_by_one(format: str, tmp_path: Path) -> None:
    """No engine serves them; other readers do."""
    rules = {"re:.*layers.1.*down_proj": {"bits": 8}}
    config, tensors = saved(tmp_path / "a", "mixtral", format, rules=rules)
    named = (
        config["dynamic"] if format == "gptq" else [t for g in config["config_groups"].values() for t in g["targets"]]
    )
    for module, part in held(tensors).items():
        if ".experts." in module:
            assert part is not None
            assert (part[0] == 8) == any(re.match(n.removeprefix("+:"), module) for n in named)


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
