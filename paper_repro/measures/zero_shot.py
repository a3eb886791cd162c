"""Zero-shot questions: a prompt, and choices of which a model takes the one that it finds most likely."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from paper_repro.harness.lab import Lab
from paper_repro.materials import assets, text
from qlora.batching import collate
from qlora.data import IGNORE, Example
from qlora.evaluation import module_modes

CHOICES, SEED, BATCH = 4, 0, 16


@dataclass(frozen=True)
class Question:
    """What is asked, and the choices; the first of them is right."""

    prompt: str
    choices: tuple[str, ...]


def definitions(data_noun: Path) -> list[tuple[str, str]]:
    """Prompts and completions of the nouns that nothing here trains on."""
    held_out = text.split_definitions(text.definitions(data_noun)).held_out
    return [(pair.record["prompt"], pair.record["completion"]) for pair in held_out]


def continuations(lab: Lab) -> list[tuple[str, str]]:
    """Sentences of held-out Wikipedia articles, cut in the middle, in a shuffled and fixed order."""
    prose = "\n".join(text.articles(assets.wikipedia_file(lab.folder)).held_out)
    halves = []
    for sentence in re.split(r"(?<=[.!?])\s+", prose):
        words = sentence.split()
        if 12 <= len(words) <= 24:
            middle = len(words) // 2
            halves.append((" ".join(words[:middle]), " " + " ".join(words[middle:])))
    return random.Random(SEED).sample(halves, len(halves))


def ask(pairs: Sequence[tuple[str, str]]) -> list[Question]:
    """A question of each (prompt, completion): the wrong choices are completions of others, drawn once for all."""
    draw_from, questions = random.Random(SEED), []
    completions = sorted({completion for _, completion in pairs})
    if len(completions) < CHOICES:
        raise ValueError(
            f"pairs must have at least {CHOICES} different completions to choose from; they have "
            f"{len(completions)}"
        )
    for prompt, right in pairs:
        drawn = draw_from.sample(completions, CHOICES)
        wrong = [completion for completion in drawn if completion != right][: CHOICES - 1]
        questions.append(Question(prompt, (right, *wrong)))
    return questions


def example(tokenizer: Any, prompt: str, completion: str) -> Example:
    """Tokens of both; only the completion's are scored."""
    first, second = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, completion)
    )
    return Example(torch.tensor(first + second), torch.tensor([IGNORE] * len(first) + second))


def margins(
    network: torch.nn.Module, questions: Sequence[Sequence[Example]], what: str
) -> list[float]:
    """Of each question by how much the score of the right choice, the first, is above that of the best wrong one."""
    scored = iter(scores(network, [choice for choices in questions for choice in choices], what))
    found = []
    for choices in questions:
        right, *wrong = (next(scored) for _ in choices)
        found.append(right - max(wrong))
    return found


def scores(network: torch.nn.Module, examples: Sequence[Example], what: str) -> list[float]:
    """Mean log-likelihood of each example's scored tokens, in nats per token, in fp32."""
    found = [0.0] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))  # less padding
    device = next(network.parameters()).device
    with module_modes(network, training=False), torch.no_grad():
        for start in tqdm(range(0, len(order), BATCH), f"zero-shot, {what}", unit="batch"):
            places = order[start : start + BATCH]
            batch = {k: v.to(device) for k, v in collate([examples[i] for i in places]).items()}
            # Position i predicts token i + 1.
            targets = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORE)
            logits = network(**batch, use_cache=False).logits.flatten(0, 1).float()
            losses = F.cross_entropy(
                logits, targets.flatten(), ignore_index=IGNORE, reduction="none"
            )
            means = -losses.view_as(targets).sum(1) / (targets != IGNORE).sum(1)
            for place, mean in zip(places, means.tolist(), strict=True):
                found[place] = mean
    return found
