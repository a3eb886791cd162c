"""Tiny models and texts in the places of those that paper_repro fetches, and tiny sizes for each experiment."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from paper_repro.harness.registry import EXPERIMENTS
from paper_repro.materials import assets, model, own_model, text
from paper_repro.measures import lora_runs
from tests import paper_models, tiny
from tests.paper import PARAGRAPH, shrink_llama, write_dump

NOUNS = [f"{a}{b}{c}" for a in "abcdef" for b in "ghijkl" for c in "mnopqr"]


def build(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the world in `folder`; returns the folder for results, which `--out` must be given."""
    network = tiny.model_folder(folder / "model")
    data_noun = folder / "data.noun"
    lines = [
        f"{i:08d} 03 n 01 {noun} 0 001 @ 00001930 n 0000 | the meaning of number {i}"
        for i, noun in enumerate(NOUNS)
    ]
    data_noun.write_text("\n".join(lines))
    pages = {f"Title {i}": "\n".join([f"Article {i}. {PARAGRAPH}"] * 20) for i in range(80)}
    dump = write_dump(folder / "dump.bz2", pages)
    monkeypatch.setattr(model, "model_folder", lambda cache: network)
    paper_models.stand_in(folder, monkeypatch)
    monkeypatch.setattr(assets, "wordnet_file", lambda cache: data_noun)
    monkeypatch.setattr(assets, "wikipedia_file", lambda cache: dump)
    held_out = tuple(noun for noun in NOUNS if text.is_held_out(noun, 20))
    monkeypatch.setattr(text, "SAMPLE_NOUNS", held_out[:2])
    shrink_llama(monkeypatch)
    shrink_runs(monkeypatch)
    for name in EXPERIMENTS:
        results(name).shrink(monkeypatch)
    monkeypatch.setenv("QLORA_CACHE", str(folder / "cache"))
    return folder / "out"


def shrink_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that is trained here, and LoRA's runs."""
    size = replace(own_model.CPU, layers=1, hidden=64, feed_forward=64, vocabulary=300)
    monkeypatch.setattr(own_model, "CPU", replace(size, steps=4, batch=2))
    monkeypatch.setattr(lora_runs, "SMOLLM2_SIZES", ((6, 4, 6),) * 2)
    monkeypatch.setattr(lora_runs, "OWN_SIZES", (6, 4, 4, 4))
    monkeypatch.setattr(lora_runs, "EVAL_BATCH", 2)
    monkeypatch.setattr(lora_runs, "RECIPE", replace(lora_runs.RECIPE, checkpoint_every=2))


def results(name: str) -> ModuleType:
    """The hand-written result of an experiment."""
    return importlib.import_module(f"tests.paper_results.{name}")
