"""How much memory there is, how much may be used, and what of the waiting activations goes where."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gptq_ao.calibration.activation_store import Budget
from gptq_ao.distributed.ranks import Ranks
from gptq_ao.errors import ConfigError
from gptq_ao.model.weights import Weights
from gptq_ao.passes.records import Plan, Portion
from gptq_ao.planning.footprint import Footprint
from gptq_ao.planning.job import Job
from gptq_ao.planning.limits import Limits
from gptq_ao.planning.portions import Room, divisible, whole
from gptq_ao.planning.prepare import Prepared
from gptq_ao.planning.simulate import simulate

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Allotment", "allot", "choose_budget", "free_bytes", "model_bytes", "peak_bytes", "readable", "room_of"]


DEVICE_SHARE = 0.9  # of what is free: the rest is for workspaces of libraries and for fragmentation
HOST_SHARE = 0.8
# Of what is free. Hessians that take less are not divided on a CPU, and to find out takes longer than to go on.
SMALL = 0.1


@dataclass(frozen=True)
class Allotment:
    """The memory of a plan that is about to run.

    Attributes:
        budget: of the activations that wait.
        left: bytes of the device that computes when all of them wait there; None: unknown.
        portions: of each stage.
    """

    budget: Budget
    left: int | None
    portions: tuple[tuple[Portion, ...], ...]


def choose_budget(limits: Limits, footprint: Footprint, device: torch.device, processes: int = 1) -> Budget:
    """What waiting activations may take on a device that is not the CPU, and in host memory; the rest goes to files.

    Args:
        processes: that share the host's memory; a limit is for each.

    Raises:
        ConfigError: what has to be on the device exceeds its limit even without them.
    """
    if limits.device is not None and footprint.working > limits.device:
        raise ConfigError(
            f"max_memory allows {readable(limits.device)} on {device}, but the weights and temporaries of one segment "
            f"and {_hessians(footprint)} take {readable(footprint.working)}, with all waiting activations elsewhere: "
            "allow more, or use a smaller batch size or shorter sequences"
        )
    allowed = limits.device
    if allowed is None:
        free = free_bytes(device)
        # What is resident is taken already, and so not among what is free.
        allowed = None if free is None else footprint.resident + int(DEVICE_SHARE * free)
    host = limits.host
    if host is None:
        available = free_bytes(torch.device("cpu"))
        host = None if available is None else int(HOST_SHARE * available / processes)
    return Budget(None if allowed is None else max(0, allowed - footprint.working), host)


def _hessians(footprint: Footprint) -> str:
    weight, portions = footprint.largest
    what = "its Hessians" if portions == 1 else "a portion of its Hessians"
    return f"{what}, for {weight}," if weight else what


def allot(job: Job, prepared: Prepared) -> Allotment:
    """What a plan that is about to run may take; the same portions on all ranks.

    Raises:
        ConfigError: as `choose_budget`.
    """
    assert prepared.calibrated is not None
    plan = prepared.calibrated.plan
    if job.device.type == "cpu":
        portions = tuple(whole(stage) for stage in plan.stages)
        if _may_not_fit(plan):
            portions = simulate(job.weights, prepared, job.device, job.ranks, room_of(job)).portions
        return Allotment(Budget(device=job.limits.host), None, _agreed(job.ranks, portions))
    footprint = simulate(job.weights, prepared, job.device, job.ranks, room_of(job))
    budget = choose_budget(job.limits, footprint, job.device, job.ranks.here)
    left = None if budget.device is None else max(0, budget.device - footprint.activations)
    return Allotment(budget, left, _agreed(job.ranks, footprint.portions))


def room_of(job: Job) -> Room:
    """What one process may have of the device that computes."""
    on_cpu, limits = job.device.type == "cpu", job.limits
    # On a CPU what waits is where all else is, up to its limit. On other devices it gives way.
    waiting = (2**63 if limits.host is None else limits.host) if on_cpu else 0
    if limits.device is not None:
        return Room(limits.device, waiting)
    free = free_bytes(job.device)
    if free is None:
        return Room(None, waiting)
    share = HOST_SHARE / job.ranks.here if on_cpu else DEVICE_SHARE
    return Room(model_bytes(job.weights, job.device, allocated=True) + int(share * free), waiting)


def _may_not_fit(plan: Plan) -> bool:
    """Whether the Hessians of some stage are much of the host's memory."""
    free = free_bytes(torch.device("cpu"))
    sizes = (sum(4 * s.in_features**2 * s.experts for s in stage.inputs) for stage in plan.stages if divisible(stage))
    return free is not None and max(sizes, default=0) > SMALL * free


def _agreed(ranks: Ranks, portions: tuple[tuple[Portion, ...], ...]) -> tuple[tuple[Portion, ...], ...]:
    """Of each stage, the most portions that a rank wants: all run a segment equally often."""
    mine = {
        str(number): [[[experts.start, experts.stop] for experts in portion] for portion in of_stage]
        for number, of_stage in enumerate(portions)
        if len(of_stage) > 1
    }
    said = ranks.tell(mine)

    def read(of_stage: Sequence[Sequence[Sequence[int]]]) -> tuple[Portion, ...]:
        return tuple(tuple(range(*experts) for experts in portion) for portion in of_stage)

    wanted = ([read(each[str(n)]) for each in said if str(n) in each] for n in range(len(portions)))
    return tuple(max(of_ranks, key=len, default=own) for of_ranks, own in zip(wanted, portions, strict=True))


def model_bytes(weights: Weights, device: torch.device, *, allocated: bool = False) -> int:
    """Of the unquantized model in a memory. `allocated`: only what is really there already."""
    total = 0
    for name, t in [*weights.model.named_parameters(), *weights.model.named_buffers()]:
        home = weights.home(name)
        if home is not None and home.type == device.type and not (allocated and t.is_meta):
            total += t.nbytes
    return total


def free_bytes(device: torch.device) -> int | None:
    """What this process could still allocate there; None: unknown, or there is no such device."""
    if device.type == "cuda" and torch.cuda.is_available():
        # PyTorch keeps memory that it has freed: the driver does not count it as free, and it is.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    if device.type != "cpu":
        return None
    found = [_available(), _left_of_cgroup()]
    return min((n for n in found if n is not None), default=None)


def peak_bytes() -> dict[str, int]:
    """The most that this process has taken so far, of what can be known here: "host", "cuda"."""
    found = {}
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        found["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.max_memory_allocated()
    return found


def readable(size: int) -> str:
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_of_cgroup() -> int | None:
    """A container's limit, less what it uses; caches, which give way, do not count as used."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
