"""The report beside the weights: when it is there, what becomes of it, and how it is written again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gptq_ao import load_quantized, save_quantized
from gptq_ao.presentation.files import read_report

from .test_commands import fail, run
from .test_resume import left, stop_at

Arguments = Callable[..., tuple[str, ...]]
FILES = {"report.html", "report.json"}


@pytest.mark.parametrize("how", [(), ("--stream",), ("--stream", "--format", "compressed-tensors")])
def test_it_lies_beside_the_weights(
    how: tuple[str, ...], arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        printed = run(patch, *arguments("--json", *how))
    assert {p.name for p in (tmp_path / "q" / "report").iterdir()} == FILES
    facts = read_report(tmp_path / "q" / "report")
    assert facts["model"] == "a"
    # Where the model was on this machine is in neither.
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "q" / "report").iterdir())
    assert {k: v for k, v in facts.items() if k in printed and k not in ("model", "format", "notes")} == {
        k: v for k, v in printed.items() if k in facts and k not in ("model", "format", "notes")
    }
    load_quantized(tmp_path / "q")


def test_of_a_run_that_was_ended_it_is_whole(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        fail(patch, capsys, *arguments())
    assert left(tmp_path) == {".q.journal"}
    with monkeypatch.context() as patch:
        run(patch, *arguments("--resume"))
    assert len(read_report(tmp_path / "q" / "report")["layers"]) == 7


def test_it_need_not_be_written(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, *arguments("--no-report"))
    assert not (tmp_path / "q" / "report").exists()


def test_it_follows_the_weights_and_no_others(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To another format; not to what is made of them otherwise."""
    with monkeypatch.context() as patch:
        run(patch, *arguments())
        run(patch, "convert", str(tmp_path / "q"), str(tmp_path / "ct"), "--format", "compressed-tensors")
    assert (tmp_path / "ct" / "report" / "report.json").read_bytes() == (
        tmp_path / "q" / "report" / "report.json"
    ).read_bytes()
    save_quantized(load_quantized(tmp_path / "q"), tmp_path / "again")
    assert not (tmp_path / "again" / "report").exists()
    assert (tmp_path / "again" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["report.json", "report.html", "paper.pdf"])
def test_a_folder_of_that_name_that_the_model_has(
    name: str, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments()
    (tmp_path / "a" / "report").mkdir()
    (tmp_path / "a" / "report" / name).write_text("{}")
    printed = run(monkeypatch, *given)
    assert (tmp_path / "q" / "report" / name).read_text() == "{}"
    there = {p.name for p in (tmp_path / "q" / "report").iterdir()}
    assert there == ({name} if name in FILES else {name, *FILES})
    assert (f"no report was written, as the model has a file report/{name}" in printed) == (name in FILES)


def test_it_is_written_again(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From OUT or the folder itself, and with a plan."""
    given = arguments()
    with monkeypatch.context() as patch:
        run(patch, *given)
        planned = run(patch, "plan", *given[1:2], *given[3:], "--json")
    page = tmp_path / "q" / "report" / "report.html"
    first = page.read_text()
    assert ">planned<" not in first
    page.unlink()
    with monkeypatch.context() as patch:
        assert run(patch, "report", str(tmp_path / "q")) == f"written to {page}"
    assert page.read_text() == first
    (tmp_path / "plan.json").write_text(json.dumps(planned))
    with monkeypatch.context() as patch:
        run(patch, "report", str(page.parent), "--plan", str(tmp_path / "plan.json"), "--json")
    assert ">planned<" in page.read_text()
    assert read_report(page.parent)["plan"]["stages"] == planned["stages"]
    (tmp_path / "plan.json").write_text("[]")
    said = fail(monkeypatch, capsys, "report", str(tmp_path / "q"), "--plan", str(tmp_path / "plan.json"))
    assert "plan.json is not what gptq-ao plan --json prints" in said
    assert "has no report.json" in fail(monkeypatch, capsys, "report", str(tmp_path / "a"))
