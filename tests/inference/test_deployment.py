"""Quantized models compiled, exported, packaged for another process, and generating with a static cache."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from gptq_ao import gptq_config, quantize_
from gptq_ao.tensor import GroupTensor

from ..models import Attention, seeded, tiny_llama, token_batches

ROOT = Path(__file__).parents[2]
# Another process imports this checkout, and all else that this one can.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
BF16, FP32 = torch.bfloat16, torch.float32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def graphs() -> int:
    """Compiled since the test began."""
    return counters["stats"]["unique_graphs"]


def llama(device: str = "cpu", dtype: torch.dtype = FP32) -> Any:
    """One layer, 4 bits. In fp32, so that the same tokens are the likeliest however products are rounded."""
    model = tiny_llama(layers=1, dtype=dtype)
    quantize_(model, gptq_config(4, 32, calibration=token_batches(1), effort="fast"))
    return model.to(device)


def mlp(device: str = "cpu", dtype: torch.dtype = BF16) -> Any:
    """One layer of 3 bits, and one of 4, for which there are faster kernels up to 256 rows."""
    model = seeded(nn.Sequential(nn.Linear(96, 160), nn.ReLU(), nn.Linear(160, 64, bias=False))).to(dtype)
    quantize_(model, gptq_config(4, 32, method="rtn", rules={"0": {"bits": 3}}))
    return model.to(device)


def ids(rows: int, length: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(rows + length)
    return torch.randint(1, 96, (rows, length), generator=generator).to(device)


class Logits(nn.Module):
    """The part of a language model that is deployed without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph_for_all_batch_sizes_but_one(device: str) -> None:
    model = mlp(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for rows in (5, 2, 64, 65, 256, 300, 5):  # on both sides of what decides about the kernel
        x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).to(device, BF16)
        assert torch.equal(compiled(x), model(x))
    assert graphs() == 1
    x = torch.ones(1, 96, device=device, dtype=BF16)
    assert torch.equal(compiled(x), model(x))
    assert graphs() == 2  # a size of 1 is a constant to torch.compile


def test_one_graph_of_a_language_model_for_all_sizes() -> None:
    model = Logits(llama())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 40), (3, 40), (5, 17), (2, 9)):
        assert torch.equal(compiled(ids(*size)), model(ids(*size)))
    assert graphs() == 1


def generated(model: Any, prompts: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    return model.generate(prompts, attention_mask=mask, **settings)[:, prompts.shape[1] :]


@pytest.mark.parametrize("device", DEVICES)
def test_generate_with_a_static_cache_and_left_padding(device: str) -> None:
    from transformers import CompileConfig

    model, prompts = llama(device), ids(3, 9, device)
    mask = torch.ones_like(prompts)
    mask[0, :6], prompts[0, :6] = 0, 0
    expected = generated(model, prompts, mask)
    alone = generated(model, prompts[:1, 6:], mask[:1, 6:])
    assert torch.equal(expected[:1], alone)
    # On a GPU as users do: inductor and CUDA graphs.
    here = CompileConfig(fullgraph=True, mode="default", backend="aot_eager")
    here._compile_all_devices = True
    settings = {} if device == "cuda" else {"compile_config": here}
    for _ in range(2):  # the second time with the compiled step and the cache of the first
        assert torch.equal(generated(model, prompts, mask, cache_implementation="static", **settings), expected)
    assert graphs() == 1
    assert len({tuple(row.tolist()) for row in expected}) == 3


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        pytest.param("cpu", {"backend": "aot_eager"}, id="cpu"),
        pytest.param("cuda", {"mode": "reduce-overhead"}, marks=pytest.mark.gpu, id="reduce-overhead"),
        pytest.param("cuda", {"mode": "max-autotune"}, marks=pytest.mark.gpu, id="max-autotune"),
    ],
)
def test_a_compiled_decoding_step_with_a_static_cache(device: str, settings: dict[str, Any]) -> None:
    from transformers import StaticCache

    model, prompts = llama(device), ids(2, 9, device)
    expected = generated(model, prompts, torch.ones_like(prompts))
    cache = StaticCache(config=model.config, max_cache_len=32)

    def step(token: Tensor) -> Tensor:
        return model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    tokens, run = [step(prompts)], torch.compile(step, fullgraph=True, **settings)
    while len(tokens) < 12:
        tokens.append(run(tokens[-1]).clone())  # a CUDA graph writes to the same place each time
    assert torch.equal(torch.cat(tokens, 1), expected)
    assert graphs() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_of_the_compiler(mode: str) -> None:
    model = mlp("cuda")
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for rows in (5, 5, 5, 300, 5, 300, 300):
        x = torch.randn(rows, 96, device="cuda").to(BF16)
        assert torch.equal(compiled(x), model(x))


def nodes(program: torch.export.ExportedProgram, target: Any) -> int:
    return sum(node.target is target for node in program.graph.nodes)


def test_an_exported_model_keeps_packed_weights(tmp_path: Path) -> None:
    model = Logits(llama())
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(model, (ids(2, 9),), dynamic_shapes=(sizes,))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    for p in (program, loaded, program.run_decompositions()):
        assert nodes(p, torch.ops.gptq_ao.linear.default) == 7
        assert nodes(p, torch.ops.gptq_ao.dequantize.default) == 0
        # The head alone is dense.
        assert nodes(p, torch.ops.aten.linear.default) + nodes(p, torch.ops.aten.mm.default) == 1
    for size in ((2, 9), (1, 2), (7, 33)):
        assert torch.equal(loaded.module()(ids(*size)), model(ids(*size)))


# What a process needs to run a package: torch, and the operators that importing gptq_ao registers.
WITHOUT_OPERATORS = """
import sys, torch
torch._inductor.aoti_load_package(sys.argv[1])
"""
RUN = """
import sys, torch
package, program, data = sys.argv[1:]
inputs = torch.load(data)
import gptq_ao
run = torch._inductor.aoti_load_package(package)
torch.save([run(x) for x in inputs], data)
run = torch.export.load(program).module()
torch.save([run(x) for x in inputs], data + ".program")
"""


@pytest.fixture
def dynamic_libstdcpp(tmp_path: Path) -> Iterator[None]:
    """PyTorch's compiler links the C++ library that PyTorch itself uses. Some have a copy of their own that they link
    into what they make; two copies in a process take each other's tables, and it crashes. For those, a compiler that
    is told where PyTorch's is."""
    with torch._inductor.config.patch({"cpp.cxx": (_compiler(tmp_path),)}):
        yield


def _compiler(directory: Path) -> str:
    usual = [c for c in (os.environ.get("CXX"), "g++", "c++", "clang++") if c is not None and shutil.which(c)]
    for compiler in usual:
        if _links_dynamically(compiler, directory):
            return compiler
    if not usual:
        pytest.skip("there is no C++ compiler")
    mapped = Path("/proc/self/maps").read_text().split() if Path("/proc/self/maps").exists() else []
    library = next((word for word in mapped if "/libstdc++.so" in word), None)
    told = directory / "compiler"
    # First in line: what it has is not taken from the static one, which the compiler puts last.
    told.write_text(
        f'#!/bin/sh\ncase " $* " in *" -shared "*) set -- -Wl,--no-as-needed {library} "$@";; esac\n'
        f'exec {usual[0]} "$@"\n'
    )
    told.chmod(0o755)
    if library is None or not _links_dynamically(str(told), directory):
        pytest.skip(f"no C++ compiler here links libstdc++ dynamically, which PyTorch's packages need: {usual}")
    return str(told)


def _links_dynamically(compiler: str, directory: Path) -> bool:
    source, library = directory / "probe.cpp", directory / "probe.so"
    source.write_text("#include <string>\nstd::string f(std::string a) { throw a + a; }\n")
    command = [compiler, "-shared", "-fPIC", str(source), "-o", str(library)]
    made = subprocess.run(command, capture_output=True, check=False)
    # The name is in the table of libraries that the file needs, or nowhere.
    return made.returncode == 0 and b"libstdc++.so.6\0" in library.read_bytes()


@pytest.mark.long
@pytest.mark.usefixtures("dynamic_libstdcpp")
@pytest.mark.parametrize("device", DEVICES)
def test_a_package_runs_in_another_process(device: str, tmp_path: Path) -> None:
    model = seeded(Attention(1024, 8))
    quantize_(model, gptq_config(4, 128, method="rtn"))
    model.to(device)
    weights = [p for p in model.parameters() if isinstance(p, GroupTensor)]
    packed = sum(p.qdata.nbytes + p.scale_zero.nbytes for p in weights)
    assert len(weights) == 4

    inputs = [torch.randn(*size, 1024, generator=torch.Generator().manual_seed(3)) for size in ((2, 5), (1, 5), (9, 5))]
    inputs = [x.to(device) for x in inputs]
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (inputs[0],), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "program.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    # Beside weights there are 16 KB of biases, and the code with its symbols; dense weights would be 16 MB.
    for file in ("package.pt2", "program.pt2"):
        assert packed < (tmp_path / file).stat().st_size < packed + 3 * 2**20, file

    def process(program: str) -> subprocess.CompletedProcess[str]:
        files = [str(tmp_path / name) for name in ("package.pt2", "program.pt2", "data")]
        command = [sys.executable, "-c", program, *files]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)

    torch.save(inputs, tmp_path / "data")
    failed = process(WITHOUT_OPERATORS)
    assert failed.returncode == 1
    assert re.search("RuntimeError: .*gptq_ao::linear", failed.stderr, re.DOTALL)
    done = process(RUN)
    assert done.returncode == 0, done.stderr
    for file in ("data", "data.program"):
        for x, y in zip(inputs, torch.load(tmp_path / file), strict=True):
            # fp32 sums of 1024 products in another order.
            torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


def test_the_serving_example() -> None:
    prompts = ["class Stack:", "def main():\n    parser = argparse.ArgumentPar", "    raise ValueErr"]
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "serve.py")]
    options = ["--device", "cpu", "--tokens", "3", "--length", "64", "--batch-size", "2"]
    done = subprocess.run([*command, *options, *prompts], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    # What the small language model is sure of, also where it stands beside a longer prompt or fills up a batch.
    assert done.stdout == "".join(f"--- {p}{t}\n" for p, t in zip(prompts, ["\n  ", "ser", "or("], strict=True))


def test_the_serving_example_refuses_what_its_cache_cannot_hold() -> None:
    from transformers import AutoTokenizer, StaticCache

    generate = runpy.run_path(str(ROOT / "examples" / "serve.py"))["generate"]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_lm", pad_token="<|endoftext|>")
    model = tiny_llama(layers=1)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="prompts of 30 tokens and 3 new ones exceed --length 32"):
        generate(model, tokenizer, cache, ["x", "x" * 30], 3)
