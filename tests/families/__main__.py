"""Which models the pass works on.

python -m tests.families                       all of them, and docs/supported-models.md
python -m tests.families LlamaConfig unet      only these; also any transformers config class by name
"""

import argparse
import dataclasses
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

from .causal_lm import causal_lm_entries, causal_lm_of
from .encoders import encoder_entries
from .entry import Entry, Row
from .isolated import run_isolated
from .page import page
from .plain import plain_entries


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description="Which models the pass works on.")
    parser.add_argument("names", nargs="*", help="entries, or config classes of transformers; none: all, into docs/")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=240, help="seconds per entry")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    entries = [*plain_entries(), *encoder_entries(), *causal_lm_entries()]
    if options.names:
        entries = [e for e in entries if e.name in options.names] + _by_class(options.names, {e.name for e in entries})
    rows: list[Row] = []
    for row in run_isolated(entries, options.jobs, options.timeout):
        rows.append(row)
        print(line(row), flush=True)
    if not options.names:
        place = {e.name: i for i, e in enumerate(entries)}
        rows.sort(key=lambda r: place[r.name])
        (Path(__file__).parents[2] / "docs" / "supported-models.md").write_text(page(rows), encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=1))
    return 0


def _by_class(names: list[str], known: set[str]) -> list[Entry]:
    """Other config classes of transformers, as causal language models."""
    import transformers

    return [Entry(n, "by name", partial(causal_lm_of, getattr(transformers, n))) for n in names if n not in known]


def line(row: Row) -> str:
    """For the terminal."""
    facts = f"{row.quantized}/{row.expected} weights, {row.hessians} Hessians, {row.stages} stages, {row.path}"
    outcome = f"difference {row.difference}, generates {row.generates}, {row.seconds} s"
    missed = "".join(f"\n      missed {n}: {r}" for n, r in row.missed.items())
    return f"{'ok ' if row.good else 'BAD'} {row.name:32} {facts}, {outcome} {row.problem[:300]}{missed}"


if __name__ == "__main__":
    sys.exit(main())
