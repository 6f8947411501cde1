"""A report in a directory: `report.json`, and `report.html`, which is made of it."""

import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from gptq_ao.errors import CheckpointError
from gptq_ao.presentation.page import page
from gptq_ao.presentation.plots import can_plot, plots
from gptq_ao.version import VERSION

__all__ = ["FACTS", "FOLDER", "FORMAT", "PAGE", "framed", "is_report", "read_report", "write_page", "write_report"]

FOLDER, FACTS, PAGE = "report", "report.json", "report.html"
FORMAT = {"format": "gptq_ao report", "format_version": 1}
_MAX_BYTES = 2**28


def write_report(directory: Path, facts: Mapping[str, Any]) -> None:
    """Write both files; `directory` is made if it is missing.

    Raises:
        CheckpointError: a file cannot be written.
    """
    said = _finite({**FORMAT, "gptq_ao": VERSION, **facts})
    _write(directory / FACTS, json.dumps(said, indent=1, allow_nan=False) + "\n")
    write_page(directory, said)


def write_page(directory: Path, facts: Mapping[str, Any]) -> None:
    """Write the page alone. See `write_report`."""
    _write(directory / PAGE, page(facts, plots(facts) if can_plot() else {}))


def framed(facts: Mapping[str, Any]) -> str:
    """The page within another page."""
    whole = page(facts, plots(facts) if can_plot() else {})
    inner = f'srcdoc="{escape(whole)}" sandbox="allow-scripts" title="Quantization report"'
    return f'<iframe {inner} style="border: 0; height: 45rem; width: 100%"></iframe>'


def is_report(directory: Path) -> bool:
    """Whether there is one that this package wrote."""
    try:
        return read_report(directory) is not None
    except CheckpointError:
        return False


def read_report(directory: Path) -> dict[str, Any]:
    """The facts that `write_report` has written.

    Raises:
        CheckpointError: there are none, or they are damaged, or of another version.
    """
    path = directory / FACTS
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {FACTS}: report.save(directory) writes it in Python, and gptq-ao quantize beside the "
            "weights"
        )
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from e
    if not isinstance(facts, dict) or facts.get("format") != FORMAT["format"]:
        raise CheckpointError(f"{path} is not a report of gptq_ao")
    if facts.get("format_version") != FORMAT["format_version"]:
        raise CheckpointError(
            f"{path} has format version {facts.get('format_version')!r}, this gptq_ao reads "
            f"{FORMAT['format_version']}: show it with the gptq_ao that wrote it, {facts.get('gptq_ao')!r}"
        )
    return facts


def _finite(value: Any) -> Any:
    """With null in place of what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half of a pair, which a name may have, is in no encoding.
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as e:
        raise CheckpointError(f"{path} could not be written: {e}") from e
