"""A model whose parameters and buffers are, for the duration of a trace, fake tensors on the device that will run it.

So a trace needs no weight: they may be on meta, spread over devices, or on disk with hooks (Accelerate) that would load
them. Nothing is allocated, and nothing of the model is different afterwards.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

from gptq_ao.errors import CaptureError

__all__ = ["running_device", "stand_in"]


def running_device(model: nn.Module) -> torch.device:
    """Where a model without an explicit device runs: with its first parameter that is somewhere, else on the CPU."""
    tensors = [*model.parameters(), *model.buffers()]
    return next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))


@contextlib.contextmanager
def stand_in(model: nn.Module, device: torch.device, mode: FakeTensorMode) -> Iterator[None]:
    """Within: every parameter and buffer is a fake tensor of `mode` on `device`, tied ones still tied; other tensors
    that modules hold are there too; the wrappers with which Accelerate moves weights around a forward are off.

    Also undone on exit is what the forward itself stores on its modules (rotary tables, masks): under a trace these are
    fakes, which would break the next eager forward.

    Raises:
        CaptureError: a lazy parameter has no shape yet.
    """
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise CaptureError(f"parameter {lazy!r} is lazy and has no shape yet: run the model once on a batch")
    fakes: dict[int, Tensor] = {}

    def fake(t: Tensor) -> Tensor:
        if id(t) not in fakes:
            with mode:  # the logical shape of a tensor subclass, whatever it is made of
                new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            fakes[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
        return fakes[id(t)]

    with _restored(model):
        for m in model.modules():
            tables: tuple[dict[str, Any], ...] = (m._parameters, m._buffers)
            for table in tables:
                table.update({name: fake(t) for name, t in table.items() if t is not None})
            own = vars(m)
            own.update({k: v.to(device) for k, v in own.items() if isinstance(v, Tensor) and v.device.type != "meta"})
            if "_hf_hook" in own and "_old_forward" in own:
                own["forward"] = own["_old_forward"]
        yield


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Every attribute of every module is, afterwards, the object it was."""
    tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    saved = [(m, dict(vars(m)), {t: vars(m)[t].copy() for t in tables}) for m in model.modules()]
    try:
        yield
    finally:
        for m, attributes, contents in saved:
            vars(m).clear()
            vars(m).update(attributes)
            for table, content in contents.items():
                vars(m)[table].clear()
                vars(m)[table].update(content)
