"""What can be known of a model before it is captured, and what can be wrong with it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from gptq_ao.errors import ConfigError, NoLinearError, NonFiniteError
from gptq_ao.passes.records import Excluded, Layout, LinearSite, Rows

__all__ = ["check_unquantized", "check_values", "linear_modules", "name_filter", "output_heads"]


def check_unquantized(model: nn.Module) -> None:
    if next(model.parameters(), None) is None:
        raise NoLinearError(f"the model ({type(model).__name__}) has no parameters: nothing to quantize")
    done = [name for name, p in model.named_parameters() if isinstance(p, TorchAOBaseTensor)]
    if done:
        raise ConfigError(
            f"the model is already quantized: {len(done)} of its parameters, such as {done[0]!r}, are "
            f"{type(model.get_parameter(done[0])).__name__}. Start from the original weights"
        )


def check_values(parameters: Iterable[tuple[str, Tensor]]) -> None:
    for name, parameter in parameters:
        bad = int((~torch.isfinite(parameter)).sum())
        if bad:
            raise NonFiniteError(
                f"{bad} elements of {name!r} {tuple(parameter.shape)} are NaN or infinite: repair the checkpoint first"
            )


def name_filter(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool]) -> Callable[[str], bool]:
    """A condition on modules as one on parameter names. A shared parameter is wanted if one of its modules is."""
    chosen = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        if filter_fn(module, prefix):
            chosen |= {id(p) for p in module._parameters.values() if p is not None}
    return lambda name: id(model.get_parameter(name)) in chosen


def output_heads(model: nn.Module) -> frozenset[str]:
    """The output head of a Hugging Face model, by the model's own word."""
    declared = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(declared, "weight", None)
    return frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if p is weight)


def linear_modules(model: nn.Module) -> tuple[tuple[LinearSite, ...], tuple[Excluded, ...]]:
    """Without data there is no graph: the weights of nn.Linear, in the form in which `find_linears` gives them."""
    heads = output_heads(model)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = {id(p): name for name, p in model.named_parameters()}
    sites: dict[str, LinearSite] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            name = names[id(module.weight)]
            embedded = "also the embedding table" if id(module.weight) in tables else None
            head = "output head" if name in heads or name.endswith("lm_head.weight") else None
            n, k = module.out_features, module.in_features
            layout = Layout((n, k), 1, n, k, transposed=False)
            sites[name] = LinearSite(name, name, layout, (0, n), (Rows(name),), left_out=embedded or head)
    excluded = [
        Excluded(name, "not the weight of an nn.Linear: give a calibration batch to find its products", expected=True)
        for name, p in model.named_parameters()
        if p.dim() >= 2 and name not in sites
    ]
    return tuple(sites.values()), tuple(excluded)
