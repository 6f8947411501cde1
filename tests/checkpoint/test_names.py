"""Parameters that are called as a format calls a part of a quantized weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from gptq_ao import gptq_config, load_quantized, quantize_, save_quantized
from gptq_ao.checkpoint.formats import FORMATS
from gptq_ao.errors import CheckpointError

from ..models import tiny_llama
from .test_directories import assert_same_weights

CODES = {"codes", "qweight", "weight_packed", "weight"}


class WithMore(LlamaForCausalLM):
    """Llama, and a module with parameters of the names `more` on its own and in a layer."""

    more: tuple[str, ...] = ()

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for parent in (self, self.model.layers[0].self_attn):
            parent.extra = nn.Module()
            for number, name in enumerate(self.more):
                parent.extra.register_parameter(name, nn.Parameter(torch.full((3,), 1.5 + number)))
        self.post_init()


@pytest.mark.parametrize("format", ["native", "gptq", "compressed-tensors", "mlx"])
@pytest.mark.parametrize("alone", [True, False])
def test_parameters_named_like_parts(
    alone: bool, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaders: None
) -> None:
    parts = sorted({part for f in FORMATS.values() for part in f.parts})
    # A weight is recognized by its codes and something beside them.
    for more in [(part,) for part in sorted(CODES)] if alone else [tuple(p for p in parts if p not in CODES)]:
        monkeypatch.setattr(WithMore, "more", more)
        model = WithMore(tiny_llama().config).eval()
        quantize_(model, gptq_config(bits=4, group_size=32, method="rtn"))
        path = tmp_path / more[0]
        save_quantized(model, path, format=format)
        empty = WithMore(tiny_llama().config).eval()
        for p in empty.parameters():
            p.data.zero_()
        for loaded in (load_quantized(empty, path), WithMore.from_pretrained(path)):
            assert assert_same_weights(model, loaded) == 14
            assert loaded.get_parameter(f"extra.{more[0]}").tolist() == [1.5] * 3


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_a_name_that_is_taken(format: str, tmp_path: Path) -> None:
    model = tiny_llama()
    quantize_(model, gptq_config(bits=4, group_size=32, method="rtn"))
    layer, scale = model.model.layers[0].mlp.up_proj, FORMATS[format].scale
    layer.register_parameter(scale, nn.Parameter(torch.ones(1)))
    with pytest.raises(CheckpointError, match=rf"two tensors would be called '.*up_proj\.{scale}'"):
        save_quantized(model, tmp_path / "a", format=format)
    assert not list(tmp_path.iterdir())
