"""Which weights can have an adapter beside them: those that PEFT puts one beside, with one Hessian for all rows of a
matrix."""

import dataclasses
from collections.abc import Collection, Iterable

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gptq_ao.config import GPTQConfig
from gptq_ao.errors import ConfigError
from gptq_ao.passes.records import LinearSite, Selection
from gptq_ao.report import names_of

__all__ = ["with_adapters", "without_adapters"]


def with_adapters(selection: Selection, model: nn.Module) -> Selection:
    """The selection in which only weights that can have an adapter are to get one.

    Raises:
        ConfigError: none can, or a rank is larger than a side of its weight.
    """
    asked = {n: c.adapter_rank for n, c in selection.settings.items() if c.adapter_rank}
    impossible = _impossible(selection.sites, asked, model)
    if asked and len(impossible) == len(asked):
        name, why = next(iter(impossible.items()))
        raise ConfigError(
            f"adapter_rank={asked[name]}, and no weight can have an adapter: {name!r} is {why}. Leave adapter_rank out"
        )
    for name, layout in selection.layouts.items():
        least = min(layout.out_features, layout.in_features)
        if name not in impossible and asked.get(name, 0) > least:
            raise ConfigError(
                f"adapter_rank is {asked[name]}, and {name!r} [{layout.out_features}, {layout.in_features}] has no "
                f"more than rank {least}: give less, or give it a rule, rules={{name: {{'adapter_rank': 0}}}}"
            )
    settings = {
        n: dataclasses.replace(c, adapter_rank=0) if n in impossible else c for n, c in selection.settings.items()
    }
    return dataclasses.replace(selection, settings=settings)


def without_adapters(selection: Selection, config: GPTQConfig, model: nn.Module) -> str | None:
    """A line about weights that should have an adapter by `config`, and have none by `selection`."""
    wanted = {n: config.for_weight(n) for n in selection.settings}
    missing = [n for n, c in wanted.items() if c and c.adapter_rank and not selection.settings[n].adapter_rank]
    by_reason: dict[str, list[str]] = {}
    for name, why in _impossible(selection.sites, missing, model).items():
        by_reason.setdefault(why, []).append(name)
    lines = [f"{names_of(names)} ({why})" for why, names in by_reason.items()]
    return f"no adapter can be put beside {'; '.join(lines)}" if lines else None


def _impossible(sites: Iterable[LinearSite], names: Collection[str], model: nn.Module) -> dict[str, str]:
    """Weight → what keeps it from having an adapter."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            owners.setdefault(id(p), []).append(module)
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    reasons = (
        (s.weight, _reason(s, owners[id(model.get_parameter(s.weight))], parameters))
        for s in sites
        if s.weight in names
    )
    return {name: why for name, why in reasons if why is not None}


def _reason(site: LinearSite, owners: list[nn.Module], parameters: Collection[str]) -> str | None:
    if len(owners) > 1:
        return "the weight of several modules"
    layout, (start, stop) = site.layout, site.part
    # The class of GPT-2's layers is known by name: transformers may not be imported.
    known = isinstance(owners[0], nn.Linear) or type(owners[0]).__name__ == "Conv1D"
    # The last is a Linear that `nn.MultiheadAttention` never calls.
    called = site.weight.endswith(".weight") and not isinstance(owners[0], NonDynamicallyQuantizableLinear)
    stack = layout.stack > 1 and layout.stacked
    if not (stack or (known and called and layout.view_shape is None)):
        return "not the weight of an nn.Linear or Conv1D that is called"
    if start % layout.out_features or (stop - start) // site.experts % layout.out_features:
        return "made of parts with Hessians of their own"
    return _reason_of_stack(site, owners[0], parameters) if stack else None


def _reason_of_stack(site: LinearSite, owner: nn.Module, parameters: Collection[str]) -> str | None:
    """PEFT adapts stacks of experts by the names of parameters (`target_parameters`)."""
    if "." not in site.weight:
        return "a parameter of the model itself, for which PEFT has no adapters"
    if any(name.endswith(f".{site.weight}") for name in parameters):
        return "of a name that another ends with, which PEFT cannot tell apart"
    # By this PEFT tells input from output features. If it took one for the other, A would be where B belongs.
    if site.layout.transposed != bool(getattr(owner, "is_transposed", False)):
        return "stored the other way round than PEFT takes it for"
    return None
