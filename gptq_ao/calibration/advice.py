"""What is visibly wrong with calibration data, a line each with its number. None of it keeps anything from running."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_ao.calibration.batches import Batch
from gptq_ao.report import WeightReport

__all__ = ["advice_on_rows", "advice_on_text"]

ROWS_PER_INPUT = 2  # a Hessian of fewer rows is mostly chance
_RUN = 16  # tokens; longer than what texts of a kind have in common
_LEAST_DISTINCT_RUNS = 0.5
_SHORT, _SHARE_OF_CONTEXT = 512, 4
_LEAST_OF_VOCABULARY = 0.01


def advice_on_rows(weights: Sequence[WeightReport], in_features: Mapping[str, int]) -> tuple[str, ...]:
    """Weights whose Hessians are of few rows, of each expert on average; those that fell back are said elsewhere."""
    few = {
        w.name: (w.rows // max(1, len(w.expert_rows)), in_features[w.name])
        for w in weights
        if w.method == "gptq" and w.fallback is None
    }
    few = {name: (rows, k) for name, (rows, k) in few.items() if rows < ROWS_PER_INPUT * k}
    if not few:
        return ()
    name, (rows, k) = min(few.items(), key=lambda item: item[1][0] / item[1][1])
    least = f"fewer than {ROWS_PER_INPUT} rows for each input feature"
    return (
        f"calibration data: {len(few)} of {len(weights)} weights saw {least} (fewest: {name}, {rows} rows for {k} "
        "features): give more sequences, or longer ones",
    )


def advice_on_text(batches: Sequence[Batch], config: Any) -> tuple[str, ...]:
    """Of batches of token ids.

    Args:
        config: of a Hugging Face model; of any other, or without, only what can be known is said.
    """
    rows = [ids for batch in batches for ids in _token_ids(batch)]
    if not rows:
        return ()
    found = (_repeated(rows), _short(rows, config), _few_words(rows, config))
    return tuple(f"calibration data: {line}" for line in found if line is not None)


def _token_ids(batch: Batch) -> list[Tensor]:
    """[n, L] each; without what is padding, of each row its own."""
    ids = batch.kwargs.get("input_ids", batch.args[0] if batch.args else None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.is_meta:
        return []
    ids, mask = ids.detach().cpu().to(torch.int64), batch.kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return [ids]
    return [row[kept].unsqueeze(0) for row, kept in zip(ids, mask.cpu() != 0, strict=True) if kept.any()]


def _repeated(rows: list[Tensor]) -> str | None:
    """Runs of tokens are compared by a hash of 64 bits, so that it takes 8 bytes for each."""
    weights = torch.randint(-(2**62), 2**62, (_RUN,), generator=torch.Generator().manual_seed(0)) | 1
    hashes = [(ids.unfold(1, _RUN, 1) * weights).sum(-1).flatten() for ids in rows if ids.shape[1] >= _RUN]
    runs = torch.cat(hashes) if hashes else torch.empty(0)
    distinct = len(runs.unique())
    if distinct >= _LEAST_DISTINCT_RUNS * len(runs):
        return None
    return (
        f"{distinct / len(runs):.0%} of its runs of {_RUN} tokens are distinct, the others are repetitions: give more "
        "documents, each once"
    )


def _short(rows: list[Tensor], config: Any) -> str | None:
    longest, context = max(ids.shape[1] for ids in rows), getattr(config, "max_position_embeddings", None)
    if type(context) is not int or longest >= min(_SHORT, context // _SHARE_OF_CONTEXT):
        return None
    return f"its sequences have {longest} tokens at most, and the model is for {context}: give longer ones (--seq-len)"


def _few_words(rows: list[Tensor], config: Any) -> str | None:
    size, used = getattr(config, "vocab_size", None), len(torch.cat([ids.flatten() for ids in rows]).unique())
    if type(size) is not int or used >= _LEAST_OF_VOCABULARY * size:
        return None
    return f"{used} of the {size} tokens of the vocabulary occur in it: give more and more varied text"
