"""What reads a quantized weight gets its dense values; what writes to it works or raises, and is never lost."""

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptq_ao.errors import CheckpointError
from gptq_ao.tensor import GroupTensor
from tests.tensor.test_tensor import BF16, CLASSES, FP16, K, N, linear_of, make, random, weight_of

Read = Callable[[Any], Any]

KINDS: dict[str, dict[str, Any]] = {
    "matrix": {},
    "perm": {"permuted": True},
    "transposed": {"transposed": True},
    "stack": {"shape": (3, N, K)},
    "convolution": {"view_shape": (N, 24, 2, 2)},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, bits: int = 4, seed: int = 0) -> GroupTensor:
    options = dict(KINDS[kind])
    return make(*options.pop("shape", ()), bits=bits, seed=seed, **options)


READS: dict[str, Read] = {
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "isfinite": torch.isfinite,
    "norm": lambda w: w.norm(),
    "vector_norm": torch.linalg.vector_norm,
    "norms of several": lambda w: torch._foreach_norm([w, w]),
    "abs().max()": lambda w: w.abs().max(),
    "max of a dimension": lambda w: list(w.max(dim=-1)),
    "amin": lambda w: w.amin(-1),
    "mean": lambda w: w.mean(),
    "mean of a dimension": lambda w: w.mean(0),
    "std": lambda w: w.std(),
    "sum": lambda w: w.sum(dtype=torch.float64),
    "histc": lambda w: torch.histc(w, 10),
    "topk": lambda w: list(w.topk(2)),
    "sort": lambda w: list(w.sort()),
    "argmax": lambda w: w.argmax(),
    "count_nonzero": torch.count_nonzero,
    "equal": lambda w: torch.equal(w, w),
    "allclose": lambda w: torch.allclose(w, w + 1e-9),
    "==": lambda w: w == 0,
    "<": lambda w: w < 1,
    "where": lambda w: torch.where(w > 0, w, 0),
    "w + 1": lambda w: w + 1,
    "1 - w": lambda w: 1 - w,
    "w * w": lambda w: w * w,
    "w / 2": lambda w: w / 2,
    "-w": lambda w: -w,
    "clamp": lambda w: w.clamp(-1, 1),
    "zeros_like": torch.zeros_like,
    "new_ones": lambda w: w.new_ones(3),
    "flatten": lambda w: w.flatten(),
    "flatten of a part": lambda w: w.flatten(0, 1),
    "view": lambda w: w.reshape(-1, 8),
    "ravel": lambda w: w.ravel(),
    "view_as": lambda w: w.view_as(torch.empty(w.shape)),
    "unsqueeze": lambda w: w.unsqueeze(1),
    "squeeze": lambda w: w.unsqueeze(0).squeeze(),
    "movedim": lambda w: w.movedim(0, -1),
    "permute": lambda w: w.permute(*range(w.dim())[::-1]),
    "diagonal": lambda w: w.diagonal(),
    "flip": lambda w: w.flip(0),
    "roll": lambda w: w.roll(1, 0),
    "repeat": lambda w: w.repeat(*[2] * w.dim()),
    "expand": lambda w: w.unsqueeze(0).expand(2, *w.shape),
    "a row": lambda w: w[1],
    "a number": lambda w: w[(1,) * w.dim()].item(),
    "rows by number": lambda w: w[torch.tensor([2, 0])],
    "rows by mask": lambda w: w[torch.arange(len(w)) % 2 == 0],
    "index_select": lambda w: w.index_select(0, torch.tensor([1, 1])),
    "gather": lambda w: w.gather(0, torch.zeros_like(w, dtype=torch.long)),
    "iteration": list,
    "tolist": lambda w: w.tolist(),
    "numpy": lambda w: w.numpy(),
    "asarray": np.asarray,
    "from_dlpack": torch.from_dlpack,
    "double": lambda w: w.double().sum(),
    "into a dense one": lambda w: torch.ones(w.shape).add_(w, alpha=2),
    "out=": lambda w: torch.mul(w, 2, out=torch.empty(0)),
}


def plain(value: Any) -> Any:
    """Results as dense tensors."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    return value.dequantize() if isinstance(value, GroupTensor) else value


def same(a: Any, b: Any) -> bool:
    if isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


@every_kind
@pytest.mark.parametrize("name", READS)
def test_reading(name: str, kind: str) -> None:
    weight = made(kind)
    found, expected = plain(READS[name](weight)), plain(READS[name](weight.dequantize()))
    assert same(found, expected)


@pytest.mark.parametrize("name", ["norm", "mean of a dimension", "w + 1", "==", "flatten", "a row", "index_select"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_reading_without_gradients_and_compiled(mode: Callable[[], Any], name: str) -> None:
    torch.compiler.reset()
    weight = make(bits=3)
    expected = READS[name](weight.dequantize())
    with mode():
        assert torch.equal(READS[name](weight), expected)
        assert torch.allclose(torch.compile(READS[name], fullgraph=True, backend="aot_eager")(weight), expected)


def test_embedding_reads_rows() -> None:
    weight, ids = make(), torch.tensor([[1, 5], [39, 0]])
    assert torch.equal(F.embedding(ids, weight), F.embedding(ids, weight.dequantize()))


WRITES: dict[str, Read] = {
    "mul_": lambda w: w.mul_(2),
    "add_": lambda w: w.add_(1),
    "+=": lambda w: w.__iadd__(1),
    "data +=": lambda w: w.data.__iadd__(1),
    "several": lambda w: torch._foreach_add_([w], 1),
    "fill_": lambda w: w.fill_(0),
    "zero_": lambda w: w.zero_(),
    "clamp_": lambda w: w.clamp_(0, 1),
    "masked_fill_": lambda w: w.masked_fill_(w > 0, 0),
    "index_fill_": lambda w: w.index_fill_(0, torch.tensor([0]), 1.0),
    "out=": lambda w: torch.mul(random(*w.shape), 2, out=w),
    "w[0] = 1": lambda w: w.__setitem__(0, 1),
    "w[:] = dense": lambda w: w.__setitem__(slice(None), w.dequantize()),
    "w[mask] = 0": lambda w: w.__setitem__(w > 0, 0),
    "normal_": lambda w: nn.init.normal_(w),
    "xavier_uniform_": lambda w: nn.init.xavier_uniform_(w),
    "kaiming_normal_": lambda w: nn.init.kaiming_normal_(w),
    "zeros_": lambda w: nn.init.zeros_(w),
    "eye_": lambda w: nn.init.eye_(w.reshape(w.shape)),
    "trunc_normal_": lambda w: nn.init.trunc_normal_(w),
    "sparse_": lambda w: nn.init.sparse_(w, 0.5),
    "resize_": lambda w: w.resize_(3),
    "set_": lambda w: w.set_(torch.zeros(3)),
    "t_": lambda w: w.t_(),
    "unsqueeze_": lambda w: w.unsqueeze_(0),
    "apply_": lambda w: w.apply_(abs),
    "map_": lambda w: w.map_(w, max),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("parameter", [False, True], ids=["tensor", "parameter"])
def test_writing_raises(parameter: bool, name: str) -> None:
    weight = nn.Parameter(make(), requires_grad=False) if parameter else make()
    before = weight.dequantize()
    message = r"cannot change Int4GroupTensor\(shape=\(40, 96\).* in place: codes are written as a whole, by `copy_`"
    with pytest.raises(NotImplementedError, match=message):
        WRITES[name](weight)
    assert torch.equal(weight.dequantize(), before)


def test_one_expert_may_be_written() -> None:
    stack, other = make(3, 48, K), make(48, K, seed=7)
    stack[1] = other
    assert torch.equal(stack[1].dequantize(), other.dequantize())
    assert torch.equal(stack[0].dequantize(), make(3, 48, K)[0].dequantize())


def test_values_assigned_to_parts_of_a_dense_tensor() -> None:
    """As `resize_token_embeddings` does with a quantized head, which is dense from then on."""
    dense, weight = torch.zeros(N + 8, K), make()
    with pytest.warns(UserWarning, match=r"Int4GroupTensor\(.* are copied into a dense tensor: if that takes its pl"):
        dense[:N] = weight
    assert torch.equal(dense[:N], weight.dequantize())


@pytest.mark.parametrize("other", [{"dtype": BF16}, {"group": 48}, {"permuted": True}, {"shape": (3, 16, 32)}], ids=str)
def test_data_may_be_replaced(other: dict[str, Any]) -> None:
    parameter = nn.Parameter(make(), requires_grad=False)
    options = dict(other)
    value = make(*options.pop("shape", ()), seed=5, **options)
    parameter.data = value
    assert isinstance(parameter, nn.Parameter)
    assert (parameter.dtype, parameter.shape, parameter.stride()) == (value.dtype, value.shape, value.stride())
    assert torch.equal(parameter.dequantize(), value.dequantize())
    assert torch.equal(parameter.data.dequantize(), value.dequantize())


def test_data_of_another_dtype_and_transposed() -> None:
    module, x = linear_of(make(), bias=False), random(5, K)
    parameter = module.weight
    parameter.data = parameter.data.to(FP16)
    assert torch.equal(module(x.half()), F.linear(x.half(), make(dtype=FP16)))
    parameter.data = parameter.data.t()
    assert parameter.shape == (K, N)
    assert torch.equal(parameter.dequantize(), make(dtype=FP16).dequantize().t())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (random(N, K), r"a torch.float32 tensor \(40, 96\) cannot be the data of Int4GroupTensor"),
        (
            make(bits=8),
            r"Int8GroupTensor\(.* cannot be the data of Int4GroupTensor\(.*: give the module a new",
        ),
    ],
)
def test_data_of_another_kind(value: Tensor, message: str) -> None:
    parameter = nn.Parameter(make(), requires_grad=False)
    with pytest.raises(TypeError, match=message):
        parameter.data = value
    assert torch.equal(parameter.dequantize(), make().dequantize())


@pytest.mark.parametrize("bits", CLASSES)
@every_kind
def test_saved_and_loaded_by_torch(kind: str, bits: int) -> None:
    weight = made(kind, bits)
    file = io.BytesIO()
    torch.save({"model": {"weight": nn.Parameter(weight, requires_grad=False)}, "step": 3, "other": weight}, file)
    file.seek(0)
    loaded = torch.load(file)  # weights_only is the default
    assert isinstance(loaded["model"]["weight"], nn.Parameter)
    for w in (loaded["model"]["weight"], loaded["other"], copy.deepcopy(weight), copy.copy(weight)):
        assert type(w) is type(weight)
        assert torch.equal(w.dequantize(), weight.dequantize())
    assert torch.equal(pickle.loads(pickle.dumps(weight)).dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"out_features": 4000},
            r"a saved Int3GroupTensor\(.* is damaged: it has parts .*, and needs {'qdata'",
        ),
        ({"in_features": 64}, "is damaged"),
        ({"group_size": 31}, "is damaged"),
        ({"transposed": True}, "is damaged"),
        ({"high_plane": None}, "is damaged"),
        ({"qdata": torch.zeros(3, 1, 128)}, "is damaged"),
        ({"perm": torch.zeros(K, dtype=torch.int32)}, "its perm is not a permutation"),
    ],
)
def test_a_damaged_file_of_torch(change: dict[str, Any], message: str) -> None:
    """Kernels go by these numbers, and would read beyond the parts."""
    weight, file = make(bits=3, permuted=True), io.BytesIO()
    weight.__dict__.update(change)
    torch.save(weight, file)
    file.seek(0)
    with pytest.raises(CheckpointError, match=message):
        torch.load(file)


def test_memory() -> None:
    weight = make(48, 256, bits=4)
    assert weight.nbytes == weight.spec.nbytes == 48 * 256 // 2 + 48 * 8 * 4
    assert weight.t().nbytes == weight.nbytes
    assert (weight.element_size(), weight.numel()) == (4, 48 * 256)  # of what it stands for


def test_addresses_tell_weights_apart() -> None:
    a, b = make(), make()
    assert a.data_ptr() == a.detach().data_ptr() == nn.Parameter(a, requires_grad=False).data_ptr()
    assert a.data_ptr() != b.data_ptr()


@every_kind
def test_text_is_short(kind: str) -> None:
    weight = nn.Parameter(made(kind), requires_grad=False)
    for text in (repr(weight), str(weight), f"{weight}", repr(weight.to("meta")), repr([weight])):
        assert len(text) < 120
        assert "Int4GroupTensor(shape=" in text


def test_shared_memory() -> None:
    module, x = linear_of(make(bits=3, permuted=True)), random(5, K)
    expected = module(x)
    weight = weight_of(module)
    assert not weight.is_shared()
    assert weight.share_memory_() is weight
    assert weight.is_shared()
    module = linear_of(make(bits=3, permuted=True))
    module.share_memory()
    assert all(p.is_shared() for p in module.parameters())
    assert torch.equal(module(x), expected)


def test_what_other_processes_are_sent() -> None:
    """As `torch.multiprocessing` pickles what it spawns with and what it puts into a queue: by shared memory."""
    module, weight = linear_of(make()), make(bits=3, permuted=True)
    sent, same_weight = pickle.loads(ForkingPickler.dumps((module, weight)))
    assert torch.equal(sent(random(5, K)), module(random(5, K)))
    assert torch.equal(same_weight.dequantize(), weight.dequantize())
    assert same_weight.is_shared()
