"""The examples of training, run with the codebases they are for: `make trainers`, since these are no dependencies.

python -m tests.integrations.trainers PYTHON    PYTHON: of an environment with those codebases and this package
"""

import re
import subprocess
import sys
from pathlib import Path

__all__ = ["OPTIONAL", "train"]

FOLDER = Path(__file__).parents[2] / "examples" / "training"
# Those that need packages beside what the tests have.
OPTIONAL = ("trl_sft", "fabric", "torchtitan_lora")


def train(example: str, python: str = sys.executable, launcher: tuple[str, ...] = ()) -> str:
    """Run an example; returns its last line, "loss A -> B", where B is clearly less."""
    command = [python, "-W", "ignore", *launcher, str(FOLDER / f"{example}.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER.parents[1])
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    losses = re.fullmatch(r"loss (\S+) -> (\S+)", line)
    assert losses is not None, done.stdout
    first, last = map(float, losses.groups())
    assert last < 0.9 * first, line
    return line


if __name__ == "__main__":
    for name in OPTIONAL:
        print(name, train(name, sys.argv[1]), flush=True)
