"""The small model of our own: trained from its text alone, the same whether in one piece or two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paper_repro.harness.lab import Lab
from paper_repro.materials import own_model
from qlora.pretrained import load_dense, load_tokenizer
from tests import paper_world

SIZE = replace(own_model.CPU, hidden=64, layers=1, feed_forward=64, steps=6, context=16, batch=2)
DEVICE = torch.device("cpu")


def _tokens() -> torch.Tensor:
    return torch.randint(SIZE.vocabulary, (500,), generator=torch.Generator().manual_seed(1))


def test_a_killed_training_ends_as_one_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_model, "SAVE_EVERY", 2)
    straight = own_model.train(
        own_model.new_model(SIZE), _tokens(), SIZE, tmp_path / "straight", DEVICE
    )
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def killed(*args: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", killed)
    with pytest.raises(KeyboardInterrupt):
        own_model.train(own_model.new_model(SIZE), _tokens(), SIZE, tmp_path / "run", DEVICE)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    resumed = own_model.train(own_model.new_model(SIZE), _tokens(), SIZE, tmp_path / "run", DEVICE)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_learns_what_repeats(tmp_path: Path) -> None:
    size = replace(SIZE, steps=60)
    tokens = torch.arange(500) % 7
    network = own_model.train(own_model.new_model(size), tokens, size, tmp_path / "run", DEVICE)
    window = tokens[None, :16]
    assert network(input_ids=window, labels=window).loss < 0.2


def test_it_is_an_ordinary_folder_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper_world.build(tmp_path, monkeypatch)
    lab = Lab(tmp_path / "cache")
    folder = own_model.own_folder(lab)
    network, tokenizer = load_dense(folder), load_tokenizer(folder)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert tokenizer.decode(tokenizer("a tiny world").input_ids) == "a tiny world"
    assert not list((tmp_path / "cache").glob("runs/*"))
    monkeypatch.setattr(own_model, "train", lambda *_: pytest.fail("trained again"))
    assert own_model.own_folder(lab) == folder
