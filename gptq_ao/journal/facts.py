"""What has to be the same for a run to go on where another one ended, and what differs."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptq_ao.solver import solve
from gptq_ao.version import VERSION

__all__ = ["differences", "versions"]

PACKAGE = Path(solve.__file__).parents[1]
# What decides the codes and scales.
SOLVER = (
    "solver/*.py",
    "codes/grid.py",
    "kernels/columns.py",
    "kernels/refinement.py",
    "kernels/triton/columns.py",
    "kernels/triton/refinement.py",
)
_MISSING = "nothing"  # no fact: None is one, such as a rule that leaves a weight out


def versions() -> dict[str, Any]:
    """Of what computes."""
    # The files themselves: whoever changes one cannot forget to count on.
    sources = [path for pattern in SOLVER for path in sorted(PACKAGE.glob(pattern))]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {"gptq_ao": VERSION, "code of the solver": f"sha256 {code}", "torch": torch.__version__}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """A line for each of the facts, of which some are themselves of several, that is not what it was."""
    found = []
    for name in dict.fromkeys((*before, *now)):
        old, new = (facts.get(name, _MISSING) for facts in (before, now))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{where}{name}: ")
        elif old != new:
            found.append(f"{where}{name} was {_short(old)}, and is {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    if re.fullmatch(r"(sha256 )?[0-9a-f]{64}", text):
        return f"{text[:-52]}…"  # twelve digits tell digests apart
    return text if len(text) <= 80 else f"{text[:77]}…"
