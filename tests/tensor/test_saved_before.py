"""What earlier versions saved still loads: the classes and operators that files name stay where they were.

`saved_before/` was written before the classes moved into a folder. `state_dict.pt` has a quantized weight of each width
and the dense one that it stands for; `program.pt2` is an exported `nn.Linear(64, 32)` with the 4-bit weight.
"""

import pickletools
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from gptq_ao import tensor
from gptq_ao.tensor import GroupTensor

SAVED = Path(__file__).parent / "saved_before"
LACKS_SCHEMA = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


def test_a_saved_state_dict_loads() -> None:
    saved = torch.load(SAVED / "state_dict.pt", weights_only=False)  # written here, so it may be unpickled
    assert [type(w).__name__ for w in saved["state"].values()] == [f"Int{bits}GroupTensor" for bits in (2, 3, 4, 8)]
    for name, weight in saved["state"].items():
        assert isinstance(weight, GroupTensor)
        assert torch.equal(weight.dequantize(), saved["dense"][name])


def test_a_state_dict_saved_now_names_the_same_classes(tmp_path: Path) -> None:
    """So that the version before loads it, too."""
    saved = torch.load(SAVED / "state_dict.pt", weights_only=False)
    torch.save(saved, tmp_path / "now.pt")
    assert _globals(tmp_path / "now.pt") == _globals(SAVED / "state_dict.pt")
    assert all(getattr(tensor, f"Int{bits}GroupTensor").__module__ == "gptq_ao.tensor" for bits in (2, 3, 4, 8))


@pytest.mark.skipif(LACKS_SCHEMA, reason="the file is of torch 2.13, and an older one reads no newer programs")
def test_a_saved_program_loads() -> None:
    program = torch.export.load(SAVED / "program.pt2")
    weight = torch.load(SAVED / "state_dict.pt", weights_only=False)["state"]["4.weight"]
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    assert torch.equal(program.module()(x), torch.nn.functional.linear(x, weight, program.state_dict["bias"]))


def _globals(file: Path) -> set[str]:
    """The classes and functions that a file of `torch.save` names."""
    with ZipFile(file) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        return {str(arg) for op, arg, _ in pickletools.genops(archive.read(name)) if op.name == "GLOBAL"}
