"""A report's plots, as SVG with text that takes the page's colour. They need matplotlib, the extra `report`."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING, Any

from gptq_ao.presentation.facts import Facts
from gptq_ao.presentation.layers import depth_of, kind_of, short_kinds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["can_plot", "plots"]

# Distinguishable for all kinds of eyes, on white and on black; each series has a marker of its own, too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a6fd0", "#808080")
_MARKERS = "osD^vPX*"
_INK = "#010203"  # stands for the colour of the page's text
_OTHER = "other kinds"

Series = Mapping[str, Sequence[tuple[float, float]]]


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plots(facts: Facts) -> dict[str, str]:
    """Title → SVG, of what there is something to plot of."""
    weights = facts["layers"]
    wanted: list[tuple[str, Series, Callable[[Axes], None], bool]] = [
        ("Error along the layers, by kind", _by_depth(weights, "error"), _labels("layer", "error", log=True), True),
        ("Bits chosen against sensitivity", _sensitivity(facts), _sensitivity_axes, False),
        ("Calibration rows of experts", _expert_rows(weights), _labels("layer", "rows"), True),
        ("Damping", _by_depth(weights, "damp"), _labels("layer", "share of the mean diagonal"), True),
        ("Seconds by phase", _seconds(facts), lambda axes: _phases(axes, facts), False),
    ]
    with _quiet():
        return {
            title: _svg(title, series, axes, lines) for title, series, axes, lines in wanted if any(series.values())
        }


def _by_depth(weights: Sequence[Facts], what: str) -> Series:
    """The mean of each layer, by kind."""
    found: dict[str, dict[int, list[float]]] = {}
    for kind, w in _with_kinds(weights):
        depth = depth_of(w["name"])
        if depth is not None and w[what]:  # a logarithm has no place for zero
            found.setdefault(kind, {}).setdefault(depth, []).append(w[what])
    return {
        kind: [(depth, sum(values) / len(values)) for depth, values in sorted(of_kind.items())]
        for kind, of_kind in found.items()
    }


def _with_kinds(weights: Sequence[Facts]) -> list[tuple[str, Facts]]:
    """Each with its kind, of which there are as many as can be told apart."""
    of = [kind_of(w["name"]) for w in weights]
    short = short_kinds(of)
    shown = [*short][: len(_COLOURS) if len(short) <= len(_COLOURS) else len(_COLOURS) - 1]
    return [(short[kind] if kind in shown else _OTHER, w) for kind, w in zip(of, weights, strict=True)]


def _expert_rows(weights: Sequence[Facts]) -> Series:
    """The fewest, the median and the most of each layer: of stacks the rows of each expert; where experts are modules
    of their own, those of their weights."""
    of_layer: dict[int, list[int]] = {}
    for w in weights:
        alone = [w["rows"]] if ".experts." in w["name"] and w["stage"] else []
        of_layer.setdefault(depth_of(w["name"]) or 0, []).extend(w["expert_rows"] or alone)
    rows = {depth: values for depth, values in sorted(of_layer.items()) if values}
    of: dict[str, Callable[[list[int]], float]] = {"most": max, "median": median, "fewest": min}
    return {name: [(depth, choose(values)) for depth, values in rows.items()] for name, choose in of.items()}


def _sensitivity(facts: Facts) -> Series:
    found: dict[str, list[tuple[float, float]]] = {}
    for kind, unit in _with_kinds([{**unit, "name": unit["names"][0]} for unit in facts["precision"]]):
        fewest = min(unit["choices"], key=lambda choice: choice["bits"])
        harm = fewest["cost"] / max(unit["weights"], 1) * 1e6
        if harm > 0:
            found.setdefault(kind, []).append((harm, unit["bits"]))
    return found


def _sensitivity_axes(axes: "Axes") -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_plain)
    axes.set_yticks([2, 3, 4, 8, 16], ["2", "3", "4", "8", "16"])
    axes.set_xlabel("expected harm at the fewest bits, nats per million weights")
    axes.set_ylabel("bits")


def _plain(value: float, position: float) -> str:
    return f"{value:g}"


def _labels(x: str, y: str, *, log: bool = False) -> "Callable[[Axes], None]":
    def label(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_plain)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return label


def _seconds(facts: Facts) -> Series:
    measured = [(float(i), s) for i, s in enumerate(facts["seconds"].values())]
    predicted = (facts.get("plan") or {}).get("seconds", {})
    expected = [(i, predicted[phase]) for i, phase in enumerate(facts["seconds"]) if phase in predicted]
    return {"measured": measured, **({"planned": expected} if expected else {})}


def _phases(axes: "Axes", facts: Facts) -> None:
    phases = [*facts["seconds"]]
    axes.set_xticks(range(len(phases)), phases)
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.2)


def _svg(title: str, series: Series, finish: "Callable[[Axes], None]", lines: bool) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "svg.fonttype": "none",  # text as text
        "svg.hashsalt": title,  # ids that are the same each time, and not those of another plot
        "text.parse_math": False,  # a name with a $ is a name
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.15,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
        "grid.color": _INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for number, (label, points) in enumerate(series.items()):
            x, y = zip(*points, strict=True)
            joined = "-" if lines else ""
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
            axes.plot(x, y, label=label, linestyle=joined, linewidth=1, markersize=5, color=colour, marker=marker)
        finish(axes)
        if len(series) > 1:
            figure.legend(frameon=False, fontsize="small", loc="outside right upper")
        written = io.StringIO()
        no_facts_of_this_machine = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=no_facts_of_this_machine)
    text = written.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, nothing is said of letters that a font does not have: the browser will have one that does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
