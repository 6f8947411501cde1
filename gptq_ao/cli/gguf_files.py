"""GGUF files as what `quantize` reads and writes: one file, where all else is a directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from gptq_ao.cli.options import dtype_of
from gptq_ao.cli.request import Request
from gptq_ao.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from gptq_ao.journal.journal import Journal

__all__ = [
    "GGUF",
    "NO_REPORT",
    "SUFFIX",
    "check_name",
    "check_settings",
    "check_vocabulary",
    "directory_beside",
    "unpacked",
]

GGUF, SUFFIX = "gguf", ".gguf"
NO_REPORT = "no report is written beside a single file: --json prints what was done"


def check_settings(request: Request) -> None:
    """Whether GGUF can hold what would be made."""
    config = request.config
    if request.format != GGUF:
        return
    if config.bits not in (4, 8) or config.target_bits is not None:
        raise ConfigError("--format gguf holds weights of 4 and 8 bits only: write another format")
    if config.bits == 8 and not config.sym:
        raise ConfigError("--format gguf holds no asymmetric weights of 8 bits: write another format, or --sym")
    if config.adapter_rank:
        raise ConfigError("--format gguf has no place for an adapter beside the weights: write another format")


def check_name(out: Path, request: Request) -> None:
    """Whether OUT is called as what it will be. (If an engine is still to choose the format, any name will do.)"""
    if request.format == GGUF and out.suffix != SUFFIX:
        raise ConfigError(f"--format gguf is one file: give a name that ends in {SUFFIX}, not {out}")
    if request.format not in (GGUF, None) and out.suffix == SUFFIX:
        raise ConfigError(f"{out} is the name of a GGUF file: give --format gguf, or another name")


def check_vocabulary(source: Path, request: Request) -> None:
    """Whether llama.cpp has such a model and such a tokenizer, which is known before hours go into it."""
    from gptq_ao.checkpoint.gguf.write import check_gguf
    from gptq_ao.checkpoint.origin import Origin
    from gptq_ao.model.empty import empty_model

    frame = empty_model(source, trust_remote_code=request.trust_remote_code)
    check_gguf(frame, None, Origin.at(source, {}))


@contextmanager
def unpacked(path: Path, request: Request, journal: "Journal | None") -> Iterator[Path]:
    """A directory, for as long as it is needed, with the numbers that the blocks of a GGUF file stand for."""
    from gptq_ao.integrations.gguf import dense_from_gguf, is_gguf

    if not is_gguf(path):
        raise CheckpointError(f"{path} does not exist")
    if journal is None:
        raise ConfigError("a GGUF file is read by one process: start it without torchrun")
    with TemporaryDirectory(dir=journal.growing()) as temporary:
        dense_from_gguf(path, Path(temporary), dtype_of(request.dtype))
        yield Path(temporary)


def directory_beside(out: Path) -> Path:
    """Where a model goes that its format cannot hold: into a directory, which is not called as a GGUF file is."""
    return out.with_suffix("") if out.suffix == SUFFIX else out
