"""Program, errors of its weights → how much each of them would harm the model, as gradients tell.

The harm is a quadratic form of the errors, whose matrix (the curvature) is far too large to compute. But one can draw a
random loss L whose gradient has mean zero and that matrix as its covariance. Then an error E of a weight does the harm
½·⟨∂L/∂W, E⟩², to second order and in the mean over draws. Since the rows n of a weight are rounded independently of
each other, their errors are taken one by one, which needs fewer draws for the same accuracy:

    harm = ½ · Σ_sequences Σ_n ( Σ_k ∂L/∂W_nk · E_nk )² / tokens

∂L/∂W sums over all tokens of a sequence before the square is taken, so errors that push all tokens the same way add up.
(If every token's ∂L/∂y_tn were squared on its own, as if their errors were independent, early layers would seem two or
three times less important than they are.)

* Class scores: L is −log p of classes drawn at every token from the model's own distribution, not the data's. The
  curvature is then the Fisher information, and the harm the KL divergence from the original model, nats per token.
* Any other outputs: L is their product with Gaussian noise, over their root mean square. The harm is then half the
  squared error of the outputs, relative to their energy.

Class scores are an output called "logits" of two or more classes and at most three dimensions, or the only output,
without a name, of a model with integer inputs (tokens).

Source: the Fisher information, with classes that the model draws, in Kunstner et al., "Limitations of the empirical
Fisher approximation" (2019).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gptq_ao.distributed.ranks import ALONE, Ranks
from gptq_ao.errors import CalibrationError, ConfigError, NonFiniteError
from gptq_ao.passes.products.token_rows import TokenRows
from gptq_ao.passes.records import Layout, Program, dim, static_size
from gptq_ao.passes.size_conditions import check_sizes
from gptq_ao.solver.hessian import kept_rows

__all__ = ["SEQUENCES", "expected_harm"]

SEQUENCES = 32
Values = Mapping[str, Tensor]


def expected_harm(
    program: Program,
    layouts: Mapping[str, Layout],
    errors: Mapping[str, Tensor],
    batches: Sequence[Values],
    static: Callable[[str], Any],
    device: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """A forward and a backward of each of the first `SEQUENCES` sequences, or of whole batches where these cannot be
    taken apart. Neither the state of the global random number generators nor whether gradients are recorded is changed,
    and no parameter has a gradient afterwards.

    Args:
        errors: W − Ŵ [rows, in_features] of the weights to judge, as `layouts` reads them, on any device.
        batches: by placeholder name.
        static: a parameter, buffer or constant by placeholder name, on `device`.
        ranks: that have the same of all this. Each takes some of the sequences.

    Returns:
        weight → harm, per token.

    Raises:
        ConfigError: there are no gradients, or a weight has none.
        NonFiniteError: a gradient is NaN or infinite.
    """
    inputs = {name for name in program.inputs if name is not None}
    statics = {name: static(name) for name in program.placeholders if name not in inputs}
    totals: dict[str, Tensor] = {}  # fp64 scalars, on the device

    def add(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        # The inner sum of the formula above: per row of the weight, over its columns.
        per_row = (layouts[name].matrix(weight.grad).float() * errors[name].to(device)).sum(1)
        totals[name] = totals.get(name, 0) + per_row.double().square().sum()
        weight.grad = None  # or the next sequence's would be added to it before the square

    for placeholder, name in program.parameters.items():
        statics[placeholder] = statics[placeholder].detach()  # another tensor of the same memory
        if name in errors:
            statics[placeholder].requires_grad_()
            # Each gradient becomes one number as soon as it is complete: all of them at once would take a second model.
            statics[placeholder].register_post_accumulate_grad_hook(lambda weight, name=name: add(name, weight))

    outputs, generator, tokens = _Outputs(program), torch.Generator(device), 0
    for number, sequence in ranks.share(list(enumerate(_sequences(program, batches)))):
        # A generator of its own and a fixed seed for each sequence: the same model and data always get the same bits,
        # whichever rank draws.
        generator.manual_seed(number)
        given = {**statics, **{name: t.to(device) for name, t in sequence.items()}}
        try:
            # The caller may have switched gradients off, and a backward needs a recorded forward.
            with torch.inference_mode(False), torch.enable_grad():
                values = fx.Interpreter(program.module).run(*(given[name] for name in program.placeholders))
                loss, count = outputs.loss(values, sequence, generator)
                del values  # outputs that the loss does not need: freed before the backward
                loss.backward()
        except torch.OutOfMemoryError as e:
            raise ConfigError(
                f"target_bits takes a backward of the model, for which there is no room on {device}: use shorter "
                f"sequences, or give bits instead. {e}"
            ) from e
        except RuntimeError as e:
            raise ConfigError(
                f"target_bits needs gradients of the model's outputs, which cannot be computed: {e}\nGive bits instead"
            ) from e
        tokens += count
    totals, tokens = _of_all(ranks, totals, tokens, list(errors), device)
    _check(errors, totals)
    # ½ as in the formula. Without tokens (all padding) nothing was added, and 0 / 1 is 0.
    return {name: total.item() / 2 / max(tokens, 1) for name, total in totals.items()}


def _of_all(
    ranks: Ranks, totals: Mapping[str, Tensor], tokens: int, names: list[str], device: torch.device
) -> tuple[dict[str, Tensor], int]:
    """What all ranks have counted. A weight of which none has a gradient is in no total."""
    count = torch.tensor(tokens, device=device)
    values = torch.stack([totals.get(n, torch.zeros((), dtype=torch.float64, device=device)) for n in names])
    seen = torch.tensor([int(n in totals) for n in names], device=device)
    ranks.sum_([count, values, seen])
    return {n: total for n, total, there in zip(names, values, seen.tolist(), strict=True) if there}, int(count)


def _sequences(program: Program, batches: Sequence[Values]) -> Iterator[Values]:
    taken = 0
    for batch in batches:
        apart = _apart(program, batch)
        for sequence in apart or [batch]:
            yield sequence
            # A batch that stays in one piece counts as all the sequences in it.
            taken += 1 if apart else max((t.shape[0] for t in batch.values() if t.dim()), default=1)
            if taken >= SEQUENCES:
                return


def _apart(program: Program, batch: Values) -> list[Values]:
    """The rows of a batch, each as a batch of one; none if inputs differ in their number of rows, or if the graph is
    not valid for a single row. (Draws of different sequences are independent, so each is squared on its own.)"""
    # A tensor without axes counts as 0 rows. Beside others that makes the counts differ, alone it gives no rows.
    counts = {t.shape[0] if t.dim() else 0 for t in batch.values()}
    rows = [{name: t[i : i + 1] for name, t in batch.items()} for i in range(max(counts))] if len(counts) == 1 else []
    placeholders = program.placeholders
    fakes = {name: placeholders[name].meta["val"] for name in batch}
    try:
        # They all have the same sizes.
        for row in rows[:1]:
            check_sizes(fakes, row, program.ranges, program.guards, "a sequence")
    except CalibrationError:
        return []
    return list(rows)


def _check(errors: Mapping[str, Tensor], totals: Mapping[str, Tensor]) -> None:
    missed = [name for name in errors if name not in totals]
    if missed:
        raise ConfigError(
            f"target_bits cannot tell how much {', '.join(missed[:3])}{' …' if len(missed) > 3 else ''} matters: no "
            "gradient of the model's outputs reaches it. Give it bits by a rule: rules={name: {'bits': 4}}"
        )
    bad = next((name for name, total in totals.items() if not torch.isfinite(total)), None)
    if bad is not None:
        raise NonFiniteError(
            f"the gradient of {bad!r} is NaN or infinite: run the model in bf16 or fp32, or give bits instead of "
            "target_bits"
        )


class _Outputs:
    """Turns what the graph returns into a loss."""

    def __init__(self, program: Program) -> None:
        nodes = list(next(n for n in program.graph.nodes if n.op == "output").args[0])
        names = program.outputs or (None,) * len(nodes)
        tokens = TokenRows(program)
        self._floats = [i for i, n in enumerate(nodes) if dim(n) and n.meta["val"].is_floating_point()]
        if not self._floats:
            raise ConfigError("target_bits needs gradients, but the model returns no floating-point tensor")
        # Rows of padding are no tokens: nothing is to be drawn for them.
        self._masks = {i: tokens.of(nodes[i]) for i in self._floats}
        places = program.placeholders
        inputs = [places[name].meta["val"] for name in program.inputs if name is not None]
        of_tokens = any(isinstance(v, Tensor) and v.dtype in (torch.int32, torch.int64) for v in inputs)
        # The index of the class scores, by the rule in the docstring of this file; None if there are none.
        self._scores = next(
            (
                i
                for i in self._floats
                if (names[i] == "logits" or (names[i] is None and len(self._floats) == 1 and of_tokens))
                and dim(nodes[i]) in (2, 3)
                and static_size(nodes[i].meta["val"].shape[-1]) not in (None, 1)
            ),
            None,
        )

    def loss(
        self, values: Sequence[Any], batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """The loss of one batch and the number of tokens (rows of the first output) that it sums over."""
        if self._scores is not None:
            return _drawn(self._rows(self._scores, values, batch), generator)
        return _projected([self._rows(i, values, batch) for i in self._floats], generator)

    def _rows(self, index: int, values: Sequence[Any], batch: Mapping[str, Tensor]) -> Tensor:
        """One output as [rows, features] fp32, without the rows that are padding."""
        value = values[index]
        mask, gathers = self._masks[index]
        # The mask has one number per position, which no longer fits rows that were gathered.
        keep = kept_rows(value, batch[mask].to(value.device)) if mask is not None and not gathers else None
        rows = value.reshape(-1, value.shape[-1])
        return (rows if keep is None else rows[keep.flatten()]).float()


def _drawn(scores: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """−log p of one class for each row of `scores` [T, V] fp32, drawn from the distribution that they are; and T."""
    log_p = scores.log_softmax(-1)
    # Detached: a draw is a constant, and the gradient is that of its log-probability alone.
    classes = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    return -log_p.gather(1, classes).sum(), len(scores)


def _projected(outputs: list[Tensor], generator: torch.Generator) -> tuple[Tensor, int]:
    """Σ v·y over all rows of each output y [T, N] fp32, with Gaussian v, divided by the root mean energy of a row, so
    that outputs of any scale count the same. An output with more or fewer rows than the first is weighted as if it had
    as many. Also returns T of the first."""
    count = len(outputs[0])
    loss = outputs[0].new_zeros(())
    for y in outputs:
        energy = y.detach().square().sum(-1).mean()
        noise = torch.randn(y.shape, generator=generator, device=y.device)
        # An output of zeros has no scale to divide by.
        if energy > 0:
            loss = loss + (noise * y).sum() * (count / len(y) / energy).sqrt()
    return loss, count
