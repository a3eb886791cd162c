"""Each criterion is code in one place: here each is fed a result that should pass, and one that should fail."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from paper_repro.harness.experiment import (
    IN_TREND,
    KINDS,
    NOT_REPRODUCED,
    NOT_RUN,
    OTHER,
    REPORTED,
    REPRODUCED,
    Claim,
    table,
)
from paper_repro.harness.registry import EXPERIMENTS
from tests.paper_world import results


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_criterion_passes_and_can_fail(name: str) -> None:
    result, claims = results(name).passing(), EXPERIMENTS[name].claims
    for claim, break_it in zip(claims, results(name).BREAKING, strict=True):
        assert claim.verdict(None) == NOT_RUN
        if break_it is None:
            assert claim.passes is None
            assert claim.verdict(result) == REPORTED
            continue
        passed = IN_TREND if claim.trend else REPRODUCED
        assert claim.verdict(result) == passed, claim.statement
        broken = copy.deepcopy(result)
        break_it(broken)
        assert claim.verdict(broken) == NOT_REPRODUCED, claim.statement


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_claim_says_what_it_is_about(name: str) -> None:
    result = results(name).passing()
    for claim in EXPERIMENTS[name].claims:
        for words in (claim.statement, claim.paper, claim.criterion, claim.measured(result)):
            assert words.strip()
            assert "nan" not in words.lower().split()
        assert claim.kind in KINDS
        assert claim.paper != "-" or (claim.kind == OTHER and not claim.trend)


def _claim(passed: Any, trend: bool = False) -> Claim:
    return Claim("a", "b", "c", lambda result: passed, lambda result: "d", trend)


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        (_claim(True), REPRODUCED),
        (_claim(True, trend=True), IN_TREND),
        (_claim(False), NOT_REPRODUCED),
        (_claim(False, trend=True), NOT_REPRODUCED),
        (_claim(None), NOT_RUN),
        (Claim("a", "b", "c", None, lambda result: "d"), REPORTED),
    ],
)
def test_verdicts(claim: Claim, verdict: str) -> None:
    assert claim.verdict({}) == verdict
    assert claim.verdict(None) == NOT_RUN


def test_a_table_of_numbers_and_one_of_text() -> None:
    assert table(["a", "b"], [(1, 2)]) == "| a | b |\n| :-- | --: |\n| 1 | 2 |"
    assert table(["a", "b"], [(1, 2)], text=True).splitlines()[1] == "| :-- | :-- |"
