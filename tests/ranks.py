"""Several processes of one program, as torch.distributed has them: what a test says happens on every rank.

They are forked from a server that has imported what they need, once for each worker of pytest, so a case takes little
more than what it does. Each has a process group of its own, and a limit: a rank that waits for ever is a failure.
"""

import datetime
import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

__all__ = ["PRELOADED", "Outcome", "device", "on_ranks", "outcomes", "some"]

PRELOADED = ["torch", "torch.distributed.tensor", "torch.distributed.checkpoint", "transformers", "peft", "gptq_ao"]


class Outcome(NamedTuple):
    """What a rank returned, or the error that it raised."""

    value: Any
    error: str | None


def some(rows: Iterable[Any], count: int = 1) -> list[Any]:
    """The rows of a table of cases, of which all but the first ones run with `make long`."""
    long = pytest.mark.long
    return [
        row if i < count else pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=long)
        for i, row in enumerate(rows)
    ]


def device() -> str:
    """Where a case keeps its tensors: on the CPU, or on a GPU of each rank."""
    import torch.distributed as dist

    return "cuda" if dist.is_initialized() and "nccl" in dist.get_backend_config() else "cpu"


def on_ranks(
    case: Callable[..., Any], *args: Any, ranks: int = 2, seconds: int = 120, backend: str = "gloo"
) -> list[Any]:
    """What `case(*args)` returns on each rank of a process group; it must raise on none."""
    found = outcomes(case, *args, ranks=ranks, seconds=seconds, backend=backend)
    failed = [f"rank {rank}: {o.error}" for rank, o in enumerate(found) if o.error is not None]
    assert not failed, "\n".join(failed)
    return [o.value for o in found]


def outcomes(
    case: Callable[..., Any], *args: Any, ranks: int = 2, seconds: int = 120, backend: str = "gloo"
) -> list[Outcome]:
    """What `case(*args)`, a function of a module, returns or raises on each rank."""
    # CUDA does not survive a fork, and some of these packages look at it when they are imported.
    context: Any = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
    if backend == "gloo":
        context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(theirs, folder, rank, ranks, seconds, backend, case, args))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        found, end = [], time.monotonic() + seconds
        for pipe in pipes:
            try:
                there = pipe.poll(max(end - time.monotonic(), 0))
                found.append(pipe.recv() if there else Outcome(None, f"still waiting after {seconds} s"))
            except EOFError:
                found.append(Outcome(None, "died"))
        for process in processes:
            process.join(5)
            process.kill()
            process.join()
        return found


def _rank(
    pipe: Any, folder: str, rank: int, ranks: int, seconds: int, backend: str, case: Callable[..., Any], args: Any
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # As `torchrun` does; the port is for those who would make a process group, and there is one.
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    limit = datetime.timedelta(seconds=seconds)
    faulthandler.enable()  # a rank that dies of a signal says where
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
            backend = "cpu:gloo,cuda:nccl"  # as torch has it by default; what is offloaded is on the CPU
        store = f"file://{folder}/store"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks, timeout=limit)
        pipe.send(Outcome(case(*args), None))
    except BaseException as e:
        pipe.send(Outcome(None, "".join(traceback.format_exception_only(e)) + _where(e)))
    # The others may still be talking to this one.
    _wait_for_all(Path(folder), rank, ranks, seconds)
    # Without what threads of torch do at exit.
    sys.stdout.flush()
    os._exit(0)


def _where(error: BaseException) -> str:
    return "".join(traceback.format_tb(error.__traceback__)[-6:])


def _wait_for_all(folder: Path, rank: int, ranks: int, seconds: int) -> None:
    (folder / f"done{rank}").touch()
    end = time.monotonic() + min(seconds, 20)
    while not all((folder / f"done{r}").exists() for r in range(ranks)) and time.monotonic() < end:
        time.sleep(0.02)
