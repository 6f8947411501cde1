"""What helps with a Hugging Face model that torch.export cannot take as it is, or takes as something else.

transformers replaces functions that cannot be traced while it exports models itself; these replacements are borrowed.
Rotary tables that change with the length of a sequence are kept as they are, which is exact up to a length.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from gptq_ao.errors import CaptureError
from gptq_ao.passes.products.operators import DATA_ASSERTIONS, op_name

__all__ = ["check_no_assumption", "own_formulas", "transformers_help"]


@contextlib.contextmanager
def own_formulas(model: nn.Module) -> Iterator[None]:
    """Some modules compute the same by another formula while they are exported: linear attention in a loop over
    positions, for lack of a triangular solve in other export formats. The graph shall do what the model does."""
    # Each model's file has imported these functions under its own name, so they are replaced there.
    files = {sys.modules[type(m).__module__] for m in model.modules() if type(m).__module__ in sys.modules}
    asking: list[Any] = [f for f in files if f.__name__.startswith("transformers.models.") and _EXPORTING in vars(f)]
    saved = [(f, name, vars(f)[name]) for f in asking for name in (_EXPORTING, _COMPILING) if name in vars(f)]
    try:
        for f, name, _ in saved:
            setattr(f, name, lambda: False)
        yield
    finally:
        for f, name, function in saved:
            setattr(f, name, function)


_EXPORTING, _COMPILING = "is_torchdynamo_exporting", "is_torchdynamo_compiling"


@contextlib.contextmanager
def transformers_help(model: nn.Module) -> Iterator[float]:
    """Yields the length of the longest sequence for which the model, so changed, computes the same."""
    tables: list[Any] = [m for m in model.modules() if _changes_with_length(m)]
    saved = [(m, m.rope_type) for m in tables]
    # The whole model is right only as long as each of its tables is.
    longest = min((_longest(m) for m in tables), default=float("inf"))
    with contextlib.ExitStack() as stack:
        if "transformers" in sys.modules:
            # A version without them; modules that are imported for them and warn.
            with contextlib.suppress(ImportError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from transformers.exporters import exporter_dynamo  # noqa: F401 - registers them
                from transformers.exporters.utils import apply_patches

                stack.enter_context(apply_patches("dynamo"))
        try:
            for m in tables:
                # A default table is never recomputed: it stays what it is for short sequences.
                m.rope_type = "default"
            yield longest
        finally:
            for m, kind in saved:
                m.rope_type = kind


def _changes_with_length(m: Any) -> bool:
    kind = getattr(m, "rope_type", None)
    if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
        return False
    # One that a long sequence has extended would shrink again for a short one.
    now, original = m.inv_freq, m.original_inv_freq
    return now.is_meta or original.is_meta or torch.equal(now, original.to(now.device))


def _longest(m: Any) -> float:
    # Beyond the original length, it takes other factors.
    if m.rope_type == "longrope":
        return float(m.config.rope_parameters["original_max_position_embeddings"])
    return float(m.original_max_seq_len)


def check_no_assumption(graph: fx.Graph) -> None:
    """The replacements check at run time what they assume of the data. A Program has no such checks.

    Raises:
        CaptureError: the graph has one.
    """
    found = next((n for n in graph.nodes if op_name(n) in DATA_ASSERTIONS), None)
    if found is not None:
        raise CaptureError(f"transformers can export this model only for data of which {found.args[-1]!r} holds")
