"""Checkpoints that lie, by hand and by chance: one clear error, no model changed, nothing read from elsewhere."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gptq_ao import load_quantized, save_quantized
from gptq_ao.checkpoint.formats import open_quantized
from gptq_ao.checkpoint.source import source_of
from gptq_ao.errors import CheckpointError, GPTQError
from gptq_ao.tensor import GroupTensor

from ..models import tiny_llama
from .test_directories import quantized

Q = "model.layers.0.self_attn.q_proj"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each format, in one file."""
    made = {}
    model = quantized()
    for format in ("gptq", "compressed-tensors", "native", "awq", "mlx"):
        made[format] = tmp_path_factory.mktemp("hostile") / format
        save_quantized(model, made[format], format=format)
        if format == "native":  # as transformers writes it: config.json is the manifest
            (made[format] / "gptq_ao.json").unlink()
    return made


def copy_of(directory: Path, where: Path) -> Path:
    return Path(shutil.copytree(directory, where))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """The index follows."""
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file)
    edit_json(directory / INDEX, lambda c: c.update(weight_map=dict.fromkeys(tensors, file.name)))


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


TENSORS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "gptq-missing": ("gptq", lambda t: t.pop(f"{Q}.qzeros"), rf"module '{Q}' has .* and lacks 'qzeros'"),
    "gptq-float-codes": ("gptq", put(f"{Q}.qweight", lambda t: t.float()), r"are not a quantized weight"),
    "gptq-rows": ("gptq", put(f"{Q}.qweight", lambda t: t[:-1]), r"the tensors of '.*q_proj' contradict each other"),
    "gptq-columns": ("gptq", put(f"{Q}.scales", lambda t: t[:, :-1]), r"contradict each other"),
    "gptq-groups": ("gptq", put(f"{Q}.scales", lambda t: t[:1]), r"contradict each other"),
    "gptq-no-groups": ("gptq", put(f"{Q}.scales", lambda t: t[:0]), r"contradict each other"),
    "gptq-g_idx-short": ("gptq", put(f"{Q}.g_idx", lambda t: t[:-8]), r"contradict each other"),
    "gptq-g_idx-float": ("gptq", put(f"{Q}.g_idx", lambda t: t.float()), r"are not a quantized weight"),
    "gptq-g_idx-out": ("gptq", put(f"{Q}.g_idx", lambda t: t + 1), r"'.*q_proj.weight' is damaged: g_idx reaches"),
    "gptq-g_idx-huge": ("gptq", put(f"{Q}.g_idx", lambda t: t.fill_(2**31 - 1)), r"g_idx reaches from 2147483647"),
    "gptq-g_idx-below": ("gptq", put(f"{Q}.g_idx", lambda t: t - 1), r"g_idx reaches from -1 to"),
    "gptq-nan": ("gptq", put(f"{Q}.scales", lambda t: t.fill_(float("nan"))), r"a scale is not finite"),
    "gptq-twice": ("gptq", lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64)}), r"there twice, dense and"),
    "gptq-unknown": ("gptq", lambda t: t.update({"extra.weight": torch.zeros(3)}), r"has 'extra.weight', which"),
    "gptq-gone": ("gptq", lambda t: [t.pop(n) for n in list(t) if n.startswith(Q)], rf"it lacks '{Q}.weight'"),
    "gptq-dense-only": ("gptq", lambda t: [t.pop(n) for n in list(t) if "proj" in n], r"and has no quantized weight"),
    "ct-missing": ("compressed-tensors", lambda t: t.pop(f"{Q}.weight_shape"), r"and lacks 'weight_shape'"),
    "ct-shape": (
        "compressed-tensors",
        put(f"{Q}.weight_shape", lambda t: torch.tensor([64, 2**40])),
        r"whose weight_shape is \[64, 1099511627776\], contradict each other",
    ),
    "ct-negative": ("compressed-tensors", put(f"{Q}.weight_shape", lambda t: -t), r"contradict each other"),
    "ct-narrow": ("compressed-tensors", put(f"{Q}.weight_shape", lambda t: t - 8), r"contradict each other"),
    "ct-shape-type": ("compressed-tensors", put(f"{Q}.weight_shape", lambda t: t.int()), r"are not a quantized weight"),
    "ct-scale": ("compressed-tensors", put(f"{Q}.weight_scale", lambda t: t[:, :1]), r"contradict each other"),
    "ct-zero-point": (
        "compressed-tensors",
        lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(8, 2, dtype=torch.int32)}),
        r"contradict each other",
    ),
    "ct-inf": ("compressed-tensors", put(f"{Q}.weight_scale", lambda t: t.fill_(float("inf"))), r"is not finite"),
    "awq-missing": ("awq", lambda t: t.pop(f"{Q}.qzeros"), rf"module '{Q}' has .* and lacks 'qzeros'"),
    "awq-float-codes": ("awq", put(f"{Q}.qweight", lambda t: t.float()), r"are not a quantized weight"),
    "awq-wide-codes": ("awq", put(f"{Q}.qweight", lambda t: t.long()), r"are not a quantized weight"),
    "awq-flat-codes": ("awq", put(f"{Q}.qweight", lambda t: t.flatten()), r"are not a quantized weight"),
    "awq-integer-scales": ("awq", put(f"{Q}.scales", lambda t: t.int()), r"are not a quantized weight"),
    "awq-rows": ("awq", put(f"{Q}.qweight", lambda t: t[:-1]), r"the tensors of '.*q_proj' contradict each other"),
    "awq-columns": ("awq", put(f"{Q}.qweight", lambda t: t[:, 1:]), r"contradict each other"),
    "awq-scales": ("awq", put(f"{Q}.scales", lambda t: t[:, :-1]), r"contradict each other"),
    "awq-groups": ("awq", put(f"{Q}.scales", lambda t: t[:1]), r"contradict each other"),
    "awq-zero-points": ("awq", put(f"{Q}.qzeros", lambda t: t[:1]), r"contradict each other"),
    "awq-no-rows": ("awq", put(f"{Q}.qweight", lambda t: t[:0]), r"contradict each other"),
    "awq-transposed": ("awq", put(f"{Q}.qweight", lambda t: t.T), r"contradict each other"),
    "awq-nan": ("awq", put(f"{Q}.scales", lambda t: t.fill_(float("nan"))), r"a scale is not finite"),
    "awq-twice": ("awq", lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64)}), r"there twice, dense and"),
    "awq-gone": ("awq", lambda t: [t.pop(n) for n in list(t) if n.startswith(Q)], rf"it lacks '{Q}.weight'"),
    "awq-activations": (
        "awq",
        lambda t: t.update({"model.layers.0.mlp.act.scales": torch.ones(64).half()}),
        r"scales activations: 'model.layers.0.mlp.act.scales', \[64\], is what .* the unquantized model has no place",
    ),
    "mlx-missing": ("mlx", lambda t: t.pop(f"{Q}.biases"), rf"module '{Q}' has .* and lacks 'biases'"),
    "mlx-signed-codes": ("mlx", put(f"{Q}.weight", lambda t: t.view(torch.int32)), r"are not a quantized weight"),
    "mlx-dense-codes": ("mlx", put(f"{Q}.weight", lambda t: t.float()), r"are not a quantized weight"),
    "mlx-integer-scales": ("mlx", put(f"{Q}.scales", lambda t: t.int()), r"are not a quantized weight"),
    "mlx-flat-biases": ("mlx", put(f"{Q}.biases", lambda t: t.flatten()), r"are not a quantized weight"),
    "mlx-rows": ("mlx", put(f"{Q}.weight", lambda t: t[:-1]), r"the tensors of '.*q_proj' contradict each other"),
    "mlx-groups": ("mlx", put(f"{Q}.scales", lambda t: t[:, :1]), r"contradict each other"),
    "mlx-no-groups": (
        "mlx",
        lambda t: t.update({f"{Q}.{p}": t[f"{Q}.{p}"][:, :0] for p in ("weight", "scales", "biases")}),
        r"contradict each other",
    ),
    "mlx-nan": ("mlx", put(f"{Q}.scales", lambda t: t.fill_(float("nan"))), r"a scale is not finite"),
    "mlx-inf": ("mlx", put(f"{Q}.biases", lambda t: t.fill_(float("inf"))), r"a bias is not finite"),
    "mlx-no-step": ("mlx", put(f"{Q}.scales", lambda t: t.zero_()), r"a group has the scale 0, and a bias"),
    "mlx-one-side": ("mlx", put(f"{Q}.biases", lambda t: t * 40), r"so far on one side of zero that no zero point"),
    "mlx-unknown": ("mlx", lambda t: t.update({"extra.weight": torch.zeros(3)}), r"has 'extra.weight', which"),
    "mlx-gone": (
        "mlx",
        lambda t: [t.pop(f"{Q}.{p}") for p in ("weight", "scales", "biases")],
        rf"it lacks '{Q}.weight'",
    ),
    "mlx-flat-stack": (
        "mlx",
        lambda t: t.update({"model.layers.0.mlp.switch_mlp.up_proj.weight": torch.tensor(1.0)}),
        r"should be a stack, and is a single number",
    ),
    "native-missing": ("native", lambda t: t.pop(f"{Q}.weight.scale"), r"tensor '.*weight.scale' is missing"),
    "native-shape": ("native", put(f"{Q}.weight.codes", lambda t: t[:-1]), r"tensor '.*codes' is .*config.json says"),
    "native-unknown": (
        "native",
        lambda t: t.update({"a.codes": torch.zeros(2)}),
        r"it has 'a.codes', which the model does not",
    ),
    "native-zero-point": ("native", put(f"{Q}.weight.zero_point", lambda t: t.fill_(16)), r"zero_point reach 16, 4"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_lie(case: str, originals: dict[str, Path], tmp_path: Path) -> None:
    format, change, message = TENSORS[case]
    directory = copy_of(originals[format], tmp_path / "copy")
    edit_tensors(directory, change)
    model = tiny_llama()
    before = {n: (id(p), p.clone()) for n, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        load_quantized(model, directory)
    assert all(id(p) == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "method": (lambda q: q.update(quant_method="hqq"), r"is quantized with 'hqq', which cannot be read"),
    "no-method": (lambda q: q.pop("quant_method"), r"is quantized with None"),
    "bits-lie": (lambda q: q.update(bits=8), r"the config \(\[8\] bits, groups of \[32\]\) and the tensors"),
    "bits-not": (lambda q: q.update(bits="4"), r"'bits' is '4', not a number"),
    "bits-huge": (lambda q: q.update(bits=2**70), r"weights of 1180591620717411303424 bits"),
    "group-lies": (lambda q: q.update(group_size=64), r"contradict each other"),
    "group-huge": (lambda q: q.update(group_size=2**70), r"contradict each other"),
    "format": (lambda q: q.update(checkpoint_format="exllama"), r"of the format 'exllama' cannot be read"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_lie(case: str, originals: dict[str, Path], tmp_path: Path) -> None:
    change, message = CONFIGS[case]
    directory = copy_of(originals["gptq"], tmp_path / "copy")
    (directory / "quantize_config.json").unlink()
    edit_json(directory / "config.json", lambda c: change(c["quantization_config"]))
    with pytest.raises(CheckpointError, match=message):
        load_quantized(directory)


MLX_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "mode": (lambda q: q.update(mode="mxfp4"), r"MLX weights of the mode 'mxfp4', and only 'affine' can be read"),
    "own-mode": (
        lambda q: q.update({Q: {"mode": "nvfp4"}}),
        rf"the config of '{Q}' has .* of the mode 'nvfp4'",
    ),
    "bits-lie": (lambda q: q.update(bits=8), r"the config \(MLX, 8 bits, groups of 32\) and the tensors of"),
    "bits-7": (lambda q: q.update(bits=7), r"the config is damaged: bits is 7 .* one of 2, 3, 4, 5, 6, 8"),
    "bits-true": (lambda q: q.update(bits=True), r"bits is True"),
    "bits-text": (lambda q: q.update(bits="4"), r"bits is '4'"),
    "bits-huge": (lambda q: q.update(bits=2**70), r"bits is 1180591620717411303424"),
    "group-lies": (lambda q: q.update(group_size=64), r"contradict each other"),
    "group-none": (lambda q: q.update(group_size=0), r"group_size 0"),
    "group-huge": (lambda q: q.update(group_size=2**70), r"contradict each other"),
    "own-lies": (lambda q: q.update({Q: {"bits": 2}}), rf"2 bits, groups of 32\) and the tensors of '{Q}' contradict"),
    "own-text": (lambda q: q.update({Q: "4"}), rf"the config of '{Q}' is damaged: it is '4', not an object"),
    "dense": (lambda q: q.update({Q: False}), rf"the config says that '{Q}' is not quantized, and it has scales"),
}


@pytest.mark.parametrize("case", MLX_CONFIGS)
def test_mlx_configs_that_lie(case: str, originals: dict[str, Path], tmp_path: Path) -> None:
    change, message = MLX_CONFIGS[case]
    directory = copy_of(originals["mlx"], tmp_path / "copy")
    edit_json(directory / "config.json", lambda c: change(c["quantization_config"]))
    with pytest.raises(CheckpointError, match=message):
        load_quantized(directory)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"quantization_config": 3}', '{"a": ' + "[" * 200_000], ids=range(5))
def test_configs_that_are_none(text: str, originals: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(originals["gptq"], tmp_path / "copy")
    (directory / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json is (not JSON|damaged)"):
        load_quantized(directory)


AWAY = ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "..", "a\0.safetensors"]


@pytest.mark.parametrize("name", AWAY)
def test_an_index_that_leads_away(name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(originals["gptq"], tmp_path / "copy")
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "x.safetensors")
    edit_json(directory / INDEX, lambda c: c["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(CheckpointError, match=r"names the shard .*only plain \*.safetensors names are allowed"):
        load_quantized(directory)


def test_a_link_that_leads_away(originals: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(originals["gptq"], tmp_path / "copy")
    file = next(directory.glob("*.safetensors"))
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"links to .*elsewhere.safetensors, outside the checkpoint"):
        load_quantized(directory)


def test_a_tensor_in_two_shards(originals: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(originals["gptq"], tmp_path / "copy")
    save_file({"model.norm.weight": torch.ones(64), "one": torch.ones(1)}, directory / "b.safetensors")
    edit_json(directory / INDEX, lambda c: c["weight_map"].update(one="b.safetensors"))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is in b.safetensors, the index says otherwise"):
        load_quantized(directory)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1])
def test_a_header_that_claims_to_be_huge(length: int, originals: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(originals["gptq"], tmp_path / "copy")
    file = next(directory.glob("*.safetensors"))
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=r"is truncated, or not a safetensors file"):
        load_quantized(directory)


def test_no_pickle_is_read(originals: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(originals["gptq"], tmp_path / "copy")
    for file in (*directory.glob("*.safetensors"), directory / INDEX):
        file.unlink()
    torch.save({"a": torch.ones(1)}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no safetensors to read"):
        load_quantized(directory)


def test_no_code_of_a_checkpoint_runs(originals: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(originals["gptq"], tmp_path / "copy")
    (directory / "evil.py").write_text("raise SystemExit('ran')")
    change = {"architectures": ["Evil"], "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    edit_json(directory / "config.json", lambda c: c.update(change))
    with pytest.raises(CheckpointError, match=r"code in a checkpoint is never run"):
        load_quantized(directory)


BYTES = st.binary(min_size=1, max_size=8)
VALUES: list[Any] = [None, True, -1, 0, 3, 5, 2**31, 2**63, 1.5, "x", "", [], {}, [[]], {"a": None}]
JUNK = st.sampled_from(VALUES)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors", "native", "mlx"])
def test_changed_bytes_are_an_error_or_a_weight(format: str, originals: dict[str, Path], tmp_path: Path) -> None:
    """Any bytes written over the start of a file (its header and first tensors): an error of ours, or numbers that are
    finite and of the right shapes, as they were."""
    directory = copy_of(originals[format], tmp_path / "copy")
    file = next(directory.glob("*.safetensors"))
    good, model = file.read_bytes(), tiny_llama()
    (header,) = struct.unpack("<Q", good[:8])

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(0, header + 200), BYTES)
    def check(at: int, junk: bytes) -> None:
        file.write_bytes(good[:at] + junk + good[at + len(junk) :])
        assert_error_or_weights(directory, model)

    check()


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors", "native", "mlx"])
def test_changed_configs_are_an_error_or_a_weight(format: str, originals: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(originals[format], tmp_path / "copy")
    good, model = json.loads((directory / "config.json").read_text()), tiny_llama()
    paths = list(leaves(good["quantization_config"]))[:60]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.sampled_from(paths), JUNK)
    def check(path: tuple[Any, ...], junk: Any) -> None:
        content = json.loads(json.dumps(good))
        place = content["quantization_config"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = junk
        (directory / "config.json").write_text(json.dumps(content))
        assert_error_or_weights(directory, model)

    (directory / "quantize_config.json").unlink(missing_ok=True)
    check()


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Any:
    """Paths to all values, inner ones included."""
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield (*path, key)
        yield from leaves(content[key], (*path, key))


def assert_error_or_weights(directory: Path, model: nn.Module) -> None:
    try:
        files = open_quantized(directory)
        source_of(directory, files.tensors, model)
        weights = {name: tensor.read() for name, tensor in files.tensors.items()}
    except GPTQError:
        return
    for name, weight in weights.items():
        if isinstance(weight, GroupTensor):
            assert weight.dequantize(torch.float32).isfinite().all(), name
            assert weight.scale.isfinite().all()
            assert int(weight.codes().max()) < 2**weight.bits
