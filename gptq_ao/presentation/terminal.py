"""A report in a terminal, as wide as that is."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gptq_ao.presentation.facts import Facts, amount, concerns, kinds, number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["rendering"]

# A column is left out where the terminal is narrower than this.
_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("shape", "right", 90),
    ("bits", "right", 0),
    ("group", "right", 100),
    ("method", "left", 110),
    ("stage", "right", 120),
    ("rows", "right", 80),
    ("damp", "right", 110),
    ("error", "right", 0),
)
_MOST = 8  # lines of one concern: the file and the page have all of them


def rendering(facts: Facts, width: int) -> "Iterator[RenderableType]":
    """What rich prints. Names are never read as its markup."""
    from rich.text import Text

    yield _weights(facts["layers"], width)
    yield _kinds(facts["layers"])
    for concern in concerns(facts):
        more = len(concern.lines) - _MOST
        lines = [*concern.lines[:_MOST], *([f"… and {more} more"] if more > 0 else [])]
        yield Text(f"{concern.what}:", style="bold yellow" if concern.grave else "bold")
        yield Text("\n".join(f"  {line}" for line in lines))
    yield Text(
        f"{facts['weights']} weights in {facts['stages']} stages, {amount(facts['original_bytes'])} → "
        f"{amount(facts['bytes'])}, {facts['bits_per_weight']:.3f} bits per weight"
    )
    yield Text(", ".join(f"{phase} {s:.1f} s" for phase, s in facts["seconds"].items()))


def _weights(weights: Any, width: int) -> "Table":
    table = _table("weight", [(name, how) for name, how, least in _COLUMNS if width >= least])
    shown = [str(column.header) for column in table.columns[1:]]
    for w in weights:
        cells = {
            "shape": "x".join(map(str, w["shape"])),
            "bits": str(w["bits"]),
            "group": str(w["group_size"]),
            "method": w["method"],
            "stage": str(w["stage"]),
            "rows": str(w["rows"]),
            "damp": number(w["damp"], ".4f"),
            "error": number(w["error"]),
        }
        _add(table, w["name"], [cells[name] for name in shown])
    return table


def _kinds(weights: Any) -> "Table":
    table = _table("kind of layer", [("weights", "right"), ("bits", "right"), ("mean error", "right")])
    for k in kinds(weights):
        _add(table, k.kind, [str(k.count), ", ".join(map(str, k.bits)), number(k.mean)])
    return table


def _table(first: str, others: list[tuple[str, Any]]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name, how in others:
        table.add_column(name, justify=how, no_wrap=True)
    return table


def _add(table: "Table", name: str, cells: list[str]) -> None:
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in (name, *cells)))
