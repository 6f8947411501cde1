"""GPTQ as a PyTorch compiler pass and torchao plugin.

from gptq_ao import gptq_config, quantize_
quantize_(model, gptq_config(bits=4, group_size=128, calibration=batches))

Everything is in `gptq_ao.public`.
"""

import sys as _sys
import typing as _typing
from importlib import import_module as _import
from pathlib import Path as _Path

from gptq_ao.integrations.on_import import quiet_import as _quiet_import

if _typing.TYPE_CHECKING:
    from gptq_ao.public import *  # noqa: F403
    from gptq_ao.public import __all__ as __all__


def _load() -> _typing.Any:
    with _quiet_import():
        return _import("gptq_ao.public")


# In a process of the command line that waits until a command needs it, so that the help is there at once. "-m" is what
# Python puts there for `python -m gptq_ao`, until it runs.
if not (_sys.argv[:1] == ["-m"] or _Path("".join(_sys.argv[:1])).stem == "gptq-ao"):
    _load()


def __getattr__(name: str) -> _typing.Any:
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _quiet_import():
        return getattr(_import("gptq_ao.public"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_load().__all__})
