"""Model + batches → what `find_linears` finds in a graph, for a model that has none: its forwards are run and watched.

Every batch runs once, before anything is changed: experts and branches that only some of the data reaches are found,
and so is a batch that the model cannot take. The order in which weights are solved later is settled here as well.
"""

import itertools
from collections.abc import Collection
from typing import Any

import networkx as nx
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gptq_ao.calibration.batches import Batch
from gptq_ao.passes.products.lookups import check_rows
from gptq_ao.passes.products.operators import ATTENTION, CHOICES, EMBEDDINGS
from gptq_ao.passes.records import Excluded, LinearSite, Part, Rows
from gptq_ao.passes.replay.products import Parameters, Problem, Use, Watch, multiplies, operator_name

__all__ = ["ProductFinder"]

_NONE: frozenset[str] = frozenset()


class ProductFinder(Watch):
    """A mode under which the batches run, one after the other, between `start_batch` and `end_batch`.

    Attributes:
        embedded: parameters that were looked up by index.
        routers: parameters whose product was ranked (top-k, argmax) before anything else was multiplied.
    """

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        self.embedded: set[str] = set()
        self.routers: set[str] = set()
        self._parameters = parameters
        self._uses: dict[Part, LinearSite] = {}
        self._problems = dict(parameters.unreadable)
        self._read_by: dict[str, set[str]] = {}
        self._order = nx.DiGraph()  # of parts, as each batch reaches them
        self._reached: dict[Part, None] = {}  # in this batch
        self._activations: Any = WeakTensorKeyDictionary()  # tensor → version → number
        self._count = itertools.count(1)
        self._found: Use | list[Problem] = []  # in the call that is being made
        # Tensor → whether it depends on the batch; → the weights whose product it follows from, with nothing multiplied
        # since; → the parameters that it was computed from, if it does not depend on the batch.
        self._data: Any = WeakTensorKeyDictionary()
        self._product_of: Any = WeakTensorKeyDictionary()
        self._made_of: Any = WeakTensorKeyDictionary()

    def start_batch(self, batch: Batch, where: str = "the batch") -> None:
        self._where = where
        self._data = WeakTensorKeyDictionary(dict.fromkeys(batch.tensors(), True))

    def end_batch(self) -> None:
        # An edge from each part to the one that was reached next.
        nx.add_path(self._order, self._reached)
        self._reached = {}

    def before(self, func: Any, args: Any, kwargs: Any) -> None:
        self._found = self._parameters.find(func, args, kwargs)
        if operator_name(func) in EMBEDDINGS:
            self.embedded |= self._names((args, kwargs))
            self._check_rows([t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
        if isinstance(self._found, Use):
            self._note(self._found)
        else:
            for problem in self._found:
                self._exclude(problem)

    def after(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        results = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        if not results or getattr(func, "__name__", "") == "__get__":
            return
        # Three facts pass from operands to results, as in a graph they would along its edges: see `__init__`.
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        data = any(t in self._data for t in inputs)
        static = _NONE.union(*map(self._static, inputs))
        product = _NONE.union(*(self._product_of.get(t, _NONE) for t in inputs))
        operator = operator_name(func)
        # Before `product` is reset below: what counts is what led to this call.
        if operator in CHOICES:
            self.routers |= product
        if isinstance(self._found, Use):
            product = frozenset((self._found.part.weight,))
        else:
            if multiplies(func):
                for name in _NONE.union(*(self._made_of.get(t, _NONE) for t in inputs)):
                    self._exclude(Problem(name, f"{_name(func)} multiplies by what is computed from it"))
            # Another weight takes part: what is chosen from here on is chosen by more than the first product.
            if static or multiplies(func) or operator in ATTENTION:
                product = _NONE
            if operator not in EMBEDDINGS:
                # A result in the parameter's own memory is only a view: nobody has read it yet.
                for name in self._names(inputs) - self._names(results):
                    self._read_by.setdefault(name, set()).add(_name(func))
        for t in results:
            if data:
                self._data[t] = True
            # Views need no entry, their memory says what they are.
            elif static and self._parameters.name_of(t) is None:
                self._made_of[t] = static
            if product:
                self._product_of[t] = product

    def sites(self) -> tuple[LinearSite, ...]:
        """In the order in which to solve them: a weight comes after all that some batch met before it. Where batches
        disagree (experts, in an order that depends on the data), the first batch decides."""
        # The order in which parts were first met, over all batches.
        first = {part: i for i, part in enumerate(self._uses)}
        # Batches that disagree make a cycle of parts. Condensed, each cycle is one node, and the rest can be sorted.
        cycles = nx.condensation(self._order)
        members = {n: sorted(data["members"], key=first.__getitem__) for n, data in cycles.nodes(data=True)}
        order = nx.lexicographical_topological_sort(cycles, key=lambda n: first[members[n][0]])
        return tuple(self._uses[p] for n in order for p in members[n] if p.weight not in self._problems)

    def excluded(self, found: Collection[str]) -> tuple[Excluded, ...]:
        """All matrices that are not in `found`, with the reason."""
        result = []
        for name in self._parameters.shapes:
            if name in found:
                continue
            if name in self._problems:
                result.append(Excluded(name, self._problems[name], expected=False))
            elif name in self.embedded:
                result.append(Excluded(name, "embedding table", expected=True))
            elif name in self._read_by:
                readers = ", ".join(sorted(self._read_by[name]))
                result.append(Excluded(name, f"not a matrix of a product, used by {readers}", expected=True))
            else:
                result.append(Excluded(name, "not used by the forward of any calibration batch", expected=True))
        return tuple(result)

    @property
    def seen(self) -> set[str]:
        """Parameters that were read in any way."""
        return {p.weight for p in self._uses} | self._problems.keys() | self._read_by.keys() | self.embedded

    def _check_rows(self, tensors: list[Tensor]) -> None:
        """The index and the table, in either order; a bag's offsets and weights follow."""
        for table, index in itertools.permutations(tensors[:2], 2):
            name = self._parameters.name_of(table)
            if name is not None and not index.is_floating_point():
                check_rows(index, table.shape[0], 0, name, None, self._where)

    def _note(self, use: Use) -> None:
        self._reached.setdefault(use.part)
        known = self._uses.get(use.part)
        if known is None:
            # A range of rows not seen before: does it fit the other ranges of its weight?
            for other in self._uses.values():
                if other.weight == use.part.weight:
                    self._compare(other, use)
            rows = Rows(self._activation(use.activation), use.arrange)
            where = f"{use.part.weight}[{use.part.start}:{use.part.stop}]"
            self._uses[use.part] = LinearSite(
                use.part.weight, where, use.layout, (use.part.start, use.part.stop), (rows,), use.experts, use.note
            )
        elif (known.layout, known.experts) != (use.layout, use.experts):
            self._compare(known, use)

    def _compare(self, a: LinearSite, b: Use) -> None:
        """A parameter has one layout, and its rows are multiplied in ranges that are the same or apart."""
        if a.layout != b.layout:
            self._exclude(Problem(a.weight, "its products read it in two ways"))
        elif a.experts != b.experts or (a.part[0] < b.part.stop and b.part.start < a.part[1]):
            ranges = f"{a.part[0]}:{a.part[1]} and {b.part.start}:{b.part.stop}"
            self._exclude(Problem(a.weight, f"rows {ranges} of it are multiplied apart from each other"))

    def _exclude(self, problem: Problem) -> None:
        self._problems.setdefault(problem.weight, problem.reason)

    def _activation(self, x: Tensor) -> str:
        """A name for a tensor's values: another one once it was written to. Tensors of inference mode do not count
        writes, so each use of one gets a new name."""
        versions = self._activations.setdefault(x, {})
        version = None if x.is_inference() else x._version
        if version is None or version not in versions:
            versions[version] = next(self._count)
        return f"activation {versions[version]}"

    def _names(self, values: Any) -> set[str]:
        return {n for v in pytree.tree_leaves(values) if (n := self._parameters.name_of(v)) is not None}

    def _static(self, t: Tensor) -> frozenset[str]:
        """The parameter that a tensor is, or those that it was made of."""
        name = self._parameters.name_of(t)
        return self._made_of.get(t, _NONE) if name is None else frozenset((name,))


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func)).strip("_")
