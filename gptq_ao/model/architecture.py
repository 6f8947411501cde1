"""Which class a model is of, by the word of its config.json."""

from pathlib import Path
from typing import Any

from gptq_ao.errors import CheckpointError

__all__ = ["model_class", "read_config"]


def read_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The config of the model in a directory.

    Raises:
        CheckpointError: there is none, or none that transformers can read.
    """
    import transformers

    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} has no config.json, so the model cannot be built from it: build it yourself and call "
            "load_quantized(model, directory)"
        )
    try:
        return transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError) as e:
        raise CheckpointError(f"{directory / 'config.json'} cannot be read by transformers: {e}") from e


def model_class(config: Any, directory: Path) -> Any:
    """The class that the config names. Not a causal language model if it names another: that would be a part of it.

    Raises:
        CheckpointError: transformers does not have it.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    # Only a class of transformers itself: a name in a config must not lead to code that came with the checkpoint.
    kind: Any = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not (isinstance(kind, type) and hasattr(kind, "_from_config")):
        raise CheckpointError(
            f"{directory / 'config.json'} names the architecture {names}, which transformers "
            f"{transformers.__version__} does not have (code in a checkpoint is never run): build the model and call "
            "load_quantized(model, directory)"
        )
    return kind
