"""Sentences, and MiniLM's embeddings of them with its linear layers in any data type."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from paper_repro.materials import assets, text, wikitext
from paper_repro.measures.in_data_type import BASE, DATA_TYPES, LABELS, DataType
from qlora import QLoRAConfig, quantize_model

BATCH = 128
_SENTENCE_END = re.compile(r"(?<=[a-z][.!?])\s+(?=[A-Z])")


@dataclass(frozen=True)
class Pairs:
    """What is embedded: `texts`, and `queries`, of which the i-th asks for the i-th text."""

    source: str
    queries: list[str]
    texts: list[str]


def pairs(cache: Path, texts: int, queries: int) -> Pairs:
    """Nouns and their definitions; without WordNet sentences of Wikipedia, each asked for by the one before.

    They are distinct, and their order is shuffled and fixed.
    """
    data_noun = assets.wordnet_file(cache)
    if data_noun is not None:
        source = "nouns and their definitions in WordNet"
        found = {p.meaning: p.noun for p in text.definitions(data_noun)}
    else:
        source = "Wikipedia's sentences, each asked for by the one before it"
        found = dict(_neighbours(assets.wikipedia_file(cache)))
    ordered = sorted(found, key=lambda words: hashlib.sha256(words.encode()).digest())
    chosen = ordered[:texts]
    return Pairs(source, [found[words] for words in chosen[:queries]], chosen)


def _neighbours(dump: Path) -> list[tuple[str, str]]:
    """Sentences of a paragraph, with the one before."""
    found = []
    for _, prose in wikitext.articles(dump):
        for paragraph in prose.split("\n"):
            sentences = _SENTENCE_END.split(paragraph)
            found += zip(sentences[1:], sentences, strict=False)
    return found


class Encoder:
    """MiniLM in any data type: mean of the last layer's outputs over a sentence's tokens, of length 1."""

    def __init__(self, folder: Path, device: torch.device, words: Pairs) -> None:
        self.folder = folder
        self.device = device
        self.words = words

    @cached_property
    def original(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the queries and of the texts by the model as it is."""
        return self.embed(BASE)

    def embed(self, variant: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the queries and of the texts: fp32 [queries, 384] and [texts, 384], on the CPU."""
        network = _in_data_type(self.folder, DATA_TYPES[variant]).to(self.device)
        queries, texts = (
            self._embed(network, sentences, f"embeddings, {LABELS[variant]}")
            for sentences in (self.words.queries, self.words.texts)
        )
        return queries, texts

    @torch.inference_mode()
    def _embed(self, network: torch.nn.Module, sentences: list[str], what: str) -> torch.Tensor:
        # Sentences of one length together: little padding.
        order = torch.tensor([len(words) for words in sentences]).argsort(stable=True)
        rows = None
        for places in tqdm(order.split(BATCH), desc=what, unit="batch"):
            batch = self._tokenizer(
                [sentences[place] for place in places],
                padding=True,
                truncation=True,
                return_tensors="pt",
            ).to(self.device)
            hidden = network(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            means = ((hidden * mask).sum(1) / mask.sum(1)).cpu()
            rows = means.new_empty(len(sentences), means.shape[1]) if rows is None else rows
            rows[places] = means
        return torch.nn.functional.normalize(rows, dim=1)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)


def _in_data_type(folder: Path, data_type: DataType) -> torch.nn.Module:
    """The encoder without its pooler, so that all its linear layers are those of its blocks."""
    from transformers import AutoModel

    network = AutoModel.from_pretrained(folder, dtype=torch.float32)
    network.pooler = None
    if data_type.format is not None:
        quantize_model(network, QLoRAConfig(target_modules=None, **asdict(data_type)))
    return network.eval()
