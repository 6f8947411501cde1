"""One process at a time in a directory.

The lock is `flock` on a file in it, which the system gives back when the process ends, however it ends: a file that is
left over says nothing. Linux passes it on to an NFS server, so it holds between hosts; not where a file system is
mounted so that locks stay local (`nolock`, `local_lock`, Lustre's `localflock`). Where there is no flock at all, the
file's owner counts: a process of this host that is gone, or whose number is another one's now, has left it behind.
"""

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from gptq_ao.errors import CheckpointError
from gptq_ao.journal.files import open_plain

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "Lock"]

LOCK = "lock"


class Lock:
    """Exclusive use of a directory, which is made if it is missing, until `release`.

    Raises:
        CheckpointError: another process has it.
        OSError: the directory cannot be made or written.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        while True:
            directory.mkdir(parents=True, exist_ok=True)
            try:
                self._file = open_plain(self._path, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:  # the one before has just removed the directory
                continue
            try:
                self._take()
            except BaseException:
                os.close(self._file)
                raise
            if self._is_there():
                break
            os.close(self._file)
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, json.dumps(_self()).encode())

    def release(self, *, remove: bool) -> None:
        """Let others have it; with `remove`, no file is left."""
        if remove:
            with contextlib.suppress(OSError):
                self._path.unlink()
        else:
            os.ftruncate(self._file, 0)  # nobody's
        os.close(self._file)

    def _take(self) -> None:
        try:
            if fcntl is None:
                raise OSError("no flock")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise CheckpointError(
                f"{self._path.parent} is in use by {_told(self._owner())}: wait until it is done, or give another "
                "directory"
            ) from e
        except OSError as e:  # the file system has none
            owner = self._owner()
            if owner and not _gone(owner):
                raise CheckpointError(
                    f"{self._path.parent} is in use by {_told(owner)}, which cannot be asked from here: remove "
                    f"{self._path} if it is gone"
                ) from e

    def _is_there(self) -> bool:
        """Whether the file that is locked is the one with its name: the one before may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat(follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _owner(self) -> dict[str, Any]:
        """Who has written the file; nothing if it is nobody's."""
        try:
            os.lseek(self._file, 0, os.SEEK_SET)
            owner = json.loads(os.read(self._file, 4096))
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}


def _self() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}


def _told(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'some host')}" if owner else "another process"


def _gone(owner: dict[str, Any]) -> bool:
    """Whether it certainly runs no more."""
    if owner.get("host") != socket.gethostname() or type(owner.get("pid")) is not int:
        return False
    if os.name == "nt":  # where to ask like this would end it
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is somebody else's
        pass
    return _started(owner["pid"]) != owner.get("started")


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the host did, which tells it from a later one of the same number."""
    try:
        # After the name, which is in parentheses and may have spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
