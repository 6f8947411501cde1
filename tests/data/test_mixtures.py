"""Several sources with weights: how many sequences each gives, which, and in what order."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptq_ao.data import text_batches, text_samples
from gptq_ao.data.text import shares
from gptq_ao.errors import CalibrationError, ConfigError

from .models import Bytes, Chatting


@pytest.mark.parametrize(
    ("weights", "total", "counts"),
    [
        ([0.7, 0.3], 128, [90, 38]),  # 89.6, 38.4
        ([0.7, 0.3], 10, [7, 3]),  # exactly, although 0.7 and 0.3 are not the numbers that they look like
        ([7, 3], 10, [7, 3]),
        ([1, 1, 1], 10, [4, 3, 3]),
        ([1, 1, 1], 11, [4, 4, 3]),
        ([0.1] * 7, 100, [15, 15, 14, 14, 14, 14, 14]),
        ([1e-3, 1e3], 2_000_002, [2, 2_000_000]),
        ([1e300, 1e300], 3, [2, 1]),
        ([5], 4, [4]),
        ([np.float64(0.7), np.float64(0.3)], 10, [7, 3]),
        ([2.5, 1.5, 1.0], 1001, [501, 300, 200]),  # 500.5, 300.3, 200.2
    ],
)
def test_largest_remainders(weights: list[float], total: int, counts: list[int]) -> None:
    assert shares(weights, total) == counts


def test_shares_are_exact() -> None:
    for weights in itertools.product((0.1, 1, 3.7), repeat=3):
        for total in (7, 64, 1000):
            found = shares(weights, 3 * total * 37)
            assert sum(found) == 3 * total * 37
            assert all(abs(n - 3 * total * 37 * w / sum(weights)) < 1 for n, w in zip(found, weights, strict=True))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "0.5", True, None])
def test_what_is_no_weight(weight: Any) -> None:
    with pytest.raises(ConfigError, match=rf"the weight {weight!r} of a source is no number above 0"):
        shares([1, weight], 10)


def test_a_share_of_nothing() -> None:
    with pytest.raises(ConfigError, match=r"source 1, counting from 0, of weight 0.001 gives none of 10 samples"):
        shares([1, 0.001], 10)


def letters(letter: str, documents: int) -> list[str]:
    return [letter * 7] * documents


def counted(batches: list[dict[str, torch.Tensor]]) -> dict[str, int]:
    """Rows of each letter."""
    last = torch.cat([b["input_ids"] for b in batches])[:, 5]
    return {
        chr(int(token) - 1): n
        for token, n in zip(*map(torch.Tensor.tolist, last.unique(return_counts=True)), strict=True)
    }


@pytest.mark.parametrize("pack", [True, False])
def test_a_mixture(pack: bool, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("\n".join(f'{{"text": "{t}"}}' for t in letters("b", 30)))
    sources = [letters("a", 40), tmp_path / "b.jsonl", letters("c", 9)]
    how: dict[str, Any] = {"weights": [4, 3, 1], "num_samples": 21, "seq_len": 8, "batch_size": 4, "pack": pack}
    batches = text_batches(Bytes(), sources, **how)
    assert counted(batches) == {"a": 10, "b": 8, "c": 3}  # 10.5, 7.875, 2.625
    assert [len(b["input_ids"]) for b in batches] == [4, 4, 4, 4, 4, 1]
    counts = [part.split(",")[0] for part in batches.described.split("; ")]
    assert counts == [
        "10 sequences of documents in memory",
        "8 sequences of b.jsonl",
        "3 sequences of documents in memory",
    ]
    again, other = (text_batches(Bytes(), sources, **how, seed=s) for s in (0, 1))
    assert [b["input_ids"].tolist() for b in again] == [b["input_ids"].tolist() for b in batches]
    assert [b["input_ids"].tolist() for b in other] != [b["input_ids"].tolist() for b in batches]
    assert counted(batches[:3]).keys() == {"a", "b", "c"}  # not one source after the other


def test_what_a_source_gives_does_not_depend_on_the_others() -> None:
    text, others = ["".join(map(chr, range(32, 122))) * 9], [letters("!", 30), letters("?", 30)]
    drawn = []
    for other in others:
        samples = text_samples(Bytes(), [text, other], [1, 1], num_samples=20, seq_len=8, seed=3)
        drawn.append({tuple(row) for row in samples[samples.origin == 0].inputs["input_ids"].tolist()})
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 10


def test_a_part_of_the_samples_says_how_many_of_each_it_has() -> None:
    samples = text_samples(Bytes(), [letters("a", 20), letters("b", 20)], num_samples=8, seq_len=8)
    parts = samples[:3], samples[3:]
    for part in parts:
        counts = counted(part.batches(2))
        assert part.described == "; ".join(
            f"{n} sequence{'' if n == 1 else 's'} of documents in memory" for n in (counts.get(x, 0) for x in "ab")
        )
    assert sum(map(len, parts)) == 8


@pytest.mark.parametrize("pack", [True, False])
def test_a_source_that_has_too_little(pack: bool, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b" * 7)
    said = "b.txt' has 1 sequence.*, and its share of 10 is 3: give more text, a smaller weight, or fewer samples"
    with pytest.raises(CalibrationError, match=said):
        text_batches(
            Bytes(), [letters("a", 40), tmp_path / "b.txt"], weights=[7, 3], num_samples=10, seq_len=8, pack=pack
        )
    # Alone, it gives what it has, and the report says so.
    few = text_batches(Bytes(), tmp_path / "b.txt", num_samples=10, seq_len=8, pack=pack)
    assert len(few) == 1
    assert few.described.startswith("1 sequence of b.txt")
    assert few.described.endswith("fewer than the 10 that were asked for")


def test_one_weight_for_each_source() -> None:
    with pytest.raises(ConfigError, match="there are 2 sources and 3 weights: give one for each"):
        text_batches(Bytes(), ["a.txt", "b.txt"], weights=[1, 1, 1])
    with pytest.raises(ConfigError, match="there are no sources: give one or more"):
        text_batches(Bytes(), [], weights=[])
    with pytest.raises(CalibrationError, match="the text has 4 tokens, less than one sequence of 8, in the list"):
        text_batches(Bytes(), [letters("a", 9), ["abc"]], weights=[1, 1], seq_len=8, num_samples=2)
    for source in ("a.txt", Path("a.txt"), {"text": 1}):
        with pytest.raises(ConfigError, match="weights are of several sources, and source is one"):
            text_batches(Bytes(), source, weights=[1])


def test_chats_and_text_in_one_mixture() -> None:
    chat = [{"messages": [{"role": "user", "content": "x"}]}] * 9
    samples = text_samples(Chatting(), [chat, letters("a", 9)], num_samples=4, seq_len=8)
    assert samples.plain
    assert not text_samples(Chatting(), [chat], num_samples=4, seq_len=8).plain
