"""AWQ's files: every number exactly, as an independent writer packed it, on every way that reads checkpoints."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AwqConfig

from gptq_ao import load_quantized, save_quantized
from gptq_ao.checkpoint.awq.tensors import decode_awq, encode_awq
from gptq_ao.checkpoint.convert import convert_checkpoint
from gptq_ao.errors import CheckpointError, RoundedScalesWarning
from gptq_ao.integrations.transformers import load_model
from gptq_ao.tensor import Int4GroupTensor

from ..models import tiny_llama, token_batches
from .test_directories import MODELS, assert_same_files, assert_same_weights, quantized
from .writers import awq_tensors, dense, meant, prefixed, write

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def parts(n: int, k: int, group_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """codes, scale and zero_point; a zero point of 0 and one of 15 are among them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scale = torch.randn(n, k // group_size, generator=generator).half() / 64
    zero_point = torch.randint(0, 16, scale.shape, dtype=torch.uint8, generator=generator)
    zero_point.flatten()[0], zero_point.flatten()[-1] = 0, 15
    return codes, scale, zero_point


def awq_llama(directory: Path, seed: int = 0, **config: Any) -> tuple[Path, Any]:
    """A checkpoint by the independent writer, and the dense model that it stands for."""
    model = tiny_llama()
    tensors = {name: t for name, t in model.state_dict().items() if "_proj" not in name}
    for i, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and "_proj" in name:
            made = parts(module.out_features, module.in_features, 32, seed + i)
            tensors |= prefixed(name, awq_tensors(*made))
            module.weight.data = dense(*made, torch.arange(module.in_features) // 32)
    return write(directory, tensors, {**CONFIG, "modules_to_not_convert": ["lm_head"], **config}, model.config), model


@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [(64, 128, 32), (8, 32, 32), (8, 4, 4), (24, 20, 5), (16, 7, 7), (40, 96, 96), (8, 3, 1), (8, 1, 1)],
)
def test_codes_scales_and_zero_points(n: int, k: int, group_size: int) -> None:
    """Also of sizes that fill no word of the other layout, and of one input feature."""
    codes, scale, zero_point = parts(n, k, group_size)
    tensors = awq_tensors(codes, scale, zero_point)
    read = decode_awq(tensors)
    assert (read.bits, read.in_features, read.perm, read.rounded) == (4, k, None, 0.0)
    assert torch.equal(read.codes, codes)
    assert torch.equal(read.scale, scale)
    assert torch.equal(read.zero_point, zero_point)
    assert torch.equal(meant(read), dense(codes, scale, zero_point, torch.arange(k) // group_size))
    again = encode_awq(read)
    assert {name: (t.dtype, t.tolist()) for name, t in again.items()} == {
        name: (t.dtype, t.tolist()) for name, t in tensors.items()
    }


def test_the_order_within_a_word() -> None:
    """By hand: output features 0 to 7 with codes 0 to 7 are, from the lowest bits, 0, 2, 4, 6, 1, 3, 5, 7."""
    word = torch.tensor([[0x75316420]], dtype=torch.int32)
    tensors = {"qweight": word, "qzeros": torch.zeros(1, 1, dtype=torch.int32), "scales": torch.ones(1, 8).half()}
    assert decode_awq(tensors).codes.flatten().tolist() == list(range(8))


@pytest.mark.parametrize(
    "load",
    [load_quantized, lambda d: load_model(str(d)), AutoModelForCausalLM.from_pretrained],
    ids=["load_quantized", "load_model", "from_pretrained"],
)
def test_every_way_to_load_gives_the_weights_of_the_file(load: Any, loaders: None, tmp_path: Path) -> None:
    directory, model = awq_llama(tmp_path / "a")
    loaded = load(directory)
    found = {n: p for n, p in loaded.named_parameters() if isinstance(p, Int4GroupTensor)}
    assert len(found) == 14
    for name, weight in found.items():
        assert torch.equal(weight.dequantize(torch.float32), model.get_parameter(name)), name
    ids = token_batches(1)[0]["input_ids"]
    with torch.no_grad():
        # The same numbers, summed in another order: 128 terms, some 20 products deep.
        expected = model(ids).logits
        assert (loaded(ids).logits - expected).abs().max() <= 20 * 128 * 2**-23 * expected.abs().max()


def test_it_is_saved_as_it_came_and_converted_to_all_others(loaders: None, tmp_path: Path) -> None:
    directory, _ = awq_llama(tmp_path / "a")
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory)
    loaded.save_pretrained(tmp_path / "b")
    assert_same_files(directory, tmp_path / "b")
    again = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert again == {**CONFIG, "modules_to_not_convert": ["lm_head"]}
    for format in ("native", "gptq_v2", "compressed-tensors", "awq"):
        assert convert_checkpoint(directory, tmp_path / format, format) == "awq"
        assert assert_same_weights(loaded, load_quantized(tmp_path / format)) == 14
    assert_same_files(directory, tmp_path / "awq")


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_merges_and_renames(name: str, loaders: None, tmp_path: Path) -> None:
    """Experts, fused projections, [in, out] layers: asymmetric, as AWQ has them."""
    model = quantized(name, sym=False)
    save_quantized(model, tmp_path / "a", format="awq")
    for loaded in (load_quantized(tmp_path / "a"), AutoModelForCausalLM.from_pretrained(tmp_path / "a")):
        assert assert_same_weights(model, loaded) >= 8


def test_one_scale_per_row_of_rows_of_different_sizes(loaders: None, tmp_path: Path) -> None:
    model = quantized(sym=False, group_size=-1)
    save_quantized(model, tmp_path / "a", format="awq")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["group_size"] == -1
    for loaded in (load_quantized(tmp_path / "a"), AutoModelForCausalLM.from_pretrained(tmp_path / "a")):
        assert assert_same_weights(model, loaded) == 14


@pytest.mark.parametrize(
    "config",
    [
        {"version": "GEMM"},
        {"version": None},
        {"version": None, "checkpoint_format": "gemm", "sym": False, "desc_act": False},
        {"bits": None, "group_size": None, "w_bit": 4, "q_group_size": 32, "version": "GEMM"},
    ],
    ids=["capitals", "none", "gptqmodel", "old-names"],
)
def test_names_that_writers_have_used(config: dict[str, Any], tmp_path: Path) -> None:
    directory, _ = awq_llama(tmp_path / "a")
    content = json.loads((directory / "config.json").read_text())
    settings = {k: v for k, v in {**content["quantization_config"], **config}.items() if v is not None}
    (directory / "config.json").write_text(json.dumps({**content, "quantization_config": settings}))
    load_quantized(directory)


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    """As AutoAWQ wrote them before config.json had them; with both, they are the same settings by other names."""
    directory, _ = awq_llama(tmp_path / "a")
    aside = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (directory / "quant_config.json").write_text(json.dumps(aside))
    both = load_quantized(directory)
    content = json.loads((directory / "config.json").read_text())
    del content["quantization_config"]
    (directory / "config.json").write_text(json.dumps(content))
    assert assert_same_weights(both, load_quantized(directory)) == 14


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(({"version": v}, rf"version '{v}' cannot be read, only 'gemm'") for v in ("gemv", "gemv_fast", "marlin")),
        ({"version": None, "format": "llm-awq"}, r"version 'llm-awq' cannot be read"),
        ({"version": 1}, r"version 1 cannot be read"),
        ({"bits": 8}, r"AWQ weights of 8 bits, only 4 can be read"),
        ({"bits": "4"}, r"'bits' is '4', not a number"),
        ({"bits": True}, r"'bits' is True, not a number"),
        ({"group_size": 0}, r"a group_size of 0: not a number of input features"),
        ({"group_size": -32}, r"a group_size of -32"),
        ({"group_size": 64}, r"groups of 64\) and the tensors of .* contradict each other"),
        ({"group_size": -1}, r"contradict each other"),
        ({"group_size": 48}, r"contradict each other"),
        ({"group_size": 2**70}, r"contradict each other"),
    ],
)
@pytest.mark.parametrize("load", [load_quantized, AutoModelForCausalLM.from_pretrained], ids=["ours", "transformers"])
def test_configs_that_cannot_be_read(
    config: dict[str, Any], message: str, load: Any, loaders: None, tmp_path: Path
) -> None:
    directory, _ = awq_llama(tmp_path / "a", **config)
    with pytest.raises(CheckpointError, match=message):
        load(directory)


@pytest.mark.parametrize("load", [load_quantized, AutoModelForCausalLM.from_pretrained], ids=["ours", "transformers"])
def test_scaled_activations_are_refused(load: Any, loaders: None, tmp_path: Path) -> None:
    """transformers would leave the vector out, and go on with other activations."""
    directory, _ = awq_llama(tmp_path / "a")
    tensors = load_file(directory / "model.safetensors")
    tensors |= {f"model.layers.{i}.mlp.act_fn.scales": torch.full((128,), 2.0).half() for i in range(2)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.act_fn.scales' \(and 1 more\), \[128\], is what"):
        load(directory)


def test_scales_of_other_dtypes_are_rounded_with_a_word(tmp_path: Path) -> None:
    directory, _ = awq_llama(tmp_path / "a")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"] = tensors["model.layers.0.mlp.up_proj.scales"].float() + 2**-20
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.warns(RoundedScalesWarning, match=r"1 weights of the checkpoint have scales"):
        load_quantized(directory)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, r"'awq' cannot hold .*and 13 more\): it has 8 bits, and AWQ 4"),
        ({"bits": 3}, r"it has 3 bits, and AWQ 4"),
        (
            {"rules": {"re:.*up_proj.weight": {"group_size": 16}}},
            r"one group size for all weights, and these have \[16, 32\]",
        ),
    ],
)
def test_what_the_format_cannot_hold(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that engines fuse
        model = quantized(**settings)
    with pytest.raises(CheckpointError, match=message):
        save_quantized(model, tmp_path / "a", format="awq")
    assert not list(tmp_path.iterdir())


def test_a_name_within_another_cannot_be_left_out(tmp_path: Path) -> None:
    """Readers would take "up" for what is not quantized, and "up2" with it."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.up2 = nn.Linear(32, 32), nn.Linear(32, 32)

    model, other = Two(), quantized().model.layers[0].self_attn.o_proj.weight
    model.up2 = nn.Linear(64, 64, bias=False)
    model.up2.weight = nn.Parameter(other, requires_grad=False)
    with pytest.raises(CheckpointError, match=r"the weight of 'up2': 'up' is not quantized, and readers of AWQ"):
        save_quantized(model, tmp_path / "a", format="awq")


@pytest.mark.parametrize("stored", [{}, {"sym": False, "desc_act": False}], ids=["autoawq", "gptqmodel"])
def test_a_config_that_is_given_agrees(stored: dict[str, Any], loaders: None, tmp_path: Path) -> None:
    """Its `sym` is a default of the class that transformers' AwqConfig is made of, which nobody has chosen."""
    directory, _ = awq_llama(tmp_path / "a", **stored)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, quantization_config=AwqConfig(bits=4, group_size=32))
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, Int4GroupTensor)
