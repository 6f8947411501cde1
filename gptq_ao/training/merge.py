"""Trained adapters, merged into quantized weights: GPTQ anew, for the weights with what was learned.

An adapter cannot be added to codes. Rounding the sum to the nearest codes, as adding it elsewhere does, loses a good
part of what was learned: it is smaller than a step of the grid. GPTQ spreads the error over the columns by calibration
data, which should be like what the adapter was trained on.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.calibration.batches import read_batches
from gptq_ao.checkpoint.origin import origin_of
from gptq_ao.config import GPTQConfig
from gptq_ao.errors import ConfigError
from gptq_ao.model.unwrap import same_forward
from gptq_ao.model.weights import ModelWeights
from gptq_ao.passes.records import Layout
from gptq_ao.pipeline.quantize import quantize_weights
from gptq_ao.pipeline.restorable import RestorableWeights
from gptq_ao.pipeline.run_plan import rewrite
from gptq_ao.pipeline.solve_together import round_matrix
from gptq_ao.planning.job import Job
from gptq_ao.planning.limits import MaxMemory, read_limits
from gptq_ao.progress import Progress
from gptq_ao.report import Report, WeightReport
from gptq_ao.tensor import GroupTensor
from gptq_ao.training.adapters import require_peft
from gptq_ao.training.peft_layers import AdaptedWeight, PlainModel

__all__ = ["merge_and_requantize_"]

KEPT = "no adapter changes it: its codes stay"
UNREACHED = "no product of the captured forward uses it"


def merge_and_requantize_(
    model: nn.Module,
    config: GPTQConfig,
    device: torch.device | str | None = None,
    *,
    max_memory: MaxMemory | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, Report]:
    """Merge the active adapters of a model with quantized weights into them, in place, and quantize these weights anew.

    Each keeps its bits, its group size, its kind of grid, and whether its columns are permuted; a row also keeps its
    scales where new ones are no better. Other quantized weights keep their codes, and dense ones take adapters as they
    are. The weights are dense one stage at a time, if the model can be captured as one graph; otherwise all those with
    adapters are at once, in the dtype of the model.

    Whatever is raised, the model is as it was, with its adapters, with the exception that `quantize_` makes.

    Args:
        model: a `PeftModel`, or a model into which PEFT has put adapters. Adapters of every kind that PEFT can merge
            into dense weights, and `modules_to_save`.
        config: from `gptq_config`, with calibration data like that of the training. Bits, group size, grid and order of
            a weight are its own, unless a rule says otherwise.
        device, max_memory, progress: see `quantize_`.

    Returns:
        The model without layers of PEFT, which is the one inside of `model`; and what was done.

    Raises:
        CalibrationError, CaptureError, NonFiniteError, SolverError, StrictError: as `quantize_`.
        ConfigError: the adapters are not of a kind that can be merged, are merged or disabled, or change no quantized
            weight; a rule is for none of these; PEFT is not installed.
    """
    require_peft()
    plain = PlainModel.of(same_forward(model))
    try:
        return plain.model, _quantize(plain, config, device, max_memory, progress)
    except BaseException:
        plain.undo()
        raise


def _quantize(
    plain: PlainModel,
    config: GPTQConfig,
    device: torch.device | str | None,
    max_memory: MaxMemory | None,
    progress: Progress | None,
) -> Report:
    adapted = dict(plain.adapted)
    if not adapted:
        raise ConfigError(
            "the adapters change no quantized weight: merge them with PEFT (`merge_and_unload`), then call quantize_"
        )
    own = _with_own_settings(config, adapted)
    weights = ModelWeights(plain.model)
    run_on = torch.device(device) if device is not None else weights.device
    limits = read_limits(max_memory, run_on)
    batches = None if own.method == "rtn" and own.calibration is None else read_batches(own.calibration)
    grids = {name: w.weight for name, w in adapted.items() if _keeps_grid(w.weight, own.for_weight(name))}

    def grid_of(name: str) -> tuple[Tensor, Tensor] | None:
        weight = grids.get(name)
        if weight is None:
            return None
        scale, zero_point = (t.flatten(0, -2).to(run_on) for t in (weight.scale, weight.zero_point))
        return scale, zero_point

    job = Job(weights, own, batches, adapted.__contains__, run_on, limits, progress, grid_of, lenient=True)
    merged = _MergedWeights(job, adapted)
    report = quantize_weights(dataclasses.replace(job, weights=merged), origin_of(plain.model))
    missed = [_round(merged, name, own) for name in list(merged.adapted)]
    excluded = {
        name: KEPT if isinstance(merged.get(name), GroupTensor) else reason
        for name, reason in report.excluded.items()
        if name not in adapted
    }
    rules = {"rules": str(config.rules)} if config.rules else {}
    recipe = {k: v for k, v in report.recipe.items() if k != "rules"} | rules
    recipe["recipe"] = "adapters merged, each weight quantized anew with its own bits and groups"
    untied = ("the output head has a weight of its own now, tie_word_embeddings is False",) if plain.untied else ()
    return dataclasses.replace(
        report,
        weights=(*report.weights, *missed),
        excluded=excluded,
        recipe=recipe,
        notes=(*report.notes, *untied),
    )


class _MergedWeights(RestorableWeights):
    """The weights of the plain model. One that adapters change is what they make of it, until it is replaced."""

    def __init__(self, job: Job, adapted: dict[str, AdaptedWeight]) -> None:
        super().__init__(job)
        self.adapted = dict(adapted)

    def get(self, name: str, device: torch.device | None = None) -> Tensor:
        """See `Weights`."""
        if name not in self.adapted:
            return super().get(name, device)
        value = self.adapted[name].merged()
        return value.to(device or value.device, self.model.get_parameter(name).dtype)

    def replace(self, name: str, new: Tensor) -> None:
        """See `Weights`."""
        super().replace(name, new)
        self.adapted.pop(name, None)

    def make_dense(self) -> None:
        """See `RestorableWeights`."""
        for name in list(self.adapted):
            self.replace(name, self.get(name))


def _with_own_settings(config: GPTQConfig, adapted: Mapping[str, AdaptedWeight]) -> GPTQConfig:
    """The config with a rule for each of these weights."""
    if config.target_bits is not None:
        raise ConfigError("target_bits chooses the bits of weights, which have theirs: leave it out, or give rules")
    of_rule = {name: config.rule_for(name) for name in adapted}
    for pattern, override in config.rules.items():
        names = [name for name, rule in of_rule.items() if rule == pattern]
        if not names:
            raise ConfigError(f"rule {pattern!r} is for no quantized weight that an adapter changes")
        if override is None:
            raise ConfigError(
                f"rule {pattern!r} leaves {names[0]!r} out, and then its adapter would be lost: deactivate the adapter "
                "there, or give the weight 8 bits"
            )
    rules: dict[str, Any] = {}
    for name, w in adapted.items():
        rule = of_rule[name]
        rules[name] = {**_own(w.weight, config), **((config.rules[rule] if rule is not None else None) or {})}
    return dataclasses.replace(config, rules=rules)


def _own(weight: GroupTensor, config: GPTQConfig) -> dict[str, Any]:
    """Settings that lead to a weight of the same kind."""
    natural = "group_aware" if config.act_order == "group" else config.act_order
    return {
        "bits": weight.bits,
        "group_size": -1 if weight.group_size == weight.in_features else weight.group_size,
        "sym": weight.symmetric,
        "act_order": natural if weight.perm is None else "group",
    }


def _keeps_grid(weight: GroupTensor, settings: GPTQConfig | None) -> bool:
    """Whether scales and zero points fit what is asked for. Groups of permuted columns are other ones."""
    assert settings is not None
    groups = weight.in_features if settings.group_size == -1 else settings.group_size
    fits = (weight.bits, weight.group_size) == (settings.bits, groups)
    return fits and (weight.symmetric or not settings.sym) and weight.perm is None and not settings.recipe.permutes


def _round(weights: _MergedWeights, name: str, config: GPTQConfig) -> WeightReport:
    """A weight that no batch has reached: to nearest."""
    w, settings = weights.adapted[name].weight, config.for_weight(name)
    assert settings is not None
    stack = math.prod(w.shape) // (w.out_features * w.in_features)
    layout = Layout(tuple(w.shape), stack, w.out_features, w.in_features, w.transposed)
    grid = None
    if _keeps_grid(w, settings):
        grid = (w.scale.flatten(0, -2), w.zero_point.flatten(0, -2))
    solved = round_matrix(name, layout.matrix(weights.get(name)), settings, grid)
    return rewrite(weights, layout, dataclasses.replace(solved, fallback=UNREACHED), settings, stage=0)
