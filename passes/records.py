"""What the passes hand to one another. Read from top to bottom, this is the program.

    model + batch → Program → LinearSite* → Selection → Plan(Stage*, Segment*) → Hessian → … → the model, quantized

Records are frozen: a pass returns a new one. A value's name (`str`) is the name of its node in `Program.module.graph`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from gptq_ao.calibration.batches import Batch
from gptq_ao.codes.packed_spec import PackedSpec
from gptq_ao.config import GPTQConfig
from gptq_ao.errors import CalibrationError
from gptq_ao.passes.size_conditions import check_sizes, static_size
from gptq_ao.recipe import Recipe

__all__ = [
    "Excluded",
    "Layout",
    "LinearSite",
    "Part",
    "Plan",
    "Program",
    "Rows",
    "Segment",
    "Selection",
    "SharedInput",
    "Stage",
    "dim",
    "static_size",
    "twin",
    "twin_of",
]


@dataclass(frozen=True)
class Program:
    """A model as one graph, in which every parameter, buffer and constant is a placeholder.

    Attributes:
        module: the graph; nodes carry fake tensors in `meta["val"]`.
        parameters, buffers: placeholder name to the name in the model.
        constants: placeholder name to value.
        inputs: placeholder names of the flattened inputs, in order; None where an input is not a tensor.
        literals: position among the flattened inputs to the value, for those that are not inputs of the graph.
        spec: the structure of (args, kwargs).
        keywords: the order of kwargs in `spec`.
        ranges: symbol of a size to the smallest and the largest value the graph is valid for.
        guards: conditions (SymPy) over the same symbols that the graph relies on: the branches that the model took.
        outputs: the name of each output in the dict (or transformers' `ModelOutput`) that holds it, None elsewhere.
        repeated: how many layers were not traced, but are copies of the nodes of one like them.
    """

    module: fx.GraphModule
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    constants: Mapping[str, Any]
    inputs: tuple[str | None, ...]
    literals: Mapping[int, Any]
    spec: pytree.TreeSpec
    keywords: tuple[str, ...]
    ranges: Mapping[Any, tuple[float, float]]
    guards: tuple[Any, ...] = ()
    outputs: tuple[str | None, ...] = ()
    repeated: int = 0

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def bind(self, batch: Batch, where: str) -> dict[str, torch.Tensor]:
        """The batch's tensors by placeholder name.

        Raises:
            CalibrationError: the batch has another structure than the one captured, or sizes the graph does not cover.
        """
        if set(batch.kwargs) != set(self.keywords):
            raise CalibrationError(
                f"{where} has the inputs {sorted(batch.kwargs)}, the model was captured with {sorted(self.keywords)}: "
                "give every batch the same inputs"
            )
        # In the order of the capture, whatever order this batch's kwargs are in.
        flat, spec = pytree.tree_flatten((batch.args, {k: batch.kwargs[k] for k in self.keywords}))
        if spec != self.spec:
            raise CalibrationError(f"{where} has the structure {spec}, the model was captured with {self.spec}")
        bound = {}
        for position, (name, value) in enumerate(zip(self.inputs, flat, strict=True)):
            if name is not None:
                bound[name] = value
            elif not _same(value, self.literals[position]):
                raise CalibrationError(
                    f"{where}: input {position} is {value!r}, the model was captured with "
                    f"{self.literals[position]!r}, which is fixed in the graph. Give every batch that value"
                )
        placeholders = self.placeholders
        fakes = {name: placeholders[name].meta["val"] for name in bound}
        check_sizes(fakes, bound, self.ranges, self.guards, where)
        return bound

    @property
    def placeholders(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.graph.find_nodes(op="placeholder")}


_TWIN = "original__"


def twin(name: str) -> str:
    """The name of what the value `name` would be if nothing were quantized, see `follow_original.py`."""
    return _TWIN + name


def twin_of(name: str) -> str | None:
    """The inverse of `twin`; None for any other name."""
    return name.removeprefix(_TWIN) if name.startswith(_TWIN) else None


def dim(node: Any) -> int:
    """Number of dimensions of the tensor a node stands for; 0 for anything else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _same(value: Any, literal: Any) -> bool:
    if isinstance(value, torch.Tensor) and isinstance(literal, torch.Tensor):
        return torch.equal(value, literal.to(value.device))
    return bool(value == literal)


@dataclass(frozen=True)
class Layout:
    """How a parameter is read as one matrix [rows, in_features].

    A stack of matrices (experts) is read as one tall matrix: GPTQ rounds the rows independently of each other, so
    experts differ in nothing but the Hessian of their rows.

    Attributes:
        shape: of the parameter.
        stack: how many matrices it holds.
        out_features, in_features: of one matrix.
        transposed: whether a matrix is stored as [in_features, out_features].
    """

    shape: tuple[int, ...]
    stack: int
    out_features: int
    in_features: int
    transposed: bool

    @property
    def rows(self) -> int:
        return self.stack * self.out_features

    @property
    def stacked(self) -> bool:
        """Whether the parameter has the shape of a stack, rather than of a single matrix."""
        return self.shape in ((self.stack, *self._matrix), (self.stack, *self._matrix[::-1]))

    @property
    def view_shape(self) -> tuple[int, ...] | None:
        """The parameter's shape, if it is neither that of a matrix nor of a stack (a convolution's)."""
        return None if self.stacked or self.shape == self._matrix else self.shape

    @property
    def _matrix(self) -> tuple[int, int]:
        sizes = (self.out_features, self.in_features)
        return sizes[::-1] if self.transposed else sizes

    def packed(self, recipe: Recipe) -> PackedSpec:
        """What the parameter is made of once it is quantized. One that is neither a matrix nor a stack is stored as its
        matrix [rows, in_features], and remembers the parameter's shape."""
        lead = (self.stack, self.out_features) if self.stacked else (self.rows,)
        return PackedSpec.of((*lead, self.in_features), recipe)

    def matrix(self, parameter: torch.Tensor) -> torch.Tensor:
        """[rows, in_features]; a view where the storage allows it."""
        stack = parameter.reshape(self.stack, *self._matrix)
        return (stack.mT if self.transposed else stack).reshape(self.rows, self.in_features)

    def views(self, parameter: torch.Tensor, start: int, stop: int) -> list[torch.Tensor]:
        """Rows `start` to `stop` of the matrix as views [n, in_features] of a contiguous parameter: one for each of the
        stacked matrices that they are in."""
        stack = parameter.view(self.stack, *self._matrix)
        stack = stack.mT if self.transposed else stack
        n = self.out_features
        # i: the matrices that the range touches. Of the first and the last, perhaps only some rows.
        return [stack[i, max(start - i * n, 0) : min(stop - i * n, n)] for i in range(start // n, (stop + n - 1) // n)]


@dataclass(frozen=True)
class Rows:
    """The activation rows that a product multiplies: what a Hessian is made of. Equal ones are shared.

    Attributes:
        value: the node that holds them.
        arrange: function of `products/activation_rows.py`, with its arguments after the value, that brings the rows
            into the form [..., in_features] or, for experts, [experts, ..., in_features]; None where they have it.
        offsets: node with the cumulative number of rows per expert, if the rows are sorted by expert.
        mask: input [batch, position] that is zero where there is padding, or None.
        gathers: nodes of row numbers: row i of the value belongs to position `gathers[-1][i]` of what `gathers[-2]`
            took from …, of the flattened positions of the mask.
    """

    value: str
    arrange: tuple[Callable[..., torch.Tensor], tuple[Any, ...]] | None = None
    offsets: str | None = None
    mask: str | None = None
    gathers: tuple[str, ...] = ()

    @property
    def values(self) -> tuple[str, ...]:
        """All nodes that have to be computed."""
        return tuple(v for v in (self.value, self.offsets, self.mask, *self.gathers) if v is not None)


@dataclass(frozen=True)
class LinearSite:
    """One place in the graph where an activation is multiplied by a parameter, or by some of its rows.

    Attributes:
        weight: the parameter's name in the model.
        node: the name of the multiplication.
        layout: how the product reads the parameter.
        part: (start, stop), the rows of the layout's matrix that it multiplies.
        rows: activation rows that its Hessian is made of: those that it multiplies, as a rule. Sites with the same rows
            share a Hessian.
        experts: number of equal ranges that `part` consists of, each of which multiplies other rows; 1 for an ordinary
            product.
        left_out: reason why it is not quantized unless a rule asks for it, or None.
    """

    weight: str
    node: str
    layout: Layout
    part: tuple[int, int]
    rows: tuple[Rows, ...]
    experts: int = 1
    left_out: str | None = None


HEAD = "output head"  # why a weight stays as it is


@dataclass(frozen=True)
class Excluded:
    """A parameter that stays as it is.

    Attributes:
        expected: whether that is so by default or by a rule; if not, it should be quantized and cannot.
    """

    weight: str
    reason: str
    expected: bool


@dataclass(frozen=True)
class Selection:
    """The sites to quantize and, for each of their weights, the settings; all other matrices with the reason."""

    sites: tuple[LinearSite, ...]
    settings: Mapping[str, GPTQConfig]
    excluded: tuple[Excluded, ...]

    @property
    def layouts(self) -> dict[str, Layout]:
        return {s.weight: s.layout for s in self.sites}


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a weight's matrix (see `Layout`)."""

    weight: str
    start: int
    stop: int


@dataclass(frozen=True)
class SharedInput:
    """Parts of weights that multiply exactly the same rows, hence share a Hessian. With `experts` > 1 every part is
    made of that many equal ranges, and there is one Hessian for each.

    Attributes:
        name: of the observer, unique in the plan.
        rows: what the weights multiply; several if they are applied several times.
        parts: rows of weights, all of a weight's as a rule.
        in_features: size of a Hessian, [in_features, in_features].
        residuals: (part, node) for each part whose output is added to the residual stream `node`, whose error it should
            correct.
    """

    name: str
    rows: tuple[Rows, ...]
    parts: tuple[Part, ...]
    in_features: int
    experts: int = 1
    residuals: tuple[tuple[Part, str], ...] = ()

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p.weight for p in self.parts))

    @property
    def values(self) -> tuple[str, ...]:
        """All nodes that have to be computed."""
        return (*(v for r in self.rows for v in r.values), *(node for _, node in self.residuals))

    def expert(self, index: int) -> tuple[Part, ...]:
        """The parts of one expert."""
        # One expert's range may differ in size from weight to weight.
        sizes = [(p.stop - p.start) // self.experts for p in self.parts]
        return tuple(
            Part(p.weight, p.start + index * n, p.start + (index + 1) * n)
            for p, n in zip(self.parts, sizes, strict=True)
        )


@dataclass(frozen=True)
class Stage:
    """Weights that are solved together, because none of their inputs depends on an output of another of them.

    Attributes:
        entangled: whether some input does, since a weight is applied again to what comes out of it. Then the stage is
            solved on inputs that its own, unquantized weights made.
    """

    inputs: tuple[SharedInput, ...]
    entangled: bool = False


Portion = tuple[range, ...]
"""Of each of a stage's inputs, the experts whose Hessians are in memory at the same time; there may be none. A stage is
observed and solved in one or several portions, which have each expert once."""


@dataclass(frozen=True)
class Segment:
    """The part of the graph that runs between two stages, once per batch; where these are solved in portions, once per
    batch for each.

    Attributes:
        module: takes `reads`, then `statics`, returns the tuple `writes`.
        reads: values from earlier segments or inputs.
        statics: placeholder names of parameters, buffers and constants.
        writes: values computed here that later segments read.
        keeps: all values that later segments read; the rest is dropped afterwards.
    """

    module: fx.GraphModule
    reads: tuple[str, ...]
    statics: tuple[str, ...]
    writes: tuple[str, ...]
    keeps: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What will be solved and what runs in between: `segments[i]` ends at the activations of `stages[i]`, with all
    earlier stages quantized; `tail` leads from the last stage to the model's outputs (calibration does not run it)."""

    stages: tuple[Stage, ...]
    segments: tuple[Segment, ...]
    tail: Segment
    selection: Selection
