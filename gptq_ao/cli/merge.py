"""`merge`: a trained adapter of PEFT into the quantized model that it was trained on."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gptq_ao.cli.options import AsJson, device_of, limits_of
from gptq_ao.cli.quantization import save, with_data
from gptq_ao.cli.reports import save_beside, show_report
from gptq_ao.cli.request import Request, with_request
from gptq_ao.errors import ConfigError

__all__ = ["merge"]

# A weight keeps its kind, and a rule says so where it is not to; the model is loaded as it is stored; no journal; and
# what it would be compared with is no model that is there.
OWN = (
    "bits",
    "target_bits",
    "engine",
    "group_size",
    "act_order",
    "sym",
    "method",
    "preset",
    "adapter_rank",
    "stream",
    "dtype",
    "resume",
    "output_sharding",
    "snapshot_every",
    "check",
    "check_samples",
    "check_split",
    "max_kl",
    "max_perplexity_ratio",
)


@partial(with_request, without=OWN)
def merge(
    base: Annotated[str, typer.Argument(help="The quantized model: a directory or a hub id.")],
    adapter: Annotated[str, typer.Argument(help="What PEFT has saved: a directory or a hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist or be empty.")],
    request: Request,
    as_json: AsJson = False,
) -> None:
    """Merge ADAPTER into the quantized BASE and write it to OUT."""
    if request.calibration is None:
        raise ConfigError("to merge takes calibration data like that of the training: --calibration FILE or NAME")
    limits, place = limits_of(request.limits), device_of(request.device)
    from gptq_ao.checkpoint.files.find import find_checkpoint
    from gptq_ao.checkpoint.files.output_directory import check_empty
    from gptq_ao.checkpoint.hub import check_login, upload
    from gptq_ao.integrations.transformers import load_model
    from gptq_ao.training.adapters import load_adapter, require_peft
    from gptq_ao.training.merge import merge_and_requantize_

    require_peft()
    check_empty(out)
    if request.push_to_hub is not None:
        check_login()
    source, directory = find_checkpoint(base, whole=True), find_checkpoint(adapter, whole=True)
    given = with_data(request, source)
    model = load_adapter(load_model(str(source), trust_remote_code=request.trust_remote_code), directory)
    merged, report = merge_and_requantize_(model, given.config, place, max_memory=limits)
    report = dataclasses.replace(report, warnings=(*report.warnings, *given.warnings))
    save(merged, out, request, report)
    unwritten = save_beside(out, report, base, source) if request.report else None
    lines = [f"written to {out}", *([unwritten] if unwritten else [])]
    if request.push_to_hub is not None:
        lines.append(f"uploaded to {upload(out, request.push_to_hub)}")
    show_report({"base": base, "adapter": adapter, "out": str(out), "format": request.format}, report, lines, as_json)
