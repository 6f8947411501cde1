"""The command line, in process; once as a real process, where only stdout and the exit status count."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptq_ao import Int4GroupTensor, cli, save_quantized
from gptq_ao.tiny_lm.corpus import documents

from ..planning.test_plan import mixture

TINY = str(Path(__file__).parents[2] / "examples" / "tiny_lm")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": d}) for d in documents("heldout")[:6]))
    return path


@pytest.fixture(scope="module")
def quantized(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model written by the command, and what the command printed."""
    out = tmp_path_factory.mktemp("out") / "q"
    with pytest.MonkeyPatch.context() as patch:
        printed = run(
            patch,
            "quantize",
            TINY,
            str(out),
            *CALIBRATION,
            "--calibration",
            str(text),
            "--max-memory",
            "cpu=500KiB",
            "--json",
        )
    return out, printed


CALIBRATION = ("--bits", "3", "--group-size", "64", "--num-samples", "8", "--seq-len", "128", "--batch-size", "2")


def run(patch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """stdout of a command that must succeed, as JSON."""
    lines: list[str] = []
    patch.setattr("builtins.print", lambda *a, **k: lines.append(str(a[0])) if "file" not in k else None)
    patch.setattr(sys, "argv", ["gptq-ao", *arguments])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 0
    assert len(lines) == 1
    return json.loads(lines[0]) if "--json" in arguments else lines[0]


def fail(patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    patch.setattr(sys, "argv", ["gptq-ao", *arguments])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code != 0
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_quantize_reports_totals_phases_and_layers(quantized: tuple[Path, dict[str, Any]]) -> None:
    out, report = quantized
    assert report["weights"] == len(report["layers"]) == 21
    assert report["stages"] == 12
    assert set(report["seconds"]) == {"capture", "plan", "calibrate", "solve"}
    assert report["bits_per_weight"] == pytest.approx(3 + 32 / 64)
    assert report["excluded"]["model.embed_tokens.weight"] == "also the embedding table"
    assert {x["bits"] for x in report["layers"]} == {3}
    assert {x["rows"] for x in report["layers"]} == {8 * 128}
    assert 0 < report["peak_bytes"]["activations"] <= 500 * 1024
    assert report["peak_bytes"]["files"] > 0
    assert (out / "gptq_ao.json").is_file()
    assert (out / "tokenizer.json").is_file()


def test_eval_of_what_quantize_wrote(
    quantized: tuple[Path, dict[str, Any]], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--data", str(text), "--seq-len", "128", "--max-chunks", "10", "--json")
    result = run(monkeypatch, "eval", str(quantized[0]), "--reference", TINY, *options)
    assert result["tokens"] == 10 * 127
    assert 0.01 < result["kl"] < 0.3
    assert "10 of " in result["protocol"]
    original = run(monkeypatch, "eval", TINY, *options)
    assert original["kl"] is None
    assert 1.5 < original["perplexity"] < result["perplexity"] < 4
    itself = run(monkeypatch, "eval", TINY, "--reference", TINY, *options)
    assert itself["kl"] == 0


def test_inspect(quantized: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    facts = run(monkeypatch, "inspect", str(quantized[0]), "--json")
    assert len(facts["quantized"]) == 21
    assert facts["quantized"][0]["bits"] == 3
    assert facts["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    lines = run(monkeypatch, "inspect", str(quantized[0]))
    assert "21 quantized and 8 other tensors" in lines
    assert "lm_head.weight is model.embed_tokens.weight" in lines


def test_inspect_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack [E, N, K] has its groups along K."""
    codes, grid = torch.zeros(4, 16, 64, dtype=torch.uint8), torch.zeros(4, 16, 1, dtype=torch.uint8)
    model = torch.nn.Module()
    weight = Int4GroupTensor.from_codes(codes, grid.half() + 1, grid, dtype=torch.float32)
    model.experts = torch.nn.Parameter(weight, requires_grad=False)
    save_quantized(model, tmp_path / "out")
    (layer,) = run(monkeypatch, "inspect", str(tmp_path / "out"), "--json")["quantized"]
    assert (layer["shape"], layer["group_size"]) == ([4, 16, 64], 64)
    assert "experts  [4, 16, 64]  4 bits, group 64" in run(monkeypatch, "inspect", str(tmp_path / "out"))


def test_convert_and_inspect(
    quantized: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native → GPTQ → compressed-tensors → native: the same weights, the tokenizer along."""
    before = run(monkeypatch, "inspect", str(quantized[0]), "--json")
    previous, seen = quantized[0], "native"
    for format in ("gptq", "compressed-tensors", "native"):
        out = tmp_path / format
        facts = run(monkeypatch, "convert", str(previous), str(out), "--format", format, "--json")
        assert (facts["from"], facts["to"]) == (seen, format)
        assert (out / "tokenizer.json").read_bytes() == (quantized[0] / "tokenizer.json").read_bytes()
        found = run(monkeypatch, "inspect", str(out), "--json")
        layers = sorted((x["name"], x["bits"], x["group_size"], x["shape"]) for x in found["quantized"])
        assert layers == sorted((x["name"], x["bits"], x["group_size"], x["shape"]) for x in before["quantized"])
        previous, seen = out, format
    assert "gptq" in run(monkeypatch, "inspect", str(tmp_path / "gptq")).splitlines()[0]
    name = "model-00001-of-00001.safetensors"
    for part, tensor in load_file(quantized[0] / name).items():
        assert torch.equal(load_file(tmp_path / "native" / name)[part], tensor), part


def test_without_data_there_is_the_text_that_python_brings_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--effort", "fast", "--num-samples", "8", "--seq-len", "64", "--json")
    report = run(monkeypatch, "quantize", TINY, str(tmp_path / "q"), *few)
    assert {x["method"] for x in report["layers"]} == {"gptq"}
    assert all(x["rows"] == 8 * 64 for x in report["layers"])
    (said,) = (w for w in report["warnings"] if "no --calibration was given" in w)
    assert "the sources of Python's standard library" in said
    assert report["recipe"]["calibration data"].endswith("sequences of the sources of Python's standard library")
    again = run(monkeypatch, "quantize", TINY, str(tmp_path / "again"), *few)
    assert [x["error"] for x in again["layers"]] == [x["error"] for x in report["layers"]]


def test_rtn_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(monkeypatch, "quantize", TINY, str(tmp_path / "q"), "--method", "rtn", "--asym", "--json")
    assert {x["method"] for x in report["layers"]} == {"rtn"}


def test_errors_are_one_message_and_a_status(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "q")
    cases = [
        (("quantize", TINY, out, "--calibration", str(text), "--bits", "5"), "error: bits is 5"),
        (("quantize", TINY, out, "--calibration", "gone.jsonl"), "error: there is no file 'gone.jsonl'"),
        (("quantize", str(tmp_path), out, "--method", "rtn"), "has no config.json"),
        (("quantize", TINY, out, "--method", "rtn", "--group-size", "100"), "group_size does not divide"),
        (("inspect", TINY), "is not quantized: load it with"),
        (("convert", "gone", out, "--format", "gptq"), "'gone' is neither a directory here, nor a model of the hub"),
        (("convert", TINY, out, "--format", "gptq"), "is not quantized: load it with"),
        (("quantize", TINY, out, "--group-sizes", "1"), "--group-size"),
    ]
    for arguments, message in cases:
        assert message in fail(monkeypatch, capsys, *arguments), arguments
    assert not Path(out).exists()


def test_as_a_process_stdout_is_one_json_object(quantized: tuple[Path, dict[str, Any]]) -> None:
    command = [sys.executable, "-m", "gptq_ao", "inspect", str(quantized[0]), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["quantized"]) == 21
    failed = subprocess.run([*command[:4], TINY], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "Traceback" not in failed.stderr


@pytest.mark.long
def test_demo_shows_that_gptq_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptq_ao import demo

    monkeypatch.setattr(demo, "EVALUATION_CHUNKS", 6)
    monkeypatch.setattr(demo, "CALIBRATION_SAMPLES", 16)
    monkeypatch.setattr(demo, "GENERATED_TOKENS", 12)
    state = torch.get_rng_state()
    result = run(monkeypatch, "demo", "--json")
    assert torch.equal(torch.get_rng_state(), state)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["original", "4-bit RTN", "4-bit GPTQ", "3-bit RTN", "3-bit GPTQ"]
    assert rows["4-bit GPTQ"]["kl"] < 0.75 * rows["4-bit RTN"]["kl"]
    assert rows["3-bit GPTQ"]["kl"] < 0.75 * rows["3-bit RTN"]["kl"]
    assert rows["original"]["bytes"] > 3.5 * rows["4-bit GPTQ"]["bytes"]
    assert set(result["generated"]) == {"original", "4-bit GPTQ", "3-bit GPTQ"}


def test_target_bits(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("quantize", TINY, str(tmp_path / "q"), *CALIBRATION[2:], "--calibration", str(text))
    with monkeypatch.context() as patch:
        printed = run(patch, *arguments, "--effort", "fast", "--target-bits", "3.8", "--json")
    assert 3.7 < printed["bits_per_weight"] <= 3.8
    assert len({layer["bits"] for layer in printed["layers"]}) > 1
    assert len(printed["precision"]) == 12
    error = fail(monkeypatch, capsys, *arguments, "--bits", "3", "--target-bits", "3.8")
    assert "bits=3 and target_bits=3.8 contradict each other" in error


@pytest.mark.parametrize(
    ("option", "what"),
    [
        (("--effort", "fast"), lambda facts: facts["seconds"]["solve"]),
        (("--asym", "--method", "rtn"), lambda facts: facts["hessians"]),
        (("--bits", "3"), lambda facts: facts["bits_per_weight"]),
        (("--group-size", "32"), lambda facts: facts["bits_per_weight"]),
        (("--expert-min-rows", "0"), lambda facts: [w["fallback"] for w in facts["layers"]]),
        (("--calibrate-all-experts",), lambda facts: [w["rows"] for w in facts["layers"]]),
        (("--nproc", "2", "--batch-size", "1"), lambda facts: facts["activation_bytes"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_an_option_changes_the_plan(
    option: tuple[str, ...], what: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture().save_pretrained(tmp_path)
    usual = ("plan", str(tmp_path), "--group-size", "16", "--num-samples", "4", "--seq-len", "64", "--json")
    assert what(run(monkeypatch, *usual, *option)) != what(run(monkeypatch, *usual))
