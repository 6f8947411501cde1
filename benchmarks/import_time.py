"""How long `import gptq_ao` takes, and how much of that is torch and torchao. Each run is a process of its own.

    python benchmarks/import_time.py
    python benchmarks/import_time.py --runs 9

Prints the versions, and seconds of wall time: the median of the runs, and the least.
"""

import argparse
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version

from gptq_ao.version import VERSION

PACKAGES = ("torch", "torchao", "gptq_ao")
# What torchao says of libraries for other machines goes to stderr.
CODE = f"""
import importlib, time
for name in {PACKAGES}:
    start = time.perf_counter()
    importlib.import_module(name)
    print(time.perf_counter() - start)
"""


def run() -> list[float]:
    """Seconds for each package, in order."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}, torchao "
        f"{version('torchao')}, gptq_ao {VERSION}"
    )
    run()  # files are read from the disk once
    columns = list(zip(*(run() for _ in range(args.runs)), strict=True))
    for name, seconds in zip(PACKAGES, columns, strict=True):
        print(f"{name:8} {statistics.median(seconds):6.2f} s, at least {min(seconds):.2f}")


if __name__ == "__main__":
    main()
