"""Windows of text, perplexity on them, and a model held in one data type after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qlora
from paper_repro.harness.lab import Lab
from paper_repro.materials import assets
from paper_repro.measures import in_data_type, perplexity
from paper_repro.measures.in_data_type import BASE, DATA_TYPES, DataType, HeldModel
from qlora.pretrained import load_dense, load_tokenizer
from tests import tiny
from tests.paper import PARAGRAPH, write_dump


def test_perplexity_weights_parts_by_their_tokens() -> None:
    network, examples = tiny.llama(), tiny.examples(count=5)
    apart = perplexity.measure(network, [[example] for example in examples], "apart")
    together = perplexity.measure(network, [examples], "together")
    assert apart["tokens"] == together["tokens"]
    assert apart["nll"] == pytest.approx(together["nll"], rel=1e-5)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pages = {f"Title {i}": f"Article {i}. " + PARAGRAPH * (14 + i) for i in range(12)}
    dump = write_dump(tmp_path / "dump.bz2", pages)
    monkeypatch.setattr(assets, "wikipedia_file", lambda cache: dump)
    return tiny.model_folder(tmp_path / "model")


def test_windows_are_the_first_of_each_article_then_the_second(
    folder: Path, tmp_path: Path
) -> None:
    lab = Lab(tmp_path / "cache")
    assert [len(article) for article in perplexity.wikipedia_windows(lab, folder, 2, 32)] == [1, 1]
    every = perplexity.wikipedia_windows(lab, folder, 8, 32)
    counts = [len(article) for article in every]
    assert sum(counts) == 8
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)
    tokenizer = load_tokenizer(folder)
    for article in every:
        words = tokenizer.decode(torch.cat([window.input_ids for window in article]))
        assert words.startswith("Article ")  # one stretch of text from its beginning
        assert all(len(window) == 32 for window in article)


def test_too_many_windows_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"number must be at most \d+: .* got 100000"):
        perplexity.wikipedia_windows(Lab(tmp_path / "cache"), folder, 100_000, 32)


def test_the_digest_depends_on_every_token(folder: Path, tmp_path: Path) -> None:
    lab = Lab(tmp_path / "cache")
    windows = perplexity.wikipedia_windows(lab, folder, 3, 32)
    before = perplexity.digest(windows)
    assert perplexity.digest(perplexity.wikipedia_windows(lab, folder, 3, 32)) == before
    windows[-1][-1].input_ids[-1] += 1
    assert perplexity.digest(windows) != before


def test_a_held_model_starts_from_its_originals_each_time(folder: Path) -> None:
    held, dense = HeldModel(folder, torch.device("cpu")), load_dense(folder)
    original = dense.model.layers[0].mlp.up_proj.weight
    errors = {}
    for name in ("e3m0", "nf4", BASE):
        network, errors[name] = held.hold(DATA_TYPES[name])
        weight = network.model.layers[0].mlp.up_proj.weight
        assert torch.equal(weight, DATA_TYPES[name].hold(original.detach()))
        assert torch.equal(network.lm_head.weight, dense.lm_head.weight)
    assert errors[BASE] == 0 < errors["nf4"] < errors["e3m0"]
    assert torch.equal(weight, original)


def test_what_a_data_type_is_asked_for_is_what_it_does() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    data_type = DataType("nf4", double_quant=True, blocksize=256, scale_format="e4m3")
    q = qlora.quantize_4bit(weight, "nf4", 256, True, "e4m3")
    assert torch.equal(data_type.hold(weight), qlora.dequantize_4bit(q))


def test_the_codebook_is_in_the_settings() -> None:
    values = [i / 8 - 1 for i in range(16)]
    qlora.register_format("settings-test", values)
    assert DataType("settings-test").settings["values"] == values
    assert DATA_TYPES[BASE].settings["values"] is None
    assert in_data_type.LABELS.keys() == DATA_TYPES.keys()


def test_each_data_type_is_remembered_by_itself(tmp_path: Path) -> None:
    lab, asked = Lab(tmp_path), []

    def measure(name: str) -> dict[str, str]:
        asked.append(name)
        return {"of": name}

    def found(names: list[str], **settings: int) -> dict[str, dict[str, str]]:
        chosen = {name: DATA_TYPES[name] for name in names}
        return in_data_type.measure_each(lab, "test", settings, chosen, measure)

    assert found(["nf4"]) == {"nf4": {"of": "nf4"}}
    assert found(["e2m1", "nf4"]) == {"e2m1": {"of": "e2m1"}, "nf4": {"of": "nf4"}}
    assert asked == ["nf4", "e2m1"]
    found(["nf4"], size=2)
    assert asked == ["nf4", "e2m1", "nf4"]


def test_the_code_that_measures_a_data_type_is_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[str] = []

    def keep(what: str, settings: Any, function: Any, modules: Any) -> None:
        sources.extend([function.__code__.co_filename, *(module.__file__ for module in modules)])

    lab = Lab(tmp_path)
    monkeypatch.setattr(lab, "measure", keep)
    chosen = {"nf4": DATA_TYPES["nf4"]}
    in_data_type.measure_each(lab, "test", {}, chosen, lambda name: {}, (perplexity,))
    for file in (__file__, in_data_type.__file__, perplexity.__file__):
        assert file in sources
