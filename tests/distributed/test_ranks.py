"""What ranks say to one another and add up, of any size and kind; and one alone, which is all of them."""

import itertools
from typing import Any

import pytest
import torch

from gptq_ao.distributed.ranks import ALONE, BUCKET, WORD, Ranks, is_told
from gptq_ao.errors import ConfigError, RankError
from gptq_ao.passes.records import Part
from gptq_ao.pipeline.spread import rows_of_each
from tests.ranks import on_ranks

CPU = torch.device("cpu")
DTYPES = [torch.uint8, torch.float16, torch.float32, torch.int32, torch.int64, torch.bfloat16]


def sums(ranks: Ranks) -> None:
    shapes = [(), (3,), (0, 4), (5, 7), (BUCKET // 4 + 1,)]
    given = [
        torch.full(s, 1 + ranks.rank, dtype=d) for s in shapes for d in (torch.float32, torch.float64, torch.int64)
    ]
    given.append(torch.full((4, 6), 1.0 + ranks.rank).T)  # not contiguous
    ranks.sum_(given)
    total = sum(range(1, ranks.size + 1))
    assert all((t == total).all() for t in given)
    ranks.sum_([])


def words(ranks: Ranks) -> None:
    """Up to what goes with the first message, and longer; by one rank only; and numbers as they are."""
    for length in (0, 1, WORD - 40, WORD, 3 * WORD + 1):
        said = ranks.tell({"é": "ü" * length if ranks.rank == 1 else "", "pi": 0.1 + 0.2})
        assert [len(each["é"]) for each in said] == [length if r == 1 else 0 for r in range(ranks.size)]
        assert all(each["pi"] == 0.1 + 0.2 for each in said)


def parcels(ranks: Ranks) -> None:
    def made(rank: int) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(rank)
        return [(100 * torch.rand(rank, 3 + i, generator=g)).to(d) for i, d in enumerate(DTYPES)] if rank else []

    found = ranks.gather(["of", ranks.rank], made(ranks.rank), CPU)
    for rank, (value, tensors) in enumerate(found):
        assert value == ["of", rank]
        assert all(map(torch.equal, tensors, made(rank)))
        assert [t.dtype for t in tensors] == [t.dtype for t in made(rank)]
    assert ranks.gather(None, [], CPU) == [(None, [])] * ranks.size
    for src in range(ranks.size):
        mine = [*made(src + 1), torch.ones(2, 3).T] if ranks.rank == src else []
        value, tensors = ranks.broadcast(src, {"from": src} if ranks.rank == src else None, mine, CPU)
        assert value == {"from": src}
        assert all(map(torch.equal, tensors, [*made(src + 1), torch.ones(2, 3).T]))


def steps(ranks: Ranks, error: Exception | None) -> None:
    if error is not None:
        error.add_note("in this place")
        raise error
    ranks.sum_([torch.ones(3)])
    ranks.tell()


def errors(ranks: Ranks) -> None:
    """Of one's own, and of others; in another order of steps than theirs; and after an error all goes on."""
    for failing, error in ((0, ConfigError("no")), (ranks.size - 1, KeyError("no"))):
        expected = type(error) if ranks.rank == failing else ConfigError if failing == 0 else RankError
        with pytest.raises(expected) as caught, ranks.together(), ranks.together():
            steps(ranks, error if ranks.rank == failing else None)
        assert is_told(caught.value)
        if ranks.rank != failing:
            assert str(caught.value) == f"rank {failing}: {type(error).__name__}: {error}\nin this place"
    try:
        with ranks.together():
            steps(ranks, ValueError("first") if ranks.rank == 0 else None)
    except (ValueError, RankError):
        # While the first is handled, the second is told all the same.
        with pytest.raises((KeyError, RankError), match="second"), ranks.together():
            steps(ranks, KeyError("second") if ranks.rank == 1 else None)
    assert ranks.tell(ranks.rank) == list(range(ranks.size))


def shares(ranks: Ranks) -> None:
    for count in range(5):
        mine = ranks.share(range(count))
        assert [ranks.number(i) for i in range(len(mine))] == list(mine)
        assert sorted(itertools.chain.from_iterable(ranks.tell(list(mine)))) == list(range(count))


def all_of_it() -> None:
    ranks = Ranks.of(True, None, None)
    assert (ranks.rank, ranks.size, ranks.here) == (torch.distributed.get_rank(), 3, 3)
    for case in (sums, words, parcels, errors, shares):
        case(ranks)


def test_three_ranks() -> None:
    on_ranks(all_of_it, ranks=3)


def test_one_alone() -> None:
    sums(ALONE)
    shares(ALONE)
    assert ALONE.tell({"a": (1, 2)}) == [{"a": (1, 2)}]
    tensors = [torch.ones(2)]
    assert ALONE.gather(1, tensors, CPU) == [(1, tensors)]
    assert ALONE.broadcast(0, 1, tensors, CPU) == (1, tensors)
    with pytest.raises(KeyError), ALONE.together():
        raise KeyError


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rows", [[5], [1, 1, 1], [2, 9, 4], [64, 16, 16]])
def test_every_row_is_solved_once(ranks: int, whole: bool, rows: list[int]) -> None:
    """With less than one row for each rank, too; and about as many for each."""
    parts = [Part(f"w{i}", 10, 10 + n) for i, n in enumerate(rows)]
    found: list[Any] = rows_of_each(parts, ranks, whole=whole)
    assert len(found) == ranks
    solved = sorted((p.weight, row) for of_rank in found for p, _ in of_rank for row in range(p.start, p.stop))
    assert solved == sorted((p.weight, row) for p in parts for row in range(p.start, p.stop))
    for piece, part in itertools.chain.from_iterable(found):
        assert piece == part if whole else part.start <= piece.start < piece.stop <= part.stop
    if not whole:
        counts = [sum(p.stop - p.start for p, _ in of_rank) for of_rank in found]
        assert max(counts) - min(counts) <= 1
