"""Whether every handler reached the classes: torchao copies a class's tables into those that are derived from it once,
when they are made."""

import importlib
import pkgutil
from typing import Any

import pytest
import torch

from gptq_ao import tensor
from gptq_ao.tensor import GroupTensor, tensor_class

TABLES = ["_ATEN_OP_TABLE", "_TORCH_FN_TABLE"]


def missing(table: str, bits: int) -> set[Any]:
    """What the base has, and the class for `bits` has not or has another handler for."""
    derived = tensor_class(bits)
    handlers = getattr(derived, table)[derived]
    return {op for op, handler in getattr(GroupTensor, table)[GroupTensor].items() if handlers.get(op) is not handler}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("table", TABLES)
def test_every_class_has_every_handler(table: str, bits: int) -> None:
    for module in pkgutil.iter_modules(tensor.__path__):  # a file that nothing imports may have some, too
        importlib.import_module(f"gptq_ao.tensor.{module.name}")
    assert missing(table, bits) == set()


def test_a_handler_that_comes_too_late_is_seen() -> None:
    late = torch.ops.aten.erf.default
    GroupTensor.implements([late])(lambda func, types, args, kwargs: None)
    try:
        assert missing("_ATEN_OP_TABLE", 4) == {late}
    finally:
        del GroupTensor._ATEN_OP_TABLE[GroupTensor][late]


def test_every_handler_has_a_name_of_its_own() -> None:
    """Else a traceback or a profile shows which line, not what."""
    for table in TABLES:
        handlers = getattr(GroupTensor, table)[GroupTensor].values()
        ours = {h.__wrapped__ for h in handlers if h.__wrapped__.__module__.startswith("gptq_ao.")}
        names = [h.__name__ for h in ours]
        assert len(set(names)) == len(names)
        assert not [n for n in names if n.startswith("_")]
