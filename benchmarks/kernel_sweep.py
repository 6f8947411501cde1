"""Times candidate configurations of the linear kernel. Run through `benchmarks/kernel_times.py --sweep`."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from packed import Shape, ring  # type: ignore[import-not-found]

from gptq_ao.kernels import reference
from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.triton.launch import launch, warm_up
from gptq_ao.kernels.tuning.candidates import candidates, variations
from gptq_ao.kernels.tuning.heuristics import LinearConfig
from gptq_ao.kernels.tuning.timing import microseconds

__all__ = ["sweep"]

BEST = 5  # printed per product, and varied
Product = tuple[Shape, int]  # and the number of rows
Job = tuple[LinearConfig, int, int, int, int, int, torch.dtype, bool]  # arguments of `warm_up`


def sweep(products: list[Product], out: Path, minutes: float, processes: int) -> None:
    """Time all candidates for all products, then variations of the best; print those, write all as JSON lines.

    Args:
        minutes: stop in time, with what there is.
    """
    deadline = time.monotonic() + 60 * minutes
    context = multiprocessing.get_context("spawn")
    with (
        open(out, "w", buffering=1) as file,
        concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool,
    ):
        for batch in _batches(products):
            if time.monotonic() > deadline:
                print(f"out of time before {batch[0]}", flush=True)
                break
            _sweep_some(batch, pool, file, deadline)


def _batches(products: list[Product]) -> Iterable[list[Product]]:
    """Products that share kernels: those of one width and group, few rows or many."""
    keys = dict.fromkeys((s.bits, s.group, m) for s, m in products)
    return [[p for p in products if (p[0].bits, p[0].group, p[1]) == key] for key in keys]


def _sweep_some(products: list[Product], pool: Any, file: Any, deadline: float) -> None:
    properties = torch.cuda.get_device_properties()
    sms, capability = properties.multi_processor_count, properties.major
    tried: dict[Product, list[tuple[LinearConfig, bool]]] = {
        (s, m): [(c, True) for c in candidates(m, s.n, s.k, s.bits, s.group, sms, capability)] for s, m in products
    }
    start = time.monotonic()
    _compile([_job(p, *each) for p, all_ in tried.items() for each in all_], pool)
    print(f"\n# {products[0]}: compiled in {time.monotonic() - start:.0f} s", flush=True)
    found = {}
    for (s, m), each in tried.items():
        if time.monotonic() < deadline:
            found[s, m] = _time(s, m, each, file, deadline)
    again = {p: _varied(p, results, capability) for p, results in found.items()}
    if time.monotonic() < deadline:
        _compile([_job(p, *each) for p, all_ in again.items() for each in all_], pool)
    for (s, m), each in again.items():
        if time.monotonic() < deadline:
            found[s, m] += _time(s, m, each, file, deadline)
        _report(s, m, found[s, m])


def _varied(p: Product, results: list[dict[str, Any]], capability: int) -> list[tuple[LinearConfig, bool]]:
    best = [LinearConfig(**r["config"]) for r in _best(results)[:BEST]]
    known = {LinearConfig(**r["config"]) for r in results}
    changed = dict.fromkeys(v for c in best for v in variations(c, p[0].group, p[0].k, capability))
    plain = [(c, False) for c in best[:1]]
    return [(c, True) for c in changed if c not in known] + plain


def _job(p: Product, c: LinearConfig, fast: bool) -> Job:
    s, m = p
    return (c, m, s.bits, s.group, s.n, s.k, torch.bfloat16, fast)


def _compile(jobs: list[Job], pool: Any) -> None:
    """In all processes. What fails to compile fails again, and is recorded, when it is timed."""
    done = pool.map(_compile_one, dict.fromkeys(jobs), chunksize=4)
    errors = [e for e in done if e]
    if errors:
        print(f"# {len(errors)} do not compile, the first: {errors[0]}", flush=True)


def _compile_one(job: Job) -> str | None:
    try:
        warm_up(*job)
    except Exception as error:
        return f"{job[0]} {type(error).__name__}: {str(error)[-200:]}"
    return None


def _time(s: Shape, m: int, tried: list[tuple[LinearConfig, bool]], file: Any, deadline: float) -> list[dict[str, Any]]:
    weights = ring(s)
    x = torch.randn(1, m, s.k, device="cuda", dtype=torch.bfloat16)
    dense = reference.dequantize(weights[0], torch.float32)
    expected, magnitude = x[0].float() @ dense.T, x[0].float().abs() @ dense.abs().T
    results = []
    for c, fast in tried:
        if time.monotonic() > deadline:
            break
        result: dict[str, Any] = {**dataclasses.asdict(s), "m": m, "fast": fast, "config": dataclasses.asdict(c)}
        try:
            result |= _time_one(weights, x, c, fast, expected, magnitude)
        except Exception as error:  # some do not compile, or ask for more than there is
            result["failed"] = f"{type(error).__name__}: {str(error)[-200:]}"
        results.append(result)
        file.write(json.dumps(result) + "\n")
    return results


def _time_one(
    weights: list[Packed], x: torch.Tensor, c: LinearConfig, fast: bool, expected: torch.Tensor, magnitude: torch.Tensor
) -> dict[str, Any]:
    blocks = -(-x.shape[1] // c.block_m) * -(-weights[0].out_features // c.block_n)
    counters = torch.zeros(blocks, dtype=torch.int32, device="cuda")

    def run(i: int) -> torch.Tensor:
        return launch(x, weights[i], None, c, fast, counters)

    error = float(((run(0)[0].float() - expected).abs() / magnitude).max())
    if not error < 2**-6:  # bf16 weights and results, with room to spare; not a number is wrong too
        return {"failed": "wrong", "error": error}
    return {"us": microseconds(run, len(weights), replays=5), "error": error}


def _best(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted((r for r in results if "us" in r), key=lambda r: r["us"])


def _report(s: Shape, m: int, results: list[dict[str, Any]]) -> None:
    failed = [r["failed"] for r in results if "failed" in r]
    print(f"{s} M {m}: {len(results)} tried, {len(failed)} failed {dict.fromkeys(f[:60] for f in failed[:3])}")
    for r in _best(results)[:BEST]:
        c = {k: v for k, v in r["config"].items() if v != getattr(LinearConfig, k, None)}
        gbs = s.bytes / r["us"] / 1e3
        print(f"  {r['us']:8.2f} us {gbs:7.0f} GB/s  error {r['error']:.1e}  {c}{'' if r['fast'] else ' plain'}")
    print(end="", flush=True)
