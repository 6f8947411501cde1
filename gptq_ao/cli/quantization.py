"""`quantize`, and `plan`, which takes the same options."""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_ao.cli.gguf_files import (
    GGUF,
    NO_REPORT,
    SUFFIX,
    check_name,
    check_settings,
    check_vocabulary,
    directory_beside,
    unpacked,
)
from gptq_ao.cli.interruption import stopped_gently
from gptq_ao.cli.mixture import mixture
from gptq_ao.cli.options import AsJson, Model, device_of, dtype_of, limits_of, show
from gptq_ao.cli.quality import check_limits, destination, held_out, kept_back, rejected
from gptq_ao.cli.reports import save_beside, show_report
from gptq_ao.cli.request import OutFormat, Request, with_request
from gptq_ao.errors import CheckpointError, ConfigError, QualityError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gptq_ao.config import GPTQConfig
    from gptq_ao.distributed.ranks import Ranks
    from gptq_ao.journal.journal import Journal
    from gptq_ao.quality.check import QualityCheck
    from gptq_ao.report import Report

__all__ = ["plan", "quantize", "save", "with_data"]

NATIVE = "native"
_WITHOUT_TEMPLATE = (
    "calibration data: the model has a chat template, and the text is not in it: give --chat-template if chats count"
)
_OWN_TEXT = "the sources of Python's standard library"
_DEFAULT_TEXT = (
    f"calibration data: no --calibration was given, so the model was calibrated with {_OWN_TEXT}, which are code and "
    "English; text like that which the model is for is better"
)


@with_request
def quantize(
    model: Model,
    out: Annotated[
        Path, typer.Argument(help="Directory to write; must not exist or be empty. Of GGUF, a file OUT.gguf.")
    ],
    request: Request,
    as_json: AsJson = False,
) -> None:
    """Quantize MODEL and write it to OUT. Started by torchrun, all its processes do it together."""
    from gptq_ao.distributed.launch import launched

    with launched() as ranks, ranks.together():
        _quantize(model, out, request, as_json, ranks)


def _quantize(model: str, out: Path, request: Request, as_json: bool, ranks: "Ranks") -> None:
    _check(request)
    check_name(out, request)
    # Everything that can be wrong is looked at before a model is loaded.
    limits, place = limits_of(request.limits), device_of(request.device, ranks)
    from gptq_ao.checkpoint.files.find import find_checkpoint
    from gptq_ao.checkpoint.files.output_directory import check_empty
    from gptq_ao.checkpoint.hub import check_login, upload
    from gptq_ao.journal.journal import growing_in, journal_beside
    from gptq_ao.model.empty import empty_model
    from gptq_ao.pipeline.quantize_checkpoint import journal_of

    if request.config.adapter_rank:
        from gptq_ao.training.adapters import require_peft

        require_peft()
    if request.push_to_hub is not None and ranks.first:
        check_login()
    checked = request.check is not None or request.check_split is not None
    if checked and ranks.size > 1:
        raise ConfigError("--check and --check-split are for one process: gptq-ao eval --reference compares afterwards")
    if checked:
        check_empty(rejected(out))
    with stopped_gently(), ExitStack() as until_done:
        # A GGUF file has to be called one.
        journal, grown = None, growing_in(journal_beside(out)) / f"model{SUFFIX if out.suffix == SUFFIX else ''}"
        if ranks.first:  # which alone writes
            how, every = "the same command with --resume", request.snapshot_every
            journal = until_done.enter_context(journal_of(out, resume=request.resume, how=how, snapshot_every=every))
            journal.growing()
        source = (
            until_done.enter_context(unpacked(Path(model), request, journal))
            if model.endswith(SUFFIX)
            else find_checkpoint(model, whole=True)
        )
        request = _for_engine(request, lambda: empty_model(source, trust_remote_code=request.trust_remote_code))
        check_name(out, request)
        if request.format == GGUF:
            check_vocabulary(source, request)
        given = with_data(request, source)
        write = _stream if request.stream else _in_memory
        together = {"device": place, "max_memory": limits, "distributed": ranks.size > 1, "quality": given.check}
        report = write(source, grown, out, given.config, request, journal, together)
        if journal is None:
            return
        report = dataclasses.replace(report, warnings=(*report.warnings, *given.warnings))
        if report.adapter:
            _save_adapter(source, grown / "adapter", report, request)
        unwritten = None
        if request.report:
            unwritten = save_beside(grown, report, model, source) if grown.is_dir() else NO_REPORT
        written = destination(out, report)
        journal.publish(grown, written)
    lines = [f"written to {written}", *([unwritten] if unwritten else [])]
    if "calibration data" in report.recipe:
        lines.append(f"calibrated with {report.recipe['calibration data']}")
    if request.beside:
        lines.append(f"{request.engine} serves it{request.beside}")
    if report.adapter:
        lines.append(
            f"PeftModel.from_pretrained(model, {str(written / 'adapter')!r}) puts the adapter beside the weights"
        )
    good = written == out
    if request.push_to_hub is not None and good:
        lines.append(f"uploaded to {upload(out, request.push_to_hub)}")
    show_report({"model": model, "out": str(written), "format": request.format}, report, lines, as_json)
    if not good and report.quality is not None:
        raise QualityError(
            f"{'; '.join(report.quality.missed)}. What was made is at {written}, and nothing is at {out}: rename it if "
            "it will do all the same, or quantize with more bits, a smaller --group-size, more --effort"
        )


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
    request = _for_engine(request, lambda: frame)
    config = request.config
    if config.method == "gptq":
        # Only shapes count for a plan, so no text is read and no tokenizer loaded.
        ids = torch.empty(request.num_samples, request.seq_len, dtype=torch.int64, device="meta")
        batches = [
            {"input_ids": rows} if request.pack else {"input_ids": rows, "attention_mask": torch.empty_like(rows)}
            for rows in ids.split(request.batch_size)
        ]
        config = config.with_calibration([_inputs(frame.config, **batch) for batch in batches])
    weights = StreamedWeights(frame) if request.stream else ModelWeights(frame)
    # `quantize_checkpoint` holds one file of its result in memory, of at most 2^30 bytes.
    shard_bytes = 2**30 if request.stream else 0
    made = plan_weights(weights, config, device=place, max_memory=limits, shard_bytes=shard_bytes, processes=nproc)
    chosen = {} if request.engine is None else {"for": request.engine, "format": request.format}
    text = f"{made}\nfor {request.engine}: --format {request.format}{request.beside}" if chosen else str(made)
    show({"model": model, **chosen, **made.to_dict()}, text, as_json)


def _check(request: Request) -> None:
    """Options that contradict each other."""
    check_limits(request)
    if request.format == "gptq" and not request.config.sym:
        raise ConfigError("--format gptq holds no asymmetric weights: write gptq_v2 or compressed-tensors, or --sym")
    if request.format in ("compressed-tensors", "awq", "mlx", GGUF) and request.config.act_order == "group":
        raise ConfigError(f"--format {request.format} holds no weights of --act-order group: write gptq or native")
    if request.format == "awq" and (request.config.bits != 4 or request.config.target_bits is not None):
        raise ConfigError("--format awq holds weights of 4 bits only: write gptq, compressed-tensors or native")
    check_settings(request)
    if request.output_sharding == "rank" and not (request.stream and request.format == NATIVE):
        raise ConfigError(
            "--output-sharding rank is for --stream and --format native, where weights are written as they are solved: "
            "give these, or leave it out"
        )


def _for_engine(request: Request, frame: "Callable[[], nn.Module]") -> Request:
    """The request with a format that its engine serves, if it names one.

    Raises:
        ConfigError: the engine does not serve what would be written.
    """
    if request.engine is None:
        return request
    from gptq_ao.checkpoint.engines import advice, alternatives, beside, engine_named, planned, why_not

    contents = planned(frame(), request.config)
    written = [*OutFormat]
    format = request.format or next(iter(alternatives(request.engine, contents, written)), None)
    why = None if format is None else why_not(request.engine, format, contents)
    if format is None or why is not None:
        name = engine_named(request.engine).version
        why = why or f"{name} serves none of {', '.join(written)} with these settings for this model"
        raise ConfigError(f"--for {request.engine}: {why}; {advice(request.engine, contents, written)}")
    rule = alternatives(request.engine, contents, [format])[format]
    request = dataclasses.replace(request, format=format, beside=beside(rule))
    _check(request)
    return request


@dataclass(frozen=True)
class Given:
    """The settings, with batches of text where they are needed; what the result is checked with; and what is to be said
    of the text."""

    config: "GPTQConfig"
    check: "QualityCheck | None" = None
    warnings: tuple[str, ...] = ()


def with_data(request: Request, source: Path) -> Given:
    """What a request means, with its data. GPTQ without `--calibration` gets the text that each Python brings along."""
    calibrated = request.calibration is not None or request.config.method == "gptq"
    if not calibrated and request.check is None:
        return Given(request.config)
    from gptq_ao.data import Batches, text_samples
    from gptq_ao.integrations.transformers import load_tokenizer
    from gptq_ao.model.architecture import model_class, read_config
    from gptq_ao.tiny_lm import corpus

    config = read_config(source, trust_remote_code=request.trust_remote_code)
    kind = model_class(config, source, trust_remote_code=request.trust_remote_code)
    takes = getattr(kind, "main_input_name", "input_ids")
    if takes != "input_ids":
        raise ConfigError(
            f"the {kind.__name__} takes {takes}, and would be calibrated with text: call quantize_(model, gptq_config("
            "calibration=…)) with its own inputs, or give --method rtn, which needs none"
        )
    # Before a tokenizer is loaded: a mistyped weight is to fail at once.
    sources, weights = ([corpus.documents("train")], None) if request.calibration is None else mixture(request)
    tokenizer = load_tokenizer(str(source), trust_remote_code=request.trust_remote_code)
    check = held_out(request, tokenizer)
    if not calibrated:
        return Given(request.config, check)
    drawn = text_samples(
        tokenizer,
        sources,
        weights,
        num_samples=request.num_samples + (request.check_split or 0),
        seq_len=request.seq_len,
        seed=request.seed,
        column=request.column,
        pack=request.pack,
        chat_template=request.chat_template,
    )
    if request.calibration is None:
        said_as = (said.replace("documents in memory", _OWN_TEXT) for said in drawn.sources)
        drawn = dataclasses.replace(drawn, sources=tuple(said_as))
    drawn, kept = kept_back(request, drawn)
    found = drawn.batches(request.batch_size)
    batches = Batches([_inputs(config, **batch) for batch in found], found.described)
    said: tuple[str, ...] = (_DEFAULT_TEXT,) if request.calibration is None else ()
    if getattr(tokenizer, "chat_template", None) and drawn.plain:
        said += (_WITHOUT_TEMPLATE,)
    return Given(request.config.with_calibration(batches), check or kept, said)


def _inputs(config: Any, **inputs: "Tensor") -> dict[str, "Tensor"]:
    """A batch of text as a model takes it."""
    # A decoder that is to write what the encoder reads: text of the kind that it will write.
    decoder = {f"decoder_{name}": value for name, value in inputs.items()} if config.is_encoder_decoder else {}
    return {**inputs, **decoder}


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
    out = destination(out, report)
    try:
        save(loaded, grown, request, report, otherwise=directory_beside(out))
    except CheckpointError:
        if directory_beside(out).is_dir() and any(
            directory_beside(out).iterdir()
        ):  # in the other format: nothing is left to do
            journal.remove()
        raise
    return report


def save(model: "nn.Module", out: Path, request: Request, report: "Report", otherwise: Path | None = None) -> None:
    """Write a quantized model in the format that was asked for. If that cannot hold it, it is written to `otherwise`
    (None: to `out`, too) in the native one."""
    from gptq_ao.checkpoint.save import save_quantized

    try:
        save_quantized(model, out, format=request.format or NATIVE, report=report, engine=request.engine)
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
        to = request.format or NATIVE
        convert_checkpoint(native, grown, to, report=report, trust_remote_code=trusted, engine=request.engine)
    return report
