"""Several calls of one model that are under way at the same time, of which one runs while the others wait.

A forward can be left in the middle and gone back to only if it has a stack of its own: each runs in a thread. Control
is handed from one to the other, so nothing ever happens at the same time, and the order is always the same.

What belongs to a thread in torch (gradient and inference mode, autocast, default device, CUDA device and stream) is, in
each of these threads, as in the one that made them. What a forward stores on its modules (`self.length = …`) is kept
for it and taken away while another runs. What it changes inside of objects, and settings of the whole process that it
makes for a while, others do see.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Forward", "ModuleState", "forwards"]

_STACK = 64 * 2**20  # bytes, of address space: a thread's default may be too small for a deep model
_GONE = object()
Changes = list[tuple[dict[str, Any], dict[str, Any]]]


class _Stop(BaseException):
    """Ends a forward that nobody will go back to."""


class Forward(threading.Thread):
    """One call. `step` lets it run until it pauses or ends.

    Attributes:
        number: its place among all.
        waits_for: what it paused with; None while it runs and when it has ended.
    """

    def __init__(self, number: int, call: Callable[["Forward"], object], state: "ModuleState") -> None:
        super().__init__(daemon=True, name=f"gptq_ao forward {number}")
        self.number = number
        self.waits_for: Any = None
        self._call, self._state, self._own = call, state, _no_changes()
        self._context, self._settings = contextvars.copy_context(), _settings_of_this_thread()
        # Two semaphores pass the turn: only the side that was given it runs, so no lock is needed anywhere else.
        self._go, self._halt = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._stopping = False

    def step(self) -> None:
        """Raises what the call raises."""
        self.waits_for = None
        self._state.give(self._own)  # what this forward had stored on the modules when it was left
        try:
            self._go.release()
            while not self._halt.acquire(timeout=1):
                pass  # a signal (Ctrl-C) that came just before waiting began is seen only between two of them
        finally:
            self._own = self._state.take()
        if self._error is not None:
            self._error.add_note(f"in calibration batch {self.number}")
            raise self._error

    def pause(self, waits_for: Any) -> None:
        """Called in the thread: `step` returns to its caller, and this does at the next `step`."""
        self.waits_for = waits_for
        self._halt.release()
        self._go.acquire()
        self.check()

    def check(self) -> None:
        """Called in the thread now and then: does not return if the call is to end."""
        if self._stopping:
            raise _Stop

    def run(self) -> None:
        self._go.acquire()
        try:
            self.check()
            self._context.run(self._called)
        except _Stop:
            pass
        except BaseException as e:  # handed to the thread that waits in `step`
            self._error = e
        self.waits_for = None
        self._halt.release()

    def _called(self) -> None:
        with self._settings():
            self._call(self)

    def stop(self) -> None:
        self._stopping = True
        self._go.release()


@contextmanager
def forwards(model: nn.Module, calls: Sequence[Callable[[Forward], object]]) -> Iterator[list[Forward]]:
    """The calls, none of them begun. On exit all threads have ended, whatever happened."""
    state = ModuleState(model)
    made = [Forward(i, call, state) for i, call in enumerate(calls)]
    started: list[Forward] = []
    before = threading.stack_size(_STACK)  # of threads that start from here on; a setting of the process
    try:
        try:
            for forward in made:
                forward.start()
                started.append(forward)
        finally:
            threading.stack_size(before)
        yield made
    finally:
        try:
            for forward in started:
                forward.stop()
                forward.join()  # one at a time also now
        finally:
            for forward in started:
                forward.stop()  # if another interrupt came
            state.take()


class ModuleState:
    """What a forward stores on modules: attributes and buffers that are other objects than before."""

    def __init__(self, model: nn.Module) -> None:
        tables = [t for m in model.modules() for t in (vars(m), m._buffers)]
        self._before = [(t, dict(t)) for t in tables]

    def take(self) -> Changes:
        """Put everything back, and return what was different."""
        changes = []
        for table, before in self._before:
            if len(table) == len(before) and all(map(_is, table.values(), before.values())):
                continue  # the usual case, fast
            changed = {k: v for k, v in table.items() if before.get(k, _GONE) is not v}
            changed |= dict.fromkeys(before.keys() - table.keys(), _GONE)
            changes.append((table, changed))
            table.clear()  # not only what changed: the order of attributes is part of the state
            table.update(before)
        return changes

    def give(self, changes: Changes) -> None:
        for table, changed in changes:
            for name, value in changed.items():
                if value is _GONE:
                    table.pop(name, None)
                else:
                    table[name] = value


def _no_changes() -> Changes:
    return []


def _is(a: object, b: object) -> bool:
    return a is b


def _settings_of_this_thread() -> Callable[[], ExitStack]:
    """Gives, to whoever enters the result, what a thread does not inherit."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    autocast = {k: torch.get_autocast_dtype(k) for k in kinds if torch.is_autocast_enabled(k)}
    default = torch.get_default_device()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind, dtype in autocast.items():
            # No cache: it would hold a weight as it was before it was quantized.
            stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
            torch.cuda.synchronize()  # makes the device's context that of this thread, which cuBLAS asks for
        if default.type != "cpu":
            stack.enter_context(default)
        return stack

    return enter
