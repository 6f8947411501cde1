"""Experts as mlx-lm has them: `….switch_mlp.gate_proj`, a stack, in place of `….experts.0.gate_proj`, …"""

import re

from gptq_ao.checkpoint.exchange.stacks import Stacks

__all__ = ["EXPERTS"]

# mlx-lm's names of Mixtral's
_RENAMED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MIXTRAL = "block_sparse_moe"
_ONE = re.compile(r"(.*\.)experts\.(\d+|\*)\.(w[123]|gate_proj|down_proj|up_proj)(\..*)?")
_ALL = re.compile(r"(.*\.)switch_mlp\.(gate_proj|down_proj|up_proj)(\..*)?")


def _whole(name: str) -> tuple[str, str] | None:
    found = _ONE.fullmatch(name)
    if found is None:
        return None
    layer, number, matrix, part = found.groups(default="")
    return f"{layer}switch_mlp.{_RENAMED.get(matrix, matrix)}{part}", number


def _member(name: str) -> str | None:
    found = _ALL.fullmatch(name)
    if found is None:
        return None
    layer, matrix, part = found.groups(default="")
    if layer.removesuffix(".").endswith(_MIXTRAL):
        matrix = next(own for own, new in _RENAMED.items() if new == matrix)
    return f"{layer}experts.{{}}.{matrix}{part}"


EXPERTS = Stacks(_whole, _member)
