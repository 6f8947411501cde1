"""Fuse the projections of one activation: q, k and v, gate and up become one product, with one launch, each.

The results are the same, but for the order in which a kernel sums. What a graph is good for here: it proves that
modules are given the same activation, unchanged in between, whatever the model's code looks like.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptq_ao.batches import read_batches
from gptq_ao.packing import TILE_ROWS
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.find_linears import find_linears
from gptq_ao.passes.records import LinearSite
from gptq_ao.tensor import GroupTensor

__all__ = ["FusedProjections", "Fusion", "fuse_projections_", "unfuse_projections_"]


@dataclass(frozen=True)
class Fusion:
    """What `fuse_projections_` did.

    Attributes:
        fused: names of modules, set by set.
        left: module → why it was left as it is, of those that share their activation with others.
    """

    fused: tuple[tuple[str, ...], ...]
    left: dict[str, str]


class FusedProjections(nn.Module):
    """The weights of several linear layers as one, [sum of out_features, in_features].

    The layer that is called first computes all parts, the others take theirs. A layer that is given another tensor than
    the one the waiting parts were computed from computes all anew: what is called, and in which order, decides how much
    is computed, and never what the result is.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        biases = tuple(layer.bias for layer in layers if layer.bias is not None)
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self.sizes = [layer.out_features for layer in layers]
        self._waiting: tuple[Tensor, list[Tensor | None]] | None = None

    def part(self, x: Tensor, index: int) -> Tensor:
        """x·Wᵀ + bias of one of the layers."""
        waiting = self._waiting
        if waiting is None or waiting[0] is not x or waiting[1][index] is None:
            fresh: list[Tensor | None] = [*F.linear(x, self.weight, self.bias).split(self.sizes, -1)]
            waiting = x, fresh
        parts = waiting[1]
        mine, parts[index] = parts[index], None
        assert mine is not None
        self._waiting = None if all(p is None for p in parts) else waiting
        return mine


class Projection(nn.Module):
    """One of the layers, in its place in the model."""

    def __init__(self, fused: FusedProjections, index: int) -> None:
        super().__init__()
        self.fused, self.index = fused, index

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.part(x, self.index)

    def layer(self) -> nn.Linear:
        """As it was."""
        start = sum(self.fused.sizes[: self.index])
        rows = slice(start, start + self.fused.sizes[self.index])
        weight, bias = self.fused.weight, self.fused.bias
        layer = nn.Linear(weight.shape[1], rows.stop - start, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.detach()[rows], requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach()[rows], requires_grad=False)
        return layer


def fuse_projections_(model: nn.Module, batch: Any) -> Fusion:
    """Replace quantized `nn.Linear` modules that multiply the same activation by parts of one product, in place.

    For inference: the names in `state_dict` change, so save the model before, or after `unfuse_projections_`.

    Args:
        batch: an input of the model, as one batch of calibration data: a tensor, a tuple or a dict.

    Raises:
        CalibrationError, CaptureError: the batch is no input, or the model cannot be captured as one graph.
    """
    (sample,) = read_batches([batch])
    program = capture(model, sample)
    sites, _ = find_linears(canonicalize(program, next(model.parameters()).device))
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    fused, left = [], {}
    for names in _sharing(sites, layers):
        alike: dict[Any, list[str]] = {}
        for name in names:
            why = _unfit(layers[name])
            if why is None:
                alike.setdefault(_kind(layers[name]), []).append(name)
            else:
                left[name] = why
        for same in alike.values():
            if len(same) == 1:
                left[same[0]] = "no other layer with its activation has such a weight"
                continue
            joint = FusedProjections([layers[name] for name in same])
            for index, name in enumerate(same):
                model.set_submodule(name, Projection(joint, index))
            fused.append(tuple(same))
    return Fusion(tuple(fused), left)


def unfuse_projections_(model: nn.Module) -> None:
    """Undo `fuse_projections_`. The layers' weights are then views of what was one weight."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Projection):
            model.set_submodule(name, module.layer())


def _sharing(sites: Sequence[LinearSite], layers: dict[str, nn.Linear]) -> list[list[str]]:
    """Layers that multiply the same rows, each in one place."""
    places: dict[str, list[LinearSite]] = {}
    for site in sites:
        places.setdefault(site.weight.removesuffix(".weight"), []).append(site)
    shared: dict[Any, list[str]] = {}
    for name, [site, *more] in places.items():
        whole = site.part == (0, site.layout.rows) and site.experts == 1
        if name in layers and whole and not more and site.left_out is None:
            shared.setdefault(site.rows, []).append(name)
    return [names for names in shared.values() if len(names) > 1]


def _unfit(layer: nn.Linear) -> str | None:
    if not isinstance(layer.weight, GroupTensor):
        return "it is not quantized"
    if layer.out_features % TILE_ROWS:
        return f"its {layer.out_features} output features are no multiple of {TILE_ROWS}"
    return None


def _kind(layer: nn.Linear) -> Any:
    """Layers that agree in this can be one."""
    w: Any = layer.weight
    order = None if w.perm is None else tuple(w.perm.tolist())
    return type(w), w.group_size, w.dtype, w.device, order, layer.bias is None
