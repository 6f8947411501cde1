"""Runs of several processes that ended, and go on: rank 0 keeps the journal, and all are where it is."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_ao import quantize_
from gptq_ao.errors import ConfigError, RankError
from gptq_ao.tensor import GroupTensor
from tests.ranks import on_ranks, some

from ..models import tiny_llama
from ..pipeline.test_resume import StoppedError, config, stop_after


def codes(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.codes() for n, p in model.named_parameters() if isinstance(p, GroupTensor)}


def stopped_and_gone_on(journal: str, settings: dict[str, Any]) -> dict[str, Any]:
    whole, model = tiny_llama(), tiny_llama()
    expected = quantize_(whole, config(**settings), distributed=True)
    with pytest.raises((StoppedError, RankError)) as stopped:
        quantize_(model, config(**settings), distributed=True, journal=journal, progress=stop_after(3))
    assert isinstance(stopped.value, StoppedError) or "rank 0: StoppedError" in str(stopped.value)
    report = quantize_(model, config(**settings), distributed=True, journal=journal)
    assert expected is not None
    assert report is not None
    found, right = codes(model), codes(whole)
    assert found.keys() == right.keys()
    assert [w.error for w in report.weights] == [w.error for w in expected.weights]
    return {
        "different": [n for n in right if not torch.equal(found[n], right[n])],
        "notes": report.notes == expected.notes,
        "precision": report.precision == expected.precision,
    }


SETTINGS: list[dict[str, Any]] = [
    {},
    {"target_bits": 5.0, "group_size": -1},
    {"act_order": "group", "adapter_rank": 4},
]


@pytest.mark.parametrize("settings", some(SETTINGS), ids=str)
def test_a_run_of_two_ranks_goes_on(tmp_path: Path, settings: dict[str, Any]) -> None:
    """With the same codes on each, as if nothing had happened."""
    for found in on_ranks(stopped_and_gone_on, str(tmp_path / "journal"), settings):
        assert found == {"different": [], "notes": True, "precision": True}


def gone_on(journal: str) -> Any:
    model = tiny_llama()
    report = quantize_(model, config(), distributed=True, journal=journal)
    assert report is not None
    return report.notes, sum(int(c.sum()) for c in codes(model).values())


def with_snapshots(journal: str) -> None:
    with pytest.raises(ConfigError, match="snapshot_every keeps the activations that wait in one process"):
        quantize_(tiny_llama(), config(), distributed=True, journal=journal, snapshot_every=2)


def test_what_one_process_has_begun_two_may_end(tmp_path: Path) -> None:
    """Its snapshots are of no use to them; that the stages are of different processes is noted, on all."""
    journal = tmp_path / "journal"
    with pytest.raises(StoppedError):
        quantize_(tiny_llama(), config(), journal=journal, snapshot_every=2, progress=stop_after(3))
    (notes, total), other = on_ranks(gone_on, str(journal))
    assert (notes, total) == other
    assert "resumed: some stages were solved by 1 processes, and these are 2" in notes
    alone = tiny_llama()
    quantize_(alone, config())
    assert total == pytest.approx(sum(int(c.sum()) for c in codes(alone).values()), rel=1e-3)
    on_ranks(with_snapshots, str(tmp_path / "another"))
