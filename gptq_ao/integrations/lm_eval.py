"""Tasks of lm-evaluation-harness (package `lm-eval`, the extra `tasks`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gptq_ao.errors import ConfigError

__all__ = ["score_tasks"]


def score_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    folder: str | Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 4,
) -> dict[str, dict[str, float]]:
    """How well a language model does tasks: task → metric → value, and the metric's standard error as "NAME stderr".

    Args:
        model, tokenizer: as `load_quantized` and transformers give them.
        tasks: names that lm-eval knows, or that YAML files in `folder` define: those whose data is in files need no
            network.
        limit: documents of each task, the first ones. None: all.
        few_shot: examples in each prompt. None: as the task says.

    Raises:
        ConfigError: lm-eval is not installed, a task is not known, or its data cannot be had.
    """
    try:
        from lm_eval import simple_evaluate  # type: ignore[import-not-found]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            f"tasks need lm-eval, which cannot be imported ({error}): pip install 'gptq_ao[tasks]'"
        ) from error
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        place = "" if folder is None else f", nor does {folder} define them"
        raise ConfigError(f"tasks {unknown}: lm-eval does not know them{place}; `lm-eval ls tasks` lists its own")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    # Its seeds are for tasks that draw few-shot examples, which have a seed of their own; others' are left alone.
    seeds = {"random_seed": None, "numpy_random_seed": None, "torch_random_seed": None}
    try:
        found = simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=few_shot,
            log_samples=False, bootstrap_iters=0, **seeds,
        )  # fmt: skip
    except (OSError, ValueError) as error:  # of `datasets`, whose classes derive from these
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"the data of tasks {list(tasks)} cannot be read: {first}. Without a network, define a task by a YAML "
            "file whose dataset_path is json, in a folder that is given (--tasks-folder)"
        ) from error
    return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """lm-eval's "acc,none": 0.5, "acc_stderr,none": 0.1 → "acc": 0.5, "acc stderr": 0.1."""
    numbers = {}
    for key, value in values.items():
        name, *rest = key.split(",")
        if rest and isinstance(value, int | float):
            kind = "" if rest == ["none"] else f" ({','.join(rest)})"
            numbers[name.replace("_stderr", " stderr") + kind] = float(value)
    return numbers
