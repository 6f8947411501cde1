"""What to do, as one frozen object. It validates and never infers: what it says is what happens.

`GPTQConfig` is a torchao config, so it is serialized by `torchao.core.config.config_to_dict` and dispatched by
`torchao.quantization.quantize_`. A serialized config carries no calibration data: it then means round-to-nearest,
which is what loaders and adapter merges need.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchao.core.config import AOBaseConfig

from gptq_ao.errors import ConfigError
from gptq_ao.recipe import Recipe

__all__ = [
    "ACT_ORDERS",
    "BITS",
    "COMPENSATIONS",
    "EFFORTS",
    "METHODS",
    "PRESETS",
    "UNCHANGED",
    "GPTQConfig",
    "gptq_config",
]

BITS = (2, 3, 4, 8)
UNCHANGED = 16  # a candidate of automatic precision: the weight stays as it is
ACT_ORDERS = ("group_aware", "static", "none", "group")
COMPENSATIONS = ("none", "inputs", "residual")
METHODS = ("gptq", "rtn")
# What each is worth was measured, see docs/accuracy.md.
EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {
        "act_order": "group_aware",
        "signed_scale": True,
        "scale_candidates": 20,
        "refine_sweeps": 0,
        "compensate": "none",
    },
    "default": {
        "act_order": "group_aware",
        "signed_scale": True,
        "scale_candidates": 40,
        "refine_sweeps": 4,
        "compensate": "residual",
    },
    "max": {
        "act_order": "group_aware",
        "signed_scale": True,
        "scale_candidates": 80,
        "refine_sweeps": 16,
        "compensate": "residual",
    },
}
# "act" stands for the classic activation order, in which the activation is permuted at run time.
PRESETS: dict[str, dict[str, Any]] = {
    "4bit-128": {"bits": 4, "group_size": 128},
    "4bit-32-act": {"bits": 4, "group_size": 32, "act_order": "group"},
    "3bit-128-act": {"bits": 3, "group_size": 128, "act_order": "group"},
}
# What a rule may set: the settings that decide how one weight is solved.
OVERRIDABLE = tuple(f.name for f in dataclasses.fields(Recipe))

Override = dict[str, Any] | None
Calibration = Iterable[Any] | Callable[[], Iterable[Any]] | None


@dataclass(frozen=True)
class GPTQConfig(AOBaseConfig):
    """How to quantize. Build it with `gptq_config`, which documents every field."""

    bits: int = 4
    group_size: int | None = None
    sym: bool = True
    act_order: str = EFFORTS["default"]["act_order"]
    damp_percent: float | None = None
    method: str = "gptq"
    signed_scale: bool = EFFORTS["default"]["signed_scale"]
    scale_candidates: int = EFFORTS["default"]["scale_candidates"]
    refine_sweeps: int = EFFORTS["default"]["refine_sweeps"]
    compensate: str = EFFORTS["default"]["compensate"]
    target_bits: float | None = None
    candidates: list[int] = field(default_factory=lambda: [*BITS, UNCHANGED])  # torchao serializes no tuple
    rules: dict[str, Override] = field(default_factory=dict)
    strict: bool = False
    expert_min_rows: int = 128
    calibrate_all_experts: bool = False
    strict_capture: bool = False
    adapter_rank: int = 0
    adapter_rounds: int = 2
    # torchao serializes no field that starts with an underscore: data never ends up in a checkpoint.
    _calibration: Calibration = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        _one_of("bits", self.bits, BITS)
        _one_of("act_order", self.act_order, ACT_ORDERS)
        _one_of("method", self.method, METHODS)
        # `type(…) is`, here and below: True is an int for isinstance.
        size = self.group_size
        if size is not None and (type(size) is not int or (size < 2 and size != -1)):
            raise ConfigError(
                f"group_size is {size!r}: give a number of input features that share a scale, "
                "such as 32, 64 or 128, -1 for one scale per output row, or None to choose by the width of each weight"
            )
        if type(self.expert_min_rows) is not int or self.expert_min_rows < 0:
            raise ConfigError(
                f"expert_min_rows is {self.expert_min_rows!r}: give a number of activation rows, 0 or more"
            )
        _one_of("compensate", self.compensate, COMPENSATIONS)
        for name, least, meaning in (
            ("scale_candidates", 1, "scales to try per group, 1 or more"),
            ("refine_sweeps", 0, "sweeps, 0 or more"),
            ("adapter_rank", 0, "columns of B and rows of A in an adapter, 0 (none) or more"),
            ("adapter_rounds", 1, "rounds, 1 or more"),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} is {value!r}: give a number of {meaning}")
        for flag in ("sym", "signed_scale", "strict", "calibrate_all_experts", "strict_capture"):
            _one_of(flag, getattr(self, flag), (True, False))
        damp = self.damp_percent
        if damp is not None and (type(damp) not in (int, float) or not 0 < damp <= 10):
            raise ConfigError(
                f"damp_percent is {self.damp_percent!r}: give a fraction of the Hessian's mean diagonal, such as 0.01, "
                "or None to derive it from the amount of calibration data"
            )
        if self.adapter_rank and self.method != "gptq":
            raise ConfigError(
                f'adapter_rank={self.adapter_rank} needs method="gptq", not {self.method!r}: an adapter is solved in '
                "the metric of a Hessian. A rule that sets another method has to set adapter_rank to 0, too"
            )
        self._check_target()
        if not isinstance(self.rules, dict):
            raise ConfigError(f"rules must be a dict {{pattern: override or None}}, got {type(self.rules).__name__}")
        for pattern, override in self.rules.items():
            if not isinstance(pattern, str) or not (override is None or isinstance(override, dict)):
                raise ConfigError(f"rule {pattern!r}: {override!r} is not a pattern and a dict of settings or None")
            _check_rule(self, pattern, override)

    def _check_target(self) -> None:
        allowed = (*BITS, UNCHANGED)
        # The class is frozen. Sorted, so that the first is the smallest and the last the largest.
        object.__setattr__(self, "candidates", _ascending(self.candidates, allowed))
        target, low, high = self.target_bits, self.candidates[0], self.candidates[-1]
        if target is None:
            return
        if type(target) not in (int, float) or not low <= target <= high:
            raise ConfigError(
                f"target_bits is {target!r}: give a number between the smallest and the largest of candidates, "
                f"{low} and {high}"
            )
        # 4 is the default: whether it was given cannot be told, any other value was.
        if self.bits != 4:
            raise ConfigError(
                f"bits={self.bits} and target_bits={target} contradict each other: target_bits chooses the bits of "
                "each weight. Give one of them; a rule may fix the bits of single weights"
            )
        if self.method != "gptq":
            raise ConfigError(
                f'target_bits needs method="gptq", not {self.method!r}: it chooses by the error of GPTQ. A rule that '
                "sets another method has to set bits too"
            )

    @property
    def calibration(self) -> Calibration:
        return self._calibration

    def check_no_adapter(self, where: str) -> None:
        """
        Args:
            where: what has no use for an adapter.

        Raises:
            ConfigError: a weight is to get one.
        """
        if self.adapter_rank or any(override.get("adapter_rank") for override in self.rules.values() if override):
            raise ConfigError(
                f"adapter_rank makes weights that need the adapter of the report, and {where} would lose it: call "
                "gptq_ao.quantize_(model, config) with calibration data, which returns the report, or leave "
                "adapter_rank out"
            )

    @property
    def recipe(self) -> Recipe:
        """The settings that decide a weight's solution; its group size has been chosen by then."""
        assert self.group_size is not None
        return Recipe(**{name: getattr(self, name) for name in OVERRIDABLE})

    def with_calibration(self, calibration: Calibration) -> "GPTQConfig":
        return dataclasses.replace(self, _calibration=calibration)

    def rule_for(self, weight: str) -> str | None:
        """The first rule whose pattern matches the parameter name `weight` or the name of its module."""
        # A rule may name the module that has the weight, which is what users see in a printed model.
        module = weight.rpartition(".")[0]
        return next((p for p in self.rules if _matches(p, weight) or _matches(p, module)), None)

    def for_weight(self, weight: str) -> "GPTQConfig | None":
        """The settings of one parameter, or None where a rule leaves it alone."""
        rule = self.rule_for(weight)
        if rule is None:
            return self
        override = self.rules[rule]
        return None if override is None else _overridden(self, override)


def gptq_config(
    bits: int = 4,
    group_size: int | None = None,
    *,
    sym: bool = True,
    effort: str = "default",
    act_order: str | None = None,
    damp_percent: float | None = None,
    method: str = "gptq",
    signed_scale: bool | None = None,
    scale_candidates: int | None = None,
    refine_sweeps: int | None = None,
    compensate: str | None = None,
    adapter_rank: int = 0,
    adapter_rounds: int = 2,
    target_bits: float | None = None,
    candidates: Iterable[int] = (*BITS, UNCHANGED),
    calibration: Calibration = None,
    rules: Mapping[str, Mapping[str, Any] | None] | None = None,
    strict: bool = False,
    expert_min_rows: int = 128,
    calibrate_all_experts: bool = False,
    strict_capture: bool = False,
    preset: str | None = None,
    desc_act: bool | None = None,
) -> GPTQConfig:
    """Describe a quantization.

    Args:
        bits: width of a code: 2, 3, 4 or 8.
        group_size: input features that share one scale and zero point; it must divide `in_features`.
            -1: one scale per output row. None: for each weight the largest of 128, 64, 32 and 16 that divides its
            `in_features`, and those of all weights that engines fuse with it; -1 if none does. The report says which
            weights did not get 128.
        sym: symmetric grid, codes centred on `2**(bits-1)`; otherwise each group has its own zero point.
        effort: `"fast"`, `"default"` or `"max"`: a recipe for the five settings that follow, each of which may still be
            given. All recipes lead to the same format, at the same speed in use; they differ in the time and memory
            that quantizing takes. See docs/accuracy.md.
        act_order: the order in which GPTQ rounds the columns, by decreasing Hessian diagonal. `"group_aware"`: within
            each group, and the groups by their largest. `"static"`: over all columns, with scales chosen before from
            the smallest and largest weight. `"none"`: from left to right. In all of these groups are runs of
            neighbouring columns, so nothing is paid at run time. `"group"`: the classic `desc_act`, where groups follow
            the order over all columns and the activation is permuted at run time.
        signed_scale: symmetric grids have one more code below zero than above; a scale may be negative, so that it
            serves the larger side.
        scale_candidates: how many widths of the grid are tried per group; 1: that of the smallest and largest weight.
            Not for `act_order="static"`.
        refine_sweeps: how often all scales and codes are improved, one after the other, once they are chosen.
        compensate: what a layer's weights make up for beside their own rounding. `"inputs"`: that its inputs are those
            of an already quantized model. `"residual"`: also that the sum to which its output is added is. `"none"`.
            It takes a second forward, of the original model, and memory for its activations.
        adapter_rank: with each weight, solve an adapter B·A of this rank (LoRA's), which corrects what rounding it did;
            0: none. The weights are made for it: without the adapter, which `report.adapter` has, they are worse than
            they would be. `gptq_ao.training` puts it into a model or a directory. A rank larger than a weight's sides
            is an error; a rule may give weights another one, or 0. Stacked experts get one each. What PEFT puts no
            adapter on (weights of several modules, convolutions) gets none, and the report says so.
        adapter_rounds: how often the codes are solved for what the adapter leaves, and then the adapter for what the
            codes leave, which it begins with; 1: the adapter, once the codes are final.
        damp_percent: added to the Hessian's diagonal, as a fraction of its mean. None: `in_features / rows` of
            calibration data, at least 0.01 and at most 1.
        method: `"gptq"`, or `"rtn"` (round to nearest, no Hessian) as a baseline.
        target_bits: stored bits per weight, codes, scales and zero points, to be reached as nearly as possible from
            below, in place of `bits`: each weight gets one of `candidates`, so that the model's outputs change least
            (automatic precision, see `pipeline/precision.py`). Weights that engines fuse get the same, and a weight
            that a rule gives bits, or leaves as it is, does not count. It needs a model that can be captured as one
            graph, in the memory of the device that computes, with room for a backward of one batch.
        candidates: two or more of 2, 3, 4, 8 and 16, which leaves the weight as it is.
        calibration: batches of the model's own inputs: a list or other iterable, a DataLoader, or a callable that
            returns one. A batch is a tensor, a tuple (positional arguments) or a dict (keyword arguments); a dict whose
            `input_ids` have one dimension is a row of a tokenized data set, and a batch of one. Read once, never
            changed, never serialized.
        rules: ordered `{pattern: override}`. A pattern is a parameter or module name, or `re:` and a regular
            expression that must match all of it; the first that matches wins. An override is a dict of `bits`,
            `group_size`, `sym`, `damp_percent`, `method` or one of those that `effort` sets; None leaves the weight as
            it is. A rule that matches nothing is an error. A rule also includes what is left out by default (an output
            head, a router).
        strict: fail where a weight would otherwise be rounded to nearest or left out for a reason other than a rule
            or a default, instead of listing it in the report.
        expert_min_rows: an expert (of a stacked weight) that fewer activation rows reach is solved with the Hessian of
            all experts' rows, and listed as a fallback.
        calibrate_all_experts: let every token reach every expert, for the Hessians only; what the model computes stays
            as it is. It costs as many passes through the experts as the number of experts over those per token.
        strict_capture: fail where torch.export cannot capture the model, instead of replaying its own forwards,
            which takes more memory; the report says which was done.
        preset: `"4bit-128"`, `"4bit-32-act"` or `"3bit-128-act"`, in place of `bits`, `group_size` and `act_order`.
        desc_act: Hugging Face's spelling: True is `act_order="group"`, False is `act_order="none"`.

    Raises:
        ConfigError: a value is not one of those above, or two of them contradict each other.
    """
    _one_of("effort", effort, tuple(EFFORTS))
    # What a preset sets; compared below with the defaults, to notice what was given beside it.
    values: dict[str, Any] = {"bits": bits, "group_size": group_size, "act_order": act_order}
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ConfigError(f"preset is {preset!r}: give one of {', '.join(map(repr, PRESETS))}")
        defaults = {"bits": 4, "group_size": None, "act_order": None}
        if values != defaults or desc_act is not None or target_bits is not None:
            raise ConfigError(
                f"preset {preset!r} already sets bits, group_size and act_order: give it or them, not both"
            )
        values = {**defaults, **PRESETS[preset]}
    if desc_act is not None:
        _one_of("desc_act", desc_act, (True, False))
        if act_order is not None:
            raise ConfigError(f"desc_act={desc_act} and act_order={act_order!r} name the same setting: give one")
        values["act_order"] = "group" if desc_act else "none"
    if rules is not None and not isinstance(rules, Mapping):
        raise ConfigError(f"rules must be a dict {{pattern: override or None}}, got {type(rules).__name__}")
    recipe = {
        "signed_scale": signed_scale,
        "scale_candidates": scale_candidates,
        "refine_sweeps": refine_sweeps,
        "compensate": compensate,
    }
    # None is "not given": then the recipe of `effort` decides.
    given = {name: value for name, value in {**values, **recipe}.items() if value is not None}
    return GPTQConfig(
        **{**EFFORTS[effort], **given},
        sym=sym,
        adapter_rank=adapter_rank,
        adapter_rounds=adapter_rounds,
        damp_percent=damp_percent,
        method=method,
        target_bits=target_bits,
        candidates=candidates,  # type: ignore[arg-type]  # checked and made a list there
        rules={p: dict(o) if isinstance(o, Mapping) else o for p, o in (rules or {}).items()},
        strict=strict,
        expert_min_rows=expert_min_rows,
        calibrate_all_experts=calibrate_all_experts,
        strict_capture=strict_capture,
        _calibration=calibration,
    )


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    # The type too: True equals 1, and 4.0 equals 4.
    if type(value) not in {type(a) for a in allowed} or value not in allowed:
        raise ConfigError(f"{name} is {value!r}: give one of {', '.join(map(repr, allowed))}")


def _ascending(candidates: Any, allowed: tuple[int, ...]) -> list[int]:
    values = tuple(candidates) if isinstance(candidates, Iterable) and not isinstance(candidates, str) else ()
    right = all(type(b) is int and b in allowed for b in values)
    if not right or len(values) < 2 or len(set(values)) < len(values):
        raise ConfigError(
            f"candidates is {candidates!r}: give two or more of {', '.join(map(repr, allowed))}, each once; "
            f"{UNCHANGED} leaves a weight as it is"
        )
    return sorted(values)


def _overridden(config: GPTQConfig, override: dict[str, Any]) -> GPTQConfig:
    """Bits given by a rule are not up to automatic precision."""
    # Otherwise the two would contradict each other in `_check_target`.
    fixed = {"target_bits": None} if "bits" in override else {}
    return dataclasses.replace(config, **{**fixed, **override})


def _check_rule(config: GPTQConfig, pattern: str, override: Override) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as e:
            raise ConfigError(f"rule {pattern!r} is not a regular expression: {e}") from e
    if override is None:
        return
    unknown = [k for k in override if k not in OVERRIDABLE]
    if unknown:
        raise ConfigError(f"rule {pattern!r} sets {unknown[0]!r}: a rule may set {', '.join(OVERRIDABLE)}, or be None")
    try:
        # Builds the result only to have it checked. Without the rules, which would be checked again, without end.
        _overridden(dataclasses.replace(config, rules={}), override)
    except ConfigError as e:
        raise ConfigError(f"rule {pattern!r}: {e}") from e


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern[3:], name) is not None if pattern.startswith("re:") else pattern == name
