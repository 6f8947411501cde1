"""What Triton's interpreter lacks: the few PTX instructions that the kernels' inline assembly consists of, and loops
over scalars with Triton 3.6 and NumPy 2.4."""

from typing import Any

import numpy as np
import torch

OUTPUTS: dict[str, Any] = {"fp16": np.float16, "bf16": np.uint16, "fp32": np.float32}


def install() -> None:
    from triton.runtime import interpreter

    vars(interpreter)["InterpreterBuilder"].create_inline_asm = _elementwise
    patch = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        # Triton 3.6 takes int() of an array of one element, which NumPy 2.4 refuses.
        tensor.__index__ = lambda self: self.handle.data.item()

    vars(interpreter)["_patch_lang_tensor"] = patch_index


class _Results:
    def __init__(self, each: list[Any]) -> None:
        self.each = each

    def get_result(self, i: int) -> Any:
        return self.each[i]


def _elementwise(_: Any, asm: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int) -> Any:
    """`pack` neighbouring elements at a time; an output's elements fill whole registers."""
    from triton.runtime.interpreter import TensorHandle

    count = constraints.count("=")
    inputs = [v.data.astype(np.int32).view(np.uint32).reshape(-1, pack)[:, i] for v in values for i in range(pack)]
    registers = _run(asm, count, inputs)
    each, shape = count // len(types), values[0].data.shape
    results = []
    for i, kind in enumerate(types):
        words = np.ascontiguousarray(np.stack(registers[i * each : (i + 1) * each], -1))
        results.append(TensorHandle(words.view(OUTPUTS[kind.scalar.name]).reshape(shape), kind.scalar))
    return _Results(results)


def _run(asm: str, outputs: int, inputs: list[Any]) -> list[Any]:
    registers: dict[str, Any] = {f"${outputs + i}": word for i, word in enumerate(inputs)}

    def value(name: str) -> Any:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in asm.strip("{} ").split(";"):
        operation, _, rest = line.strip().partition(" ")
        if operation in ("", ".reg"):
            continue
        target, *operands = (o.strip() for o in rest.split(","))
        a, b, *more = (value(o) for o in operands)
        if operation == "shr.u32":
            result = a >> b
        elif operation == "shl.b32":
            result = a << b
        elif operation == "lop3.b32" and more[1] == 0xEA:  # the table of (a & b) | c
            result = (a & b) | more[0]
        elif operation.partition(".")[2] in ("f16x2", "bf16x2"):
            result = _of_pairs(operation, a, b)
        elif operation in ("sub.f32", "mul.f32"):
            result = _of_words(operation, a, b)
        elif operation == "cvt.rn.bf16x2.f32":  # the first one becomes the upper half
            low, high = (_rounded(word) for word in (b, a))
            result = (high << np.uint32(16)) | low
        elif operation == "prmt.b32":
            bytes_of = [word >> np.uint32(8 * i) & 255 for word in (a, a * 0 + b) for i in range(4)]
            result = sum(bytes_of[int(more[0]) >> 4 * i & 7] << np.uint32(8 * i) for i in range(4))
        else:
            raise NotImplementedError(line)
        registers[target] = np.asarray(result, dtype=np.uint32)
    return [registers[f"${i}"] for i in range(outputs)]


def _of_pairs(operation: str, a: Any, b: Any) -> Any:
    """sub or mul of two 16-bit numbers at once, each rounded to the nearest."""
    name, _, kind = operation.partition(".")
    dtype = torch.float16 if kind == "f16x2" else torch.bfloat16
    x, y = (torch.from_numpy(np.atleast_1d(np.asarray(word, np.uint32)).view(np.int16)).view(dtype) for word in (a, b))
    result = x - y if name == "sub" else x * y
    return result.view(torch.int16).numpy().view(np.uint32).reshape(np.shape(a))


def _of_words(operation: str, a: Any, b: Any) -> Any:
    """sub or mul in fp32."""
    x, y = (np.asarray(word, np.uint32).view(np.float32) for word in (a, b))
    return np.asarray(x - y if operation == "sub.f32" else x * y, np.float32).view(np.uint32)


def _rounded(word: Any) -> Any:
    """The bits of the bf16 nearest to an fp32."""
    x = torch.from_numpy(np.atleast_1d(np.asarray(word, np.uint32)).view(np.float32)).bfloat16()
    return x.view(torch.int16).numpy().view(np.uint16).astype(np.uint32).reshape(np.shape(word))
