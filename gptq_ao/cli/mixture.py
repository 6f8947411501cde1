"""What `--calibration` names, and how much of each."""

import os
import re

from gptq_ao.cli.request import Request
from gptq_ao.errors import ConfigError

__all__ = ["mixture"]

_WEIGHTED = re.compile(r"(?P<source>.+)=(?P<weight>[^=]*)")


def mixture(request: Request) -> tuple[tuple[str, ...], list[float]]:
    """The sources and their weights, which are 1 where none is given.

    Raises:
        ConfigError: a weight is no number above 0, or some sources have one and others not.
    """
    parts = [_part(text) for text in request.calibration or ()]
    if len({weight is None for _, weight in parts}) > 1:
        without = next(source for source, weight in parts if weight is None)
        raise ConfigError(f"--calibration {without} has no weight, and others have one: give {without}=WEIGHT")
    return tuple(source for source, _ in parts), [1.0 if weight is None else weight for _, weight in parts]


def _part(text: str) -> tuple[str, float | None]:
    # A file may have any name.
    found = None if os.path.exists(text) else _WEIGHTED.fullmatch(text)
    if found is None:
        return text, None
    source = found["source"]
    if "=" in source and not os.path.exists(source):
        raise ConfigError(
            f"--calibration {text}: one source in each, --calibration c4=0.7 --calibration text.jsonl=0.3"
        )
    try:
        weight = float(found["weight"])
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise ConfigError(f"--calibration {text}: {found['weight']!r} is no weight: give a number above 0")
    return source, weight
