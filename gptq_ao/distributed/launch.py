"""What `torchrun` started: a process group for as long as a command runs."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from gptq_ao.distributed.ranks import Ranks
from gptq_ao.errors import ConfigError

__all__ = ["launched"]

# Rank 0 writes the result while the others wait. Of a process that has died, torchrun tells the others at once.
LIMIT = datetime.timedelta(hours=1)


@contextmanager
def launched() -> Iterator[Ranks]:
    """Within, the processes that torchrun started are one group: with NCCL, on a GPU each, if there are GPUs. Without
    torchrun, this one alone.

    Raises:
        ConfigError: there are more processes on this machine than GPUs.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield Ranks()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ConfigError(
                f"torchrun started {local + 1} processes here or more, and there are {there} GPUs: start one for each, "
                "or set CUDA_VISIBLE_DEVICES= to use the CPU"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=LIMIT)
    try:
        yield Ranks.of(True, None, None)
    finally:
        dist.destroy_process_group()
