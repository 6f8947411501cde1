"""A checkpoint of which every rank writes some shards: the tensors are those that one rank would write."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptq_ao import gptq_config, load_quantized, quantize_checkpoint
from gptq_ao.errors import CheckpointError, ConfigError
from tests.checkpoint.test_origin import FAMILIES, glm
from tests.checkpoint.test_origin import source as with_more
from tests.models import tiny_llama, token_batches
from tests.ranks import on_ranks, outcomes, some


def source(directory: Path, family: str = "llama") -> str:
    if family == "glm":  # with tensors that its class does not use
        return str(with_more(directory, glm(), FAMILIES["glm4_moe"][1]))
    tiny_llama(tied=family == "tied").save_pretrained(directory)
    return str(directory)


def quantized(source: str, out: str, sharding: str, settings: dict[str, Any], limit: int) -> tuple[Any, list[int]]:
    """What it says, and the bytes that each rank has written."""
    from gptq_ao.checkpoint.native.write import CheckpointWriter

    seen: list[int] = []
    finish = CheckpointWriter.finish_checkpoint

    def noted(self: Any, *args: Any) -> None:
        seen.extend(self._stored)
        finish(self, *args)

    CheckpointWriter.finish_checkpoint = noted  # type: ignore[method-assign, assignment]  # the process ends
    made = gptq_config(**{"bits": 4, "group_size": 32, "effort": "fast", "calibration": token_batches(3), **settings})
    report = quantize_checkpoint(
        source, out, made, distributed=True, output_sharding=sharding, max_shard_bytes=limit
    ).to_dict()
    return {k: v for k, v in report.items() if k not in ("seconds", "peak_bytes")}, seen


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """By the index; all files are in it, numbered without a gap."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in directory.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum((directory / f).stat().st_size for f in files)
    held = {file: load_file(directory / file) for file in files}
    assert sum(map(len, held.values())) == len(index["weight_map"])
    return {name: held[file][name] for name, file in index["weight_map"].items()}


CASES: list[tuple[int, dict[str, Any], int, str]] = [
    (3, {"method": "rtn", "calibration": None}, 2**14, "glm"),
    (2, {}, 2**14, "llama"),
    (3, {"act_order": "group", "bits": 3}, 2**20, "tied"),
    (2, {"rules": {"re:.*self_attn.*": None}}, 1, "llama"),
]


@pytest.mark.parametrize(("ranks", "settings", "limit", "family"), some(CASES))
def test_the_tensors_are_those_that_one_rank_writes(
    ranks: int, settings: dict[str, Any], limit: int, family: str, tmp_path: Path
) -> None:
    """Shards of one tensor each, and such as hold all that a rank has."""
    given = source(tmp_path / "model", family)
    by_first, by_rank = tmp_path / "first", tmp_path / "rank"
    expected = on_ranks(quantized, given, f"{by_first}", "first", settings, limit, ranks=ranks)
    found = on_ranks(quantized, given, f"{by_rank}", "rank", settings, limit, ranks=ranks)
    assert all(report == expected[0][0] for report, _ in found)
    written, theirs = tensors(by_rank), tensors(by_first)
    assert written.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in written.items())
    assert family != "glm" or "model.layers.92.eh_proj.weight" in written
    # About the same for each: none has more than another by more than the largest parameter.
    model, other = load_quantized(by_rank), load_quantized(by_first)
    stored, largest = found[0][1], max(p.nbytes for p in model.parameters())
    assert all(each == stored for _, each in found)
    assert max(stored) - min(stored) <= largest
    assert len(stored) == ranks
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "model", "rank"]
    manifests = [json.loads((d / "gptq_ao.json").read_text()) for d in (by_rank, by_first)]
    assert all(m.pop("shards") for m in manifests)
    assert manifests[0] == manifests[1]
    assert all(torch.equal(p, other.get_parameter(n)) for n, p in model.named_parameters())
    assert sorted(p.name for p in by_rank.iterdir() if p.suffix != ".safetensors") == sorted(
        p.name for p in by_first.iterdir() if p.suffix != ".safetensors"
    )


def refused(name: str, given: str, out: str) -> None:
    from gptq_ao.checkpoint.files import shared
    from gptq_ao.checkpoint.files.shards import ShardWriter

    rank, sharding = torch.distributed.get_rank(), "rank"
    shared._PATIENCE = 0.2
    if name == "another disk" and rank == 1:
        out = f"{Path(out).parent / 'elsewhere' / 'out'}"
    if name == "different" and rank == 1:
        sharding = "first"
    if name == "full disk" and rank == 1:

        def fails(self: Any) -> None:
            raise OSError(28, "No space left on device")

        ShardWriter._flush = fails  # type: ignore[method-assign]
    made = gptq_config(4, 32, effort="fast", calibration=token_batches(2))
    quantize_checkpoint(given, out, made, distributed=True, output_sharding=sharding, max_shard_bytes=2**14)


REFUSED = {
    "another disk": "every rank is to write its shards into .*, and rank 1 does not see there what rank 0 has",
    "different": r"the ranks were given different output_sharding, \['rank', 'first'\]",
    "full disk": "could not be written, nothing is left of it: the disk is full",
}


@pytest.mark.parametrize("name", some(REFUSED, 2))
def test_what_one_rank_cannot_do_is_an_error_of_all(name: str, tmp_path: Path) -> None:
    given = source(tmp_path / "model")
    for found in outcomes(refused, name, given, f"{tmp_path / 'out'}", seconds=60):
        assert found.error is not None
        assert re.search(REFUSED[name], found.error), found.error
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*/*/*.safetensors"))


def test_one_process_writes_all(tmp_path: Path) -> None:
    config = gptq_config(4, 32, method="rtn")
    quantize_checkpoint(source(tmp_path / "model"), tmp_path / "out", config, output_sharding="rank")
    assert tensors(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"output_sharding is 'all': give \"first\" or \"rank\""):
        quantize_checkpoint(tmp_path / "model", tmp_path / "other", config, output_sharding="all")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", config, output_sharding="rank")
