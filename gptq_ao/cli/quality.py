"""What `quantize` checks of its result, and where one goes that is not good enough."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_ao.errors import CalibrationError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from gptq_ao.cli.request import Request
    from gptq_ao.data.text import Samples
    from gptq_ao.quality.check import QualityCheck
    from gptq_ao.report import Report

__all__ = ["check_limits", "destination", "held_out", "kept_back", "rejected"]


def check_limits(request: "Request") -> None:
    """
    Raises:
        ConfigError: the options contradict each other.
    """
    limited = request.max_kl is not None or request.max_perplexity_ratio is not None
    if request.check is not None and request.check_split is not None:
        raise ConfigError(
            f"--check {request.check} and --check-split {request.check_split} contradict each other: give the text to "
            "check with, or how many sequences of the calibration data to keep for that"
        )
    if limited and request.check is None and request.check_split is None:
        raise ConfigError(
            "--max-kl and --max-perplexity-ratio are about text that is not calibrated on: give --check FILE, or "
            "--check-split NUMBER to keep so many sequences of the calibration data"
        )
    if request.check_split is not None and not request.pack:
        raise ConfigError(
            "--check-split compares predictions of full sequences, and --no-pack makes padded ones: give --check TEXT"
        )
    if request.check_split is not None and request.calibration is None:
        raise ConfigError(
            f"--check-split {request.check_split} keeps a part of the calibration data: give --calibration"
        )


def held_out(request: "Request", tokenizer: Any) -> "QualityCheck | None":
    """With the text of `--check`."""
    if request.check is None:
        return None
    from gptq_ao.data import PRESETS, as_chats, read_documents, spaced, token_chunks

    # Of a preset it is known what is held out.
    split = "test" if request.check.partition("@")[0] in PRESETS else "train"
    documents = read_documents(request.check, split=split, column=request.column)
    chunks = token_chunks(
        tokenizer, as_chats(tokenizer, documents) if request.chat_template else documents, request.seq_len
    )
    used = spaced(chunks, request.check_samples)
    text = f"{len(used)} of {len(chunks)} sequences of {request.seq_len} tokens of {Path(request.check).name}"
    return _check(request, used, text)


def kept_back(request: "Request", drawn: "Samples") -> "tuple[Samples, QualityCheck | None]":
    """Of the sequences that were drawn, those to calibrate with, and a check with the others.

    Raises:
        CalibrationError: none would be left to calibrate with.
    """
    if request.check_split is None:
        return drawn, None
    left = len(drawn) - request.check_split
    if left < 1:
        raise CalibrationError(
            f"--check-split {request.check_split} leaves nothing to calibrate with, as the data has {len(drawn)} "
            f"sequences of {request.seq_len} tokens: keep fewer, give more text, or a smaller --seq-len"
        )
    text = f"{request.check_split} sequences of {request.seq_len} tokens kept from the calibration data ({left} others)"
    return drawn[:left], _check(request, drawn[left:].inputs["input_ids"], text)


def _check(request: "Request", chunks: "Tensor", text: str) -> "QualityCheck":
    from gptq_ao.quality.check import QualityCheck

    return QualityCheck(chunks, request.max_kl, request.max_perplexity_ratio, required=False, text=text)


def rejected(out: Path) -> Path:
    """Where a checkpoint goes that is not good enough to be OUT."""
    place = out.resolve()
    return place.with_name(f"{place.name}.rejected")


def destination(out: Path, report: "Report") -> Path:
    return rejected(out) if report.quality is not None and report.quality.missed else out
