"""`quantize`, and `plan`, which takes the same options."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_ao.cli.interruption import stopped_gently
from gptq_ao.cli.options import AsJson, Model, device_of, dtype_of, limits_of, show
from gptq_ao.cli.request import Request, with_request
from gptq_ao.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptq_ao.config import GPTQConfig
    from gptq_ao.distributed.ranks import Ranks
    from gptq_ao.journal.journal import Journal
    from gptq_ao.report import Report

__all__ = ["plan", "quantize", "save", "with_data"]

NATIVE, GGUF = "native", "gguf"


@with_request
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist or be empty. Of GGUF, a file OUT.gguf.")],
    request: Request,
    as_json: AsJson = False,
) -> None:
    """Quantize MODEL and write it to OUT. Started by torchrun, all its processes do it together."""
    from gptq_ao.distributed.launch import launched

    with launched() as ranks, ranks.together():
        _quantize(model, out, request, as_json, ranks)


def _quantize(model: str, out: Path, request: Request, as_json: bool, ranks: "Ranks") -> None:
    if request.calibration is None and request.config.method == "gptq":
        raise ConfigError("GPTQ needs calibration data: --calibration FILE or NAME, or --method rtn")
    _check(request)
    _check_name(out, request)
    # Everything that can be wrong is looked at before a model is loaded.
    limits, place = limits_of(request.limits), device_of(request.device, ranks)
    from gptq_ao.checkpoint.files.find import find_checkpoint
    from gptq_ao.checkpoint.hub import check_login, upload
    from gptq_ao.journal.journal import growing_in, journal_beside
    from gptq_ao.pipeline.quantize_checkpoint import journal_of

    if request.config.adapter_rank:
        from gptq_ao.training.adapters import require_peft

        require_peft()
    if request.push_to_hub is not None and ranks.first:
        check_login()
    with stopped_gently(), ExitStack() as until_done:
        # A GGUF file has to be called one.
        journal, grown = None, growing_in(journal_beside(out)) / f"model{out.suffix if request.format == GGUF else ''}"
        if ranks.first:  # which alone writes
            how, every = "the same command with --resume", request.snapshot_every
            journal = until_done.enter_context(journal_of(out, resume=request.resume, how=how, snapshot_every=every))
            journal.growing()
        source = (
            until_done.enter_context(_unpacked(Path(model), request, journal))
            if model.endswith(".gguf")
            else find_checkpoint(model, whole=True)
        )
        if request.format == GGUF:
            _check_gguf(source, request)
        config = with_data(request, source)
        write = _stream if request.stream else _in_memory
        together = {"device": place, "max_memory": limits, "distributed": ranks.size > 1}
        report = write(source, grown, out, config, request, journal, together)
        if journal is None:
            return
        if report.adapter:
            _save_adapter(source, grown / "adapter", report, request)
        journal.publish(grown, out)
    text = f"{report}\nwritten to {out}"
    if report.adapter:
        text += f"\nPeftModel.from_pretrained(model, {str(out / 'adapter')!r}) puts the adapter beside the weights"
    if request.push_to_hub is not None:
        text += f"\nuploaded to {upload(out, request.push_to_hub)}"
    show({"model": model, "out": str(out), "format": request.format, **report.to_dict()}, text, as_json)


@with_request
def plan(
    model: Annotated[str, typer.Argument(help="A directory with a config.json, or a hub id. No weight is read.")],
    request: Request,
    out: Annotated[Path | None, typer.Argument(help="Not used: what is said of `quantize` may be said here.")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes that quantize together; said is what each takes.")] = 1,
    as_json: AsJson = False,
) -> None:
    """What `quantize` would do to MODEL, and the memory, disk and time it would take."""
    import torch

    from gptq_ao.integrations.transformers import config_directory
    from gptq_ao.model.empty import empty_model
    from gptq_ao.model.weights import ModelWeights
    from gptq_ao.planning.plan import StreamedWeights, plan_weights

    _check(request)
    limits, place = limits_of(request.limits), device_of(request.device)
    # bf16 where the config names no dtype: without the files nothing else says what is stored.
    frame = empty_model(
        config_directory(model),
        dtype_of(request.dtype),
        otherwise=torch.bfloat16,
        trust_remote_code=request.trust_remote_code,
    )
    config = request.config
    if config.method == "gptq":
        # Only shapes count for a plan, so no text is read and no tokenizer loaded.
        ids = torch.empty(request.num_samples, request.seq_len, dtype=torch.int64, device="meta")
        config = config.with_calibration([_inputs(frame.config, rows) for rows in ids.split(request.batch_size)])
    weights = StreamedWeights(frame) if request.stream else ModelWeights(frame)
    # `quantize_checkpoint` holds one file of its result in memory, of at most 2^30 bytes.
    shard_bytes = 2**30 if request.stream else 0
    made = plan_weights(weights, config, device=place, max_memory=limits, shard_bytes=shard_bytes, processes=nproc)
    show({"model": model, **made.to_dict()}, str(made), as_json)


def _check(request: Request) -> None:
    """Options that contradict each other."""
    if request.format == "gptq" and not request.config.sym:
        raise ConfigError("--format gptq holds no asymmetric weights: write gptq_v2 or compressed-tensors, or --sym")
    if request.format in ("compressed-tensors", "awq", "mlx", GGUF) and request.config.act_order == "group":
        raise ConfigError(f"--format {request.format} holds no weights of --act-order group: write gptq or native")
    if request.format == "awq" and (request.config.bits != 4 or request.config.target_bits is not None):
        raise ConfigError("--format awq holds weights of 4 bits only: write gptq, compressed-tensors or native")
    if request.format == GGUF and (request.config.bits not in (4, 8) or request.config.target_bits is not None):
        raise ConfigError("--format gguf holds weights of 4 and 8 bits only: write another format")
    if request.format == GGUF and request.config.bits == 8 and not request.config.sym:
        raise ConfigError("--format gguf holds no asymmetric weights of 8 bits: write another format, or --sym")
    if request.format == GGUF and request.config.adapter_rank:
        raise ConfigError("--format gguf has no place for an adapter beside the weights: write another format")
    if request.output_sharding == "rank" and not (request.stream and request.format == NATIVE):
        raise ConfigError(
            "--output-sharding rank is for --stream and --format native, where weights are written as they are solved: "
            "give these, or leave it out"
        )


@contextmanager
def _unpacked(path: Path, request: Request, journal: "Journal | None") -> Iterator[Path]:
    """A directory, for as long as it is needed, with the numbers that the blocks of a GGUF file stand for."""
    from gptq_ao.integrations.gguf import dense_from_gguf, is_gguf

    if not is_gguf(path):
        raise CheckpointError(f"{path} does not exist")
    if journal is None:
        raise ConfigError("a GGUF file is read by one process: start it without torchrun")
    with TemporaryDirectory(dir=journal.growing()) as temporary:
        dense_from_gguf(path, Path(temporary), dtype_of(request.dtype))
        yield Path(temporary)


def _check_name(out: Path, request: Request) -> None:
    if request.format == GGUF and out.suffix != ".gguf":
        raise ConfigError(f"--format gguf is one file: give a name that ends in .gguf, not {out}")
    if request.format != GGUF and out.suffix == ".gguf":
        raise ConfigError(f"{out} is the name of a GGUF file: give --format gguf, or another name")


def _check_gguf(source: Path, request: Request) -> None:
    """Whether llama.cpp has such a model and such a tokenizer, which is known before hours go into it."""
    from gptq_ao.checkpoint.gguf.write import check_gguf
    from gptq_ao.checkpoint.origin import Origin
    from gptq_ao.model.empty import empty_model

    frame = empty_model(source, trust_remote_code=request.trust_remote_code)
    check_gguf(frame, None, Origin.at(source, {}))


def with_data(request: Request, source: Path) -> "GPTQConfig":
    """The settings, with batches of text where they are needed."""
    if request.calibration is None:
        return request.config
    from gptq_ao.data import text_batches
    from gptq_ao.integrations.transformers import load_tokenizer
    from gptq_ao.model.architecture import model_class, read_config

    config = read_config(source, trust_remote_code=request.trust_remote_code)
    kind = model_class(config, source, trust_remote_code=request.trust_remote_code)
    takes = getattr(kind, "main_input_name", "input_ids")
    if takes != "input_ids":
        raise ConfigError(
            f"the {kind.__name__} takes {takes}, and --calibration gives it text: call quantize_(model, gptq_config("
            "calibration=…)) with its own inputs, or give --method rtn, which needs none"
        )
    batches = text_batches(
        load_tokenizer(str(source), trust_remote_code=request.trust_remote_code),
        request.calibration,
        num_samples=request.num_samples,
        seq_len=request.seq_len,
        batch_size=request.batch_size,
        seed=request.seed,
        column=request.column,
    )
    return request.config.with_calibration([_inputs(config, batch["input_ids"]) for batch in batches])


def _inputs(config: Any, ids: "Tensor") -> dict[str, "Tensor"]:
    """A batch of text as a model takes it."""
    # A decoder that is to write what the encoder reads: text of the kind that it will write.
    return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}


def _save_adapter(source: Path, directory: Path, report: "Report", request: Request) -> None:
    from gptq_ao.model.empty import empty_model
    from gptq_ao.training.adapters import save_adapter

    frame = empty_model(source, trust_remote_code=request.trust_remote_code)
    save_adapter(frame, report.adapter, directory)


def _in_memory(
    source: Path,
    grown: Path,
    out: Path,
    config: "GPTQConfig",
    request: Request,
    journal: "Journal | None",
    together: dict[str, Any],
) -> "Report":
    from gptq_ao.integrations.transformers import load_model
    from gptq_ao.pipeline.quantize import quantize_

    dtype = dtype_of(request.dtype)
    loaded = load_model(str(source), dtype=dtype, trust_remote_code=request.trust_remote_code)
    report = quantize_(loaded, config, journal=journal, **together)
    assert report is not None
    if journal is None:
        return report
    try:
        save(loaded, grown, request, report, otherwise=_otherwise(out))
    except CheckpointError:
        if _otherwise(out).is_dir() and any(_otherwise(out).iterdir()):  # in the other format: nothing is left to do
            journal.remove()
        raise
    return report


def _otherwise(out: Path) -> Path:
    """Where a model goes that its format cannot hold: into a directory, which is not called as a GGUF file is."""
    return out.with_suffix("") if out.suffix == ".gguf" else out


def save(model: "nn.Module", out: Path, request: Request, report: "Report", otherwise: Path | None = None) -> None:
    """Write a quantized model in the format that was asked for. If that cannot hold it, it is written to `otherwise`
    (None: to `out`, too) in the native one."""
    from gptq_ao.checkpoint.save import save_quantized

    try:
        save_quantized(model, out, format=request.format, report=report)
    except CheckpointError as e:
        if request.format == NATIVE:
            raise
        # Hours may have gone into it.
        otherwise = otherwise or out
        save_quantized(model, otherwise, report=report)
        where = f"It was written to {otherwise} in the native format instead"
        e.add_note(f"{where}, which holds everything: see gptq-ao convert")
        raise


def _stream(
    source: Path,
    grown: Path,
    out: Path,
    config: "GPTQConfig",
    request: Request,
    journal: "Journal | None",
    together: dict[str, Any],
) -> "Report":
    from gptq_ao.checkpoint.convert import convert_checkpoint
    from gptq_ao.pipeline.quantize_checkpoint import quantize_checkpoint

    how = {"dtype": dtype_of(request.dtype), "trust_remote_code": request.trust_remote_code, **together}
    how["output_sharding"] = request.output_sharding
    if journal is None:
        return quantize_checkpoint(source, grown, config, **how)
    how["resume"] = journal
    if request.format == NATIVE:
        return quantize_checkpoint(source, grown, config, **how)
    # To convert, the quantized model has to fit in memory.
    with TemporaryDirectory(dir=journal.growing()) as temporary:
        native = Path(temporary) / "native"
        report = quantize_checkpoint(source, native, config, **how)
        trusted = request.trust_remote_code
        convert_checkpoint(native, grown, request.format, report=report, trust_remote_code=trusted)
    return report
