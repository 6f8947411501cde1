"""Tensors that a hub checkpoint has one by one (experts), and a format as one: stacks."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_ao.checkpoint.files.shards import StoredTensor
from gptq_ao.errors import CheckpointError

__all__ = ["Stacks"]


@dataclass(frozen=True)
class Stacks:
    """How a format names them.

    Attributes:
        whole: name of a tensor in a hub checkpoint, or a pattern with `*` for the number → that of the stack and the
            number ("*", too); None: it is in no stack.
        member: name of a stack → that of a member, with `{}` for its number; None: it is no stack.
    """

    whole: Callable[[str], tuple[str, str] | None]
    member: Callable[[str], str | None]

    def name(self, name: str) -> str:
        """Of the tensor in the files that holds this one."""
        found = self.whole(name)
        return name if found is None else found[0]

    def joined(self, modules: Iterable[str], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Put stacks together; each is there as soon as its last member is.

        Args:
            modules: what the members belong to, by which a stack knows how many it has.
            tensors: name in a hub checkpoint → value.

        Raises:
            CheckpointError: the members of a stack differ in shape, which is that of other settings.
        """
        sizes: dict[str, int] = {}
        for module in dict.fromkeys(modules):
            sizes[self.name(module)] = sizes.get(self.name(module), 0) + 1
        waiting: dict[str, dict[int, Tensor]] = {}
        for name, tensor in tensors:
            found = self.whole(name)
            if found is None:
                yield name, tensor
                continue
            stack, number = found
            members = waiting.setdefault(stack, {})
            members[int(number)] = tensor
            if len(members) == sizes[stack.rpartition(".")[0]]:
                yield stack, _stack(stack, [t for _, t in sorted(waiting.pop(stack).items())])
        for stack in waiting:
            raise CheckpointError(f"{stack!r} is one tensor in this format, and only some of its experts are quantized")

    def split(self, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Take stacks apart, under the names of a hub checkpoint. Nothing is read."""
        found: dict[str, StoredTensor] = {}
        for name, tensor in stored.items():
            member = self.member(name)
            if member is None:
                found[name] = tensor
                continue
            if not tensor.shape:
                raise CheckpointError(f"{tensor.path}: {name!r} should be a stack, and is a single number")
            shape = tensor.shape[1:]
            size = math.prod(shape) * tensor.dtype.itemsize
            for i in range(tensor.shape[0]):
                found[member.format(i)] = replace(tensor, offset=tensor.offset + i * size, shape=shape)
        return found


def _stack(name: str, members: list[Tensor]) -> Tensor:
    shapes = {t.shape for t in members}
    if len(shapes) > 1:
        raise CheckpointError(
            f"{name!r} is one tensor in this format, and its experts have different settings: they are "
            f"{' and '.join(str([*s]) for s in sorted(shapes))}. Quantize all experts of a layer alike"
        )
    dtype = members[0].dtype
    for t in members[1:]:
        # fp16 and bf16 together are fp32, which holds both.
        dtype = dtype if t.dtype == dtype else torch.promote_types(dtype, t.dtype)
    return torch.stack([t.to(dtype) for t in members])
