"""What `quantize` is asked for, and `plan` about: all of their options, declared once."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_ao.cli.options import ActOrder, Device, Dtype, DtypeOption, Effort, Method, TrustRemoteCode
from gptq_ao.errors import ConfigError

if TYPE_CHECKING:
    from gptq_ao.config import GPTQConfig

__all__ = ["EngineName", "OutFormat", "Request", "with_request"]


class OutputSharding(StrEnum):
    """Who writes the shards, of processes that quantize together."""

    first = "first"
    rank = "rank"


class OutFormat(StrEnum):
    """Of what `quantize` writes."""

    native = "native"
    gptq = "gptq"
    gptq_v2 = "gptq_v2"
    compressed_tensors = "compressed-tensors"
    awq = "awq"
    mlx = "mlx"
    gguf = "gguf"


class EngineName(StrEnum):
    """Of what is to serve it."""

    vllm = "vllm"
    vllm_cpu = "vllm-cpu"
    sglang = "sglang"
    sglang_cpu = "sglang-cpu"
    llama_cpp = "llama.cpp"
    gptqmodel = "gptqmodel"
    mlx = "mlx"
    transformers = "transformers"


@dataclass(frozen=True)
class Request:
    """
    Attributes:
        config: without calibration data.
        calibration: files, presets or datasets' names, each perhaps with `=WEIGHT`; None: text that every Python brings
            along.
        column: the field of it that holds the text.
        seed: of the choice of sequences.
        pack: whether documents are joined to sequences of full length.
        limits: as `--max-memory` has them.
        format: to write; None: what `engine` reads.
        engine: what is to serve it.
        push_to_hub: repository to upload the result to.
        resume: whether to go on with what a run has left.
        snapshot_every: stages from one snapshot of waiting activations to the next; 0: none.
        output_sharding: see `quantize_checkpoint`.
        report: whether to write one beside the weights.
        check: text to compare the result with the original on, a file or a dataset's name; `check_samples`: how many
            sequences of it at most.
        check_split: how many sequences of the calibration data to keep for that instead.
        chat_template: whether the text is what users say to the model.
        max_kl, max_perplexity_ratio: see `QualityCheck`.
        beside: what has to be installed beside the engine, in words.
    """

    config: "GPTQConfig"
    calibration: tuple[str, ...] | None
    column: str
    num_samples: int
    seq_len: int
    batch_size: int
    seed: int
    pack: bool
    stream: bool
    limits: str | None
    format: str | None
    engine: str | None
    device: str | None
    dtype: Dtype
    push_to_hub: str | None
    trust_remote_code: bool
    resume: bool
    snapshot_every: int
    output_sharding: str
    report: bool
    check: str | None
    check_samples: int
    check_split: int | None
    max_kl: float | None
    max_perplexity_ratio: float | None
    chat_template: bool
    beside: str = ""


# Of those that are None, a file or a preset decides, or else what is shown as the default, which is `gptq_config`'s.
def _request(
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8.", show_default="4")] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Stored bits per weight on average, such as 3.5; each weight's bits are chosen."),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Input features per scale; -1: one scale per row.", show_default="128, less where that does not fit"
        ),
    ] = None,
    effort: Annotated[
        Effort | None, typer.Option(help="How much time and memory to spend on accuracy.", show_default="default")
    ] = None,
    act_order: Annotated[
        ActOrder | None, typer.Option(help="Order in which columns are rounded.", show_default="that of the effort")
    ] = None,
    sym: Annotated[
        bool | None,
        typer.Option("--sym/--asym", help="Symmetric grid, or a zero point per group.", show_default="sym"),
    ] = None,
    adapter_rank: Annotated[
        int | None,
        typer.Option(min=0, help="Solve adapters of this rank with the codes; PEFT finds them in OUT/adapter."),
    ] = None,
    damp_percent: Annotated[float | None, typer.Option(help="Damping.", show_default="from the amount of data")] = None,
    method: Annotated[
        Method | None, typer.Option(help="GPTQ, or round to nearest as a baseline.", show_default="gptq")
    ] = None,
    rules: Annotated[
        Path | None, typer.Option(help="YAML or JSON file: name or re:pattern → settings of these weights, or null.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="4bit-128, 4bit-32-act or 3bit-128-act.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON file with settings of gptq_config; options come first.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail instead of falling back.")] = False,
    strict_capture: Annotated[
        bool,
        typer.Option("--strict-capture", help="Fail if the model is not one graph, instead of replaying its forwards."),
    ] = False,
    expert_min_rows: Annotated[
        int | None, typer.Option(min=0, help="Experts with fewer rows share a Hessian.", show_default="128")
    ] = None,
    calibrate_all_experts: Annotated[
        bool, typer.Option("--calibrate-all-experts", help="Every token reaches every expert, for the Hessians only.")
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT[=WEIGHT]",
            help="A .jsonl, .json, .txt or .parquet file, wikitext2, c4, fineweb-edu, ultrachat, tulu3, openthoughts, "
            "hf:REPOSITORY, or a dataset's name; several times, with weights: a mixture.",
            show_default="the sources of Python's standard library",
        ),
    ] = None,
    column: Annotated[str, typer.Option(help="Field of the calibration data that holds the text.")] = "text",
    num_samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that run together.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the choice of sequences.")] = 0,
    pack: Annotated[
        bool,
        typer.Option("--pack/--no-pack", help="Join documents to full sequences, or pad each to the longest."),
    ] = True,
    format: Annotated[
        OutFormat | None, typer.Option(help="What to write.", show_default="native, or what --for reads")
    ] = None,
    engine: Annotated[
        EngineName | None,
        typer.Option("--for", help="What is to serve it: fail at once if it would not, and choose --format."),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Never hold the model in memory: for a directory larger than that.")
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Of the device, and of activations that wait on the host: cuda=8GiB,cpu=32GiB. The rest: files."
        ),
    ] = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    push_to_hub: Annotated[str | None, typer.Option(help="Repository of the hub to upload OUT to.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last stage that a run to OUT has finished, if one has.")
    ] = False,
    snapshot_every: Annotated[
        int, typer.Option(min=0, help="Stages after which waiting activations are kept, too; 0: never.")
    ] = 0,
    output_sharding: Annotated[
        OutputSharding,
        typer.Option(help="Under torchrun: the first process writes the shards of OUT, or every rank some of them."),
    ] = OutputSharding.first,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write OUT/report: a page to look at, and its JSON.")
    ] = True,
    check: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Compare the result with the original on this file, preset or dataset."),
    ] = None,
    check_samples: Annotated[int, typer.Option(min=1, help="Sequences of it at most, evenly spaced.")] = 32,
    check_split: Annotated[
        int | None, typer.Option(min=1, help="Or on so many sequences of the calibration data, kept for that.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="The most that KL(original ‖ result) may be, in nats per token.")
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None, typer.Option(help="The most that perplexity may be, divided by the original's.")
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option("--chat-template", help="Each document is what a user says, in the model's own chat template."),
    ] = False,
) -> Request:
    from gptq_ao.config import gptq_config

    given: dict[str, Any] = {
        "bits": bits,
        "target_bits": target_bits,
        "group_size": group_size,
        "effort": effort,
        "act_order": act_order,
        "sym": sym,
        "adapter_rank": adapter_rank,
        "damp_percent": damp_percent,
        "method": method,
        "rules": None if rules is None else _read(rules, "--rules"),
        "preset": preset,
        "strict": strict or None,
        "strict_capture": strict_capture or None,
        "expert_min_rows": expert_min_rows,
        "calibrate_all_experts": calibrate_all_experts or None,
    }
    settings = {} if config is None else _settings_in(config)
    settings |= {k: v.value if isinstance(v, StrEnum) else v for k, v in given.items() if v is not None}
    return Request(
        gptq_config(**settings),
        tuple(calibration) if calibration else None,
        column,
        num_samples,
        seq_len,
        batch_size,
        seed,
        pack,
        stream,
        max_memory,
        format.value if format is not None else OutFormat.native.value if engine is None else None,
        None if engine is None else engine.value,
        device,
        dtype,
        push_to_hub,
        trust_remote_code,
        resume,
        snapshot_every,
        output_sharding.value,
        report,
        check,
        check_samples,
        check_split,
        max_kl,
        max_perplexity_ratio,
        chat_template,
    )


def with_request(command: Callable[..., None], without: tuple[str, ...] = ()) -> Callable[..., None]:
    """A command with the options of `_request`, but for some, in place of its parameter `request`."""
    shared = {name: p for name, p in signature(_request).parameters.items() if name not in without}
    own = signature(command).parameters

    @functools.wraps(command)
    # typer passes everything by name, so the shared options can be picked out.
    def run(**given: Any) -> None:
        command(request=_request(**{name: given.pop(name) for name in shared}), **given)

    # Where the command has `request`, all shared parameters; its other parameters stay where they are.
    parameters = [q for p in own.values() for q in (shared.values() if p.name == "request" else (p,))]
    # typer reads the one for the order and the defaults, the other for the types.
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _settings_in(path: Path) -> dict[str, Any]:
    """Keyword arguments of `gptq_config` from a file."""
    from gptq_ao.config import gptq_config

    settings = _read(path, "--config")
    # Data is not a setting: it comes from --calibration.
    known = set(signature(gptq_config).parameters) - {"calibration"}
    unknown = sorted(map(str, set(settings) - known))
    if unknown:
        raise ConfigError(f"--config {path} has {unknown[0]!r}, which is no setting: {', '.join(sorted(known))}")
    return settings


def _read(path: Path, option: str) -> dict[str, Any]:
    """What a YAML or JSON file holds.

    Raises:
        ConfigError: it cannot be read, or does not hold names and values.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    # RecursionError: nested very deeply.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        raise ConfigError(f"{option} {path} cannot be read: {e}") from e
    if not isinstance(content, dict):
        raise ConfigError(f"{option} {path} holds a {type(content).__name__}: give names and values, name: value")
    return content
