import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_ao.errors import TuningError
from gptq_ao.inference.tune import tune
from gptq_ao.kernels.tuning.candidates import candidates, variations
from gptq_ao.kernels.tuning.heuristics import LinearConfig, choose, computes
from gptq_ao.kernels.tuning.measured import VARIABLE, Product, Tuned, default_path, load, save
from gptq_ao.recipe import Recipe

PRODUCT = Product(16, 4096, 4096, 4, 128)
ENTRIES = {
    PRODUCT: Tuned(LinearConfig(16, 64, 128, warps=4, split=8), 4.25),
    dataclasses.replace(PRODUCT, rows=256): Tuned(None, 17.5),
}


def test_a_file_says_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tuned.json"
    assert load(path) == {}
    save(path, "a GPU", ENTRIES)
    assert load(path) == ENTRIES
    assert [p.name for p in path.parent.iterdir()] == ["tuned.json"]


def damaged(change: Any) -> str:
    content: Any = {
        "format": 1,
        "entries": [{"product": dataclasses.asdict(p), **dataclasses.asdict(t)} for p, t in ENTRIES.items()],
    }
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'format'"),
        (damaged(lambda c: c.update(format=2)), "its format is 2, this version reads 1"),
        (damaged(lambda c: c["entries"][0]["config"].pop("warps")), "warps"),
        (damaged(lambda c: c["entries"][0]["config"].update(turbo=1)), "turbo"),
        (damaged(lambda c: c["entries"][0]["config"].update(split="8")), "split is '8'"),
        (damaged(lambda c: c["entries"][0]["product"].update(rows=-1)), "rows is -1"),
        (damaged(lambda c: c["entries"][0]["config"].update(block_k=256)), "does not compute"),
        (damaged(lambda c: c["entries"][0].pop("microseconds")), "microseconds"),
    ],
)
def test_a_damaged_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(TuningError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "delete it" in str(caught.value)


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path("NVIDIA H200 (MIG 1g)") == tmp_path / "gptq_ao" / "NVIDIA-H200-MIG-1g.json"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine.json"))
    assert default_path("NVIDIA H200") == tmp_path / "mine.json"


def test_nothing_to_tune() -> None:
    with pytest.raises(TuningError, match="no quantized matrix of the model is on a GPU"):
        tune(torch.nn.Linear(8, 8))


SIZES = [(96, 1536), (4096, 3072), (4096, 4096), (28672, 4096), (4096, 14336), (100, 300), (16, 64)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 256, 384, 0])
def test_all_that_is_chosen_or_tried_computes_the_product(bits: int, group: int) -> None:
    chosen = 0
    for n, k in SIZES:
        size = group or k
        for rows in (1, 8, 9, 16, 33, 64, 65, 200, 256):
            for capability, sms in ((8, 108), (9, 132)):
                c = choose(rows, n, k, bits, size, 1, sms, capability)
                assert c is None or computes(c, bits, size, k)
                assert c is None or c.block_m >= min(rows, 64) or rows > 64
                chosen += c is not None
        if k % size == 0:
            for rows in (1, 16, 64, 256):
                for tried in candidates(rows, n, k, bits, size, 132, 9):
                    assert computes(tried, bits, size, k)
                    assert all(computes(v, bits, size, k) for v in variations(tried, size, k, 9))
    assert chosen


def test_how_often_columns_are_split() -> None:
    """So that multiprocessors have enough to do, but not into too many parts, nor parts of nothing."""
    sizes = [(128, 128), (256, 16384), (8192, 8192), (28672, 4096)]
    chosen = [choose(1, n, k, 4, 128, 1, 132, 9) for n, k in sizes]
    assert [c and c.split for c in chosen] == [1, 16, 4, 1]


def test_what_the_kernel_does_not_compute() -> None:
    assert choose(1, 4096, 4096, 4, 96, 1, 132, 9) is None  # a group that no block fits
    assert choose(257, 4096, 4096, 4, 128, 1, 132, 9) is None
    assert choose(65, 4096, 4096, 4, 128, 1, 108, 8) is None
    c = LinearConfig(8, 64, 128, warps=4)
    assert computes(c, 4, 128, 4096)
    assert not computes(c, 4, 64, 4096)  # two groups, and sums are scaled
    assert computes(dataclasses.replace(c, scale_sum=False), 4, 64, 4096)
    assert not computes(dataclasses.replace(c, block_k=64), 2, 128, 4096)  # half a tile
    assert not computes(dataclasses.replace(c, slices=2), 4, 128, 4096)
    assert not computes(dataclasses.replace(c, per_sm=9), 4, 128, 4096)
    assert not computes(dataclasses.replace(c, stages=0), 4, 128, 4096)


@pytest.mark.gpu
def test_tuning_changes_what_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptq_ao.kernels import cuda
    from gptq_ao.solver.solve import round_to_nearest
    from gptq_ao.tensor import tensor_class

    path = tmp_path / "tuned.json"
    monkeypatch.setenv(VARIABLE, str(path))
    cuda.forget()
    s = round_to_nearest(torch.randn(2048, 1024).cuda(), Recipe(4, 128))
    layer = torch.nn.Linear(1024, 2048, bias=False, device="cuda", dtype=torch.bfloat16)
    weight = tensor_class(4).from_codes(s.codes, s.scale, s.zero_point, dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    x = torch.randn(3, 1024, device="cuda", dtype=torch.bfloat16)
    before = layer(x)
    assert tune(layer, rows=[3]) == path
    (product,) = load(path)
    assert product == Product(8, 2048, 1024, 4, 128)
    assert cuda._config(8, 2048, 1024, 4, 128, 1, x.device) == load(path)[product].config
    assert (layer(x) - before).abs().max() <= 2**-6 * before.abs().max()
    cuda.forget()
