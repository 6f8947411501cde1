"""GGUF files as what `quantize` writes, and as what it cannot read. What it reads: tests/integrations/test_gguf.py."""

from pathlib import Path
from typing import Any

import gguf
import pytest

from .test_commands import fail, run

TINY = str(Path(__file__).parents[2] / "examples" / "tiny_lm")
FEW = ("--effort", "fast", "--num-samples", "8", "--seq-len", "64", "--json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    with pytest.MonkeyPatch.context() as patch:
        settings = ("--bits", "4", "--group-size", "32", "--format", "gguf")
        return out, run(patch, "quantize", TINY, str(out), *settings, *FEW)


def test_one_file_is_written_with_the_weights_that_were_solved(made: tuple[Path, dict[str, Any]]) -> None:
    out, report = made
    assert [p.name for p in out.parent.iterdir()] == [out.name]  # no directory, no report, nothing hidden
    assert report["out"] == str(out)
    reader = gguf.GGUFReader(out)
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert sum(kind == "Q4_0" for kind in types.values()) == len(report["layers"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"PK\x03\x04 and more", "is not a GGUF file: it begins with b'PK"),
        (b"GGUF", "is truncated or damaged"),
        (b"", "is not a GGUF file: it begins with b''"),
    ],
)
def test_files_that_are_no_model(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "m.gguf"
    if content is not None:
        path.write_bytes(content)
    assert message in fail(monkeypatch, capsys, "quantize", str(path), str(tmp_path / "q"), "--method", "rtn")
    assert not (tmp_path / "q").exists()


def test_a_file_that_ends_too_soon(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "m.gguf"
    whole = made[0].read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    said = fail(monkeypatch, capsys, "quantize", str(path), str(tmp_path / "q"), "--method", "rtn")
    assert "m.gguf is truncated or damaged" in said


def test_other_commands_say_that_they_do_not_read_it(
    made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    said = fail(monkeypatch, capsys, "inspect", str(made[0]))
    assert "is a GGUF file, which only `gptq-ao quantize` reads" in said


def test_the_engine_llama_cpp_wants_such_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    settings = ("--for", "llama.cpp", "--bits", "4", "--group-size", "32")
    said = fail(monkeypatch, capsys, "quantize", TINY, str(tmp_path / "q"), *settings, *FEW[:-1])
    assert "--format gguf is one file: give a name that ends in .gguf" in said
    printed = run(monkeypatch, "quantize", TINY, str(tmp_path / "q.gguf"), *settings, *FEW[:-1])
    assert f"written to {tmp_path / 'q.gguf'}" in printed
    assert "no report is written beside a single file" in printed
    assert (tmp_path / "q.gguf").is_file()
