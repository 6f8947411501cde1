"""Save and load: bit-equal round trips, and files that are incomplete, inconsistent or hostile."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gptq_ao.checkpoint.files.shards
from gptq_ao import gptq_config, load_quantized, quantize_, save_quantized
from gptq_ao.codes.bit_stream import unpack_bits
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.integrations.transformers import load_model
from gptq_ao.tensor import GroupTensor, tensor_class

from ..models import seeded, tiny_llama, token_batches


def quantized_llama(**settings: Any) -> Any:
    model = tiny_llama(tied=settings.pop("tied", False), dtype=settings.pop("dtype", torch.float32))
    quantize_(model, gptq_config(**{"group_size": 32, **settings}, calibration=token_batches()))
    return model


def mlp() -> nn.Sequential:
    return seeded(nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 24)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "saved"
    save_quantized(quantized_llama(bits=4), directory, max_shard_bytes=50_000)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4},
        {"bits": 3, "sym": False, "tied": True},
        {"bits": 2, "act_order": "group"},
        {"bits": 8, "group_size": -1},
        {"bits": 4, "rules": {"re:.*down_proj": {"bits": 8}, "re:.*layers.0.*": None, "lm_head": {"bits": 3}}},
    ],
    ids=["4", "3-asym-tied", "2-group", "8-per-row", "mixed"],
)
def test_a_reload_gives_the_same_weights_and_logits(
    settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = quantized_llama(**settings, dtype=dtype)
    save_quantized(model, tmp_path / "out", max_shard_bytes=40_000)
    again: Any = load_quantized(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for batch in (*token_batches(1), *token_batches(1, rows=1, length=1)):
        with torch.no_grad():
            before, after = model(**batch).logits.float(), again(**batch).logits.float()
        # The weights are the same bits (below), but a tensor in a file is aligned otherwise, and a BLAS may then sum
        # in another order: per product at most 128 roundings of 2^-24 of the largest terms, some 20 products deep.
        rounding = 2**-24 if dtype == torch.float32 else 2**-8 / 128
        assert (before - after).abs().max() <= 20 * 128 * rounding * before.abs().max()
    assert not again.training
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert type(a) is type(b), name
        assert a.dtype == b.dtype
        parts = a.__tensor_flatten__()[0] if isinstance(a, GroupTensor) else []
        assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in parts) if parts else torch.equal(a, b)
        assert b.requires_grad == (a.requires_grad and not isinstance(b, GroupTensor))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == settings.get("tied", False)


def test_any_module_loads_into_a_model_of_its_class(tmp_path: Path) -> None:
    model = mlp()
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    model.train()(x)  # running statistics: buffers that must come along
    model.eval()
    quantize_(model, gptq_config(4, 32, calibration=[x]))
    save_quantized(model, tmp_path / "out")
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 24)).eval()
    assert load_quantized(other, tmp_path / "out") is other
    assert torch.equal(other(x), model(x))
    assert other[0].bias.requires_grad


def test_the_file_is_plain_and_portable(saved: Path) -> None:
    """Everything a reader without this package needs: codes as bit streams, scales, zero points."""
    manifest = json.loads((saved / "gptq_ao.json").read_text())
    name = "model.layers.1.mlp.down_proj.weight"
    entry = manifest["quantized"][name]
    assert (entry["bits"], entry["shape"], entry["groups"]) == (4, [64, 128], 4)
    parts = {
        p: load_file(saved / manifest["shards"][f"{name}.{p}"])[f"{name}.{p}"] for p in ("codes", "scale", "zero_point")
    }
    codes = unpack_bits(parts["codes"], 4, 128).view(64, 4, 32).int()
    assert (parts["codes"][:, 0] & 15).equal(codes[:, 0, 0].to(torch.uint8))
    weight = (codes - parts["zero_point"].int().unsqueeze(-1)) * parts["scale"].float().unsqueeze(-1)
    loaded: Any = load_quantized(saved).get_parameter(name)
    assert torch.equal(weight.view(64, 128), loaded.dequantize(torch.float32))


def test_it_holds_no_data_no_pickle_and_a_serialized_config_has_no_calibration(saved: Path) -> None:
    kinds = {p.suffix for p in saved.iterdir()}
    assert kinds == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("bits", "order"), [(4, False), (3, True)])
def test_a_stack_of_matrices(bits: int, order: bool, transposed: bool, tmp_path: Path) -> None:
    """The weights of experts, [E, N, K]; K no multiple of a byte's worth of codes nor of a tile."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (3, 20, 36), dtype=torch.uint8, generator=generator)
    scale = torch.rand(3, 20, 4, generator=generator).half()
    zero_point = torch.randint(0, 2**bits, (3, 20, 4), dtype=torch.uint8, generator=generator)
    perm = torch.randperm(36, generator=generator) if order else None
    weight = tensor_class(bits).from_codes(
        codes, scale, zero_point, dtype=torch.bfloat16, perm=perm, transposed=transposed
    )
    model = nn.ParameterDict({"experts": nn.Parameter(weight, requires_grad=False), "norm": torch.ones(3)})
    save_quantized(model, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "gptq_ao.json").read_text())
    assert manifest["format_version"] == 2
    assert manifest["quantized"]["experts"]["shape"] == [3, 20, 36]
    assert "view_as" not in manifest["quantized"]["experts"]
    shape = (3, 36, 20) if transposed else (3, 20, 36)
    other = nn.ParameterDict({"experts": torch.zeros(shape), "norm": torch.zeros(3)})
    again = load_quantized(other, tmp_path / "out").experts
    assert type(again) is type(weight)
    assert torch.equal(again.codes(), codes)
    assert torch.equal(again.dequantize(), weight.dequantize())
    with pytest.raises(CheckpointError, match=r"'experts' has shape \[3, .*in the model \[3, 20, 20\]"):
        load_quantized(nn.ParameterDict({"experts": torch.zeros(3, 20, 20), "norm": torch.zeros(3)}), tmp_path / "out")
    edit(tmp_path / "out", lambda m: m["quantized"]["experts"].update(shape=[1, 3, 20, 36]))
    with pytest.raises(CheckpointError, match=r"is damaged: ValueError: 'experts' cannot be"):
        load_quantized(other, tmp_path / "out")


def test_a_convolution_keeps_its_shape(tmp_path: Path) -> None:
    x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))

    def convolutions() -> nn.Sequential:
        return seeded(nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 1)))

    model = convolutions()
    report: Any = quantize_(model, gptq_config(4, 8, calibration=[x]))
    assert [w.shape for w in report.weights] == [(16, 8, 3, 3), (4, 16, 1, 1)]
    save_quantized(model, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "gptq_ao.json").read_text())
    assert manifest["format_version"] == 2
    assert manifest["quantized"]["0.weight"]["view_as"] == [16, 8, 3, 3]
    again = load_quantized(convolutions(), tmp_path / "out")
    assert torch.equal(again(x), model(x))
    edit(tmp_path / "out", lambda m: m["quantized"]["0.weight"].update(view_as=[16, 8, 3, 4]))
    with pytest.raises(CheckpointError, match=r"is damaged: ValueError: '0.weight' cannot be"):
        load_quantized(convolutions(), tmp_path / "out")


def test_nothing_is_overwritten(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists and is not empty: nothing is overwritten"):
        save_quantized(mlp(), saved)
    (tmp_path / "empty").mkdir()
    save_quantized(mlp(), tmp_path / "empty")
    assert (tmp_path / "empty" / "gptq_ao.json").is_file()


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"the disk of .*out is full: \d+ bytes needed, 1000 free"):
        save_quantized(mlp(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def fills_up(tensors: dict[str, torch.Tensor], path: Path, **kwargs: Any) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(gptq_ao.checkpoint.files.shards, "save_file", fills_up)
    with pytest.raises(CheckpointError, match=r"out could not be written, nothing is left of it: the disk is full"):
        save_quantized(mlp(), tmp_path / "out", max_shard_bytes=1000)
    assert written
    assert list(tmp_path.iterdir()) == []


def test_state_that_cannot_be_saved(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(CheckpointError, match=r"state '_extra_state' is a dict, not a tensor"):
        save_quantized(Extra(4, 4), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"'weight' is on the meta device"):
        save_quantized(nn.Linear(4, 4, device="meta"), tmp_path / "out")


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "gptq_ao.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


DOWN = "model.layers.0.mlp.down_proj.weight"

DAMAGED_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda m: m.update(format_version=4), r"has format version 4, this gptq_ao reads \(1, 2, 3\): up"),
    "no-version": (lambda m: m.pop("format_version"), r"has format version None"),
    "format": (lambda m: m.update(format="gguf"), r"is not a manifest of gptq_ao"),
    "no-shards": (lambda m: m.pop("shards"), r"is damaged: KeyError: 'shards'"),
    "bits": (
        lambda m: m["quantized"][DOWN].update(bits=5),
        r"is damaged: ValueError: 'model.layers.0.mlp.down_proj.weight'",
    ),
    "bits-lie": (
        lambda m: m["quantized"][DOWN].update(bits=8),
        r"tensor '.*codes' is .* the manifest says \('U8', \[64, 128",
    ),
    "negative": (lambda m: m["quantized"][DOWN].update(shape=[-64, 128]), r"is damaged: ValueError"),
    "huge": (lambda m: m["quantized"][DOWN].update(shape=[64, 2**40]), r"is damaged: ValueError"),
    "groups": (lambda m: m["quantized"][DOWN].update(groups=3), r"is damaged: ValueError"),
    "shape": (lambda m: m["quantized"][DOWN].update(shape=[64]), r"is damaged: ValueError"),
    "dtype": (lambda m: m["quantized"][DOWN].update(dtype="object"), r"is damaged: ValueError"),
    "transposed": (lambda m: m["quantized"][DOWN].update(transposed=1), r"is damaged: ValueError"),
    "dense-shape": (
        lambda m: m["dense"]["model.norm.weight"].update(shape=[65]),
        r"'model.norm.weight' is \('F32', \[64\]",
    ),
    "dense-dtype": (lambda m: m["dense"]["model.norm.weight"].update(dtype="I64"), r"'model.norm.weight' is \('F32'"),
    "unlisted": (
        lambda m: m["dense"].pop("model.norm.weight"),
        r"no shard, or no entry, for tensor 'model.norm.weight'",
    ),
    "unplaced": (
        lambda m: m["shards"].pop("model.norm.weight"),
        r"no shard, or no entry, for tensor 'model.norm.weight'",
    ),
    "tied-to-nothing": (lambda m: m["tied"].update(a="b"), r"is damaged: ValueError: a name is listed twice, or tied"),
    "traversal": (
        lambda m: m["shards"].update({"model.norm.weight": "../../secret.safetensors"}),
        r"names the shard '../../secret.safetensors': only plain \*.safetensors names",
    ),
    "absolute": (lambda m: m["shards"].update({"model.norm.weight": "/etc/passwd"}), r"names the shard '/etc/passwd'"),
    "pickle": (lambda m: m["shards"].update({"model.norm.weight": "weights.bin"}), r"names the shard 'weights.bin'"),
    "absent": (
        lambda m: m["shards"].update({"model.norm.weight": "model-9.safetensors"}),
        r"lacks the shard 'model-9.safetensors'",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_MANIFESTS)
def test_a_damaged_manifest(case: str, copy: Path) -> None:
    change, message = DAMAGED_MANIFESTS[case]
    edit(copy, change)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(copy)


def shard_of(directory: Path, tensor: str) -> Path:
    return directory / json.loads((directory / "gptq_ao.json").read_text())["shards"][tensor]


def tamper(directory: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace one stored tensor, or remove it."""
    path = shard_of(directory, tensor)
    tensors = load_file(path)
    new = change(tensors.pop(tensor).clone())
    save_file(tensors if new is None else {**tensors, tensor: new}, path)


DAMAGED_TENSORS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "missing": (f"{DOWN}.scale", lambda t: None, rf"lacks tensor '{DOWN}.scale'"),
    "shape": (
        f"{DOWN}.scale",
        lambda t: t[:, :2].contiguous(),
        r"is \('F16', \[64, 2\]\), the manifest says \('F16', \[64, 4",
    ),
    "dtype": (f"{DOWN}.codes", lambda t: t.to(torch.int32), r"is \('I32', \[64, 64\]\), the manifest says \('U8'"),
    "nan-scale": (f"{DOWN}.scale", lambda t: t.fill_(float("nan")), rf"weight '{DOWN}' is damaged: .*scale is NaN"),
    "zero-point": (
        f"{DOWN}.zero_point",
        lambda t: t.fill_(16),
        rf"weight '{DOWN}' is damaged: .*zero_point reach 16, 4 bits",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_TENSORS)
def test_damaged_tensors_leave_the_model_untouched(case: str, copy: Path) -> None:
    tensor, change, message = DAMAGED_TENSORS[case]
    tamper(copy, tensor, change)
    model = tiny_llama()
    before = {n: id(p) for n, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        load_quantized(model, copy)
    assert {n: id(p) for n, p in model.named_parameters()} == before


def test_a_permutation_that_is_none(tmp_path: Path) -> None:
    save_quantized(quantized_llama(bits=4, act_order="group"), tmp_path / "out")
    tamper(tmp_path / "out", f"{DOWN}.perm", lambda t: t.zero_())
    with pytest.raises(CheckpointError, match=r"perm is not a permutation of the 128 input features"):
        load_quantized(tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_a_truncated_shard(keep: int, copy: Path) -> None:
    path = shard_of(copy, f"{DOWN}.codes")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"is truncated, or not a safetensors file"):
        load_quantized(copy)


def test_a_link_out_of_the_directory(copy: Path, tmp_path: Path) -> None:
    path = shard_of(copy, f"{DOWN}.codes")
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"links to .*elsewhere.safetensors, outside the checkpoint"):
        load_quantized(copy)


def test_a_hub_cache_links_to_its_blobs(copy: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(copy.iterdir())):
        file.rename(blobs / f"{number}")
        (snapshot / file.name).symlink_to(blobs / f"{number}")
    assert load_quantized(snapshot) is not None


def test_no_manifest_and_no_json(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no gptq_ao.json: not a checkpoint .* whose writing was cut off"):
        load_quantized(tmp_path)
    (copy / "gptq_ao.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"is not JSON"):
        load_quantized(copy)


def test_a_model_that_does_not_fit(saved: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"does not fit the LlamaForCausalLM: it has 'model.layers.1.input_layernorm"
    ):
        load_quantized(tiny_llama(layers=1), saved)
    with pytest.raises(CheckpointError, match=r"does not fit the Sequential: it lacks '0.bias'"):
        load_quantized(mlp(), saved)
    wide = tiny_llama()
    wide.model.norm.weight = nn.Parameter(torch.ones(65))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has shape \[64\], in the model \[65\]"):
        load_quantized(wide, saved)


def test_a_config_that_cannot_be_built(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["MyOwnModel"]}))
    with pytest.raises(
        CheckpointError, match=r"names the architecture \['MyOwnModel'\].*code in a checkpoint is never run"
    ):
        load_quantized(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json, .* load_quantized\(model, directory\)"):
        load_quantized(copy)


def test_an_unsafe_index_is_refused_before_transformers_sees_it(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny_llama().save_pretrained(directory, max_shard_size="100KB")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../outside.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"names the shard '../outside.safetensors'"):
        load_model(str(directory))
    index.write_text("[]")
    with pytest.raises(CheckpointError, match=r"index.json is damaged"):
        load_model(str(directory))


def test_loading_allocates_no_dense_weight(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame of the model is on the meta device, computed buffers are not."""
    from gptq_ao.model.empty import empty_model

    register = nn.Module.register_parameter
    model = empty_model(saved)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert all(b.device.type == "cpu" for b in model.buffers())
    assert nn.Module.register_parameter is register
