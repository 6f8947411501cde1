"""The command line under torchrun: on one machine, and on two that only a network joins."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_ao import load_quantized
from gptq_ao.tensor import GroupTensor
from gptq_ao.tiny_lm.corpus import documents

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("\n".join(documents("train")[:40]))
    return str(tmp_path / "text.txt")


def command(out: Path, text: str, *options: str) -> list[str]:
    data = ["--calibration", text, "--num-samples", "8", "--seq-len", "64", "--batch-size", "2", "--effort", "fast"]
    return ["-m", "gptq_ao", "quantize", str(ROOT / "examples/tiny_lm"), str(out), *data, *options]


def run(args: list[str], **more: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    return subprocess.run(args, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def codes(directory: Path) -> dict[str, torch.Tensor]:
    model: Any = load_quantized(directory)
    return {n: p.codes() for n, p in model.named_parameters() if isinstance(p, GroupTensor)}


def check(directory: Path, alone: Path) -> None:
    """As good as equal to what one process makes."""
    expected = codes(alone)
    for name, found in codes(directory).items():
        assert (found == expected[name]).float().mean() >= 0.999, name


@pytest.fixture
def alone(tmp_path: Path, text: str) -> Path:
    done = run([sys.executable, *command(tmp_path / "alone", text)])
    assert done.returncode == 0, done.stderr
    return tmp_path / "alone"


@pytest.mark.long
@pytest.mark.parametrize("options", [["--stream"], [], ["--stream", "--output-sharding", "rank"]], ids=str)
def test_two_processes(options: list[str], tmp_path: Path, text: str, alone: Path) -> None:
    out = tmp_path / "out"
    done = run([*TORCHRUN, "--standalone", "--nproc-per-node", "2", *command(out, text, "--json", *options)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["out"] == str(out)  # exactly one object
    check(out, alone)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "out", "text.txt"]


@pytest.mark.long
def test_another_format_and_an_adapter(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    options = ["--stream", "--format", "compressed-tensors"]
    done = run([*TORCHRUN, "--standalone", "--nproc-per-node", "2", *command(out, text, *options)])
    assert done.returncode == 0, done.stderr[-3000:]
    done = run(
        [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *command(tmp_path / "lora", text, "--adapter-rank", "2")]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "lora" / "adapter" / "adapter_config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora", "out", "text.txt"]


@pytest.mark.long
def test_an_error_is_said_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    done = run([*TORCHRUN, "--standalone", "--nproc-per-node", "2", *command(tmp_path / "out", text)])
    assert done.returncode == 1
    assert done.stderr.count("out exists and is not empty") == 1, done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


HOSTS = ("gptq-ao-a", "gptq-ao-b")


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """Two network namespaces that a cable joins: what runs a command in each."""
    first, second = HOSTS
    for name in HOSTS:
        ip("netns", "add", name)
    try:
        ip("link", "add", "gao0", "netns", first, "type", "veth", "peer", "name", "gao0", "netns", second)
        for number, name in enumerate(HOSTS, 1):
            ip("-n", name, "address", "add", f"10.99.77.{number}/24", "dev", "gao0")
            for device in ("lo", "gao0"):
                ip("-n", name, "link", "set", device, "up")
        yield [["ip", "netns", "exec", name] for name in HOSTS]
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def on_hosts(hosts: list[list[str]], commands: list[list[str]], **more: str) -> list[tuple[int, str]]:
    """What each host's command returns, and says on stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "gao0", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen([*at, *args], cwd=ROOT, env={**environment, **more}, stderr=subprocess.PIPE, text=True)
        for at, args in zip(hosts, commands, strict=True)
    ]
    try:
        said = [p.communicate(timeout=240)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, text) for p, text in zip(processes, said, strict=True)]


@pytest.mark.long
def test_two_machines(tmp_path: Path, text: str, hosts: list[list[str]], alone: Path) -> None:
    """Each with a disk of its own, as it were: OUT is another directory there, and not needed."""
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "10.99.77.1", "--master-port", "29517"]
    outs = [tmp_path / f"host{n}" / "out" for n in range(2)]
    commands = [
        [*TORCHRUN, *rendezvous, "--node-rank", f"{n}", *command(out, text, "--stream")] for n, out in enumerate(outs)
    ]
    for status, said in on_hosts(hosts, commands):
        assert status == 0, said[-2000:]
    check(outs[0], alone)
    assert not outs[1].parent.exists()


LOSES_ITS_CABLE = """
import datetime, subprocess, sys
import torch.distributed as dist
from gptq_ao import gptq_config, quantize_
from tests.models import tiny_llama, token_batches

rank = int(sys.argv[1])
limit = datetime.timedelta(seconds=15)
dist.init_process_group("gloo", init_method="tcp://10.99.77.1:29518", rank=rank, world_size=2, timeout=limit)
def progress(stage, of, name, seconds):
    if stage == 2:
        subprocess.run(["ip", "link", "delete", "gao0"], check=True)
model = tiny_llama()
try:
    quantize_(model, gptq_config(4, 32, calibration=token_batches()), distributed=True, progress=progress)
except Exception as e:
    print(type(e).__name__, e, *e.__notes__, sep="\\n", file=sys.stderr)
    print("whole:", all(type(p).__name__ == "Parameter" for p in model.parameters()), file=sys.stderr, flush=True)
    import os
    os._exit(7)
"""


@pytest.mark.long
def test_a_machine_that_is_lost(hosts: list[list[str]]) -> None:
    """Within the group's timeout all others give up, with their models as they were."""
    script = [sys.executable, "-c", LOSES_ITS_CABLE]
    for status, said in on_hosts(hosts, [[*script, "0"], [*script, "1"]], PYTHONPATH=f"{ROOT}"):
        assert status == 7, said[-2000:]
        assert "one of them has ended or does not answer" in said
        assert "whole: True" in said
