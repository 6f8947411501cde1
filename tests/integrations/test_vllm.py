"""What vLLM's layers are given, without vLLM, which tests/engines runs: names, parts for each rank, products."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gptq_ao import save_quantized
from gptq_ao.errors import ConfigError
from gptq_ao.integrations.vllm.files import hub_tensors
from gptq_ao.integrations.vllm.parts import ExpertsProduct, Product, joined, narrowed, share
from gptq_ao.tensor import GroupTensor, tensor_class

from ..checkpoint.test_directories import contents, quantized


def weight(n: int = 64, k: int = 128, bits: int = 4, group_size: int = 32, *, perm: bool = False) -> GroupTensor:
    generator = torch.Generator().manual_seed(n + k + bits + group_size)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = torch.rand(n, k // group_size, generator=generator).half()
    zero_point = torch.randint(0, 2**bits, scale.shape, generator=generator, dtype=torch.uint8)
    order = torch.randperm(k, generator=generator) if perm else None
    return tensor_class(bits).from_codes(codes, scale, zero_point, dtype=torch.float32, perm=order)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "qwen3_moe", "phi3"])
@pytest.mark.parametrize("format", ["native", "gptq", "compressed-tensors"])
def test_tensors_have_the_names_of_a_dense_checkpoint(format: str, name: str, tmp_path: Path) -> None:
    """Whatever transformers calls them: experts one by one, tied ones once."""
    model = quantized(name)
    save_quantized(model, tmp_path / "quantized", format=format)
    save_quantized(model, tmp_path / "dense", format="dense")
    found, dense = dict(hub_tensors(tmp_path / "quantized")), contents(tmp_path / "dense")
    assert set(found) == set(dense)
    for n, tensor in found.items():
        assert torch.equal(
            tensor.dequantize(dense[n].dtype) if isinstance(tensor, GroupTensor) else tensor, dense[n]
        ), n
    expected = sum(isinstance(p, GroupTensor) for p in model.parameters())
    assert sum(isinstance(t, GroupTensor) and t.dim() == 2 for t in found.values()) >= expected > 0


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 128), (8, 32), (4, 256)])
def test_ranks_have_equal_parts_that_stay_packed(bits: int, group_size: int) -> None:
    whole = weight(64, 256, bits, group_size)
    dense = whole.dequantize()
    for dim, size in ((0, 32), (1, 128)):
        for rank in (0, 1):
            part = share(whole, dim, size, rank, 2)
            assert isinstance(part, GroupTensor)
            assert torch.equal(part.dequantize(), dense.narrow(dim, rank * size, size))
            # Not a view of the whole weight, which would stay in memory.
            assert part.qdata.untyped_storage().nbytes() < whole.qdata.untyped_storage().nbytes()


def test_heads_that_are_fewer_than_ranks_are_on_several() -> None:
    """Two key heads of 16 rows on four ranks; of one rank, and where there is one part only, all is one's own."""
    whole = weight(32, 64)
    rows = [share(whole, 0, 16, rank, 4).dequantize() for rank in range(4)]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[2], rows[3])
    assert torch.equal(torch.cat([rows[0], rows[2]]), whole.dequantize())
    assert share(whole, 0, 32, 3, 4) is whole
    assert torch.equal(share(torch.arange(6.0)[:, None], 0, 2, 1, 3), torch.tensor([[2.0], [3.0]]))


@pytest.mark.parametrize(
    ("whole", "dim", "size", "message"),
    [
        (weight(48, 128), 0, 24, "codes lie in tiles of 16 output features, and a part would have 24"),
        (weight(16, 384, 4, 128), 1, 192, "128 input features share a scale, and a part would have 192"),
        (weight(16, 128, 4, 32, perm=True), 1, 64, r"in an order of their own \(act_order\)"),
    ],
)
def test_what_cannot_be_cut_is_an_error(whole: GroupTensor, dim: int, size: int, message: str) -> None:
    """It would be dense without a word."""
    with pytest.raises(
        ConfigError, match=rf"cannot be cut into 2 parts for tensor parallelism: .*{message}.*fewer GPUs"
    ):
        share(whole, dim, size, 1, 2)


def test_a_part_that_begins_within_a_tile_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"\[8:40\] does not begin and end with a tile and a group"):
        narrowed(weight(64, 64), 0, 8, 32)


@pytest.mark.parametrize(
    ("parts", "count"),
    [
        ([weight(), weight(32), weight(16)], 1),
        ([weight(24), weight(8)], 1),  # tiles that are not full: packed again
        ([weight(), weight(32, bits=8), weight(16, bits=8)], 2),
        ([weight(), weight(32, group_size=64), weight(16)], 3),
        ([weight(), torch.randn(16, 128), torch.randn(8, 128)], 2),
        ([weight(perm=True), weight(32)], 2),
        ([weight()], 1),
    ],
)
def test_neighbours_of_one_kind_are_one_product(parts: list[Any], count: int) -> None:
    """q, k and v: where they differ in bits, groups or order of columns, or some are dense, they stay apart."""
    x = torch.randn(3, 5, 128)
    products = [Product(w) for w in joined(parts)]
    assert len(products) == count
    dense = torch.cat([w.dequantize() if isinstance(w, GroupTensor) else w for w in parts])
    torch.testing.assert_close(torch.cat([p(x) for p in products], -1), F.linear(x, dense), atol=1e-3, rtol=1e-5)
    assert [*products[0].state_dict()] == []  # nothing to be saved or loaded
    assert all(not isinstance(b, GroupTensor) for p in products for b in p.buffers())


def test_experts_multiply_the_rows_that_are_theirs() -> None:
    """One has none, and rows beyond the last are zero, as of experts that are on another rank."""
    stack = torch.stack([weight(32, bits=b) for b in (3, 3, 3)])
    x, ends = torch.randn(7, 128), torch.tensor([2, 2, 5], dtype=torch.int32)
    y = ExpertsProduct(stack)(x, ends)
    dense = stack.dequantize()
    expected = torch.cat([x[:2] @ dense[0].T, x[2:5] @ dense[2].T, torch.zeros(2, 32)])
    torch.testing.assert_close(y, expected, atol=1e-3, rtol=1e-5)


def test_one_more_leading_dimension_keeps_the_codes() -> None:
    """vLLM puts it before the weight of one expert, to treat it like those of all."""
    one = weight()
    for stacked in (one.unsqueeze(0), one.unsqueeze(-3), one.t().unsqueeze(0), torch.stack([one]).unsqueeze(1)):
        assert isinstance(stacked, GroupTensor)
        assert torch.equal(
            stacked.dequantize().flatten(0, -3)[0], one.t().dequantize() if stacked.transposed else one.dequantize()
        )
        assert isinstance(stacked.unbind()[0], GroupTensor)
    for dim in (1, 2, -1):
        assert torch.equal(one.unsqueeze(dim), one.dequantize().unsqueeze(dim))
