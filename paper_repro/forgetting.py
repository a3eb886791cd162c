"""What parameter-efficient fine-tuning promises: the base is never forgotten, and tasks are switched, not mixed.

LoRA, section 4.2 ("switch between tasks ... by only swapping the LoRA weights"); QLoRA trains adapters over a
frozen base. Two adapters are trained on one 4-bit base, each on a task of its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from paper_repro.harness import draw
from paper_repro.harness.experiment import Claim, Experiment, Result, seeds_in_words, table
from paper_repro.harness.lab import Lab
from paper_repro.materials import text
from paper_repro.measures import lora_runs, perplexity
from paper_repro.measures.lora_runs import NF4_DQ, Run, Subject
from qlora import adapter_bytes, load_adapter, use_adapter

SEEDS, RATE, WINDOWS = [0, 1, 2], 1e-2, (64, 256)
BASE, TASKS = "base alone", ("definitions", "nouns")
TEXTS = (*TASKS, "encyclopedia")


def run(lab: Lab) -> Result:
    subjects = _subjects(lab)
    windows = perplexity.wikipedia_windows(lab, subjects["definitions"].folder, *WINDOWS)
    runs = []
    for seed in SEEDS:
        adapters, trained = {}, []
        for task, subject in subjects.items():
            kind = Run(NF4_DQ, RATE, seed)
            trained.append(lora_runs.after(lab, subject, kind)["base_is_untouched"])
            adapters[task] = lora_runs.adapter_folder(lab, subject, kind)

        def function(seed: int = seed, adapters: dict[str, Path] = adapters) -> dict[str, Any]:
            return _switch(lab, subjects, windows, seed, adapters)

        settings = {
            task: lora_runs.settings(subjects[task], Run(NF4_DQ, RATE, seed)) for task in TASKS
        }
        settings["windows"] = perplexity.digest(windows)
        found = lab.measure("forgetting", settings, function, (perplexity, lora_runs))
        runs.append({**found, "trained": all(trained)})
    return {"model": subjects["definitions"].name, "seeds": SEEDS, "runs": runs}


def _subjects(lab: Lab) -> dict[str, Subject]:
    """Nouns are defined, and definitions are named: the same pairs, asked the other way round."""
    forwards = lora_runs.own(lab)
    task = text.reversed_task(forwards.task)
    settings = {**forwards.settings, "data": lora_runs.data_digest(task)}
    backwards = replace(forwards, task=task, validation=[], settings=settings)
    return dict(zip(TASKS, (forwards, backwards), strict=True))


def _switch(
    lab: Lab, subjects: dict[str, Subject], windows: Any, seed: int, adapters: dict[str, Path]
) -> dict[str, Any]:
    """Load two adapters on one base, and measure each text with each; the base before, between and after."""
    network = lora_runs.load(
        lab, subjects["definitions"], replace(Run(NF4_DQ, RATE, seed), targets=None)
    )
    before, first = lora_runs.base_digest(network), _nats(lab, network, subjects, windows, None)
    for task, folder in adapters.items():
        load_adapter(network, folder, task)
    found = {
        BASE: first,
        **{task: _nats(lab, network, subjects, windows, task) for task in TASKS},
    }
    return {
        "nats": found,
        "again": _nats(lab, network, subjects, windows, "definitions"),
        "base_again": _nats(lab, network, subjects, windows, None),
        "base_is_untouched": lora_runs.base_digest(network) == before,
        "adapter_bytes": {task: adapter_bytes(network, task)[0] for task in TASKS},
    }


def _nats(
    lab: Lab, network: torch.nn.Module, subjects: dict[str, Subject], windows: Any, name: str | None
) -> dict[str, float]:
    """Nats per token of each text, with one adapter or none."""
    with use_adapter(network, name):
        found = {
            task: lora_runs.held_out(lab, subject, network, f"{task}, with {name or BASE}")["nll"]
            for task, subject in subjects.items()
        }
        found["encyclopedia"] = perplexity.measure(network, windows, "encyclopedia")["nll"]
    return found


def _mean(result: Result, adapter: str, of: str) -> float:
    nats = [run["nats"][adapter][of] for run in result["runs"]]
    return sum(nats) / len(nats)


def _learned(run: dict[str, Any]) -> bool:
    """Whether each adapter is best at its own task."""
    nats = run["nats"]
    return all(
        nats[task][task] < min(nats[other][task] for other in (BASE, *TASKS) if other != task)
        for task in TASKS
    )


def _forgot(result: Result) -> str:
    costs = [_mean(result, t, "encyclopedia") - _mean(result, BASE, "encyclopedia") for t in TASKS]
    left = max(
        abs(run["base_again"][of] - run["nats"][BASE][of]) for run in result["runs"] for of in TEXTS
    )
    return (
        " and ".join(f"{cost:+.3f}" for cost in costs)
        + f" nats of encyclopedia while they are on, at most {left:g} when they are off"
    )


CLAIMS = (
    Claim(
        statement="The base is never forgotten: training and switching adapters leave it as it was",
        paper="the pre-trained weights are frozen (LoRA, section 4.1)",
        criterion="with each seed all tensors of the base are bit-identical after training each adapter, and after loading "
        "both and switching; with the adapters off each text has the same nats per token to the last bit",
        passes=lambda r: all(
            run["trained"] and run["base_is_untouched"] and run["base_again"] == run["nats"][BASE]
            for run in r["runs"]
        ),
        measured=lambda r: (
            f"{sum(run['trained'] and run['base_is_untouched'] for run in r['runs'])} of {len(r['runs'])} bit-identical; the adapters "
            f"cost {_forgot(r)}"
        ),
    ),
    Claim(
        statement="Tasks are switched by swapping adapters on one base (LoRA, section 4.2)",
        paper="no figure given",
        criterion="with each seed each adapter is the best of three at its own task, and after switching to the other "
        "and back gives the same nats per token to the last bit",
        passes=lambda r: all(
            _learned(run) and run["again"] == run["nats"]["definitions"] for run in r["runs"]
        ),
        measured=lambda r: ", ".join(
            f"{task} {_mean(r, BASE, task):.3f} to {_mean(r, task, task):.3f} nats"
            for task in TASKS
        ),
        trend=True,
    ),
)


def section(result: Result) -> str:
    rows = [
        (adapter, *(f"{_mean(result, adapter, of):.4f}" for of in TEXTS))
        for adapter in (BASE, *TASKS)
    ]
    sizes = result["runs"][0]["adapter_bytes"]
    return (
        f"Two adapters on one NF4 + DQ base of the {result['model']}: one defines nouns, one names what is defined; of "
        f"{' and '.join(f'{size:,}' for size in sizes.values())} bytes. Held-out nats per token, mean over seeds "
        f"{seeds_in_words(result)}; the encyclopedia is what the base was trained on.\n\n"
        + table(["adapter in use", *TEXTS], rows)
        + "\n\nA merged or fully fine-tuned model would be left with the row of its task. Here each row is there "
        "at any time, the first one to the last bit."
    )


def plots(result: Result, folder: Path) -> dict[str, Path]:
    path = folder / "forgetting.svg"
    colors = dict(zip((BASE, *TASKS), (draw.GREY, draw.ORANGE, draw.BLUE), strict=True))
    with draw.figure(path, height=3.2) as axes:
        for place, (adapter, color) in enumerate(colors.items()):
            at = [group + (place - 1) * 0.26 for group in range(len(TEXTS))]
            nats = [_mean(result, adapter, of) for of in TEXTS]
            axes.bar(at, nats, 0.24, color=color, label=adapter)
            for x, y in zip(at, nats, strict=True):
                axes.text(x, y, f"{y:.2f}", ha="center", va="bottom", color=draw.GREY)
        axes.set_xticks(range(len(TEXTS)), [f"on {of}" for of in TEXTS])
        axes.set(ylabel="nats per token, held out")
        axes.legend(
            title="adapter in use",
            frameon=False,
            ncols=3,
            loc="lower center",
            bbox_to_anchor=(0.5, 1),
        )
    return {"Each text with each adapter on the same base; lower is better": path}


EXPERIMENT = Experiment(
    "forgetting", "The base is not forgotten", (0.8, 1), run, CLAIMS, section, plots
)
