"""Quantized weights as tensors: what a module's parameter becomes.

`Int4GroupTensor` (and its 2-, 3- and 8-bit siblings) behaves like the dense weight it stands for: same shape, a dtype
to compute in, `F.linear`, `mm`, `addmm` and `bmm` with it, `.to()`, `state_dict`, `torch.compile`. Inside are int32
tensors in the layout that `packing.py` draws. A weight that a model stores as [in, out] (GPT-2) is the transposed view
of one.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor

from gptq_ao import ops
from gptq_ao.errors import ConfigError, NonFiniteError
from gptq_ao.grid import max_code
from gptq_ao.packing import pack_codes, pack_scale_zero, unpack_codes, unpack_scale_zero

__all__ = ["GroupTensor", "Int2GroupTensor", "Int3GroupTensor", "Int4GroupTensor", "Int8GroupTensor", "tensor_class"]

aten = torch.ops.aten


class GroupTensor(TorchAOBaseTensor):
    """The shared base: everything but the number of bits.

    Attributes:
        qdata, high_plane, scale_zero: packed codes, scales and zero points, see `packing.py`.
        perm: int32 [in_features] or None. Column i of the codes belongs to input feature `perm[i]`.
        group_size: neighbouring columns that share a scale.
        out_features, in_features: the logical size, without padding.
        transposed: whether the shape is [..., in_features, out_features].
    """

    bits: ClassVar[int]
    tensor_data_names: ClassVar[list[str]] = ["qdata", "scale_zero"]
    tensor_attribute_names: ClassVar[list[str]] = ["group_size", "out_features", "in_features", "transposed", "dtype"]
    optional_tensor_data_names: ClassVar[list[str]] = ["high_plane", "perm"]

    qdata: Tensor
    scale_zero: Tensor
    high_plane: Tensor | None
    perm: Tensor | None
    group_size: int
    out_features: int
    in_features: int
    transposed: bool

    def __new__(
        cls,
        qdata: Tensor,
        scale_zero: Tensor,
        group_size: int,
        out_features: int,
        in_features: int,
        transposed: bool,
        dtype: torch.dtype,
        high_plane: Tensor | None = None,
        perm: Tensor | None = None,
    ) -> "GroupTensor":
        lead = qdata.shape[:-3]
        shape = torch.Size((*lead, out_features, in_features))
        strides = [in_features, 1]
        for size in reversed((*lead, out_features)):
            strides.insert(0, strides[0] * size)
        strides = strides[1:]
        if transposed:
            shape = torch.Size((*lead, in_features, out_features))
            strides[-1], strides[-2] = strides[-2], strides[-1]
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=qdata.device, requires_grad=False
        )

    def __init__(
        self,
        qdata: Tensor,
        scale_zero: Tensor,
        group_size: int,
        out_features: int,
        in_features: int,
        transposed: bool,
        dtype: torch.dtype,
        high_plane: Tensor | None = None,
        perm: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.qdata, self.scale_zero, self.high_plane, self.perm = qdata, scale_zero, high_plane, perm
        self.group_size, self.out_features, self.in_features = group_size, out_features, in_features
        self.transposed = transposed

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        *,
        dtype: torch.dtype,
        perm: Tensor | None = None,
        transposed: bool = False,
    ) -> "GroupTensor":
        """Pack a quantized weight.

        Args:
            codes: [..., N, K] uint8, at most 2^bits − 1.
            scale: [..., N, G] fp16, finite; G divides K. May be negative.
            zero_point: [..., N, G] uint8, at most 2^bits − 1.
            dtype: what the weight pretends to be: the dtype of `dequantize()`.
            perm: [K] integers, a permutation: column i of `codes` belongs to input feature `perm[i]`.
            transposed: give the tensor the shape [..., K, N].

        Raises:
            ConfigError: shapes, dtypes or ranges are not those above.
            NonFiniteError: a scale is NaN or infinite.
        """
        _check_parts(cls, codes, scale, zero_point, perm)
        qdata, high_plane = pack_codes(codes, cls.bits)
        n, k = codes.shape[-2:]
        perm = None if perm is None else perm.to(torch.int32)
        group_size = k // scale.shape[-1]
        return cls(qdata, pack_scale_zero(scale, zero_point), group_size, n, k, transposed, dtype, high_plane, perm)

    def codes(self) -> Tensor:
        """[..., out_features, in_features] uint8, columns as stored (see `perm`)."""
        return unpack_codes(self.qdata, self.high_plane, self.bits, self.out_features, self.in_features)

    @property
    def scale(self) -> Tensor:
        """[..., out_features, groups] fp16."""
        return unpack_scale_zero(self.scale_zero, self.out_features)[0]

    @property
    def zero_point(self) -> Tensor:
        """[..., out_features, groups] uint8."""
        return unpack_scale_zero(self.scale_zero, self.out_features)[1]

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, in the shape of this tensor."""
        weight = ops.dequantize(*self._packed(), output_dtype or self.dtype)
        return weight.mT if self.transposed else weight

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Under inference_mode composite operators (`.to`, `.T`, `matmul`) arrive whole: take them apart first.
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        if func not in cls._ATEN_OP_TABLE[cls] and func.has_kernel_for_dispatch_key(composite):
            return func.decompose(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    def _packed(self) -> tuple[Any, ...]:
        """The arguments of the operators in `ops.py`, after x."""
        numbers = (self.bits, self.group_size, self.out_features, self.in_features)
        return (self.qdata, self.scale_zero, self.high_plane, self.perm, *numbers)

    def _replace(self, **attributes: Any) -> "GroupTensor":
        names = [*self.tensor_data_names, *self.tensor_attribute_names, *self.optional_tensor_data_names]
        return type(self)(*(attributes.get(n, getattr(self, n)) for n in names))

    def _expanded(self, lead: tuple[int, ...]) -> "GroupTensor":
        """The matrix as a stack of `lead` equal ones (or, for `()`, the first matrix of a stack), without a copy."""
        inner = {n: getattr(self, n) for n in ("qdata", "scale_zero", "high_plane")}
        first = (0,) * (self.dim() - 2)
        inner = {n: t.expand(*lead, *t.shape) if lead else t[first] for n, t in inner.items() if t is not None}
        return self._replace(**inner)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, group_size={self.group_size}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )

    def _stable_hash_for_caching(self) -> str:
        """For torch.compile's cache, which must recognize a weight of the same kind in another process."""
        parts = [f"{n}:{tuple(t.shape)}" for n in self.__tensor_flatten__()[0] for t in (getattr(self, n),)]
        return f"{self!r} transposed={self.transposed} {' '.join(parts)}"


def _check_parts(cls: type[GroupTensor], codes: Tensor, scale: Tensor, zero_point: Tensor, perm: Tensor | None) -> None:
    name = cls.__name__
    if codes.dtype != torch.uint8 or zero_point.dtype != torch.uint8 or scale.dtype != torch.float16:
        raise ConfigError(
            f"{name} takes codes and zero_point as uint8 and scale as float16, "
            f"got {codes.dtype}, {zero_point.dtype}, {scale.dtype}"
        )
    shapes = f"codes {tuple(codes.shape)}, scale {tuple(scale.shape)}, zero_point {tuple(zero_point.shape)}"
    if codes.dim() < 2 or scale.shape != zero_point.shape or codes.shape[:-1] != scale.shape[:-1]:
        raise ConfigError(f"{name} takes codes [..., N, K] with scale and zero_point [..., N, G], got {shapes}")
    if codes.numel() == 0 or scale.shape[-1] == 0 or codes.shape[-1] % scale.shape[-1]:
        raise ConfigError(f"{name} needs a whole, positive number of columns per group, got {shapes}")
    for what, t in (("codes", codes), ("zero_point", zero_point)):
        if int(t.max()) > max_code(cls.bits):
            raise ConfigError(f"{name}: {what} reach {int(t.max())}, {cls.bits} bits hold at most {max_code(cls.bits)}")
    if not torch.isfinite(scale).all():
        raise NonFiniteError(f"{name}: a scale is NaN or infinite")
    if perm is not None and not torch.equal(
        perm.long().sort().values, torch.arange(codes.shape[-1], device=perm.device)
    ):
        raise ConfigError(f"{name}: perm is not a permutation of the {codes.shape[-1]} input features")


implements = GroupTensor.implements
implements_torch_function = GroupTensor.implements_torch_function


def _times_transposed(x: Tensor, weight: GroupTensor) -> Tensor:
    """x·Wᵀ for a weight [N, K] (or a stack of them); x may be of another floating dtype than the weight."""
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if not x.is_floating_point() or x.shape[-1] != weight.in_features:
        raise ValueError(f"a product with {weight!r} cannot take {x.dtype} {tuple(x.shape)}")
    return ops.linear(x, *weight._packed())


def _product(x: Any, y: Any) -> Tensor:
    """x·y for mm and bmm, one of them quantized."""
    if isinstance(y, GroupTensor) and y.transposed and not isinstance(x, GroupTensor):
        # One matrix, expanded over a batch: a product of all rows with that matrix.
        return _times_transposed(x, y._expanded(()) if y.dim() == 3 and y.qdata.stride(0) == 0 else y)
    if isinstance(x, GroupTensor):
        return torch.matmul(x.dequantize(y.dtype), y.dequantize() if isinstance(y, GroupTensor) else y)
    return torch.matmul(x, y.dequantize(x.dtype))


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


@implements([aten.linear.default])
@implements_torch_function([torch.nn.functional.linear, aten.linear.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight, bias = _linear_arguments(*args, **kwargs)
    if not isinstance(weight, GroupTensor) or isinstance(x, GroupTensor) or isinstance(bias, GroupTensor):
        kinds = tuple(type(a).__name__ for a in (x, weight, bias))
        raise NotImplementedError(f"linear takes a quantized weight only, got {kinds}")
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit")
    y = x @ weight.dequantize(x.dtype).mT if weight.transposed else _times_transposed(x, weight)
    return y if bias is None else y + bias.to(y.dtype)


@implements([aten.mm.default, aten.bmm.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return _product(*args)


@implements([aten.addmm.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    bias, x, y = args
    product = _product(x, y) * kwargs.get("alpha", 1)
    beta = kwargs.get("beta", 1)
    return product if beta == 0 else product + bias * beta


@implements([aten.t.default, aten.transpose.int, aten.permute.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    weight = args[0]
    d = weight.dim()
    if func is aten.permute.default:
        axes = [a % d for a in args[1]]
    else:
        i, j = (a % d for a in args[1:]) if func is aten.transpose.int else (0, 1)
        axes = list(range(d))
        axes[i], axes[j] = axes[j], axes[i]
    identity = list(range(d))
    if axes not in (identity, [*identity[:-2], d - 1, d - 2]):
        raise NotImplementedError(f"{weight!r}: only the last two dimensions can be exchanged, got {axes}")
    with torch.inference_mode(False):  # a view of an ordinary tensor is an ordinary tensor, also under inference_mode
        flipped = weight._replace(transposed=weight.transposed != (axes != identity))
    return return_and_correct_aliasing(func, args, kwargs, flipped)


@implements([aten.expand.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    weight, size = args
    *lead, n, k = size
    if tuple(size) == tuple(weight.shape):
        lead = []
    elif weight.dim() != 2 or (n, k) not in (tuple(weight.shape), (-1, -1)):
        raise NotImplementedError(f"{weight!r} cannot be expanded to {tuple(size)}")
    with torch.inference_mode(False):
        stack = weight._expanded(tuple(lead)) if lead else weight._replace()
    return return_and_correct_aliasing(func, args, kwargs, stack)


@implements([aten.view.default, aten._unsafe_view.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    weight, size = args
    one_matrix = weight.qdata.stride()[:-3] == (0,) * (weight.dim() - 2)  # expanded over leading dimensions, if any
    if tuple(size) != tuple(weight.shape) and not (one_matrix and tuple(size[-2:]) == tuple(weight.shape[-2:])):
        raise NotImplementedError(f"{weight!r} cannot be viewed as {tuple(size)}: packed codes have no other shape")
    with torch.inference_mode(False):
        same = weight._expanded(()) if one_matrix else weight
        same = same._expanded(tuple(size[:-2])) if one_matrix and len(size) > 2 else same._replace()
    return return_and_correct_aliasing(func, args, kwargs, same)


@implements([aten._to_copy.default, aten.to.dtype_layout])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    # The base class keeps the dtype whatever is asked for.
    weight = args[0]
    device, in_background = kwargs.get("device") or weight.device, kwargs.get("non_blocking", False)
    moved = weight._apply_fn_to_data(lambda t: t.to(device, non_blocking=in_background, copy=True))
    return return_and_correct_aliasing(func, args, kwargs, moved._replace(dtype=kwargs.get("dtype") or weight.dtype))


def _kind(value: Any) -> str:
    return repr(value) if isinstance(value, GroupTensor) else f"a {value.dtype} tensor {tuple(value.shape)}"


@implements([aten.copy_.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    target, source = args[:2]
    if not isinstance(target, GroupTensor):
        return target.copy_(source.dequantize(target.dtype))
    if type(target) is not type(source) or target.__tensor_flatten__() != source.__tensor_flatten__():
        raise ValueError(
            f"cannot copy {_kind(source)} into {target!r}: a quantized weight takes one of the same kind and groups"
        )
    for name in target.__tensor_flatten__()[0]:
        inner = getattr(target, name)
        inner.copy_(getattr(source, name))
        if not inner.is_inference():
            # Below autograd nothing counts versions, by which a kernel knows that its converted weight is out of date.
            torch.autograd.graph.increment_version(inner)
    return target


_alias = GroupTensor._ATEN_OP_TABLE[GroupTensor][aten.detach.default]


@implements([aten.detach.default, aten.alias.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    with torch.inference_mode(False):  # as for transposed views
        return _alias(func, types, args, kwargs)


class Int2GroupTensor(GroupTensor):
    """A weight of 2-bit codes, see `GroupTensor`."""

    bits = 2


class Int3GroupTensor(GroupTensor):
    """A weight of 3-bit codes, see `GroupTensor`."""

    bits = 3


class Int4GroupTensor(GroupTensor):
    """A weight of 4-bit codes, see `GroupTensor`."""

    bits = 4


class Int8GroupTensor(GroupTensor):
    """A weight of 8-bit codes, see `GroupTensor`."""

    bits = 8


def tensor_class(bits: int) -> type[GroupTensor]:
    return {2: Int2GroupTensor, 3: Int3GroupTensor, 4: Int4GroupTensor, 8: Int8GroupTensor}[bits]
