"""What was asked for: a model, how to quantize it, and with what. Planning and the pipeline carry it along."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.calibration.batches import Batch, read_batches
from gptq_ao.config import GPTQConfig
from gptq_ao.distributed.ranks import ALONE, Ranks
from gptq_ao.journal.journal import Journal
from gptq_ao.model.inspection import check_unquantized, name_filter
from gptq_ao.model.weights import Weights
from gptq_ao.planning.limits import Limits, MaxMemory, read_limits
from gptq_ao.progress import Progress, Steps
from gptq_ao.report import Clock

__all__ = ["FilterFn", "Job", "whole_model"]

FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Job:
    """One call of `quantize_`, `quantize_checkpoint` or `plan`, with its arguments read.

    Attributes:
        batches: calibration data; None for rounding to nearest without data.
        wanted: whether the parameter of a name may be quantized, by the caller's `filter_fn`.
        device: where to compute.
        limits: to memory, as the caller gave them.
        progress: the caller's function, see `progress.py`.
        grids: scales [rows, groups] and zero points that a weight has already, and may keep.
        lenient: see `choose_weights`.
        ranks: the processes that do it together; all have the same weights and batches, and share the work.
        journal: of what is finished, to be written and gone on with; None: there is none.
        source: what tells the weights from others, for the journal; None: their values.
        clock: collects the seconds of each phase.
    """

    weights: Weights
    config: GPTQConfig
    batches: list[Batch] | None
    wanted: Callable[[str], bool]
    device: torch.device
    limits: Limits
    progress: Progress | None = None
    grids: Callable[[str], tuple[Tensor, Tensor] | None] = lambda name: None
    lenient: bool = False
    ranks: Ranks = ALONE
    journal: Journal | None = None
    source: Mapping[str, Any] | None = None
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def of(
        cls,
        weights: Weights,
        config: GPTQConfig,
        filter_fn: FilterFn | None = None,
        device: torch.device | str | None = None,
        max_memory: MaxMemory | None = None,
        progress: Progress | None = None,
        ranks: Ranks = ALONE,
    ) -> "Job":
        """Reads the arguments, the calibration data last: it may take long, and everything else is right by then.

        Raises:
            CalibrationError, ConfigError: one of the arguments is not what it should be.
            NoLinearError: the model has no parameters.
        """
        wanted = _wanted_by(weights.model, filter_fn)
        check_unquantized(weights.model, lambda name: wanted(name) and config.for_weight(name) is not None)
        run_on = torch.device(device) if device is not None else weights.device
        limits = read_limits(max_memory, run_on)
        without_data = config.method == "rtn" and config.calibration is None
        batches = None if without_data else read_batches(config.calibration)
        return cls(weights, config, batches, wanted, run_on, limits, progress, ranks=ranks)

    @property
    def model(self) -> nn.Module:
        return self.weights.model

    def steps(self, of: int, unit: str) -> Steps:
        """One rank tells how far all have come."""
        return Steps(self.progress if self.ranks.first else None, of, unit, quiet=not self.ranks.first)


def whole_model(module: nn.Module, name: str) -> bool:
    """For `torchao.quantization.quantize_(model, gptq_config(...), filter_fn=gptq_ao.whole_model)`: hand over the model
    as a whole, since GPTQ has to see how its layers are connected."""
    return name == ""


def _wanted_by(model: nn.Module, filter_fn: FilterFn | None) -> Callable[[str], bool]:
    """A condition on the names of parameters."""
    if filter_fn is None or filter_fn is whole_model:
        return lambda name: True
    return name_filter(model, filter_fn)
