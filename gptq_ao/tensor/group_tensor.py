"""GroupTensor: what a quantized weight is made of, and how it is built.

What operators do with it is in `products.py`, `views.py` and `copies.py`.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from gptq_ao.codes.grid import max_code
from gptq_ao.codes.packed_spec import PackedSpec
from gptq_ao.codes.tiles import pack_codes, pack_scale_zero, pack_words, unpack_codes, unpack_scale_zero
from gptq_ao.errors import ConfigError, NonFiniteError
from gptq_ao.kernels import ops
from gptq_ao.tensor.parameter import ParameterClass
from gptq_ao.tensor.saved import check_parts
from gptq_ao.tensor.sharding import Shards
from gptq_ao.tensor.values import on_values

__all__ = ["GroupTensor"]


class GroupTensor(Shards, TorchAOBaseTensor, metaclass=ParameterClass):
    """The shared base: everything but the number of bits.

    Attributes:
        qdata: packed codes, see `codes/tiles.py`.
        high_plane: the rest of codes of 3 bits, else None.
        scale_zero: packed scales and zero points.
        perm: int32 [in_features] or None. Column i of the codes belongs to input feature `perm[i]`.
        group_size: number of neighbouring columns that share a scale.
        out_features: the logical size, without padding.
        in_features: as out_features.
        transposed: whether the shape is [..., in_features, out_features].
        view_shape: the shape, if it is that of neither a matrix nor a stack: a convolution's [out, in, height, width].
            The (transposed) matrix has the same elements in the same order.
    """

    bits: ClassVar[int]
    tensor_data_names: ClassVar[list[str]] = ["qdata", "scale_zero"]
    tensor_attribute_names: ClassVar[list[str]] = [
        "group_size",
        "out_features",
        "in_features",
        "transposed",
        "dtype",
        "view_shape",
    ]
    optional_tensor_data_names: ClassVar[list[str]] = ["high_plane", "perm"]
    # Operators of other libraries, which may be registered after this class: name → implementation.
    implemented_by_name: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # torchao gives every class its own, which fills in what older files lack.
        restore = cls.__setstate__

        def restore_and_check(self: "GroupTensor", state: Any) -> None:
            if "view_as" in state:  # the name that older files have, which hid the method of `Tensor`
                state = {**state, "view_shape": state["view_as"]}
                del state["view_as"]
            restore(self, state)
            check_parts(self)

        cls.__setstate__ = restore_and_check

    qdata: Tensor
    scale_zero: Tensor
    high_plane: Tensor | None
    perm: Tensor | None
    group_size: int
    out_features: int
    in_features: int
    transposed: bool
    view_shape: tuple[int, ...] | None

    def __new__(
        cls,
        qdata: Tensor,
        scale_zero: Tensor,
        group_size: int,
        out_features: int,
        in_features: int,
        transposed: bool,
        dtype: torch.dtype,
        view_shape: tuple[int, ...] | None = None,
        high_plane: Tensor | None = None,
        perm: Tensor | None = None,
    ) -> "GroupTensor":
        # `qdata` has tile row, tile column and word last; what is in front of them is a stack's.
        shape = torch.Size(view_shape or (*qdata.shape[:-3], out_features, in_features))
        strides = [1]  # as the dense weight has them
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        # With `view_shape` the shape is given as it is seen; `transposed` then only says how the matrix within lies.
        if transposed and view_shape is None:
            shape = torch.Size((*shape[:-2], in_features, out_features))
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
        view_shape: tuple[int, ...] | None = None,
        high_plane: Tensor | None = None,
        perm: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.qdata, self.scale_zero, self.high_plane, self.perm = qdata, scale_zero, high_plane, perm
        self.group_size, self.out_features, self.in_features = group_size, out_features, in_features
        self.transposed, self.view_shape = transposed, view_shape

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
        view_shape: tuple[int, ...] | None = None,
    ) -> "GroupTensor":
        """Pack a quantized weight.

        Args:
            codes: [..., N, K] uint8, at most 2^bits − 1.
            scale: [..., N, G] fp16, finite; G divides K. May be negative.
            zero_point: [..., N, G] uint8, at most 2^bits − 1.
            dtype: what the weight pretends to be: the dtype of `dequantize()`.
            perm: [K] integers, a permutation: column i of `codes` belongs to input feature `perm[i]`.
            transposed: give the tensor the shape [..., K, N].
            view_shape: give the tensor this shape, of as many elements as the matrix, [N, K] or transposed [K, N].

        Raises:
            ConfigError: shapes, dtypes or ranges are not those above.
            NonFiniteError: a scale is NaN or infinite.
        """
        if codes.dtype != torch.uint8:
            raise ConfigError(f"{cls.__name__} takes codes as uint8, got {codes.dtype}")
        _check_parts(cls, codes.shape, scale, zero_point, perm, view_shape)
        # A larger code would spill into the bits of its neighbour.
        _check_range(cls, "codes", codes)
        planes = pack_codes(codes, cls.bits)
        return cls._of_planes(planes, codes.shape[-1], scale, zero_point, dtype, perm, transposed, view_shape)

    @classmethod
    def from_words(
        cls,
        words: Tensor,
        in_features: int,
        scale: Tensor,
        zero_point: Tensor,
        *,
        dtype: torch.dtype,
        perm: Tensor | None = None,
        transposed: bool = False,
        view_shape: tuple[int, ...] | None = None,
    ) -> "GroupTensor":
        """The same of codes that are packed as files have them, much faster.

        Args:
            words: [..., N, ⌈K·bits/32⌉] int32, each row a stream of bits (see `codes/bit_stream.py`).
            in_features: K.
        """
        # Rounded up: the last word of a row may be partly filled.
        width = -(-in_features * cls.bits // 32)
        if words.dtype != torch.int32 or words.dim() < 2 or words.shape[-1] != width:
            raise ConfigError(
                f"{cls.__name__} takes {in_features} codes as int32 words [..., N, {width}], "
                f"got {words.dtype} {tuple(words.shape)}"
            )
        _check_parts(cls, torch.Size((*words.shape[:-1], in_features)), scale, zero_point, perm, view_shape)
        planes = pack_words(words, cls.bits, in_features)
        return cls._of_planes(planes, in_features, scale, zero_point, dtype, perm, transposed, view_shape)

    @classmethod
    def _of_planes(
        cls,
        planes: tuple[Tensor, Tensor | None],
        in_features: int,
        scale: Tensor,
        zero_point: Tensor,
        dtype: torch.dtype,
        perm: Tensor | None,
        transposed: bool,
        view_shape: tuple[int, ...] | None,
    ) -> "GroupTensor":
        """The weight made of packed codes and other parts that were checked."""
        qdata, high_plane = planes
        perm = None if perm is None else perm.to(torch.int32)
        n, groups = scale.shape[-2:]
        scale_zero = pack_scale_zero(scale, zero_point)
        view_shape = None if view_shape is None else tuple(view_shape)
        group_size = in_features // groups
        return cls(qdata, scale_zero, group_size, n, in_features, transposed, dtype, view_shape, high_plane, perm)

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

    @property
    def symmetric(self) -> bool:
        """Whether all zero points are the middle code."""
        return bool((self.zero_point == 2 ** (self.bits - 1)).all())

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, in the shape of this tensor."""
        weight = ops.dequantize(*self.packed(), output_dtype or self.dtype)
        # First the matrix as the model stores it, then its shape, which has the elements of that matrix in order.
        weight = weight.mT if self.transposed else weight
        return weight if self.view_shape is None else weight.reshape(self.view_shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An operator of another library may come here as a packet (all its overloads) or as one overload.
        name = None
        if isinstance(func, torch._ops.OpOverloadPacket):
            name = func._qualified_op_name
        elif isinstance(func, torch._ops.OpOverload):
            name = func._schema.name
        if name in cls.implemented_by_name:  # here already, so that autograd does not meet the subclass
            return cls.implemented_by_name[name](func, types, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Under inference_mode composite operators (`.to`, `.T`, `matmul`) arrive whole: take them apart first.
        # "Composite" operators are those that torch defines by other operators.
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        if func not in cls._ATEN_OP_TABLE[cls] and func.has_kernel_for_dispatch_key(composite):
            return func.decompose(*args, **(kwargs or {}))
        # By name, not by object: such an operator may not have existed when the table of torchao was filled.
        by_name = cls.implemented_by_name.get(func._schema.name)
        if by_name is not None:
            return by_name(func, types, args, kwargs)
        if func not in cls._ATEN_OP_TABLE[cls]:
            return on_values(GroupTensor, func, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    def storage(self) -> NoReturn:
        """What safetensors and `save_pretrained` ask every tensor for.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{type(self).__name__} has no storage of its own, so it cannot be written as one tensor: save the model "
            "with gptq_ao.save_quantized(model, directory), or a training run with accelerator.save_state(directory, "
            "safe_serialization=False)"
        )

    @property
    def spec(self) -> PackedSpec:
        """What it is made of."""
        shape = (*self.qdata.shape[:-3], self.out_features, self.in_features)
        return PackedSpec(shape, self.bits, self.group_size, self.perm is not None)

    def packed(self) -> tuple[Any, ...]:
        """The fields of `Packed` (`kernels/packed.py`), which the operators in `kernels/ops.py` take one by one."""
        numbers = (self.bits, self.group_size, self.out_features, self.in_features)
        return (self.qdata, self.scale_zero, self.high_plane, self.perm, *numbers)

    def replace(self, **attributes: Any) -> "GroupTensor":
        """The same weight with other inner tensors or attributes, without a copy."""
        # The order of the constructor's parameters.
        names = [*self.tensor_data_names, *self.tensor_attribute_names, *self.optional_tensor_data_names]
        return type(self)(*(attributes.get(n, getattr(self, n)) for n in names))

    def parts(self) -> dict[str, Tensor]:
        """All inner tensors by name."""
        return {n: getattr(self, n) for n in self.__tensor_flatten__()[0]}

    @property
    def nbytes(self) -> int:
        """What it takes in memory. (`element_size()` is that of the dtype it pretends to be.)"""
        return sum(part.nbytes for part in self.parts().values())

    def tiled(self) -> dict[str, Tensor]:
        """The inner tensors that have one part for each tile of rows, by name: all but `perm`."""
        inner = {n: getattr(self, n) for n in ("qdata", "scale_zero", "high_plane")}
        return {n: t for n, t in inner.items() if t is not None}

    def each(self, change: Callable[[Tensor], Tensor], **attributes: Any) -> "GroupTensor":
        """The same weight with `change` applied to what is `tiled`, and with other attributes."""
        return self.replace(**{n: change(t) for n, t in self.tiled().items()}, **attributes)

    def expanded(self, lead: tuple[int, ...]) -> "GroupTensor":
        """The matrix as a stack of `lead` equal ones (or, for `()`, the first matrix of a stack), without a copy."""
        # All equal matrices lie on top of each other, so the first one stands for them.
        first = (0,) * (self.dim() - 2)
        return self.each(lambda t: t.expand(*lead, *t.shape) if lead else t[first])

    def experts(self, index: tuple[Any, ...]) -> "GroupTensor":
        """Some matrices of a stack: `index` is for the leading dimensions."""
        return self.each(lambda t: t[index])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, group_size={self.group_size}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )

    def _stable_hash_for_caching(self) -> str:
        """For torch.compile's cache, which must recognize a weight of the same kind in another process."""
        # Shapes of the inner tensors tell what the repr does not: whether there is a `perm`, and a stack's tiles.
        parts = [f"{n}:{tuple(t.shape)}" for n in self.__tensor_flatten__()[0] for t in (getattr(self, n),)]
        return f"{self!r} transposed={self.transposed} {' '.join(parts)}"


def _check_parts(
    cls: type[GroupTensor],
    codes: torch.Size,
    scale: Tensor,
    zero_point: Tensor,
    perm: Tensor | None,
    view_shape: tuple[int, ...] | None,
) -> None:
    """Raise what `from_codes` says, if anything but the codes themselves is wrong; their shape is given."""
    name = cls.__name__
    if zero_point.dtype != torch.uint8 or scale.dtype != torch.float16:
        raise ConfigError(
            f"{name} takes zero_point as uint8 and scale as float16, got {zero_point.dtype}, {scale.dtype}"
        )
    shapes = f"codes {tuple(codes)}, scale {tuple(scale.shape)}, zero_point {tuple(zero_point.shape)}"
    # Shapes before values: the checks below that read values rely on them.
    if len(codes) < 2 or scale.shape != zero_point.shape or codes[:-1] != scale.shape[:-1]:
        raise ConfigError(f"{name} takes codes [..., N, K] with scale and zero_point [..., N, G], got {shapes}")
    if codes.numel() == 0 or scale.shape[-1] == 0 or codes[-1] % scale.shape[-1]:
        raise ConfigError(f"{name} needs a whole, positive number of columns per group, got {shapes}")
    if view_shape is not None and (len(codes) != 2 or torch.Size(view_shape).numel() != codes.numel()):
        raise ConfigError(f"{name}: codes {tuple(codes)} cannot be viewed as {tuple(view_shape)}")
    _check_range(cls, "zero_point", zero_point)
    if not torch.isfinite(scale).all():
        raise NonFiniteError(f"{name}: a scale is NaN or infinite")
    # An index that occurs twice or is out of range would read wrong activations, or memory that is not there.
    if perm is not None and not torch.equal(perm.long().sort().values, torch.arange(codes[-1], device=perm.device)):
        raise ConfigError(f"{name}: perm is not a permutation of the {codes[-1]} input features")


def _check_range(cls: type[GroupTensor], what: str, t: Tensor) -> None:
    # The maximum is enough: uint8 has nothing below 0.
    if int(t.max()) > max_code(cls.bits):
        raise ConfigError(
            f"{cls.__name__}: {what} reach {int(t.max())}, {cls.bits} bits hold at most {max_code(cls.bits)}"
        )
