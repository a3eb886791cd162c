"""Perplexity, measured part by part so that two models can be compared on each part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from paper_repro.harness.digests import digest_of
from paper_repro.harness.lab import Lab
from paper_repro.materials import assets, text, wikitext
from paper_repro.materials.model import weights_digest
from paper_repro.measures import in_data_type
from paper_repro.measures.in_data_type import MODELS, DataType, HeldModel
from qlora import files
from qlora.data import Example
from qlora.evaluation import evaluate
from qlora.pretrained import load_tokenizer


class Windows(NamedTuple):
    """Text that a model is measured on: windows in a quick and in a full run, and tokens of each."""

    quick: int
    full: int
    tokens: int


WINDOWS = {"smollm2": Windows(16, 48, tokens=512), "own": Windows(72, 288, tokens=256)}


def in_each(lab: Lab, name: str, data_types: Mapping[str, DataType]) -> dict[str, Any]:
    """Perplexity of one of `in_data_type.MODELS`, its linear layers in each data type, on the same text.

    Returns:
        `articles`, `windows` and `window_tokens` of the text; `perplexity` of each data type: what `measure`
        returns, and `weight_rmse`, the relative RMSE of the weights.
    """
    folder, windows = in_data_type.model_folders(lab)[name], WINDOWS[name]
    number = lab.choose(windows.quick, windows.full)
    articles = wikipedia_windows(lab, folder, number, windows.tokens)
    held = HeldModel(folder, lab.device)

    def measure_type(data_type: str) -> dict[str, Any]:
        network, rmse = held.hold(data_types[data_type])
        return {**measure(network, articles, f"{MODELS[name]}, {data_type}"), "weight_rmse": rmse}

    settings = {"model": weights_digest(folder), "tokens": digest(articles)}
    what = f"perplexity-{name}"
    found = in_data_type.measure_each(lab, what, settings, data_types, measure_type)
    sizes = {"articles": len(articles), "windows": number, "window_tokens": windows.tokens}
    return {**sizes, "perplexity": found}


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


def wikipedia_windows(lab: Lab, folder: Path, number: int, length: int) -> list[list[Example]]:
    """Windows of held-out Wikipedia articles, those of an article together: one part for `measure`.

    Windows of one article are more alike than those of two, so that it is articles that a bootstrap must draw.

    Args:
        folder: a model with the tokenizer that cuts the text.
        number: windows in all: the first of each article, then the second of each, and so on.
        length: tokens of a window.
    """
    dump = assets.wikipedia_file(lab.folder)
    settings = {
        "text": assets.WIKIPEDIA_SHA256,
        "tokenizer": files.sha256(folder / "tokenizer.json"),
        "windows": [number, length],
    }
    found = lab.measure(
        "wikipedia-windows",
        settings,
        lambda: _cut_windows(dump, folder, number, length),
        (text, wikitext),
    )
    return [[Example(ids, ids) for ids in torch.tensor(article)] for article in found["ids"]]


def digest(articles: list[list[Example]]) -> str:
    """The SHA-256 of all tokens: what is measured on them depends on it."""
    return digest_of([[window.input_ids.tolist() for window in article] for article in articles])


def _cut_windows(dump: Path, folder: Path, number: int, length: int) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder)
    cut = []
    for prose in text.articles(dump).held_out:
        tokens = tokenizer(prose, add_special_tokens=False, verbose=False)["input_ids"]
        ends = range(length, len(tokens) + 1, length)
        cut.append([tokens[end - length : end] for end in ends])
    if sum(map(len, cut)) < number:
        raise ValueError(
            f"number must be at most {sum(map(len, cut))}: so many windows of {length} tokens the "
            f"{len(cut)} held-out articles have; got {number}"
        )
    rounds = max(map(len, cut))
    places = [(i, turn) for turn in range(rounds) for i in range(len(cut)) if turn < len(cut[i])]
    taken = Counter(article for article, _ in places[:number])
    return {"ids": [cut[article][:count] for article, count in taken.items()]}
