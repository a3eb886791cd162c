"""How a learning rate is chosen: until the best one lies between two others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from paper_repro.measures import tuned
from paper_repro.measures.lora_runs import NF4_DQ, Run


def choose(monkeypatch: pytest.MonkeyPatch, loss: Callable[[float], float]) -> dict[str, Any]:
    """What `tuned` returns if a run's validation loss is this function of its learning rate."""

    def after(lab: Any, subject: Any, run: Run) -> dict[str, Any]:
        if not math.isfinite(value := loss(run.learning_rate)):
            raise FloatingPointError("the loss is not finite")
        return {"validation_nll": value, "run": run}

    monkeypatch.setattr(tuned, "after", after)
    return tuned.tuned(None, None, Run(NF4_DQ, 0.0, 0), [0, 1])


def bowl(best: float) -> Callable[[float], float]:
    return lambda rate: abs(math.log(rate / best))


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.01, [0.005, 0.01, 0.02]),
        (0.02, [0.005, 0.01, 0.02, 0.04]),
        (0.08, [0.005, 0.01, 0.02, 0.04, 0.08, 0.16]),
        (0.0025, [0.00125, 0.0025, 0.005, 0.01, 0.02]),
    ],
)
def test_it_goes_on_until_the_best_lies_between_two_others(
    monkeypatch: pytest.MonkeyPatch, best: float, tried: list[float]
) -> None:
    found = choose(monkeypatch, bowl(best))
    assert (found["learning_rate"], found["is_at_edge"]) == (best, False)
    assert [float(rate) for rate in found["rates"]] == tried
    assert [(r["run"].learning_rate, r["run"].seed) for r in found["runs"]] == [
        (best, 0),
        (best, 1),
    ]


@pytest.mark.parametrize(("best", "last"), [(100.0, 0.16), (1e-9, 0.000625)])
def test_it_stops_somewhere_and_says_so(
    monkeypatch: pytest.MonkeyPatch, best: float, last: float
) -> None:
    found = choose(monkeypatch, bowl(best))
    assert (found["learning_rate"], found["is_at_edge"]) == (last, True)


def test_nor_is_one_at_which_another_seed_diverges(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, bowl(0.01))
    without = tuned.after

    def after(lab: Any, subject: Any, run: Run) -> dict[str, Any]:
        if (run.learning_rate, run.seed) == (0.01, 1):
            raise FloatingPointError("the loss is not finite")
        return without(lab, subject, run)

    monkeypatch.setattr(tuned, "after", after)
    found = tuned.tuned(None, None, Run(NF4_DQ, 0.0, 0), [0, 1])
    assert found["learning_rate"] in (0.005, 0.02)
    assert found["rates"]["0.01"] is None
    assert len(found["runs"]) == 2


def test_where_all_diverge_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FloatingPointError, match="diverges at all learning rates"):
        choose(monkeypatch, lambda rate: math.inf)


def test_a_rate_that_diverges_is_not_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    found = choose(monkeypatch, lambda rate: math.inf if rate > 0.02 else bowl(0.02)(rate))
    assert (found["learning_rate"], found["is_at_edge"]) == (0.02, False)
    assert found["rates"]["0.04"] is None
