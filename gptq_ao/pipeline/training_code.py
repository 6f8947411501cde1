"""What the program around a call of `quantize_` should know: it trains what is no longer in the model, or its processes
end up with different models."""

import gc
from collections.abc import MutableMapping

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gptq_ao.planning.job import Job
from gptq_ao.report import names_of

__all__ = ["left_behind", "ranks_apart"]


def ranks_apart(job: Job) -> str | None:
    """Processes of one program calibrate by themselves, as they were not asked to do it together. No message passes
    between them then: if one of them quantizes while the others do something else, all would wait forever."""
    distributed = torch.distributed
    if job.batches is None or job.ranks.size > 1 or not distributed.is_available() or not distributed.is_initialized():
        return None
    ranks = distributed.get_world_size()
    if ranks == 1:
        return None
    return (
        f"torch.distributed has {ranks} processes, and each quantizes by itself: with other batches than the others, "
        "it gets other codes. With distributed=True they quantize one model together, each with a share of the same "
        "batches. Or quantize on one rank, save_quantized, and load that on all"
    )


def left_behind(before: MutableMapping[str, nn.Parameter], model: nn.Module) -> str | None:
    """Who still holds parameters that would be trained, were they not replaced.

    Args:
        before: the model's parameters before that, those which are still alive.
    """
    now = set(map(id, model.parameters()))
    alive = {id(p): name for name, p in before.items() if p.requires_grad and id(p) not in now}
    if not alive:  # the usual case, and what follows takes a tenth of a second
        return None
    optimizers: dict[str, set[int]] = {}
    # Not isinstance, which would ask every object in the process for its `__class__`.
    for each in gc.get_objects():
        if issubclass(type(each), torch.optim.Optimizer):
            held = {id(p) for group in each.param_groups for p in group["params"]}
        elif issubclass(type(each), DistributedDataParallel):
            held = set(map(id, each._module_parameters))
        else:
            continue
        if held & set(alive):
            optimizers.setdefault(type(each).__name__, set()).update(held & set(alive))
    if not optimizers:
        return None
    names = [alive[i] for i in set().union(*optimizers.values())]
    return (
        f"{' and '.join(sorted(optimizers))} had been given {len(names)} parameters that are quantized now, such as "
        f"{names_of(sorted(names))}: they are no longer in the model, and training them would change nothing. Quantize "
        "first, add adapters, and then build the optimizer (over those parameters that require gradients), and wrap "
        "the model for several processes"
    )
