"""Why torch.export failed, where in the model's code, and what to change there."""

import linecache
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["explain"]

# (pattern, what happened, what to do): the first whose pattern is in the code or in torch's text.
_REASONS: Sequence[tuple[str, str, str]] = (
    (
        r"get_rope_index",
        "it computes the positions of image tokens by looping over the token ids",
        "put position_ids into every batch, computed with the model's own get_rope_index",
    ),
    (
        r"frequency_update",
        "its rotary table changes with the length of a sequence",
        "give batches whose sequences are no longer than those the model was first trained on",
    ),
    (
        r"flash_attn|flash_attention",
        "flash attention is a kernel that cannot be captured",
        "load the model with attn_implementation='sdpa'",
    ),
    (
        r"nonzero|torch\.where\([^,]*\)|masked_select|\bunique",
        "it loops over, or sizes a tensor by, the elements that the data selects",
        "compute for all elements and choose with torch.where(condition, a, b); for experts, use one product for all "
        "of them (transformers: experts_implementation='grouped_mm')",
    ),
    (
        r"GuardOnDataDependent|[Dd]ata-dependent|PendingUnbackedSymbol|data-dependent|\.item\(\)|\.tolist\(\)",
        "it branches on, or sizes a tensor by, the values of a tensor",
        "compute both sides and choose with torch.where(condition, a, b), or take sizes from shapes",
    ),
    (
        r"data_ptr|data pointer|\.numpy\(\)|from_numpy",
        "it hands a tensor to code outside torch (NumPy, a C++ extension, a kernel)",
        "wrap that code with torch.library.custom_op and give it a register_fake",
    ),
    (
        r"register_fake|fake impl|DynamicOutputShape|meta kernel|UnsupportedOperator|Could not run",
        "an operator has no implementation for tensors without data",
        "give it one with torch.library.register_fake",
    ),
    (
        r"(takes|missing|unexpected|got multiple|required)\b.*\b(argument|keyword)|have to specify|either input_ids",
        "the batch does not fit the model's signature",
        "give every batch the inputs that model.forward takes: a tuple for positional, a dict for keyword inputs",
    ),
    (
        r"[Uu]nsupported input type|only supports pytree|output.*(type|pytree)|generator",
        "an input or output has a type that torch.export does not know",
        "pass tensors, in tuples, lists or dicts, and return them in such or in attributes of objects",
    ),
)


def explain(error: BaseException) -> str:
    """What happened, in which line, what to change there, and torch's own first line."""
    said = _first_line(error)
    frame = _model_frame(error)
    where, code = "", ""
    if frame is not None:
        where = f"\n  at {frame.filename}:{frame.lineno}, in {frame.name}\n    {(frame.line or '').strip()}"
        line, end = (frame.line or "").strip(), frame.lineno or 0
        # What a loop runs over is often made in the lines before it.
        start = max(1, end - 4) if line.startswith("for ") else end
        code = frame.name + "".join(linecache.getline(frame.filename, n) for n in range(start, end + 1))
    text = f"{code}\n{type(error).__name__}: {error}"
    for pattern, reason, advice in _REASONS:
        if re.search(pattern, text):
            return f"torch.export could not capture the model: {reason}.{where}\nWhat to do: {advice}.\nIt said: {said}"
    return (
        f"torch.export could not capture the model.{where}\nFirst check that model(*args, **kwargs) runs "
        f"on a calibration batch.\nIt said: {said}"
    )


def _model_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The deepest frame below the model's forward that is not in torch, or in one of this package's files."""
    outside = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
    frames = traceback.extract_tb(error.__traceback__)
    return next((f for f in reversed(frames) if not f.filename.startswith(outside)), None)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
