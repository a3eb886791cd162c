"""The language-model loss, and its mean over a dataset."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qlora.batching import Batch, collate
from qlora.data import IGNORE, Example
from qlora.progress import Progress
from qlora.recipe import PRECISIONS, check_choice


@dataclass(frozen=True)
class EvalResult:
    """Mean negative log-likelihood per learned token in nats, its exponential, and their number."""

    nll: float
    perplexity: float
    tokens: int


def evaluate(
    model: torch.nn.Module,
    data: Iterable[Example] | Iterable[Mapping[str, torch.Tensor]],
    batch_size: int = 8,
    precision: str = "auto",
    progress: bool = False,
) -> EvalResult:
    """Mean loss over all learned tokens of `data`, each token counting the same.

    Args:
        model: a causal language model; left in the mode (training or not) in which it came.
        data: examples, or ready batches with input_ids, labels and, if padded, attention_mask.
        batch_size: examples in a batch; batches given ready are taken as they are.
        precision: "auto", "bfloat16" or "float32", as in TrainConfig.
        progress: show a progress bar.

    Raises:
        ValueError: no token to predict, or tokens that the model cannot take.
        FloatingPointError: the loss is NaN.
    """
    check_batch_size(batch_size)
    batches = list(_batches(data, batch_size))
    check_input(model, [batch["input_ids"] for batch in batches])
    device = device_of(model)
    total, tokens = 0.0, 0
    with module_modes(model, training=False), torch.no_grad(), autocast(device, precision):
        for i, batch in enumerate(Progress(batches, "evaluate", progress), start=1):
            loss = summed_loss(model, batch, device).item()
            if math.isnan(loss):
                raise FloatingPointError(
                    f"the loss is nan in batch {i} of {len(batches)} of the evaluation; "
                    "precision='float32' may help, unless the weights themselves are not finite"
                )
            total += loss
            tokens += count_targets(batch["labels"])
    if tokens == 0:
        raise ValueError("data must have at least one token to predict; it has none")
    nll = total / tokens
    return EvalResult(nll, math.exp(nll) if nll < 700 else math.inf, tokens)


def summed_loss(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Negative log-likelihood in nats of the learned tokens of a batch, summed, in fp32."""
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    if takes_argument(model, "use_cache"):
        inputs["use_cache"] = False
    output = model(**inputs)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    # Position i predicts token i + 1. Moving the labels is cheaper than moving the logits.
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).to(device)
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def count_targets(labels: torch.Tensor) -> int:
    """Tokens of [m, length] labels on which the loss is taken."""
    return int((labels[:, 1:] != IGNORE).sum())


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")


def check_input(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Refuse tokens [..., length] that the model has no position or no embedding for."""
    longest = max((ids.shape[-1] for ids in inputs), default=0)
    if longest > (limit := max_positions(model)):
        raise ValueError(
            f"max_length must be at most {limit} for this model (its max_position_embeddings); "
            f"got an example of {longest} tokens"
        )
    known = _vocabulary(model)
    if inputs and known and (largest := max(int(ids.max()) for ids in inputs)) >= known:
        raise ValueError(
            f"tokens must be below {known}, the size of the model's embedding; got {largest}: the "
            "tokenizer is not this model's"
        )


def max_positions(model: torch.nn.Module) -> float:
    """The most tokens that a transformers model says it takes; infinity for other models."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else math.inf


def _vocabulary(model: torch.nn.Module) -> int | None:
    find = getattr(model, "get_input_embeddings", None)
    return getattr(find(), "num_embeddings", None) if find else None


def takes_argument(model: torch.nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The dtype that a precision means on a device."""
    check_choice("precision", precision, PRECISIONS)
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        precision = "bfloat16" if native else "float32"
    return getattr(torch, precision)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Compute in bfloat16 where the precision means that."""
    dtype = compute_dtype(device, precision)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def module_modes(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode, and for each module back to its mode before."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def _batches(
    data: Iterable[Example] | Iterable[Mapping[str, torch.Tensor]], batch_size: int
) -> Iterator[Batch | Mapping[str, torch.Tensor]]:
    items = list(data)
    if items and isinstance(items[0], Mapping):
        yield from items
        return
    items.sort(key=len, reverse=True)  # less padding, and what does not fit fails at once
    for i in range(0, len(items), batch_size):
        yield collate(items[i : i + batch_size])
