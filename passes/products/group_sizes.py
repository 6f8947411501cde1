"""Settings → settings in which every group size is a number that divides the weight's input features.

Where none is given, each weight gets the largest of `PREFERRED` that divides its input features, and those of all
weights that inference engines fuse with it (the experts of a layer may differ in width); else one scale per row.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping

from gptq_ao.codes.grid import group_columns
from gptq_ao.config import GPTQConfig
from gptq_ao.errors import ConfigError
from gptq_ao.passes.products.fused_sets import fused_sets
from gptq_ao.passes.records import LinearSite

__all__ = ["PREFERRED", "check_group_sizes", "largest_fitting", "smaller_groups", "with_group_sizes"]

PREFERRED = (128, 64, 32, 16)
LISTED = 4  # widths in a message


def with_group_sizes(sites: Iterable[LinearSite], settings: Mapping[str, GPTQConfig]) -> dict[str, GPTQConfig]:
    """
    Raises:
        ConfigError: a group size that was given does not divide.
    """
    sites = [s for s in sites if s.weight in settings]
    widths = {s.weight: s.layout.in_features for s in sites}
    check_group_sizes(widths, settings)
    left = {name for name, c in settings.items() if c.group_size is None}
    sizes = {name: largest_fitting([widths[name]]) for name in left}
    for names in fused_sets(sites):
        together = left.intersection(names)
        sizes |= dict.fromkeys(together, largest_fitting(widths[name] for name in together))
    return {n: dataclasses.replace(c, group_size=sizes[n]) if n in sizes else c for n, c in settings.items()}


def largest_fitting(widths: Iterable[int]) -> int:
    """The largest of `PREFERRED` that divides all widths; −1 if none does."""
    return next(iter(_fitting(widths)), -1)


def smaller_groups(widths: Mapping[str, int], settings: Mapping[str, GPTQConfig], config: GPTQConfig) -> str | None:
    """What the report says of weights for which `PREFERRED[0]` was not chosen.

    Args:
        widths: weight → its input features.
        settings: of `with_group_sizes`.
        config: what was asked for.
    """
    counts: Counter[tuple[int, int]] = Counter()
    for name, c in settings.items():
        asked = config.for_weight(name)
        if asked is not None and asked.group_size is None and c.group_size not in (None, PREFERRED[0]):
            counts[widths[name], c.group_size] += 1
    if not counts:
        return None
    kinds = [
        f"{'one scale per row' if size == -1 else f'groups of {size}'} ({n} of {width} input features)"
        for (width, size), n in counts.items()
    ]
    more = [f"and others, of {len(kinds) - LISTED} more widths"] if kinds[LISTED:] else []
    return (
        f"group_size: {PREFERRED[0]} does not divide the input features of {sum(counts.values())} weights, or of some "
        f"that engines fuse with them, which got {', '.join([*kinds[:LISTED], *more])}"
    )


def check_group_sizes(widths: Mapping[str, int], settings: Mapping[str, GPTQConfig]) -> None:
    """
    Args:
        widths: weight → its input features.

    Raises:
        ConfigError: they are not a multiple of a group size that was given.
    """
    given = {name: c.group_size for name, c in settings.items() if c.group_size is not None}
    wrong = {name: size for name, size in given.items() if widths[name] % group_columns(widths[name], size)}
    if not wrong:
        return
    kinds: dict[tuple[int, int], list[str]] = {}
    for name, size in wrong.items():
        kinds.setdefault((size, widths[name]), []).append(name)
    lines = [
        f"  {size} does not divide {width}, the input features of {_count(names)}"
        for (size, width), names in kinds.items()
    ]
    # Whoever changes one of these sizes changes it for all weights that have it, also for those that it divides.
    alike = {widths[name] for name, size in given.items() if size in wrong.values()}
    fitting = [*map(str, _fitting(alike)), "-1 (one scale per row)"]
    raise ConfigError(
        f"group_size does not divide the input features of {len(wrong)} of {len(settings)} weights:\n"
        + "\n".join([*lines[:LISTED], *([f"  and {len(lines) - LISTED} more such widths"] if lines[LISTED:] else [])])
        + f"\nWhat fits all that have {'this size' if len(set(wrong.values())) == 1 else 'these sizes'}: "
        f"{', '.join(fitting)}. Give one of them, or leave group_size out: it is then chosen by width.\n"
        "Or give single weights a rule, rules={name: {'group_size': None}}, or rules={name: None} to leave them as "
        "they are"
    )


def _fitting(widths: Iterable[int]) -> list[int]:
    common = math.gcd(*widths)
    return [size for size in PREFERRED if common % size == 0]


def _count(names: list[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{len(names)} weights such as {names[0]!r}"
