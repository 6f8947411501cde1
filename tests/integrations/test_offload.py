"""accelerate moves weights between the host, the disk and where they compute: the results are the same, to the bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gptq_ao import gptq_config, load_quantized, quantize_, save_quantized
from gptq_ao.integrations import transformers as integration
from gptq_ao.tensor import GroupTensor

from ..checkpoint.test_directories import assert_same_files, assert_same_weights, quantized
from ..models import token_batches

IDS = token_batches(1)[0]["input_ids"]
PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.norm": "cpu"}
PLACES |= {"lm_head": "cpu", "model.layers.1": "cpu"}
offload = {
    "cpu_offload": lambda m, folder: accelerate.cpu_offload(m, execution_device="cpu"),
    "dispatch_model": lambda m, folder: accelerate.dispatch_model(m, PLACES, main_device="cpu", force_hooks=True),
}
to_disk = {
    "disk_offload": lambda m, folder: accelerate.disk_offload(m, folder, execution_device="cpu"),
    "dispatch_model": lambda m, folder: accelerate.dispatch_model(
        m, PLACES | {"model.layers.1": "disk"}, main_device="cpu", offload_dir=folder
    ),
}


@pytest.fixture(autouse=True)
def loads_all_formats(loaders: None) -> None:
    integration.load_with_gptq_ao("gptq", "compressed-tensors")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")  # transformers' own
@pytest.mark.parametrize("way", offload)
@pytest.mark.parametrize("loader", [load_quantized, AutoModelForCausalLM.from_pretrained], ids=["ours", "theirs"])
@pytest.mark.parametrize("format", ["native", "gptq", "compressed-tensors"])
def test_to_the_host(format: str, loader: Callable[[Path], Any], way: str, tmp_path: Path) -> None:
    save_quantized(quantized(), tmp_path / "a", format=format)
    model = loader(tmp_path / "a")
    offload[way](model, None)
    for _ in range(2):
        assert torch.equal(logits(model), logits(quantized()))
    save_quantized(model, tmp_path / "b", format=format)
    assert_same_files(tmp_path / "a", tmp_path / "b")
    if loader is not load_quantized:
        model.save_pretrained(tmp_path / "c")
        assert_same_files(tmp_path / "a", tmp_path / "c")
    remove_hook_from_submodules(model)
    assert assert_same_weights(quantized(), model) >= 8


@pytest.mark.parametrize("way", to_disk)
def test_to_the_disk_as_dense_weights(way: str, tmp_path: Path) -> None:
    model = copy.deepcopy(quantized())
    to_disk[way](model, tmp_path)
    with pytest.warns(UserWarning, match="kept as a dense one, and is multiplied as such: files of accelerate's disk"):
        found = logits(model)
    assert torch.equal(found, logits(quantized()))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["cpu_offload", "dispatch_model", "device_map", "auto"])
@pytest.mark.parametrize("format", ["native", "gptq", "compressed-tensors"])
def test_spilling_over_from_a_gpu(format: str, way: str, tmp_path: Path) -> None:
    """A model that does not fit on the GPU computes there all the same, layer by layer."""
    save_quantized(quantized(), tmp_path / "a", format=format)
    whole: Any = load_quantized(tmp_path / "a", device="cuda").to("cuda")
    places = dict.fromkeys(PLACES, 0) | {"model.layers.1": "cpu"}
    load = AutoModelForCausalLM.from_pretrained
    if way == "cpu_offload":
        model = accelerate.cpu_offload(load(tmp_path / "a"), execution_device="cuda:0")
    elif way == "dispatch_model":
        model = accelerate.dispatch_model(load(tmp_path / "a"), places)
    elif way == "device_map":
        model = load(tmp_path / "a", device_map=places)
    else:
        model = load(tmp_path / "a", device_map="auto", max_memory={0: 80_000, "cpu": "1GiB"})
        assert {"cpu", 0} <= set(model.hf_device_map.values())
    ids = IDS.cuda()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(ids).logits.cuda(), whole(ids).logits)


class Tied(nn.Module):
    """Two layers with one weight, among others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


@pytest.mark.parametrize("way", ["cpu_offload", "dispatch_model"])
def test_tied_weights(way: str) -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(2, 64)
    quantize_(model, gptq_config(4, 32, method="rtn"))
    expected = model(x)
    if way == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.dispatch_model(model, {"layers": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_parameter_is_made_anew_by_its_class(requires_grad: bool) -> None:
    weight = next(p for p in quantized().parameters() if isinstance(p, GroupTensor))
    again: Any = type(weight)(weight, requires_grad=requires_grad)  # type: ignore[call-arg]
    assert isinstance(again, nn.Parameter)
    assert type(again) is type(weight)
    assert again.requires_grad == requires_grad
    assert torch.equal(again.dequantize(), weight.dequantize())
