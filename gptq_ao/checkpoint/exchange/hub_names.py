"""A quantized model as a hub checkpoint has it: names and splits of the files, not of the modules.

transformers merges and renames on loading (experts become one 3-D parameter, a prefix comes or goes); to write a
checkpoint that other libraries read, its own conversions are run backwards. They see a quantized weight as one tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from gptq_ao.checkpoint.exchange.engine_names import expert_stack
from gptq_ao.checkpoint.exchange.grouped_weight import GroupedWeight
from gptq_ao.codes.bit_stream import codes_to_words
from gptq_ao.errors import CheckpointError
from gptq_ao.tensor import GroupTensor

__all__ = ["ExportedModel", "export_model", "grouped", "refuse", "revert_conversions"]


@dataclass(frozen=True)
class ExportedModel:
    """What goes into files.

    Attributes:
        tensors: name → tensor, in the order of the files; quantized weights are still one tensor each.
        plain: modules with a matrix that is not quantized, embeddings apart: linear layers, output heads, routers,
            experts.
    """

    tensors: Mapping[str, Tensor]
    plain: tuple[str, ...]

    @property
    def quantized(self) -> dict[str, GroupTensor]:
        """Name → quantized weight."""
        return {name: t for name, t in self.tensors.items() if isinstance(t, GroupTensor)}

    @property
    def modules(self) -> dict[str, GroupTensor]:
        """Module → its quantized weight [out, in], in a model with the names of a hub checkpoint."""
        return {name.removesuffix(".weight"): t for name, t in self.quantized.items()}

    @property
    def group_sizes(self) -> dict[str, int]:
        """Module → group size of its quantized weight; −1: one scale per row. Of experts, which are one product for an
        engine, some may have no more features than others have in a group: that is then no reason to differ."""
        rows = {m: w.group_size == w.in_features for m, w in self.modules.items()}
        finer = {expert_stack(m) for m, row in rows.items() if not row} - {None}
        return {m: -1 if rows[m] and expert_stack(m) not in finer else w.group_size for m, w in self.modules.items()}

    def and_plain(self, names: Iterable[str]) -> "ExportedModel":
        """With more matrices that are not quantized: engines that use them must not look for quantized ones."""
        pairs = [(name, name.rpartition(".")[0]) for name in names]
        more = [module for name, module in pairs if name.endswith(".weight") or expert_stack(name) == module]
        return replace(self, plain=tuple(dict.fromkeys((*self.plain, *more))))


def export_model(model: nn.Module, state: Mapping[str, Tensor]) -> ExportedModel:
    """Take a model apart.

    Args:
        state: parameter or buffer → its value; of tied ones the first name.

    Raises:
        CheckpointError: a quantized weight is not that of a linear layer, so there is no place for it in a format whose
            tensors belong to one.
    """
    # A weight has a place if it is the matrix of a linear layer, or a stack that the conversions split into such ones.
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    stays = {n for n, t in state.items() if n.rpartition(".")[0] in linear and n.endswith(".weight")}
    # A matrix outside of linear layers, or a convolution: there is no module of the format to which it could belong.
    wrong = [
        n
        for n, t in state.items()
        if isinstance(t, GroupTensor) and (t.view_shape is not None or (t.dim() == 2 and n not in stays))
    ]
    parts = revert_conversions(model, state)  # a stack that they do not know comes back whole
    quantized = {n: t for n, t in parts.items() if isinstance(t, GroupTensor)}
    # How many stacks the model has.
    split = sum(isinstance(t, GroupTensor) and t.dim() > 2 for t in state.values())
    # Still a stack, or not called a weight: transformers has no conversion that takes it apart.
    wrong += [n for n, t in quantized.items() if t.dim() > 2 or not n.endswith(".weight")]
    # If the stacks became parts, there are more quantized tensors now than there were matrices before.
    if wrong or (split and len(quantized) <= sum(isinstance(t, GroupTensor) for t in state.values()) - split):
        first = wrong[0] if wrong else next(n for n, t in state.items() if isinstance(t, GroupTensor) and t.dim() > 2)
        raise CheckpointError(
            f"{first!r} is not the weight of a linear layer, nor a stack that transformers stores as such: only the "
            'formats "native" and "dense" have a place for it'
        )
    return ExportedModel(
        {**quantized, **{n: t for n, t in parts.items() if n not in quantized}},
        tuple(dict.fromkeys(_plain(model, state, parts))),
    )


def _plain(model: nn.Module, state: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> Iterator[str]:
    """Modules with a matrix that is not quantized, by their names in `parts`."""
    # Tensors that were only renamed are the same objects, so the new name of each is found by identity.
    name_of = {id(t): n for n, t in parts.items()}
    # With duplicates: an output head that is tied to the embedding counts as a head as well.
    for name, p in model.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        matrix = leaf == "weight" and p.dim() == 2 and not isinstance(p, GroupTensor)
        # What is not there any more was taken apart.
        there = name not in state or id(state[name]) in name_of
        if matrix and there and not isinstance(model.get_submodule(module), nn.Embedding):
            yield name_of.get(id(state.get(name)), name).removesuffix(".weight")
    same = {id(t) for t in state.values()}
    for name, t in parts.items():
        module, _, leaf = name.rpartition(".")
        if isinstance(t, GroupTensor):
            continue
        # A part of what was taken apart (an expert), or a stack that the files have as it is.
        if (leaf == "weight" and t.dim() == 2 and id(t) not in same) or (t.dim() == 3 and expert_stack(name) == module):
            yield module


def revert_conversions(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the names and splits of a hub checkpoint: a stack [E, N, K] becomes E tensors [N, K].

    Raises:
        CheckpointError: transformers cannot undo one of its conversions.
    """
    # Not a model of transformers: there are no conversions.
    if not hasattr(model, "base_model_prefix"):
        return dict(state)
    from transformers.core_model_loading import revert_weight_conversion

    try:
        reverted: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    except (NotImplementedError, ValueError) as e:
        raise CheckpointError(
            f"the parameters of {type(model).__name__} cannot be taken apart as a hub checkpoint has them ({e}): only "
            'the format "native" has a place for them'
        ) from e
    return reverted


def refuse(weights: Mapping[str, GroupTensor], why_not: Callable[[GroupTensor], str | None], format: str) -> None:
    """
    Raises:
        CheckpointError: there is no weight, or one that the format cannot hold, and why.
    """
    if not weights:
        raise CheckpointError(f"the model has no quantized weight, so there is nothing to write as {format!r}")
    reasons = {name: why for name, w in weights.items() if (why := why_not(w)) is not None}
    if reasons:
        name, why = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise CheckpointError(f"{format!r} cannot hold the weight of {name!r}{more}: {why}")


def grouped(weight: GroupTensor) -> GroupedWeight:
    """What a quantized weight [N, K] is made of, on the CPU."""
    # On the CPU, where files are written from.
    codes, scale, zero_point = (t.cpu() for t in (weight.codes(), weight.scale, weight.zero_point))
    perm = None if weight.perm is None else weight.perm.cpu()
    return GroupedWeight(weight.bits, codes_to_words(codes, weight.bits), weight.in_features, scale, zero_point, perm)
