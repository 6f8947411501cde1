"""Fuse the projections of one activation: q, k and v, gate and up become one product, with one launch, each.

The results are the same, but for the order in which a kernel sums. What a graph is good for here: it proves that
modules are given the same activation, unchanged in between, whatever the model's code looks like.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gptq_ao.calibration.batches import read_batches
from gptq_ao.codes.tiles import TILE_ROWS
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.find_linears import find_linears
from gptq_ao.passes.records import LinearSite
from gptq_ao.tensor import GroupTensor
from gptq_ao.tensor.fused import FusedProjections, Projection

__all__ = ["Fusion", "fuse_projections_", "unfuse_projections_"]


@dataclass(frozen=True)
class Fusion:
    """What `fuse_projections_` did.

    Attributes:
        fused: names of modules, set by set.
        left: module → why it was left as it is, of those that share their activation with others.
    """

    fused: tuple[tuple[str, ...], ...]
    left: dict[str, str]


def fuse_projections_(model: nn.Module, batch: Any) -> Fusion:
    """Replace quantized `nn.Linear` modules that multiply the same activation by parts of one product, in place.

    For inference: the names in `state_dict` change, so save the model before, or after `unfuse_projections_`.

    Args:
        batch: an input of the model, as one batch of calibration data: a tensor, a tuple or a dict.

    Raises:
        CalibrationError, CaptureError: the batch does not fit the model, or that cannot be captured as one graph.
    """
    (sample,) = read_batches([batch])
    program = capture(model, sample)
    # The graph knows which products have one activation. The modules that own their weights are then replaced in the
    # model.
    sites, _ = find_linears(canonicalize(program, next(model.parameters()).device))
    # `type(m) is`, not isinstance: a subclass may compute something else.
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    fused, left = [], {}
    for names in _sharing(sites, layers):
        # q may differ from k and v (bits by a rule, say): those that agree are still fused.
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
    # A list first: the modules are replaced while they are gone through.
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
        # A site may multiply only some rows of a weight, or be one of several experts.
        whole = site.part == (0, site.layout.rows) and site.experts == 1
        # `more`: the layer is called in several places, perhaps with another activation each time.
        if name in layers and whole and not more and site.left_out is None:
            shared.setdefault(site.rows, []).append(name)
    return [names for names in shared.values() if len(names) > 1]


def _unfit(layer: nn.Linear) -> str | None:
    if not isinstance(layer.weight, GroupTensor):
        return "it is not quantized"
    # Parts have to be whole tiles for the fused weight to be cut again without a copy.
    if layer.out_features % TILE_ROWS:
        return f"its {layer.out_features} output features are not a multiple of {TILE_ROWS}"
    return None


def _kind(layer: nn.Linear) -> Any:
    """Layers that agree in this can be one."""
    w: Any = layer.weight
    # The values of `perm`: one weight has one order of columns.
    order = None if w.perm is None else tuple(w.perm.tolist())
    return type(w), w.group_size, w.dtype, w.device, order, layer.bias is None
