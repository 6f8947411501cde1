"""Bytes as words and words as bytes, of tensors that lie in memory in any way."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptq_ao.codes.reinterpret import reinterpret

# The same values. A dimension of size one may have any stride, and is called contiguous whatever it is.
STORED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "every second column": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "one of several": lambda t: torch.stack([t, t, t], -1)[..., 1],
    "by columns": lambda t: t.mT.contiguous().mT,
    "from an odd place on": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}
stored_in_any_way = pytest.mark.parametrize("stored", STORED.values(), ids=list(STORED))


@stored_in_any_way
@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (1, 1, 8), (2, 1, 16), (1, 24), (8,), (0, 8)], ids=str)
@pytest.mark.parametrize("wide", [torch.int32, torch.int64], ids=str)
def test_bytes_as_words_and_back(wide: torch.dtype, shape: tuple[int, ...], stored: Callable[[Tensor], Tensor]) -> None:
    if len(shape) == 1 and stored is STORED["by columns"]:
        shape = (1, *shape)
    values = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = reinterpret(stored(values), wide)
    # Little-endian: the first byte is the lowest.
    places = 256 ** torch.arange(wide.itemsize)
    assert torch.equal(words, (values.long().unflatten(-1, (-1, wide.itemsize)) * places).sum(-1).to(wide))
    assert torch.equal(reinterpret(stored(words), torch.uint8), values)


def test_a_contiguous_tensor_is_viewed() -> None:
    words = torch.zeros(2, 3, dtype=torch.int32)
    reinterpret(words, torch.uint8)[1, 8] = 5
    assert words.tolist() == [[0, 0, 0], [0, 0, 5]]
