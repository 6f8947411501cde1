"""One line of the table: what is tried, and what came of it."""

import gc
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.calibration.batches import as_batch
from gptq_ao.errors import CaptureError

from .products import multiplied_parameters
from .segmented import eager_outputs, keep_plan, largest_difference, segmented_outputs

__all__ = ["Entry", "Row", "run"]

# Multiplied by activations, and left as they are on purpose.
_ON_PURPOSE = ("output head", "also the embedding table", "router", "depthwise")


@dataclass(frozen=True)
class Entry:
    """`build` gives a small model and calibration batches for it."""

    name: str
    kind: str
    build: Callable[[], tuple[nn.Module, list[Any]]]


@dataclass(frozen=True)
class Row:
    """What `quantize_` did to one entry.

    Attributes:
        path: how the model was followed, "export" or "replay"; "" if it was not.
        reason: why it is not one graph, for "replay".
        quantized: number of parameters that are quantized now.
        missed: parameters that the model multiplies with activations and that are neither quantized nor left out on
            purpose, each with the reason the pass gives.
        left_out: why parameters are left out on purpose, and how many.
        without_data: quantized, but rounded to nearest since no calibration row reached them.
        difference: between the eager model and the segmented graph, both quantized, over all outputs and batches;
            0.0 is bit-equality. None: there is no graph.
        generates: whether `generate` with a cache works afterwards; None: it did not before either.
        problem: the first exception, or "".
    """

    name: str
    kind: str
    path: str = ""
    reason: str = ""
    quantized: int = 0
    missed: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    without_data: int = 0
    stages: int = 0
    hessians: int = 0
    difference: float | None = None
    generates: bool | None = None
    problem: str = ""
    seconds: float = 0.0

    @property
    def expected(self) -> int:
        return self.quantized + len(self.missed)

    @property
    def good(self) -> bool:
        exact = self.difference == 0.0 or self.path == "replay"
        return exact and not self.missed and self.generates is not False and not self.problem


def run(entry: Entry) -> Row:
    """Never raises: an exception becomes the row's problem."""
    start = time.perf_counter()
    facts: dict[str, Any] = {"name": entry.name, "kind": entry.kind}
    try:
        _try(entry, facts)
    except CaptureError as e:
        facts["problem"] = f"not captured: {e}"
    except Exception as e:
        where = "" if facts.get("built") else "not built: "
        facts["problem"] = f"{where}{type(e).__name__}: {str(e).strip() or repr(e)}"
    facts.pop("built", None)
    gc.collect()
    return Row(**facts, seconds=round(time.perf_counter() - start, 1))


def _try(entry: Entry, facts: dict[str, Any]) -> None:
    model, batches = entry.build()
    multiplied = set().union(*(multiplied_parameters(model, b) for b in batches))
    facts["built"] = True
    generative = getattr(model, "can_generate", lambda: False)() and _generates(model, batches[0])
    with keep_plan() as kept:
        report = quantize_(model, gptq_config(4, -1, calibration=batches))
    assert report is not None
    done = {w.name for w in report.weights}
    reasons = dict(report.excluded)
    facts["path"], facts["reason"] = report.capture, report.capture_reason or ""
    facts["stages"], facts["hessians"] = report.stages, report.hessians
    facts["quantized"], facts["without_data"] = len(done), len(report.fallbacks)
    on_purpose: tuple[str, ...] = _ON_PURPOSE
    for program, plan in kept:
        facts["difference"] = max(
            largest_difference(eager_outputs(model, b), segmented_outputs(model, program, plan, b)) for b in batches
        )
        if facts["difference"] == 0:
            # A product whose result nobody uses is not in the graph; that the outputs are the same proves it.
            on_purpose = (*_ON_PURPOSE, "not used by the captured forward")
    left = {n: r for n, r in reasons.items() if n in multiplied and r.startswith(on_purpose)}
    facts["left_out"] = dict(Counter(r.partition(":")[0] for r in left.values()))
    facts["missed"] = {n: reasons.get(n, "not listed") for n in sorted(multiplied - done - set(left))}
    if generative:
        facts["generates"] = False
        _generate(model, batches[0])
        facts["generates"] = True


def _generates(model: Any, batch: Any) -> bool:
    try:
        _generate(model, batch)
    except Exception:  # whatever transformers raises
        return False
    return True


def _generate(model: Any, batch: Any) -> None:
    """Four tokens with a cache, after the batch as the prompt."""
    given = dict(as_batch(batch).kwargs)
    given.pop("decoder_input_ids", None)
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape[-1] >= 4, f"generate returned {tuple(out.shape)}"
