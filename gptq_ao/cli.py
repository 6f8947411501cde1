"""gptq-ao: quantize, evaluate and inspect models from the command line.

Progress and messages go to stderr. With --json, stdout carries exactly one JSON object.
"""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gptq_ao.checkpoint.convert import convert_checkpoint
from gptq_ao.checkpoint.files.paths import MANIFEST
from gptq_ao.checkpoint.files.shards import NAME_OF
from gptq_ao.checkpoint.formats import DENSE, FORMATS, format_of, open_quantized
from gptq_ao.checkpoint.native.manifest import read_manifest
from gptq_ao.checkpoint.save import save_quantized
from gptq_ao.config import GPTQConfig, gptq_config
from gptq_ao.data import read_documents, spaced, text_batches, token_chunks
from gptq_ao.demo import run_demo
from gptq_ao.errors import ConfigError, GPTQError
from gptq_ao.evaluate import evaluate
from gptq_ao.integrations.transformers import config_directory, load_model, load_tokenizer
from gptq_ao.model.empty import empty_model
from gptq_ao.model.weights import ModelWeights
from gptq_ao.pipeline.quantize import quantize_
from gptq_ao.pipeline.quantize_checkpoint import quantize_checkpoint
from gptq_ao.planning.plan import StreamedWeights, plan_weights

__all__ = ["app", "main"]

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Method(StrEnum):
    gptq = "gptq"
    rtn = "rtn"


class Effort(StrEnum):
    fast = "fast"
    default = "default"
    max = "max"


class ActOrder(StrEnum):
    group_aware = "group_aware"
    static = "static"
    none = "none"
    group = "group"


class Dtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, …")]
DtypeOption = Annotated[Dtype, typer.Option(help="Dtype of the unquantized model; auto: as stored.")]
Model = Annotated[str, typer.Argument(help="A local Hugging Face directory or a hub id.")]
NumSamples = Annotated[int, typer.Option(min=1, help="Calibration sequences.")]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences that run together.")]
Stream = Annotated[
    bool, typer.Option("--stream", help="Never hold the model in memory: for a directory larger than that.")
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(help="Of the device, and of activations that wait on the host: cuda=8GiB,cpu=32GiB. The rest: files."),
]


def _settings(
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Stored bits per weight on average, such as 3.5; each weight's bits are chosen."),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Input features per scale; -1: one scale per row.")] = 128,
    effort: Annotated[Effort, typer.Option(help="How much time and memory to spend on accuracy.")] = Effort.default,
    act_order: Annotated[ActOrder | None, typer.Option(help="Order in which columns are rounded.")] = None,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Symmetric grid, or a zero point per group.")] = True,
    damp_percent: Annotated[float | None, typer.Option(help="Damping; by default from the amount of data.")] = None,
    method: Annotated[Method, typer.Option(help="GPTQ, or round to nearest as a baseline.")] = Method.gptq,
    strict: Annotated[bool, typer.Option(help="Fail instead of falling back.")] = False,
    strict_capture: Annotated[
        bool, typer.Option(help="Fail if the model is not one graph, instead of replaying its forwards.")
    ] = False,
    expert_min_rows: Annotated[int, typer.Option(min=0, help="Experts with fewer rows share a Hessian.")] = 128,
    calibrate_all_experts: Annotated[
        bool, typer.Option(help="Every token reaches every expert, for the Hessians only.")
    ] = False,
) -> GPTQConfig:
    return gptq_config(
        bits,
        group_size,
        sym=sym,
        effort=effort.value,
        act_order=None if act_order is None else act_order.value,
        damp_percent=damp_percent,
        target_bits=target_bits,
        method=method.value,
        strict=strict,
        strict_capture=strict_capture,
        expert_min_rows=expert_min_rows,
        calibrate_all_experts=calibrate_all_experts,
    )


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of `_settings` in place of its parameter `config`: what decides the outcome is
    declared once, for all commands that take it."""
    shared = signature(_settings).parameters
    own = signature(command).parameters

    @functools.wraps(command)
    # typer passes everything by name, so the shared options can be picked out.
    def run(**given: Any) -> None:
        command(config=_settings(**{name: given.pop(name) for name in shared}), **given)

    # Where the command has `config`, all shared parameters; its other parameters stay where they are.
    parameters = [q for p in own.values() for q in (shared.values() if p.name == "config" else (p,))]
    # typer reads the one for the order and the defaults, the other for the types.
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


@app.command()
@_with_settings
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist or be empty.")],
    config: GPTQConfig,
    calibration: Annotated[
        str | None, typer.Option(help="A .jsonl, .json, .txt or .parquet file, or a dataset's name.")
    ] = None,
    column: Annotated[str, typer.Option(help="Field of the calibration data that holds the text.")] = "text",
    num_samples: NumSamples = 128,
    seq_len: SeqLen = 2048,
    batch_size: BatchSize = 8,
    seed: Annotated[int, typer.Option(help="Of the choice of sequences.")] = 0,
    stream: Stream = False,
    max_memory: MaxMemoryOption = None,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Quantize MODEL and write it to OUT."""
    if calibration is None and config.method == "gptq":
        raise ConfigError("GPTQ needs calibration data: --calibration FILE or NAME, or --method rtn")
    # First: a mistyped option is to fail before a model is loaded.
    limits = _limits(max_memory)
    tokenizer = load_tokenizer(model)
    if calibration is not None:
        batches = text_batches(
            tokenizer,
            calibration,
            num_samples=num_samples,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            column=column,
        )
        config = config.with_calibration(batches)
    if stream:
        report = quantize_checkpoint(
            model, out, config, device=device, max_memory=limits, dtype=_dtype(dtype), tokenizer=tokenizer
        )
    else:
        loaded = load_model(model, dtype=_dtype(dtype))
        in_memory = quantize_(loaded, config, device=device, max_memory=limits)
        assert in_memory is not None
        report = in_memory
        save_quantized(loaded, out, tokenizer=tokenizer, report=report)
    _print({"model": model, "out": str(out), **report.to_dict()}, f"{report}\nwritten to {out}", as_json)


@app.command("plan")
@_with_settings
def plan_(
    model: Annotated[str, typer.Argument(help="A directory with a config.json, or a hub id. No weight is read.")],
    config: GPTQConfig,
    num_samples: NumSamples = 128,
    seq_len: SeqLen = 2048,
    batch_size: BatchSize = 8,
    stream: Stream = False,
    max_memory: MaxMemoryOption = None,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.auto,
    as_json: Json = False,
) -> None:
    """What `quantize` would do to MODEL, and the memory, disk and time it would take."""
    limits = _limits(max_memory)
    # bf16 where the config names no dtype: without the files nothing else says what is stored.
    frame = empty_model(config_directory(model), _dtype(dtype), otherwise=torch.bfloat16)
    if config.method == "gptq":
        # Only shapes count for a plan, so no text is read and no tokenizer loaded.
        ids = torch.empty(num_samples, seq_len, dtype=torch.int64, device="meta")
        config = config.with_calibration([{"input_ids": rows} for rows in ids.split(batch_size)])
    weights = StreamedWeights(frame) if stream else ModelWeights(frame)
    # `quantize_checkpoint` holds one file of its result in memory, of at most 2^30 bytes.
    made = plan_weights(weights, config, device=device, max_memory=limits, shard_bytes=2**30 if stream else 0)
    _print({"model": model, **made.to_dict()}, str(made), as_json)


@app.command("eval")
def evaluate_(
    model: Annotated[str, typer.Argument(help="A quantized or unquantized model: a directory or a hub id.")],
    data: Annotated[str, typer.Option(help="Text the model was not calibrated on: a file or a dataset's name.")],
    reference: Annotated[str | None, typer.Option(help="The original model, for the KL divergence from it.")] = None,
    column: Annotated[str, typer.Option(help="Field of the data that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "test",
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a chunk.")] = 2048,
    # 10^9 stands for all of them.
    max_chunks: Annotated[int, typer.Option(min=1, help="Score at most this many, evenly spaced.")] = 10**9,
    batch_size: Annotated[int, typer.Option(min=1, help="Chunks that run together.")] = 4,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Perplexity of MODEL, and its KL divergence from a reference."""
    chunks = token_chunks(load_tokenizer(model), read_documents(data, split=split, column=column), seq_len)
    scored = spaced(chunks, max_chunks)
    loaded = load_model(model, device=device, dtype=_dtype(dtype))
    original = None if reference is None else load_model(reference, device=device, dtype=_dtype(dtype))
    result = evaluate(loaded, scored, original, batch_size)
    protocol = (
        f"{len(scored)} of {len(chunks)} chunks of {seq_len} tokens, evenly spaced; documents are preceded by one "
        f"separator token and concatenated; tokens 2 to {seq_len} of a chunk are scored, log-softmax in fp32"
    )
    kl = "" if result.kl is None else f", KL(reference ‖ model) {result.kl:.5f} nats per token"
    text = f"perplexity {result.perplexity:.4f}{kl}\n{result.tokens} predictions: {protocol}"
    _print({"model": model, "reference": reference, **asdict(result), "protocol": protocol}, text, as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A quantized checkpoint, whatever its format.")],
    as_json: Json = False,
) -> None:
    """What a quantized checkpoint holds. Reads its configs and headers, no weight."""
    # A native checkpoint has a manifest, which says more than the other formats can.
    if path.is_dir() and not (path / MANIFEST).is_file() and format_of(path) is not None:
        _inspect_foreign(path, as_json)
        return
    manifest = read_manifest(path)
    layers = [
        {
            "name": name,
            "bits": e.bits,
            "shape": list(e.shape),
            "group_size": e.spec.group_size,
            "dtype": e.dtype,
            "act_order": "group" if e.perm else "natural groups",
        }
        for name, e in manifest.quantized.items()
    ]
    size = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    facts: dict[str, Any] = {"path": str(path), "bytes": size, "quantized": layers}
    facts |= {"dense": {n: {"dtype": d, "shape": s} for n, (d, s) in manifest.dense.items()}, "tied": manifest.tied}
    lines = [f"{path}: {size / 2**20:.1f} MiB, {len(layers)} quantized and {len(manifest.dense)} other tensors"]
    lines += [f"  {x['name']}  {x['shape']}  {x['bits']} bits, group {x['group_size']}" for x in layers]
    lines += [f"  {n}  {s}  {d}" for n, (d, s) in manifest.dense.items()]
    lines += [f"  {a} is {b}" for a, b in manifest.tied.items()]
    _print(facts, "\n".join(lines), as_json)


def _inspect_foreign(path: Path, as_json: bool) -> None:
    files = open_quantized(path)
    layers = [
        {"name": name, "bits": w.bits, "shape": list(w.shape), "group_size": w.group_size}
        for name, w in files.weights.items()
    ]
    dense = {n: {"dtype": NAME_OF[t.dtype], "shape": list(t.shape)} for n, t in files.dense.items()}
    size, format = sum(f.stat().st_size for f in path.glob("*.safetensors")), files.format.name
    facts = {"path": str(path), "format": format, "bytes": size, "quantized": layers, "dense": dense}
    lines = [f"{path}: {format}, {size / 2**20:.1f} MiB, {len(layers)} quantized and {len(dense)} other tensors"]
    lines += [f"  {x['name']}  {x['shape']}  {x['bits']} bits, group {x['group_size']}" for x in layers]
    lines += [f"  {n}  {d['shape']}  {d['dtype']}" for n, d in dense.items()]
    _print(facts, "\n".join(lines), as_json)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A quantized checkpoint, whatever its format.")],
    out: Annotated[Path, typer.Argument(help="A directory that does not exist yet.")],
    format: Annotated[str, typer.Option(help=f"What to write: {', '.join(FORMATS)}, or {DENSE} (not quantized).")],
    as_json: Json = False,
) -> None:
    """Write a quantized checkpoint in another format. The weights stay what they are: nothing is quantized again."""
    found = convert_checkpoint(source, out, format)
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    facts = {"source": str(source), "out": str(out), "from": found, "to": format, "bytes": size}
    _print(facts, f"{source}, {found}, written to {out} as {format}: {size / 2**20:.1f} MiB", as_json)


@app.command()
def demo(as_json: Json = False) -> None:
    """Quantize the small language model that comes with gptq_ao to 4 and 3 bits, and compare."""
    result = run_demo()
    _print(result.to_dict(), str(result), as_json)


def main() -> None:
    """Entry point: errors made for users become one line and exit status 1."""
    try:
        app()
    except GPTQError as e:
        # Added on the way with `add_note`: where it happened, and what it means for the model.
        notes = "".join(f"\n{note}" for note in getattr(e, "__notes__", ()))
        print(f"error: {e}{notes}", file=sys.stderr)
        sys.exit(1)


def _dtype(dtype: Dtype) -> torch.dtype | None:
    return None if dtype is Dtype.auto else getattr(torch, dtype.value)


def _limits(text: str | None) -> dict[str | int, int | str] | None:
    """`--max-memory`: "cuda=8GiB,cpu=32GiB"."""
    if text is None:
        return None
    limits: dict[str | int, int | str] = {}
    for part in text.split(","):
        place, equals, amount = part.partition("=")
        if not equals:
            raise ConfigError(f"--max-memory {text}: {part!r} is not DEVICE=AMOUNT, such as cuda=8GiB,cpu=32GiB")
        # A number is that of a GPU.
        limits[int(place) if place.isdecimal() else place.strip()] = amount
    return limits


def _print(facts: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(facts) if as_json else text)
