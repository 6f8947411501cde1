"""MLX as one of the formats. transformers has no loader for it, and mlx-lm none for what has the others' names."""

from gptq_ao.checkpoint.exchange.format import Format
from gptq_ao.checkpoint.mlx.experts import EXPERTS
from gptq_ao.checkpoint.mlx.model_settings import mlx_notes, mlx_settings
from gptq_ao.checkpoint.mlx.read import MLX_PARTS, mlx_weights
from gptq_ao.checkpoint.mlx.tensors import biases_moved, encode_mlx
from gptq_ao.checkpoint.mlx.write import mlx_config_of

__all__ = ["MLX"]

MLX = Format(
    name="mlx",
    quant_method="mlx",
    parts=MLX_PARTS,
    read=mlx_weights,
    config=mlx_config_of,
    encode=lambda weight, dtype: encode_mlx(weight),
    scale="weight",  # it has the name of the dense one
    others=r"\.(scales|biases)$",
    stacks=EXPERTS,
    settings=mlx_settings,
    notes=mlx_notes,
    moved=biases_moved,
)
