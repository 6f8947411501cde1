"""Encoders, encoder–decoders, vision, speech, and vision–language models of transformers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import causal_lm
from .entry import Entry
from .tiny import seeded_model, tiny_config

__all__ = ["encoder_entries"]

Batches = list[dict[str, Tensor]]


def token_batches(length: int = 32) -> Batches:
    return causal_lm.token_batches(rows=2, length=length)


def images(**sizes: int) -> Batches:
    size = sizes.get("size", 16)
    return _noise("pixel_values", (2, 3, size, size))


def _noise(name: str, shape: tuple[int, ...]) -> Batches:
    return [{name: torch.randn(shape, generator=torch.Generator().manual_seed(i))} for i in range(3)]


def joined(*inputs: Batches) -> Batches:
    return [{k: v for part in parts for k, v in part.items()} for parts in zip(*inputs, strict=True)]


def padded_tokens() -> Batches:
    """The second sequence is shorter."""
    batches = token_batches()
    for b in batches:
        b["attention_mask"] = torch.ones_like(b["input_ids"])
        b["attention_mask"][1, 20:] = 0
    return batches


def two_sides() -> Batches:
    return [
        {**b, "decoder_input_ids": d["input_ids"]}
        for b, d in zip(padded_tokens(), token_batches(length=12), strict=True)
    ]


def speech() -> Batches:
    ids = [{"decoder_input_ids": b["input_ids"]} for b in token_batches(length=12)]
    return joined(_noise("input_features", (2, 8, 128)), ids)


def with_image(token: int, count: int) -> Batches:
    """Token batches in which `count` tokens stand for the image."""
    batches = token_batches()
    for b in batches:
        b["input_ids"][:, 1 : 1 + count] = token
        b["attention_mask"] = torch.ones_like(b["input_ids"])
    return batches


def llava() -> Batches:
    return joined(with_image(101, 16), images())


def qwen_vl() -> Batches:
    """One image of 4×4 patches per sequence; 2×2 patches become one token."""
    patches = _noise("pixel_values", (2 * 16, 3 * 2 * 4 * 4))
    batches = joined(with_image(101, 4), patches)
    for b in batches:
        b["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        b["mm_token_type_ids"] = (b["input_ids"] == 101).long()
        # Computed by the model in a loop over the ids unless given.
        b["position_ids"] = torch.arange(b["input_ids"].shape[1]).expand(3, 2, -1)
    return batches


_QWEN_VL = {
    "image_token_id": 101,
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
}
# name: (config class, model class, settings, batches)
_TABLE: dict[str, tuple[str, str, dict[str, Any], Callable[[], Batches]]] = {
    "BERT": ("BertConfig", "BertForMaskedLM", {}, padded_tokens),
    "RoBERTa": ("RobertaConfig", "RobertaForMaskedLM", {}, padded_tokens),
    "ModernBERT": ("ModernBertConfig", "ModernBertForMaskedLM", {}, padded_tokens),
    "DeBERTa": (
        "DebertaConfig",
        "DebertaForMaskedLM",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        padded_tokens,
    ),
    "DeBERTa v2": (
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        padded_tokens,
    ),
    "ELECTRA": ("ElectraConfig", "ElectraForPreTraining", {}, padded_tokens),
    "ALBERT": ("AlbertConfig", "AlbertForMaskedLM", {}, padded_tokens),
    "DistilBERT": ("DistilBertConfig", "DistilBertForMaskedLM", {"dim": 64, "hidden_dim": 96}, padded_tokens),
    "T5": ("T5Config", "T5ForConditionalGeneration", {"decoder_start_token_id": 0}, two_sides),
    "Flan-T5 (gated)": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
        two_sides,
    ),
    "BART": ("BartConfig", "BartForConditionalGeneration", {}, two_sides),
    "Marian": ("MarianConfig", "MarianMTModel", {}, two_sides),
    "ViT": ("ViTConfig", "ViTForImageClassification", {}, images),
    "Swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 2},
        images,
    ),
    "ConvNeXt": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"depths": [1, 1], "hidden_sizes": [32, 64], "num_stages": 2, "patch_size": 2},
        images,
    ),
    "DINOv2": ("Dinov2Config", "Dinov2Model", {}, images),
    "SigLIP": ("SiglipConfig", "SiglipModel", {}, lambda: joined(token_batches(), images())),
    "CLIP": ("CLIPConfig", "CLIPModel", {}, lambda: joined(padded_tokens(), images())),
    "Whisper": ("WhisperConfig", "WhisperForConditionalGeneration", {}, speech),
    "Wav2Vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        {
            "conv_dim": [32, 32],
            "conv_kernel": [10, 3],
            "conv_stride": [5, 2],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
        lambda: _noise("input_values", (2, 400)),
    ),
    "LLaVA": (
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {"image_token_index": 101, "image_seq_length": 16, "vision_feature_select_strategy": "default"},
        llava,
    ),
    "Qwen2.5-VL": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", _QWEN_VL, qwen_vl),
    "Qwen3-VL": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration", _QWEN_VL, qwen_vl),
}


def encoder_entries() -> list[Entry]:
    return [Entry(name, "encoders, vision, speech", partial(_build, name)) for name in _TABLE]


def _build(name: str) -> tuple[nn.Module, list[Any]]:
    import transformers

    config_class, model_class, settings, batches = _TABLE[name]
    config = tiny_config(getattr(transformers, config_class), **settings)
    return seeded_model(getattr(transformers, model_class), config), list(batches())
