"""Parameters read one at a time from a Hugging Face directory are those of `from_pretrained`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gptq_ao.checkpoint.source import open_source
from gptq_ao.errors import CheckpointError

from ..models import seeded, tiny_llama

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {**SMALL, "moe_intermediate_size": 16, "num_local_experts": 4, "num_experts": 4}
EXPERTS |= {"num_experts_per_tok": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "llama-tied": lambda: tiny_llama(tied=True),
    "gpt2": lambda: built(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)),
    "mixtral": lambda: built(transformers.MixtralConfig(**EXPERTS)),
    "qwen3_moe": lambda: built(transformers.Qwen3MoeConfig(**EXPERTS, head_dim=8)),
    "phi3": lambda: built(transformers.Phi3Config(**SMALL, pad_token_id=0)),
    "gpt_neox": lambda: built(transformers.GPTNeoXConfig(**SMALL)),
    "gemma3": lambda: built(transformers.Gemma3TextConfig(**SMALL, head_dim=8)),
}


def built(config: Any) -> Any:
    return seeded(transformers.AutoModelForCausalLM.from_config(config))


def saved(name: str, directory: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    MODELS[name]().to(dtype).save_pretrained(directory, max_shard_size="30KB")
    return directory


def loaded(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


def assert_same(directory: Path) -> None:
    model, source = loaded(directory), open_source(directory)
    assert type(source.model) is type(model)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in source.model.named_parameters()] == names
    assert len(list(source.model.named_parameters(remove_duplicate=False))) == len(
        list(model.named_parameters(remove_duplicate=False))
    )
    assert all(p.is_meta for p in source.model.parameters())
    for name, parameter in model.named_parameters():
        read = source.read(name)
        assert read.dtype == parameter.dtype == source.model.get_parameter(name).dtype, name
        assert torch.equal(read, parameter), name
    for (name, a), (_, b) in zip(model.named_buffers(), source.model.named_buffers(), strict=True):
        assert torch.equal(a, source.read(name) if name in source.conversions else b), name


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_that_of_from_pretrained(name: str, tmp_path: Path) -> None:
    assert_same(saved(name, tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1


def test_experts_are_stored_one_by_one_and_read_as_one(tmp_path: Path) -> None:
    keys = json.loads((saved("qwen3_moe", tmp_path) / INDEX).read_text())["weight_map"]
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in keys
    source = open_source(tmp_path)
    assert source.model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").shape == (4, 32, 32)
    assert len(source.conversions["model.layers.0.mlp.experts.gate_up_proj"][0].inputs) == 8


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_base_model_s_prefix_may_be_there_or_not(prefix: str, tmp_path: Path) -> None:
    """The hub's GPT-2 has the names of GPT2Model."""
    saved("gpt2", tmp_path)
    rewrite(tmp_path, lambda t: {prefix + n.removeprefix("transformer."): v for n, v in t.items()})
    assert_same(tmp_path)


def test_the_dtype_is_the_config_s_or_the_first_tensor_s(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for dtype in ("float16", None):
        (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        assert_same(tmp_path)
    source = open_source(tmp_path, torch.float32)
    assert source.read(NORM).dtype == source.model.get_parameter(NORM).dtype == torch.float32


def test_what_a_model_keeps_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("llama", tmp_path)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"layers.*.mlp"})
    assert open_source(tmp_path).read("model.layers.0.mlp.up_proj.weight").dtype == torch.float32
    assert_same(tmp_path)


@pytest.mark.parametrize("other", [False, True])
def test_tied_parameters_that_are_stored_twice(other: bool, tmp_path: Path) -> None:
    saved("llama-tied", tmp_path)
    embedding = "model.embed_tokens.weight"
    rewrite(tmp_path, lambda t: {**t, "lm_head.weight": t[embedding] + other} if embedding in t else t)
    assert_same(tmp_path)
    source: Any = open_source(tmp_path)
    assert (source.model.lm_head.weight is source.model.model.embed_tokens.weight) is not other


def test_tied_parameters_under_the_other_name(tmp_path: Path) -> None:
    saved("llama-tied", tmp_path)
    rewrite(tmp_path, lambda t: {n.replace("model.embed_tokens", "lm_head"): v for n, v in t.items()})
    assert_same(tmp_path)


def test_old_checkpoints_hold_tables_that_are_computed_now(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path, lambda t: {**t, table: torch.ones(8)} if "model.norm.weight" in t else t)
    assert_same(tmp_path)


INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def rewrite(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]], *, index: bool = True) -> None:
    """Change the tensors of every shard, and the index accordingly."""
    placed: dict[str, str] = {}
    for path in directory.glob("*.safetensors"):
        tensors = {n: t.clone() for n, t in change(load_file(path)).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, path.name)
    if index:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def without(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    return {n: t for n, t in tensors.items() if n != name}


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda d: rewrite(d, lambda t: without(t, NORM)),
        r"does not fit the LlamaForCausalLM: it lacks 'model.norm.weight'$",
    ),
    "extra": (
        lambda d: rewrite(d, lambda t: {**t, "model.more": t[NORM]} if NORM in t else t),
        r"it has 'model.more', which the model does not",
    ),
    "shape": (
        lambda d: rewrite(d, lambda t: {n: torch.cat([v, v]) if n == NORM else v for n, v in t.items()}),
        r"'model.norm.weight' has shape \[128\], in the LlamaForCausalLM \[64\]",
    ),
    "index-lies": (
        lambda d: rewrite(d, lambda t: without(t, NORM), index=False),
        r"index.json is damaged: tensor 'model.norm.weight' is not in model-",
    ),
    "index-silent": (
        lambda d: rewrite(d, lambda t: {**t, "model.more": t[NORM]} if NORM in t else t, index=False),
        r"index.json is damaged: tensor 'model.more' is in model-",
    ),
    "outside": (
        lambda d: (d / INDEX).write_text(json.dumps({"weight_map": {NORM: "../x.safetensors"}})),
        r"names the shard '../x.safetensors'",
    ),
    "no-index": (lambda d: (d / INDEX).unlink(), r"has neither model.safetensors nor model.safetensors.index.json"),
    "truncated": (
        lambda d: [p.write_bytes(p.read_bytes()[:-10]) for p in d.glob("*.safetensors")],
        r"is truncated, or not a safetensors file",
    ),
    "quantized": (
        lambda d: (d / "config.json").write_text(
            json.dumps({**json.loads((d / "config.json").read_text()), "quantization_config": {"quant_method": "gptq"}})
        ),
        r"is quantized already, says its config.json",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_does_not_fit(case: str, tmp_path: Path) -> None:
    change, message = WRONG[case]
    saved("llama", tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


def test_experts_that_do_not_fit_together(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    name = next(n for n in json.loads((tmp_path / INDEX).read_text())["weight_map"] if re.search(r"experts\.2\.w1", n))
    rewrite(tmp_path, lambda t: {n: v[:-1] if n == name else v for n, v in t.items()})
    with pytest.raises(CheckpointError, match=r"experts.gate_up_proj' cannot be made of .*experts"):
        open_source(tmp_path)
    rewrite(tmp_path, lambda t: without(t, name))
    with pytest.raises(CheckpointError, match=r"cannot be made of|has shape"):
        open_source(tmp_path)


def test_a_tensor_is_read_into_memory_of_its_own(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    source = open_source(tmp_path)
    read = source.read(NORM)
    assert read.untyped_storage().nbytes() == read.nbytes
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"ends before byte \d+: it changed while in use"):
        source.read(NORM)
