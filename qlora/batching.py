"""Which examples go into which step, and how they become one padded batch.

The order depends on nothing but (seed, epoch), so a run that resumes needs only its step number.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from qlora.data import IGNORE, Example
from qlora.recipe import TrainConfig

Batch = dict[str, torch.Tensor]

# Examples are sorted by length within groups of this many batches: wide enough that
# neighbours are about equally long, narrow enough that batches differ from epoch to epoch.
BATCHES_PER_LENGTH_GROUP = 50


class StepBatches:
    """The micro-batches of each optimizer step: `batches[step]`, counted from 0."""

    def __init__(self, dataset: Sequence[Example], config: TrainConfig) -> None:
        self.dataset, self.config = dataset, config
        self.lengths = [len(example) for example in dataset]
        self.steps_per_epoch = -(-len(dataset) // config.batch_size)
        self._epoch, self._order = -1, []

    def __getitem__(self, step: int) -> list[Batch]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = (self.config.batch_size, self.config.seed, epoch, self.config.group_by_length)
            self._epoch, self._order = epoch, epoch_batches(self.lengths, *order)
        return [
            collate([self.dataset[i] for i in indices])
            for indices in _chunks(self._order[position], self.config.micro_batch_size)
        ]


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, group_by_length: bool
) -> list[list[int]]:
    """Shuffle the examples of one epoch into batches of indices; the last may be smaller.

    With `group_by_length` a batch holds examples of about the same length. The batch with the
    longest example comes first in epoch 0: a run that will not fit in memory fails at once.
    """
    shuffler = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    shuffler.shuffle(order)
    if not group_by_length:
        return _chunks(order, batch_size)
    batches = [
        batch
        for group in _chunks(order, batch_size * BATCHES_PER_LENGTH_GROUP)
        for batch in _chunks(sorted(group, key=lambda i: -lengths[i]), batch_size)
    ]
    shuffler.shuffle(batches)
    if epoch == 0:
        longest = max(order, key=lambda i: lengths[i])
        batches.sort(key=lambda batch: longest not in batch)
    return batches


def collate(examples: Sequence[Example]) -> Batch:
    """Pad on the right to the longest example: input_ids, attention_mask and labels [m, length].

    The padding token is 0: any token does, as the mask hides it and no loss is taken on it.
    """
    shape = (len(examples), max(len(example) for example in examples))
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORE, dtype=torch.long),
    }
    for row, example in enumerate(examples):
        batch["input_ids"][row, : len(example)] = example.input_ids
        batch["attention_mask"][row, : len(example)] = 1
        batch["labels"][row, : len(example)] = example.labels
    return batch


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
