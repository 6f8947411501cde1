"""Where in a model a weight is, going by its name."""

from collections.abc import Iterable, Mapping

__all__ = ["depth_of", "kind_of", "short_kinds"]


def depth_of(name: str) -> int | None:
    """The number of its layer: the first number in its name; None: it is in none of several."""
    return next((int(part) for part in name.split(".") if _is_number(part)), None)


def kind_of(name: str) -> str:
    """Its name without numbers: weights that do the same in different layers, or for different experts, are of a kind.
    `model.layers.3.mlp.down_proj.weight` is one of `model.layers.*.mlp.down_proj`."""
    return ".".join("*" if _is_number(part) else part for part in name.removesuffix(".weight").split("."))


def short_kinds(kinds: Iterable[str]) -> Mapping[str, str]:
    """Kind → what is left of it without the beginning, up to the layer's number, that all those in layers share."""
    kinds = list(dict.fromkeys(kinds))
    starts = {kind[: kind.find("*.") + 2] for kind in kinds if "*." in kind}
    start = starts.pop() if len(starts) == 1 else ""
    return {kind: kind.removeprefix(start) for kind in kinds}


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10
