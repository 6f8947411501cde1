"""`--check`: what is measured, where a checkpoint goes that is not good enough, and what the command then says."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_ao import cli, data, load_quantized
from gptq_ao.evaluate import evaluate
from gptq_ao.integrations.transformers import load_model, load_tokenizer
from gptq_ao.presentation.files import read_report

from .test_commands import fail, run
from .test_resume import left

Arguments = Callable[..., tuple[str, ...]]
STREAMS = pytest.mark.parametrize("stream", [(), ("--stream",), ("--stream", "--format", "compressed-tensors")])


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    (tmp_path / "held.txt").write_text("a man walked to the house and said that the sky was blue\n" * 30)
    return str(tmp_path / "held.txt")


def refused(patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: str) -> tuple[Any, str]:
    """What a run says whose result is not good enough: JSON on stdout, a message on stderr, status 3."""
    patch.setattr(sys, "argv", ["gptq-ao", *given, "--json"])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 3
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def agrees(quality: Any, out: Path, source: Path, chunks: torch.Tensor) -> None:
    """With an independent computation."""
    original = load_model(str(source))
    expected = evaluate(load_quantized(out), chunks, original)
    assert quality["kl"] == pytest.approx(expected.kl, rel=1e-4)
    assert quality["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert quality["original_perplexity"] == pytest.approx(evaluate(original, chunks).perplexity, rel=1e-4)
    assert quality["tokens"] == expected.tokens


@STREAMS
def test_good_enough(
    stream: tuple[str, ...], arguments: Arguments, held_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments("--check", held_out, "--check-samples", "3", "--max-kl", "9", "--json", *stream)
    printed = run(monkeypatch, *given)
    assert left(tmp_path) == {"held.txt", "q"}
    chunks = data.token_chunks(load_tokenizer(str(tmp_path / "a")), data.read_documents(held_out), 32)
    agrees(printed["quality"], tmp_path / "q", tmp_path / "a", data.spaced(chunks, 3))
    assert printed["quality"]["text"] == f"3 of {len(chunks)} sequences of 32 tokens of held.txt"
    assert read_report(tmp_path / "q" / "report")["quality"] == printed["quality"]
    card = (tmp_path / "q" / "README.md").read_text()
    assert f"- KL(original ‖ quantized), nats per token: {printed['quality']['kl']:.4g}" in card


@STREAMS
def test_not_good_enough(
    stream: tuple[str, ...],
    arguments: Arguments,
    held_out: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is complete, at a place that says what it is, and the place is not used again."""
    given = arguments("--check", held_out, "--max-kl", "1e-9", "--max-perplexity-ratio", "0.1", *stream)
    with monkeypatch.context() as patch:
        printed, said = refused(patch, capsys, *given)
    place = tmp_path / "q.rejected"
    assert left(tmp_path) == {"held.txt", "q.rejected"}
    assert printed["out"] == str(place)
    assert len(printed["quality"]["missed"]) == 2
    assert "error: KL(original ‖ quantized) is " in said
    assert f"What was made is at {place}, and nothing is at {tmp_path / 'q'}" in said
    load_quantized(place)
    page = (place / "report" / "report.html").read_text()
    assert page.index("not as good as it has to be (2)") < page.index("left as they are")
    assert f"{place} exists and is not empty" in fail(monkeypatch, capsys, *given)


def test_what_the_format_cannot_hold_is_rejected_too(
    arguments: Arguments,
    held_out: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = fail(monkeypatch, capsys, *arguments("--format", "gptq", "--check", held_out, "--max-kl", "1e-9"))
    assert f"It was written to {tmp_path / 'q.rejected'} in the native format instead" in said
    assert left(tmp_path) == {"held.txt", "q.rejected"}


def test_a_part_of_the_calibration_data(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not calibrated with; the rest is what it is without."""
    given = arguments("--json", "--no-report")
    with monkeypatch.context() as patch:
        usual = run(patch, *given[:2], str(tmp_path / "usual"), *given[3:])
        printed = run(patch, *given, "--check-split", "3")
    assert printed["recipe"] == usual["recipe"]
    assert printed["quality"]["text"] == "3 sequences of 32 tokens kept from the calibration data (2 others)"
    drawn = data.text_batches(
        load_tokenizer(str(tmp_path / "a")), tmp_path / "text.txt", num_samples=5, seq_len=32, batch_size=5
    )
    agrees(printed["quality"], tmp_path / "q", tmp_path / "a", drawn[0]["input_ids"][2:])


def test_rounding_can_be_checked(arguments: Arguments, held_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without calibration data."""
    given = arguments()
    printed = run(monkeypatch, *given[:3], "--method", "rtn", "--seq-len", "32", "--check", held_out, "--json")
    assert printed["quality"]["kl"] > 0
    assert printed["quality"]["max_kl"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-kl", "1"), r"--max-kl and --max-perplexity-ratio are about text that is not calibrated on"),
        (("--max-perplexity-ratio", "1"), r"give --check FILE, or --check-split NUMBER"),
        (("--check", "text.txt", "--check-split", "1"), "--check text.txt and --check-split 1 contradict each other"),
        (("--check-split", "99"), "--check-split 99 leaves nothing to calibrate with, as the data has"),
        (("--check", "gone.txt"), "there is no file 'gone.txt'"),
        (("--check-split", "1", "--max-kl", "0"), "max_kl is 0.0: give a positive number"),
        (("--check-split", "0"), "--check-split"),
    ],
)
def test_what_is_known_before_a_model_is_loaded(
    more: tuple[str, ...],
    message: str,
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = arguments()
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / "a").glob("*.safetensors"):
        file.unlink()
    assert message in fail(monkeypatch, capsys, *given, *more)
    assert left(tmp_path) == set()
