"""The examples of training train. (For those with other codebases see `trainers.py`.)"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ranks import some

from .trainers import FOLDER, OPTIONAL, train

HERE = ("lora_loop", "hf_trainer")
SHARED = "embedded"  # what the others import
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533")


@pytest.mark.parametrize("example", some(reversed(HERE)))
def test_the_loss_falls(example: str) -> None:
    train(example)


@pytest.mark.long
def test_the_loss_falls_in_two_processes() -> None:
    train("fsdp2", launcher=TORCHRUN)


@pytest.mark.long
def test_the_whole_way(tmp_path: Path) -> None:
    """Quantized, trained, merged, saved for engines: each step as good as the example's page says, or nearly."""
    command = [sys.executable, "-W", "ignore", str(FOLDER / "whole_way.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER.parents[1])
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(\w[\w ]*?)\s+perplexity (\S+)$", done.stdout, re.MULTILINE))
    original, quantized, adapted, merged = map(float, found.values())
    assert quantized == pytest.approx(original, rel=0.02)
    assert adapted < 0.95 * quantized
    assert merged == pytest.approx(adapted, rel=0.03)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert len((FOLDER / "whole_way.py").read_text(encoding="utf-8").splitlines()) < 80


def test_every_example_is_run_somewhere_and_documented() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert names == {*HERE, *OPTIONAL, SHARED, "fsdp2", "whole_way"}
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    assert [name for name in names if f"examples/training/{name}.py" not in page] == []


def test_axolotl_gets_adapters_without_bitsandbytes() -> None:
    config = yaml.safe_load((FOLDER / "axolotl.yaml").read_text(encoding="utf-8"))
    assert config["adapter"] == "lora"
    assert config["load_in_4bit"] is False
