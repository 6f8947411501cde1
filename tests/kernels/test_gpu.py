"""What only a GPU can show. Run with `pytest -m gpu`."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gptq_ao import gptq_config, load_quantized, plan, quantize_, save_quantized
from gptq_ao.recipe import Recipe
from gptq_ao.solver.factor import factor
from gptq_ao.solver.hessian import Hessian, HessianObserver
from gptq_ao.solver.refine import refine
from gptq_ao.solver.solve import round_to_nearest, solve
from gptq_ao.tensor import GroupTensor, tensor_class

from ..measures import relative_error
from ..models import seeded, tiny_llama, token_batches

pytestmark = pytest.mark.gpu


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(bits: int, n: int, k: int, dtype: torch.dtype, group_size: int = 32) -> GroupTensor:
    s = round_to_nearest(randn(n, k), Recipe(bits, group_size, False))
    return tensor_class(bits).from_codes(s.codes, s.scale, s.zero_point, dtype=dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(100, 96), (33, 160)])
def test_linear_on_cuda_is_that_of_the_dense_weight(bits: int, dtype: torch.dtype, n: int, k: int) -> None:
    weight = quantized(bits, n, k, dtype)
    moved = weight.to("cuda")
    assert torch.equal(moved.dequantize().cpu(), weight.dequantize())
    for rows in (1, 5, 130):
        x = randn(rows, k, seed=rows).to("cuda", dtype)
        # Sums in fp32, and one rounding to the dtype. Weights are rounded too, or their scale and the product with it.
        dense, eps = moved.dequantize(torch.float64), torch.finfo(dtype).eps
        exact = x.double() @ dense.T
        bound = (x.double().abs() @ dense.abs().T) * (k * 2**-24 + 1.01 * eps) + exact.abs() * eps
        assert ((F.linear(x, moved).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("in_features", [96, 2 * HessianObserver.panel + 52])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hessian_on_cuda(dtype: torch.dtype, in_features: int) -> None:
    x = (randn(700, in_features) * 3).to("cuda", dtype)
    observer = HessianObserver(in_features)
    observer(x[:300].view(3, 100, in_features))
    observer(x[300:])
    observer.end_batch()
    hessian = observer.finish()[0]
    exact = x.double().T @ x.double() / 700
    # fp32 sums of 700 products that are exact in fp32 for 16-bit inputs, and rounded once for fp32.
    bound = (x.double().abs().T @ x.double().abs()) / 700 * 700 * 2**-24
    assert hessian.rows == 700
    assert ((hessian.matrix.double() - exact).abs() <= bound).all()


def test_hessian_ignores_tf32_and_restores_the_flag() -> None:
    x = randn(2000, 64).cuda()
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        observer = HessianObserver(64)
        observer(x)
        result = observer.finish()[0].matrix
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    exact = x.double().T @ x.double() / 2000
    assert ((result.double() - exact).abs() <= x.double().abs().T @ x.double().abs() * 2**-24).all()  # TF32: 2^-11


def correlated(k: int) -> Hessian:
    x = randn(3000, k) @ randn(k, k, seed=1)
    observer = HessianObserver(k)
    observer(x)
    return observer.finish()[0]


@pytest.mark.parametrize("act_order", ["static", "none", "group", "group_aware"])
def test_solver_on_cuda_agrees_with_cpu(act_order: str) -> None:
    hessian, weight = correlated(256), randn(96, 256, seed=2)
    codes = []
    for device in ("cpu", "cuda"):
        h = Hessian(hessian.matrix.to(device), hessian.rows)
        s = solve(weight.to(device), factor(h, Recipe(4, 64, act_order=act_order)))
        assert relative_error(weight.to(device), s.dequantize(), h) < 0.01
        codes.append(s.codes.cpu())
    assert (codes[0] == codes[1]).double().mean() >= 0.999  # fp32 sums in another order: ties may fall either way


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (2, 64), (3, 32), (4, -1), (4, 192)])
def test_search_and_refinement_on_cuda_are_as_good_as_on_cpu(bits: int, group: int) -> None:
    hessian, weight = correlated(384), randn(1000, 384, seed=2)
    errors, made = [], []
    for device in ("cpu", "cuda", "cuda"):
        h, w = Hessian(hessian.matrix.to(device), hessian.rows), weight.to(device)
        f = factor(h, Recipe(bits, group, True, "group_aware", signed_scale=True, scale_candidates=20, refine_sweeps=4))
        s = refine(solve(w, f), w, h, f)
        errors.append(relative_error(w, s.dequantize(), h))
        made.append((s.codes.cpu(), s.scale.cpu()))
    # One tie that falls the other way changes what follows in its row, and is as good.
    assert errors[1] == pytest.approx(errors[0], rel=0.005)
    assert all(torch.equal(a, b) for a, b in zip(made[1], made[2], strict=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("outlier", [1, 1000])
def test_refinement_on_cuda_makes_no_row_worse(outlier: int, bits: int) -> None:
    """Though most of it knows gradients to three digits only."""
    x = (randn(3000, 300) @ randn(300, 1200, seed=1) + randn(3000, 1200, seed=3)).cuda()
    x[:, :3] *= outlier
    observer, weight = HessianObserver(1200), randn(512, 1200, seed=2).cuda()
    observer(x)
    hessian = observer.finish()[0]
    f = factor(hessian, Recipe(bits, 100, signed_scale=True, refine_sweeps=4))
    before = solve(weight, f)
    after = refine(before, weight, hessian, f)
    H = hessian.matrix.double() + f.added * torch.eye(1200, device="cuda")
    old, new = ((e @ H * e).sum(1) for e in (weight.double() - s.dequantize().double() for s in (before, after)))
    assert (new <= old * (1 + 1e-4)).all()
    assert new.sum() < 0.97 * old.sum()


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_same_model_and_data_same_bytes_on_cuda(effort: str) -> None:
    made = []
    for _ in range(2):
        model = tiny_llama(dtype=torch.bfloat16).cuda()
        quantize_(model, gptq_config(4, 32, effort=effort, calibration=token_batches()))
        made.append({n: p.codes() for n, p in model.named_parameters() if isinstance(p, GroupTensor)})
    assert made[0]
    assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_on_cuda_and_one_computed_there_agree(dtype: torch.dtype) -> None:
    config = gptq_config(4, 32, calibration=token_batches())
    resident, visiting = tiny_llama(dtype=dtype).cuda(), tiny_llama(dtype=dtype)
    quantize_(resident, config)
    report = quantize_(visiting, config, device="cuda")
    assert report is not None
    assert report.peak_bytes["cuda"] > 0
    for name, p in visiting.named_parameters():
        assert p.device.type == "cpu"
        other = resident.get_parameter(name)
        assert other.device.type == "cuda"
        if isinstance(p, GroupTensor):
            assert isinstance(other, GroupTensor)
            assert torch.equal(p.codes(), other.codes().cpu()), name


def test_compiled_quantized_model_on_cuda(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16).cuda()
    quantize_(model, gptq_config(4, 32, calibration=token_batches()))
    ids = token_batches()[0]["input_ids"].cuda()
    with torch.no_grad():
        eager = model(ids).logits.float()
        compiled = torch.compile(model, fullgraph=True)(ids).logits.float()
    # Two correct bf16 evaluations differ by roundings of about 2^-8 of the largest logit per layer.
    assert (eager - compiled).abs().max() <= 4 * 2**-8 * eager.abs().max()
    save_quantized(model, tmp_path / "q")
    again = load_quantized(tmp_path / "q", device="cuda").cuda()
    with torch.no_grad():
        assert torch.equal(again(ids).logits.float(), eager)


def test_backward_on_cuda() -> None:
    weight = quantized(4, 48, 64, torch.bfloat16).to("cuda")
    x = randn(7, 64).to("cuda", torch.bfloat16).requires_grad_()
    grad = randn(7, 48, seed=1).to("cuda", torch.bfloat16)
    F.linear(x, weight).backward(grad)
    dense = x.detach().clone().requires_grad_()
    F.linear(dense, weight.dequantize()).backward(grad)
    assert x.grad is not None
    assert dense.grad is not None
    assert torch.equal(x.grad, dense.grad)


def test_plain_mlp_on_cuda_keeps_its_other_parameters() -> None:
    model: Any = seeded(torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 32))).cuda()
    before = copy.deepcopy(model.state_dict())
    quantize_(model, gptq_config(4, 32, calibration=[randn(50, 64).cuda()]))
    assert torch.equal(model[0].bias, before["0.bias"])
    assert isinstance(model[2].weight, GroupTensor)


def medium_llama() -> Any:
    """Hidden size 1024, 4 layers, bf16, about 140 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=8192,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def peak_on_cuda(make: Any, config: Any, **settings: Any) -> tuple[Any, int]:
    """The report, and the bytes of PyTorch's allocator above what is there anyway: libraries' workspaces."""
    quantize_(tiny_llama(dtype=torch.bfloat16), gptq_config(4, 32, calibration=token_batches()), device="cuda")
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = make()
    torch.cuda.reset_peak_memory_stats()
    report = quantize_(model, config, device="cuda", **settings)
    torch.cuda.synchronize()
    return report, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_the_predicted_memory_is_what_cuda_allocates(where: str) -> None:
    data = token_batches(8, 2, 512, vocabulary=8192)
    config = gptq_config(4, 128, calibration=data)
    planned = plan(medium_llama().to(where), config, device="cuda")
    gc.collect()
    report, peak = peak_on_cuda(lambda: medium_llama().to(where), config)
    assert planned.peak_bytes["device"] == pytest.approx(peak, rel=0.2)
    assert planned.activation_bytes == pytest.approx(report.peak_bytes["activations"], rel=0.05)
    assert {"calibrate", "solve"} <= set(planned.seconds)


def test_a_limit_on_cuda_is_kept_and_changes_nothing() -> None:
    data = token_batches(8, 2, 512, vocabulary=8192)
    config = gptq_config(4, 128, calibration=data)
    free: Any = plan(medium_llama(), config, device="cuda")
    limit = free.peak_bytes["device"] - free.activation_bytes // 2
    everywhere: Any = quantize_(medium_llama(), config, device="cuda")
    report, peak = peak_on_cuda(medium_llama, config, max_memory={"cuda": limit, "cpu": "8MiB"})
    assert peak <= 1.05 * limit  # of what libraries need for a moment, nothing is promised
    assert 0 < report.peak_bytes["offloaded"] <= 8 * 2**20
    assert report.peak_bytes["files"] > 0
    assert report.weights == everywhere.weights


def test_experts_on_cuda_agree_with_cpu() -> None:
    from ..pipeline.test_experts import mixture

    config = gptq_config(4, -1, calibration=token_batches(3), expert_min_rows=8)
    here, there = mixture(2), mixture(2).cuda()
    quantize_(here, config)
    report = quantize_(there, config)
    assert report is not None
    for w in report.weights:
        a, b = here.get_parameter(w.name), there.get_parameter(w.name)
        assert isinstance(a, GroupTensor)
        assert isinstance(b, GroupTensor)
        # Rounding may send a token to another expert, and sums have another order: most codes agree, all are close.
        assert (a.codes() == b.codes().cpu()).double().mean() >= 0.95, w.name
    ids = token_batches(1)[0]["input_ids"]
    with torch.no_grad():
        logits = here(ids).logits
        assert (there(ids.cuda()).logits.cpu() - logits).abs().max() <= 0.1 * logits.abs().max()


def test_parts_convolutions_and_stacks_on_cuda() -> None:
    weight = quantized(4, 48, 96, torch.float32).to("cuda")
    dense = weight.dequantize()
    assert torch.equal(weight[16:32].dequantize(), dense[16:32])
    assert torch.equal(weight[5:21], dense[5:21])
    assert all(torch.equal(a.dequantize(), b) for a, b in zip(weight.chunk(3), dense.chunk(3), strict=True))
    s = round_to_nearest(randn(48, 96), Recipe(4, 32, False))
    parts = (s.codes, s.scale, s.zero_point)
    filters = tensor_class(4).from_codes(*parts, dtype=torch.float32, view_shape=(48, 32, 3)).to("cuda")
    x = randn(2, 32, 20).cuda()
    assert torch.equal(F.conv1d(x, filters), F.conv1d(x, filters.dequantize()))


def test_a_model_that_is_no_graph_on_cuda() -> None:
    from ..pipeline.test_replay import Experts

    batches = [{"hidden": randn(2, 15, 16, seed=i).cuda()} for i in range(3)]
    model = seeded(Experts()).cuda()
    report = quantize_(model, gptq_config(4, -1, calibration=batches))
    assert report is not None
    assert report.capture == "replay"
    assert {w.method for w in report.weights} == {"gptq"}
    assert model(**batches[0]).isfinite().all()
