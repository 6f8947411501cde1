"""Experts whose Hessians do not fit on one of the ranks: all observe the same portions, and the result is the same."""

from typing import Any

import pytest
import torch.distributed as dist

from gptq_ao import quantize_
from gptq_ao.errors import ConfigError
from gptq_ao.planning import memory
from tests.ranks import on_ranks, outcomes, some

from ..models import seeded, token_batches
from .test_quantize import Mixture, config, fingerprint, told

SETTINGS: list[dict[str, Any]] = [
    {"expert_min_rows": 100, "effort": "fast"},  # one has no rows, and is solved last
    {"expert_min_rows": 0, "adapter_rank": 2, "bits": 3},
    {"target_bits": 8.0, "candidates": (3, 4, 8), "effort": "fast"},
]


def in_portions(batches: int, width: int, settings: dict[str, Any], scarce: int) -> list[Any]:
    """Whole, and where nothing is free on the rank `scarce` (-1: on all)."""
    found: list[Any] = []
    # The process ends with the case.
    for free in (10**15, 0 if scarce in (-1, dist.get_rank()) else 10**15):
        memory.free_bytes = lambda device, free=free: free  # type: ignore[misc]
        model = seeded(Mixture(4, width))
        report: Any = quantize_(model, config(token_batches(batches), settings), distributed=True)
        facts = {k: v for k, v in told(report).items() if k not in ("seconds", "peak_bytes")}
        notes = [n for n in facts.pop("notes") if "portions" in n]
        found.append(
            (fingerprint(model), {k: v for k, v in facts.items() if k not in ("seconds", "peak_bytes")}, notes)
        )
    return found


@pytest.mark.parametrize("settings", some(SETTINGS), ids=str)
@pytest.mark.parametrize("scarce", some([1, -1]))
@pytest.mark.parametrize("batches", some([4, 1]))  # of one batch, a rank has none
def test_ranks_observe_the_same_portions(batches: int, scarce: int, settings: dict[str, Any]) -> None:
    for whole, divided in on_ranks(in_portions, batches, 32, settings, scarce):
        assert whole[:2] == divided[:2]
        assert whole[2] == []
        assert ["experts in 4 portions of 1: what leads to them runs 4 times" in n for n in divided[2]] == [True]


@pytest.mark.long
def test_sums_of_three_do_not_depend_on_the_portion() -> None:
    """Each Hessian is added up by itself (if it is large), so that its numbers are added in the same order."""
    found = on_ranks(in_portions, 4, 512, {"effort": "fast", "scale_candidates": 1, "expert_min_rows": 0}, 2, ranks=3)
    for whole, divided in found:
        assert whole[:2] == divided[:2]
        assert divided[2] != []


def limited() -> None:
    def fails(*args: Any) -> Any:
        raise ConfigError("this does not fit")

    if dist.get_rank() == 1:
        memory.simulate = fails  # type: ignore[assignment]
    memory.free_bytes = lambda device: 0
    quantize_(seeded(Mixture()), config(token_batches(), {"effort": "fast"}), distributed=True)


def test_what_does_not_fit_on_one_is_an_error_on_all() -> None:
    first, second = outcomes(limited)
    assert "ConfigError: rank 1: ConfigError: this does not fit" in str(first.error)
    assert "ConfigError: this does not fit" in str(second.error)
