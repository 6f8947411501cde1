"""Batches that say what they are of."""

from collections.abc import Iterable

from torch import Tensor

__all__ = ["Batches"]


class Batches(list[dict[str, Tensor]]):
    """A list of batches.

    Attributes:
        described: what they are of, and how many of each source, for the report.
    """

    def __init__(self, batches: Iterable[dict[str, Tensor]], described: str) -> None:
        super().__init__(batches)
        self.described = described
