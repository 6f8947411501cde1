"""Rows → docs/supported-models.md."""

import platform
import re
from collections.abc import Iterable

import torch

from .entry import Row

__all__ = ["page"]

_HEAD = """# Supported models

There is no list of supported models in the code: the pass looks at operators, not at classes. This page says what was
tried. Each model is built small, with random weights, from its configuration class, and quantized to 4 bits on the
CPU; the table is written by `make families` ({versions}).

* **weights**: parameters quantized, of those that the model multiplies with activations. Which these are is found by
  watching the operators of a forward, independently of the pass. Output heads, weights that are also an embedding
  table, routers and depthwise convolutions are left out by default and do not count, nor does a layer whose result is
  not used.
* **exact**: the quantized model, run eagerly, equals the graph it was calibrated on bit for bit, on every batch.
* **generates**: `generate` with a key-value cache works afterwards.
* **path**: how the model was captured. `export`: as one graph, by torch.export. `replay`: it cannot be one graph (the
  reason is given), and its forwards were replayed instead.

"""


def page(rows: Iterable[Row]) -> str:
    """The whole page; kinds in the order in which they first appear."""
    rows = list(rows)
    kinds = list(dict.fromkeys(r.kind for r in rows))
    lines = [_HEAD.format(versions=_versions())]
    lines += [
        "| | tried | built | captured as one graph | all weights quantized | exact |",
        "|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        lines.append(f"| {kind} | {_counts([r for r in rows if r.kind == kind])} |")
    lines.append(f"| together | {_counts(rows)} |")
    for kind in kinds:
        lines += [f"\n## {kind[0].upper()}{kind[1:]}\n"]
        lines += [
            "| | weights | Hessians | stages | exact | generates | path | notes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(r) for r in rows if r.kind == kind]
    return "\n".join(lines) + "\n"


def _counts(rows: list[Row]) -> str:
    built = [r for r in rows if not r.problem.startswith("not built")]
    counts = (
        len(rows),
        len(built),
        sum(r.path == "export" for r in built),
        sum(bool(r.quantized) and not r.missed for r in built),
        sum(r.difference == 0.0 for r in built),
    )
    return " | ".join(map(str, counts))


def _line(row: Row) -> str:
    exact = {None: "", 0.0: "yes"}.get(row.difference, f"to {row.difference:.0e}" if row.difference else "")
    generates = {None: "", True: "yes", False: "no"}[row.generates]
    weights = f"{row.quantized}/{row.expected}" if row.expected else ""
    numbers = f"{row.hessians or ''} | {row.stages or ''}"
    return f"| {row.name} | {weights} | {numbers} | {exact} | {generates} | {row.path} | {_notes(row)} |"


def _notes(row: Row) -> str:
    left = ", ".join(reason if n == 1 else f"{reason} ({n})" for reason, n in row.left_out.items())
    by_reason: dict[str, list[str]] = {}
    for name, reason in row.missed.items():
        by_reason.setdefault(reason, []).append(name)
    missed = [
        f"not quantized: `{names[0]}`" + (f" and {len(names) - 1} more" if names[1:] else "") + f": {reason}"
        for reason, names in by_reason.items()
    ]
    fallbacks = [f"{row.without_data} rounded to nearest or solved with pooled rows"] if row.without_data else []
    problem = [_short(text) for text in (row.problem, row.reason) if text]
    notes = "; ".join([*problem, *missed, *([f"left out: {left}"] if left else []), *fallbacks])
    return " ".join(notes.replace("|", "\\|").split())


def _short(message: str) -> str:
    """What happened, and at which line of which file: without advice and without the path to it."""
    what = message.partition("What to do:")[0].strip()
    return re.sub(r"at \S*/([^/]+\.py:\d+)", r"at \1", what)


def _versions() -> str:
    import transformers

    torch_version = torch.__version__.partition("+")[0]
    return f"torch {torch_version}, transformers {transformers.__version__}, Python {platform.python_version()}"
