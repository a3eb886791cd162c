"""Figure 3 in small: zero-shot accuracy of language models held in 4 bits, by data type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from paper_repro.harness.digests import digest_of
from paper_repro.harness.experiment import Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from paper_repro.harness.panels import panels
from paper_repro.harness.stats import Interval, bootstrap
from paper_repro.materials import assets
from paper_repro.materials.model import weights_digest
from paper_repro.measures import in_data_type, zero_shot
from paper_repro.measures.in_data_type import (
    BASE,
    DATA_TYPES,
    LABELS,
    MODELS,
    NF4,
    NF4_DQ,
    HeldModel,
    measure_each,
)
from qlora.pretrained import load_tokenizer

TYPES = (BASE, NF4, NF4_DQ, "e2m1", "fp4", "int4")
JUDGED = (BASE, NF4, NF4_DQ, "e2m1")  # all that a quick run has time for
DEFINITIONS, CONTINUATIONS = "definitions", "continuations"
# What each model is asked, and how many questions in a quick and in a full run. Our own model has read a few
# dozen articles and no dictionary.
ASKED = {
    ("smollm2", DEFINITIONS): (40, 160),
    ("smollm2", CONTINUATIONS): (40, 160),
    ("own", CONTINUATIONS): (400, 1600),
}


def run(lab: Lab) -> Result:
    tasks = {CONTINUATIONS: zero_shot.ask(zero_shot.continuations(lab))}
    if data_noun := assets.wordnet_file(lab.folder):
        tasks[DEFINITIONS] = zero_shot.ask(zero_shot.definitions(data_noun))
    held = {
        name: HeldModel(folder, lab.device)
        for name, folder in in_data_type.model_folders(lab).items()
    }
    parts = []
    for (name, task), sizes in ASKED.items():
        if task in tasks:
            questions = tasks[task][: lab.choose(*sizes)]
            found = _measure_part(lab, f"{name}-{task}", held[name], questions)
            parts.append({"model": name, "task": task, "types": found})
    return {"choices": zero_shot.CHOICES, "seeds": [zero_shot.SEED], "parts": parts}


def _measure_part(
    lab: Lab, what: str, held: HeldModel, questions: Sequence[zero_shot.Question]
) -> dict[str, Any]:
    """The margins of each question with the model in each data type."""
    tokenizer = load_tokenizer(held.folder)
    examples = [[zero_shot.example(tokenizer, q.prompt, c) for c in q.choices] for q in questions]
    tokens = [[choice.input_ids.tolist() for choice in choices] for choices in examples]
    settings = {"model": weights_digest(held.folder), "questions": digest_of(tokens)}

    def measure(variant: str) -> dict[str, Any]:
        network, rmse = held.hold(DATA_TYPES[variant])
        margins = zero_shot.margins(network, examples, f"{what}, {LABELS[variant]}")
        return {"margins": margins, "weight_rmse": rmse}

    data_types = {variant: DATA_TYPES[variant] for variant in lab.choose(JUDGED, TYPES)}
    return measure_each(lab, f"figure3-{what}", settings, data_types, measure, (zero_shot,))


FLOAT = "e2m1"
DQ_MOST = 0.01


Values = Callable[[dict[str, Any]], Sequence[float]]


def _pooled(result: Result, of_types: Values) -> tuple[list[float], list[float]]:
    """A value of every question, and what it counts for.

    Each model counts the same, and so does each task of a model.
    """
    models = [part["model"] for part in result["parts"]]
    values: list[float] = []
    weights: list[float] = []
    for part in result["parts"]:
        of_part = of_types(part["types"])
        values += of_part
        weights += [1 / (models.count(part["model"]) * len(of_part))] * len(of_part)
    return values, weights


def _right(types: dict[str, Any], variant: str) -> list[float]:
    """1 for each question that is answered right, 0 for one that is not; a tie is not."""
    return [float(margin > 0) for margin in types[variant]["margins"]]


def _accuracy(result: Result, variant: str) -> float:
    values, weights = _pooled(result, lambda types: _right(types, variant))
    return float(np.average(values, weights=weights))


def _accuracy_gap(result: Result, one: str, other: str) -> Interval:
    def gaps(types: dict[str, Any]) -> list[float]:
        pairs = zip(_right(types, one), _right(types, other), strict=True)
        return [first - second for first, second in pairs]

    return bootstrap(*_pooled(result, gaps))


def _margin_gap(result: Result, one: str, other: str) -> Interval:
    """Nats per token by which margins are larger in one data type than in another, on the same questions."""

    def gaps(types: dict[str, Any]) -> list[float]:
        pairs = zip(types[one]["margins"], types[other]["margins"], strict=True)
        return [first - second for first, second in pairs]

    return bootstrap(*_pooled(result, gaps))


def _nfloat_is_above(result: Result) -> bool:
    at_least = _accuracy(result, NF4_DQ) >= _accuracy(result, FLOAT)
    return at_least and _margin_gap(result, NF4_DQ, FLOAT).low > 0


CLAIMS = (
    Claim(
        statement="Figure 3: mean zero-shot accuracy is higher with NFloat than with Float",
        paper="NFloat above Float at all bits (a plot, no values)",
        criterion="mean accuracy over the two models with NF4 + DQ at least that with E2M1, and the 95 % paired "
        "interval of the mean difference of margins above zero",
        passes=_nfloat_is_above,
        measured=lambda r: (
            f"accuracy {_accuracy(r, NF4_DQ):.1%} against {_accuracy(r, FLOAT):.1%}; margins "
            f"{_margin_gap(r, NF4_DQ, FLOAT)} nats per token, accuracy {show_points(r, NF4_DQ, FLOAT)} points"
        ),
        trend=True,
    ),
    Claim(
        statement="Figure 3: double quantization does not degrade zero-shot accuracy",
        paper="NFloat + DQ at NFloat or above (a plot, no values)",
        criterion=f"mean accuracy over the two models with NF4 + DQ within {100 * DQ_MOST:.0f} point of NF4's",
        passes=lambda r: abs(_accuracy(r, NF4_DQ) - _accuracy(r, NF4)) <= DQ_MOST,
        measured=lambda r: f"{show_points(r, NF4_DQ, NF4)} points",
        trend=True,
    ),
)


def show_points(result: Result, one: str, other: str) -> str:
    """By how many percentage points one data type is more accurate than another."""
    return f"{_accuracy_gap(result, one, other).scaled(100):+.1f}"


def section(result: Result) -> str:
    header = ["linear layers in", *(show_part(part) for part in result["parts"]), "mean"]
    header += ["NF4 + DQ above it, points", "NF4 + DQ above it, margin in nats per token"]
    rows = []
    for variant in show_types(result):
        accuracies = [fmean(_right(part["types"], variant)) for part in result["parts"]]
        row = [
            LABELS[variant],
            *(f"{a:.1%}" for a in accuracies),
            f"{_accuracy(result, variant):.1%}",
        ]
        if variant == NF4_DQ:
            row += ["-", "-"]
        else:
            row += [show_points(result, NF4_DQ, variant)]
            row += [_margin_gap(result, NF4_DQ, variant)]
        rows.append(row)
    asked = "; ".join(
        f"{show_part(part)}: {len(part['types'][BASE]['margins']):,}" for part in result["parts"]
    )
    apart = "; ".join(
        f"{show_part(part)} {_margin_gap({'parts': [part]}, NF4_DQ, FLOAT)}"
        for part in result["parts"]
    )
    tasks = " ".join(show_tasks[task] for task in sorted({p["task"] for p in result["parts"]}))
    return (
        f"One right choice among {result['choices']} (chance: {1 / result['choices']:.0%}), by the mean "
        f"log-likelihood of its tokens after the prompt, with no example given. {tasks} The wrong choices are the "
        f"right ones of other questions, drawn once with a fixed seed. Questions: {asked}. In the mean each model "
        "counts the same. Intervals are 95 %, paired, by a bootstrap over questions.\n\n"
        + table(header, rows)
        + "\n\nThe margin is the score of the right choice above that of the best wrong one. It is the sharper "
        "measure: nearly every question moves it a little, while accuracy sees only the few whose margin changes "
        "its sign. It is not the same measure: margins can grow and no further question be answered. "
        f"Each task by itself, margins with NF4 + DQ above those with E2M1: {apart}. The paper "
        "gives Figure 3 as a plot over its own tasks and models, without a table of values: only its order can be "
        "compared."
    )


show_tasks = {
    CONTINUATIONS: "Continuations are the second halves of sentences of held-out Wikipedia articles.",
    DEFINITIONS: "Definitions are those of WordNet's held-out nouns.",
}


def show_types(result: Result) -> list[str]:
    """The data types that were run, in TYPES' order."""
    return [variant for variant in TYPES if variant in result["parts"][0]["types"]]


def show_part(part: dict[str, Any]) -> str:
    return f"{MODELS[part['model']]}, {part['task']}"


def plots(result: Result, folder: Path) -> dict[str, Path]:
    found = {}
    for part in result["parts"]:
        title = show_part(part).replace(", ", "\n")
        found[title] = {
            LABELS[v]: bootstrap(_right(part["types"], v)).scaled(100) for v in show_types(result)
        }
    path = panels(
        folder / "figure3.svg",
        [LABELS[variant] for variant in show_types(result)],
        found,
        xlabel="questions answered right, % (dashed: chance)",
        line=100 / result["choices"],
    )
    return {"Zero-shot accuracy by data type, with 95 % intervals that are not paired": path}


EXPERIMENT = Experiment(
    "figure3", "Figure 3: zero-shot accuracy by data type", (1.3, 7), run, CLAIMS, section, plots
)
