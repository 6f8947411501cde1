"""Mixtures of experts: whose rows make whose Hessian, and what happens to an expert that hardly any token reaches."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from gptq_ao import Int4GroupTensor, gptq_config, load_quantized, quantize_, save_quantized
from gptq_ao.calibration.activation_store import ActivationStore
from gptq_ao.calibration.batches import as_batch
from gptq_ao.config import GPTQConfig
from gptq_ao.errors import ConfigError, SolverError
from gptq_ao.passes.calibrate import calibrate
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.choose_weights import choose_weights
from gptq_ao.passes.find_linears import find_linears
from gptq_ao.passes.observe import observe
from gptq_ao.passes.reach_all_experts import reach_all_experts
from gptq_ao.passes.schedule import schedule
from gptq_ao.passes.tracing.calibration_mode import calibration_mode
from gptq_ao.report import Report
from gptq_ao.solver.hessian import Hessian

from ..models import seeded, token_batches

EXPERTS, PER_TOKEN = 5, 2
UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def mixture(layers: int = 1) -> Any:
    import transformers

    config = transformers.Qwen3MoeConfig(
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=96,
        num_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        pad_token_id=0,
    )
    return seeded(transformers.Qwen3MoeForCausalLM(config))


def padded_batches(filler: int = 7) -> list[dict[str, Tensor]]:
    """Two batches of different lengths, the second row of each with padding at its end."""
    batches = []
    for length, seed in ((12, 0), (9, 1)):
        ids = torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[1, -4:] = 0
        batches.append({"input_ids": torch.where(mask == 0, filler, ids), "attention_mask": mask})
    return batches


def hessians(model: Any, batches: list[dict[str, Tensor]], everyone: bool = False) -> dict[str, tuple[Hessian, ...]]:
    """By weight, those of an observed run in which nothing is quantized."""
    program = canonicalize(capture(model, as_batch(batches[0])))
    sites, excluded = find_linears(program)
    if everyone:
        program, sites = reach_all_experts(program, sites)
    plan = observe(schedule(program, choose_weights(sites, excluded, gptq_config(4, -1))))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    where = {**program.parameters, **program.buffers}
    found: dict[str, tuple[Hessian, ...]] = {}
    with ActivationStore([program.bind(as_batch(b), "batch") for b in batches], torch.device("cpu")) as store:
        for segment, stage in zip(plan.segments, plan.stages, strict=True):
            of_shared = calibrate(segment, stage, store, lambda n: state[where[n]].detach())
            for shared, result in zip(stage.inputs, of_shared, strict=True):
                found |= dict.fromkeys(shared.weights, result)
    return found


def rows_by_expert(model: Any, batches: list[dict[str, Tensor]], everyone: bool) -> dict[str, list[Tensor]]:
    """By weight and expert, the rows that reach it: what goes into the experts' module, and plain torch from there."""
    experts = model.model.layers[0].mlp.experts
    calls: list[tuple[Tensor, Tensor]] = []
    handle = experts.register_forward_pre_hook(lambda m, args: calls.append((args[0], args[1])))
    try:
        with calibration_mode(model):
            for batch in batches:
                model(**batch)
    finally:
        handle.remove()
    rows: dict[str, list[Tensor]] = {UP: [], DOWN: []}
    for e in range(EXPERTS):
        mine = []
        for (x, choice), batch in zip(calls, batches, strict=True):
            real = batch["attention_mask"].flatten() != 0
            x, choice = x.reshape(-1, x.shape[-1])[real], choice.reshape(-1, PER_TOKEN)[real]
            mine.append(x if everyone else x[(choice == e).any(-1)])
        tokens = torch.cat(mine)
        gate, up = F.linear(tokens, experts.gate_up_proj[e]).chunk(2, dim=-1)
        rows[UP].append(tokens)
        rows[DOWN].append((F.silu(gate) * up).detach())
    return rows


@pytest.mark.parametrize("everyone", [False, True], ids=["routed", "all"])
def test_each_expert_has_the_hessian_of_its_own_tokens_without_padding(everyone: bool) -> None:
    model, batches = mixture(), padded_batches()
    found = hessians(model, batches, everyone)
    expected = rows_by_expert(model, batches, everyone)
    for name in (UP, DOWN):
        mine = found[name]
        # With all tokens for all, one Hessian of the tokens serves the first product of every expert.
        assert len(mine) == (1 if everyone and name == UP else EXPERTS)
        for e, rows in enumerate(expected[name]):
            hessian = mine[e if len(mine) > 1 else 0]
            # 5 experts by twos: the last pair overlaps the one before, expert 3 counts its tokens twice.
            twice = 2 if everyone and name == DOWN and e == 3 else 1
            assert hessian.rows == len(rows) * twice
            exact = rows.double().T @ rows.double() / max(len(rows), 1)
            # Rounding of a sum in fp32, and of the activations themselves: two orders of a product of 32 terms.
            bound = (rows.double().abs().T @ rows.double().abs() / max(len(rows), 1)) * (len(rows) + 4 * 32) * 2**-24
            assert ((hessian.matrix.double() - exact).abs() <= bound + 1e-12).all()
    assert sum(h.rows for h in found[UP]) == (12 + 8 + 9 + 5) * (1 if everyone else PER_TOKEN)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    model = mixture()
    a, b = (hessians(model, padded_batches(filler)) for filler in (7, 60))
    for name in a:
        for x, y in zip(a[name], b[name], strict=True):
            assert x.rows == y.rows
            # Rows of other experts may sit beside them in a product: equal up to the order of sums.
            assert torch.allclose(x.matrix, y.matrix, rtol=1e-5, atol=1e-7), name


def quantized(**settings: Any) -> tuple[Any, Report]:
    model = mixture(2)
    report = quantize_(model, gptq_config(4, -1, calibration=token_batches(3), **settings))
    assert report is not None
    return model, report


def test_a_mixture_end_to_end(tmp_path: Path) -> None:
    model, report = quantized(expert_min_rows=4)
    assert {w.method for w in report.weights} == {"gptq"}
    assert report.fallbacks == {}
    stack = model.get_parameter(UP)
    assert isinstance(stack, Int4GroupTensor)
    assert stack.shape == (EXPERTS, 48, 32)
    assert report.excluded["model.layers.0.mlp.gate.weight"] == "router: decides which experts run"
    ids = token_batches(1)[0]["input_ids"]
    out = model.generate(ids[:, :5], attention_mask=torch.ones(2, 5), max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 9)
    dense = mixture(2)
    for name, p in model.named_parameters():
        dense.get_parameter(name).data.copy_(p.dequantize() if isinstance(p, Int4GroupTensor) else p)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense(ids).logits)
        save_quantized(model, tmp_path / "q")
        again = load_quantized(tmp_path / "q").get_parameter(UP)
        assert isinstance(again, Int4GroupTensor)
        assert torch.equal(again.qdata, stack.qdata)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_experts_runs_quantized_stacks(implementation: str) -> None:
    model, _ = quantized(method="rtn")
    dense = mixture(2)
    for name, p in model.named_parameters():
        dense.get_parameter(name).data.copy_(p.dequantize() if isinstance(p, Int4GroupTensor) else p)
    ids = token_batches(1)[0]["input_ids"]
    for m in (model, dense):
        m.config._experts_implementation = implementation
    with torch.no_grad():
        a, b = model(ids).logits, dense(ids).logits
    # The same products of the same numbers, perhaps in another order.
    assert (a - b).abs().max() <= 64 * 2**-24 * 16 * b.abs().max()


def test_a_mixture_compiles_without_dense_experts() -> None:
    model, _ = quantized(method="rtn")
    model.config._experts_implementation = "grouped_mm"
    ids = token_batches(1)[0]["input_ids"]
    seen: list[str] = []

    def remember(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    torch.compiler.reset()
    try:
        compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=remember))
        with torch.no_grad():
            assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    finally:
        torch.compiler.reset()
    assert seen.count("gptq_ao.grouped_linear.default") == 4  # two products in each of two layers
    assert not any("dequantize" in name or "grouped_mm" in name for name in seen)


def test_starved_experts_take_the_hessian_of_all_and_are_listed() -> None:
    _, plain = quantized(expert_min_rows=0)
    _, report = quantized(expert_min_rows=10**6)
    assert set(report.fallbacks) == {w.name for w in plain.weights if "experts" in w.name}
    # Whatever they were solved with, what is said is how many each saw: two experts for each token.
    own, starved = ({w.name: w.expert_rows for w in each.weights} for each in (plain, report))
    assert (own[UP], own[DOWN]) == (starved[UP], starved[DOWN])  # in later layers, the router may choose others
    assert len(own[UP]) == EXPERTS
    assert sum(own[UP]) == sum(own[DOWN]) == next(w.rows for w in plain.weights if w.name == UP)
    assert {rows for name, rows in own.items() if "experts" not in name} == {()}
    message = report.fallbacks[UP]
    assert "rows 0:48: the expert saw" in message
    assert "fewer than 1000000: solved with the Hessian of all experts' rows" in message
    assert "fallback: rows 0:48" in str(report)
    with pytest.raises(SolverError, match=r"experts.gate_up_proj: the expert saw \d+ rows, fewer than .*strict=True"):
        quantized(expert_min_rows=10**6, strict=True)


def test_an_expert_that_no_token_reaches() -> None:
    model = mixture()
    with torch.no_grad():  # scores a, -a, b, -b and 0: two of the first four are always ahead of the last
        router = model.model.layers[0].mlp.gate.weight
        router[1], router[3], router[4] = -router[0], -router[2], 0
    report = quantize_(model, gptq_config(4, -1, calibration=token_batches(2), expert_min_rows=1))
    assert report is not None
    why = "the expert saw 0 rows, fewer than 1: solved with the Hessian of all experts' rows"
    assert report.fallbacks == {UP: f"rows 192:240: {why}", DOWN: f"rows 128:160: {why}"}


class Batched(nn.Module):
    """Experts as one batched product over all tokens, most of them zeroed by the router's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.zeros(3, 16, 32))
        self.out = nn.Parameter(torch.zeros(3, 32, 16))

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:  # [T, 16], [T, 3]
        each = x.unsqueeze(0) * scores.t().unsqueeze(-1)
        return torch.bmm(torch.bmm(each, self.stack).relu(), self.out).sum(0)


def test_batched_experts_count_the_rows_that_are_not_zero() -> None:
    scores = F.one_hot(torch.arange(60) % 3, 3).float()
    scores[:, 2] = 0  # nobody
    x = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    model = seeded(Batched())
    report = quantize_(model, gptq_config(4, -1, calibration=[(x, scores)], expert_min_rows=5))
    assert report is not None
    assert {w.name: w.rows for w in report.weights} == {"stack": 80, "out": 80}
    # Two experts saw 20 rows each; the third is solved with those 40, once more.
    assert set(report.fallbacks) == {"stack", "out"}
    assert "rows 64:96: the expert saw 0 rows" in report.fallbacks["stack"]
    assert model.get_parameter("stack").shape == (3, 16, 32)


def test_experts_without_a_router_s_choice_cannot_all_be_reached() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.zeros(2, 16, 16))

        def forward(self, x: Tensor, counts: Tensor) -> Tensor:
            offsets = counts.cumsum(0).to(torch.int32)
            return torch.ops.transformers.grouped_mm_fallback(x, self.stack, offsets)

    import transformers.integrations.moe  # noqa: F401 - registers the operator

    config: GPTQConfig = gptq_config(
        4, -1, calibration=[(torch.ones(6, 16), torch.tensor([2, 4]))], calibrate_all_experts=True
    )
    with pytest.raises(ConfigError, match=r"calibrate_all_experts: 'stack' gets its rows from .*Leave the setting out"):
        quantize_(seeded(Sorted()), config)


def test_experts_have_no_common_order_of_columns() -> None:
    """Each has a Hessian of its own, and a weight stores one order. Rounding to nearest needs none."""
    data = token_batches()
    message = r"experts.gate_up_proj' \[5, 48, 32\] has several Hessians .* so act_order=\"group\" cannot order its"
    with pytest.raises(ConfigError, match=message):
        quantize_(mixture(), gptq_config(4, -1, act_order="group", calibration=data))
    report = quantize_(mixture(), gptq_config(4, -1, act_order="group", method="rtn", calibration=data))
    assert report is not None
    assert {w.method for w in report.weights} == {"rtn"}
