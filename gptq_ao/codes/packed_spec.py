"""What a quantized weight is made of, known before there is one: from its shape and its recipe."""

from dataclasses import dataclass

from gptq_ao.codes.grid import group_columns
from gptq_ao.codes.tiles import packed_bytes
from gptq_ao.recipe import Recipe

__all__ = ["PackedSpec"]


@dataclass(frozen=True)
class PackedSpec:
    """The layout of one quantized weight.

    Attributes:
        shape: of its codes, [N, K], or [E, N, K] for a stack of E matrices (experts).
        bits: width of a code.
        group_size: columns that share a scale; K where a row has one scale.
        permuted: whether codes are in another order of columns than the activation, which one int32 per column tells.
    """

    shape: tuple[int, ...]
    bits: int
    group_size: int
    permuted: bool

    @classmethod
    def of(cls, shape: tuple[int, ...], recipe: Recipe) -> "PackedSpec":
        """That of codes of this shape, solved with a recipe."""
        return cls(shape, recipe.bits, group_columns(shape[-1], recipe.group_size), recipe.permutes)

    @property
    def groups(self) -> int:
        """Scales in a row."""
        return self.shape[-1] // self.group_size

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Of scales and of zero points, [..., N, G]."""
        return (*self.shape[:-1], self.groups)

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of matrices, of which a product takes one per expert."""
        return len(self.shape) > 2

    @property
    def nbytes(self) -> int:
        """In memory, padding to whole tiles included."""
        return packed_bytes(self.shape, self.bits, self.groups) + (4 * self.shape[-1] if self.permuted else 0)
