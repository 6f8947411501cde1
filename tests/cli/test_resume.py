"""`gptq-ao quantize --resume`: where the journal lies, and what happens at the end. (What happens to a run that dies is
tested in tests/journal/.)"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptq_ao import load_quantized
from gptq_ao.pipeline import run_plan

from .test_commands import fail, run


def left(tmp_path: Path) -> set[str]:
    return {p.name for p in tmp_path.iterdir()} - {"a", "text.txt"}


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The weight of this number is the last one that is solved."""
    rewrite, seen = run_plan.rewrite, []

    def rewritten(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        if len(seen) > number:
            raise RuntimeError("out of luck")
        return rewrite(*args, **kwargs)

    monkeypatch.setattr(run_plan, "rewrite", rewritten)


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_what_a_format_cannot_hold_is_known_after_all_the_work(
    stream: tuple[str, ...],
    arguments: Callable[..., tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And that is not lost: it was written in another one, or may be with --resume."""
    said = fail(monkeypatch, capsys, *arguments("--format", "gptq", *stream))
    assert "readers of GPTQ need multiples of 32" in said
    if not stream:
        assert f"It was written to {tmp_path / 'q'} in the native format instead" in said
        assert "--resume" not in said
    else:
        assert f"is kept in {tmp_path / '.q.journal'}: the same command with --resume goes on" in said
        assert left(tmp_path) == {".q.journal"}
        run(monkeypatch, *arguments("--resume", *stream))
    assert left(tmp_path) == {"q"}
    load_quantized(tmp_path / "q")


def test_the_journal_is_where_out_really_is(
    arguments: Callable[..., tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """However OUT is spelled, a run finds what another one left; a failure that was not foreseen says how to go on."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    given = arguments()
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        said = fail(patch, capsys, *given[:2], str(tmp_path / "link" / "x" / ".." / "q"), *given[3:])
    assert "RuntimeError: out of luck" in said
    journal = tmp_path / "elsewhere" / ".q.journal"
    assert f"(2 stages) is kept in {journal}: the same command with --resume goes on from there" in said
    said = fail(monkeypatch, capsys, *given[:2], str(tmp_path / "elsewhere" / "q"), *given[3:])
    assert f"{journal} holds the work of a run that did not end (2 stages): the same command with --resume" in said
    monkeypatch.chdir(tmp_path / "elsewhere")
    with monkeypatch.context() as patch:
        done = run(patch, *given[:2], "q", *given[3:], "--resume", "--json")
    assert done["weights"] == 7
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["q"]


def test_resume_where_nothing_is_begins(
    arguments: Callable[..., tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        run(patch, *arguments("--resume", "--snapshot-every", "1"))
    assert left(tmp_path) == {"q"}
    with monkeypatch.context() as patch:
        run(patch, "plan", *arguments("--resume", "--snapshot-every", "1")[1:])


def test_other_settings_are_an_error_of_the_options(
    arguments: Callable[..., tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        fail(patch, capsys, *arguments())
    monkeypatch.setattr(sys, "argv", ["gptq-ao", *arguments("--resume", "--bits", "3")])
    from gptq_ao import cli

    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert "settings: bits was 4, and is 3" in said
    assert "goes on from there" not in said
    assert left(tmp_path) == {".q.journal"}
