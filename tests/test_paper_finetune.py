"""What is judged of merging, by fixed results: the adapter to look at, and the own model's of each seed."""

from __future__ import annotations

from typing import Any

import pytest

from paper_repro import finetune
from paper_repro.harness.experiment import NOT_REPRODUCED, REPRODUCED
from tests.paper_results import finetune as results


def _merged(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [result[finetune.MERGED], *(own[finetune.MERGED] for own in result["own"])]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_one_changed_merge_is_enough(place: int, factor: float) -> None:
    result, claim = results.passing(), finetune.CLAIMS[0]
    assert claim.verdict(result) == REPRODUCED
    _merged(result)[place]["perplexity"] *= factor
    assert claim.verdict(result) == NOT_REPRODUCED


def test_each_change_is_named() -> None:
    result = results.passing()
    for place, merged in enumerate(_merged(result)):
        merged["perplexity"] *= 1 + place / 1000
    changes = finetune.CLAIMS[0].measured(result).split(" / ")
    assert len(set(changes)) == len(changes) == 1 + len(result["seeds"])
    assert " / ".join(changes[1:]) in finetune.section(result)
