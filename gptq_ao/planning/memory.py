"""How much memory there is, how much may be used, and what of the waiting activations goes where."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gptq_ao.calibration.activation_store import Budget
from gptq_ao.errors import ConfigError
from gptq_ao.model.weights import Weights
from gptq_ao.planning.prepare import Prepared
from gptq_ao.planning.simulate import Footprint, simulate

__all__ = ["Limits", "MaxMemory", "choose_budget", "free_bytes", "read_limits", "readable", "waiting_budget"]

MaxMemory = Mapping[str | int, int | str]

DEVICE_SHARE = 0.9  # of what is free: the rest is for workspaces of libraries and for fragmentation
HOST_SHARE = 0.8
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Limits:
    """Bytes; None: no limit was given.

    Attributes:
        device: of everything on the device that computes, if that is not the CPU.
        host: of the activations that wait in host memory.
    """

    device: int | None = None
    host: int | None = None


def read_limits(max_memory: MaxMemory | None, device: torch.device) -> Limits:
    """`max_memory` of `quantize_`.

    Args:
        device: the one that computes.

    Raises:
        ConfigError: a key is neither "cpu" nor that device, or a value no amount of memory.
    """
    if max_memory is None:
        return Limits()
    if not isinstance(max_memory, Mapping):
        raise ConfigError(f"max_memory is a {type(max_memory).__name__}: give a dict such as {{'cuda': '8GiB'}}")
    found: dict[str, int] = {}
    for key, value in max_memory.items():
        place = _place(key, device)
        if place in found:
            raise ConfigError(f"max_memory names {key!r} twice, by different names: {list(max_memory)}")
        found[place] = _amount(key, value)
    return Limits(**found)


def choose_budget(limits: Limits, footprint: Footprint, device: torch.device) -> Budget:
    """What waiting activations may take on a device that is not the CPU, and in host memory; the rest goes to files.

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
        allowed = None if free is None else footprint.resident + int(DEVICE_SHARE * free)
    host = limits.host
    if host is None:
        available = free_bytes(torch.device("cpu"))
        host = None if available is None else int(HOST_SHARE * available)
    return Budget(None if allowed is None else max(0, allowed - footprint.working), host)


def waiting_budget(weights: Weights, prepared: Prepared, limits: Limits, device: torch.device) -> Budget:
    """What the activations of a plan that is about to run may take.

    Raises:
        ConfigError: as `choose_budget`.
    """
    if device.type == "cpu":
        return Budget(device=limits.host)
    return choose_budget(limits, simulate(weights, prepared, device), device)


def free_bytes(device: torch.device) -> int | None:
    """What this process could still allocate there; None: unknown, or there is no such device."""
    if device.type == "cuda" and torch.cuda.is_available():
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


def _place(key: object, device: torch.device) -> str:
    if key == "cpu":
        return "host"
    index = device.index or 0
    if device == torch.device("cuda") and torch.cuda.is_available():
        index = torch.cuda.current_device()
    names = (device.type, f"{device.type}:{index}", index)
    if device.type != "cpu" and key in names and not isinstance(key, bool):
        return "device"
    more = f", and {names[0]!r}, {names[1]!r} or {index} for the device that computes" if device.type != "cpu" else ""
    raise ConfigError(f"max_memory names {key!r}: it may have the key 'cpu', for waiting activations{more}")


def _amount(key: object, value: object) -> int:
    if type(value) is int and value >= 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"max_memory of {key!r} is {value!r}: give bytes, or a string such as '8GiB' or '500MB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])


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
