"""Parameters of which each process has a part, as DTensors, and those among them that FSDP2 manages: whole values, and
another parameter in place of one, in the same parts.

This is all that is known here of the inside of FSDP2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.errors import PassError

__all__ = ["Cut", "FsdpParameters", "cuts_of", "in_parts", "is_in_parts", "local_part", "whole_value"]


def is_in_parts(t: Tensor) -> bool:
    return hasattr(t, "_local_tensor")


def local_part(t: Tensor) -> Tensor:
    """What this process has of it; `t` itself if that is all."""
    part: Tensor = getattr(t, "_local_tensor", t)
    return part


def whole_value(t: Any) -> Tensor:
    """All of it, on the device that the processes exchange tensors on; each has to ask for it."""
    value: Tensor = t.detach().to(t.device_mesh.device_type).full_tensor()
    return value


@dataclass(frozen=True)
class Cut:
    """Into equal parts along a dimension, of which this process has number `index`; or each of so many equal `groups`,
    such as the weights that one is made of."""

    dim: int
    parts: int
    index: int
    groups: int = 1

    def of(self, whole: Tensor) -> Tensor:
        pieces = [group.chunk(self.parts, self.dim)[self.index] for group in whole.chunk(self.groups, self.dim)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)


def cuts_of(t: Any) -> tuple[Cut, ...]:
    """How the part of this process is cut out of the whole, one cut after the other."""
    mesh, place = t.device_mesh, t.device_mesh.get_coordinate()
    return tuple(
        Cut(p.dim % t.dim(), mesh.size(axis), place[axis], getattr(p, "split_factor", 1))
        for axis, p in enumerate(t.placements)
        if hasattr(p, "dim") and mesh.size(axis) > 1
    )


def in_parts(whole: Tensor, like: Any) -> Tensor:
    """`whole`, which all processes have, cut as another tensor is.

    Raises:
        PassError: a quantized one would not stay packed.
    """
    from torch.distributed.tensor import DTensor

    part = whole
    for cut in cuts_of(like):
        part = cut.of(part)
    part = part.clone()  # not a view of all of it
    if type(part) is not type(whole):
        raise PassError(f"{whole!r} does not stay packed in the parts {like.placements}")
    made = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    # Which is on the mesh's kind of device now; parts that FSDP2 offloads are not.
    return made.to(local_part(like).device)


class FsdpParameters:
    """Those of a model that FSDP2 (`fully_shard`) manages: beside the module's parameter it has what it makes of it,
    which has to change with it. They are gathered no longer (`reshard`)."""

    def __init__(self, model: nn.Module) -> None:
        self._managed: dict[tuple[int, str], Any] = {}
        self._before: dict[int, tuple[Any, dict[str, Any]]] = {}
        for module in model.modules():
            if not hasattr(module, "_get_fsdp_state"):
                continue
            state: Any = module._get_fsdp_state()  # type: ignore[operator]
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for managed in (p for group in groups if group is not None for p in group.fsdp_params):
                where = managed._module_info
                owners = [(where.module, where.param_name)]
                owners += zip(where.shared_modules, where.shared_param_names, strict=True)
                # The table, not the module, of which there may be a copy without wrappers.
                self._managed |= {(id(m._parameters), name): managed for m, name in owners}
            module.reshard()  # type: ignore[operator]

    def dim(self, model: nn.Module, name: str) -> int | None:
        """The dimension along which FSDP2 has cut a parameter; None: it does not manage it."""
        managed = self._managed.get(self._key(model, name))
        return None if managed is None else managed.fsdp_placement.dim

    def replace(self, model: nn.Module, name: str, new: nn.Parameter, *, keep: bool) -> None:
        """The parameter `name`, under all its names. `keep`: what is replaced, to be restored; if not, nothing is."""
        managed = self._managed[self._key(model, name)]
        if keep:
            self._before.setdefault(id(managed), (managed, dict(vars(managed))))
        else:
            self._before.clear()
        managed._setattr_on_modules(new)
        managed._sharded_param_data = local_part(new)  # whose memory would be compared, were it dense
        managed.reset_sharded_param()  # as after loading a checkpoint: it takes the one that the module has
        managed._init_extensions()  # what is gathered are now several tensors
        managed.all_gather_outputs = []
        vars(managed).pop("_unsharded_param", None)

    def restore(self) -> None:
        """As they were before the first was replaced; the parameters of the modules are not its business."""
        for managed, attributes in self._before.values():
            vars(managed).clear()
            vars(managed).update(attributes)

    @staticmethod
    def _key(model: nn.Module, name: str) -> tuple[int, str]:
        prefix, _, leaf = name.rpartition(".")
        return id(model.get_submodule(prefix)._parameters), leaf
