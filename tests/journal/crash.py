"""Runs that die, and what another one makes of what they left: every byte of the result has to be that of a run that
nothing disturbed. `make crash-test` tries many moments and ways; `test_crash.py` a few.

A run is `gptq-ao quantize` in a process (and a process group) of its own, forked from a server that has imported what
it needs.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_ao.tiny_lm.corpus import documents

from ..ranks import PRELOADED

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "examples" / "tiny_lm")
USUAL = ("--num-samples", "4", "--seq-len", "64", "--batch-size", "1", "--group-size", "64")
WAYS = {
    "memory": (),
    "stream": ("--stream",),
    "snapshots": ("--stream", "--snapshot-every", "2"),
    "adapter": ("--adapter-rank", "2", "--snapshot-every", "3"),
    "exchange": ("--stream", "--format", "compressed-tensors"),
    "target": ("--target-bits", "4.7", "--effort", "fast"),
}
EVENTS = ("fsync", "write", "replace", "unlink")


@dataclass(frozen=True)
class Fault:
    """What happens at the `number`th call, counted from 1, of those functions of `os` that change what is on the disk.

    Attributes:
        kind: "kill" before it; "tear": after a write of half of what was given; "full": the disk is, as of then; the
            name of a signal, which comes then; "meanwhile": another process tries the same, and what it says is written
            to a file beside OUT; "count": nothing.
    """

    number: int = 0
    kind: str = "count"


@dataclass(frozen=True)
class End:
    code: int | None
    stderr: str
    seconds: float
    events: int
    pid: int


def quantize(
    out: Path,
    *options: str,
    resume: bool = False,
    fault: Fault | None = None,
    after: float | None = None,
    by: int = signal.SIGKILL,
) -> End:
    """Run it; if it takes longer than `after` seconds, all of its processes get the signal `by`."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    text = out.parent / "text.txt"
    if not text.exists():
        text.write_text("\n".join(documents("heldout")[:6]))
    given = ["--calibration", str(text), *USUAL, *options, *(["--resume"] if resume else [])]
    arguments = ["quantize", TINY, str(out), *given]
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_run, args=(arguments, fault or Fault(), folder))
        process.start()
        started = _started(Path(folder))
        process.join(after)
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, by)
        process.join(120)
        seconds = time.monotonic() - started
        events, said = Path(folder, "events"), Path(folder, "stderr")
        count = int(events.read_text()) if events.exists() else 0
        return End(process.exitcode, said.read_text() if said.exists() else "", seconds, count, process.pid)


def _started(folder: Path) -> float:
    while not (folder / "started").exists():
        time.sleep(0.01)
    return time.monotonic()


def _run(arguments: list[str], fault: Fault, folder: str) -> None:
    os.setsid()
    import torch

    from gptq_ao import cli

    torch.set_num_threads(1)
    # A shell starts what runs in its background with Ctrl-C ignored, and so it would be here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = open(Path(folder, "stderr"), "w", buffering=1)  # noqa: SIM115
    sys.argv = ["gptq-ao", *arguments]
    count = _inject(fault)
    Path(folder, "started").touch()
    code: Any = 0
    try:
        cli.main()
    except SystemExit as e:
        code = e.code
    sys.stderr.flush()
    Path(folder, "events").write_text(str(count()))
    os._exit(int(code or 0))


def _inject(fault: Fault) -> Callable[[], int]:
    seen = 0

    def patched(name: str, call: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            full = fault.kind == "full" and seen >= fault.number and name in ("write", "fsync")
            if full:
                raise OSError(28, "No space left on device")
            if seen == fault.number and fault.kind == "tear" and name == "write":
                call(args[0], bytes(args[1])[: len(args[1]) // 2])
            if seen == fault.number and fault.kind in ("kill", "tear"):
                os.kill(os.getpid(), signal.SIGKILL)
            if seen == fault.number and fault.kind.startswith("SIG"):
                signal.raise_signal(signal.Signals[fault.kind])
            if seen == fault.number and fault.kind == "meanwhile":
                _try_the_same()
            return call(*args, **kwargs)

        return instead

    for name in EVENTS:
        setattr(os, name, patched(name, getattr(os, name)))
    return lambda: seen


def _try_the_same() -> None:
    from gptq_ao.errors import CheckpointError
    from gptq_ao.pipeline.quantize_checkpoint import journal_of

    out = Path(sys.argv[3])
    try:
        journal_of(out, resume=True, how="", snapshot_every=0)
        said = "it was let in"
    except CheckpointError as e:
        said = str(e)
    (out.parent / "meanwhile").write_text(said)


def files(directory: Path) -> dict[str, bytes]:
    files = {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*")) if p.is_file()}
    # A report has the seconds that the run took.
    return {name: p.read_bytes() for name, p in files.items() if not name.startswith("report/")}


def assert_same(out: Path, expected: dict[str, bytes]) -> None:
    """OUT is the undisturbed one, and nothing else is there."""
    found = files(out)
    assert found.keys() == expected.keys()
    different = [name for name, content in expected.items() if found[name] != content]
    assert different == [], different
    left = [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]
    assert left == [], left


def finish(out: Path, *options: str) -> End:
    """Go on until it is done. Once OUT is there, it is, and a further run only cleans up."""
    there = out.exists()
    end = quantize(out, *options, resume=True)
    said = ("is complete: the run that wrote it", "exists and is not empty") if there else ()
    assert end.code == 0 or any(text in end.stderr for text in said), end.stderr
    return end


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[Path | None]:
    """A file system of this size; None where it cannot be had."""
    with tempfile.TemporaryDirectory() as place:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", place], capture_output=True, check=False
        )
        if made.returncode:
            yield None
            return
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24, help="of each kind: by time, between writes, within a write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        normal: dict[str, tuple[dict[str, bytes], End]] = {}
        for name, way in WAYS.items():
            end = quantize(root / name, *way)
            assert end.code == 0, end.stderr
            normal[name] = files(root / name), end
            print(f"{name}: {end.seconds:.1f} s, {end.events} changes of the disk", flush=True)

        def check(label: str, name: str, *ends: dict[str, Any]) -> None:
            """Runs that end as told, then one that is left alone."""
            out = root / f"{len(list(root.iterdir()))}"
            codes = [quantize(out, *WAYS[name], resume=number > 0, **how).code for number, how in enumerate(ends)]
            finish(out, *WAYS[name])
            assert_same(out, normal[name][0])
            print(f"{name}: {label} {codes}: the same", flush=True)

        for _ in range(options.kills):
            name = chance.choice(list(WAYS))
            seconds, events = normal[name][1].seconds, normal[name][1].events
            moments = [chance.uniform(0.2, 1.0) * seconds for _ in range(chance.randint(1, 3))]
            check("killed at any time", name, *({"after": at} for at in moments))
            check("killed between writes", name, {"fault": Fault(chance.randint(1, events), "kill")})
            check("killed within a write", name, {"fault": Fault(chance.randint(1, events), "tear")})
        for number in (signal.SIGTERM, signal.SIGINT):
            for name in WAYS:
                at = chance.uniform(0.6, 0.9) * normal[name][1].seconds
                check(signal.Signals(number).name, name, {"after": at, "by": number})
        for name in WAYS:
            check("disk full", name, {"fault": Fault(chance.randint(2, normal[name][1].events - 1), "full")})
        for name in ("memory", "stream"):
            _on_a_small_disk(name, normal[name][0], chance)
    print("all the same")


def _on_a_small_disk(name: str, expected: dict[str, bytes], chance: random.Random) -> None:
    with small_disk(64) as place:
        if place is None:
            print("no small disk here (that takes root)")
            return
        filler, out = place / "filler", place / "out"
        for _ in range(3):
            # It is filled up once the run has seen that there is room.
            context: Any = multiprocessing.get_context("forkserver")
            process = context.Process(target=_fill_when_begun, args=(str(place), str(filler)))
            process.start()
            end = quantize(out, *WAYS[name], resume=True)
            process.join()
            assert end.code == 1, (end.code, end.stderr)
            assert "the disk is full" in end.stderr or "is full:" in end.stderr, end.stderr
            assert not out.exists()
            filler.unlink(missing_ok=True)
        finish(out, *WAYS[name])
        assert_same(out, expected)
        print(f"{name}: on a disk that was full three times: the same", flush=True)


def _fill_when_begun(place: str, filler: str) -> None:
    lines = Path(place, ".out.journal", "journal.jsonl")
    while not lines.exists() or lines.stat().st_size < 2000:
        time.sleep(0.005)
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


if __name__ == "__main__":
    main()
