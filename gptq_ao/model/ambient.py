"""What training code sets around a call, and what would change the result of one that means the model as it is."""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["own_precision"]


@contextlib.contextmanager
def own_precision() -> Iterator[None]:
    """Within: no autocast, so that everything is computed in the dtype it has; and no inference mode, whose tensors
    could not take part in training later."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", *(() if accelerator is None else (accelerator.type,))}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
