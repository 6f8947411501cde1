"""A report as one page of HTML, with all that it needs in it: nothing is fetched.

Whatever comes from a model or from messages passes through `_text`, and scripts other than ours do not run.
"""

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from gptq_ao.presentation.facts import Facts, amount, concerns, kinds, number
from gptq_ao.presentation.layers import kind_of

__all__ = ["page"]

NO_PLOTS = "Plots need matplotlib: pip install 'gptq_ao[report]', then gptq-ao report OUT writes this page again."
Cell = tuple[str, str | float | None]
"""What is shown, and what it is sorted by; None: by what is shown."""


def page(facts: Facts, plots: Mapping[str, str]) -> str:
    """
    Args:
        facts: what `read_report` returns.
        plots: title → SVG; without any, the page says what they need.
    """
    about = files("gptq_ao.presentation")
    style, script = (about.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # By its digest, so that a script that came with a name would not run.
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{known}'; base-uri 'none'"
    )
    name = facts.get("model") or ""
    title = "Quantization report" + (f": {name}" if name else "")
    sections = [
        _totals(facts),
        _concerns(facts),
        _quality(facts),
        _costs(facts),
        _diagnosis(facts),
        _plots(plots),
        _kinds(facts),
        _precision(facts),
        _weights(facts),
        _recipe(facts),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<link rel="icon" href="data:,">',
            f"<title>{_text(title)}</title>",
            f"<style>{style}</style></head>",
            f"<body><header><h1>{_text(title)}</h1>",
            f'<p class="muted">Written by gptq_ao {_text(facts.get("gptq_ao", ""))}</p></header><main>',
            *(section for section in sections if section),
            f"</main><script>{script}</script></body></html>\n",
        ]
    )


def _totals(facts: Facts) -> str:
    before, after = facts["original_bytes"], facts["bytes"]
    smaller = f" ({before / after:.2f} times smaller)" if after else ""
    pairs = {
        "quantized weights": str(facts["weights"]),
        "stored bits per weight": f"{facts['bits_per_weight']:.3f}",
        "size of these weights": f"{amount(before)} → {amount(after)}{smaller}",
        "stages": str(facts["stages"]),
        "rounded or solved otherwise": str(len(facts["fallbacks"])),
        "warnings": str(len(facts["warnings"])),
    }
    boxes = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in pairs.items())
    return f'<dl class="totals">{boxes}</dl>'


def _concerns(facts: Facts) -> str:
    found = []
    for concern in concerns(facts):
        lines = "".join(f"<li>{_text(line)}</li>" for line in concern.lines)
        how = ' class="grave" open' if concern.grave else ""
        found.append(
            f"<details{how}><summary>{_text(concern.what)} ({len(concern.lines)})</summary><ul>{lines}</ul></details>"
        )
    return _section("What to look at first", "".join(found) or "<p>Nothing: no warning, no fallback.</p>")


def _quality(facts: Facts) -> str:
    rows: list[list[Cell]] = [[(k, None), (number(v, ".5g"), v)] for k, v in facts["measured"].items()]
    return _section("Measured", _table("", "What was measured of the quantized model", ["what", "value"], rows))


def _costs(facts: Facts) -> str:
    planned = facts.get("plan") or {}
    headings = ["phase", "seconds", *(["planned"] if planned else [])]
    seconds = [_row(k, s, planned.get("seconds", {}).get(k), planned, lambda s: f"{s:.1f}") for k, s in _timed(facts)]
    memory = [_row(k, n, planned.get("peak_bytes", {}).get(k), planned, amount) for k, n in facts["peak_bytes"].items()]
    tables = _table("", "Time", headings, seconds) + _table(
        "", "Memory", ["at most in", "bytes", *headings[2:]], memory
    )
    return _section("Time and memory", f'<div class="plots">{tables}</div>')


def _timed(facts: Facts) -> list[tuple[str, float]]:
    return [*facts["seconds"].items(), ("in all", sum(facts["seconds"].values()))]


def _row(name: str, measured: float, expected: float | None, planned: Facts, show: Any) -> list[Cell]:
    cells: list[Cell] = [(name, None), (show(measured), measured)]
    return [*cells, ("" if expected is None else show(expected), expected)] if planned else cells


def _diagnosis(facts: Facts) -> str:
    found = facts.get("diagnosis")
    if not found:
        return ""
    rows: list[list[Cell]] = [
        [
            (each["what"], None),
            (of, None),
            (str(each["bits"]), None),
            (number(each["kl"], ".5f"), each["kl"]),
            (number(found["kl"] - each["kl"], ".5f"), None),
        ]
        for of in ("kinds", "layers", "weights")
        for each in found[of]
    ]
    places: list[list[Cell]] = [
        [(f"{p['start']} to {p['stop'] - 1}", None), (number(p["kl"], ".5f"), None)] for p in found["positions"]
    ]
    names = ("before", "token", "original", "quantized")
    # As Python writes them: a token may be nothing but a line break.
    worst: list[list[Cell]] = [
        [*((repr(w[name]), None) for name in names), (number(w["kl"], ".3f"), None)] for w in found["worst"]
    ]
    advice = (found["advice"] or {}).get("text", "no weight gains enough within the bits that may be added")
    body = f"<p>KL {_text(number(found['kl'], '.5f'))} over {_text(found['tokens'])} predictions.</p>"
    body += f"<p><strong>Advice</strong>: {_text(advice)}</p>"
    one_by_one = "KL with some weights at a time as in the original"
    body += _table("restored", one_by_one, ["as in the original", "one of the", "bits", "KL", "less by"], rows)
    body += _table("", "By position in the text", ["tokens before", "KL"], places)
    return _section("Diagnosis", body + _table("", "Worst predictions", [*_WORST, "KL"], worst))


_WORST = ("after", "came", "original says", "quantized says")


def _plots(plots: Mapping[str, str]) -> str:
    if not plots:
        return f'<p class="muted">{_text(NO_PLOTS)}</p>'
    figures = (
        f'<figure><div role="img" aria-label="{_text(title)}. The numbers are in the table of all weights.">{svg}</div>'
        f"<figcaption>{_text(title)}</figcaption></figure>"
        for title, svg in plots.items()
    )
    return _section("Plots", f'<div class="plots">{"".join(figures)}</div>')


def _kinds(facts: Facts) -> str:
    rows: list[list[Cell]] = [
        [
            (k.kind, None),
            (str(k.count), k.count),
            (", ".join(map(str, k.bits)), None),
            (number(k.mean), k.mean),
            (number(k.largest), k.largest),
            (k.worst, None),
        ]
        for k in kinds(facts["layers"])
    ]
    headings = ["kind of layer", "weights", "bits", "mean error", "largest", "of"]
    return _section("By kind of layer", _table("kinds", "Relative output errors", headings, rows))


def _precision(facts: Facts) -> str:
    units = facts["precision"]
    if not units:
        return ""
    bits = sorted({choice["bits"] for unit in units for choice in unit["choices"]})
    rows: list[list[Cell]] = []
    for unit in units:
        costs = {choice["bits"]: choice["cost"] for choice in unit["choices"]}
        first, more = unit["names"][0], len(unit["names"]) - 1
        rows.append(
            [
                (first + (f" +{more}" if more else ""), None),
                (str(unit["weights"]), unit["weights"]),
                (str(unit["bits"]), unit["bits"]),
                *((number(costs.get(b)), costs.get(b)) for b in bits),
            ]
        )
    headings = ["weights that share their bits", "numbers", "bits chosen", *(f"harm at {b} bits" for b in bits)]
    caption = "Expected harm, in nats per token, for each candidate"
    return _section("Automatic precision", _table("precision", caption, headings, rows))


def _weights(facts: Facts) -> str:
    rows: list[list[Cell]] = [
        [
            (w["name"], None),
            (kind_of(w["name"]).rpartition(".")[2], None),
            ("x".join(map(str, w["shape"])), math.prod(w["shape"])),
            (str(w["bits"]), None),
            (str(w["group_size"]), None),
            (w["method"], None),
            (str(w["stage"]), None),
            (str(w["rows"]), None),
            (number(w["damp"], ".4f"), None),
            (str(w["dead"]), None),
            (number(w["error"]), None),
            (amount(w["bytes"]), w["bytes"]),
            (w["fallback"] or "", None),
        ]
        for w in facts["layers"]
    ]
    headings = [
        "weight",
        "kind",
        "shape",
        "bits",
        "group",
        "method",
        "stage",
        "rows",
        "damping",
        "dead inputs",
        "error",
    ]
    caption = "All quantized weights, in the order in which they were solved. A heading sorts."
    return _section("Weights", _table("weights", caption, [*headings, "error", "size", "fallback"], rows))


def _recipe(facts: Facts) -> str:
    rows: list[list[Cell]] = [[(key, None), (value, None)] for key, value in facts["recipe"].items()]
    return _section("How it was made", _table("", "Settings and data", ["what", "value"], rows))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>" if body else ""


# Columns of text, but for the first, which is one anyway.
_WORDS = ("of", "fallback", "kind", "value", "one of the", "came", "original says", "quantized says")


def _table(name: str, caption: str, headings: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Sorted and filtered by our script, if it has a name; nothing if it has no rows."""
    rows = list(rows)
    if not rows:
        return ""
    words = [i == 0 or heading in _WORDS for i, heading in enumerate(headings)]
    sides = [' class="words"' if is_words else "" for is_words in words]
    label = (lambda h: f'<button type="button">{_text(h)}</button>') if name else _text
    head = "".join(f'<th scope="col"{s}>{label(h)}</th>' for h, s in zip(headings, sides, strict=True))
    body = "".join(f"<tr>{''.join(_cell(i, c, sides[i]) for i, c in enumerate(row))}</tr>" for row in rows)
    inner = f"<caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    if not name:
        return f'<div class="scroll"><table>{inner}</div>'
    return (
        f'<div class="filter"><label for="filter-{name}">Filter</label>'
        f'<input id="filter-{name}" data-table="{name}" type="search" placeholder="words in any column">'
        f'<output class="muted" for="filter-{name}"></output></div>'
        f'<div class="tall" tabindex="0" role="region" aria-label="{_text(caption)}">'
        f'<table class="sortable" id="{name}">{inner}</div>'
    )


def _cell(column: int, cell: Cell, side: str) -> str:
    shown, sorts = cell
    value = "" if sorts is None else f' data-value="{_text(str(sorts))}"'
    return (
        f'<th scope="row"{side}{value}>{_text(shown)}</th>' if column == 0 else f"<td{side}{value}>{_text(shown)}</td>"
    )


def _text(value: str) -> str:
    return escape(str(value))
