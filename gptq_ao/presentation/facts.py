"""What is read from a report's facts more than once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptq_ao.presentation.layers import kind_of, short_kinds

__all__ = ["Concern", "KindSummary", "amount", "concerns", "kinds", "number"]

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Concern:
    """Something to look at before the rest.

    Attributes:
        what: in a few words, what kind of thing.
        lines: each of them.
        grave: whether somebody who uses the result may be harmed by it.
    """

    what: str
    lines: tuple[str, ...]
    grave: bool = True


def concerns(facts: Facts) -> list[Concern]:
    """What is not as one might expect, the gravest first; none that is empty."""
    reason = facts.get("capture_reason")
    found = [
        Concern("not as good as it has to be", tuple((facts.get("quality") or {}).get("missed", ()))),
        Concern("warnings", tuple(facts.get("warnings", ()))),
        Concern("rounded or solved otherwise", tuple(f"{n}: {why}" for n, why in facts.get("fallbacks", {}).items())),
        Concern("tensors that are not saved", tuple(facts.get("lost", ()))),
        Concern("left as they are", tuple(f"{n}: {why}" for n, why in facts.get("excluded", {}).items()), False),
        Concern("not captured as one graph", () if reason is None else (reason,), False),
        Concern("notes", tuple(facts.get("notes", ())), False),
    ]
    return [concern for concern in found if concern.lines]


@dataclass(frozen=True)
class KindSummary:
    """Weights of one kind: how many, their bits, and the mean and the largest of their errors with the weight that has
    it; None where no error is known."""

    kind: str
    count: int
    bits: tuple[int, ...]
    mean: float | None
    largest: float | None
    worst: str


def kinds(weights: Sequence[Facts]) -> list[KindSummary]:
    """In the order of their first weights."""
    of_kind: dict[str, list[Facts]] = {}
    for w in weights:
        of_kind.setdefault(kind_of(w["name"]), []).append(w)
    short = short_kinds(of_kind)
    found = []
    for kind, members in of_kind.items():
        known = [w for w in members if w["error"] is not None]
        worst = max(known, key=lambda w: w["error"], default=None)
        mean = sum(w["error"] for w in known) / len(known) if known else None
        bits = tuple(sorted({w["bits"] for w in members}))
        largest, name = (None, "") if worst is None else (worst["error"], worst["name"])
        found.append(KindSummary(short[kind], len(members), bits, mean, largest, name))
    return found


def amount(size: float) -> str:
    """Bytes, readable."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def number(value: float | None, form: str = ".2e") -> str:
    """Empty for what is not known."""
    return "" if value is None or not math.isfinite(value) else f"{value:{form}}"
