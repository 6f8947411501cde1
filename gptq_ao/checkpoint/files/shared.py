"""A directory that processes on several machines see, on a file system that they share."""

import os
import secrets
import shutil
import time
from pathlib import Path

from gptq_ao.distributed.ranks import Ranks
from gptq_ao.errors import CheckpointError

__all__ = ["shared_directory"]

_PROOF = "seen-by-all"  # a file with a number that no other directory has
_PATIENCE = 10.0  # seconds that a network file system may take to show what another machine has written


def shared_directory(made: Path | None, beside: Path, ranks: Ranks) -> Path:
    """Where each rank finds the directory that the first has `made`.

    Args:
        beside: a directory above it, under the name that it has on this machine.

    Raises:
        CheckpointError: a rank does not see it. It is removed then.
    """
    if made is not None and ranks.size == 1:
        return made
    number = secrets.token_hex(16)
    if made is not None:
        (made / _PROOF).write_text(number, encoding="utf-8")
    where, number = ranks.tell([None if made is None else os.path.relpath(made, beside), number])[0]
    place = beside / where
    seen = ranks.tell(_holds(place / _PROOF, number))
    if made is not None:
        (made / _PROOF).unlink()
    if not all(seen):
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        blind = ", ".join(str(rank) for rank, there in enumerate(seen) if not there)
        raise CheckpointError(
            f"every rank is to write its shards into {place}, and rank {blind} does not see there what rank 0 has "
            "written: name a directory of a file system that all machines share, or let rank 0 write all "
            '(output_sharding="first")'
        )
    return place


def _holds(path: Path, text: str) -> bool:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            if path.read_text(encoding="utf-8") == text:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
