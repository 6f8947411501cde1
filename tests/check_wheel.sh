#!/usr/bin/env bash
# Build a wheel from a zip archive of HEAD, install it in a clean environment, and import one module of each folder. The
# source distribution that is made of the archive must give the same wheel.
# A zip archive turns the links gptq_ao/passes and gptq_ao/kernels into text files: the wheel must be whole all the same.
#     tests/check_wheel.sh PYTHON    PYTHON: of an environment with the dependencies; only those are taken from it
set -euo pipefail
python=$(realpath -s "$1")
root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

git -C "$root" archive --format=zip HEAD -o "$work/source.zip"
# Python's zipfile, like the tools that unpack archives without links, writes a link as a file that holds its target.
"$python" -m zipfile -e "$work/source.zip" "$work/source"
test -f "$work/source/gptq_ao/passes"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/wheel" "$work/source"
ls "$work"/wheel/*-py3-none-any.whl > /dev/null  # for every system

"$python" -m build --no-isolation --sdist --outdir "$work/sdist" "$work/source" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
! tar -tvf "$work"/sdist/*.tar.gz | grep '^l'  # no links: Windows could not unpack them
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/again" "$work"/sdist/*.tar.gz
for wheel in wheel again; do "$python" -m zipfile -l "$work/$wheel"/*.whl | awk '{print $1, $NF}' | grep -v dist-info > "$work/$wheel.list"; done
cmp "$work/wheel.list" "$work/again.list"

"$python" -m venv "$work/clean"
"$work/clean/bin/python" -m pip install --quiet --no-deps "$work"/wheel/*.whl
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$site" > "$("$work/clean/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
cd "$work"
"$work/clean/bin/python" - <<'PY'
import gptq_ao.kernels.reference
import gptq_ao.kernels.tuning.heuristics
import gptq_ao.passes.capture
import gptq_ao.passes.products.table
import gptq_ao.tiny_lm.corpus
from importlib.resources import files

assert "clean" in gptq_ao.__file__, gptq_ao.__file__
assert (files("gptq_ao") / "tiny_lm" / "model.safetensors").is_file()
assert (files("gptq_ao") / "py.typed").is_file()
assert (files("gptq_ao") / "presentation" / "page.css").is_file()
print("wheel: imports", gptq_ao.passes.capture.__file__.split("site-packages/")[-1], "and the others")
PY
# Its entry point, which must cost nothing and not fail: it would be a failure of `import torch`.
"$work/clean/bin/python" - <<'PY'
import sys

import torch

assert "gptq_ao_autoload" in sys.modules
assert "gptq_ao" not in sys.modules
PY
