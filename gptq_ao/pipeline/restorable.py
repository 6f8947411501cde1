"""A model's weights, which are put back if quantizing fails.

The old parameters are kept as long as nobody misses the memory: where it is known what the run needs, in what that
leaves, and elsewhere while `SHARE` of what is free is more than they take. Then all of them are let go.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gptq_ao.model.parts import local_part
from gptq_ao.model.weights import ModelWeights, offload_hooks
from gptq_ao.planning.job import Job
from gptq_ao.planning.memory import free_bytes

__all__ = ["RestorableWeights"]

SHARE = 0.5


class RestorableWeights(ModelWeights):
    """The weights of a job's model in memory."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.model)
        modules = list(job.model.modules())
        tables: list[dict[str, Any]] = [t for m in modules for t in (m._parameters, m._buffers)]
        self._tables = [(table, dict(table)) for table in tables]
        self._hooks = [(hook, hook.offload) for m in modules for hook in offload_hooks(m)]
        self._overwritten: dict[str, Tensor] = {}  # copies
        self._changed: set[str] = set()
        self._kept: Counter[torch.device] = Counter()  # bytes
        self._possible = True
        self._room: dict[str, int] = {}  # type of device → bytes

    def keep_at_most(self, size: int, device: torch.device) -> None:
        """So many bytes of the device are needed for nothing else."""
        self._room[device.type] = size

    def make_dense(self) -> None:
        """Put what `get` gives of the weights to be quantized into the model: it is going to run by itself."""

    def replace(self, name: str, new: Tensor) -> None:
        """See `Weights`."""
        self._keep(name)
        super().replace(name, new)

    def will_overwrite(self, name: str) -> None:
        """To be called before the first change of a parameter in place."""
        if name not in self._changed:
            self._keep(name)
            if self._possible:
                self._overwritten[name] = self.model.get_parameter(name).detach().clone()

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as e:
            if self._possible:
                self._restore()
            elif self._changed:
                e.add_note(
                    f"{len(self._changed)} weights are quantized already, and there was no room to keep the original "
                    "ones: reload the model"
                )
            raise

    def _keep(self, name: str) -> None:
        self._changed.add(name)
        parameter = self.model.get_parameter(name)
        if parameter.is_meta:  # offloaded: its hook keeps the values anyway
            return
        device = parameter.device
        self._kept[device] += local_part(parameter).nbytes
        room = self._room.get(device.type)
        if room is None:
            room = int(SHARE * (free_bytes(device) or 0))
        if self._possible and self._kept[device] > room:
            self._possible = False
            self._tables, self._overwritten = [], {}

    @torch.no_grad()
    def _restore(self) -> None:
        for table, before in self._tables:
            table.clear()  # not only what changed: the order is part of the state
            table.update(before)
        for name, value in self._overwritten.items():
            self.model.get_parameter(name).copy_(value)
        for hook, offload in self._hooks:
            hook.offload = offload
