"""Options that several commands have. Nothing here, or at the top of another file of this room, imports torch: the help
is to come at once."""

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_ao.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from gptq_ao.distributed.ranks import Ranks

__all__ = [
    "ActOrder",
    "AsJson",
    "ChunksTogether",
    "Column",
    "Device",
    "Dtype",
    "DtypeOption",
    "Effort",
    "HeldOut",
    "Method",
    "Model",
    "Split",
    "TrustRemoteCode",
    "device_of",
    "dtype_of",
    "limits_of",
    "show",
]


class Method(StrEnum):
    gptq = "gptq"
    rtn = "rtn"


class Effort(StrEnum):
    fast = "fast"
    default = "default"
    max = "max"


class ActOrder(StrEnum):
    group_aware = "group_aware"
    static = "static"
    none = "none"
    group = "group"


class Dtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]
Device = Annotated[
    str | None,
    typer.Option(help="Where to compute: cpu, cuda, cuda:1, …", show_default="the accelerator there is, else cpu"),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Dtype of the unquantized model; auto: as stored.")]
Model = Annotated[
    str, typer.Argument(help="A local Hugging Face directory, a hub id, or (quantize only) a file MODEL.gguf.")
]
HeldOut = Annotated[str, typer.Option(help="Text the model was not calibrated on: a file, preset or dataset.")]
Column = Annotated[str, typer.Option(help="Field of the data that holds the text.")]
Split = Annotated[str, typer.Option(help="Split of a dataset.")]
ChunksTogether = Annotated[int, typer.Option(min=1, help="Chunks that run together.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model. Read it first.")
]


def device_of(name: str | None, ranks: "Ranks | None" = None) -> str:
    """The device of `--device`; for one of several ranks the GPU that is its own.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    several = ranks is not None and ranks.size > 1
    if several and name not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {name}: each process of torchrun has a device of its own. Give cuda, cpu or none")
    if several and name != "cpu" and torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if found is None else found.type
    try:
        made = torch.empty(0, device=name)
    # What torch raises depends on the device, and on what this build of it can do.
    except (AssertionError, RuntimeError, NotImplementedError) as e:
        raise ConfigError(f"--device {name}: {str(e).splitlines()[0]}") from e
    if made.is_meta:
        raise ConfigError(f"--device {name}: nothing is computed there")
    return name


def dtype_of(name: Dtype) -> "torch.dtype | None":
    """The dtype of `--dtype`; None: as stored."""
    import torch

    return None if name is Dtype.auto else getattr(torch, name.value)


def limits_of(text: str | None) -> dict[str | int, int | str] | None:
    """What `quantize_` takes as max_memory, of `--max-memory cuda=8GiB,cpu=32GiB`."""
    if text is None:
        return None
    limits: dict[str | int, int | str] = {}
    for part in text.split(","):
        place, equals, amount = part.partition("=")
        if not equals:
            raise ConfigError(f"--max-memory {text}: {part!r} is not DEVICE=AMOUNT, such as cuda=8GiB,cpu=32GiB")
        # A number is that of a GPU.
        limits[int(place) if place.isdecimal() else place.strip()] = amount
    return limits


def show(facts: dict[str, Any], text: str, as_json: bool) -> None:
    """The result of a command, on stdout."""
    print(json.dumps(facts) if as_json else text)
