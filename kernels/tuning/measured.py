"""Configurations that were measured on a device: they take the place of `heuristics.choose`. A JSON file.

    {"format": 1, "device": "…", "entries": [{"product": {…}, "config": {…} or null, "microseconds": …}, …]}

A config of null says that dequantizing and a dense product were faster.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from gptq_ao.errors import TuningError
from gptq_ao.kernels.tuning.heuristics import LinearConfig, computes

__all__ = ["VARIABLE", "Product", "Tuned", "default_path", "load", "save"]

VARIABLE = "GPTQ_AO_TUNED"  # environment variable that may hold the path of the file
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Product:
    """x [experts, rows, in_features] by as many weights [out_features, in_features]."""

    rows: int
    out_features: int
    in_features: int
    bits: int
    group_size: int
    experts: int = 1


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The fastest for a product, and its time."""

    config: LinearConfig | None
    microseconds: float


def default_path(device_name: str) -> Path:
    """Where the environment says, or in the user's cache, one file for each kind of device."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "gptq_ao" / f"{re.sub(r'[^A-Za-z0-9]+', '-', device_name).strip('-')}.json"


def load(path: Path) -> dict[Product, Tuned]:
    """What is in the file; nothing if there is none.

    Raises:
        TuningError: the file is damaged, of another format, or holds a configuration that would compute something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
        return dict(_entry(e) for e in content["entries"])
    except (ValueError, TypeError, KeyError) as error:
        raise TuningError(
            f"the tuning file {path} cannot be used ({type(error).__name__}: {error}): delete it, or name another one "
            f"in {VARIABLE}; gptq_ao.tune(model) writes a new one"
        ) from error


def save(path: Path, device_name: str, entries: dict[Product, Tuned]) -> None:
    """Write the file in one step: a process that reads it meets the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "device": device_name,
        "entries": [{"product": dataclasses.asdict(p), **dataclasses.asdict(t)} for p, t in entries.items()],
    }
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    part.replace(path)


def _entry(entry: dict[str, Any]) -> tuple[Product, Tuned]:
    product = Product(**entry["product"])
    config = None if entry["config"] is None else LinearConfig(**entry["config"])
    for part in (product, config):
        for name, value in dataclasses.asdict(part).items() if part else ():
            # Whatever is in the file, these become constants of a kernel.
            if type(value) not in (int, bool) or value < 0:
                raise ValueError(f"{name} is {value!r} in {entry}")
    if config is not None and not computes(config, product.bits, product.group_size, product.in_features):
        raise ValueError(f"{config} does not compute {product}")
    return product, Tuned(config, float(entry["microseconds"]))
