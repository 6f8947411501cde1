"""What is not said when torchao is imported."""

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["quiet_import"]


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
