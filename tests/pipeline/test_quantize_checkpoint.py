"""From directory to directory: the same bytes as in memory, without the memory, and all of it or nothing."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from gptq_ao import cli, gptq_config, load_quantized, quantize_, quantize_checkpoint, save_quantized
from gptq_ao.errors import CheckpointError, ConfigError, NonFiniteError
from gptq_ao.integrations.transformers import load_model

from ..checkpoint.test_source import NORM, rewrite, saved
from ..models import token_batches

ROOT = Path(__file__).parents[2]


def tensors(directory: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            yield from ((name, shard.get_tensor(name)) for name in shard.keys())  # noqa: SIM118


def assert_same_checkpoint(a: Path, b: Path) -> None:
    manifests = [json.loads((d / "gptq_ao.json").read_text()) for d in (a, b)]
    for part in ("format", "format_version", "quantized", "dense", "tied"):
        assert manifests[0][part] == manifests[1][part], part
    left, right = dict(tensors(a)), dict(tensors(b))
    assert set(left) == set(right) == set(manifests[0]["shards"])
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name
    for other in ("config.json", "generation_config.json"):
        assert (a / other).read_text() == (b / other).read_text(), other


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"bits": 4}),
    "llama-tied-mixed": (
        "llama-tied",
        {"bits": 3, "act_order": "group", "rules": {"re:.*layers.0.*": {"bits": 8}, "re:.*v_proj.*": None}},
    ),
    "head": ("llama", {"bits": 4, "sym": False, "rules": {"lm_head": {"bits": 8}}}),
    "gpt2": ("gpt2", {"bits": 2, "act_order": "none"}),
    "experts": ("qwen3_moe", {"bits": 4, "group_size": 16}),
    "rtn": ("llama", {"bits": 4, "method": "rtn"}),
    "rtn-experts": ("qwen3_moe", {"bits": 4, "group_size": 16, "method": "rtn"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::gptq_ao.errors.FusedSettingsWarning")  # v is left out
def test_the_result_is_that_of_memory_byte_for_byte(case: str, tmp_path: Path) -> None:
    name, settings = CASES[case]
    directory = saved(name, tmp_path / "model")
    data = token_batches(vocabulary=60, length=24) if settings.get("method") != "rtn" else None
    config = gptq_config(**{"group_size": 32, **settings}, calibration=data)
    model = load_model(str(directory))
    expected: Any = quantize_(model, config)
    save_quantized(model, tmp_path / "memory")
    report = quantize_checkpoint(directory, tmp_path / "stream", config, max_shard_bytes=9_000)
    assert len(list((tmp_path / "stream").glob("*.safetensors"))) > 1  # weights were read back from files
    assert_same_checkpoint(tmp_path / "memory", tmp_path / "stream")
    for part in ("weights", "excluded", "stages", "hessians"):
        assert getattr(report, part) == getattr(expected, part), part
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    batch = token_batches(1, vocabulary=60, length=24)[0]
    again: Any = load_quantized(tmp_path / "stream")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.filterwarnings("ignore::gptq_ao.errors.FusedSettingsWarning")  # gate is left out
def test_a_filter_and_another_dtype(tmp_path: Path) -> None:
    directory = saved("llama", tmp_path / "model")
    report = quantize_checkpoint(
        directory,
        tmp_path / "out",
        gptq_config(4, 32, calibration=token_batches()),
        lambda module, name: name.endswith("up_proj"),
        dtype=torch.float32,
    )
    assert [w.name.split(".")[-2] for w in report.weights] == ["up_proj", "up_proj"]
    assert {p.dtype for p in load_quantized(tmp_path / "out").parameters()} == {torch.float32}


def test_what_fails_leaves_nothing_but_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = saved("llama", tmp_path / "model")
    out, config = tmp_path / "out", gptq_config(4, 32, calibration=token_batches())

    def fails(error: type[BaseException], message: str, finished: int = 0) -> None:
        with pytest.raises(error, match=message) as e:
            quantize_checkpoint(directory, out, config, max_shard_bytes=9_000)
        journal = tmp_path / ".out.journal"
        assert {p.name for p in tmp_path.iterdir()} == {"model", *([journal.name] if finished else [])}
        if finished:
            assert f"({finished} stages) is kept in {journal}" in e.value.__notes__[-1]
            assert not any(p.is_dir() and any(p.iterdir()) for p in journal.iterdir())  # nothing half-written
            with pytest.raises(CheckpointError, match=r"\.out\.journal holds the work of a run that did not end"):
                quantize_checkpoint(directory, out, config)
            shutil.rmtree(journal)

    solved = []

    def interrupt(*args: Any) -> Any:
        solved.append(args)
        if len(solved) == 7:
            raise KeyboardInterrupt("stop")
        return solve_together(*args)

    from gptq_ao.checkpoint.native import write
    from gptq_ao.pipeline import run_plan

    solve_together = run_plan.solve_together
    with monkeypatch.context() as patch:
        patch.setattr(run_plan, "solve_together", interrupt)
        fails(KeyboardInterrupt, "stop", 6)
    assert len(solved) == 7
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
        fails(CheckpointError, r"the disk of .*out is full: \d+ bytes needed, 10 free")
    with monkeypatch.context() as patch:
        patch.setattr(write.CheckpointWriter, "finish", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        fails(OSError, "gone", 8)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(directory, lambda t: {n: v.fill_(float("nan")) if n == name else v for n, v in t.items()})
    fails(NonFiniteError, rf"8192 elements of '{name}' \(128, 64\) are NaN or infinite", 6)
    rewrite(directory, lambda t: {n: v for n, v in t.items() if n != NORM})
    fails(CheckpointError, "it lacks 'model.norm.weight'")


def test_what_cannot_start(tmp_path: Path) -> None:
    config = gptq_config(4, 32, method="rtn")
    with pytest.raises(CheckpointError, match=r"'gone/model' is not a directory: download the model first"):
        quantize_checkpoint("gone/model", tmp_path / "out", config)
    directory = saved("llama", tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"model exists and is not empty: nothing is overwritten"):
        quantize_checkpoint(directory, directory, config)
    with pytest.raises(ConfigError, match=r"group_size does not divide"):
        quantize_checkpoint(directory, tmp_path / "out", gptq_config(4, 48, method="rtn"))
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(ROOT / "examples" / "tiny_lm")
    for out, options in ((tmp_path / "memory", []), (tmp_path / "stream", ["--stream"])):
        arguments = ["quantize", model, str(out), "--method", "rtn", "--group-size", "64", *options]
        monkeypatch.setattr(sys, "argv", ["gptq-ao", *arguments])
        with pytest.raises(SystemExit) as e:
            cli.main()
        assert e.value.code == 0
    assert_same_checkpoint(tmp_path / "memory", tmp_path / "stream")
    assert (tmp_path / "stream" / "tokenizer.json").is_file()


MEASURE = """
import resource, sys
import torch, transformers
from gptq_ao import gptq_config, quantize_, quantize_checkpoint, save_quantized
from gptq_ao.integrations.transformers import load_model

def data_bytes():  # private writable memory, resident or not: what RLIMIT_DATA limits
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024

where, source, out, limit = sys.argv[1:]
torch.set_num_threads(1)
warm = torch.ones(64, 64) @ torch.ones(64, 64)
transformers.LlamaForCausalLM
resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + int(limit),) * 2)
if where == "memory":
    model = load_model(source)
    model.float()
quantize_checkpoint(source, out, gptq_config(4, 128, method="rtn"), max_shard_bytes=2**22)
print("done")
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits private memory")
def test_a_quarter_of_the_model_s_size_is_enough_memory(tmp_path: Path) -> None:
    """The limit is on what is allocated from now on, imports aside, and it is hard: an allocation beyond it fails."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path / "model")
    del model

    # Left alone, glibc keeps freed weights in its heap, where later ones of other sizes do not fit.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}

    def run(where: str, limit: int) -> subprocess.CompletedProcess[str]:
        arguments = [where, str(tmp_path / "model"), str(tmp_path / where), str(limit)]
        command = [sys.executable, "-c", MEASURE, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = run("stream", size // 4)
    assert done.returncode == 0, done.stderr
    assert "memory" in run("memory", size // 4).stderr.splitlines()[-1]  # the limit would be noticed
