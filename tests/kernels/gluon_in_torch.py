"""Runs kernels written in Gluon on the CPU, program by program: Gluon has no interpreter.

A kernel's functions are run as the Python that they are, with a stand-in for `gl` in their globals. Layouts say where
numbers lie, not which they are, and are ignored. Products of tensor cores cut their factors off at 11 bits, as TF32.
"""

import itertools
import types
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["launch"]

POISON = float("nan")  # in shared memory


class Value:
    """A tensor as a kernel sees it."""

    def __init__(self, data: Any) -> None:
        self.data = data if isinstance(data, Tensor) else torch.tensor(data)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> "Value":
        return Value(self.data.view(dtype) if bitcast else self.data.to(dtype))

    def expand_dims(self, axis: int) -> "Value":
        return Value(self.data.unsqueeze(axis))

    def __neg__(self) -> "Value":
        return Value(-self.data)

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)


def _operator(name: str) -> Any:
    def of_two(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        result = getattr(self.data, name)(_data(other))
        return result if result is NotImplemented else Value(result)

    return of_two


for _name in ("add", "sub", "mul", "truediv", "and", "lt", "gt", "le", "ge", "eq"):
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("add", "sub", "mul", "truediv"):
    setattr(Value, f"__r{_name}__", _operator(f"__r{_name}__"))


class Pointer:
    """To the elements of a tensor's storage."""

    def __init__(self, storage: Tensor, offset: Any) -> None:
        self.storage, self.offset = storage, offset

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.storage, self.offset + _data(other))

    def read(self, mask: Any, other: Any) -> Value:
        if mask is None:
            return Value(self.storage[self.offset])
        offset, mask = torch.broadcast_tensors(torch.as_tensor(self.offset), _data(mask))
        read = self.storage[torch.where(mask, offset, 0)]
        return Value(torch.where(mask, read, torch.tensor(other, dtype=read.dtype)))

    def write(self, value: Any, mask: Any) -> None:
        offset, mask, value = torch.broadcast_tensors(torch.as_tensor(self.offset), _data(mask), _data(value))
        assert offset[mask].unique().numel() == int(mask.sum())  # two threads would race
        self.storage[offset[mask]] = value[mask].to(self.storage.dtype)


class Shared:
    """Shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, i: Any) -> "Shared":
        return Shared(self.data[int(i)])

    def slice(self, start: int, length: int) -> "Shared":
        return Shared(self.data[start : start + length])

    def permute(self, axes: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(axes))

    def load(self, layout: Any) -> Value:
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        self.data.copy_(value.data)


class Language:
    """`gl`, as far as the project's kernels use it."""

    float32, float16, int32, uint8, constexpr = torch.float32, torch.float16, torch.int32, torch.uint8, Any

    def __init__(self, program: tuple[int, ...]) -> None:
        self.program = program

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *_: None
        raise AttributeError(f"the stand-in for gl has no {name}")

    def program_id(self, axis: int) -> int:
        return self.program[axis]

    def arange(self, start: int, stop: int, layout: Any) -> Value:
        return Value(torch.arange(start, stop))

    def load(self, pointer: Pointer, mask: Any = None, other: Any = None) -> Value:
        return pointer.read(mask, other)

    def store(self, pointer: Pointer, value: Any, mask: Any) -> None:
        pointer.write(value, mask)

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: Any) -> Value:
        return Value(torch.zeros(shape, dtype=dtype))

    def zeros_like(self, value: Value) -> Value:
        return Value(torch.zeros_like(value.data))

    def where(self, condition: Any, one: Any, other: Any) -> Any:
        return Value(torch.where(torch.as_tensor(_data(condition)), _data(one), _data(other)))

    def minimum(self, one: Any, other: Any) -> Any:
        """Of a number and NaN the number, as on the GPU."""
        return Value(torch.fmin(torch.as_tensor(_data(one)), torch.as_tensor(_data(other))))

    def maximum(self, one: Any, other: Any) -> Any:
        return Value(torch.fmax(torch.as_tensor(_data(one)), torch.as_tensor(_data(other))))

    def abs(self, value: Value) -> Value:
        return Value(value.data.abs())

    def floor(self, value: Value) -> Value:
        return Value(value.data.floor())

    def ceil(self, value: Value) -> Value:
        return Value(value.data.ceil())

    def sum(self, value: Value, axis: int) -> Value:
        return Value(value.data.sum(axis, dtype=value.data.dtype))

    def static_range(self, stop: Any) -> range:
        return range(int(stop))

    def convert_layout(self, value: Value, layout: Any) -> Value:
        return value

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(torch.full(shape, POISON, dtype=dtype))


def launch(kernel: Any, grid: tuple[int, ...], tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> None:
    """In place of `launch_there`."""
    given = [None if t is None else Pointer(_storage(t), t.storage_offset()) for t in tensors]
    for program in itertools.product(*map(range, grid)):
        _plain(kernel.function, Language(program), {})(*given, *numbers, **kernel.constants)


def _plain(function: Any, gl: Language, made: dict[str, Any]) -> Any:
    """The Python function of a kernel, or of what it calls."""
    fn = cast(types.FunctionType, function.fn)
    if fn.__qualname__ not in made:
        stand_ins = {"gl": gl, "mma_v2": _mma, "range": lambda *bounds: range(*map(int, bounds))}
        names: dict[str, Any] = {}
        made[fn.__qualname__] = types.FunctionType(fn.__code__, names, fn.__name__, fn.__defaults__)
        for name in fn.__code__.co_names:
            known = fn.__globals__.get(name)
            if name in stand_ins:
                names[name] = stand_ins[name]
            elif hasattr(known, "is_gluon"):
                names[name] = _plain(known, gl, made)
            elif known is not None:
                names[name] = getattr(known, "value", known)
    return made[fn.__qualname__]


def _mma(left: Value, right: Value, total: Value, precision: str) -> Value:
    assert precision == "tf32"
    a, b = ((t.data.view(torch.int32) & -(2**13)).view(torch.float32) for t in (left, right))
    return Value(total.data + a @ b)


def _storage(t: Tensor) -> Tensor:
    return t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)


def _data(value: Any) -> Any:
    return value.data if isinstance(value, Value) else value
