"""What several tests of the core need."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Column by column there is too little to share: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
