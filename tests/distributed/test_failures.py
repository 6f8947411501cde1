"""What is wrong on one rank: an error of all, which says what and where, with every model as it was."""

import os
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.distributed.ranks import LOST
from gptq_ao.errors import SolverError
from gptq_ao.model.weights import ModelWeights
from gptq_ao.pipeline import run_plan
from tests.ranks import on_ranks, outcomes, some

from ..models import tiny_llama, token_batches


def settings(rank: int, **changes: Any) -> Any:
    return gptq_config(**{"bits": 4, "group_size": 32, "effort": "fast", "calibration": token_batches(), **changes})


def other_data(rank: int) -> Any:
    return tiny_llama(layers=1), settings(rank, calibration=token_batches()[: 4 - rank])


def other_order(rank: int) -> Any:
    return tiny_llama(layers=1), settings(rank, calibration=token_batches()[:: 1 - 2 * rank])


def other_config(rank: int) -> Any:
    return tiny_llama(layers=1), settings(rank, bits=4 - rank)


def other_selection(rank: int) -> Any:
    return tiny_llama(layers=1), settings(rank), lambda module, name: rank == 0 or "q_proj" not in name


def other_values(rank: int) -> Any:
    return tiny_llama(layers=1, seed=rank), settings(rank)


def other_shapes(rank: int) -> Any:
    return tiny_llama(layers=1, width=64 * (1 + rank)), settings(rank)


def other_layers(rank: int) -> Any:
    return tiny_llama(layers=1 + rank), settings(rank)


def other_dtype(rank: int) -> Any:
    return tiny_llama(layers=1, dtype=(torch.float32, torch.bfloat16)[rank]), settings(rank)


def no_data(rank: int) -> Any:
    """Read by one rank only: the others are told, and do not wait."""
    return tiny_llama(layers=1), settings(rank, calibration=token_batches() if rank == 0 else [])


def not_finite(rank: int) -> Any:
    model = tiny_llama(layers=1)
    batches = [{"inputs_embeds": torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(i))} for i in range(4)]
    batches[3]["inputs_embeds"][0, 5] = torch.nan
    return model, settings(rank, calibration=batches)


def raises_late(rank: int) -> Any:
    """What is not ours, on one rank, in the middle of the work."""
    if rank == 1:
        replace = ModelWeights.replace

        def fails(self: Any, name: str, new: Any) -> None:
            if "o_proj" in name:
                raise OSError("no such luck")
            replace(self, name, new)

        ModelWeights.replace = fails  # type: ignore[method-assign]  # the process ends with the case
    return tiny_llama(layers=1), settings(rank)


def solver_fails(rank: int) -> Any:
    if rank == 1:
        solve_together = run_plan.solve_together

        def fails(*args: Any) -> Any:
            if "down_proj" in next(iter(args[0])).weight:
                raise SolverError("it has no factor")
            return solve_together(*args)

        run_plan.solve_together = fails  # type: ignore[assignment]
    return tiny_llama(layers=1), settings(rank)


def attempt(case: Callable[[int], Any]) -> tuple[str, list[str], bool]:
    """The error's class, its lines, and whether the model is as it was."""
    rank = torch.distributed.get_rank()
    model, config, *rest = case(rank)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        quantize_(model, config, *rest, distributed=True)
    except Exception as e:
        same = all(torch.equal(p, before[n]) and type(p) is nn.Parameter for n, p in model.named_parameters())
        return type(e).__name__, [str(e), *getattr(e, "__notes__", ())], same
    return "nothing", [], True


CASES: list[tuple[Callable[[int], Any], str, str]] = [
    (raises_late, "OSError", "no such luck"),
    (other_data, "CalibrationError", "different calibration data: rank 0 has 4 batches, .* rank 1 has 3 batches"),
    (not_finite, "NonFiniteError", "is NaN or infinite in calibration batch 3 "),
    (other_order, "CalibrationError", "in the same order"),
    (other_config, "ConfigError", "differ in config: rank 0 has GPTQConfig.bits=4, .* rank 1 has GPTQConfig.bits=3"),
    (other_selection, "ConfigError", "differ in filter_fn: rank 0 has a selection of 12 of 12 weights"),
    (other_values, "ConfigError", "on rank 1: 'model.embed_tokens.weight' has other values"),
    (other_shapes, "ConfigError", r"is torch.float32 \(96, 128\), not torch.float32 \(96, 64\)"),
    (other_layers, "ConfigError", "only one of them has 'model.layers.1.self_attn.q_proj.weight'"),
    (other_dtype, "ConfigError", "is torch.bfloat16 .* not torch.float32"),
    (no_data, "CalibrationError", "the collection of batches is empty"),
    (solver_fails, "SolverError", "it has no factor"),
]
OF_ONE = {raises_late: "RankError", no_data: "CalibrationError", solver_fails: "SolverError"}


@pytest.mark.parametrize(("case", "error", "message"), some(CASES, 3))
def test_an_error_of_one_rank_is_one_of_all(case: Callable[[int], Any], error: str, message: str) -> None:
    ours, theirs = on_ranks(attempt, case)
    assert all(same for *_, same in (ours, theirs))
    if case in OF_ONE:
        (name, (text, *_), _), expected = ours, OF_ONE[case]
        assert name == expected
        assert text.startswith(f"rank 1: {error}: ")
    else:
        assert ours == theirs
    for _, (text, *_), _ in (ours, theirs):
        assert re.search(message, text), text
    assert theirs[0] == error


def other_frequencies() -> tuple[str, list[str], bool]:
    def case(rank: int) -> Any:
        model = tiny_llama(layers=1)
        model.model.rotary_emb.inv_freq.mul_(1 + 1e-7 * rank)
        return model, settings(rank)

    return attempt(case)


@pytest.mark.long
def test_what_each_device_computes_may_differ() -> None:
    assert [name for name, *_ in on_ranks(other_frequencies)] == ["nothing", "nothing"]


def killed() -> tuple[str, list[str], bool] | None:
    def case(rank: int) -> Any:
        if rank == 1:

            def dies(self: Any, name: str, new: Any) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

            ModelWeights.replace = dies  # type: ignore[method-assign]
        return tiny_llama(layers=1), settings(rank)

    return attempt(case)


@pytest.mark.long
def test_a_rank_that_dies_is_missed() -> None:
    """As torch says it, with a word on what it means; the model is as it was."""
    ours, theirs = outcomes(killed, seconds=60)
    assert theirs.error == "died"
    assert ours.error is None, ours.error
    _, said, same = ours.value
    assert same
    assert LOST in said


class Branching(nn.Module):
    """Cannot be captured as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Any) -> Any:
        return self.linear(x) if x.sum().item() > 0 else self.linear(-x)


def no_graph() -> tuple[str, list[str], bool]:
    return attempt(lambda rank: (Branching(), settings(rank, calibration=[torch.ones(2, 64)] * 2)))


@pytest.mark.long
def test_what_is_no_graph_is_refused() -> None:
    with torch.random.fork_rng(devices=[]):
        for name, (text, *_), same in on_ranks(no_graph):
            assert name == "ConfigError"
            assert re.match("the model cannot be captured as one graph, and only a graph .*: quantize on one", text)
            assert same
