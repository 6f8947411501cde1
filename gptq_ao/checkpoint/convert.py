"""From a quantized checkpoint in one format to one in another. The weights stay what they are."""

from pathlib import Path

from gptq_ao.checkpoint.engines import engine_named
from gptq_ao.checkpoint.files.find import find_checkpoint
from gptq_ao.checkpoint.files.output_directory import disk_errors
from gptq_ao.checkpoint.files.side_files import copy_side_files
from gptq_ao.checkpoint.formats import DENSE, format_of, target_format
from gptq_ao.checkpoint.load import load_quantized
from gptq_ao.checkpoint.save import save_quantized
from gptq_ao.presentation.files import FACTS, FOLDER, PAGE, is_report
from gptq_ao.report import Report

__all__ = ["convert_checkpoint"]


def convert_checkpoint(
    source: Path,
    out: Path,
    format: str,
    *,
    report: Report | None = None,
    trust_remote_code: bool = False,
    engine: str | None = None,
) -> str:
    """Read `source`, a directory or the id of a model on the hub, and write the directory `out`, with all files that
    are not weights; or, as GGUF, the file `out`.

    Args:
        format: name of the new format, as `save_quantized` takes it.
        report: of how `source` was made, for the model card.
        trust_remote_code: whether to run code that came with the checkpoint, if that is what makes the model.
        engine: what is to serve it, as `save_quantized` takes it.

    Returns:
        The format of `source`.

    Raises:
        CheckpointError: `source` cannot be read, `format` cannot hold the model, or `out` cannot be written.
        ConfigError: there is no such format or engine.
    """
    target_format(format)  # before a model is loaded in vain
    if engine is not None:
        engine_named(engine)
    directory = find_checkpoint(source, code=trust_remote_code, whole=True)
    found = format_of(directory)
    model = load_quantized(directory, trust_remote_code=trust_remote_code)
    save_quantized(model, out, format=format, report=report, engine=engine)
    # The weights are what they were, so what is said of them holds.
    if out.is_dir() and is_report(directory / FOLDER):
        with disk_errors(out / FOLDER):
            there = {name: path for name in (FACTS, PAGE) if (path := directory / FOLDER / name).is_file()}
            copy_side_files(there, out / FOLDER)
    return DENSE if found is None else found.name
