"""Models that cannot be one graph: their forwards are run in step."""

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptq_ao import gptq_config, plan, quantize_
from gptq_ao.errors import CaptureError, ConfigError, FusedSettingsWarning, NonFiniteError, SolverError
from gptq_ao.quantize import quantize_weights
from gptq_ao.report import Report
from gptq_ao.tensor import GroupTensor
from gptq_ao.weights import ModelWeights

from .families.causal_lm import causal_lm_of
from .models import seeded, tiny_llama, token_batches


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


def without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise CaptureError("not today")

    monkeypatch.setattr("gptq_ao.prepare.capture", fail)


def dense_copy(model: nn.Module, make: Any) -> nn.Module:
    dense = make()
    for name, p in model.named_parameters():
        dense.get_parameter(name).data.copy_(p.dequantize() if isinstance(p, GroupTensor) else p)
    return dense


def test_a_branch_on_the_data() -> None:
    model = seeded(Branching())
    batches = [randn(20, 32, seed=i) * (i + 1) for i in range(4)]
    report = replayed(model, batches)
    assert [w.name for w in report.weights] == [f"{n}.weight" for n in ("first", "low", "high", "last")]
    assert {w.method for w in report.weights} == {"gptq"}
    assert report.capture_reason is not None
    assert "y.mean().item() > least" in report.capture_reason
    assert "its forwards were run in step" in str(report)
    assert report.to_dict()["capture"] == "replay"
    dense = dense_copy(model, lambda: seeded(Branching()))
    with torch.no_grad():
        assert all(torch.equal(model(b), dense(b)) for b in batches)
    assert not [t for t in threading.enumerate() if "Forward" in type(t).__name__]


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
def test_it_agrees_with_the_graph_where_both_work(act_order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, step = tiny_llama(), tiny_llama()
    config = gptq_config(4, 32, act_order=act_order, calibration=token_batches())
    by_graph = quantize_(graph, config)
    without_a_graph(monkeypatch)
    by_step = quantize_(step, config)
    assert by_graph is not None
    assert by_step is not None
    assert {w.name for w in by_step.weights} == {w.name for w in by_graph.weights}
    assert dict(by_step.excluded) == {**by_graph.excluded, "model.embed_tokens.weight": "embedding table"}
    rows = {w.name: w.rows for w in by_graph.weights}
    assert all(w.rows == rows[w.name] for w in by_step.weights)
    for w in by_graph.weights:
        a, b = graph.get_parameter(w.name), step.get_parameter(w.name)
        assert isinstance(a, GroupTensor)
        assert isinstance(b, GroupTensor)
        assert (a.codes() == b.codes()).double().mean() >= 0.999  # sums in another order: ties may fall either way


@pytest.mark.parametrize("family", ["Mixtral", "FalconMamba"])
def test_products_other_than_linear_agree_with_the_graph(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacked experts, multiplied by one grouped product, and a depthwise convolution."""
    import transformers

    (graph, batches), (step, _) = (causal_lm_of(getattr(transformers, f"{family}Config")) for _ in range(2))
    config = gptq_config(4, -1, calibration=batches)
    by_graph = quantize_(graph, config)
    without_a_graph(monkeypatch)
    by_step = quantize_(step, config)
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
    assert report.excluded["stack"] == "matmul reads it across its rows and input features"
    with pytest.raises(ConfigError, match="stack: matmul reads it across"):
        replayed(seeded(Transposed()), [randn(6, 32)], strict=True)


def test_experts_that_the_data_selects(monkeypatch: pytest.MonkeyPatch) -> None:
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
    report = replayed(model, [{"hidden": randn(2, 15, 16, seed=i)} for i in range(2)])
    assert report.excluded["down.4.weight"] == "no product of the forward uses it"
    assert report.fallbacks == {"up": "rows 192:240: no product of the captured forward uses it"}


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
    report = replayed(model, [randn(3, 10, 24, seed=i) for i in range(2)])
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
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        if isinstance(a, GroupTensor):
            assert isinstance(b, GroupTensor)
            assert torch.equal(a.qdata, b.qdata), name
            assert torch.equal(a.scale_zero, b.scale_zero), name


def test_an_exception_in_one_forward_ends_all_threads() -> None:
    class Fails(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if x[0, 0].item() == 7 and not torch.is_grad_enabled() and threading.current_thread().daemon:
                raise RuntimeError("this batch is bad")
            return y

    batches = [randn(20, 32, seed=i) for i in range(3)]
    batches[1][0, 0] = 7
    with pytest.raises(RuntimeError, match="this batch is bad") as e:
        replayed(seeded(Fails()), batches)
    assert any("weights have new values already: reload the model" in note for note in e.value.__notes__)
    assert not [t for t in threading.enumerate() if "Forward" in type(t).__name__]


def test_bad_activations_and_starved_weights_are_named() -> None:
    batches = [randn(20, 32), randn(20, 32) * 1e20]
    with pytest.raises(NonFiniteError, match=r"the input of first.weight is NaN or infinite in one of 2 calibration"):
        replayed(seeded(Branching()), batches)
    assert not [t for t in threading.enumerate() if "Forward" in type(t).__name__]

    class Dead(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 0 if x.sum().item() > -1e30 else x)

    with pytest.raises(SolverError, match=r"first.weight: no calibration row reached it, and strict=True"):
        replayed(seeded(Dead()), [randn(4, 32)], strict=True)


def test_strict_capture_and_another_device() -> None:
    model = seeded(Branching())
    before = copy.deepcopy(model.state_dict())
    batches = [randn(20, 32)]
    with pytest.raises(CaptureError, match=r"(?s)could not capture.*y.mean"):
        quantize_(model, gptq_config(4, -1, calibration=batches, strict_capture=True))
    with pytest.raises(ConfigError, match=r"has to run as a whole, on meta: move it there first, model.to\('meta'\)"):
        quantize_weights(ModelWeights(model), gptq_config(4, -1, calibration=batches), device="meta")
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_state_is_restored() -> None:
    model = seeded(Branching()).train()
    replayed(model, [randn(20, 32)])
    assert model.training
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_of_the_caller_reaches_the_forwards() -> None:
    seen: list[torch.dtype] = []

    class Notes(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            seen.append(y.dtype)
            return y

    with torch.autocast("cpu", torch.bfloat16):
        replayed(seeded(Notes()), [randn(20, 32)])
    assert set(seen[-1:]) == {torch.bfloat16}


def test_a_limit_that_cannot_be_kept_is_refused_and_a_plan_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise CaptureError("data-dependent branch")

    monkeypatch.setattr("gptq_ao.prepare.capture", fail)
    config = gptq_config(4, 32, calibration=token_batches(1))
    with pytest.raises(ConfigError, match=r"max_memory cannot be kept, since the model cannot be captured .* branch"):
        quantize_(tiny_llama(layers=1), config, max_memory={"cpu": 0})
    with pytest.raises(CaptureError, match="data-dependent branch") as e:
        plan(tiny_llama(layers=1), config)
    assert "run the model's own forwards in step" in e.value.__notes__[0]


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
    assert len(report.warnings) == 1
