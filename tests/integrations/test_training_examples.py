"""The examples of training train. (For those with other codebases see `trainers.py`.)"""

from pathlib import Path

import pytest
import yaml

from .trainers import FOLDER, OPTIONAL, train

HERE = ("lora_loop", "hf_trainer")
ELSEWHERE = {"embedded", "whole_way"}  # what the others import; what takes a minute


@pytest.mark.parametrize("example", HERE)
def test_the_loss_falls(example: str) -> None:
    train(example)


def test_every_example_is_run_somewhere_and_documented() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert names == {*HERE, *OPTIONAL, *ELSEWHERE}
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    assert [name for name in names if f"examples/training/{name}.py" not in page] == []


def test_axolotl_gets_adapters_without_bitsandbytes() -> None:
    config = yaml.safe_load((FOLDER / "axolotl.yaml").read_text(encoding="utf-8"))
    assert config["adapter"] == "lora"
    assert config["load_in_4bit"] is False
