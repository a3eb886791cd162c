"""Perplexity, measured part by part so that two models can be compared on each part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from paper_repro import assets, model, text, wikitext
from paper_repro.lab import Lab
from qlora.data import Example
from qlora.evaluation import evaluate
from qlora.pretrained import load_tokenizer

WINDOWS, WINDOW_TOKENS = 16, 512


def measure(
    model: torch.nn.Module, batches: Sequence[Sequence[Example]], what: str
) -> dict[str, Any]:
    """Mean negative log-likelihood over all learned tokens, in fp32, and that of each batch."""
    parts = []
    for batch in tqdm(batches, desc=f"perplexity, {what}", unit="batch"):
        result = evaluate(model, batch, batch_size=len(batch), precision="float32")
        parts.append((result.nll, result.tokens))
    tokens = sum(count for _, count in parts)
    nll = sum(nll * count for nll, count in parts) / tokens
    return {"nll": nll, "perplexity": math.exp(nll), "tokens": tokens, "parts": parts}


def gap(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Difference of two measurements on the same parts in nats per token, and its standard error."""
    pairs = zip(one["parts"], other["parts"], strict=True)
    differences = [first[0] - second[0] for first, second in pairs]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / max(len(differences) - 1, 1)
    return one["nll"] - other["nll"], math.sqrt(variance / len(differences))


def wikipedia_windows(lab: Lab) -> list[Example]:
    """The first tokens of held-out Wikipedia articles: 16 windows of 512 tokens."""
    dump = assets.wikipedia_file(lab.folder)
    folder = model.model_folder(lab.folder)
    settings = {
        "text": assets.WIKIPEDIA_SHA256,
        "model": assets.MODEL_SHA256,
        "windows": [WINDOWS, WINDOW_TOKENS],
    }
    found = lab.measure(
        "wikipedia-windows", settings, lambda: _cut_windows(dump, folder), (text, wikitext)
    )
    return [Example(ids, ids) for ids in torch.tensor(found["ids"])]


def _cut_windows(dump: Path, folder: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder)
    ids = []
    for prose in text.articles(dump).held_out:
        tokens = tokenizer(prose[: 8 * WINDOW_TOKENS], add_special_tokens=False)["input_ids"]
        if len(tokens) >= WINDOW_TOKENS:
            ids.append(tokens[:WINDOW_TOKENS])
    if len(ids) < WINDOWS:
        raise ValueError(f"the text has {len(ids)} held-out articles of this length, not {WINDOWS}")
    return {"ids": ids[:WINDOWS]}
