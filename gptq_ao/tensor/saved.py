"""Weights as `torch.load` makes them: of whatever a file says, which a kernel must not read beyond."""

from typing import Any

import torch
from torch import Tensor

from gptq_ao.codes.tiles import TILE_ROWS, tile_columns
from gptq_ao.errors import CheckpointError

__all__ = ["check_parts"]


def check_parts(weight: Any) -> None:
    """Whether a `GroupTensor`'s parts are those of its size.

    Raises:
        CheckpointError: they are not.
    """
    bits, n, k, group = weight.bits, weight.out_features, weight.in_features, weight.group_size
    lead, tiles, wide = weight.qdata.shape[:-3], -(-n // TILE_ROWS), -(-k // tile_columns(bits))
    expected: dict[str, tuple[int, ...]] = {"qdata": (*lead, tiles, wide, 128)}
    if group > 0 and k % group == 0:
        expected["scale_zero"] = (*lead, tiles, k // group, TILE_ROWS)
    if bits == 3:
        expected["high_plane"] = (*lead, tiles, wide, 64)
    if weight.perm is not None:
        expected["perm"] = (k,)
    parts: dict[str, Tensor] = weight.parts()
    found = {name: tuple(part.shape) for name, part in parts.items() if part.dtype == torch.int32}
    # The shape that torch keeps was made of the same numbers; a file may have changed them since.
    if found != expected or weight.shape != weight.replace().shape:
        raise CheckpointError(f"a saved {weight!r} is damaged: it has parts {found}, and needs {expected}")
    perm = weight.perm
    if perm is not None and not perm.is_meta:
        order = torch.arange(k, device=perm.device)
        if not torch.equal(perm.long().sort().values, order):
            raise CheckpointError(f"a saved {weight!r} is damaged: its perm is not a permutation")
