"""Models that cannot be one graph: their forwards are replayed."""

import contextlib
import contextvars
import copy
import signal
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptq_ao import gptq_config, plan, quantize_
from gptq_ao.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    FusedSettingsWarning,
    NonFiniteError,
    SolverError,
)
from gptq_ao.model.weights import ModelWeights
from gptq_ao.pipeline.paused_forwards import Forward
from gptq_ao.pipeline.quantize import quantize_weights
from gptq_ao.planning.job import Job
from gptq_ao.report import Report
from gptq_ao.tensor import GroupTensor

from ..families.causal_lm import causal_lm_of
from ..models import seeded, tiny_llama, token_batches


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Branching(nn.Module):
    """What runs depends on the data, in a way torch.export cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.low, self.high, self.last = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        for layer, least in ((self.low, 0.1), (self.high, -9.0)):
            if y.mean().item() > least:
                y = layer(y)
        return self.last(y)


class Experts(nn.Module):
    """A router and a loop over the experts that the data selects."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(16, experts, bias=False)
        self.up = nn.Parameter(torch.zeros(experts, 48, 16))
        self.down = nn.ModuleList(nn.Linear(48, 16, bias=False) for _ in range(experts))

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        tokens = hidden.reshape(-1, 16)
        scores, chosen = self.router(tokens).softmax(-1).topk(2)
        out = torch.zeros_like(tokens)
        for e in chosen.unique().tolist():
            place, which = (chosen == e).nonzero(as_tuple=True)
            y = self.down[e](F.silu(F.linear(tokens[place], self.up[e])))
            out.index_add_(0, place, y * scores[place, which, None])
        return out.view_as(hidden)


def replayed(model: nn.Module, batches: list[Any], **settings: Any) -> Report:
    report = quantize_(model, gptq_config(4, -1, calibration=batches, **settings))
    assert report is not None
    assert report.capture == "replay"
    return report


@pytest.fixture(autouse=True)
def no_graph(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Capturing takes seconds, even in vain: only tests that undo this one try."""

    def fail(*_: Any) -> None:
        raise CaptureError("not today")

    monkeypatch.setattr("gptq_ao.planning.prepare.capture", fail)
    return monkeypatch


def no_forward_is_left() -> bool:
    return not any("gptq_ao forward" in t.name for t in threading.enumerate())


def packed(model: nn.Module) -> dict[str, list[Tensor]]:
    quantized = {n: p for n, p in model.named_parameters() if isinstance(p, GroupTensor)}
    return {n: [getattr(p, inner) for inner in p.__tensor_flatten__()[0]] for n, p in quantized.items()}


def dense_copy(model: nn.Module, make: Any) -> nn.Module:
    dense = make()
    for name, p in model.named_parameters():
        dense.get_parameter(name).data.copy_(p.dequantize() if isinstance(p, GroupTensor) else p)
    return dense


def test_a_branch_on_the_data(no_graph: pytest.MonkeyPatch) -> None:
    no_graph.undo()
    model = seeded(Branching())
    batches = [randn(20, 32, seed=i) * (i + 1) for i in range(4)]
    report = replayed(model, batches)
    assert [w.name for w in report.weights] == [f"{n}.weight" for n in ("first", "low", "high", "last")]
    assert {w.method for w in report.weights} == {"gptq"}
    assert report.capture_reason is not None
    assert "y.mean().item() > least" in report.capture_reason
    assert "its forwards were replayed" in str(report)
    assert report.to_dict()["capture"] == "replay"
    dense = dense_copy(model, lambda: seeded(Branching()))
    with torch.no_grad():
        assert all(torch.equal(model(b), dense(b)) for b in batches)
    assert no_forward_is_left()


def test_each_layer_is_solved_on_what_quantized_layers_give_it() -> None:
    """The Hessian of the last layer is that of the quantized model up to there."""
    model, original = seeded(Branching()), seeded(Branching())
    batches = [randn(30, 32, seed=i) + 1 for i in range(3)]
    report = replayed(model, batches)
    inputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, a, n=name: inputs.setdefault(n, []).append(a[0]))
    with torch.no_grad():
        for b in batches:
            model(b)
    for w in report.weights:
        rows = torch.cat(inputs[w.name.removesuffix(".weight")]).double()
        change = original.get_parameter(w.name) - model.get_parameter(w.name).dequantize()
        energy = (rows @ original.get_parameter(w.name).double().T).square().sum()
        assert w.rows == len(rows)
        assert w.error == pytest.approx(((rows @ change.double().T).square().sum() / energy).item(), rel=1e-3)


@pytest.mark.parametrize("act_order", ["static", "group"])
def test_it_agrees_with_the_graph_where_both_work(act_order: str, no_graph: pytest.MonkeyPatch) -> None:
    graph, step = tiny_llama(layers=1), tiny_llama(layers=1)
    batches = [{**b, "attention_mask": torch.ones(2, 40, dtype=torch.long)} for b in token_batches()]
    batches[1]["attention_mask"][0, :7] = 0
    config = gptq_config(4, 32, act_order=act_order, compensate="none", calibration=batches)
    by_step = quantize_(step, config)
    no_graph.undo()
    by_graph = quantize_(graph, config)
    assert by_graph is not None
    assert by_step is not None
    assert (by_graph.capture, by_step.capture) == ("export", "replay")
    assert by_step.to_dict().keys() == by_graph.to_dict().keys()
    assert by_step.seconds.keys() == by_graph.seconds.keys()
    assert by_step.hessians == by_graph.hessians == 4  # one for q, k and v, one for gate and up
    assert by_step.excluded == by_graph.excluded
    facts = [{w.name: (w.stage, w.rows, w.method, w.dead) for w in r.weights} for r in (by_graph, by_step)]
    assert facts[0] == facts[1]
    assert {w.rows for w in by_step.weights} == {4 * 2 * 40 - 7}
    for w in by_graph.weights:
        a, b = graph.get_parameter(w.name), step.get_parameter(w.name)
        assert isinstance(a, GroupTensor)
        assert isinstance(b, GroupTensor)
        assert (a.codes() == b.codes()).double().mean() >= 0.999  # sums in another order: ties may fall either way


@pytest.mark.parametrize("family", ["Mixtral", "FalconMamba"])
def test_products_other_than_linear_agree_with_the_graph(family: str, no_graph: pytest.MonkeyPatch) -> None:
    """Stacked experts, multiplied by one grouped product, and a depthwise convolution."""
    import transformers

    (graph, batches), (step, _) = (causal_lm_of(getattr(transformers, f"{family}Config")) for _ in range(2))
    config = gptq_config(4, -1, compensate="none", calibration=batches)
    by_step = quantize_(step, config)
    no_graph.undo()
    by_graph = quantize_(graph, config)
    assert by_graph is not None
    assert by_step is not None
    rows = {w.name: (w.rows, w.fallback) for w in by_graph.weights}
    assert {w.name: (w.rows, w.fallback) for w in by_step.weights} == rows
    reasons = {n: r for n, r in by_graph.excluded.items() if r.startswith(("router", "depthwise", "output head"))}
    assert reasons
    assert {n: by_step.excluded[n] for n in reasons} == reasons
    for name in rows:
        a, b = graph.get_parameter(name), step.get_parameter(name)
        assert isinstance(a, GroupTensor)
        assert isinstance(b, GroupTensor)
        assert (a.codes() == b.codes()).double().mean() >= 0.999  # sums in another order: ties may fall either way


def test_a_product_in_no_supported_form_is_named() -> None:
    class Transposed(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.zeros(2 * 32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ self.stack.view(2, 32, 32)[1]

    report = replayed(seeded(Transposed()), [randn(6, 32)])
    assert report.excluded["stack"] == "aten::matmul reads it across its rows and input features"
    with pytest.raises(ConfigError, match="stack: aten::matmul reads it across"):
        replayed(seeded(Transposed()), [randn(6, 32)], strict=True)


def test_experts_that_the_data_selects(no_graph: pytest.MonkeyPatch) -> None:
    no_graph.undo()
    model = seeded(Experts())
    batches = [{"hidden": randn(2, 15, 16, seed=i)} for i in range(3)]
    report = replayed(model, batches)
    names = {w.name: w for w in report.weights}
    assert set(names) == {"up", *(f"down.{e}.weight" for e in range(4))}
    assert report.excluded == {"router.weight": "router: decides which experts run"}
    assert names["up"].rows == sum(names[f"down.{e}.weight"].rows for e in range(4)) == 3 * 2 * 15 * 2
    assert isinstance(model.up, GroupTensor)
    assert model.up.shape == (4, 48, 16)
    dense = dense_copy(model, lambda: seeded(Experts()))
    with torch.no_grad():
        assert all(torch.equal(model(**b), dense(**b)) for b in batches)


def test_padding_does_not_count_not_even_after_a_gather() -> None:
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[1, 6:] = 0
    codes = []
    for filler in (0.0, 50.0):
        hidden = torch.where(mask[..., None] == 0, filler, randn(2, 15, 16))
        model = seeded(Experts())
        report = replayed(model, [{"hidden": hidden, "attention_mask": mask}])
        names = {w.name: w for w in report.weights}
        assert names["up"].rows == (15 + 6) * 2
        codes.append({n: p.codes() for n, p in model.named_parameters() if isinstance(p, GroupTensor)})
    assert all(torch.equal(codes[0][n], codes[1][n]) for n in codes[0])


def test_an_expert_that_is_never_chosen() -> None:
    model = seeded(Experts(5))
    with torch.no_grad():  # scores a, -a, b, -b and 0: two of the first four are always ahead of the last
        router = model.router.weight
        router[1], router[3], router[4] = -router[0], -router[2], 0
    batches = [{"hidden": randn(2, 15, 16, seed=i)} for i in range(2)]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SolverError, match="no calibration row reached it, and strict=True forbids rounding to nearest"):
        replayed(model, batches, strict=True)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())  # found before anything is done
    report = replayed(model, batches)
    why = "no calibration row reached it"
    assert report.fallbacks == {"down.4.weight": why, "up": f"rows 192:240: {why}"}
    assert {w.name: w.method for w in report.weights}["down.4.weight"] == "rtn"
    linear: Any = seeded(Experts(5)).down[4]
    quantize_(linear, gptq_config(4, -1, method="rtn"))
    assert torch.equal(linear.weight.codes(), model.get_parameter("down.4.weight").codes())  # type: ignore[attr-defined]


class TwoLayers(nn.Module):
    """Each batch reaches some of the experts of each layer; the second stack is stored as [experts, in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.up = Experts(8), nn.Linear(16, 16), nn.Parameter(torch.zeros(8, 16, 16))
        self.last = nn.Linear(16, 16)
        self.outputs: list[Tensor] = []  # a list is not taken away from a forward, as an attribute would be

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.middle(self.first(hidden)).flatten(0, 1)
        out = x.clone()
        for e in (x.abs().argmax(-1) % 8).unique().tolist():
            out[e::8] += x[e::8] @ self.up[e]
        self.outputs.append(self.last(out))
        return self.outputs[-1]


def test_every_batch_counts_wherever_its_experts_come_in_the_order() -> None:
    model = seeded(TwoLayers())
    batches = [randn(1, 4, 16, seed=i) for i in range(6)]  # the first reaches some of the experts only
    rules = {"middle": {"bits": 8}}  # by default it is a router: argmax chooses by its result
    report = replayed(model, batches, rules=rules)
    rows = {w.name: w.rows for w in report.weights}
    assert rows["middle.weight"] == rows["last.weight"] == 6 * 4
    assert rows["first.up"] == sum(rows[f"first.down.{e}.weight"] for e in range(8)) == 6 * 4 * 2
    stages = {w.name: w.stage for w in report.weights}
    assert stages["first.down.7.weight"] < stages["middle.weight"] < stages["up"] < stages["last.weight"]
    # What the forwards computed under way is what the dequantized weights give: no product used an original weight.
    under_way, dense = model.outputs[-len(batches) :], dense_copy(model, lambda: seeded(TwoLayers()))
    with torch.no_grad():
        now = [dense(b) for b in batches]
    assert all(any(torch.equal(a, b) for b in now) for a in under_way)
    assert all(any(torch.equal(a, b) for b in under_way) for a in now)


class Remembers(nn.Module):
    """Keeps what belongs to one batch on its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)
        self.register_buffer("cache", torch.zeros(1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept, self.cache = x, x * 2
        y = self.first(x)
        assert self.kept is x
        assert self.calls == 1
        assert torch.equal(self.cache, x * 2)
        return self.last(y + self.kept)


def test_what_a_forward_keeps_on_its_modules_is_its_own() -> None:
    model = seeded(Remembers())
    cache = model.cache
    replayed(model, [randn(20, 32, seed=i) for i in range(3)])
    assert model.cache is cache
    assert model.calls == 0
    assert not hasattr(model, "kept")


def test_products_inside_of_torchs_attention() -> None:
    layer = seeded(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True))
    report = replayed(layer, [randn(2, 20, 32, seed=i) for i in range(2)])
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert {w.name: w.rows for w in report.weights} == dict.fromkeys(names, 80)


class Odd(nn.Module):
    """One ordinary weight, and others that cannot be quantized, each for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16)
        names = ("tied", "both", "masked", "table", "idle", "added", "strided")
        self.odd = nn.ParameterDict({n: nn.Parameter(torch.zeros(16, 16)) for n in names})
        self.odd["strided"] = nn.Parameter(torch.zeros(16, 16).t())

    def forward(self, x: Tensor) -> Tensor:
        w = self.odd
        x = self.plain(x) + F.embedding(torch.arange(16), w["table"])[:1]
        x = F.linear(F.linear(x, w["tied"]).relu(), w["tied"].t())
        x = F.linear(x, w["both"]) + F.pad(F.linear(x, w["both"][:8]), (0, 8))
        return F.linear(x, w["masked"] * torch.ones(16, 16).tril()) + w["added"].sum(0) + F.linear(x, w["strided"])


def test_what_is_left_out_is_listed_with_the_reason() -> None:
    report = replayed(seeded(Odd()), [randn(20, 16)])
    assert [w.name for w in report.weights] == ["plain.weight"]
    assert report.excluded == {
        "odd.tied": "its products read it in two ways",
        "odd.both": "rows 0:16 and 0:8 of it are multiplied apart from each other",
        "odd.masked": "linear multiplies by what is computed from it",
        "odd.table": "embedding table",
        "odd.idle": "not used by the forward of any calibration batch",
        "odd.added": "not a matrix of a product, used by sum",
        "odd.strided": "it is not contiguous in memory",
    }
    with pytest.raises(ConfigError, match=r"(?s)strict=True, and these .*tied: its products read it in two ways"):
        replayed(seeded(Odd()), [randn(20, 16)], strict=True)


def test_parameters_that_share_one_storage() -> None:
    flat = randn(3 * 32 * 32) / 6
    model = seeded(Branching())
    for i, layer in enumerate((model.first, model.high, model.last)):
        layer.weight = nn.Parameter(flat[i * 1024 : (i + 1) * 1024].view(32, 32))
    twin = seeded(Branching())  # which has each in a storage of its own
    twin.load_state_dict(model.state_dict())
    reports = [replayed(m, [randn(20, 32, seed=i) for i in range(3)]) for m in (model, twin)]
    assert [w.rows for w in reports[0].weights] == [w.rows for w in reports[1].weights]
    for name, parts in packed(model).items():
        assert all(torch.equal(a, b) for a, b in zip(parts, packed(twin)[name], strict=True))


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.conv = nn.Linear(24, 24), nn.Conv1d(24, 8, 3, padding=1)
        self.qk = nn.Parameter(torch.zeros(48, 24))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 if x.mean().item() < 9 else 1):
            x = torch.tanh(self.block(x))
        q, k = self.qk.chunk(2)
        y = (x @ q.t()) * F.linear(x, k)
        return self.conv(y.transpose(-1, -2))


def test_a_weight_applied_again_slices_and_a_convolution() -> None:
    model = seeded(Looped())
    report = replayed(model, [randn(3, 10, 24, seed=i) for i in range(2)], compensate="none")
    assert {w.name: w.rows for w in report.weights} == {"block.weight": 60, "qk": 120, "conv.weight": 60}
    assert report.notes == (
        "block.weight was applied 2 more times after it was solved; those rows are not in its Hessian",
    )
    assert "not in its Hessian" in str(report)
    with torch.no_grad():
        assert model(randn(1, 10, 24)).shape == (1, 8, 10)


def test_same_inputs_same_bytes() -> None:
    models = [seeded(Experts()), seeded(Experts())]
    for model in models:
        replayed(model, [{"hidden": randn(2, 15, 16, seed=i)} for i in range(3)])
    for a, b in zip(*(packed(m).values() for m in models), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_exception_in_one_forward_ends_all_threads() -> None:
    class Fails(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if x[0, 0].item() == 7 and not torch.is_grad_enabled() and threading.current_thread().daemon:
                raise RuntimeError("this batch is bad")
            return y

    batches = [randn(20, 32, seed=i) for i in range(3)]
    batches[1][0, 0] = 7
    model = seeded(Fails()).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="this batch is bad") as e:
        replayed(model, batches)
    assert e.value.__notes__ == ["in calibration batch 1"]
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert no_forward_is_left()
    assert model.training
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_bad_activations_and_starved_weights_are_named() -> None:
    batches = [randn(20, 32), randn(20, 32) * 1e20]
    with pytest.raises(NonFiniteError, match=r"the input of first.weight is NaN or infinite in calibration batch 1"):
        replayed(seeded(Branching()), batches)
    assert no_forward_is_left()

    class Dead(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 0 if x.sum().item() > -1e30 else x)

    with pytest.raises(SolverError, match=r"first.weight: no calibration row reached it, and strict=True"):
        replayed(seeded(Dead()), [randn(4, 32)], strict=True)


def test_strict_capture_and_another_device(no_graph: pytest.MonkeyPatch) -> None:
    no_graph.undo()
    model = seeded(Branching())
    before = copy.deepcopy(model.state_dict())
    batches = [randn(20, 32)]
    with pytest.raises(CaptureError, match=r"(?s)could not capture.*y.mean"):
        quantize_(model, gptq_config(4, -1, calibration=batches, strict_capture=True))
    with pytest.raises(ConfigError, match=r"has to run as a whole, on meta: move it there first, model.to\('meta'\)"):
        quantize_weights(Job.of(ModelWeights(model), gptq_config(4, -1, calibration=batches), device="meta"))
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_settings_that_need_a_graph_or_the_weights() -> None:
    batches = [randn(20, 32)]
    with pytest.raises(ConfigError, match=r"calibrate_all_experts needs the model as one graph.*not today"):
        replayed(seeded(Branching()), batches, calibrate_all_experts=True)
    with pytest.raises(ConfigError, match=r"'first.weight' is offloaded or not loaded .*: load the model without"):
        quantize_weights(Job.of(ModelWeights(Branching().to("meta")), gptq_config(4, -1, calibration=batches)))
    with pytest.raises(CaptureError, match=r"(?s)not today.*Nor can it run without a graph: .*RuntimeError: .*mat1"):
        replayed(seeded(Branching()), [randn(20, 31)])
    said = "the model does not run on calibration batch 1: RuntimeError: .*mat1 and mat2"
    with pytest.raises(CalibrationError, match=said):
        replayed(seeded(Branching()), [randn(20, 32), randn(20, 31)])


def test_an_interrupt_ends_a_forward_that_does_not() -> None:
    class Endless(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if threading.current_thread() is not threading.main_thread() and x[0, 0].item() == 7:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # the user presses Ctrl-C
                while True:
                    y = y + 0
            return y

    batches = [randn(20, 32, seed=i) for i in range(3)]
    batches[0][0, 0] = 7
    model = seeded(Endless())
    values = copy.deepcopy(model.state_dict())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            replayed(model, batches)
    finally:
        signal.signal(signal.SIGINT, before)
    assert all(torch.equal(p, values[n]) for n, p in model.state_dict().items())
    assert no_forward_is_left()
    assert torch.is_grad_enabled()


def test_threads_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    start, size = Forward.start, threading.stack_size()

    def limited(self: Forward) -> None:
        if self.number == 2:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(Forward, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        replayed(seeded(Branching()), [randn(20, 32)] * 3)
    assert no_forward_is_left()
    assert threading.stack_size() == size


_LEVEL = contextvars.ContextVar("level", default=0)


@pytest.mark.parametrize("own", [False, True])
def test_a_forward_runs_in_the_state_of_the_thread_that_asked(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`quantize_` leaves autocast and inference mode (`own`); without that, threads would be in them as well."""
    if not own:
        monkeypatch.setattr("gptq_ao.pipeline.quantize.own_precision", contextlib.nullcontext)
    seen: list[tuple[Any, ...]] = []

    class Notes(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), y.dtype, _LEVEL.get()))
            return y

    model = seeded(Notes()).train()
    token = _LEVEL.set(3)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        replayed(model, [randn(20, 32)] * 2)
    _LEVEL.reset(token)
    dtype = torch.float32 if own else torch.bfloat16
    assert seen == [(False, not own, dtype, 3)] * 4  # two to find the weights, two to replay
    assert model.training
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_a_part_that_is_compiled_is_seen_inside() -> None:
    model = seeded(Branching())
    model.low.compile()
    report = replayed(model, [randn(20, 32, seed=i) + 1 for i in range(2)])
    assert {w.name for w in report.weights} == {f"{n}.weight" for n in ("first", "low", "high", "last")}
    assert report.fallbacks == {}


def test_a_limit_that_cannot_be_kept_is_refused_and_a_plan_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise CaptureError("data-dependent branch")

    monkeypatch.setattr("gptq_ao.planning.prepare.capture", fail)
    config = gptq_config(4, 32, calibration=token_batches(1))
    with pytest.raises(ConfigError, match=r"max_memory cannot be kept, since the model cannot be captured .* branch"):
        quantize_(tiny_llama(layers=1), config, max_memory={"cpu": 0})
    with pytest.raises(CaptureError, match="data-dependent branch") as e:
        plan(tiny_llama(layers=1), config)
    assert "replay the model's own forwards" in e.value.__notes__[0]


def test_a_fused_set_of_experts_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            chosen = [e(x) for e in self.experts if float(x.sum()) > -1e9]
            return torch.stack(chosen).sum(0)

    block = seeded(nn.Sequential(nn.Linear(32, 32), Mixture()))
    rules = {"re:1.experts.2": {"bits": 8}}
    with pytest.warns(FusedSettingsWarning, match=r"1.experts.2.weight: 8 bits") as caught:
        report: Any = quantize_(block, gptq_config(4, 32, rules=rules, calibration=[torch.ones(4, 32)]))
    assert caught[0].filename == __file__
    assert report.capture == "replay"
    assert len([w for w in report.warnings if w.startswith("fused")]) == 1
