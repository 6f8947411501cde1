"""What several ranks have to have in common before they quantize one model together, and what they report of it."""

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from gptq_ao.calibration.batches import digest
from gptq_ao.distributed.ranks import Ranks
from gptq_ao.errors import CalibrationError, ConfigError
from gptq_ao.planning.job import Job
from gptq_ao.report import Report
from gptq_ao.version import VERSION

__all__ = ["check_agreement", "with_all_ranks"]

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def check_agreement(job: Job) -> None:
    """
    Raises:
        CalibrationError: not all ranks were given the same batches.
        ConfigError: or the same model or settings; or they run other versions of this package or of torch.
    """
    if job.ranks.size == 1:
        return
    names = [name for name, _ in job.model.named_parameters()]
    selected = hashlib.sha256("\n".join(filter(job.wanted, names)).encode()).hexdigest()
    data = "none" if job.batches is None else f"{len(job.batches)} batches, sha256 {digest(job.batches)}"
    said = job.ranks.tell(
        {
            "versions": f"gptq_ao {VERSION}, torch {torch.__version__}",
            "config": repr(job.config),
            "filter_fn": f"a selection of {sum(map(job.wanted, names))} of {len(names)} weights, sha256 {selected}",
            "batches": data,
            "model": _known(job),
        }
    )
    first = said[0]
    for rank, there in enumerate(said):
        if there["model"] != first["model"]:
            raise ConfigError(
                "the ranks that quantize together have different models; the first difference is on rank "
                f"{rank}: {_difference(first['model'], there['model'])}. Load the same model on all"
            )
        for what in ("versions", "config", "filter_fn"):
            if there[what] != first[what]:
                raise ConfigError(
                    f"the ranks that quantize together differ in {what}: rank 0 has {first[what]}, rank {rank} has "
                    f"{there[what]}. Give the same on all"
                )
        if there["batches"] != first["batches"]:
            raise CalibrationError(
                f"the ranks that quantize together were given different calibration data: rank 0 has "
                f"{first['batches']}, rank {rank} has {there['batches']}. Give all batches on every rank, in the same "
                "order: each takes its share of them"
            )


def with_all_ranks(report: Report, ranks: Ranks) -> Report:
    """The same on every rank: of what differs (seconds, memory) the most that one took."""
    said = ranks.tell([dict(report.seconds), dict(report.peak_bytes)])
    seconds, peaks = (
        {k: max(each.get(k, 0) for each in of_all) for k in dict.fromkeys(k for each in of_all for k in each)}
        for of_all in zip(*said, strict=True)
    )
    return dataclasses.replace(report, seconds=seconds, peak_bytes=peaks)


def _known(job: Job) -> dict[str, list[Any]]:
    """Parameter or buffer → shape, dtype, and what its values are, if they are in memory."""
    tensors = [*job.model.named_parameters(), *job.model.named_buffers()]
    # What a model computes when it is made, such as frequencies, may differ by a bit from one device to another.
    modules = job.model.named_modules()
    made = {f"{at}.{name}".lstrip(".") for at, module in modules for name in module._non_persistent_buffers_set}
    return {
        name: [list(t.shape), str(t.dtype), None if name in made else _sum_of_bits(t.detach())] for name, t in tensors
    }


def _sum_of_bits(t: Tensor) -> int | None:
    """The same on any device, in whichever order it is added up."""
    if t.is_meta or type(t) is not Tensor or t.is_sparse or t.is_complex() or t.is_quantized:
        return None
    words = t.contiguous().view(INTEGERS[t.dtype.itemsize]).flatten()
    # In pieces, since torch makes int64 of what it adds up; each of them is waited for at the end only.
    return sum(torch.stack([piece.sum(dtype=torch.int64) for piece in words.split(2**24)]).tolist())


def _difference(ours: dict[str, list[Any]], theirs: dict[str, list[Any]]) -> str:
    missing = next((n for n in (*ours, *theirs) if n not in ours or n not in theirs), None)
    if missing is not None:
        return f"only one of them has {missing!r}"
    for name, (shape, dtype, _) in ours.items():
        other, other_dtype, _ = theirs[name]
        if (shape, dtype) != (other, other_dtype):
            return f"{name!r} is {other_dtype} {tuple(other)}, not {dtype} {tuple(shape)}"
    return f"{next(n for n in ours if ours[n] != theirs[n])!r} has other values"
