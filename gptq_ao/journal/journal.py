"""The journal of a run, in a directory of its own:

    DIRECTORY/
      journal.jsonl                           a line for each step that is done
      stage-00003-00000.safetensors …         the weights that stage 3 has solved
      snapshot-00003-00000.safetensors …      what waited behind it, batch by batch
      lock                                    while somebody works here

    {"kind": "begin", "format": "gptq_ao journal", "format_version": 1, "facts": {…}}
    {"kind": "precision", …}                  the bits that were chosen, with `target_bits`
    {"kind": "start", …}                      how the first stage began
    {"kind": "stage", "number": 3, "parts": [{"file": …, "file_sha256": …, …}], …}
    {"kind": "snapshot", "number": 3, "parts": [{"file": …, "file_sha256": …, …}]}
    {"kind": "written"}                       the result is complete, and about to get its name

A line is written when the files that it names are on the disk, and it has a digest of its own. So whatever ends a run,
a line that can be read is true, but for files that were damaged later: what such a file holds is done again.
"""

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from gptq_ao.checkpoint.files.durable import sync_directory, sync_tree
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.journal.facts import differences
from gptq_ao.journal.files import (
    TENSOR_FILE,
    append_line,
    hash_of,
    read_lines,
    read_tensors,
    write_tensors,
)
from gptq_ao.journal.lock import LOCK, Lock

__all__ = ["LINES", "Journal", "growing_in", "journal_beside"]

LINES = "journal.jsonl"
KINDS = ("precision", "start", "stage", "snapshot", "written")
FORMAT = {"format": "gptq_ao journal", "format_version": 1}
_GROWING = "result"

Said = dict[str, Any]


class Journal:
    """A journal that this process alone works with. To be used in a `with` statement. A journal of no finished step is
    removed at its end; whatever is finished stays until `remove`, and an error gets a note that says so.

    Args:
        directory: is made if it is missing.
        resume: whether to go on with what is there; if not, there must be nothing finished.
        snapshot_every: stages from one snapshot of the waiting activations to the next; 0: none.
        required: whether a run that cannot keep anything must not begin.
        how: what to call to go on, for messages.
        ours: whether the directory is for nothing else, beside what will be written.

    Attributes:
        notes: what was not as it should be.

    Raises:
        CheckpointError: another process uses it; it holds something else, or is damaged, or cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resume: bool,
        required: bool = False,
        how: str,
        snapshot_every: int = 0,
        ours: bool = False,
    ) -> None:
        if type(snapshot_every) is not int or snapshot_every < 0:
            raise ConfigError(f"snapshot_every is {snapshot_every!r}: give a number of stages, or 0 for no snapshots")
        self.directory, self.snapshot_every, self.how = directory, snapshot_every, how
        self.required = required or snapshot_every > 0
        self.notes: list[str] = []
        self.ours = ours
        self._going = self._released = False
        self._begun: Said | None = None  # facts
        self._steps: dict[tuple[str, int], Said] = {}
        self._parts: list[Said] = []  # of the step that is under way
        if ours and directory.is_symlink():
            raise CheckpointError(f"{directory} is a link, and no journal: remove it")
        with self._errors():
            self._made = not directory.exists()
            self._lock = Lock(directory)
        try:
            with self._errors():
                self._read(resume)
        except BaseException:
            self._release(remove=self._made)
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        if self._released:
            return
        if not self._worth:
            self.remove()
            return
        self._release(remove=False)
        if e is not None and self._going:
            e.add_note(f"{self.done}: {self.how} goes on from there. Or remove {self.directory}, to begin anew")

    @property
    def done(self) -> str:
        """In words, what is there."""
        stages = sum(kind == "stage" for kind, _ in self._steps)
        return f"what was finished ({stages} stages) is kept in {self.directory}"

    @property
    def _worth(self) -> bool:
        """Whether something is finished that took long."""
        return any(kind in ("precision", "stage") for kind, _ in self._steps)

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Say what the run is; what is there already must be of the same.

        Raises:
            ConfigError: it is not; the message says what differs.
        """
        now: Said = json.loads(json.dumps(facts))  # as they are read
        if self._begun is None:
            with self._errors():
                self._clear()
                append_line(self.directory / LINES, {"kind": "begin", **FORMAT, "facts": now})
            self._begun, self._going = now, True
            return
        found = differences(self._begun, now)
        if found:
            lines = "".join(f"\n  {line}" for line in found)
            raise ConfigError(
                f"{self.directory} is the journal of another run, which this one cannot go on with:{lines}\nGive what "
                "was given then, or remove that directory to begin anew"
            )
        self._going = True

    def step(self, kind: str, number: int = 0) -> Said | None:
        """What is said of a finished one; its parts are those that `part` reads."""
        return self._steps.get((kind, number))

    def part(self, said: Said) -> dict[str, Tensor]:
        """The tensors of one of a step's parts."""
        with self._errors():
            return read_tensors(self.directory / said["file"])

    def last(self, kind: str) -> int:
        """The number of the last step of a kind; 0: there is none."""
        return max((number for k, number in self._steps if k == kind), default=0)

    def add(self, kind: str, number: int, said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a part of the step that is under way. It counts once `finish` has been called.

        Args:
            tensors: contiguous, on the CPU.
        """
        file = f"{kind}-{number:05}-{len(self._parts):05}.safetensors"
        with self._errors():
            digest = write_tensors(self.directory / file, tensors)
        self._parts.append({**said, "file": file, "file_sha256": digest})

    def finish(self, kind: str, number: int = 0, **said: Any) -> None:
        """The step, with all parts that were added, is done."""
        step = {"kind": kind, "number": number, "parts": self._parts, **said}
        with self._errors():
            append_line(self.directory / LINES, step)
        self._steps[kind, number] = step
        self._parts = []

    def keep_only(self, kind: str, number: int) -> None:
        """Remove the files of all other steps of a kind. Their lines stay, and say nothing any more."""
        for key in [key for key in self._steps if key[0] == kind and key[1] != number]:
            for part in self._steps.pop(key)["parts"]:
                with contextlib.suppress(OSError):
                    (self.directory / part["file"]).unlink()

    def check_space(self, need: int) -> None:
        """
        Raises:
            CheckpointError: the disk has less room than this, with what is there already.
        """
        there = sum(p.stat().st_size for p in self.directory.iterdir() if TENSOR_FILE.fullmatch(p.name))
        free = shutil.disk_usage(self.directory).free
        if need - there > free:
            raise CheckpointError(
                f"the disk of {self.directory} is full: {need - there} bytes needed for what is finished, {free} free"
            )

    def growing(self) -> Path:
        """A directory for what is not complete. What is left in it is removed the next time."""
        place = growing_in(self.directory)
        with self._errors():
            place.mkdir(exist_ok=True)
        return place

    def publish(self, grown: Path, out: Path) -> None:
        """Give what has grown its name, and remove the journal, which has done its work."""
        out = out.resolve()  # without links: it is its name that it gets
        with self._errors():
            sync_tree(grown)
            self.written()
            grown.replace(out)
            sync_directory(out.parent)
        self.remove()

    def written(self) -> None:
        """Say that the result is complete, before it gets its name. So it is, if there is something of that name."""
        if self._begun is not None:
            self.finish("written")

    def damaged(self, what: str) -> CheckpointError:
        """The error that says so: going on is not what helps."""
        self._going = False
        return CheckpointError(f"{self.directory} is damaged: {what}. Remove that directory to begin anew")

    def remove(self) -> None:
        """The work is done, or there is none."""
        self._steps = {}
        self._clear()
        self._remove_grown()
        self._release(remove=True)

    def _read(self, resume: bool) -> None:
        self._remove_grown()
        lines, torn = read_lines(self.directory / LINES)
        if not lines:
            self._check_foreign()
            self._sweep()
            return
        self._begun = self._facts_of(lines[0])
        for line in lines[1:]:
            self._steps[self._checked(line)] = line
        if self._worth and not resume:
            count = sum(kind == "stage" for kind, _ in self._steps)
            raise CheckpointError(
                f"{self.directory} holds the work of a run that did not end ({count} stages): {self.how} goes on with "
                "it. Or remove that directory, to begin anew"
            )
        if not self._worth:
            self._begun, self._steps = None, {}
        elif torn:
            self.notes.append("resumed: the last line of the journal was cut off, what it was about was done again")
        for key, line in list(self._steps.items()):
            damaged = [p["file"] for p in line["parts"] if hash_of(self.directory / p["file"]) != p["file_sha256"]]
            if damaged:
                del self._steps[key]
                # A snapshot that gave way to the next one is no damage.
                if key[0] != "snapshot":
                    self.notes.append(f"resumed: {damaged[0]} of the journal was missing or damaged, and made again")
        self._sweep()

    def _facts_of(self, line: Said) -> Said:
        if line.get("kind") != "begin" or line.get("format") != FORMAT["format"]:
            raise CheckpointError(f"{self.directory / LINES} is not a journal of gptq_ao: give another directory")
        if line.get("format_version") != FORMAT["format_version"] or not isinstance(line.get("facts"), dict):
            raise CheckpointError(
                f"{self.directory / LINES} has format version {line.get('format_version')!r}, this gptq_ao reads "
                f"{FORMAT['format_version']}: go on with the gptq_ao that wrote it, or remove that directory"
            )
        facts: Said = line["facts"]
        return facts

    def _checked(self, line: Said) -> tuple[str, int]:
        """Kind and number of a line that has what all lines have."""
        kind, number, parts = line.get("kind"), line.get("number"), line.get("parts")
        right = kind in KINDS and type(number) is int and isinstance(parts, list)
        if not right or not all(isinstance(p, dict) for p in parts or ()):
            raise self.damaged(f"a line says {str(line)[:80]}")
        for part in parts or ():
            if not isinstance(part.get("file"), str) or not TENSOR_FILE.fullmatch(part["file"]):
                raise CheckpointError(
                    f"{self.directory / LINES} names the file {part.get('file')!r}: only names that a journal gives "
                    "are allowed"
                )
        return str(kind), int(number or 0)

    def _check_foreign(self) -> None:
        """Nothing lies where a new journal is to be but what an old one left."""
        for path in self.directory.iterdir():
            if path.name not in (LOCK, LINES) and not TENSOR_FILE.fullmatch(path.name):
                raise CheckpointError(
                    f"{self.directory} holds {path.name!r} and no journal: give an empty directory, or a new one"
                )

    def _remove_grown(self) -> None:
        if self.ours:
            shutil.rmtree(self.directory / _GROWING, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what no line names."""
        named = {part["file"] for step in self._steps.values() for part in step["parts"]}
        for path in self.directory.iterdir():
            if TENSOR_FILE.fullmatch(path.name) and path.name not in named:
                path.unlink()

    def _clear(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.directory / LINES).unlink()  # first: without it the rest is nothing
            sync_directory(self.directory)
        self._sweep()

    def _release(self, *, remove: bool) -> None:
        self._released = True
        self._lock.release(remove=remove)
        if remove and (self.ours or self._made):
            with contextlib.suppress(OSError):  # somebody may have come
                self.directory.rmdir()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            what = "the disk is full" if e.errno == errno.ENOSPC else str(e)
            raise CheckpointError(f"the journal {self.directory} could not be written or read: {what}") from e


def growing_in(journal: Path) -> Path:
    """Where a checkpoint grows before it gets its name, of a journal's directory; see `Journal.growing`."""
    return journal / _GROWING


def journal_beside(out: Path) -> Path:
    """Where the journal of what is to be OUT lies: on the same disk."""
    place = out.resolve()
    return place.parent / f".{place.name}.journal"
