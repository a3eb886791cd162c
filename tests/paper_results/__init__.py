"""For each experiment: a result in which every claim holds, what makes each claim fail, and tiny sizes.

A module here has the experiment's name, and in it
    passing()    a result as the experiment's `run` returns it, written by hand;
    BREAKING     for each claim, in their order, a function that changes the result so that it fails; None
                 for a claim that is only reported;
    shrink(monkeypatch)    sizes at which the experiment runs in a second or two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def change(*path: Any, to: Any) -> Callable[[Any], None]:
    """A function that sets one entry of a nested result."""

    def set_entry(result: Any) -> None:
        for key in path[:-1]:
            result = result[key]
        result[path[-1]] = to

    return set_entry


def measured(perplexity: float, **more: Any) -> dict[str, Any]:
    """What `perplexity.measure` returns, of two parts alike, and more."""
    nll = math.log(perplexity)
    parts = [(nll, 4088)] * 2
    return {"nll": nll, "perplexity": perplexity, "tokens": 8176, "parts": parts, **more}
