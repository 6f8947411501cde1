"""How much memory there is, how much may be used, and what of the waiting activations goes where."""

from pathlib import Path

import torch

from gptq_ao.calibration.activation_store import Budget
from gptq_ao.errors import ConfigError
from gptq_ao.planning.job import Job
from gptq_ao.planning.limits import Limits
from gptq_ao.planning.prepare import Prepared
from gptq_ao.planning.simulate import Footprint, simulate

__all__ = ["choose_budget", "free_bytes", "readable", "waiting_budget"]


DEVICE_SHARE = 0.9  # of what is free: the rest is for workspaces of libraries and for fragmentation
HOST_SHARE = 0.8


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
            f"and its Hessians take {readable(footprint.working)}, with all waiting activations elsewhere: allow more, "
            "or use a smaller batch size or shorter sequences"
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


def waiting_budget(job: Job, prepared: Prepared) -> tuple[Budget, int | None]:
    """What the activations of a plan that is about to run may take, and how much of the device that computes will be
    left when all of them wait there; None: unknown.

    Raises:
        ConfigError: as `choose_budget`.
    """
    if job.device.type == "cpu":
        return Budget(device=job.limits.host), None
    footprint = simulate(job.weights, prepared, job.device, job.ranks)
    budget = choose_budget(job.limits, footprint, job.device, job.ranks.here)
    return budget, None if budget.device is None else max(0, budget.device - footprint.activations)


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
