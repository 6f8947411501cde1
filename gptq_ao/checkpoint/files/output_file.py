"""A file that appears when all of it is there: it grows in a temporary directory beside its place."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from gptq_ao.checkpoint.files.output_directory import check_space, disk_errors
from gptq_ao.errors import CheckpointError

__all__ = ["OutputFile"]


class OutputFile:
    """To be used in a `with` statement, which removes what is not finished.

    Attributes:
        temporary: where to write.

    Raises:
        CheckpointError: there is something of this name, or nothing can be written.
    """

    def __init__(self, path: Path) -> None:
        if os.path.lexists(path):
            raise CheckpointError(f"{path} exists: nothing is overwritten, choose another name")
        self.path = path = path.resolve()
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # On the same disk, as in the same parent: a rename there is one step, with nothing to copy.
            self._folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        self.temporary = self._folder / path.name

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def check_space(self, need: int) -> None:
        """
        Raises:
            CheckpointError: the disk has fewer free bytes.
        """
        check_space(self.path, need)

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """Within it, what the disk refuses is a CheckpointError."""
        return disk_errors(self.path)

    def finish(self) -> None:
        """Give it its name."""
        with self.errors():
            self.temporary.replace(self.path)
