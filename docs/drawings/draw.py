"""The drawings of docs/concepts.md, made of what the code does: python docs/drawings/draw.py

A test compares the files with what this makes now.
"""

from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_ao import gptq_config
from gptq_ao.codes.tiles import pack_codes
from gptq_ao.model.weights import ModelWeights
from gptq_ao.planning.job import Job
from gptq_ao.planning.prepare import Prepared, prepare

FOLDER = Path(__file__).parent
# A background of their own, so that they can be read on any page; dark where the reader's system is.
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1b1f24; } .small { font-size: 11px; } .light { fill: #57606a; }
.middle { text-anchor: middle; } .page { fill: #ffffff; stroke: #d0d7de; } .box { fill: #f0f2f5; stroke: #8c959f; }
.weight { fill: #d7e8ff; stroke: #2f6fc4; } .mark { fill: #ffe3b8; stroke: #b06a00; }
.line { stroke: #57606a; fill: none; } .cut { stroke: #b06a00; stroke-dasharray: 5 4; fill: none; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .light { fill: #9da7b3; } .page { fill: #14181d; stroke: #3d444d; }
.box { fill: #262c34; stroke: #6e7681; } .weight { fill: #173a66; stroke: #5b9bea; }
.mark { fill: #5a3c0a; stroke: #e0a030; } .line { stroke: #9da7b3; } .cut { stroke: #e0a030; }
}
"""


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<defs><marker id="tip" '
        'viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" '
        f'fill="#808890"/></marker></defs>\n<rect class="page" x="0.5" y="0.5" width="{width - 1}" '
        f'height="{height - 1}" rx="8"/>\n{body}\n</svg>\n'
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box", round: int = 5) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round}" class="{kind}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    middle = (y1 + y2) / 2
    return (
        f'<path class="line" marker-end="url(#tip)" d="M{x1:g} {y1:g}C{x1:g} {middle:g} {x2:g} {middle:g} '
        f'{x2:g} {y2:g}"/>'
    )


def prepared(model: nn.Module, batch: torch.Tensor) -> Prepared:
    """What `quantize_` knows before the first weight changes."""
    return prepare(Job.of(ModelWeights(model), gptq_config(4, 32, calibration=[batch])))


def graph(model: nn.Module, batch: torch.Tensor) -> str:
    """The graph of a model that maps [..., 64] to [..., 64], with its stages."""
    done = prepared(model, batch)
    assert done.found is not None
    assert done.calibrated is not None
    weights = {site.node: site.weight for site in done.found.sites}
    names = {**done.found.program.parameters}
    read = {node.name for node in done.found.program.graph.nodes if node.name in names}
    hidden = {node for node in read if names[node] in weights.values() or names[node].endswith("bias")}
    nodes = [node for node in done.found.program.graph.nodes if node.name not in hidden]

    levels: dict[Any, int] = {}
    for node in nodes:
        levels[node] = max((levels[n] + 1 for n in node.all_input_nodes if n in levels), default=0)
    constant: set[Any] = set()
    for node in nodes:
        if node.name in names or (node.op == "call_function" and set(node.all_input_nodes) <= constant):
            constant.add(node)
    for node in reversed(nodes):
        if node in constant:  # just before it is used
            levels[node] = min(levels[user] for user in node.users) - 1
    # Below its first input, or beside that where something is already.
    cells: dict[tuple[int, int], Any] = {}
    for node in sorted(nodes, key=lambda n: n in constant):
        free = 1 + max((column for _, column in cells), default=-1) if node.name in names else 0
        cell = (levels[node], min((c for (_, c), n in cells.items() if n in node.all_input_nodes), default=free))
        while cell in cells:
            cell = (cell[0], cell[1] + 1)
        cells[cell] = node
    step, wide, tall, across = 68, 116, 36, 132
    width = 24 + across * (1 + max(column for _, column in cells)) + 196
    place = {node.name: (24 + across * column, 46 + step * row) for (row, column), node in cells.items()}
    parts = [text(24, 28, "one operation of the graph each; blue: multiplies a weight", "small light")]
    for number, stage in enumerate(done.calibrated.plan.stages, 1):
        for shared in stage.inputs:
            x, y = place[shared.rows[0].value]
            solved = ", ".join(part.weight for part in shared.parts)
            below = y + tall + 9
            parts += [
                f'<path class="cut" d="M24 {below:g}H{width - 24}"/>',
                box(width - 186, y + 1, 162, tall - 2, "mark"),
                text(width - 105, y + 15, f"Hessian of stage {number}, for", "middle small"),
                text(width - 105, y + 29, solved, "middle small"),
                f'<path class="cut" d="M{x + wide:g} {y + tall / 2:g}H{width - 186}"/>',
            ]
    for node in nodes:
        x, y = place[node.name]
        for source in node.all_input_nodes:
            if source.name in place:
                a, b = place[source.name]
                parts.append(arrow(a + wide / 2, b + tall, x + wide / 2, y))
    for node in nodes:
        x, y = place[node.name]
        kind = {"placeholder": "parameter" if node.name in names else "input", "output": "output"}.get(node.op)
        kind = kind or node.target.__name__.split(".")[0]
        name = weights.get(node.name) or names.get(node.name, "")
        parts += [
            box(x, y, wide, tall, "weight" if node.name in weights else "box"),
            text(x + wide / 2, y + (15 if name else 22), kind, "middle"),
        ]
        if name:
            parts.append(text(x + wide / 2, y + 30, name, "middle small"))
    return svg(width, 46 + step * max(row for row, _ in cells) + tall + 24, "A graph, cut before each stage", parts)


def tile() -> str:
    """Of a tile of 16 rows by 64 columns of 4 bits: its first 16 columns, the lanes, and the word of one of them."""
    index = torch.arange(16 * 64).view(16, 64)
    # Where each code goes, found by packing the digits of its number.
    digits = [pack_codes((index >> shift & 15).to(torch.uint8), 4)[0].view(32, 4) for shift in (0, 4, 8)]
    places = [sum(((d >> 4 * place) & 15) << 4 * i for i, d in enumerate(digits)) for place in range(8)]
    step, chosen, cell, left, top = 0, 6, 26, 64, 74
    lane_of = {int(p[lane, step]): (lane, place) for lane in range(32) for place, p in enumerate(places)}
    parts = [
        text(24, 30, "4 bits: the first 16 of a tile's 64 columns"),
        text(24, 48, f"number: the lane of the warp that multiplies with it; orange: lane {chosen}", "small light"),
    ]
    for row in range(16):
        parts.append(text(left - 8, top + cell * row + 18, f"{row}", "small light end"))
        for column in range(16):
            lane, _ = lane_of[64 * row + column]
            x, y = left + cell * column, top + cell * row
            shade = "mark" if lane == chosen else "weight" if (row // 8 + column // 8) % 2 else "box"
            parts += [box(x, y, cell, cell, shade, 0), text(x + cell / 2, y + 17, f"{lane}", "middle small")]
    for column in range(16):
        parts.append(text(left + cell * (column + 0.5), top - 6, f"{column}", "middle small light"))
    y = top + cell * 16 + 44
    parts.append(
        text(24, y - 14, f"int32 word 0 of lane {chosen}: row, column of each 4 bits, the lowest at the right")
    )
    for place, codes in enumerate(places):
        row, column = divmod(int(codes[chosen, step]), 64)
        x = 24 + 58 * (7 - place)
        parts += [box(x, y, 58, 30, "mark", 0), text(x + 29, y + 20, f"{row}, {column}", "middle small")]
    return svg(512, y + 54, "Codes of 4 bits in a tile", parts).replace(
        "</style>", ".end { text-anchor: end; }</style>"
    )


STEPS = (
    ("capture", "torch.export: the model as one graph", "passes/capture.py"),
    ("observe", "batches run up to the stage; XᵀX of its inputs", "passes/calibrate.py"),
    ("solve", "GPTQ: codes and scales from W and XᵀX", "gptq_ao/solver/solve.py"),
    ("pack", "codes in tiles: the parameter's new value", "gptq_ao/tensor/group_tensor.py"),
)


def stage() -> str:
    parts = []
    for i, (name, what, where) in enumerate(STEPS):
        y = 24 + 84 * i
        parts += [
            box(24, y, 320, 58, "weight" if i else "box"),
            text(40, y + 19, name),
            text(40, y + 35, what, "small"),
            text(40, y + 50, where, "small light"),
        ]
        if i:
            parts.append(arrow(184, y - 26, 184, y))
    back, first, last = 400, 24 + 84 + 29, 24 + 84 * 3 + 29
    parts += [
        f'<path class="line" marker-end="url(#tip)" d="M344 {last}H{back}V{first}H346"/>',
        text(back + 10, (first + last) / 2 - 12, "next stage:", "small"),
        text(back + 10, (first + last) / 2 + 3, "the batches go on", "small"),
        text(back + 10, (first + last) / 2 + 18, "from where they are,", "small"),
        text(back + 10, (first + last) / 2 + 33, "on quantized weights", "small"),
    ]
    return svg(544, 24 + 84 * 4, "A stage: observe, solve, pack; then the next one", parts)


def block() -> tuple[nn.Module, torch.Tensor]:
    """The model that docs/concepts.md begins with, and a batch of it."""
    page = (FOLDER.parent / "concepts.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("\nblock = ")[0]
    namespace: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, "concepts.md", "exec"), namespace)
    return namespace["Block"](), torch.randn(8, 20, 64, generator=torch.Generator().manual_seed(0))


DRAWINGS: dict[str, Callable[[], str]] = {"graph.svg": lambda: graph(*block()), "tile.svg": tile, "stage.svg": stage}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
