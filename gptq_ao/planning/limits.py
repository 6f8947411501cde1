"""How much memory the caller allows: `max_memory`, read and checked."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gptq_ao.errors import ConfigError

__all__ = ["Limits", "MaxMemory", "read_limits"]

MaxMemory = Mapping[str | int, int | str]

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
