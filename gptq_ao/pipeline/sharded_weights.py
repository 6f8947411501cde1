"""The weights of a model that FSDP2 or tensor parallelism has spread over processes: gathered one by one, when a
segment needs them, and cut again when they are quantized."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.codes.tiles import pack_codes, pack_scale_zero
from gptq_ao.config import UNCHANGED, GPTQConfig
from gptq_ao.errors import ConfigError
from gptq_ao.model.inspection import check_values
from gptq_ao.model.parts import Cut, FsdpParameters, cuts_of, in_parts, is_in_parts, local_part, whole_value
from gptq_ao.model.weights import replace_parameter
from gptq_ao.passes.records import Layout, Selection
from gptq_ao.pipeline.restorable import RestorableWeights
from gptq_ao.planning.job import Job
from gptq_ao.recipe import Recipe
from gptq_ao.report import names_of
from gptq_ao.tensor import GroupTensor, tensor_class
from gptq_ao.tensor.sharding import why_uncut

__all__ = ["ShardedWeights"]


class ShardedWeights(RestorableWeights):
    """The weights of a job's model, of which this process has parts. What `get` returns all have to ask for, in the
    same order."""

    def __init__(self, job: Job, managed: FsdpParameters) -> None:
        super().__init__(job)
        self._ranks, self._managed = job.ranks, managed

    def home(self, name: str, *, quantized: bool = False) -> torch.device:
        """See `Weights`. A part counts as elsewhere: the whole weight is there while it runs, no longer."""
        return torch.device("cpu") if self._in_parts(name) else super().home(name, quantized=quantized)

    def check(self, names: Iterable[str], result_bytes: Callable[[], int]) -> None:
        """They have values, and each process finds its own to be finite."""
        check_values((name, local_part(self._value(name)).detach()) for name in names)

    def check_cuts(self, selection: Selection) -> None:
        """
        Raises:
            ConfigError: some weights would not stay packed in the parts that they are in now.
        """
        layouts = selection.layouts
        found = {n: self._why_uncut(n, layouts[n], c) for n, c in selection.settings.items() if self._in_parts(n)}
        uncut = {name: why for name, why in found.items() if why is not None}
        if uncut:
            name, why = next(iter(uncut.items()))
            raise ConfigError(
                f"{name!r} cannot stay packed in the parts that processes have of it: {why}. Of {len(uncut)} weights "
                f"({names_of(list(uncut))}), leave each out, by a rule name: None, or keep it whole on each rank: "
                "fully_shard(…, ignored_params=…), or no parallel style for its layer"
            )

    def get(self, name: str, device: torch.device | None = None) -> Tensor:
        """See `Weights`."""
        value = self._value(name)
        if not is_in_parts(value):
            return super().get(name, device)
        self._ranks.tell()
        return whole_value(value).to(device or value.device)

    def replace(self, name: str, new: Tensor) -> None:
        """See `Weights`."""
        old = self._value(name)
        if not is_in_parts(old):
            super().replace(name, new)
            return
        self._keep(name)
        part = in_parts(new, old)
        if self._managed.dim(self.model, name) is not None:
            self._managed.replace(self.model, name, nn.Parameter(part, requires_grad=False), keep=self._possible)
        else:
            replace_parameter(self.model, name, part)

    def make_dense(self) -> None:
        """See `RestorableWeights`.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "the model cannot be captured as one graph, and without one it would have to run as it is, sharded over "
            "processes: quantize it before it is sharded"
        )

    def _restore(self) -> None:
        super()._restore()
        self._managed.restore()

    def _value(self, name: str) -> Any:
        prefix, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(prefix), leaf)

    def _in_parts(self, name: str) -> bool:
        return is_in_parts(self._value(name))

    def _why_uncut(self, name: str, layout: Layout, config: GPTQConfig) -> str | None:
        value, along = self._value(name), self._managed.dim(self.model, name)
        if layout.transposed and (along is not None or not layout.stacked):
            return "it is stored as [in_features, out_features], and such codes are not gathered from parts"
        if along:
            return f"FSDP2 gathers codes along dimension 0, and has cut it along dimension {along}"
        widths = [config.bits] if config.target_bits is None else [b for b in config.candidates if b != UNCHANGED]
        recipes = (dataclasses.replace(config.recipe, bits=bits) for bits in widths)
        found = (_why_uncut(_form(layout, recipe, value.dtype), cuts_of(value)) for recipe in recipes)
        return next((why for why in found if why is not None), None)


def _why_uncut(weight: Tensor, cuts: tuple[Cut, ...]) -> str | None:
    for cut in cuts:
        why = why_uncut(weight, cut.dim, cut.parts * cut.groups)
        if why is not None:
            return why
        weight = cut.of(weight)
    return None


def _form(layout: Layout, recipe: Recipe, dtype: torch.dtype) -> GroupTensor:
    """What the weight will be, without values."""
    spec = layout.packed(recipe)
    *_, n, k = spec.shape
    with torch.device("meta"):
        qdata, high_plane = pack_codes(torch.empty(spec.shape, dtype=torch.uint8), spec.bits)
        scale_zero = pack_scale_zero(
            torch.empty(spec.grid_shape, dtype=torch.float16), torch.empty(spec.grid_shape, dtype=torch.uint8)
        )
        perm = torch.empty(k, dtype=torch.int32) if spec.permuted else None
    return tensor_class(spec.bits)(
        qdata, scale_zero, spec.group_size, n, k, layout.transposed, dtype, layout.view_shape, high_plane, perm
    )
