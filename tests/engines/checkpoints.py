"""Checkpoints for engines: of which models, how quantized, in which formats. Small: an engine loads them in seconds."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_ao import gptq_config, quantize_, save_quantized
from gptq_ao.checkpoint.engines import Contents, contents_of
from gptq_ao.errors import EngineWarning, FusedSettingsWarning

from ..models import seeded, token_batches

TINY_LM = Path(__file__).parents[2] / "examples" / "tiny_lm"
# Kernels want 64 outputs and 128 inputs at least, and attention of a CPU heads of 64.
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 384}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES |= {"max_position_embeddings": 128}
WINDOWS: dict[str, Any] = {**SIZES, "head_dim": 64, "sliding_window": 16, "query_pre_attn_scalar": 64}
WINDOWS |= {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS: dict[str, Any] = {**SIZES, "num_experts_per_tok": 2}


def _random(config: Any) -> Callable[[], Any]:
    return lambda: seeded(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


MODELS: dict[str, Callable[[], Any]] = {
    "tiny_lm": lambda: AutoModelForCausalLM.from_pretrained(TINY_LM),
    "llama": _random(transformers.LlamaConfig(**SIZES)),
    "qwen2": _random(transformers.Qwen2Config(**SIZES)),
    "qwen3": _random(transformers.Qwen3Config(**SIZES, head_dim=64)),
    "mixtral": _random(transformers.MixtralConfig(**EXPERTS, num_local_experts=4)),
    "gemma2": _random(transformers.Gemma2Config(**SIZES, head_dim=64)),
    "gemma3": _random(transformers.Gemma3TextConfig(**WINDOWS)),
    "phi3": _random(transformers.Phi3Config(**SIZES)),
    "qwen3_moe": _random(transformers.Qwen3MoeConfig(**EXPERTS, head_dim=64, num_experts=4, moe_intermediate_size=256)),
}
FOREIGN = ("gptq", "compressed-tensors")
MLX = ("mlx",)


@dataclass(frozen=True, eq=False)
class Case:
    """How a model is quantized."""

    name: str
    model: str
    settings: dict[str, Any]
    formats: tuple[str, ...] = FOREIGN

    @property
    def directories(self) -> dict[str, str]:
        """Format → name of a directory."""
        return {f: f"{self.name}, {self.model}, {f}".replace(", ", "--").replace(" ", "-") for f in self.formats}


def write(case: Case, folder: Path) -> Contents:
    """All formats of a case. Returns what is in them."""
    model = MODELS[case.model]()
    settings = {"group_size": 32, "effort": "fast", **case.settings, "calibration": token_batches(4, vocabulary=257)}
    with warnings.catch_warnings():
        # That some engine does not serve it; this is what is looked at here.
        warnings.simplefilter("ignore", FusedSettingsWarning)
        warnings.simplefilter("ignore", EngineWarning)
        if case.formats != ("dense",):
            quantize_(model, gptq_config(**settings))
        for format, name in case.directories.items():
            save_quantized(model, folder / name, format=format, tokenizer=AutoTokenizer.from_pretrained(TINY_LM))
    return contents_of(model)


MIXED = {"re:.*k_proj": {"bits": 8}, "re:.*v_proj": None, "re:.*down.*": None, "lm_head": {"bits": 2}}
MIXED_MLX = {"rules": {"lm_head": {"group_size": 64}, "re:.*layers.0.*": None, "re:.*mlp.*": {"bits": 8}}}
LLAMAS, WITH_EXPERTS = ("llama", "qwen2", "qwen3"), ("mixtral", "qwen3_moe")
CASES = [
    Case("not quantized", "tiny_lm", {}, ("dense",)),
    Case("4 bits, groups of 128", "tiny_lm", {"group_size": 128}, (*FOREIGN, "gptq_v2", "awq")),
    *(Case("4 bits, groups of 32", name, {}) for name in LLAMAS),
    *(Case("4 bits, one scale per row", name, {"group_size": -1}) for name in LLAMAS),
    Case("4 bits, asymmetric", "llama", {"sym": False}, ("gptq_v2", "compressed-tensors", "awq")),
    *(Case(f"{bits} bits, asymmetric", "llama", {"bits": bits, "sym": False}, ("gptq_v2",)) for bits in (2, 3, 8)),
    *(Case("a dense layer", name, {"rules": {"re:.*layers.0.*": None}}) for name in LLAMAS),
    Case("dense attention", "llama", {"rules": {"re:.*self_attn.*": None}}),
    Case("a quantized head", "llama", {"rules": {"lm_head": {"bits": 4}}}),
    Case("a quantized head with other groups", "llama", {"rules": {"lm_head": {"group_size": 64}}}),
    Case("groups of two sizes", "llama", {"rules": {"re:.*mlp.*": {"group_size": 64}}}),
    Case("8 bits", "llama", {"bits": 8}),
    Case("3 bits", "llama", {"bits": 3}),
    Case("2 bits", "llama", {"bits": 2}),
    Case("4 and 8 bits", "llama", {"rules": {"re:.*mlp.*": {"bits": 8}}}),
    *(Case("dense experts", name, {"rules": {"re:.*experts.*": None}}) for name in WITH_EXPERTS),
    *(Case("4 bits, experts", name, {}) for name in WITH_EXPERTS),
    *(Case("experts of 8 bits", name, {"rules": {"re:.*experts.*": {"bits": 8}}}) for name in WITH_EXPERTS),
    Case("activation order", "llama", {"act_order": "group"}, ("gptq",)),
    Case("native", "llama", {}, ("native",)),
    Case("native, 3 bits", "qwen2", {"bits": 3}, ("native",)),
    # q, k and v are one layer of vLLM.
    Case("native, mixed", "qwen3", {"rules": MIXED}, ("native",)),
    Case("native, dense experts", "mixtral", {"rules": {"re:.*experts.*": None}}, ("native",)),
    Case("native, experts of 4 bits", "mixtral", {"sym": False}, ("native",)),
    Case("native, experts of 3 bits", "qwen3_moe", {"bits": 3}, ("native",)),
    Case("native, activation order", "llama", {"act_order": "group"}, ("native",)),
    Case("4 bits, groups of 64", "tiny_lm", {"group_size": 64}, MLX),
    *(Case("4 bits, groups of 32", name, {}, MLX) for name in (*LLAMAS, *WITH_EXPERTS, "phi3", "gemma2", "gemma3")),
    *(Case(f"{bits} bits, groups of 128", "llama", {"bits": bits, "group_size": 128}, MLX) for bits in (2, 3, 8)),
    Case("4 bits, asymmetric", "llama", {"sym": False}, MLX),
    Case("4 bits, one scale per row", "llama", {"group_size": -1}, MLX),
    Case("a quantized head, a dense layer, 8 bits", "llama", MIXED_MLX, MLX),
]
