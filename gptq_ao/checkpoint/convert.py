"""From a quantized checkpoint in one format to one in another. The weights stay what they are."""

import shutil
from pathlib import Path

from gptq_ao.checkpoint.files.paths import confined
from gptq_ao.checkpoint.formats import DENSE, format_of, target_format
from gptq_ao.checkpoint.load import load_quantized
from gptq_ao.checkpoint.save import save_quantized
from gptq_ao.errors import CheckpointError

__all__ = ["convert_checkpoint"]

# Files of a tokenizer or processor. They are taken over as they are: nothing in them depends on the weights.
_SIDE_FILES = ("*token*", "vocab*", "merges.txt", "chat_template*", "*processor_config.json", "spiece.model")


def convert_checkpoint(source: Path, out: Path, format: str) -> str:
    """Read the directory `source` and write the directory `out`, with the tokenizer's files.

    Args:
        format: name of the new format, as `save_quantized` takes it.

    Returns:
        The format of `source`.

    Raises:
        CheckpointError: `source` cannot be read, `format` cannot hold the model, or `out` cannot be written.
        ConfigError: there is no such format.
    """
    target_format(format)  # before a model is loaded in vain
    found = format_of(source)
    save_quantized(load_quantized(source), out, format=format)
    for pattern in _SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            # The patterns are wide: code (*.py) of a checkpoint is never taken over, nor is what `save_quantized` has
            # written.
            if file.suffix in (".json", ".txt", ".model", ".jinja") and not (out / file.name).exists():
                try:
                    shutil.copyfile(confined(source, file.name), out / file.name)
                except OSError as e:
                    raise CheckpointError(f"{file} could not be copied to {out}: {e}") from e
    return DENSE if found is None else found.name
