"""ActivationStore: what comes back, where it waits, and what is left afterwards."""

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_ao.calibration import activation_store
from gptq_ao.calibration.activation_store import ActivationStore, Budget, compact, pinned_bytes
from gptq_ao.errors import ConfigError

CPU = torch.device("cpu")
BUDGETS = [None, Budget(device=0), Budget(device=300)]


@pytest.fixture(autouse=True)
def files_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary files go to a folder of the test, in which nothing may be left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def files(folder: Path) -> int:
    return len(list(folder.rglob("*.safetensors")))


def awkward() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=g)
    return {
        "plain": torch.randn(3, 5, generator=g),
        "view": base[2:4],
        "strided": base[:, ::2],
        "transposed": torch.randn(4, 6, generator=g).T,
        "permuted": torch.randn(2, 3, 4, generator=g).permute(2, 0, 1),
        "expanded": torch.randn(1, 4, generator=g).expand(5, 4),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "bf16": torch.randn(3, generator=g).bfloat16(),
        "mask": torch.tensor([True, False]),
        "complex": torch.randn(2, 2, generator=g, dtype=torch.complex64),
        "length": 11,
        "factor": 0.5,
    }


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_kind_of_value_comes_back_as_it_was(budget: Budget | None) -> None:
    with ActivationStore([{"x": torch.ones(2)}, {"x": torch.zeros(2)}], CPU, budget) as store:
        values = awkward()
        for index in range(2):
            store.replace(index, values, values)
        for read in store.read(values):
            for name, value in values.items():
                if not isinstance(value, Tensor):
                    assert read[name] == value
                    continue
                assert torch.equal(read[name], value), name
                assert read[name].dtype == value.dtype
        # Dense layouts are kept, so that a kernel sums in the same order.
        assert read["transposed"].stride() == values["transposed"].stride()
        assert read["permuted"].stride() == values["permuted"].stride()
    gc.collect()
    assert store.used == {"device": 0, "host": 0, "disk": 0}


def test_a_mask_that_is_the_same_in_all_batches_is_stored_once(files_in: Path) -> None:
    batches = [{"ids": torch.full((4,), i), "mask": torch.ones(100, dtype=torch.int64)} for i in range(5)]
    with ActivationStore(batches, CPU) as store:
        assert store.used["device"] == 5 * 32 + 800
        store.replace(0, {}, ["ids"])  # the others still have it
        assert store.used["device"] == 5 * 32 + 800
        for index in range(1, 5):
            store.replace(index, {}, ["ids"])
        gc.collect()
        assert store.used["device"] == 5 * 32
    with ActivationStore(batches, CPU, Budget(device=0)) as store:
        assert files(files_in) == 5 + 1


def test_equal_values_of_another_dtype_or_shape_are_not_the_same() -> None:
    batches = [{"m": torch.ones(4)}, {"m": torch.ones(2, 2)}, {"m": torch.ones(2, 2).long()}]
    with ActivationStore(batches, CPU) as store:
        assert [(v["m"].shape, v["m"].dtype) for v in store.read(["m"])] == [
            (b["m"].shape, b["m"].dtype) for b in batches
        ]


def test_a_view_does_not_keep_what_it_is_a_view_of() -> None:
    with ActivationStore([{"x": torch.ones(1)}], CPU) as store:
        base = torch.randn(1000)
        store.replace(0, {"part": base[:10], "whole": base.view(10, 100)}, ["part", "whole"])
        (read,) = store.read(["part", "whole"])
        assert read["part"].untyped_storage().nbytes() == 40
        assert read["whole"].data_ptr() == base.data_ptr()  # no copy of what is whole
        assert store.used["device"] == 4040
    assert compact(base) is base
    assert compact(3) == 3


@pytest.mark.parametrize("limit", [0, 100, 1000, 10**6])
def test_the_budget_is_never_exceeded_and_what_exceeds_it_is_in_files(limit: int, files_in: Path) -> None:
    batches = [{"x": torch.full((25,), float(i))} for i in range(8)]  # 100 bytes each
    with ActivationStore(batches, CPU, Budget(device=limit)) as store:
        for step in range(4):
            for index, values in enumerate(store.read(["x"])):
                assert values["x"][0] == index + step
                store.replace(index, {"x": values["x"] + 1}, ["x"])
                assert store.used["device"] <= limit
                assert store.used["device"] + store.used["disk"] == 800
                assert files(files_in) == store.used["disk"] // 100
    assert store.peak["device"] == min(limit // 100 * 100, 800)
    assert store.peak["disk"] == max(0, 800 - store.peak["device"])
    assert store.peak["host"] == 0


def test_what_is_not_kept_gives_way(files_in: Path) -> None:
    with ActivationStore([{"a": torch.ones(10), "b": torch.ones(20)}], CPU, Budget(device=0)) as store:
        assert store.used["disk"] == 120
        store.replace(0, {"c": torch.ones(30)}, ["b", "c"])
        assert store.used["disk"] == 200
        assert store.peak["disk"] == 200
        assert files(files_in) == 2


def test_nothing_is_left_when_something_goes_wrong(files_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        with ActivationStore([{"x": torch.ones(3)}], CPU, Budget(device=0)):
            assert files(files_in) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(files_in.iterdir()) == []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activation_store, "save_file", full)
    message = r"activations that exceed max_memory go to files in .*, which could not be written \(12 bytes, \d+ free\)"
    with pytest.raises(ConfigError, match=message):
        ActivationStore([{"x": torch.ones(3)}], CPU, Budget(device=0))


def test_files_go_where_the_budget_says(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("elsewhere")
    with ActivationStore([{"x": torch.ones(3)}], CPU, Budget(device=0, folder=str(folder))):
        assert files(folder) == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("elements", "size"), [(0, 1), (1, 4), (3, 16), (4, 16), (1025, 8192)])
def test_pinned_memory_comes_in_powers_of_two(elements: int, size: int) -> None:
    assert pinned_bytes(torch.ones(elements)) == size
