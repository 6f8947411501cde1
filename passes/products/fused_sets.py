"""Sites → the sets of weights that inference engines fuse; Selection → those of which the settings differ.

Engines such as vLLM and SGLang compute q, k and v, gate and up, and all experts of a layer as one product each, with
one set of settings. A model in which these differ is valid, and runs anywhere else.
"""

import re
from collections.abc import Iterable

from torch import nn

from gptq_ao.config import GPTQConfig
from gptq_ao.passes.records import LinearSite, Selection
from gptq_ao.tensor import GroupTensor

__all__ = ["fused_sets", "mixed_sets"]

_EXPERT = re.compile(r"(.+\.experts)\..+")


def fused_sets(sites: Iterable[LinearSite]) -> tuple[tuple[str, ...], ...]:
    """Weights of one parent module that multiply the same rows, or what a module `experts` holds; no weight is in two
    sets, and output heads and routers are in none."""
    # Dicts with values of None are sets that keep their order.
    sets: dict[object, dict[str, None]] = {}
    for site in sites:
        if site.left_out is not None:
            continue  # a head or a router is a product of its own
        name = site.weight.replace(".base_layer.", ".")  # where an adapter is around it
        expert = _EXPERT.fullmatch(name)
        # Without the names of the parameter and of its linear: "layer.attention" of "layer.attention.q.weight".
        parent = name.rsplit(".", 2)[0] if name.count(".") > 1 else ""
        key = expert.group(1) if expert else (parent, site.rows)
        sets.setdefault(key, {})[site.weight] = None
    apart: list[dict[str, None]] = []
    for members in sets.values():  # a weight that is applied several times may be in several
        joined = [other for other in apart if not other.keys().isdisjoint(members)]
        first = joined[0] if joined else {}
        # This set connects all those that it has a weight in common with: they become one.
        for more in (*joined[1:], members):
            first |= more
        apart = [other for other in apart if not any(other is j for j in joined[1:])] + ([] if joined else [first])
    return tuple(tuple(members) for members in apart)


def mixed_sets(sites: Iterable[LinearSite], selection: Selection, model: nn.Module | None = None) -> tuple[str, ...]:
    """One line per set.

    Args:
        sites: all that were found, also those that a rule or a filter leaves as they are.
        model: to know which of those are quantized already.
    """
    lines = []
    for names in fused_sets(sites):
        members = {name: _settings(selection.settings.get(name), model, name) for name in names}
        if len(set(members.values())) > 1:
            lines.append(_line(members))
    return tuple(lines)


def _settings(c: GPTQConfig | None, model: nn.Module | None, name: str) -> str:
    weight = model.get_parameter(name) if c is None and model is not None else None
    if isinstance(weight, GroupTensor):
        size = -1 if weight.group_size == weight.in_features else weight.group_size
        return _described(weight.bits, size, weight.symmetric)
    return "not quantized" if c is None else _described(c.bits, c.group_size, c.sym)


def _described(bits: int, group_size: int | None, sym: bool) -> str:
    return f"{bits} bits, group_size {group_size}, {'symmetric' if sym else 'asymmetric'}"


def _line(members: dict[str, str]) -> str:
    """Settings → the weights that have them."""
    having: dict[str, list[str]] = {}
    for name, settings in members.items():
        having.setdefault(settings, []).append(name)
    parts = []
    for settings, names in having.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        parts.append(f"{', '.join(names[:2])}{more}: {settings}")
    return "; ".join(parts)
