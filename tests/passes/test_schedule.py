"""schedule, observe and calibrate: what is solved together, what runs in between, and that nothing runs twice."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_ao.calibration.activation_store import ActivationStore
from gptq_ao.calibration.batches import as_batch
from gptq_ao.config import gptq_config
from gptq_ao.errors import NonFiniteError
from gptq_ao.passes.calibrate import calibrate, run_segment
from gptq_ao.passes.canonicalize import canonicalize
from gptq_ao.passes.capture import capture
from gptq_ao.passes.choose_weights import choose_weights
from gptq_ao.passes.find_linears import find_linears
from gptq_ao.passes.observe import observe
from gptq_ao.passes.records import Excluded, Plan, Program
from gptq_ao.passes.schedule import schedule

from ..models import Attention, seeded, tiny_llama, token_batches


def planned(model: nn.Module, batch: Any) -> tuple[Program, Plan]:
    program = canonicalize(capture(model, as_batch(batch)))
    sites, excluded = find_linears(program)
    return program, schedule(program, choose_weights(sites, excluded, gptq_config(4, -1)))


def statics(model: nn.Module, program: Program, names: tuple[str, ...]) -> list[Any]:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    where = {**program.parameters, **program.buffers}
    return [program.constants[n] if n in program.constants else state[where[n]].detach() for n in names]


def stored(program: Program, *batches: Any) -> ActivationStore:
    return ActivationStore([program.bind(as_batch(b), "batch") for b in batches], torch.device("cpu"))


def run(model: nn.Module, program: Program, plan: Plan, batch: Any) -> tuple[Any, ...]:
    """All segments and the tail: the model's outputs."""
    values: dict[str, Any] = dict(program.bind(as_batch(batch), "batch"))
    for segment in (*plan.segments, plan.tail):
        written = run_segment(segment, values, statics(model, program, segment.statics))
        found = dict(zip(segment.writes, written, strict=True))
        values = {n: found[n] if n in found else values[n] for n in segment.keeps}
    return written


def stages(plan: Plan) -> list[list[set[str]]]:
    return [[{w.removesuffix(".weight") for w in shared.weights} for shared in s.inputs] for s in plan.stages]


def test_stages_of_a_decoder_layer() -> None:
    _, plan = planned(tiny_llama(layers=2), token_batches()[0])
    layer = [
        [{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}],
        [{"self_attn.o_proj"}],
        [{"mlp.gate_proj", "mlp.up_proj"}],
        [{"mlp.down_proj"}],
    ]
    expected = [[{f"model.layers.{i}.{n}" for n in names} for names in inputs] for i in range(2) for inputs in layer]
    assert stages(plan) == expected
    assert not any(s.entangled for s in plan.stages)


def test_the_segmented_graph_is_the_model_bit_for_bit() -> None:
    model = tiny_llama()
    program, plan = planned(model, token_batches()[0])
    for batch in (*token_batches(2), *token_batches(1, rows=3, length=17)):
        with torch.no_grad():
            assert torch.equal(run(model, program, plan, batch)[0], model(**batch).logits)


def test_every_product_and_every_value_that_is_kept_is_computed_once() -> None:
    program, plan = planned(tiny_llama(), token_batches()[0])
    segments = (*plan.segments, plan.tail)
    runs = Counter(n.name for s in segments for n in s.module.graph.nodes if n.op == "call_function")
    assert set(runs) == {n.name for n in program.graph.nodes if n.op == "call_function"}
    aten = torch.ops.aten
    heavy = (aten.linear.default, aten.scaled_dot_product_attention.default)
    products = [n.name for n in program.graph.nodes if n.target in heavy]
    assert len(products) == 15 + 2
    assert all(runs[n] == 1 for n in products)
    # Only what depends on no matrix (positions, rotary tables) is made again.
    again = {n for n, count in runs.items() if count > 1}
    reached, matrices = set(), {p for p in program.parameters if program.placeholders[p].meta["val"].dim() > 1}
    for n in program.graph.nodes:
        if any(i.name in matrices or i.name in reached for i in n.all_input_nodes):
            reached.add(n.name)
    assert not again & reached


def test_only_what_is_read_later_is_kept() -> None:
    _, plan = planned(tiny_llama(), token_batches()[0])
    segments = (*plan.segments, plan.tail)
    for i, segment in enumerate(segments):
        later = {name for s in segments[i + 1 :] for name in s.reads}
        assert set(segment.keeps) <= later
    assert plan.tail.keeps == ()
    # Between attention and the next norm two activations live: the residual stream and what the next product reads.
    floats = [k for k in plan.segments[1].keeps if k != "input_ids"]
    assert len(floats) == 2


def test_observers_are_nodes_one_per_hessian() -> None:
    program, bare = planned(tiny_llama(), token_batches()[0])
    plan = observe(bare)
    for before, segment, stage in zip(bare.segments, plan.segments, plan.stages, strict=True):
        calls = [n for n in segment.module.graph.nodes if n.op == "call_module"]
        assert [n.target for n in calls] == [shared.name for shared in stage.inputs]
        assert not any(n.op == "call_module" for n in before.module.graph.nodes)
        assert [n.args[0].name for n in calls] == [shared.rows[0].value for shared in stage.inputs]
    inputs = [shared for s in plan.stages for shared in s.inputs]
    assert (len(plan.stages), len(inputs), sum(len(shared.weights) for shared in inputs)) == (8, 8, 14)
    assert Excluded("lm_head.weight", "output head", expected=True) in plan.selection.excluded
    assert program.inputs == ("input_ids",)


def test_hessians_are_those_of_hooks_on_the_model() -> None:
    model = tiny_llama()
    program, bare = planned(model, token_batches()[0])
    plan = observe(bare)
    inputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, a, name=name: inputs.setdefault(name, []).append(a[0].detach()))
    store = stored(program, *token_batches())
    for batch in token_batches():
        with torch.no_grad():
            model(**batch)
    for segment, stage in zip(plan.segments, plan.stages, strict=True):
        hessians = calibrate(segment, stage, store, lambda n: statics(model, program, (n,))[0])
        for shared, (hessian,) in zip(stage.inputs, hessians, strict=True):
            for weight in shared.weights:
                rows = torch.cat([x.flatten(0, 1) for x in inputs[weight.removesuffix(".weight")]]).double()
                assert hessian.rows == len(rows) == 4 * 2 * 40
                bound = rows.abs().T @ rows.abs() * 2**-24  # rows roundings of an fp32 sum, over rows
                assert ((hessian.matrix.double() - rows.T @ rows / len(rows)).abs() <= bound).all()


def test_padding_never_enters_a_hessian() -> None:
    model = tiny_llama(layers=1)
    ids, mask = torch.ones(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    program, bare = planned(model, batch)
    plan = observe(bare)
    results = []
    for filler in (5, 60):
        ids = torch.arange(24).view(2, 12).clone()
        ids[mask == 0] = filler
        store = stored(program, {"input_ids": ids, "attention_mask": mask})
        results.append(
            [
                h
                for s, st in zip(plan.segments, plan.stages, strict=True)
                for (h,) in calibrate(s, st, store, lambda n: statics(model, program, (n,))[0])
            ]
        )
    assert [h.rows for h in results[0]] == [19] * 4
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.matrix, b.matrix)


def test_a_bad_activation_is_named_by_weight_and_batch() -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    batches = [torch.ones(3, 8) for _ in range(4)]
    program, bare = planned(model, batches[0])
    plan = observe(bare)
    batches[2][1] = 1e20  # finite, but its square is not
    store = stored(program, *batches)
    static = lambda n: statics(model, program, (n,))[0]  # noqa: E731
    with pytest.raises(NonFiniteError, match=r"the input of 0.weight is NaN or infinite in calibration batch 2"):
        calibrate(plan.segments[0], plan.stages[0], store, static)


class Parallel(nn.Module):
    """Attention and MLP side by side on one norm: five weights share a Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(64), Attention()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y) + self.down(self.up(y).relu())


def test_parallel_branches_share_stages() -> None:
    model = seeded(Parallel())
    program, plan = planned(model, torch.ones(2, 5, 64))
    assert stages(plan) == [
        [{"attention.q", "attention.k", "attention.v", "up"}],
        [{"attention.out"}, {"down"}],
    ]
    x = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(run(model, program, plan, x)[0], model(x))


class Looped(nn.Module):
    """One block applied three times, between two weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 16)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + self.down(self.up(x).relu())
        return self.last(x)


def test_a_block_applied_three_times_is_one_stage() -> None:
    model = seeded(Looped())
    program, plan = planned(model, torch.ones(4, 16))
    assert stages(plan) == [[{"first"}], [{"up"}, {"down"}], [{"last"}]]
    assert [s.entangled for s in plan.stages] == [False, True, False]
    assert [len(shared.rows) for shared in plan.stages[1].inputs] == [3, 3]
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(run(model, program, plan, x)[0], model(x))
    # Observed three times, on all the rows each use sees.
    store = stored(program, x)
    observed = observe(plan)
    rows = []
    for segment, stage in zip(observed.segments, observed.stages, strict=True):
        hessians = calibrate(segment, stage, store, lambda n: statics(model, program, (n,))[0])
        rows.append([h.rows for (h,) in hessians])
    assert rows == [[7], [21, 21], [7]]


def test_values_of_an_entangled_stage_are_computed_again_with_the_new_weights() -> None:
    model = seeded(Looped())
    program, plan = planned(model, torch.ones(4, 16))
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    values: dict[str, Any] = dict(program.bind(as_batch(x), "batch"))
    with torch.no_grad():
        for number, segment in enumerate((*plan.segments, plan.tail)):
            written = run_segment(segment, values, statics(model, program, segment.statics))
            found = dict(zip(segment.writes, written, strict=True))
            values = {n: found[n] if n in found else values[n] for n in segment.keeps}
            if number < len(plan.stages):  # "quantize" the stage that was just observed
                for shared in plan.stages[number].inputs:
                    for weight in shared.weights:
                        model.get_parameter(weight).mul_(0.5)
        assert torch.equal(written[0], model(x))


def test_one_weight_on_two_independent_inputs() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.head = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head(self.tower(a) * self.tower(b))

    model = seeded(Siamese())
    _, plan = planned(model, (torch.ones(2, 16), torch.ones(2, 16)))
    assert stages(plan) == [[{"tower"}], [{"head"}]]
    assert not plan.stages[0].entangled
    assert len(plan.stages[0].inputs[0].rows) == 2


def test_control_flow_that_stays_a_submodule_of_the_graph() -> None:
    """torch.cond keeps its branches as graphs of their own, which the segments must carry along."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y = torch.cond(y.sum() > 0, lambda t: t * 2, lambda t: t - 1, (y,))
            return self.second(y)

    model = seeded(Branches())
    program, plan = planned(model, torch.ones(4, 16))
    assert stages(plan) == [[{"first"}], [{"second"}]]
    observed = observe(plan)
    for sign in (1, -1):
        x = sign * torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(run(model, program, plan, x)[0], model(x))
        store = stored(program, x)
        for segment, stage in zip(observed.segments, observed.stages, strict=True):
            hessians = calibrate(segment, stage, store, lambda n: statics(model, program, (n,))[0])
            assert [h.rows for (h,) in hessians] == [7]
