"""Seconds of forward passes of several models, which take turns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from paper_repro.measures import gpt2
from paper_repro.measures.gpt2 import BASE, MERGED, SEED, UNMERGED
from qlora.testing import relative_rmse


@torch.inference_mode()
def measure(
    models: dict[str, nn.Module], batch: int, length: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Seconds of a forward pass of each model, round by round: each takes its turn in each, and in each place.

    Before that the merged model's answers are compared to those of the one that is not, and each model warms up.
    """
    torch.manual_seed(SEED)
    ids = torch.randint(models[BASE].config.vocab_size, (batch, length), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    with _one_thread():
        # Of one row: logits of 32 rows of 512 tokens take 3.3 GB, and are compared in fp64.
        answers = {name: model.to(device)(ids[:1]).logits for name, model in models.items()}
        compared = {
            "apart": relative_rmse(answers[MERGED], answers[UNMERGED]),
            "adapted": relative_rmse(answers[UNMERGED], answers[BASE]),
        }
        answers.clear()
        for model in models.values():
            model(ids, use_cache=False)
        for turn in tqdm(range(rounds), desc=f"forward passes, {batch}/{length}", unit="round"):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(_seconds(models[name], ids))
    base = models[BASE]
    return {
        "seconds": seconds,
        "added": {name: gpt2.added_parameters(model, base) for name, model in models.items()},
        "base_parameters": sum(parameter.numel() for parameter in base.parameters()),
        "same_layout": gpt2.layout(models[MERGED]) == gpt2.layout(base),
        **compared,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """The CPU's part on one thread: two would wait for each other wherever another job has a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds(model: nn.Module, ids: torch.Tensor) -> float:
    """Of a forward pass: by events on a GPU, else the time that the thread had a core."""
    if not ids.is_cuda:
        started = time.thread_time()
        model(ids, use_cache=False)
        return time.thread_time() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    model(ids, use_cache=False)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000
