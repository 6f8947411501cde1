"""Whether and how the weights of a quantized checkpoint land in the model that `from_pretrained` builds.

transformers initializes at random whatever it finds no values for, which is right for a new head on a trained body, and
wrong for a checkpoint whose names are not those of the model.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gptq_ao.checkpoint.files.directory import read_json
from gptq_ao.checkpoint.formats import QuantizedFiles
from gptq_ao.checkpoint.source import Source
from gptq_ao.errors import CheckpointError

__all__ = ["check_landing", "keep_stored_dtypes", "keep_untied"]


def keep_stored_dtypes(directory: Path, files: QuantizedFiles, model: Any) -> None:
    """Load tensors of the native format as they are stored, of several dtypes perhaps, as `load_quantized` does; unless
    the caller asks for another dtype than that of the checkpoint.

    Args:
        model: on the meta device.
    """
    config = read_json(directory / "config.json")
    stored = config.get("dtype", config.get("torch_dtype"))
    # Formats of other libraries are loaded in one dtype, as those do it.
    if files.format.hub_names or stored != str(model.config.dtype).removeprefix("torch."):
        return
    parameters = dict(model.named_parameters())
    for name, tensor in files.tensors.items():
        if (parameter := parameters.get(name)) is not None and parameter.dtype != tensor.dtype:
            # Not a new Parameter: other names may lead to it.
            parameter.data = torch.empty_like(parameter, dtype=tensor.dtype)


def keep_untied(source: Source) -> None:
    """Two weights that are both stored, one of them quantized, are not tied, whatever the config says: transformers
    would compare them as if they were dense."""
    ties: dict[str, str] = source.model.all_tied_weights_keys  # type: ignore[assignment]
    made = source.conversions
    for a, b in list(ties.items()):
        if a in made and b in made and made[a] != made[b] and (made[a][0].quantized or made[b][0].quantized):
            del ties[a]


def check_landing(directory: Path, files: QuantizedFiles, source: Source) -> None:
    """Another class than the one that was saved may lack weights of its head, and leave the other head's alone.

    Raises:
        CheckpointError: the model would have random weights where the checkpoint was meant to have values.
    """
    model: Any = source.model
    missing = _missing(source)
    if not missing:
        return
    used = {key for conversion, _ in source.conversions.values() for _, key, _ in conversion.inputs}
    stray = [name for name in files.weights if name not in used]
    saved = read_json(directory / "config.json").get("architectures")
    # Names of the body that do not fit: its own, or those that a headed model gives it.
    body = {model.base_model_prefix, *model.base_model._modules}
    misnamed = [name for name in stray if name.partition(".")[0] in body]
    if saved == [type(model).__name__] or misnamed or len(stray) == len(files.weights):
        has = f", and has {(misnamed or stray)[0]!r}, which the model does not" if stray else ""
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{directory} does not fit the {type(model).__name__}: it lacks {missing[0]!r}{more}{has}. It was saved as "
            f"{', '.join(map(str, saved or ['an unnamed class']))}: load it as that, or save it again from the model"
        )


def _missing(source: Source) -> list[str]:
    """Parameters without values, except for those that the model's class declares to be fine."""
    model: Any = source.model
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = model.all_tied_weights_keys
    # `conversions` has all names of a parameter that is tied by now; some are tied only when they are loaded.
    found = set(source.conversions)
    found |= {target for target, origin in tied.items() if origin in found}
    found |= {origin for target, origin in tied.items() if target in found}
    info = SimpleNamespace(missing_keys=names - found, unexpected_keys=set())
    model._adjust_missing_and_unexpected_keys(info)
    return sorted(info.missing_keys)
