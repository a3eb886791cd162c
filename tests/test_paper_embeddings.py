"""MiniLM's embeddings in each data type: what is embedded, how, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from paper_repro import embeddings
from paper_repro.harness.experiment import VERDICTS
from paper_repro.harness.lab import Lab
from paper_repro.materials import assets
from paper_repro.measures import sentences
from paper_repro.measures.sentences import Encoder, Pairs
from qlora import QLoRALinear
from tests import paper_models, tiny
from tests.paper import write_dump
from tests.paper_results import embeddings as results

WORDS = Pairs(
    "a few words",
    ["stork", "a kettle for tea"],
    ["large wading birds", "boils water", "rain, wind and thunder", "a shop"],
)


@pytest.fixture
def data_noun(tmp_path: Path) -> Path:
    lines = [
        f"{i:08d} 03 n 01 {noun} 0 001 @ 00001930 n 0000 | the meaning of {meaning}"
        for i, (noun, meaning) in enumerate(
            (f"{a}{b}{c}", f"{c}{b}{a}") for a in "abcd" for b in "efg" for c in "hijk"
        )
    ]
    path = tmp_path / "data.noun"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return Encoder(paper_models.minilm(tmp_path / "minilm"), torch.device("cpu"), WORDS)


def test_nouns_ask_for_their_definitions(data_noun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "wordnet_file", lambda cache: data_noun)
    found = sentences.pairs(Path("cache"), texts=30, queries=20)
    assert len(found.queries) == 20
    assert len(set(found.texts)) == 30
    for noun, meaning in zip(found.queries, found.texts, strict=False):
        assert meaning == f"the meaning of {noun[::-1]}"
    assert found.texts != sorted(found.texts)
    assert sentences.pairs(Path("cache"), texts=10, queries=5).texts == found.texts[:10]


def test_without_wordnet_a_sentence_asks_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ["First we look.", "Then we walk away.", "At last we rest, e.g. under a tree."]
    prose = " ".join(order)
    dump = write_dump(tmp_path / "dump.bz2", {"A walk": prose + "\n" + "x " * 200})
    monkeypatch.setattr(assets, "wordnet_file", lambda cache: None)
    monkeypatch.setattr(assets, "wikipedia_file", lambda cache: dump)
    found = sentences.pairs(tmp_path, texts=10, queries=10)
    neighbours = list(zip(found.queries, found.texts, strict=True))
    assert sorted(neighbours) == [(order[0], order[1]), (order[1], order[2])]


def test_an_embedding_is_the_mean_over_the_tokens_of_a_sentence(encoder: Encoder) -> None:
    queries, texts = encoder.original
    assert queries.shape == (2, 64)
    network = AutoModel.from_pretrained(encoder.folder)
    for words, embedding in zip(WORDS.texts, texts, strict=True):
        ids = tiny.tokenizer()(words, return_tensors="pt").input_ids
        with torch.no_grad():
            mean = network(ids).last_hidden_state.mean(1)[0]
        torch.testing.assert_close(embedding, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_all_linear_layers_are_held_in_4_bits(encoder: Encoder) -> None:
    network = sentences._in_data_type(encoder.folder, sentences.DATA_TYPES["nf4+dq"])
    layers = [m for m in network.modules() if isinstance(m, torch.nn.Linear | QLoRALinear)]
    assert len(layers) == 12
    assert all(isinstance(layer, QLoRALinear) for layer in layers)
    assert not torch.equal(encoder.embed("nf4+dq")[1], encoder.original[1])


def test_ranks_count_the_texts_in_front(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    corners = torch.eye(3)
    queries = torch.tensor([[0.1, 0.9, 0.3], [0.2, 0.8, 0.1]])
    monkeypatch.setattr(encoder, "embed", lambda variant: (queries, corners))
    found = embeddings._compare(encoder, "nf4")
    assert found["rank"] == [3, 1]
    assert found["first"] == [1, 1]
    assert found["cosine"] == [1, 1, 1]


def test_differences_are_those_of_the_same_texts() -> None:
    result = results.passing()
    below = embeddings._interval(result, "cosine below", "int4")
    ours, other = (result["variants"][name]["cosine"] for name in ("nf4+dq", "int4"))
    assert below.mean == pytest.approx((sum(ours) - sum(other)) / 3)
    assert embeddings._interval(result, "recall below", "int4").mean == 0
    assert embeddings._recall(result, "base") == pytest.approx(1 / 3)
    assert embeddings._reciprocal_rank(result, "base") == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert embeddings._same_first(result, "nf4") == pytest.approx(2 / 3)


def test_the_experiment_on_a_tiny_encoder(
    data_noun: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "wordnet_file", lambda cache: data_noun)
    monkeypatch.setattr(assets, "minilm_folder", lambda cache: encoder.folder)
    results.shrink(monkeypatch)
    result = embeddings.EXPERIMENT.run(Lab(tmp_path / "cache"))
    assert result["variants"]["base"]["cosine"] == pytest.approx([1] * 24, abs=1e-6)
    assert all(claim.verdict(result) in VERDICTS for claim in embeddings.CLAIMS)
    assert "24 texts and 12 queries" in embeddings.EXPERIMENT.section(result)
    assert all(path.is_file() for path in embeddings.plots(result, tmp_path).values())

    # A second time nothing is measured.
    monkeypatch.setattr(Encoder, "embed", lambda *_: pytest.fail("measured again"))
    assert embeddings.EXPERIMENT.run(Lab(tmp_path / "cache")) == result
