"""Entries in processes of their own, several at a time: a crash, or one that never ends, costs one row."""

import multiprocessing as mp
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from .entry import Entry, Row, run

__all__ = ["run_isolated"]


def run_isolated(entries: list[Entry], jobs: int, timeout: float) -> Iterator[Row]:
    """Rows as they are finished. The children are forks: what is imported here is imported once."""
    fork = mp.get_context("fork")
    waiting = list(reversed(entries))
    running: list[tuple[Entry, Any, Connection, float]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            entry = waiting.pop()
            here, there = fork.Pipe(duplex=False)
            process = fork.Process(target=_child, args=(entry, there), daemon=True)
            process.start()
            there.close()
            running.append((entry, process, here, time.monotonic()))
        ready = mp.connection.wait([connection for _, _, connection, _ in running], timeout=1.0)
        for item in list(running):
            entry, process, connection, start = item
            late = time.monotonic() - start > timeout
            if connection not in ready and not late:
                continue
            problem = f"no result after {timeout:.0f} s"
            if connection in ready:
                try:
                    yield connection.recv()
                    problem = ""
                except EOFError:
                    process.join()
                    problem = f"the process died (exit code {process.exitcode})"
            if problem:
                process.kill()
                yield Row(entry.name, entry.kind, problem=problem, seconds=round(time.monotonic() - start, 1))
            process.join()
            running.remove(item)


def _child(entry: Entry, connection: Connection) -> None:
    torch.set_num_threads(1)
    connection.send(run(entry))
    connection.close()
