"""MLX's files: every number exactly, as an independent writer packed it, on every way that reads checkpoints. What
mlx-lm makes of them is in `tests/engines`."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gptq_ao import gptq_config, load_quantized, quantize_, save_quantized
from gptq_ao.checkpoint.convert import convert_checkpoint
from gptq_ao.checkpoint.exchange.packed_weight import held
from gptq_ao.checkpoint.formats import format_of
from gptq_ao.checkpoint.mlx.experts import EXPERTS
from gptq_ao.checkpoint.mlx.model_settings import mlx_notes, mlx_settings
from gptq_ao.checkpoint.mlx.tensors import biases_moved, decode_mlx, dequantize_mlx, encode_mlx, written_size
from gptq_ao.errors import CheckpointError, RoundedScalesWarning
from gptq_ao.integrations.transformers import load_model
from gptq_ao.tensor import GroupTensor, tensor_class

from ..models import seeded, tiny_llama, token_batches
from .test_directories import MODELS, assert_same_files, assert_same_weights, contents, quantized
from .test_gguf import random_weight
from .writers import mlx_tensors, prefixed, write

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOADERS = [load_quantized, lambda d: load_model(str(d)), AutoModelForCausalLM.from_pretrained]


def weight_of(bits: int, k: int, groups: int, sym: bool, dtype: torch.dtype) -> GroupTensor:
    made = random_weight(bits, 5, k, groups, sym)
    return type(made).from_codes(made.codes(), made.scale, made.zero_point, dtype=dtype)


@pytest.mark.parametrize(
    ("k", "groups", "size"), [(256, 1, 128), (256, 2, 128), (128, 2, 64), (96, 1, 32), (32, 1, 32)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sym", [True, False])
def test_tensors(k: int, groups: int, size: int, bits: int, dtype: torch.dtype, sym: bool) -> None:
    """The layout, restated; a larger group repeats its scale. Symmetric weights are exact in any dtype, all are in
    fp32; asymmetric ones come back as they were."""
    weight = weight_of(bits, k, groups, sym, dtype)
    assert written_size(weight) == size
    made = encode_mlx(weight)
    scale = weight.scale.repeat_interleave(k // groups // size, 1)
    zero_point = weight.zero_point.repeat_interleave(k // groups // size, 1)
    own = torch.float32 if dtype == torch.float32 else torch.float16  # bf16 does not hold random fp16 scales
    biases = (-zero_point.double() * scale.double()).to(own)
    expected = mlx_tensors(weight.codes(), scale.to(own), biases, bits)
    assert {p: (t.dtype, t.tolist()) for p, t in made.items()} == {
        p: (t.dtype, t.tolist()) for p, t in expected.items()
    }
    read = decode_mlx(made, bits)
    assert (read.bits, read.rounded, read.moved) == (bits, 0.0, 0.0)
    again = held(read, dtype)
    assert torch.equal(again.codes(), weight.codes())
    assert torch.equal(again.scale, scale)
    # Where the scale is 0, the zero point is any.
    assert torch.equal(again.zero_point[scale != 0], zero_point[scale != 0])
    assert torch.equal(again.dequantize(torch.float32), weight.dequantize(torch.float32))
    if sym or dtype == torch.float32:
        assert biases_moved(weight) == 0
    else:
        # fp16 has 11 binary digits: half a unit of the last place of at most 2^bits − 1 steps.
        assert biases_moved(weight) <= (2**bits - 1) * 2**-11


def test_scales_that_bf16_holds_stay_bf16() -> None:
    """Those of a file that was read: mlx-lm then computes in bf16, and with fp16 among bf16 in fp32."""
    scale = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).bfloat16().half()
    codes, zero_point = torch.zeros(4, 64, dtype=torch.uint8), torch.full((4, 2), 8, dtype=torch.uint8)
    made = encode_mlx(tensor_class(4).from_codes(codes, scale, zero_point, dtype=torch.bfloat16))
    assert (made["scales"].dtype, made["biases"].dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(made["biases"], -8 * made["scales"])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_of_mlx_itself(bits: int, dtype: torch.dtype) -> None:
    """It takes a group's largest number for its bias, and rounds the scale: the bias is a whole number of steps but for
    that. What it is off is said, to the last digit. 5 and 6 bits are held in 8."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (6, 128), dtype=torch.uint8, generator=generator)
    edge = torch.randn(6, 2, generator=generator).to(dtype)
    whole = torch.randint(1, 2**bits, (6, 2), generator=generator)
    tensors = mlx_tensors(codes, (-edge.float() / whole).to(dtype), edge, bits)
    scales = tensors["scales"].double()
    read = decode_mlx(tensors, bits)
    assert read.bits == (bits if bits in (2, 3, 4, 8) else 8)
    assert torch.equal(read.codes, codes)
    assert torch.equal(read.zero_point, whole.to(torch.uint8))
    assert (read.rounded > 0) == (dtype == torch.float32)
    off = (edge.double() + whole * scales).abs() / scales.abs()
    rounded = (-whole * scales).to(dtype) == edge
    assert read.moved == pytest.approx(float(off[~rounded].max()) if (~rounded).any() else 0.0)
    # By itself what a table of embeddings becomes: the numbers of the file.
    meant = codes.double().unflatten(1, (2, -1)) * scales.unsqueeze(-1) + edge.double().unsqueeze(-1)
    torch.testing.assert_close(
        dequantize_mlx(tensors, bits).double(), meant.flatten(1), rtol=torch.finfo(dtype).eps, atol=2**-20
    )


@pytest.mark.parametrize("steps", [-200, -1, 16, 255])
def test_groups_on_one_side_of_zero(steps: int) -> None:
    """Their zero is no code of 4 bits, so the weight is held in 8; other groups stay what they are."""
    codes = torch.arange(32, dtype=torch.uint8).view(1, 32).repeat(1, 2) % 16
    scales = torch.tensor([[0.5, 0.25]])
    tensors = mlx_tensors(codes, scales, torch.tensor([[-8 * 0.5, -steps * 0.25]]), 4)
    weight = held(decode_mlx(tensors, 4), torch.float32)
    meant = torch.cat([(codes[:, :32] - 8.0) * 0.5, (codes[:, 32:] - float(steps)) * 0.25], 1)
    assert weight.bits == 8
    assert torch.equal(weight.dequantize(), meant)


@pytest.mark.parametrize("steps", [-241, 256, -1e30, 1e30])
def test_groups_too_far_on_one_side(steps: float) -> None:
    codes, biases = torch.zeros(1, 32, dtype=torch.uint8), torch.tensor([[-steps * 0.25]])
    with pytest.raises(CheckpointError, match=r"so far on one side of zero that no zero point of 8 bits reaches it"):
        decode_mlx(mlx_tensors(codes, torch.tensor([[0.25]]), biases, 4), 4)


def mlx_llama(directory: Path, tied: bool, dtype: torch.dtype = torch.float32) -> tuple[Path, nn.Module]:
    """As mlx-lm converts: embeddings and head are quantized too. And the same model, dense, computed in fp32."""
    model: Any = tiny_llama(tied=tied)
    tensors: dict[str, Tensor] = {n: p.detach() for n, p in model.named_parameters()}
    for i, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding) and f"{name}.weight" in tensors:
            generator = torch.Generator().manual_seed(i)
            n, k = module.weight.shape
            codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
            scales = (torch.rand(n, k // 32, generator=generator) / 50 + 0.001).to(dtype)
            whole = torch.randint(0, 16, (n, k // 32), generator=generator)
            biases = (-whole * scales.float()).to(dtype)
            del tensors[f"{name}.weight"]
            tensors |= prefixed(name, mlx_tensors(codes, scales, biases, 4))
            # That of an embedding has any number, which a zero point has not.
            if isinstance(module, nn.Embedding):
                biases += 0.3 * scales
                tensors[f"{name}.biases"] = biases
            step = scales.float().repeat_interleave(32, 1)
            module.weight.data = codes * step + biases.float().repeat_interleave(32, 1)
    settings = {"group_size": 32, "bits": 4, "mode": "affine"}
    write(directory, tensors, settings, model.config)
    return directory, model


@pytest.mark.parametrize("load", LOADERS, ids=["load_quantized", "load_model", "from_pretrained"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_mlx_lm_converted(load: Any, tied: bool, loaders: None, tmp_path: Path) -> None:
    """A table that rows are looked up in is held dense, with the numbers of the file, and a tied head with it."""
    directory, model = mlx_llama(tmp_path / "a", tied)
    with pytest.warns(RoundedScalesWarning, match=r"weights of the checkpoint have scales that are not fp16 numbers"):
        loaded = load(directory)
    kinds = {n: type(p).__name__ for n, p in loaded.named_parameters() if p.dim() == 2}
    assert kinds.pop("model.embed_tokens.weight") == "Parameter"
    assert set(kinds.values()) == {"Int4GroupTensor"}
    assert len(kinds) == (14 if tied else 15)
    for name, parameter in loaded.named_parameters():
        value = parameter.dequantize(torch.float32) if isinstance(parameter, GroupTensor) else parameter
        # Scales are rounded to fp16.
        torch.testing.assert_close(value, model.get_parameter(name), rtol=2**-10, atol=2**-10 * 15 / 50)
    table = "model.embed_tokens.weight"
    assert torch.equal(loaded.get_parameter(table), model.get_parameter(table))


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
@pytest.mark.parametrize("load", LOADERS, ids=["load_quantized", "load_model", "from_pretrained"])
def test_either_key_of_the_config(key: str, load: Any, loaders: None, tmp_path: Path) -> None:
    """Old files have the first one only, and it does not stay in the config of a model that is saved otherwise."""
    save_quantized(quantized(), tmp_path / "a", format="mlx")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {
        "group_size": 32, "bits": 4, "mode": "affine", "lm_head": False,
    }  # fmt: skip
    del config[{"quantization": "quantization_config", "quantization_config": "quantization"}[key]]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    loaded = load(tmp_path / "a")
    assert assert_same_weights(quantized(), loaded) == 14
    save_quantized(loaded, tmp_path / "b", format="gptq")
    assert "quantization" not in json.loads((tmp_path / "b" / "config.json").read_text())
    # Dense again; or, of a model that transformers did not load, in the native format.
    (loaded.dequantize() if getattr(loaded, "hf_quantizer", None) else loaded).save_pretrained(tmp_path / "c")
    assert "quantization" not in json.loads((tmp_path / "c" / "config.json").read_text())


def test_another_meaning_of_the_key(tmp_path: Path) -> None:
    """Of a dense model, whose config says something else there."""
    model: Any = tiny_llama()
    model.config.quantization = "none"
    model.save_pretrained(tmp_path / "a")
    assert format_of(tmp_path / "a") is None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").config.quantization == "none"


@pytest.mark.parametrize("name", [n for n in MODELS if n != "gpt2"])
@pytest.mark.filterwarnings("ignore:.*no engine is known to serve:gptq_ao.errors.EngineWarning")
@pytest.mark.parametrize("sym", [True, False])
def test_as_it_came_and_to_all_others(name: str, sym: bool, loaders: None, tmp_path: Path) -> None:
    """Experts are stacks in MLX's files, as in the model, and neither in a hub checkpoint."""
    model = quantized(name, sym=sym)
    save_quantized(model, tmp_path / "a", format="mlx")
    stacked = {n for n in contents(tmp_path / "a") if "experts" in n or "switch_mlp" in n}
    assert all("switch_mlp" in n for n in stacked)
    assert bool(stacked) == (name in ("mixtral", "qwen3_moe"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert assert_same_weights(model, loaded) >= 8
    loaded.save_pretrained(tmp_path / "b")
    assert_same_files(tmp_path / "a", tmp_path / "b")
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in "ab"]
    for key in ("quantization", "quantization_config", *mlx_settings(model.config)):
        assert configs[0][key] == configs[1][key], key
    for format in ("native", "gptq_v2", "compressed-tensors", "mlx"):
        assert convert_checkpoint(tmp_path / "a", tmp_path / format, format) == "mlx"
        assert assert_same_weights(model, load_quantized(tmp_path / format)) >= 8
    assert convert_checkpoint(tmp_path / "native", tmp_path / "again", "mlx") == "native"
    assert_same_files(tmp_path / "a", tmp_path / "mlx")
    assert_same_files(tmp_path / "a", tmp_path / "again")


def test_settings_of_single_layers(tmp_path: Path) -> None:
    model = tiny_llama()
    rules = {"re:.*layers.0.mlp.*": {"bits": 8}, "re:.*layers.1.self_attn.*": None, "lm_head": {"group_size": 64}}
    quantize_(model, gptq_config(bits=3, group_size=32, method="rtn", rules=rules))
    save_quantized(model, tmp_path / "a", format="mlx")
    found = json.loads((tmp_path / "a" / "config.json").read_text())["quantization"]
    eight, dense = {"group_size": 32, "bits": 8}, False
    assert found == {
        "group_size": 32,
        "bits": 3,
        "mode": "affine",
        "lm_head": {"group_size": 64, "bits": 3},
        **{f"model.layers.0.mlp.{m}_proj": eight for m in ("gate", "up", "down")},
        **{f"model.layers.1.self_attn.{m}_proj": dense for m in "qkvo"},
    }
    assert assert_same_weights(model, load_quantized(tmp_path / "a")) == 11


def test_asymmetric_biases_are_rounded_with_a_word(tmp_path: Path) -> None:
    """In fp32 they are exact; in fp16 the file says what the warning does."""
    model = tiny_llama().half()
    quantize_(model, gptq_config(group_size=32, method="rtn", sym=False))
    with pytest.warns(RoundedScalesWarning, match=r"14 weights are asymmetric, and mlx has .* at most \d\.\de-03 of"):
        save_quantized(model, tmp_path / "a", format="mlx")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert assert_same_weights(model, load_quantized(tmp_path / "a")) == 14
        save_quantized(quantized(sym=False), tmp_path / "b", format="mlx")


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (lambda: random_weight(4, 8, 64, 4, True), r"groups of 16, 64 input features: MLX has groups of 32, 64, 128"),
        (lambda: random_weight(4, 8, 48, 1, True), r"groups of 48, 48 input features"),
        (
            lambda: random_weight(4, 8, 128, 2, True, perm=torch.arange(128).view(64, 2).T.flatten()),
            r"columns are in activation order",
        ),
        (
            lambda: tensor_class(8).from_codes(
                torch.zeros(1, 32, dtype=torch.uint8),
                torch.full((1, 1), 600.0).half(),
                torch.full((1, 1), 128, dtype=torch.uint8),
                dtype=torch.float16,
            ),
            r"is larger than fp16 can be",
        ),
    ],
)
def test_what_cannot_be_written(weight: Any, why: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].weight = nn.Parameter(weight(), requires_grad=False)
    with pytest.raises(CheckpointError, match=rf"'mlx' cannot hold the weight of '0': .*{why}"):
        save_quantized(model, tmp_path / "a", format="mlx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rule", [{"bits": 8}, None])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_with_settings_of_their_own(name: str, rule: Any, tmp_path: Path) -> None:
    """A layer's experts are one tensor: all alike they may be anything; a part of them cannot be."""
    model = MODELS[name]()
    rules = {"re:.*layers.0.*experts.*": rule}
    quantize_(model, gptq_config(group_size=32, method="rtn", rules=rules, calibration=token_batches(1)))
    save_quantized(model, tmp_path / "a", format="mlx")
    loaded = load_quantized(tmp_path / "a")
    assert assert_same_weights(model, loaded) == (12 if rule else 10)
    assert assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "a")) == (12 if rule else 10)


def test_experts_that_are_not_alike() -> None:
    """A stack has one shape, and all of its members."""
    names = [f"mlp.experts.{i}.up_proj" for i in range(2)]
    tensors = [(f"{names[i]}.weight", torch.zeros(4, 2 + i)) for i in range(2)]
    with pytest.raises(CheckpointError, match=r"'mlp.switch_mlp.up_proj.weight' .* they are \[4, 2\] and \[4, 3\]"):
        list(EXPERTS.joined(names, tensors))
    with pytest.raises(CheckpointError, match=r"only some of its experts are quantized"):
        list(EXPERTS.joined(names, tensors[:1]))
    halves = [(f"{n}.scales", torch.ones(2, 1, dtype=d)) for n, d in zip(names, DTYPES[1:], strict=True)]
    ((name, stack),) = EXPERTS.joined(names, halves)
    assert (name, stack.dtype, tuple(stack.shape)) == ("mlp.switch_mlp.up_proj.scales", torch.float32, (2, 2, 1))


SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 96, "max_position_embeddings": 128}


def test_settings_by_older_names() -> None:
    """mlx-lm takes its default for what it does not find."""
    plain = transformers.LlamaConfig(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert mlx_settings(plain) == {"rope_theta": 5e5}
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    found = mlx_settings(transformers.LlamaConfig(**SMALL, rope_parameters=scaled))
    assert found["rope_scaling"] == {"type": "llama3", **{k: v for k, v in scaled.items() if k != "rope_theta"}}
    experts = mlx_settings(transformers.Qwen3MoeConfig(**SMALL, num_experts=4))
    assert experts["num_experts"] == 4
    partial = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    assert mlx_settings(transformers.StableLmConfig(**SMALL, rope_parameters=partial))["partial_rotary_factor"] == 0.25
    both = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in
            (("full_attention", 1e6), ("sliding_attention", 1e4))}  # fmt: skip
    types = ["sliding_attention", "full_attention"] * 2
    gemma = transformers.Gemma3TextConfig(**SMALL, rope_parameters=both, layer_types=types)
    found = mlx_settings(gemma)
    assert (found["rope_theta"], found["rope_local_base_freq"], found["sliding_window_pattern"]) == (1e6, 1e4, 2)
    assert mlx_notes(gemma) == ()


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (transformers.GPTNeoXConfig(), r"models of the type 'gpt_neox' were not compared with mlx-lm"),
        (transformers.LlamaConfig(hidden_act="gelu"), r"always computes 'silu' in a 'llama', and this one has 'gelu'"),
        (transformers.MistralConfig(sliding_window=32), r"sliding window of 32 tokens, which mlx-lm does not know"),
        (
            transformers.Gemma3TextConfig(**SMALL, layer_types=["full_attention", *["sliding_attention"] * 3]),
            r"not every n-th",
        ),
    ],
)
def test_what_mlx_lm_may_compute_otherwise(config: Any, note: str) -> None:
    assert re.search(note, " ".join(mlx_notes(config)))


def test_a_note_is_a_warning(tmp_path: Path) -> None:
    config = transformers.MistralConfig(**SMALL, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
                                        sliding_window=32)  # fmt: skip
    model = seeded(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    quantize_(model, gptq_config(group_size=32, method="rtn"))
    with pytest.warns(UserWarning, match=r"sliding window of 32 tokens, which mlx-lm does not know of a 'mistral'"):
        save_quantized(model, tmp_path / "a", format="mlx")
