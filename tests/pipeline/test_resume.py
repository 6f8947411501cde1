"""A run that ended in the middle, and the one that goes on: all that it makes is what one undisturbed run makes."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_ao import gptq_config, quantize_, quantize_checkpoint, save_quantized
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.passes import calibrate
from gptq_ao.pipeline import quantize, run_plan
from gptq_ao.report import Report
from gptq_ao.solver.hessian import HessianObserver
from gptq_ao.tensor import GroupTensor

from ..checkpoint.test_source import saved
from ..models import Attention, seeded, token_batches
from .test_quantize_checkpoint import assert_same_checkpoint
from .test_replay import Branching


class StoppedError(Exception):
    """What ends a run."""


def stop_after(stage: int) -> Callable[[int, int, str, float], None]:
    def progress(number: int, of: int, name: str, seconds: float) -> None:
        if number == stage and not name.startswith("measure"):
            raise StoppedError

    return progress


def config(**settings: Any) -> Any:
    return gptq_config(**{"bits": 4, "group_size": 32, "calibration": token_batches(), **settings})


def parts(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a model is made of."""
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found |= {f"{name}.{k}": t for k, t in p.parts().items()} if isinstance(p, GroupTensor) else {name: p}
    return found


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])] == []


def assert_same_report(a: Report, b: Report) -> None:
    facts = [{k: v for k, v in r.to_dict().items() if k not in ("seconds", "peak_bytes")} for r in (a, b)]
    assert facts[0] == facts[1]
    for name, adapter in a.adapter.items():
        assert torch.equal(adapter.A, b.adapter[name].A)
        assert torch.equal(adapter.B, b.adapter[name].B)


def mixture() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
    made = Qwen3MoeConfig(vocab_size=96, num_hidden_layers=1, **sizes, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(made).eval()


class Noisy(nn.Module):
    """Draws random numbers when it runs; its stages read what was drawn before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x + torch.rand_like(x)).relu()
        x = self.b(x + torch.rand_like(x)).relu()
        return self.c(x + torch.rand_like(x))


class Tied(nn.Module):
    """One weight under two names, which is quantized once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


def noisy_data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(20, 32, generator=generator) for _ in range(3)]


class Layer(nn.Module):
    """Attention and an MLP on a residual stream; `wide` is read with its sides exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.down = Attention(), nn.Linear(96, 64)
        self.wide = nn.Parameter(torch.empty(64, 96))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down((x @ self.wide).relu())


def layer(dtype: torch.dtype = torch.float32) -> nn.Module:
    return seeded(Layer()).to(dtype)


def activations(dtype: torch.dtype = torch.float32, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 24, 64, generator=generator).to(dtype) for _ in range(count)]


LAYER = {"calibration": activations()}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int]] = {
    "default": (layer, LAYER, 0),
    "default-snapshots": (layer, LAYER, 1),
    "3-bit-permuted": (layer, {"bits": 3, "act_order": "group", **LAYER}, 0),
    "asymmetric-8-bit": (layer, {"bits": 8, "sym": False, "compensate": "none", **LAYER}, 0),
    "adapter": (layer, {"adapter_rank": 4, **LAYER}, 0),
    "adapter-snapshots": (layer, {"adapter_rank": 4, "bits": 2, **LAYER}, 2),
    "bf16": (lambda: layer(torch.bfloat16), {"calibration": activations(torch.bfloat16)}, 1),
    "target-bits": (layer, {"target_bits": 5.0, "group_size": -1, **LAYER}, 0),
    "rule-rounds-some": (layer, {"rules": {"attention.out": {"method": "rtn"}, "down": None}, **LAYER}, 0),
    "noise": (lambda: seeded(Noisy()), {"calibration": noisy_data()}, 0),
    "noise-snapshots": (lambda: seeded(Noisy()), {"calibration": noisy_data()}, 1),
    "tied": (lambda: seeded(Tied()), {"calibration": noisy_data()}, 1),
    "experts": (mixture, {"group_size": 16, "expert_min_rows": 20, "adapter_rank": 2}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_undisturbed_one(case: str, tmp_path: Path) -> None:
    make, settings, every = CASES[case]
    state = torch.get_rng_state()
    model = make()
    expected: Any = quantize_(model, config(**settings))
    stages, journal = expected.stages, tmp_path / "journal"
    for stage in sorted({max(stages // 2, 1), stages - 1}):
        torch.set_rng_state(state)  # what a new process has; then another, which must make no difference
        with pytest.raises(StoppedError) as e:
            quantize_(make(), config(**settings), journal=journal, snapshot_every=every, progress=stop_after(stage))
        assert f"({stage} stages) is kept in {journal}" in e.value.__notes__[-1]
        torch.rand(7)
    resumed = make()
    report: Any = quantize_(resumed, config(**settings), journal=journal, snapshot_every=every)
    assert_equal(parts(model), parts(resumed))
    assert_same_report(expected, report)
    torch.set_rng_state(state)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["default-snapshots", "3-bit-permuted", "noise-snapshots", "experts"])
def test_on_a_gpu(case: str, tmp_path: Path) -> None:
    make, settings, every = CASES[case]
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    model = make().cuda()
    expected: Any = quantize_(model, config(**settings))
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state(states[1])
    with pytest.raises(StoppedError):
        quantize_(
            make().cuda(),
            config(**settings),
            journal=tmp_path,
            snapshot_every=every,
            progress=stop_after(expected.stages - 1),
        )
    torch.rand(7, device="cuda")
    resumed = make().cuda()
    report: Any = quantize_(resumed, config(**settings), journal=tmp_path, snapshot_every=every)
    assert_equal(parts(model), parts(resumed))
    assert_same_report(expected, report)


def test_what_is_finished_is_neither_solved_nor_observed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[Any]] = {"solved": [], "observed": [], "run": [], "chosen": []}
    solve, observe, run = run_plan._Solving, HessianObserver.forward, calibrate.run_segment
    choose = quantize.choose_precision

    def noting(kind: str, call: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            calls[kind].append(args)
            return call(*args, **kwargs)

        return instead

    def count() -> dict[str, int]:
        monkeypatch.setattr(run_plan, "_Solving", noting("solved", solve))
        monkeypatch.setattr(HessianObserver, "forward", noting("observed", observe))
        monkeypatch.setattr(calibrate, "run_segment", noting("run", run))
        monkeypatch.setattr(quantize, "choose_precision", lambda *a: noting("chosen", choose)(*a))
        found = {kind: len(of) for kind, of in calls.items()}
        for of in calls.values():
            of.clear()
        return found

    settings = {"target_bits": 5.0, "compensate": "none", "group_size": -1, **LAYER}
    for every in (0, 2):
        journal = tmp_path / str(every)
        with pytest.raises(StoppedError):
            quantize_(layer(), config(**settings), journal=journal, snapshot_every=every, progress=stop_after(2))
        count()
        quantize_(layer(), config(**settings), journal=journal, snapshot_every=every)
        # 3 batches, 4 stages; with snapshots that of stage 2 is there.
        assert count() == {"solved": 2, "observed": 2 * 3, "run": 3 * (2 if every else 4), "chosen": 0}
        assert len(list(journal.glob("snapshot-*"))) == (3 if every else 0)  # of one stage only
        quantize_(layer(), config(**settings), journal=journal)
        assert count() == {"solved": 0, "observed": 0, "run": 3 * (2 if every else 4), "chosen": 0}


@pytest.mark.parametrize("name", ["llama-tied", "qwen3_moe"])
def test_from_directory_to_directory(name: str, tmp_path: Path) -> None:
    directory = saved(name, tmp_path / "model")
    settings = config(group_size=16, calibration=token_batches(vocabulary=60, length=24))
    expected = quantize_checkpoint(directory, tmp_path / "a", settings, max_shard_bytes=9_000)
    out = tmp_path / "b"
    for stage in (2, 4):
        with pytest.raises(StoppedError) as e:
            quantize_checkpoint(
                directory,
                out,
                settings,
                resume=True,
                snapshot_every=3,
                max_shard_bytes=5_000,
                progress=stop_after(stage),
            )
        assert "resume=True) goes on from there. Or remove" in e.value.__notes__[-1]
        assert not out.exists()
    report = quantize_checkpoint(directory, out, settings, resume=True, max_shard_bytes=9_000)
    assert_same_report(expected, report)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in out.iterdir()
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "model"]


def test_in_memory_and_streamed_alike(tmp_path: Path) -> None:
    """Not the same journal, since one knows the model by its values and the other by its files."""
    directory = saved("llama", tmp_path / "model")
    from gptq_ao.integrations.transformers import load_model

    settings = config(calibration=token_batches(vocabulary=60, length=24))
    with pytest.raises(StoppedError):
        quantize_checkpoint(directory, tmp_path / "stream", settings, progress=stop_after(3))
    quantize_checkpoint(directory, tmp_path / "stream", settings, resume=True)
    model = load_model(str(directory))
    quantize_(model, settings, journal=tmp_path / "journal")
    save_quantized(model, tmp_path / "memory")
    assert_same_checkpoint(tmp_path / "memory", tmp_path / "stream")
    shutil.copytree(tmp_path / "journal", tmp_path / ".other.journal")
    with pytest.raises(ConfigError, match=r"contents of its parameters and buffers was [0-9a-f]{12}…, and is nothing"):
        quantize_checkpoint(directory, tmp_path / "other", settings, resume=True)


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 3}, r"settings: bits was 4, and is 3"),
    "rules": ({"rules": {"down": None}}, r"settings: rules: down was nothing, and is None"),
    "calibration": (
        {"calibration": [2 * x for x in activations()]},
        r"calibration data: sha256 was [0-9a-f]{12}…, and is [0-9a-f]{12}…",
    ),
    "fewer batches": ({"calibration": activations(count=2)}, r"calibration data: batches was 3, and is 2"),
    "filter": ({}, "weights that are quantized, and how was"),
    "version": ({}, r"versions: gptq_ao was 0\.\d+\.\d+, and is 9\.9"),
    "solver": ({}, r"versions: code of the solver was sha256 [0-9a-f]{12}…, and is sha256"),
    "torch": ({}, r"versions: torch was .*, and is 1\.0"),
}


@pytest.mark.parametrize("what", OTHER)
def test_another_run_is_refused_by_name(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, message = OTHER[what]
    with pytest.raises(StoppedError):
        quantize_(layer(), config(**LAYER), journal=tmp_path, progress=stop_after(2))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "lock"}
    (tmp_path / "lock").unlink()  # what is left of one says nothing
    if what == "version":
        monkeypatch.setattr("gptq_ao.journal.facts.VERSION", "9.9")
    elif what == "torch":
        monkeypatch.setattr("torch.__version__", "1.0")
    elif what == "solver":
        monkeypatch.setattr("gptq_ao.journal.facts.PACKAGE", tmp_path)
    chosen = (lambda module, name: "attention" in name) if what == "filter" else None
    with pytest.raises(
        ConfigError, match=rf"is the journal of another run, which this one cannot go on.*\n.*{message}"
    ):
        quantize_(layer(), config(**{**LAYER, **settings}), chosen, journal=tmp_path)
    # Nothing of it was touched.
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "lock"}


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    directory, out = saved("llama", tmp_path / "model"), tmp_path / "out"
    settings = config(calibration=token_batches(vocabulary=60, length=24))
    with pytest.raises(StoppedError):
        quantize_checkpoint(directory, out, settings, progress=stop_after(2))
    file = directory / "model-00003-of-00007.safetensors"
    about, content = file.stat(), (directory / "config.json").read_text()

    def refused(message: str, **arguments: Any) -> None:
        with pytest.raises(ConfigError, match=rf"out\.journal is the journal of another run[^?]*{message}"):
            quantize_checkpoint(directory, out, settings, resume=True, **arguments)

    refused("model: names, dtypes and shapes was", dtype=torch.float64)
    (directory / "config.json").write_text(content + " ")
    refused(r"model: config.json was [0-9a-f]{12}…, and is")
    (directory / "config.json").write_text(content)
    content_of = bytearray(file.read_bytes())
    content_of[-2] ^= 1  # the last bit of a number
    file.write_bytes(content_of)
    refused(r"model: model-00003-of-00007.safetensors: last change \(ns since 1970\) was \d+, and is \d+\nGive")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))  # what is documented as not seen
    quantize_checkpoint(directory, out, settings, resume=True)


def test_another_model_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        quantize_(layer(), config(**LAYER), journal=tmp_path, progress=stop_after(2))
    other: Any = layer()
    with torch.no_grad():
        other.down.bias[3] += 1e-3  # one number, of what is not quantized
    with pytest.raises(ConfigError, match="contents of its parameters and buffers was"):
        quantize_(other, config(**LAYER), journal=tmp_path)
    other = layer()
    other.attention.heads = 2  # no value, no name, no shape
    with pytest.raises(ConfigError, match="model: computation was"):
        quantize_(other, config(**LAYER), journal=tmp_path)


def test_what_cannot_be_resumed_is_said_before_the_work(tmp_path: Path) -> None:
    data = [torch.randn(4, 16) for _ in range(3)]
    model = seeded(Branching())
    with pytest.raises(ConfigError, match=r"(?s)nothing could be kept of this run.*leave out journal, resume"):
        quantize_(model, config(group_size=16, calibration=data), journal=tmp_path / "journal")
    assert not (tmp_path / "journal").exists()
    with pytest.raises(ConfigError, match=r"snapshot_every=2 is about a journal, and there is none: give journal="):
        quantize_(layer(), config(), snapshot_every=2)
    with pytest.raises(ConfigError, match=r"snapshot_every is -1: give a number of stages, or 0"):
        quantize_(layer(), config(), journal=tmp_path / "journal", snapshot_every=-1)
    assert not list(tmp_path.iterdir())


def test_rounding_to_nearest_keeps_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        quantize_(layer(), gptq_config(4, 32, method="rtn"), journal=tmp_path / "journal")
        assert not (tmp_path / "journal").exists()


def test_a_result_that_got_its_name_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run was ended between the last two steps."""
    directory, out = saved("llama", tmp_path / "model"), tmp_path / "out"
    settings = config(calibration=token_batches(vocabulary=60, length=24))
    with monkeypatch.context() as patch:
        patch.setattr("gptq_ao.journal.journal.Journal.remove", lambda self: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            quantize_checkpoint(directory, out, settings)
    assert (out / "gptq_ao.json").exists()
    assert (tmp_path / ".out.journal").exists()
    with pytest.raises(CheckpointError, match=r"out is complete: the run that wrote it was ended when all was done"):
        quantize_checkpoint(directory, out, settings, resume=True)
    assert not (tmp_path / ".out.journal").exists()
    with pytest.raises(CheckpointError, match=r"out exists and is not empty"):
        quantize_checkpoint(directory, out, settings, resume=True)
