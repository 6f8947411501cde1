"""Host memory that is free again goes back to the system.

glibc keeps freed blocks of up to 32 MiB for later. Tensors are aligned, and for aligned blocks it often finds no fit
among those it keeps: unpacking weight after weight, its heap grows to several times what is in use.
"""

import ctypes
import functools
from collections.abc import Callable

__all__ = ["return_freed_memory"]


def return_freed_memory() -> None:
    """Takes about a millisecond. Does nothing where the C library is another one."""
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    # Not glibc: malloc_trim is missing there, or the program itself cannot be opened as a library.
    except (AttributeError, OSError, TypeError):
        return lambda _: 0
    return trim
