"""What ends a long command from outside ends it in order, and says how to go on."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["stopped_gently"]


@contextmanager
def stopped_gently() -> Iterator[None]:
    """Within, SIGTERM is what Ctrl-C is: it raises, so that nothing half-finished is left. What was noted on the way is
    printed."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as e:
        notes = getattr(e, "__notes__", ["no stage was finished, nothing is kept"])
        print("stopped: " + "\n".join(notes), file=sys.stderr)
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # as the shell has it
