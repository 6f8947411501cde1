"""What can be quantized without data: the weights of nn.Linear, in the form in which `find_linears.py` gives them."""

from torch import nn

from gptq_ao.model.inspection import output_heads
from gptq_ao.passes.records import HEAD, Excluded, Layout, LinearSite, Rows

__all__ = ["linear_modules"]


def linear_modules(model: nn.Module) -> tuple[tuple[LinearSite, ...], tuple[Excluded, ...]]:
    """A site for each weight of an nn.Linear, with rows that name nothing; and all other matrices with the reason."""
    heads = output_heads(model)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = {id(p): name for name, p in model.named_parameters()}
    sites: dict[str, LinearSite] = {}
    for module in model.modules():
        # Else its weight is computed from others (a parametrization).
        if isinstance(module, nn.Linear) and id(module.weight) in names:
            name = names[id(module.weight)]
            embedded = "also the embedding table" if id(module.weight) in tables else None
            head = HEAD if name in heads or name.endswith("lm_head.weight") else None
            n, k = module.out_features, module.in_features
            layout = Layout((n, k), 1, n, k, transposed=False)
            sites[name] = LinearSite(name, name, layout, (0, n), (Rows(name),), left_out=embedded or head)
    excluded = [
        Excluded(name, "not the weight of an nn.Linear: give a calibration batch to find its products", expected=True)
        for name, p in model.named_parameters()
        if p.dim() >= 2 and name not in sites
    ]
    return tuple(sites.values()), tuple(excluded)
