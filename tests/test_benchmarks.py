"""The benchmark scripts run. What they measure is not asserted."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from gptq_ao.planning import memory
from gptq_ao.tiny_lm.corpus import documents

ROOT = Path(__file__).parents[1]


def test_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("\n".join(documents("heldout")[:4]))
    text = str(tmp_path / "text.txt")
    options = [
        "--seq-len",
        "64",
        "--num-samples",
        "8",
        "--max-chunks",
        "4",
        "--formats",
        "W4 g128",
        "--recipes",
        "rtn",
        "default",
    ]
    script = runpy.run_path(str(ROOT / "benchmarks" / "accuracy.py"))
    monkeypatch.setattr(
        sys, "argv", ["x", str(ROOT / "examples/tiny_lm"), "--calibration", text, "--data", text, *options]
    )
    script["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("original: perplexity")
    assert [line[:17].rstrip() for line in lines[3:]] == ["W4 g128  round to", "W4 g128  default"]
    assert {step for step, _ in script["STEPS"]} < set(script["recipes"](["steps", "max"]))


def test_linear(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "linear.py"))
    script["SHAPES"][:] = [(32, 64)]
    script["ROWS"][:] = [1, 100]
    monkeypatch.setattr(sys, "argv", ["x", "--bits", "4", "3", "--group-size", "32"])
    script["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4
    assert "32 x 64" in lines[2]


def test_import_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "import_time.py"))
    monkeypatch.setattr(sys, "argv", ["x", "--runs", "1"])
    script["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["torch", "torchao", "gptq_ao"]
    assert all(re.search(r" \d+\.\d\d s, at least \d+\.\d\d$", line) for line in lines[1:])


def test_capture(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "capture.py"))
    script["MODELS"]["8B"]["num_hidden_layers"] = 1
    monkeypatch.setattr(sys, "argv", ["x", "--models", "8B"])
    script["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[2].split()[0] == "8B"


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "streaming.py"))
    size = ["--gigabytes", "0.0001", "--hidden", "128", "--intermediate", "128", "--fraction", "1000", "--tokens", "32"]
    monkeypatch.setattr(sys, "argv", ["x", *size, str(tmp_path)])
    script["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("stream: private memory at most")
    assert lines[-1] == "equal, byte for byte: True"


@pytest.mark.gpu
def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = runpy.run_path(str(ROOT / "benchmarks" / "kernel_times.py"))
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--rows", "1", "300"])
    script["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("reads ")
    assert sum("4096 x 4096    4   128" in line for line in lines) == 2


@pytest.mark.gpu
def test_experts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = runpy.run_path(str(ROOT / "benchmarks" / "experts.py"))
    monkeypatch.setattr(sys, "argv", ["x", "--experts", "8", "--taken", "2", "--tokens", "1", "300"])
    script["main"]()
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.gpu
def test_decode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = runpy.run_path(str(ROOT / "benchmarks" / "decode.py"))
    options = ["--layers", "1", "--vocabulary", "512", "--batch", "2", "--tokens", "8", "--kinds", "bf16", "gptq_ao"]
    monkeypatch.setattr(sys, "argv", ["x", *options])
    script["main"]()
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_moe_layer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "moe_layer.py"))
    shapes = ["--experts", "4", "--per-token", "2", "--hidden", "64", "--intermediate", "32", "--device", "cpu"]
    options = ["--sequences", "4", "--seq-len", "32", "--batch-size", "2", "--effort", "fast"]
    monkeypatch.setattr(sys, "argv", ["x", *shapes, *options])
    script["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(
        "4 experts of 64 x 32, 2 for each token; 4 x 32 tokens, 2 a batch, effort fast, no limit"
    )
    assert [line.split()[0] for line in lines[2:8]] == ["phase", "capture", "plan", "calibrate", "solve", "total"]
    assert re.match(r"memory: \d+\.\d\d GiB at most, planned \d+\.\d\d$", lines[8])
    assert lines[10] == "all experts at once"
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    script["main"]()
    assert "experts in 4 portions of 1" in capsys.readouterr().out


@pytest.mark.long
def test_loading(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "loading.py"))
    small = ["--layers", "1", "--width", "2048", "--formats", "gptq", "--devices", "cpu"]
    monkeypatch.setattr(sys, "argv", ["x", *small])
    script["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("gptq: ")
    assert ["of a file" in line for line in lines[2:]] == [True, True]


def test_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The row of this package; the others need their libraries."""
    (tmp_path / "text.txt").write_text("\n".join(documents("heldout")[:4]))
    script = runpy.run_path(str(ROOT / "benchmarks" / "comparison.py"))
    options = ["--data", str(tmp_path / "text.txt"), "--seq-len", "64", "--max-chunks", "4"]
    monkeypatch.setattr(sys, "argv", ["x", str(ROOT / "examples/tiny_lm"), *options])
    script["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("original: perplexity")
    assert lines[2].startswith("4x128 round to nearest gptq_ao")


def test_call_overhead(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "call_overhead.py"))
    monkeypatch.setattr(sys, "argv", ["x", "--size", "128", "--rounds", "1"])
    script["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:22].rstrip() for line in lines[1:]] == ["F.linear, dense", "F.linear, quantized", "gptq_ao::linear"]
