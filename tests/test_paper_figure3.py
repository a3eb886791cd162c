"""Zero-shot questions: what is asked, how an answer is scored, and how accuracies are compared."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paper_repro import figure3
from paper_repro.harness.experiment import IN_TREND, NOT_REPRODUCED
from paper_repro.harness.lab import Lab
from paper_repro.materials import assets
from paper_repro.measures import zero_shot
from paper_repro.measures.zero_shot import ask, example, margins, scores
from tests import tiny
from tests.paper import write_dump
from tests.paper_results import figure3 as results


class NextIsOneMore(torch.nn.Module):
    """After token t it gives t + 1 a logit of `sure`, and all others 0."""

    def __init__(self, sure: float, vocabulary: int = 8) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(sure * torch.eye(vocabulary).roll(1, 1))

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def _choice(prompt: list[int], completion: list[int]) -> Any:
    tokenizer = lambda part, add_special_tokens: {"input_ids": part}  # noqa: E731
    return example(tokenizer, prompt, completion)


def test_scores_are_of_the_completion_alone_for_each_token() -> None:
    right, half, wrong = (_choice([5, 1], c) for c in ([2, 3, 4], [2, 3, 3], [7]))
    found = scores(NextIsOneMore(sure=2.0), [right, half, wrong], "test")
    normalizer = torch.tensor([2.0] + [0.0] * 7).logsumexp(0).item()
    expected = [2 - normalizer, (4 - 3 * normalizer) / 3, -normalizer]
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_margin_is_that_above_the_best_wrong_choice() -> None:
    right, half, wrong = (_choice([1], c) for c in ([2, 3], [2, 2], [7, 7]))
    first, second = margins(
        NextIsOneMore(2.0), [[right, wrong, half], [half, wrong, right]], "test"
    )
    assert first == pytest.approx(1.0, rel=1e-5)
    assert second == pytest.approx(-1.0, rel=1e-5)


def test_a_tie_is_not_right() -> None:
    one, same = _choice([1], [5]), _choice([1], [6])
    (margin,) = margins(NextIsOneMore(2.0), [[one, same, same, same]], "test")
    assert margin == 0
    assert figure3._right({"base": {"margins": [margin, 0.1]}}, "base") == [0.0, 1.0]


def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network, tokenizer = tiny.llama(), tiny.tokenizer()
    words = [" a", " a much longer completion", " some words", " b c d e f g h i j k l m n"]
    choices = [example(tokenizer, "Prompt:", word) for word in words]
    together = scores(network, choices, "together")
    monkeypatch.setattr(zero_shot, "BATCH", 1)
    assert scores(network, choices, "apart") == pytest.approx(together, rel=1e-5)


def test_wrong_choices_are_right_ones_of_others_and_always_the_same() -> None:
    pairs = [(f"prompt {i}", f" completion {i // 2}") for i in range(40)]
    questions = ask(pairs)
    assert questions == ask(pairs)
    for (prompt, right), question in zip(pairs, questions, strict=True):
        assert (question.prompt, question.choices[0]) == (prompt, right)
        assert len(set(question.choices)) == zero_shot.CHOICES
        assert set(question.choices) <= {completion for _, completion in pairs}
    assert len({question.choices[1:] for question in questions}) > 30


def test_too_few_completions_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs must have at least 4 different completions"):
        ask([("prompt", " one"), ("prompt", " two"), ("prompt", " three")])


def test_continuations_are_second_halves_of_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = "Number {} is a sentence which has just enough words to be halved here."
    pages = {
        f"Title {i}": " ".join(sentence.format(f"{i}x{j}") for j in range(80)) for i in range(12)
    }
    dump = write_dump(tmp_path / "dump.bz2", pages)
    monkeypatch.setattr(assets, "wikipedia_file", lambda cache: dump)
    pairs = zero_shot.continuations(Lab(tmp_path))
    assert pairs == zero_shot.continuations(Lab(tmp_path))
    for prompt, completion in pairs:
        number = prompt.split()[1]
        assert prompt + completion == sentence.format(number)
        assert abs(len(prompt.split()) - len(completion.split())) <= 1


def test_each_model_counts_the_same() -> None:
    result = results.passing()
    for part in result["parts"]:
        repeat = 5 if part["model"] == "own" else 1
        right = 1.0 if part["model"] == "own" else -1.0
        part["types"]["base"]["margins"] = [right] * 4 * repeat
    assert figure3._accuracy(result, "base") == pytest.approx(0.5)


def test_an_interval_with_zero_in_it_is_not_reproduced() -> None:
    result = results.passing()
    claim = figure3.CLAIMS[0]
    assert claim.verdict(result) == IN_TREND
    unclear = copy.deepcopy(result)
    for part in unclear["parts"]:
        float4 = part["types"]["e2m1"]["margins"]
        part["types"]["nf4+dq"]["margins"] = [
            margin + (0.1 if i % 2 else -0.09) for i, margin in enumerate(float4)
        ]
    assert figure3._margin_gap(unclear, "nf4+dq", "e2m1").mean > 0
    assert claim.verdict(unclear) == NOT_REPRODUCED
