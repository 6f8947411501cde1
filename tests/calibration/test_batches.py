import collections
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gptq_ao.calibration.batches import Batch, as_batch, read_batches
from gptq_ao.errors import CalibrationError, GPTQError

IDS, MASK = torch.arange(6).reshape(2, 3), torch.ones(2, 3)


class Encoding(collections.UserDict[str, Tensor]):
    """What tokenizers return is a Mapping and no dict."""


@pytest.mark.parametrize(
    ("value", "args", "kwargs"),
    [
        (IDS, (IDS,), {}),
        ((IDS, MASK), (IDS, MASK), {}),
        ([IDS, None, 3], (IDS, None, 3), {}),
        ({"input_ids": IDS, "use_cache": False}, (), {"input_ids": IDS, "use_cache": False}),
        (Encoding(input_ids=IDS, attention_mask=MASK), (), {"input_ids": IDS, "attention_mask": MASK}),
        (({"ids": IDS}, [MASK]), ({"ids": IDS}, [MASK]), {}),
        ({"pair": (IDS, MASK)}, (), {"pair": (IDS, MASK)}),
    ],
    ids=["tensor", "tuple", "list", "dict", "encoding", "nested-tuple", "nested-dict"],
)
def test_forms_of_a_batch(value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    batch = as_batch(value)
    assert isinstance(batch.args, tuple)
    assert type(batch.kwargs) is dict
    assert batch.args == args  # the same objects: == of equal tensors of 6 numbers would raise
    assert batch.kwargs == kwargs


@pytest.mark.parametrize(
    ("value", "ids", "mask"),
    [
        ({"input_ids": IDS[0]}, [[0, 1, 2]], None),
        ({"input_ids": IDS[0], "attention_mask": MASK[0].long(), "use_cache": False}, [[0, 1, 2]], [[1, 1, 1]]),
        ({"input_ids": [0, 1, 2], "attention_mask": [1, 1, 1]}, [[0, 1, 2]], [[1, 1, 1]]),
        ({"input_ids": [[0, 1, 2], [3, 4, 5]]}, IDS.tolist(), None),
        ({"input_ids": IDS[0].numpy(), "attention_mask": MASK[0].long().numpy()}, [[0, 1, 2]], [[1, 1, 1]]),
        ({"input_ids": IDS, "attention_mask": MASK.long()}, IDS.tolist(), [[1, 1, 1]] * 2),
    ],
    ids=["tensor", "tensors", "numbers", "rows-of-numbers", "numpy", "a batch"],
)
def test_rows_of_tokenized_text_become_batches(value: Any, ids: list[Any], mask: list[Any] | None) -> None:
    batch = as_batch(value)
    assert batch.kwargs["input_ids"].dtype == torch.int64
    assert batch.kwargs["input_ids"].tolist() == ids
    assert mask is None or batch.kwargs["attention_mask"].tolist() == mask
    assert batch.kwargs.get("use_cache") in (None, False)


def test_rows_of_a_data_set() -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]], "attention_mask": [[1, 1], [1, 1, 0]]})
    for calibration in (rows, list(rows), rows.with_format("torch"), rows.with_format("numpy")):
        batches = read_batches(calibration)
        assert [b.kwargs["input_ids"].tolist() for b in batches] == [[[1, 2]], [[3, 4, 5]]]
        assert [b.kwargs["attention_mask"].tolist() for b in batches] == [[[1, 1]], [[1, 1, 0]]]


def test_only_token_ids_are_known_to_have_a_batch_dimension() -> None:
    assert as_batch({"x": IDS[0]}).kwargs["x"].shape == (3,)
    assert as_batch(IDS[0]).args[0].shape == (3,)
    # Images beside the ids of a batch stay as they are, and those of a row are a row's.
    assert as_batch({"input_ids": IDS, "pixels": torch.ones(3, 4, 4)}).kwargs["pixels"].shape == (3, 4, 4)
    assert as_batch({"input_ids": IDS[0], "pixels": torch.ones(3, 4, 4)}).kwargs["pixels"].shape == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], [3]], r"'input_ids' has rows of different lengths: give each as a batch of its own, or pad them"),
        ([IDS[0], IDS[1]], r"'input_ids' is a list of Tensor, not a tensor .*dataset.with_format\(\"torch\"\)"),
        (["a", "b"], r"'input_ids' is a list of str"),
        ([], r"'input_ids' is a list of nothing"),
    ],
    ids=["ragged", "default collation", "words", "empty"],
)
def test_token_ids_that_are_no_batch(ids: list[Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=f"calibration batch 1: {message}"):
        read_batches([IDS, {"input_ids": ids}])


def test_tensors_of_a_batch() -> None:
    batch = Batch((IDS, [3, {"x": MASK}]), {"y": (IDS, None), "z": "text"})
    assert [id(t) for t in batch.tensors()] == [id(IDS), id(MASK), id(IDS)]


def test_batch_shares_nothing_with_its_dict() -> None:
    value = {"input_ids": IDS}
    batch = as_batch(value)
    batch.kwargs["use_cache"] = False
    assert value == {"input_ids": IDS}


@pytest.mark.parametrize(
    ("value", "kind"),
    [("a text", "str"), (3, "int"), (None, "NoneType"), ((), "tuple"), ([1, 2], "list"), ({"ids": [1]}, "dict")],
    ids=["str", "int", "none", "empty-tuple", "numbers", "dict-of-lists"],
)
def test_batch_without_a_tensor(value: Any, kind: str) -> None:
    message = rf"the batch holds no tensor \({kind}\): give the model's own inputs, a tensor, a tuple of positional"
    with pytest.raises(CalibrationError, match=message):
        as_batch(value)


@pytest.mark.parametrize(
    "value",
    [torch.empty(0, 3), (IDS, torch.empty(0, 3)), {"x": [torch.empty(0, 3)]}],
    ids=["tensor", "tuple", "nested"],
)
def test_batch_with_an_empty_tensor(value: Any) -> None:
    with pytest.raises(CalibrationError, match=r"the batch is empty: a tensor in it has shape \(0, 3\)\. Leave such"):
        as_batch(value)


def generate() -> Iterator[Tensor]:
    yield from (IDS, IDS + 1)


@pytest.mark.parametrize(
    "calibration",
    [
        [IDS, IDS + 1],
        (IDS, IDS + 1),
        generate(),
        generate,
        lambda: [IDS, IDS + 1],
        collections.deque([(IDS,), (IDS + 1,)]),
        DataLoader(TensorDataset(torch.stack([IDS, IDS + 1])), batch_size=None),
    ],
    ids=["list", "tuple", "generator", "generator-function", "callable", "deque", "dataloader"],
)
def test_forms_of_calibration(calibration: Any) -> None:
    batches = read_batches(calibration)
    assert [len(b.args) for b in batches] == [1, 1]
    assert [b.args[0].tolist() for b in batches] == [IDS.tolist(), (IDS + 1).tolist()]


def test_batches_of_a_data_loader() -> None:
    samples: Any = [{"input_ids": torch.full((3,), i)} for i in range(5)]
    loader: DataLoader[Any] = DataLoader(samples, batch_size=2)
    batches = read_batches(loader)
    assert [b.kwargs["input_ids"].shape for b in batches] == [(2, 3), (2, 3), (1, 3)]
    assert not any(b.args for b in batches)


def test_calibration_is_read_once_and_left_as_it_was() -> None:
    reads = 0

    def batches() -> Iterator[Tensor]:
        nonlocal reads
        reads += 1
        yield IDS

    assert len(read_batches(batches)) == 1
    assert reads == 1
    given = [IDS, (IDS, MASK)]
    read_batches(given)
    assert len(given) == 2
    assert given[0] is IDS


def test_no_calibration() -> None:
    with pytest.raises(CalibrationError, match=r'no calibration data: .*calibration=\[\.\.\.\].* method="rtn"'):
        read_batches(None)


@pytest.mark.parametrize(
    ("calibration", "kind"),
    [(IDS, "Tensor"), ({"input_ids": IDS}, "dict"), ("wikitext", "str"), (3, "int"), (lambda: IDS, "Tensor")],
    ids=["tensor", "dict", "str", "int", "callable"],
)
def test_one_batch_or_a_text_is_no_calibration(calibration: Any, kind: str) -> None:
    message = (
        rf"calibration is a {kind}, not a collection of batches: put it in a list, or see gptq_ao\.data\.text_batches"
    )
    with pytest.raises(CalibrationError, match=message):
        read_batches(calibration)


def test_nothing_to_read() -> None:
    generator = generate()
    assert len(read_batches(generator)) == 2
    nothing: list[Any] = [generator, [], lambda: ()]
    for empty in nothing:
        message = r"no calibration data: the collection of batches is empty \(a generator already read\?\)"
        with pytest.raises(CalibrationError, match=message):
            read_batches(empty)


def test_bad_batch_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"calibration batch 2 is empty: a tensor in it has shape \(2, 0\)"):
        read_batches([IDS, (IDS, MASK), IDS[:, :0], IDS])
    with pytest.raises(CalibrationError, match=r"calibration batch 1 holds no tensor \(str\)"):
        read_batches(["text" if i == 1 else IDS for i in range(3)])
    with pytest.raises(CalibrationError, match=r"calibration batch 0 holds no tensor \(str\)"):
        read_batches(["one text", "another"])


def test_errors_of_the_callers_iterable_are_not_hidden() -> None:
    def batches() -> Iterator[Tensor]:
        yield IDS
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read_batches(batches)


def test_error_is_a_gptq_error_and_a_value_error() -> None:
    assert issubclass(CalibrationError, GPTQError)
    assert issubclass(CalibrationError, ValueError)
