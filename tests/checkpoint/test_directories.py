"""Whole checkpoints: written in every format, recognized, read again, written again with the same bytes."""

import dataclasses
import functools
import importlib.metadata
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gptq_ao import gptq_config, load_quantized, quantize_, save_quantized
from gptq_ao.checkpoint.files.output_directory import check_empty
from gptq_ao.errors import CheckpointError, ConfigError, FusedSettingsWarning
from gptq_ao.tensor import GroupTensor
from gptq_ao.version import VERSION

from ..models import seeded, tiny_llama, token_batches
from .writers import dense, gptq_tensors, prefixed, write

SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
EXPERTS: dict[str, Any] = {**SMALL, "moe_intermediate_size": 32, "num_local_experts": 4, "num_experts": 4}
EXPERTS |= {"num_experts_per_tok": 2}


def built(config: Any) -> Any:
    return seeded(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "llama-tied": lambda: tiny_llama(tied=True),
    "gpt2": lambda: built(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=96, n_positions=64)),
    "mixtral": lambda: built(transformers.MixtralConfig(**{**EXPERTS, "intermediate_size": 32})),
    "qwen3_moe": lambda: built(transformers.Qwen3MoeConfig(**EXPERTS, head_dim=16)),
    "phi3": lambda: built(transformers.Phi3Config(**SMALL)),
}


def quantized(name: str = "llama", **settings: Any) -> Any:
    """A quantized model, which tests must not change."""
    return _quantized(name, json.dumps({"group_size": 32, "method": "rtn", **settings}))


@functools.cache
def _quantized(name: str, settings: str) -> Any:
    model = MODELS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FusedSettingsWarning)
        # The data shows where the products are.
        quantize_(model, gptq_config(**json.loads(settings), calibration=token_batches(1)))
    return model


def assert_same_weights(a: nn.Module, b: nn.Module) -> int:
    """The number of quantized ones."""
    count = 0
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other
        assert isinstance(p, GroupTensor) == isinstance(q, GroupTensor), name
        assert p.shape == q.shape
        assert torch.equal(p.dequantize(), q.dequantize()) if isinstance(p, GroupTensor) else torch.equal(p, q), name
        if isinstance(p, GroupTensor):
            assert isinstance(q, GroupTensor)
            assert (p.bits, p.group_size) == (q.bits, q.group_size)
            assert torch.equal(p.codes(), q.codes())
            assert torch.equal(p.scale, q.scale)
            assert torch.equal(p.zero_point, q.zero_point)
            count += 1
    return count


def contents(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_files(a: Path, b: Path) -> None:
    first, second = contents(a), contents(b)
    assert set(first) == set(second)
    for name, t in first.items():
        assert (t.dtype, t.shape) == (second[name].dtype, second[name].shape), name
        assert torch.equal(t, second[name]), name


FORMATS = ["native", "gptq", "gptq_v2", "compressed-tensors", "awq", "mlx"]


@pytest.mark.filterwarnings("ignore:.*'gpt2' were not compared with mlx-lm")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_every_format_and_family_round_trips(name: str, format: str, tmp_path: Path) -> None:
    model = quantized(name)
    save_quantized(model, tmp_path / "a", format=format, max_shard_bytes=60_000)
    again = load_quantized(tmp_path / "a")
    assert assert_same_weights(model, again) >= 8
    save_quantized(again, tmp_path / "b", format=format, max_shard_bytes=10**9)
    assert_same_files(tmp_path / "a", tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1 == len(list((tmp_path / "b").glob("*.safetensors")))
    quantization = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    expected = {"native": None, "mlx": None, "gptq_v2": "gptq"}.get(format, format)
    assert quantization.get("quant_method") == expected


@pytest.mark.parametrize("format", ["gptq_v2", "compressed-tensors", "mlx"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_asymmetric_weights(format: str, bits: int, group_size: int, tmp_path: Path) -> None:
    model = quantized(bits=bits, group_size=group_size, sym=False)
    save_quantized(model, tmp_path / "a", format=format)
    assert assert_same_weights(model, load_quantized(tmp_path / "a")) == 14
    with pytest.raises(CheckpointError, match=r"'gptq' cannot hold .*and 13 more\): it is asymmetric.*write gptq_v2"):
        save_quantized(model, tmp_path / "b", format="gptq")
    assert not (tmp_path / "b").exists()


def test_activation_order(tmp_path: Path) -> None:
    model = tiny_llama()
    quantize_(model, gptq_config(group_size=32, act_order="group", effort="fast", calibration=token_batches()))
    save_quantized(model, tmp_path / "a", format="gptq")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    again = load_quantized(tmp_path / "a")
    assert_same_logits(model, again)
    save_quantized(again, tmp_path / "b", format="gptq")
    assert_same_files(tmp_path / "a", tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"'compressed-tensors' cannot hold .*columns are in activation order"):
        save_quantized(model, tmp_path / "c", format="compressed-tensors")
    assert not (tmp_path / "c").exists()


def assert_same_logits(a: Any, b: Any) -> None:
    ids = token_batches(1)[0]["input_ids"]
    with torch.no_grad():
        # The same weights, perhaps in another order of columns: sums of at most 128 terms, some 20 products deep.
        x, y = a(ids).logits, b(ids).logits
        assert (x - y).abs().max() <= 20 * 128 * 2**-24 * x.abs().max()


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_settings_of_single_weights(format: str, tmp_path: Path) -> None:
    rules = {"re:.*down_proj": {"bits": 8, "group_size": -1}, "re:.*layers.0.self_attn.*": None, "lm_head": {"bits": 8}}
    model = quantized(rules=rules)
    save_quantized(model, tmp_path / "a", format=format)
    assert assert_same_weights(model, load_quantized(tmp_path / "a")) == 11
    q = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    attention = [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"]
    if format == "gptq":
        assert (q["bits"], q["group_size"], q["lm_head"]) == (4, 32, True)

        def setting(module: str) -> Any:
            found = (v if p[0] == "+" else None for p, v in q["dynamic"].items() if re.match(p[2:], module))
            return next(found, {})

        assert [setting(m) for m in attention] == [None] * 4
        assert setting("model.layers.0.self_attn.qkv_proj") is None
        assert setting("model.layers.1.self_attn.qkv_proj") == {}
        assert setting("model.layers.1.mlp.down_proj") == {"bits": 8, "group_size": -1}
        assert setting("lm_head") == {"bits": 8, "group_size": 32}
    else:
        assert sorted(q["ignore"]) == sorted([*attention, "model.layers.0.self_attn.qkv_proj"])
        by_target = {t: g["weights"] for g in q["config_groups"].values() for t in g["targets"]}
        assert list(by_target)[-1] == "Linear"
        assert by_target["Linear"]["group_size"] == 32
        channel = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel"}
        assert by_target["model.layers.1.mlp.down_proj"] == channel
        assert by_target["lm_head"]["num_bits"] == 8


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_written_one_by_one(name: str, tmp_path: Path) -> None:
    save_quantized(quantized(name), tmp_path / "a", format="gptq")
    names = set(contents(tmp_path / "a"))
    experts = {n for n in names if n.endswith(".qweight") and ".experts.3." in n}
    assert len(experts) == 6
    assert not any("gate_up_proj" in n for n in names)
    q = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    routers = [p for p in q["dynamic"] if re.search(r"gate\$$", p)]
    assert len(routers) == (2 if any(n.endswith("gate.weight") for n in names) else 0)


def test_what_has_no_place_in_other_formats(tmp_path: Path) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bk,enk->ben", x, self.w)

    stack = Experts()
    quantize_(stack, gptq_config(4, 32, calibration=[torch.randn(64, 64)]))
    convolution = nn.Sequential(nn.Conv2d(32, 32, 1))
    quantize_(convolution, gptq_config(4, 32, calibration=[torch.randn(2, 32, 8, 8)]))
    narrow = nn.Sequential(nn.Linear(64, 40))
    quantize_(narrow, gptq_config(4, 32, calibration=[torch.randn(64, 64)]))
    cases = [
        (stack, "gptq", r"'w' is not the weight of a linear layer, nor a stack .*\"native\" and \"dense\""),
        (convolution, "compressed-tensors", r"'0.weight' is not the weight of a linear layer"),
        (narrow, "gptq", r"'gptq' cannot hold the weight of '0': it has 40 output and 64 input features"),
        (nn.Linear(4, 4), "gptq", r"has no quantized weight"),
    ]
    for model, format, message in cases:
        with pytest.raises(CheckpointError, match=message):
            save_quantized(model, tmp_path / "out", format=format)
    with pytest.raises(ConfigError, match=r"format is 'ggml': give one of native, gptq, gptq_v2"):
        save_quantized(narrow, tmp_path / "out", format="ggml")
    assert list(tmp_path.iterdir()) == []
    save_quantized(narrow, tmp_path / "narrow", format="compressed-tensors")
    again = load_quantized(nn.Sequential(nn.Linear(64, 40)), tmp_path / "narrow")
    assert assert_same_weights(narrow, again) == 1


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt2"])
def test_dense(name: str, tmp_path: Path) -> None:
    """An ordinary checkpoint, which transformers loads without this package."""
    model = quantized(name)
    save_quantized(model, tmp_path / "a", format="dense", max_shard_bytes=60_000)
    assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    for (n, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p.dequantize() if isinstance(p, GroupTensor) else p, q), n


def autogptq(directory: Path, **more: Tensor) -> tuple[Path, dict[str, Tensor]]:
    """A Llama as AutoGPTQ wrote them: biases of zeros, no quantization in config.json; and its dense weights."""
    model, weights = tiny_llama(layers=1), {}
    tensors: dict[str, Tensor] = {n: t for n, t in model.state_dict().items() if "proj" not in n}
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "proj" not in name:
            continue
        (n, k), module = p.shape, name.removesuffix(".weight")
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
        scale = torch.rand(n, k // 32, generator=generator).half() / 64
        zero_point = torch.full((n, k // 32), 8, dtype=torch.uint8)
        group_of = torch.arange(k) // 32
        tensors |= prefixed(module, gptq_tensors(codes, scale, zero_point, group_of, 4, writer="autogptq"))
        tensors[f"{module}.bias"] = torch.zeros(n).half()
        weights[name] = dense(codes, scale, zero_point, group_of)
    write(directory, {**tensors, **more}, None, model.config)
    old = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True}
    (directory / "quantize_config.json").write_text(json.dumps(old))
    (directory / "model.safetensors").rename(directory / "gptq_model-4bit-32g.safetensors")
    return directory, weights


def test_a_checkpoint_of_autogptq(tmp_path: Path) -> None:
    directory, weights = autogptq(tmp_path / "old")
    model = load_quantized(directory)
    assert len(weights) == 7
    for name, weight in weights.items():
        parameter: Any = model.get_parameter(name)
        assert torch.equal(parameter.dequantize(torch.float32), weight)
        assert (parameter.group_size, parameter.perm) == (32, None)
    bias = torch.zeros(64).half()
    bias[3] = 1
    broken, _ = autogptq(tmp_path / "bias", **{"model.layers.0.self_attn.q_proj.bias": bias})
    with pytest.raises(CheckpointError, match=r"it has '.*layers.0.self_attn.q_proj.bias', which the model does not"):
        load_quantized(broken)


def test_two_configs_that_disagree(tmp_path: Path) -> None:
    save_quantized(quantized(), tmp_path / "a", format="gptq")
    (tmp_path / "a" / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": 32}))
    with pytest.raises(CheckpointError, match=r"says bits = 4, quantize_config.json says 8: remove the one"):
        load_quantized(tmp_path / "a")


def test_into_a_model_of_your_own(tmp_path: Path) -> None:
    model = quantized()
    save_quantized(model, tmp_path / "a", format="gptq")
    other = tiny_llama(seed=1)
    assert load_quantized(other, tmp_path / "a") is other
    assert assert_same_weights(model, other) == 14
    wide = tiny_llama(layers=1)
    before = {n: id(p) for n, p in wide.named_parameters()}
    with pytest.raises(CheckpointError, match=r"does not fit the LlamaForCausalLM: it has 'model.layers.1"):
        load_quantized(wide, tmp_path / "a")
    assert {n: id(p) for n, p in wide.named_parameters()} == before


def test_scales_that_are_rounded_are_reported_once(tmp_path: Path) -> None:
    from gptq_ao.errors import RoundedScalesWarning

    directory, _ = autogptq(tmp_path / "old")
    file = next(directory.glob("*.safetensors"))
    tensors = {n: t.float() * 1.0001 if n.endswith("scales") else t for n, t in load_file(file).items()}
    save_file(tensors, file)
    with pytest.warns(RoundedScalesWarning, match=r"^7 weights .* not fp16 numbers.* is 1\.0e-04 of itself") as caught:
        load_quantized(directory)
    assert len(caught) == 1


def test_experts_with_orders_of_their_own_have_no_common_one(tmp_path: Path) -> None:
    save_quantized(quantized("mixtral"), tmp_path / "a", format="gptq")
    for file in (tmp_path / "a").glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if ".experts.1." in name and name.endswith("g_idx"):
                tensors[name] = tensors[name].flip(0).roll(1).contiguous()
        save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"cannot be put together: .*columns are in different orders"):
        load_quantized(tmp_path / "a")


def test_a_model_card_says_what_it_is_and_how_it_was_made(tmp_path: Path) -> None:
    model = tiny_llama()
    report = quantize_(model, gptq_config(bits=4, group_size=32, effort="fast", calibration=token_batches()))
    assert report is not None
    report = dataclasses.replace(report, measured={"perplexity": 12.3456})
    save_quantized(model, tmp_path / "a", report=report)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "\n- perplexity: 12.35\n" in card
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- gptq_ao\n---\n")
    assert "- 14 weights of 4 bits, 32 input features to a scale" in card
    assert "- recipe: 4 bits, group_size 32, symmetric, GPTQ, act_order group_aware" in card
    assert re.search(r"- calibration: 4 batches, sha256 [0-9a-f]{64}\n", card)
    assert str(tmp_path) not in card
    assert "gptq_ao" in re.findall(r"versions: (.*)", card)[0]
    other = tiny_llama()
    again = quantize_(other, gptq_config(bits=4, group_size=32, effort="fast", calibration=token_batches(5)))
    assert report is not None
    assert again is not None
    assert again.recipe["calibration"] != report.recipe["calibration"]


def test_saving_asks_no_installed_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source tree on the path is enough, and has none."""
    found = importlib.metadata.Distribution.from_name

    def from_name(name: str) -> importlib.metadata.Distribution:
        if name == "gptq_ao":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", from_name)
    for format in ("native", "gptq", "compressed-tensors"):
        save_quantized(quantized(), tmp_path / format, format=format)
        assert f"versions: gptq_ao {VERSION}, torch " in (tmp_path / format / "README.md").read_text()
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert config["quantization_config"]["meta"]["quantizer"] == [f"gptq_ao:{VERSION}"]


@pytest.mark.parametrize("place", ["link", "."])
def test_an_empty_directory_under_another_name(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link, which no directory can replace, and the working directory."""
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    monkeypatch.chdir(out)
    save_quantized(quantized(), tmp_path / "link" if place == "link" else ".")
    monkeypatch.undo()
    assert (tmp_path / "link").is_symlink()
    load_quantized(out)


def test_what_could_not_be_replaced_at_the_end_is_said_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(CheckpointError, match="link exists and is not empty: nothing is overwritten"):
        check_empty(tmp_path / "link")
    with pytest.raises(
        CheckpointError, match=r"volume is where a disk is mounted: choose a directory in it, .*volume/m"
    ):
        check_empty(tmp_path / "volume")
    with pytest.raises(CheckpointError, match=r"could not be written, nothing is left of it: .*File name too long"):
        save_quantized(quantized(), tmp_path / ("x" * 300))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "volume"]
