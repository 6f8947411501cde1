"""What is done when another library is imported: now, if it has been, else as soon as it is; and what is not said."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["quiet_import", "when_imported"]


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """While torchao is imported: it warns of its libraries for other machines than this one, and torch of how torchao
    registers its classes. Nothing a user can act on."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    # Not the loggers' levels, which torch resets on the way.
    for logger in loggers:
        logger.addFilter(_is_error)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def when_imported(module: str, then: Callable[[], object]) -> None:
    """Call `then`, once, when `module` has been executed."""
    if module in sys.modules:
        then()
    else:
        # In front, so that it is asked before the finder that has the module.
        sys.meta_path.insert(0, _Watch(module, then))


class _Watch(MetaPathFinder):
    """Finds nothing itself: it lets the others find the module, adds a step to its execution, and then is gone."""

    def __init__(self, module: str, then: Callable[[], object]) -> None:
        self.module, self.then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        # Not `importlib.util.find_spec`, which would ask this finder again, without end.
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for finder in others if (s := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            # After the module's own code: what `then` needs from it does not exist before.
            spec.loader.exec_module = self._then_too(spec.loader.exec_module)  # type: ignore[assignment, method-assign]
        return spec

    def _then_too(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_and_more(module: ModuleType) -> None:
            execute(module)
            # A module may be executed again (importlib.reload).
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.then()

        return execute_and_more
