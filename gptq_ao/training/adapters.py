"""Adapters that were solved together with the codes (`gptq_config(adapter_rank=…)`), as adapters of PEFT."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.adapter import LowRank
from gptq_ao.checkpoint.files.output_directory import check_empty
from gptq_ao.checkpoint.files.shards import read_header
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.model.unwrap import same_forward

__all__ = ["attach_adapter", "load_adapter", "require_peft", "save_adapter"]


def attach_adapter(model: nn.Module, adapter: Mapping[str, LowRank]) -> Any:
    """The quantized model with its adapter, a `peft.PeftModel`: to run, or to train on. As with `get_peft_model`, the
    layers of `model` itself become those of PEFT.

    Args:
        adapter: `report.adapter` of the call that quantized the model.

    Raises:
        ConfigError: PEFT is not installed; the adapter is empty, or that of another model.
    """
    require_peft()
    from peft import get_peft_model, set_peft_model_state_dict

    model = same_forward(model)
    config, state = _lora_config(model, adapter), _state(model, adapter)  # while the model has its own names
    with torch.random.fork_rng():  # PEFT draws the values that are replaced here
        made = get_peft_model(model, config)
    set_peft_model_state_dict(made, state)
    return made


def save_adapter(model: nn.Module, adapter: Mapping[str, LowRank], directory: str | Path) -> None:
    """Write an adapter of PEFT, which `PeftModel.from_pretrained(model, directory)` puts beside the quantized weights
    once they are loaded. The model is only looked at.

    Args:
        model: the quantized model.
        adapter: `report.adapter` of the call that quantized it.
        directory: must not exist, or be empty.

    Raises:
        CheckpointError: the directory holds something.
        ConfigError: PEFT is not installed; the adapter is empty, or that of another model.
    """
    require_peft()
    from safetensors.torch import save_file

    whole = same_forward(model)
    config = _lora_config(whole, adapter)
    config.base_model_name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config.inference_mode = True  # as PEFT itself saves it: whoever loads it says whether to train
    directory = Path(directory)
    check_empty(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(_state(whole, adapter), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(directory))


def load_adapter(model: nn.Module, directory: Path) -> Any:
    """The model with an adapter that PEFT has saved, a `PeftModel`. Safetensors only, and every tensor has its place.

    Raises:
        CheckpointError: the directory holds no such adapter, or that of another model.
        ConfigError: PEFT is not installed.
    """
    require_peft()
    from peft import PeftModel, get_peft_model_state_dict

    config, values = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    for file in (config, values):
        if not file.is_file():
            raise CheckpointError(f"{directory} has no {file.name}: give a directory that PEFT's save_pretrained wrote")
    stored = set(read_header(values))
    try:
        made = PeftModel.from_pretrained(model, str(directory))
    except (ValueError, RuntimeError, TypeError, KeyError) as e:
        first = str(e).strip().splitlines()[0]
        raise CheckpointError(f"the adapter in {directory} does not fit the {type(model).__name__}: {first}") from e
    expected = set(get_peft_model_state_dict(made, save_embedding_layers=False))
    if stored != expected:
        odd = sorted(stored ^ expected)
        raise CheckpointError(
            f"the adapter in {directory} does not fit the {type(model).__name__}: {len(odd)} tensors are only in "
            f"one of them, such as {odd[0]!r}"
        )
    return made.eval()


def require_peft() -> None:
    """
    Raises:
        ConfigError: PEFT is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as e:
        raise ConfigError("adapters are those of PEFT, which is not installed: pip install peft") from e


def _lora_config(model: nn.Module, adapter: Mapping[str, LowRank]) -> Any:
    """What PEFT needs to know of the adapter: B·A counts as it is, so that alpha is the rank everywhere."""
    from peft import LoraConfig

    if not adapter:
        raise ConfigError("the adapter is empty: quantize with gptq_config(adapter_rank=16, calibration=…)")
    parameters, modules = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_modules())
    for name, pair in adapter.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        wanted = (*pair.B.shape[:-1], pair.A.shape[-1])
        if shape not in (wanted, (*wanted[:-2], *wanted[:-3:-1])):
            raise ConfigError(
                f"the adapter has {name!r} {list(wanted)}, the {type(model).__name__} "
                + ("has no such weight" if shape is None else f"has {list(shape)} there")
                + ": give the model that was quantized with it"
            )
    stacks = [name for name, pair in adapter.items() if _is_stack(pair)]
    layers = [name.removesuffix(".weight") for name, pair in adapter.items() if not _is_stack(pair)]
    # PEFT takes a name for every name that ends with it.
    clear = all(m in layers for m in modules if any(m.endswith("." + name) for name in layers))
    # A pattern for a parameter works, but PEFT warns that it did not.
    usual = Counter(adapter[name].rank for name in stacks or adapter).most_common(1)[0][0]
    pattern = {
        "^" + re.escape(name if _is_stack(pair) else name.removesuffix(".weight")): pair.rank
        for name, pair in adapter.items()
        if pair.rank != usual
    }
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=layers if clear else "|".join(re.escape(name) for name in layers),
        target_parameters=stacks or None,
        fan_in_fan_out=not stacks and all(not isinstance(modules[name], nn.Linear) for name in layers),
        task_type="CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
    )


def _state(model: nn.Module, adapter: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The tensors by the names that PEFT saves them under."""
    state = {}
    for name, pair in adapter.items():
        layer, a, b = name.removesuffix(".weight"), pair.A, pair.B
        if _is_stack(pair):
            layer, _, own = name.rpartition(".")
            # One wrapper around the module for each of its stacks, the last one outermost.
            stacks = [p for p, _ in model.get_submodule(layer).named_parameters(recurse=False)]
            later = [p for p in stacks[stacks.index(own) + 1 :] if f"{layer}.{p}" in adapter]
            layer += ".base_layer" * len(later)
            # [E·r, K] and [N, r·E]: of A an expert has adjacent rows, of B every E-th column.
            a, b = a.flatten(end_dim=1), b.permute(1, 2, 0).flatten(start_dim=1)
        state[f"base_model.model.{layer}.lora_A.weight"] = a.contiguous()
        state[f"base_model.model.{layer}.lora_B.weight"] = b.contiguous()
    return state


def _is_stack(pair: LowRank) -> bool:
    return pair.A.dim() == 3
