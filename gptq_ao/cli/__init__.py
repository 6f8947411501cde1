"""gptq-ao: quantize, evaluate and inspect models from the command line.

Progress and messages go to stderr. With --json, stdout carries exactly one JSON object.

Exit status: 0, done; 1, failed; 2, an option or argument is wrong, or does not fit the model; 3, --strict or a limit of
quality is not met.
"""

import os
import sys
from typing import Annotated

import typer

from gptq_ao.cli.checkpoints import convert, inspect
from gptq_ao.cli.diagnosis import diagnose
from gptq_ao.cli.merge import merge
from gptq_ao.cli.quantization import plan, quantize
from gptq_ao.cli.reports import report
from gptq_ao.cli.score import demo, evaluate
from gptq_ao.errors import ConfigError, GPTQError, QualityError, StrictError
from gptq_ao.integrations.on_import import quiet_import
from gptq_ao.version import VERSION

__all__ = ["app", "main"]

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(quantize)
app.command()(plan)
app.command()(merge)
app.command("eval")(evaluate)
app.command()(diagnose)
app.command()(report)
app.command()(inspect)
app.command()(convert)
app.command()(demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gptq_ao {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Only here for the option: the help is that of `app`."""


def main() -> None:
    """Entry point. What goes wrong is said in a few lines, without a traceback."""
    try:
        with quiet_import():
            app()
    except Exception as e:
        if os.environ.get("GPTQ_AO_TRACEBACK"):
            raise
        from gptq_ao.distributed.ranks import is_told

        # What all ranks know, the first of them says.
        if is_told(e) and os.environ.get("RANK", "0") != "0":
            sys.exit(_status(e))
        # Added on the way with `add_note`: where it happened, and what it means for the model.
        notes = "".join(f"\n{note}" for note in getattr(e, "__notes__", ()))
        if isinstance(e, GPTQError):
            print(f"error: {e}{notes}", file=sys.stderr)
        else:
            unforeseen = "(not foreseen: GPTQ_AO_TRACEBACK=1 gptq-ao … shows where)"
            print(f"error: {type(e).__name__}: {e}{notes}\n{unforeseen}", file=sys.stderr)
        sys.exit(_status(e))


def _status(e: Exception) -> int:
    return 3 if isinstance(e, StrictError | QualityError) else 2 if isinstance(e, ConfigError) else 1
