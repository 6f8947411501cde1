"""How far a long call has come: told to the caller's function, or drawn as a bar where stderr is a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from tqdm import tqdm

__all__ = ["Progress", "Steps"]

Progress = Callable[[int, int, str, float], None]
"""`progress(stage, of, name, seconds)`, called whenever a stage is done: its number, counted from 1, of how many, what
it was, and the seconds since the first one began. What it raises ends the call that it was given to."""


class Steps:
    """Some steps, one after the other. To be used in a `with` statement, and each step in one of its own."""

    def __init__(self, progress: Progress | None, of: int, unit: str, *, quiet: bool = False) -> None:
        self._progress, self._of, self._done = progress, of, 0
        self._begin = time.perf_counter()
        # disable=None: no bar unless on a terminal.
        self._bar = tqdm(total=of, unit=unit, disable=True if quiet or progress is not None else None, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One of them. A step that fails is not counted."""
        self._bar.set_description(name)
        yield
        self._done += 1
        self._bar.update()
        if self._progress is not None:
            self._progress(self._done, self._of, name, time.perf_counter() - self._begin)
