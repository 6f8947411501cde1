"""Tasks of lm-evaluation-harness, by a package that stands in for it: what it is asked, what is made of its answer."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_ao import cli
from gptq_ao.errors import ConfigError
from gptq_ao.integrations.lm_eval import score_tasks

TINY = str(Path(__file__).parents[2] / "examples" / "tiny_lm")


class Harness:
    """Knows the tasks "arc" and, with a folder, "mine"; `asked` is what it was asked."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, Any] = {}
        self.error: Exception | None = None
        package, models, tasks = (types.ModuleType(f"lm_eval{name}") for name in ("", ".models.huggingface", ".tasks"))
        vars(package).update(simple_evaluate=self.evaluate)
        vars(models).update(HFLM=lambda **given: given)
        vars(tasks).update(TaskManager=Manager)
        for module in (package, types.ModuleType("lm_eval.models"), models, tasks):
            patch.setitem(sys.modules, module.__name__, module)

    def evaluate(self, **asked: Any) -> dict[str, Any]:
        self.asked = asked
        if self.error is not None:
            raise self.error
        scores = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.25, "exact_match,strict": 1, "n,none": "N/A"}
        return {"results": dict.fromkeys(asked["tasks"], scores)}


class Manager:
    def __init__(self, include_path: str | None) -> None:
        self.known = {"arc", "mine"} if include_path else {"arc"}

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.known]


def test_what_is_asked_and_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(monkeypatch)
    model = torch.nn.Linear(2, 2)
    state = torch.random.get_rng_state()
    found = score_tasks(model, "tokenizer", ["arc", "mine"], folder="here", limit=3, few_shot=0, batch_size=2)
    numbers = {"acc": 0.5, "acc stderr": 0.25, "exact_match (strict)": 1.0}
    assert found == {"arc": numbers, "mine": numbers}
    asked = harness.asked
    assert asked["model"] == {"pretrained": model, "tokenizer": "tokenizer", "batch_size": 2}
    assert (asked["tasks"], asked["limit"], asked["num_fewshot"]) == (["arc", "mine"], 3, 0)
    # Seeds of others are left alone.
    assert {asked[f"{name}random_seed"] for name in ("", "numpy_", "torch_")} == {None}
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_cannot_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(monkeypatch)
    with pytest.raises(ConfigError, match=r"tasks \['mine'\]: lm-eval does not know them; `lm-eval ls tasks`"):
        score_tasks(torch.nn.Identity(), None, ["arc", "mine"])
    with pytest.raises(ConfigError, match=r"tasks \['other'\]: .*, nor does here define them"):
        score_tasks(torch.nn.Identity(), None, ["other"], folder="here")
    assert harness.asked == {}  # before anything is run
    harness.error = ConnectionError("Couldn't reach 'a/b' on the Hub\nand more")
    with pytest.raises(ConfigError, match=r"\['arc'\] cannot be read: Couldn't reach 'a/b' on the Hub\. Without"):
        score_tasks(torch.nn.Identity(), None, ["arc"])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"tasks need lm-eval, .*: pip install 'gptq_ao\[tasks\]'"):
        score_tasks(torch.nn.Identity(), None, ["arc"])


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    harness = Harness(monkeypatch)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gptq-ao", "eval", TINY, *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, *capsys.readouterr()  # type: ignore[return-value]

    code, out, _ = run("--tasks", "arc, mine", "--tasks-folder", "here", "--limit", "5")
    assert (code, out.splitlines()[1]) == (0, "mine: acc 0.5000, acc stderr 0.2500, exact_match (strict) 1.0000")
    assert harness.asked["limit"] == 5
    assert "nothing to score: give --data TEXT, or --tasks" in run()[2]
    assert "--tasks stands in place of --data" in run("--tasks", "arc", "--data", "x")[2]
