"""`report`, and how `quantize` and `merge` write theirs."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_ao.cli.options import AsJson, show
from gptq_ao.errors import ConfigError

if TYPE_CHECKING:
    from gptq_ao.report import Report

__all__ = ["report", "save_beside", "show_report"]


def report(
    out: Annotated[Path, typer.Argument(help="What quantize wrote, or a directory with a report.json.")],
    plan: Annotated[
        Path | None, typer.Option(help="What plan --json printed, to be shown beside what was measured.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the page of a report again, from its JSON: with plots, if matplotlib is there by now."""
    from gptq_ao.presentation.files import FOLDER, PAGE, read_report, write_page, write_report

    planned = None if plan is None else _planned(plan)
    directory = out / FOLDER if (out / FOLDER).is_dir() else out
    facts = read_report(directory)
    if planned is None:
        write_page(directory, facts)
    else:
        facts["plan"] = planned
        write_report(directory, facts)
    show({"out": str(directory), **facts}, f"written to {directory / PAGE}", as_json)


def _planned(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"--plan {path} cannot be read: {e}") from e
    if not isinstance(facts, dict) or not all(isinstance(facts.get(n), dict) for n in ("seconds", "peak_bytes")):
        raise ConfigError(f"--plan {path} is not what gptq-ao plan --json prints")
    return facts


def save_beside(weights: Path, report: "Report", model: str, source: Path) -> str | None:
    """Into a directory with weights that has not got its name yet.

    Args:
        model: as it was given.
        source: its directory.

    Returns:
        What is to be said of it, if anything.
    """
    from gptq_ao.presentation.files import FACTS, FOLDER, PAGE

    place = weights / FOLDER
    taken = [name for name in (FACTS, PAGE) if (place / name).exists()]
    if taken:  # it came along with the model, whose it is
        return f"no report was written, as the model has a file {FOLDER}/{taken[0]} of its own: report.save in Python"
    # It may be published: where the model was on this machine is nobody's business.
    name = source.resolve().name if Path(model).is_dir() else Path(model).name if Path(model).is_file() else model
    notes, warnings = ([line.replace(str(source), name) for line in lines] for lines in (report.notes, report.warnings))
    dataclasses.replace(report, notes=tuple(notes), warnings=tuple(warnings)).save(place, model=name)
    return None


def show_report(facts: dict[str, Any], report: "Report", lines: list[str], as_json: bool) -> None:
    """On a terminal in its width, elsewhere in full."""
    if not as_json and sys.stdout.isatty():
        from rich.console import Console

        Console().print(report)
        print("\n".join(lines))
    else:
        show({**facts, **report.to_dict()}, "\n".join([str(report), *lines]), as_json)
