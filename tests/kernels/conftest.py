"""What several tests of kernels need."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the test file's `interpret(folder)` leaves in `results.safetensors`, in Triton's interpreter."""
    folder = tmp_path_factory.mktemp("interpreted")
    # Triton reads the flag when it is imported.
    code = f"import pathlib, runpy\nrunpy.run_path({str(request.path)!r})['interpret'](pathlib.Path({str(folder)!r}))"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "results.safetensors")


@pytest.fixture
def compile_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that compiles a Triton kernel without a GPU, where no compiled one is found.

    Its arguments: the kernel, its constants (and what is None), the types of its other arguments, that of those which
    are not named there, the compiler's options, 80 or 90, and numbers that are multiples of 16. It returns what Triton
    compiled, and what the machine code, left in `tmp_path / "cubin"`, uses: REG, STACK, LOCAL, …
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def compile_(
        kernel: Any,
        constants: dict[str, Any],
        types: dict[str, str],
        others: str,
        options: dict[str, Any],
        architecture: int,
        multiples: tuple[str, ...] = (),
    ) -> tuple[Any, dict[str, str]]:
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, others) for n in names}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n in multiples
        }
        made = GluonASTSource if kernel.is_gluon() else ASTSource
        source = made(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(options))
        (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
        command = [str(tool), "-res-usage", str(tmp_path / "cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return compiled, dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout + done.stderr))

    return compile_
