"""Sites + config → the weights to quantize with their settings, and the rest with the reason.

Everything that can be wrong with a setting is found here, before any computation.
"""

from collections.abc import Callable, Collection, Mapping

from gptq_ao.config import GPTQConfig
from gptq_ao.errors import ConfigError, NoLinearError
from gptq_ao.passes.products.group_sizes import with_group_sizes
from gptq_ao.passes.records import Excluded, LinearSite, Selection

__all__ = ["choose_weights"]

ADAPTER = "part of an adapter"


def choose_weights(
    sites: tuple[LinearSite, ...],
    excluded: tuple[Excluded, ...],
    config: GPTQConfig,
    wanted: Callable[[str], bool] = lambda weight: True,
    first_names: Mapping[str, str] | None = None,
    adapters: Collection[str] = (),
    lenient: bool = False,
) -> Selection:
    """Apply the defaults, the rules and the filter.

    Args:
        wanted: a further condition on a parameter's name.
        first_names: every name of every parameter → the one by which sites know it, to explain a rule for another one.
        adapters: parameters of adapters, which are left alone. A rule that matches nothing else is obeyed; one that
            matches other weights too, such as a pattern for a whole layer, is a rule for those.
        lenient: whether a rule may be for what cannot be quantized, which then stays as it is.

    Raises:
        ConfigError: a rule matches nothing or cannot be followed, or a group size does not divide.
        NoLinearError: nothing is left to quantize.
    """
    names = [*dict.fromkeys(s.weight for s in sites), *(e.weight for e in excluded)]
    # A rule that no weight follows is most likely misspelled: better an error than a model without it.
    used = {config.rule_for(name) for name in names}
    unused = [pattern for pattern in config.rules if pattern not in used]
    if unused:
        tied = [
            (n, first) for n, first in (first_names or {}).items() if n != first and config.rule_for(n) == unused[0]
        ]
        if tied:
            raise ConfigError(
                f"rule {unused[0]!r} is for {tied[0][0]!r}, which is tied to {tied[0][1]!r}: they are one weight. "
                "Untie them first (give one of them a parameter of its own), or write the rule for the other name"
            )
        raise ConfigError(
            f"rule {unused[0]!r} matches no weight, or only such as an earlier rule matches. "
            f"Names look like {', '.join(map(repr, names[:3]))}; use re:… for patterns"
        )
    for_others = {config.rule_for(name) for name in names if name not in adapters}
    left = []
    for e in excluded:
        rule = config.rule_for(e.weight)
        if e.weight in adapters and (rule is None or rule in for_others):
            left.append(Excluded(e.weight, ADAPTER, expected=True))
            continue
        if rule is not None and config.for_weight(e.weight) is not None and e.expected and not lenient:
            raise ConfigError(f"rule {rule!r} asks to quantize {e.weight!r}, which cannot be: {e.reason}")
        left.append(e if rule is None or config.rules[rule] is not None else Excluded(e.weight, f"rule {rule!r}", True))

    settings: dict[str, GPTQConfig] = {}
    for name in dict.fromkeys(s.weight for s in sites):
        # One use that speaks against it (as a router, as a head) is enough.
        reason = next((s.left_out for s in sites if s.weight == name and s.left_out), None)
        own = config.for_weight(name)
        rule = config.rule_for(name)
        by_rule = rule is not None
        if name in adapters:
            reason, by_rule = ADAPTER, by_rule and rule not in for_others
        if own is None:
            left.append(Excluded(name, f"rule {rule!r}", expected=True))
        elif not wanted(name):
            left.append(Excluded(name, "left out by filter_fn", expected=True))
        elif reason is not None and not by_rule:
            left.append(Excluded(name, reason, expected=True))
        elif reason == "also the embedding table":
            raise ConfigError(f"a rule asks to quantize {name!r}, which is also the embedding table: untie them first")
        else:
            settings[name] = own
    if not settings:
        listing = (
            "\n".join(f"  {e.weight}: {e.reason}" for e in left) or "  (it multiplies no activation by a parameter)"
        )
        raise NoLinearError(f"the model has no weight to quantize:\n{listing}")
    settings = with_group_sizes(sites, settings)
    _check_orders(sites, settings)
    return Selection(tuple(s for s in sites if s.weight in settings), settings, tuple(left))


def _check_orders(sites: tuple[LinearSite, ...], settings: dict[str, GPTQConfig]) -> None:
    """One order of the columns is stored per weight, so one with several Hessians cannot follow "group" order."""
    for s in sites:
        whole = s.part == (0, s.layout.rows) and s.experts == 1
        if s.weight in settings and settings[s.weight].recipe.permutes and not whole:
            raise ConfigError(
                f"{s.weight!r} {list(s.layout.shape)} has several Hessians (experts, or parts that read different "
                'activations), so act_order="group" cannot order its columns: use "static", or give it a rule, '
                'rules={name: {"act_order": "static"}}'
            )
