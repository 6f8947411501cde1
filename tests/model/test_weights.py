"""Weights that are not where their modules are: models dispatched by accelerate are quantized like any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from gptq_ao import gptq_config, load_quantized, quantize_, save_quantized
from gptq_ao.errors import ConfigError
from gptq_ao.model.weights import ModelWeights
from gptq_ao.tensor import GroupTensor

from ..models import tiny_llama, token_batches

MAP = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk"}
MAP |= {"model.rotary_emb": "cpu", "lm_head": "disk"}

DISPATCH: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu": lambda m, _: accelerate.cpu_offload(m, "cpu", offload_buffers=True),
    "cpu-blocks": lambda m, _: accelerate.cpu_offload(m, "cpu", preload_module_classes=["LlamaDecoderLayer"]),
    "disk": lambda m, folder: accelerate.disk_offload(m, folder, "cpu"),
    "mixed": lambda m, folder: accelerate.dispatch_model(m, MAP, offload_dir=folder),
}


def original() -> Any:
    model = tiny_llama(dtype=torch.bfloat16)
    for layer in model.model.layers:  # a bias shares the hook of its weight
        layer.mlp.up_proj.bias = nn.Parameter(torch.linspace(-1, 1, 128, dtype=torch.bfloat16))
    return model


def settings(method: str) -> Any:
    data: Any = {"calibration": token_batches()} if method == "gptq" else {}
    return gptq_config(4, 32, method=method, **data, rules={"lm_head": {"bits": 8}})


@pytest.fixture(scope="module")
def in_memory() -> dict[str, tuple[Any, Any]]:
    """Method → the model that was never offloaded, and its report."""
    models = {method: original() for method in ("gptq", "rtn")}
    return {method: (model, quantize_(model, settings(method))) for method, model in models.items()}


@pytest.mark.parametrize(("way", "method"), [*((way, "gptq") for way in DISPATCH), ("mixed", "rtn")])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # accelerate, reading what it put on disk
def test_an_offloaded_model_becomes_the_same(way: str, method: str, in_memory: Any, tmp_path: Path) -> None:
    model, expected = in_memory[method]
    offloaded = DISPATCH[way](original(), tmp_path)
    batch = token_batches()[0]
    with torch.no_grad():
        offloaded(**batch)
    assert offloaded.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    report: Any = quantize_(offloaded, settings(method))
    assert report.weights == expected.weights
    with torch.no_grad():
        for _ in range(2):  # the hooks take weights away after a forward
            assert torch.equal(offloaded(**batch).logits, model(**batch).logits)
    weights = ModelWeights(offloaded)
    for name, wanted in model.named_parameters():
        found = weights.get(name)
        assert type(found) is type(wanted.detach()), name
        for part in wanted.__tensor_flatten__()[0] if isinstance(wanted, GroupTensor) else ["data"]:
            assert torch.equal(getattr(found, part), getattr(wanted, part)), name
    save_quantized(offloaded, tmp_path / "saved")
    again: Any = load_quantized(original(), tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_what_is_not_quantized_stays_offloaded() -> None:
    model = accelerate.cpu_offload(tiny_llama(), "cpu")
    quantize_(model, gptq_config(4, 32, calibration=token_batches(), rules={"re:.*layers.1.*": None}))
    assert model.model.embed_tokens.weight.device.type == "meta"
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, GroupTensor)


def test_a_model_without_values() -> None:
    with pytest.raises(ConfigError, match=r"'0.weight' is on the meta device, it has no values: load the weights"):
        quantize_(nn.Sequential(nn.Linear(64, 64, device="meta")), gptq_config(4, 32, method="rtn"))
