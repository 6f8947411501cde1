"""One model, quantized by several processes together: what one process makes of it, on every rank."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_ao import gptq_config, load_quantized, quantize_, quantize_checkpoint
from gptq_ao.codes.reinterpret import reinterpret
from gptq_ao.config import GPTQConfig
from gptq_ao.errors import CheckpointError, ConfigError, FusedSettingsWarning, TrainingWarning
from gptq_ao.tensor import GroupTensor
from tests.ranks import on_ranks, outcomes, some

from ..models import tiny_llama, token_batches

TINY_LM = Path(__file__).parents[2] / "examples" / "tiny_lm"


class Mixture(nn.Module):
    """Experts as one parameter; a router that never chooses the last of them, and a residual stream."""

    def __init__(self, experts: int = 4, width: int = 32) -> None:
        super().__init__()
        self.experts, self.embed = experts, nn.Embedding(96, width)
        self.up = nn.Parameter(torch.empty(experts, 2 * width, width))
        self.down = nn.Parameter(torch.empty(experts, width, 2 * width))
        self.head = nn.Linear(width, 96)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        chosen = nn.functional.one_hot(input_ids % (self.experts - 1), self.experts).to(x.dtype)
        rows = torch.einsum("bte,btk->ebtk", chosen, x).flatten(1, 2)
        y = torch.bmm(torch.relu(torch.bmm(rows, self.up.mT)), self.down.mT)
        y = torch.einsum("bte,ebtk->btk", chosen, y.unflatten(1, input_ids.shape))
        return self.head(x + y)


def mixture() -> nn.Module:
    from ..models import seeded

    return seeded(Mixture())


def cases() -> dict[str, tuple[Any, list[Any], dict[str, Any]]]:
    """Name → model, batches, settings."""
    data = token_batches()
    uneven = [{"input_ids": b["input_ids"][: 1 + i % 2, : 40 - 7 * i]} for i, b in enumerate(token_batches(5))]
    padded = [{**b, "attention_mask": (torch.arange(40) < 40 - 9 * i).long().expand(2, 40)} for i, b in enumerate(data)]
    return {
        "default": (tiny_llama, data, {}),
        "one batch": (tiny_llama, data[:1], {}),
        "three batches of one sequence": (
            tiny_llama,
            [{"input_ids": data[0]["input_ids"][:1]}] * 3,
            {"effort": "fast"},
        ),
        "batches of different sizes": (tiny_llama, uneven, {"effort": "fast"}),
        "padding": (tiny_llama, padded, {"effort": "fast"}),
        "experts": (mixture, data, {"expert_min_rows": 100}),
        "experts, one batch": (mixture, data[:1], {"effort": "fast"}),
        "adapters": (tiny_llama, data[:2], {"bits": 3, "adapter_rank": 2, "effort": "fast"}),
        "target_bits": (tiny_llama, data, {"target_bits": 5.2, "candidates": (3, 4, 8), "effort": "fast"}),
        "act_order group": (tiny_llama, data, {"act_order": "group", "effort": "max"}),
        "asymmetric, static, 3 bits": (tiny_llama, data, {"act_order": "static", "sym": False, "bits": 3}),
        "several recipes, some rounded": (
            tiny_llama,
            data,
            {"rules": {"re:.*v_proj": {"bits": 8}, "re:.*up_proj": {"method": "rtn"}, "re:.*q_proj": None}},
        ),
        "rounding to nearest": (tiny_llama, data, {"method": "rtn"}),
        "dead rows": (tiny_llama, [{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}] * 2, {"effort": "fast"}),
    }


def config(batches: list[Any], settings: dict[str, Any]) -> GPTQConfig:
    return gptq_config(**{"bits": 4, "group_size": 32, **settings}, calibration=batches)


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.codes() for n, p in model.named_parameters() if isinstance(p, GroupTensor)}


def fingerprint(model: nn.Module) -> str:
    """Of everything in the model."""
    hashed = hashlib.sha256()
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        inner = [getattr(p, n) for n in p.__tensor_flatten__()[0]] if isinstance(p, GroupTensor) else [p]
        for t in inner:
            hashed.update(name.encode() + reinterpret(t.detach().flatten(), torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def told(report: Any) -> dict[str, Any]:
    adapter = {n: [t.tolist() for t in (a.A, a.B)] for n, a in report.adapter.items()}
    return {**report.to_dict(), "adapter": adapter}


def quantized(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    make, batches, settings = cases()[name]
    model = make()
    state = torch.get_rng_state()
    report: Any = quantize_(model, config(batches, settings), distributed=True)
    assert torch.equal(state, torch.get_rng_state())
    return fingerprint(model), told(report), {n: c.numpy() for n, c in codes(model).items()}


WARNS = pytest.mark.filterwarnings("ignore::gptq_ao.errors.FusedSettingsWarning")


@WARNS
@pytest.mark.parametrize("name", some(cases()))
@pytest.mark.parametrize("ranks", some([2, 3]))
def test_what_one_process_makes_of_it(name: str, ranks: int) -> None:
    make, batches, settings = cases()[name]
    found = on_ranks(quantized, name, ranks=ranks)
    prints, reports, _ = zip(*found, strict=True)
    assert len(set(prints)) == 1
    assert all(report == reports[0] for report in reports)

    model = make()
    alone: Any = quantize_(model, config(batches, settings))
    expected, report = told(alone), reports[0]
    for name, of_one in codes(model).items():
        # Sums in another order; a code may be at the border of two.
        assert (of_one == torch.from_numpy(found[0][2][name])).float().mean() >= 0.999, name
    for ours, theirs in zip(report.pop("layers"), expected.pop("layers"), strict=True):
        for what in ("error", "damp"):
            a, b = ours.pop(what), theirs.pop(what)
            assert a == b or a == pytest.approx(b, rel=2e-3, abs=1e-9), (ours["name"], what)
        assert ours == theirs
    for what in ("seconds", "peak_bytes", "adapter", "precision"):
        assert report.pop(what).__class__ is expected.pop(what).__class__
    assert report == expected


def streamed(source: str, out: str, recipe: str) -> tuple[dict[str, Any], int]:
    """The report, and how many quantized weights this rank kept at most."""
    from gptq_ao.pipeline import quantize_checkpoint as module

    kept = [0]
    replace = module.CheckpointWeights.replace

    def counted(self: Any, name: str, new: Tensor) -> None:
        replace(self, name, new)
        kept.append(len(self._kept))

    module.CheckpointWeights.replace = counted  # type: ignore[method-assign]  # the process ends with the case
    settings = {"effort": recipe} if recipe != "rtn" else {"method": "rtn"}
    report = quantize_checkpoint(source, out, config(token_batches(), settings), distributed=True)
    return report.to_dict(), max(kept)


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["default", "rtn"])
def test_a_directory_is_written_by_one_of_them(recipe: str, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    (first, by_writer), (second, by_other) = on_ranks(streamed, f"{tmp_path / 'model'}", f"{tmp_path / 'out'}", recipe)
    assert first == second
    assert by_writer == 0
    assert by_other < (5 if recipe == "default" else 2)  # of 14: those that the next segments read
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    quantize_(model, config(token_batches(), {"effort": recipe} if recipe != "rtn" else {"method": "rtn"}))
    found = codes(load_quantized(tmp_path / "out"))
    for name, expected in codes(model).items():
        assert (found[name] == expected).float().mean() >= 0.999, name


def full_disk(source: str, out: str) -> None:
    """On the machine of the one that writes."""
    if torch.distributed.get_rank() == 0:
        from gptq_ao.checkpoint.native.write import CheckpointWriter

        def fails(*args: Any) -> None:
            raise CheckpointError("the disk is full")

        CheckpointWriter.finish_checkpoint = fails  # type: ignore[method-assign, assignment]
    quantize_checkpoint(source, out, config(token_batches(), {"effort": "fast"}), distributed=True)


@pytest.mark.long
def test_what_the_writer_cannot_write_is_an_error_of_all(tmp_path: Path) -> None:
    tiny_llama(layers=1).save_pretrained(tmp_path / "model")
    ours, theirs = outcomes(full_disk, f"{tmp_path / 'model'}", f"{tmp_path / 'out'}")
    assert (ours.error or "").startswith("gptq_ao.errors.CheckpointError: the disk is full")
    assert (theirs.error or "").startswith("gptq_ao.errors.CheckpointError: rank 0: CheckpointError: the disk is full")
    # What was finished is kept, and there is no result.
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.journal", "model"]


def again(count: int) -> list[str]:
    prints = []
    for _ in range(count):
        model = tiny_llama(layers=1)
        quantize_(model, config(token_batches(), {}), distributed=True)
        prints.append(fingerprint(model))
    return prints


@pytest.mark.long
def test_the_same_bytes_each_time() -> None:
    assert len({p for prints in on_ranks(again, 2) + on_ranks(again, 1) for p in prints}) == 1


def in_a_subgroup() -> tuple[str, list[str]]:
    """Ranks 1 and 2 of three, numbered 0 and 1 in their group; rank 0 quantizes alone, and what it hears is nothing."""
    group: Any = torch.distributed.new_group([1, 2])
    model, seen = tiny_llama(layers=1), []
    batches = token_batches()
    if torch.distributed.get_rank() == 0:
        with pytest.raises(ConfigError, match="this process is not in process_group"):
            quantize_(model, config(batches, {}), process_group=group)
        with pytest.warns(TrainingWarning, match="each quantizes by itself"):
            quantize_(model, config(batches, {"effort": "fast"}))
    else:
        progress = lambda stage, of, name, seconds: seen.append(f"{stage}/{of}")  # noqa: E731
        settings = {"effort": "fast", "rules": {"re:.*k_proj": {"bits": 8}}}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FusedSettingsWarning)
            quantize_(model, config(batches, settings), process_group=group, progress=progress)
        seen += [w.category.__name__ for w in caught if w.category is FusedSettingsWarning]
    return fingerprint(model), seen


@pytest.mark.long
def test_a_group_of_some_ranks_of_which_the_first_speaks() -> None:
    alone, first, second = on_ranks(in_a_subgroup, ranks=3)
    assert alone[0] != first[0] == second[0]
    assert first[1] == ["1/4", "2/4", "3/4", "4/4", "FusedSettingsWarning"]
    assert second[1] == []


def test_ranks_have_to_be_there() -> None:
    with pytest.raises(ConfigError, match=r"start it with torchrun, and call torch.distributed.init_process_group"):
        quantize_(tiny_llama(layers=1), config(token_batches(), {}), distributed=True)


def test_one_rank_is_one_process(one_process: None) -> None:
    one, other = tiny_llama(layers=1), tiny_llama(layers=1)
    quantize_(one, config(token_batches(), {"effort": "fast"}), distributed=True)
    quantize_(other, config(token_batches(), {"effort": "fast"}))
    assert fingerprint(one) == fingerprint(other)
