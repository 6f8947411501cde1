"""How a quantized weight is cut into one part for each process, and put together again.

A part has whole tiles of rows (output features), or whole tiles and groups of columns (input features), or some
matrices of a stack. `torch.distributed` must not get anything else: a part that cannot stay packed would be dense
without a word, on some ranks only, and the others would wait for ever. So where `torch.distributed` cuts, all ranks
find the same error, before they talk to each other.
"""

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from gptq_ao.codes.tiles import TILE_ROWS, tile_columns
from gptq_ao.errors import ConfigError
from gptq_ao.kernels import cpu

__all__ = ["Shards", "axis_of", "called_from", "refuse_cut", "refuse_place", "remember_source", "why_uncut", "written"]


class Shards:
    """What `fully_shard` (FSDP2) asks of a tensor: the parts of all ranks are gathered as they are, packed.

    A rank has rows of a matrix, or matrices of a stack, so the whole weight is made of the parts one after the other.
    """

    def fsdp_pre_all_gather(
        self: Any, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """This rank's tensors, and what is needed beside them to make the whole weight.

        The first time, ranks also tell each other what they were cut from.
        """
        tensors = {n: t.contiguous() for n, t in self.tiled().items()}
        # On one rank, and where each has it all (`replicate`), FSDP makes a copy of the first one, and of no others.
        if tuple(self.shape) == tuple(outer_size):
            return (tensors["qdata"],), (self, (), outer_size, False)
        cut_from = _cut_from.pop(_memory(self), None)
        # Always sent, as FSDP allocates once for all times.
        number = torch.tensor([cut_from or 0], dtype=torch.int32, device=self.device)
        return (*tensors.values(), number), (self, tuple(tensors), outer_size, cut_from is not None)

    def fsdp_post_all_gather(
        self: Any, outputs: tuple[Tensor, ...], kept: Any, param_dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        """The whole weight of the gathered `outputs`, of `param_dtype`; or, if `out` has their memory, nothing new.

        Raises:
            ConfigError: the ranks hold parts of different weights.
        """
        part, names, size, to_be_compared = kept
        if to_be_compared and len(set(outputs[-1].tolist())) > 1:
            raise ConfigError(
                f"the ranks hold parts of different weights for {part!r} (of {tuple(size)}): quantize on every rank "
                "with the same calibration data, or load one checkpoint on all"
            )
        if out is not None:
            whole = getattr(out, "_local_tensor", out)  # with tensor parallelism, too, it is inside of a DTensor
            # Memory is filled anew behind autograd's back, for which backward needs what forward had: the same values.
            for name in part.parts().keys() - set(names):
                source, target = getattr(part, name), getattr(whole, name)
                if source.data_ptr() != target.data_ptr():
                    with torch.autograd._unsafe_preserve_version_counter(target):
                        target.copy_(source)
            written(whole)
            return None
        gathered = dict(zip(names, outputs, strict=False))
        rows = part.out_features if part.qdata.dim() > 3 or not names else gathered["qdata"].shape[0] * TILE_ROWS
        shape = None if part.view_shape is None else tuple(size)
        return part.replace(**gathered, out_features=rows, dtype=param_dtype, view_shape=shape), outputs


# Memory of a part that FSDP has made, and not gathered yet → a number that depends on all values of the weight it was
# cut from.
_cut_from: dict[int, int] = {}


def _memory(weight: Any) -> int:
    address: int = weight.qdata.untyped_storage()._cdata
    return address


def remember_source(part: Any, weight: Any) -> None:
    """Keep what ranks compare, for a part of `weight` that is being made."""
    if weight.is_meta:
        return
    # Sums do not tell in which order numbers are; quantizations that differ in this alone do not occur.
    codes, scales = (int(t.sum(dtype=torch.int64)) for t in (weight.qdata, weight.scale_zero))
    _cut_from[_memory(part)] = (codes * 31 + scales) % 2**31


def written(weight: Any) -> None:
    """Forget what is known of the values that a weight had, under any of its aliases: it was overwritten.

    Aliases count their versions each by itself, since they are made below autograd.
    """
    cpu.forget(weight.qdata)
    if not called_from("torch.distributed.fsdp."):  # which copies the part that it makes
        _cut_from.pop(_memory(weight), None)


def axis_of(weight: Any, dim: int) -> str | None:
    """What dimension `dim` of a weight counts: its "rows" (of codes), its "columns", or the matrices of a "stack"."""
    if weight.view_shape is not None:
        # [out, in, height, width]: the matrix [out, in·height·width] in order.
        return "rows" if dim == 0 and not weight.transposed and weight.out_features == weight.view_shape[0] else None
    from_end = weight.dim() - dim
    if from_end > 2:
        return "stack"
    return "rows" if (from_end == 2) != weight.transposed else "columns"


def why_uncut(weight: Any, dim: int, parts: int) -> str | None:
    """Why a weight cannot be cut into equal parts along a dimension, or None."""
    axis, (each, rest) = axis_of(weight, dim), divmod(weight.shape[dim], parts)
    if parts == 1:
        return None
    if axis is None:
        return "its shape is not that of its matrix"
    if rest:
        return f"{weight.shape[dim]} is no multiple of {parts}"
    if axis == "rows" and each % TILE_ROWS:
        return f"codes lie in tiles of {TILE_ROWS} output features, and a part would have {each}"
    if axis == "columns":
        if weight.perm is not None:
            return "its input features are in an order of their own (act_order), of which a part has no whole range"
        if each % tile_columns(weight.bits):
            return f"codes lie in tiles of {tile_columns(weight.bits)} input features, and a part would have {each}"
        if each % weight.group_size and weight.group_size % each:
            return f"{weight.group_size} input features share a scale, and a part would have {each}"
    return None


def refuse_cut(weight: Any, dim: int, parts: int, why: str | None) -> None:
    """Raise what is said above, if `torch.distributed` is the one that cuts.

    Raises:
        ConfigError: it is.
    """
    if not called_from("torch.distributed."):
        return
    into = f"into {parts} equal parts along dimension {dim}" if parts else f"anywhere along dimension {dim}"
    ranks = parts or 2
    raise ConfigError(
        f"{weight!r} cannot be cut {into} and stay packed: {why}. Leave it whole on each rank: fully_shard(…, "
        f"ignored_params=gptq_ao.training.unshardable(model, {ranks})), or no parallel style for its layer"
    )


def refuse_place(weight: Any, size: Any) -> None:
    """Raise, if a part of the shape `size`, which FSDP2 makes, is not some of the first dimension: it would be gathered
    as if it were.

    Raises:
        ConfigError: so it is, by a `shard_placement_fn`; on every rank.
    """
    if tuple(size[1:]) != tuple(weight.shape[1:]):
        raise ConfigError(
            f"{weight!r} cannot be cut into parts {tuple(size)} and gathered: FSDP2 gathers packed codes along the "
            "first dimension. For this weight, shard_placement_fn has to return None or Shard(0)"
        )


def called_from(package: str) -> bool:
    """Whether the operator that runs was called by a module of torch whose name begins so, and not by a model's code in
    between."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(package):
            return True
        if name.split(".")[0] not in ("torch", "torchao", "gptq_ao"):
            return False
        frame = frame.f_back
    return False
