"""A model whose parameters and buffers are, for the duration of a trace, fake tensors on the device that will run it.

So a trace needs no weight: they may be on meta, spread over devices, or on disk with hooks (Accelerate) that would load
them. Nothing is allocated, and nothing of the model is different afterwards.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

from gptq_ao.errors import CaptureError

__all__ = ["first_names", "running_device", "stand_in"]

# The dicts and sets in which torch keeps what a module has: parameters, buffers, modules, hooks.
_TABLES = frozenset(name for name, table in vars(nn.Module()).items() if isinstance(table, dict | set))


def running_device(model: nn.Module) -> torch.device:
    """Where a model without an explicit device runs: with its first parameter that is somewhere, else on the CPU."""
    tensors = [*model.parameters(), *model.buffers()]
    return next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter → the first name of the same parameter, in the model's order.

    Hooks that offload weights put a separate meta tensor under each name of a tied parameter, so that identity does not
    show that it is one. Then `all_tied_weights_keys` of the model (transformers) does.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # A tied parameter is one object under several names.
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in parameters.items()}
    for prefix, m in model.named_modules():
        for a, b in (getattr(m, "all_tied_weights_keys", None) or {}).items():
            pair = [f"{prefix}.{n}".removeprefix(".") for n in (a, b)]
            # Only on meta: everywhere else, identity shows what is tied.
            if all(n in parameters and parameters[n].device.type == "meta" for n in pair):
                one, other = sorted((names[n] for n in pair), key=list(parameters).index)
                # All names of the one that comes later now lead to the one that comes first.
                names = {n: one if f == other else f for n, f in names.items()}
    return names


@contextlib.contextmanager
def stand_in(model: nn.Module, device: torch.device, mode: FakeTensorMode) -> Iterator[None]:
    """Within: every parameter and buffer is a fake tensor of `mode` on `device`, tied ones still tied; other tensors
    that modules hold are there too; the wrappers with which Accelerate moves weights around a forward are off, and the
    hooks with which FSDP2 and tensor parallelism gather weights, or cut activations.

    Also undone on exit is what the forward itself stores on its modules (rotary tables, masks): under a trace these are
    fakes, which would break the next forward.

    Raises:
        CaptureError: a lazy parameter has no shape yet.
    """
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise CaptureError(f"parameter {lazy!r} is lazy and has no shape yet: run the model once on a batch")
    # One fake per tensor, so that what was tied stays tied.
    fakes: dict[Any, Any] = {}

    def fake(key: Any, t: Tensor) -> Any:
        if key not in fakes:
            with mode:  # the logical shape of a tensor subclass, whatever it is made of
                new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            fakes[key] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
        return fakes[key]

    parameters = {name: fake(first, model.get_parameter(first)) for name, first in first_names(model).items()}

    with _restored(model):
        for m in model.modules():
            m._buffers.update({name: fake(id(t), t) for name, t in m._buffers.items() if t is not None})
            for hooks in (m._forward_pre_hooks, m._forward_hooks):
                for number in [n for n, hook in hooks.items() if _home(hook).startswith("torch.distributed.")]:
                    del hooks[number]
            own = vars(m)
            # Neither parameters nor buffers: constants of the graph, whose values count. So these are really moved.
            own.update({k: v.to(device) for k, v in own.items() if isinstance(v, Tensor) and v.device.type != "meta"})
            # Accelerate's wrapper would load the real weights. The forward below it takes the fakes.
            if "_hf_hook" in own and "_old_forward" in own:
                own["forward"] = own["_old_forward"]
            # Transformers' tensor parallelism, too, puts a function around a module's forward.
            while _home(own.get("forward")).startswith("transformers.distributed."):
                own["forward"] = inspect.getclosurevars(own["forward"]).nonlocals["original_forward"]
        for name, p in parameters.items():
            module, _, attribute = name.rpartition(".")
            model.get_submodule(module)._parameters[attribute] = p
        yield


def _home(function: Any) -> str:
    """The Python module that a function is defined in."""
    return getattr(function, "__module__", None) or ""


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Every attribute of every module is, afterwards, the object it was, and holds the tensors, modules and hooks that
    it held."""
    saved = [(m, dict(vars(m)), {t: vars(m)[t].copy() for t in _TABLES & vars(m).keys()}) for m in model.modules()]
    try:
        yield
    finally:
        for m, attributes, contents in saved:
            # Also removes what the forward has added.
            vars(m).clear()
            vars(m).update(attributes)
            # These dicts were changed in place: to put the same dict back is not enough.
            for table, content in contents.items():
                vars(m)[table].clear()
                vars(m)[table].update(content)
