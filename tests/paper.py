"""Small texts in the formats that paper_repro reads, small LLaMAs, and a lab that takes itself to have a GPU."""

from __future__ import annotations

import bz2
from pathlib import Path

import pytest
import torch

from paper_repro.harness.lab import Lab
from qlora import shapes

SENTENCE = "A sentence of prose that is long enough to be kept by the cleaner of wiki text."
PARAGRAPH = " ".join([SENTENCE] * 4)

LLAMA = {
    "llama-7b": (256, 6, 4, 704),
    "llama-13b": (320, 6, 4, 832),
    "llama-33b": (384, 8, 4, 1024),
    "llama-65b": (512, 8, 8, 1408),
}
"""Sizes for `qlora.shapes.LLAMA`, in the same order: a plan of the true ones walks through 212 layers."""


def shrink_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """The LLaMAs become small models."""
    assert LLAMA.keys() == shapes.LLAMA.keys()
    for name, shape in LLAMA.items():
        monkeypatch.setitem(shapes.LLAMA, name, shape)


def pretended_gpu(folder: Path) -> Lab:
    """A lab for what never gets to the GPU."""
    lab = Lab(folder)
    lab.device = torch.device("cuda")
    return lab


def write_dump(path: Path, pages: dict[str, str]) -> Path:
    """A compressed MediaWiki dump: these articles, a talk page and a redirect."""
    page = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"
    body = [page.format(title, 0, "", prose) for title, prose in pages.items()]
    body += [
        page.format("Talk:A", 1, "", SENTENCE),
        page.format("Moved", 0, '<redirect title="A" />', SENTENCE),
    ]
    xml = (
        f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(body)}</mediawiki>'
    )
    path.write_bytes(bz2.compress(xml.encode()))
    return path
