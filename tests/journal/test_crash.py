"""A few of what `make crash-test` tries: a run is killed, stopped, or its disk is full, and the next one goes on from
what is left, until the result is there, byte for byte that of an undisturbed run."""

import signal
from pathlib import Path

from .crash import Fault, assert_same, files, finish, quantize

OPTIONS = ("--effort", "fast", "--stream", "--snapshot-every", "4")


def test_a_run_of_mishaps(tmp_path: Path) -> None:
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    end = quantize(undisturbed, *OPTIONS, fault=Fault(60, "meanwhile"))
    assert end.code == 0, end.stderr
    # While it was at work, another process that tried the same was refused.
    said = (tmp_path / "meanwhile").read_text()
    assert f"{tmp_path / '.undisturbed.journal'} is in use by process {end.pid} on " in said, said
    assert "wait until it is done, or give another directory" in said
    at = end.events // 6

    assert quantize(out, *OPTIONS, fault=Fault(at, "kill")).code == -signal.SIGKILL
    refused = quantize(out, *OPTIONS)
    assert refused.code == 1
    assert f"{tmp_path / '.out.journal'} holds the work of a run that did not end" in refused.stderr
    assert quantize(out, *OPTIONS, resume=True, fault=Fault(at, "tear")).code == -signal.SIGKILL
    full = quantize(out, *OPTIONS, resume=True, fault=Fault(at, "full"))
    assert full.code == 1
    assert f"the journal {tmp_path / '.out.journal'} could not be written or read: the disk is full" in full.stderr
    assert "the same command with --resume goes on from there" in full.stderr
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        stopped = quantize(out, *OPTIONS, resume=True, fault=Fault(at, number.name))
        assert stopped.code == code, stopped.stderr
        assert stopped.stderr.count("stopped: what was finished (") == 1
        assert f"stages) is kept in {tmp_path / '.out.journal'}: the same command with --resume" in stopped.stderr
        assert not out.exists()
    finish(out, *OPTIONS)
    assert_same(out, files(undisturbed))
