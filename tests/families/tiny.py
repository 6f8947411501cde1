"""Any transformers model, small: a config class is filled by the names of its fields.

A config's own defaults say which kinds of layers it has: of its per-layer lists (`layer_types`, `mlp_layer_types`, …)
one layer of each distinct kind is kept. Everything else follows from one table of sizes. `OVERRIDES` has the few
families whose fields contradict one another at these sizes.
"""

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn

__all__ = ["FIRST_SPECIAL", "OVERRIDES", "VOCABULARY", "seeded_model", "tiny_config"]

VOCABULARY = 128  # token ids from FIRST_SPECIAL on are those of images, audio and so on
FIRST_SPECIAL = 100

_NAMES: dict[Any, str] = {
    VOCABULARY: """vocab_size vocab_size_per_layer_input decoder_vocab_size encoder_hash_byte_group_vocab
        unpadded_vocab_size audio_vocab_size ngram_vocab_size_base pronunciation_vocab_size shape_vocab_size
        vocab_offset""",
    # widths
    64: """hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim embed_dim hidden_dim
        hidden_size_global backbone_hidden_size attention_hidden_size cross_attention_hidden_size lru_width
        input_embedding_size output_embedding_size out_hidden_size vision_output_dim projector_input_dim
        projector_output_dim adapter_in_dim adapter_out_dim adapter_input_size mamba_d_ssm mamba_intermediate
        vector_quantization_hidden_dimension projection_dim shape_embed_dim pronunciation_embed_dim
        max_position_embeddings max_seq_len n_positions n_ctx context_length max_source_positions
        max_target_positions original_max_position_embeddings downsample_hidden_size num_position_embeddings
        decoder_hidden_size encoder_hidden_size query_pre_attn_scalar codebook_size num_centroids
        router_hidden_size prompt_mid_dim""",
    96: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size dff dim_ff d_ff d_inner
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        shared_experts_intermediate_size intermediate_size_mlp expert_ffn_hidden_size dense_intermediate_size
        prefix_dense_intermediate_size moe_shared_expert_intermediate_size feed_forward_size mlp_dim""",
    32: """kv_lora_rank q_lora_rank o_lora_rank ple_embed_dim hidden_size_per_layer_input laurel_rank hc_lowrank
        linear_head_dim kv_channels conf_hidden_size adapter_rank""",
    # heads: 4 of 16, 2 for keys and values
    4: """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
        conf_num_attention_heads linear_num_heads linear_num_value_heads num_experts num_local_experts
        n_routed_experts moe_num_experts zero_expert_num index_n_heads indexer_n_heads mamba_dt_rank time_step_rank
        gated_norm_rank d_rel patch_size crop_size_per_patch""",
    2: """num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads
        indexer_kv_heads n_group n_groups topk_group mamba_n_groups mamba_ngroups num_experts_per_tok moe_topk
        moe_top_k moe_k top_k_experts num_codebooks o_groups mamba_expand expand expert_layer_period
        attn_layer_period hc_mult hc_count layer_group_size num_quantizers""",
    16: """head_dim v_head_dim qk_nope_head_dim qk_head_dim index_head_dim indexer_head_dim linear_key_head_dim
        linear_value_head_dim swa_head_dim dim_head d_head d_kv attention_head_size mamba_d_head mamba_head_dim
        mamba_d_state state_size ssm_state_size sliding_window sliding_window_size attention_window_size
        window_size local_attention chunk_size mamba_chunk_size block_size attention_chunk_size
        local_attention_window_len index_topk indexer_budget image_size rel_extent mamba_d_conv_width
        keep_window_size floor_scale base_channels num_filters codebook_dim""",
    8: "qk_rope_head_dim rotary_dim mamba_n_heads mamba_num_heads head_dim_rope num_mel_bins feature_size",
    # depth
    1: """first_k_dense_replace num_dense_layers moe_layer_start_index attn_layer_offset expert_layer_offset
        n_shared_experts num_shared_experts moe_num_shared_experts num_res_blocks num_residual_layers
        num_lstm_layers num_mtp_layers_unused moe_layer_interval decoder_sparse_step prompt_length""",
}
SIZES = {name: value for value, names in _NAMES.items() for name in names.split()}
_DEPTHS = frozenset(
    {
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "decoder_layers",
        "encoder_layers",
        "depth",
        "num_blocks",
        "num_encoder_layers",
        "num_decoder_layers",
        "conf_num_hidden_layers",
        "num_global_layers",
        "num_layers_per_stack",
    }
)
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_MAMBA_AND_ATTENTION = ["linear_attention", "full_attention"]
_SHARED_KV = {"num_hidden_layers": 4, "layer_types": _SLIDING_AND_FULL * 2, "num_kv_shared_layers": 2}
_SLIDING_MLA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "head_dim": 24,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_INDEXER = {"indexer_kv_heads": 1, "indexer_compress_ratio": 4}

# config class → its own values, where the table contradicts the family's constraints
OVERRIDES: dict[str, dict[str, Any]] = {
    "BltConfig": {"num_hidden_layers": 2},  # its cache asks for it
    "CohereCompassTextConfig": {
        "layer_types": _SLIDING_AND_FULL,
        "rope_parameters": {
            t: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]} for t in _SLIDING_AND_FULL
        },
    },
    "BambaConfig": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "DbrxConfig": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "Dots3NoteTextConfig": {
        "num_key_value_heads": 4,
        **{f"swa_{n}": v for n, v in _SLIDING_MLA.items()},
    },
    "FalconH1Config": {"mamba_d_ssm": 128},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {**_SHARED_KV, "intermediate_size": 96, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    "GraniteMoeHybridConfig": {"layer_types": _MAMBA_AND_ATTENTION},
    "HrmTextConfig": {"num_layers_per_stack": None},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "Llama4TextConfig": {
        "moe_layers": [1],
        "num_hidden_layers": 2,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
    "LongcatFlashConfig": {"qk_head_dim": 24, "head_dim": 8},
    "Mamba2Config": {"num_heads": 8, "head_dim": 16},
    "Qwen4ExpTextConfig": _INDEXER,
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ReformerConfig": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
    "xLSTMConfig": {"qk_dim_factor": 1.0},
}


def tiny_config(config_class: type, **settings: Any) -> Any:
    """An instance with small sizes. `settings`: fields to set after all; a dict for a sub-config adds to its own.

    Raises:
        Whatever the class raises when its fields contradict one another.
    """
    default = config_class()
    own = {**OVERRIDES.get(config_class.__name__, {}), **settings}
    fields = _fields(config_class)
    given = vars(default)
    values: dict[str, Any] = {name: SIZES[name] for name in fields if name in SIZES and _is_size(given.get(name))}
    values |= _layers(fields, given)
    if values.get("kv_lora_rank"):  # multi-head latent attention: keys and values are expanded to all heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    special = FIRST_SPECIAL
    for name in fields:
        if name.endswith(("_token_id", "_token_index")) and name not in own:
            short = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1}.get(name.removesuffix("_token_id"))
            special += 1
            if given.get(name) is not None or short is not None:
                values[name] = special if short is None else short
    for name, value in given.items():
        if hasattr(value, "to_dict") and name in fields:
            values[name] = tiny_config(type(value), **own.pop(name, {}))
    return config_class(**{**values, **own})


def seeded_model(model_class: Any, config: Any) -> nn.Module:
    """Random weights, the same each time, in eval mode. Of a composite config, a model of one part takes that part."""
    parts = [c for c in vars(config).values() if type(c) is model_class.config_class]
    if parts and type(config) is not model_class.config_class:
        config = parts[0]
    build = getattr(model_class, "_from_config", model_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(config).eval()


def _fields(config_class: type) -> list[str]:
    if dataclasses.is_dataclass(config_class):
        return [f.name for f in dataclasses.fields(config_class)]
    return list(inspect.signature(config_class).parameters)


def _is_size(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def _layers(fields: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, at least two layers."""
    depth = next((given[n] for n in fields if n in _DEPTHS and isinstance(given.get(n), int)), None)
    lists = {n: given[n] for n in fields if isinstance(given.get(n), list | tuple) and len(given[n]) == depth}
    kinds: dict[str, int] = {}
    for i in range(depth or 0):
        kinds.setdefault(repr([column[i] for column in lists.values()]), i)
    kept = sorted(kinds.values()) if lists else []
    kept += kept[-1:] * (2 - len(kept))
    values: dict[str, Any] = {n: len(kept) or 2 for n in fields if n in _DEPTHS and given.get(n) is not None}
    return values | {n: [column[i] for i in kept] for n, column in lists.items()}
