"""One process at a time, and a lock that nobody holds any more."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from gptq_ao.errors import CheckpointError
from gptq_ao.journal import lock
from gptq_ao.journal.journal import Journal
from gptq_ao.journal.lock import Lock


def opened(directory: Path) -> Journal:
    return Journal(directory, resume=True, how="again")


def test_the_second_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    first = Lock(tmp_path)
    for _ in range(2):
        message = rf"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}: wait until it is done"
        with pytest.raises(CheckpointError, match=message):
            opened(tmp_path)
    first.release(remove=True)
    Lock(tmp_path).release(remove=False)
    assert (tmp_path / "lock").read_text() == ""
    Lock(tmp_path).release(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_is_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking it, the one before was done, and another one came."""
    take = Lock._take
    taken: list[int] = []

    def late(self: Any) -> None:
        if not taken:
            (tmp_path / "lock").unlink()
        taken.append(1)
        take(self)

    monkeypatch.setattr(Lock, "_take", late)
    held = Lock(tmp_path)
    assert len(taken) == 2
    with pytest.raises(CheckpointError, match="is in use by process"):
        Lock(tmp_path)
    held.release(remove=True)


HERE = {"pid": os.getpid(), "host": socket.gethostname(), "started": lock._started(os.getpid())}
OWNERS: dict[str, tuple[Any, bool]] = {
    "nobody": ("", False),
    "half a line": ('{"pid": 1', False),
    "a process that runs": (HERE, True),
    "a process that is gone": ({**HERE, "pid": 2**22 + 1}, False),
    "its number is another one's": ({**HERE, "started": "1"}, False),
    "on another host": ({**HERE, "host": "elsewhere"}, True),
}


@pytest.mark.parametrize("what", OWNERS)
@pytest.mark.parametrize("flock", [True, False])
def test_what_is_left_of_a_lock(what: str, flock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With flock, what nobody holds is free. Without, its owner decides, if it may still run."""
    owner, held = OWNERS[what]
    (tmp_path / "lock").write_text(owner if isinstance(owner, str) else json.dumps(owner))

    def none(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    if not flock:
        monkeypatch.setattr(lock.fcntl, "flock", none)
    if held and not flock:
        with pytest.raises(
            CheckpointError, match=rf"is in use by process \d+ on \S+, which .*: remove {tmp_path}/lock"
        ):
            Lock(tmp_path)
    else:
        Lock(tmp_path).release(remove=True)
