"""plan: what it says is what happens. Predictions are compared with a real run, whose every allocation is followed."""

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from gptq_ao import cli, gptq_config, plan, quantize_, quantize_checkpoint, save_quantized
from gptq_ao.errors import CalibrationError, CaptureError, CheckpointError, ConfigError
from gptq_ao.model.empty import empty_model
from gptq_ao.pipeline import quantize, restorable, run_plan
from gptq_ao.planning import memory
from gptq_ao.planning import plan as plan_module
from gptq_ao.planning.limits import read_limits
from gptq_ao.planning.live_bytes import LiveBytes
from gptq_ao.tensor import GroupTensor

from ..checkpoint.test_source import saved
from ..models import seeded, tiny_llama, token_batches
from ..pipeline.test_quantize import language_model

TINY = str(Path(__file__).parents[2] / "examples" / "tiny_lm")


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return seeded(nn.Sequential(*layers, nn.Linear(32 * 49, 32)))


def images() -> list[Tensor]:
    return [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def gpt2(layers: int = 2) -> Any:
    return language_model("GPT2", n_embd=64, n_layer=layers, n_head=4, n_positions=64)


def mixture() -> Any:
    return language_model(
        "Qwen3Moe", num_hidden_layers=1, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2
    )


def wide() -> Any:
    """Weights, Hessians and the solver outweigh activations."""
    return seeded(nn.Sequential(nn.Linear(64, 640), nn.ReLU(), nn.Linear(640, 32)))


RUNS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (lambda: tiny_llama(layers=1), {"calibration": token_batches(2, 4, 100) + token_batches(6, 1, 64)}),
    "llama-bf16": (
        lambda: tiny_llama(layers=2, dtype=torch.bfloat16),
        {"bits": 3, "calibration": token_batches(8, 4, 100), "rules": {"re:.*layers.1.mlp.*": None}},
    ),
    "gpt2-group": (lambda: gpt2(layers=1), {"act_order": "group", "calibration": token_batches()}),
    "convolutions": (convolutions, {"group_size": -1, "calibration": images()}),
    "experts": (mixture, {"calibration": token_batches()}),
    "wide": (wide, {"calibration": [torch.randn(50, 64, generator=torch.Generator().manual_seed(0))]}),
    "alone": (gpt2, {"compensate": "none", "refine_sweeps": 0, "calibration": token_batches()}),
    "rtn": (tiny_llama, {"method": "rtn"}),
}


def measured(model: nn.Module, config: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """`quantize_` and the bytes that were alive at most while it ran its plan, the model included; without the original
    weights, which it keeps as long as there is room."""
    monkeypatch.setattr(restorable, "free_bytes", lambda device: 0)
    tracker = LiveBytes()
    tracker.add(*model.parameters(), *model.buffers())

    def followed(function: Any) -> Any:
        def run(*args: Any) -> Any:
            with tracker:
                return function(*args)

        return run

    for name in ("run_plan", "round_all"):
        monkeypatch.setattr(quantize, name, followed(getattr(quantize, name)))
    if config.calibration is not None:
        for batch in config.calibration:
            tracker.add(*(batch.values() if isinstance(batch, dict) else [batch]))
    report = quantize_(model, config)
    return report, tracker.peak["cpu"]


@pytest.mark.parametrize("name", RUNS)
def test_the_prediction_is_what_happens(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make, settings = RUNS[name]
    model, config = make(), gptq_config(**{"group_size": 32, **settings})
    before = copy.deepcopy(model.state_dict())
    planned = plan(model, config)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    report, peak = measured(model, config, monkeypatch)
    assert planned.peak_bytes["device"] == pytest.approx(peak, rel=0.1)

    assert (planned.stages, planned.hessians, planned.excluded) == (report.stages, report.hessians, report.excluded)
    facts = ("name", "shape", "bits", "group_size", "method", "stage", "bytes", "original_bytes")
    assert {tuple(getattr(w, f) for f in facts) for w in planned.weights} == {
        tuple(getattr(w, f) for f in facts) for w in report.weights
    }
    assert planned.bits_per_weight == report.bits_per_weight
    if name != "experts":  # rows of an expert are an average
        assert {w.name: w.rows for w in planned.weights} == {w.name: w.rows for w in report.weights}
        save_quantized(model, tmp_path / "q")
        assert planned.output_bytes == tensor_bytes(tmp_path / "q")
    assert set(planned.seconds) >= {"plan", "calibrate", "solve"}
    assert all(s >= 0 for s in planned.seconds.values())


def tensor_bytes(directory: Path) -> int:
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            total += sum(shard.get_tensor(n).nbytes for n in shard.keys())  # noqa: SIM118
    return total


def test_the_size_of_what_is_streamed(tmp_path: Path) -> None:
    directory = saved("qwen3_moe", tmp_path / "model")
    config = gptq_config(3, 16, act_order="group", method="rtn")
    quantize_checkpoint(directory, tmp_path / "out", config)
    frame = empty_model(directory)
    assert plan(frame, config).output_bytes == tensor_bytes(tmp_path / "out")


def test_no_weight_and_no_data_is_needed() -> None:
    """On meta, model and batches; for a device that is not here."""
    model = tiny_llama(dtype=torch.bfloat16)
    real = plan(model, gptq_config(4, 32, calibration=token_batches()))
    frame = copy.deepcopy(model).to("meta")
    frame.model.rotary_emb = model.model.rotary_emb
    batches = [{"input_ids": b["input_ids"].to("meta")} for b in token_batches()]
    empty = plan(frame, gptq_config(4, 32, calibration=batches))
    assert empty.weights == real.weights
    assert empty.peak_bytes == real.peak_bytes
    if not torch.cuda.is_available():
        away = plan(frame, gptq_config(4, 32, calibration=batches), device="cuda")
        assert set(away.seconds) == {"capture", "plan"}
        assert away.device == "cuda"
        assert {w.kernel for w in away.weights} == {"dequantize + matmul"}
        model_bytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        assert away.peak_bytes["host"] == model_bytes + sum(b["input_ids"].nbytes for b in token_batches())
        assert away.peak_bytes["device"] < real.peak_bytes["device"]  # one segment's weights, not all
    assert {w.kernel for w in real.weights} == {"cpu int4 up to 256 rows, else dequantize + matmul"}


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_dense_output_head_is_offered_to_be_quantized(calibrated: bool) -> None:
    def notes(model: nn.Module, **settings: Any) -> tuple[str, ...]:
        data = {"calibration": token_batches()} if calibrated else {"method": "rtn"}
        return plan(model, gptq_config(4, 32, **data, **settings)).notes

    model = tiny_llama()
    (note,) = notes(model)
    assert note == (
        "lm_head.weight (output head) stays as it is: 24.00 KiB of the result, which every step of decoding reads. "
        'rules={"lm_head": {"bits": 8}} quantizes it, too'
    )
    assert notes(model, rules={"lm_head": {"bits": 8}}) == ()
    assert notes(model, rules={"lm_head": None}) == ()  # it was thought of
    assert notes(tiny_llama(tied=True)) == ()  # the embedding's
    assert notes(tiny_llama(layers=12)) == ()  # little


def test_the_plan_is_readable() -> None:
    rules: dict[str, Any] = {
        "re:.*layers.0.*": {"bits": 8},
        "re:.*layers.1.*": {"method": "rtn"},
        "lm_head": {"bits": 2},
    }
    planned = plan(tiny_llama(), gptq_config(4, 32, rules=rules, calibration=token_batches()))
    text = str(planned)
    assert all(w.name in text for w in planned.weights)
    assert "left as it is: model.embed_tokens.weight (embedding table)" in text
    assert "15 weights run as: dequantize + matmul" in text
    assert f"15 weights, {planned.bits_per_weight:.3f} bits each, in 9 stages with 9 Hessians" in text
    assert "peak memory on cpu: device " in text
    facts = json.loads(json.dumps(planned.to_dict()))
    assert facts["weights"] == len(facts["layers"]) == 15
    assert {x["bits"] for x in facts["layers"]} == {8, 4, 2}
    assert facts["layers"][0]["method"] == "gptq"
    assert facts["peak_bytes"]["device"] == planned.peak_bytes["device"]


def test_fallbacks_are_foreseen() -> None:
    few = plan(mixture(), gptq_config(4, 32, calibration=token_batches(1, 2, 40), expert_min_rows=50))
    expected = (
        "an expert will see 20 rows on average, and is solved with the Hessian of all experts' rows where it sees "
        "fewer than 50"
    )
    assert {w.name: w.fallback for w in few.weights if w.fallback} == {
        f"model.layers.0.mlp.experts.{n}": expected for n in ("gate_up_proj", "down_proj")
    }
    assert f"fallback: {expected}" in str(few)
    enough = plan(mixture(), gptq_config(4, 32, calibration=token_batches(1, 2, 40), expert_min_rows=20))
    assert not any(w.fallback for w in enough.weights)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 32))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight[:48].t()

    (weight,) = plan(Half(), gptq_config(4, 32, calibration=[torch.ones(4, 32)])).weights
    assert weight.fallback == "16 of 64 rows: no product of the captured forward uses them"


def test_what_quantize_refuses_plan_refuses() -> None:
    model, data = tiny_llama(), token_batches(1)
    cases: list[tuple[Any, type[Exception], str]] = [
        (gptq_config(4, 48, calibration=data), ConfigError, "group_size does not divide the input features"),
        (gptq_config(4, 32, rules={"gone": None}, calibration=data), ConfigError, "rule 'gone' matches no weight"),
        (gptq_config(4, 32), CalibrationError, "no calibration data"),
        (gptq_config(4, 32, calibration=[{"ids": data[0]["input_ids"]}]), CaptureError, "could not capture"),
        ({"bits": 4}, ConfigError, r"plan takes a config of gptq_config\(\), got dict"),
    ]
    for config, error, message in cases:
        with pytest.raises(error, match=message):
            plan(model, config)
    quantized = tiny_llama()
    quantize_(quantized, gptq_config(4, 32, method="rtn"))
    with pytest.raises(ConfigError, match="already quantized"):
        plan(quantized, gptq_config(4, 32, calibration=data))


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_llama(), gptq_config(4, 32, calibration=token_batches(8, 4, 100))
    planned = plan(model, config)
    taken = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    free = {"cpu": planned.peak_bytes["host"] - taken, "cuda": 10**12}
    monkeypatch.setattr(plan_module, "free_bytes", lambda device: free[device.type])
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[device.type])
    plan(model, config)
    free["cpu"] -= 1
    message = r"would take .* of memory on cpu, of which 337.31 KiB are taken already, .*: stream the checkpoint \(--st"
    with pytest.raises(ConfigError, match=message):
        plan(model, config)
    smaller = plan(model, config, max_memory={"cpu": 2**20})  # the rest in files
    assert smaller.peak_bytes["disk"] == planned.activation_bytes - 2**20
    assert smaller.peak_bytes["host"] < planned.peak_bytes["host"] - 2**20
    monkeypatch.setattr(plan_module, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(ConfigError, match=rf"would wait in files in {tempfile.gettempdir()}, which has 10 B free: set"):
        plan(model, config, max_memory={"cpu": 2**20})


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is free there")
def test_limits_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_llama(), gptq_config(4, 32, calibration=token_batches(8, 4, 100))
    free = plan(model, config, device="cuda")
    assert free.peak_bytes["disk"] == 0
    with pytest.raises(ConfigError, match=r"max_memory allows 1.00 KiB on cuda, but the weights and temporaries of"):
        plan(model, config, device="cuda", max_memory={"cuda": "1KiB"})
    limit = free.peak_bytes["device"] - 2**20
    limited = plan(model, config, device="cuda", max_memory={0: limit, "cpu": 2**19})
    assert limited.peak_bytes["device"] <= limit
    assert limited.peak_bytes["host"] == free.peak_bytes["host"] + 2**19
    assert 0 < limited.peak_bytes["disk"] < limited.activation_bytes


BUDGETS = [{"cpu": 0}, {"cpu": "100 KB"}]


@pytest.mark.parametrize("limit", BUDGETS)
def test_the_result_does_not_depend_on_where_activations_wait(
    limit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    models = [gpt2(1), gpt2(1)]
    config = gptq_config(4, 32, calibration=token_batches())
    reports: list[Any] = [quantize_(models[0], config), quantize_(models[1], config, max_memory=limit)]
    assert reports[0].weights == reports[1].weights
    assert reports[0].peak_bytes["files"] == 0
    peak = reports[1].peak_bytes
    assert peak["activations"] <= read_limits(limit, torch.device("cpu")).host
    assert peak["files"] >= reports[0].peak_bytes["activations"] - peak["activations"] > 0
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        parts = [
            [getattr(t, n) for n in t.__tensor_flatten__()[0]] if isinstance(t, GroupTensor) else [t] for t in (a, b)
        ]
        assert all(torch.equal(x, y) for x, y in zip(*parts, strict=True)), name
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_left_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def fail(*_: Any) -> Any:
        seen.append(len(list(tmp_path.rglob("*.safetensors"))))
        raise KeyboardInterrupt

    monkeypatch.setattr(run_plan, "solve_together", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize_(tiny_llama(layers=1), gptq_config(4, 32, calibration=token_batches()), max_memory={"cpu": 0})
    assert seen[0] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_limit_for_another_device_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"max_memory names 'cuda': it may have the key 'cpu'"):
        quantize_(tiny_llama(), gptq_config(4, 32), max_memory={"cuda": "1GiB"})


def run(patch: pytest.MonkeyPatch, *arguments: str) -> Any:
    lines: list[str] = []
    patch.setattr("builtins.print", lambda *a, **k: lines.append(str(a[0])) if "file" not in k else None)
    patch.setattr(sys, "argv", ["gptq-ao", *arguments])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 0, lines
    return json.loads(lines[0]) if "--json" in arguments else lines[0]


OPTIONS = ("--num-samples", "20", "--seq-len", "64", "--group-size", "64", "--bits", "3")


def test_from_the_command_line_a_config_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text((Path(TINY) / "config.json").read_text())
    facts = run(monkeypatch, "plan", str(tmp_path), *OPTIONS, "--json")
    assert facts["weights"] == 21
    assert {x["rows"] for x in facts["layers"]} == {20 * 64}  # the last batch is smaller
    streamed = run(monkeypatch, "plan", str(tmp_path), *OPTIONS, "--stream", "--max-memory", "cpu=1KiB", "--json")
    assert streamed["output_bytes"] == facts["output_bytes"]
    assert streamed["peak_bytes"]["device"] < facts["peak_bytes"]["device"]
    assert streamed["peak_bytes"]["disk"] == facts["activation_bytes"] - 1024
    assert "0 Hessians" in run(monkeypatch, "plan", TINY, "--method", "rtn")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("--max-memory", "8GiB"),
            ConfigError,
            r"--max-memory 8GiB: '8GiB' is not DEVICE=AMOUNT, such as cuda=8GiB",
        ),
        (("--max-memory", "cuda=8GiB"), ConfigError, r"max_memory names 'cuda'"),
        (("--group-size", "100"), ConfigError, r"group_size does not divide"),
    ],
)
def test_errors_of_the_command(
    arguments: tuple[str, ...],
    error: type[Exception],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["gptq-ao", "plan", TINY, *arguments])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 2
    assert message.replace("\\", "") in capsys.readouterr().err


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    from gptq_ao.integrations.transformers import config_directory

    assert config_directory(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match=r"no/such model does not exist: give a directory, or the id"):
        config_directory("no/such model")


def test_the_kernel_of_every_kind_of_weight() -> None:
    """A convolution is no stack of experts: its own operator gets the dense weight."""
    bf16 = plan(convolutions().bfloat16(), gptq_config(4, -1, calibration=[x.bfloat16() for x in images()]))
    kernels = {w.name: w.kernel for w in bf16.weights}
    assert kernels["0.weight"] == kernels["2.weight"] == "dequantize + the dense operator"
    assert kernels["5.weight"].startswith("dequantize + matmul")  # one scale per row is no group of PyTorch's kernel
    experts = plan(mixture().bfloat16(), gptq_config(4, 32, calibration=token_batches()))
    kernels = {w.name: w.kernel for w in experts.weights}
    each, one = "cpu int4 up to 256 rows per expert", "cpu int4 up to 256 rows, else"
    assert kernels["model.layers.0.mlp.experts.gate_up_proj"].startswith(each)
    assert kernels["model.layers.0.self_attn.q_proj.weight"].startswith(one)


def test_of_several_processes_each_takes_less() -> None:
    """Fewer activations and less work; the same weights, Hessians and result. And those without a batch."""
    made = {n: plan(tiny_llama(), gptq_config(4, 32, calibration=token_batches(4)), processes=n) for n in (1, 2, 8)}
    one, two, eight = made.values()
    assert two.activation_bytes == one.activation_bytes / 2
    assert eight.activation_bytes == one.activation_bytes / 4  # a batch is one
    assert two.peak_bytes["device"] < one.peak_bytes["device"]
    for other in (two, eight):
        assert (other.weights, other.hessians, other.output_bytes) == (one.weights, one.hessians, one.output_bytes)
