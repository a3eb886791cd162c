"""One of the adapters of Tables 3 and 4 to look at: what it says, what it weighs, and merging (LoRA, section 4.1)."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from paper_repro import tables34
from paper_repro.harness import draw
from paper_repro.harness.experiment import Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from paper_repro.measures import lora_runs, perplexity
from paper_repro.measures.lora_runs import DENSE, LABELS, NF4_DQ, Run, Subject
from qlora import QLoRALinear, files, merge, requantize
from qlora.adapter_files import BASE_CONFIG
from qlora.generate import generate
from qlora.peft_format import CONFIG, WEIGHTS
from qlora.pretrained import load_tokenizer, place, save_dense

SEED, MERGE_SEEDS, SAMPLE_TOKENS = 0, [0, 1, 2], 24
MERGED_DTYPE = torch.bfloat16
MERGED, ONTO, AGAIN, AGAIN_ONTO = (
    "merged",
    "merged onto the original",
    "quantized again",
    "quantized again onto the original",
)


@dataclass(frozen=True)
class Trained:
    """An adapter that a run has trained, and all that it takes to load it."""

    lab: Lab
    subject: Subject
    run: Run

    @cached_property
    def adapter(self) -> Path:
        return lora_runs.adapter_folder(self.lab, self.subject, self.run)

    def load(self) -> torch.nn.Module:
        return lora_runs.load(self.lab, self.subject, self.run, self.adapter)

    def held_out(self, network: torch.nn.Module, what: str) -> dict[str, Any]:
        return lora_runs.held_out(self.lab, self.subject, network, what)

    def study(self, name: str, function: Callable[[Trained], dict[str, Any]]) -> dict[str, Any]:
        """The value of `function`, remembered by all that the adapter depends on."""
        settings = lora_runs.settings(self.subject, self.run)
        settings |= {"samples": SAMPLE_TOKENS, "prompts": self.subject.task.prompts}
        what = f"finetune-{name}".replace(" ", "-")
        return self.lab.measure(what, settings, lambda: function(self), (lora_runs, perplexity))


def run(lab: Lab) -> Result:
    subject, own = lora_runs.smollm2(lab), lora_runs.own(lab)
    runs = {base: Run(base, tables34.RATES["smollm2"], SEED) for base in (DENSE, NF4_DQ)}
    measured = {base: lora_runs.after(lab, subject, kind) for base, kind in runs.items()}
    shown = Trained(lab, subject, runs[NF4_DQ])
    _copy_adapter(shown.adapter, lab.out / "adapter")
    studies = lab.choose(STUDIES, STUDIES | ONLY_FULL)
    return {
        "model": subject.name,
        "task": subject.task.name,
        "seeds": MERGE_SEEDS,
        "lora": asdict(shown.run.config),
        "recipe": asdict(subject.recipe) | {"learning_rate": shown.run.learning_rate},
        "prompts": subject.task.prompts,
        "answers": subject.task.answers,
        "after": measured,
        "own": [_merged_own(lab, own, seed) for seed in MERGE_SEEDS],
        **{name: shown.study(name, function) for name, function in studies.items()},
    }


def _merged_own(lab: Lab, own: Subject, seed: int) -> dict[str, Any]:
    """One of the own model's adapters of Tables 3 and 4, and the same merged."""
    trained = Trained(lab, own, Run(NF4_DQ, tables34.RATES["own"], seed))
    after = lora_runs.after(lab, own, trained.run)
    return {"after": after["held_out"], MERGED: trained.study(f"{MERGED} own", _merge)}


def _copy_adapter(source: Path, target: Path) -> None:
    """Lay the adapter where a user finds it."""
    with files.new_folder(target) as folder:
        for name in (WEIGHTS, CONFIG, BASE_CONFIG):
            shutil.copy(source / name, folder)


def _samples(trained: Trained) -> dict[str, Any]:
    """Greedy continuations of held-out prompts before and after, and the sizes of adapter and base."""
    lab, subject, run = trained.lab, trained.subject, trained.run
    tokenizer = load_tokenizer(subject.folder)
    said = {}
    for when, folder in (("before", None), ("after", trained.adapter)):
        network = lora_runs.load(lab, subject, run, folder)
        bar = tqdm(subject.task.prompts, desc=f"samples {when} fine-tuning", unit="prompt")
        said[when] = [
            generate(network, tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS).strip()
            for prompt in bar
        ]
    return {
        **said,
        "adapter_bytes": (trained.adapter / WEIGHTS).stat().st_size,
        "base_parameters": _base_parameters(network),
    }


def _base_parameters(network: torch.nn.Module) -> int:
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    quantized = [m.weight.numel for m in network.modules() if isinstance(m, QLoRALinear)]
    return frozen + sum(quantized)


def _merge(trained: Trained) -> dict[str, Any]:
    """Merge into 16 bits, write a model folder, read it with plain transformers and measure that."""
    from transformers import AutoModelForCausalLM

    print("Merging into a 16-bit model ...", flush=True)
    network = merge(trained.load(), MERGED_DTYPE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "merged")
        save_dense(place(network, "cpu", MERGED_DTYPE), trained.subject.folder, folder)
        plain = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    return trained.held_out(plain.to(trained.lab.device), MERGED)


def _merge_onto_original(trained: Trained) -> dict[str, Any]:
    """Merge into 16 bits, over the weights that 4 bits were made of."""
    network = trained.load()
    network = merge(network, MERGED_DTYPE, onto=trained.subject.folder)
    network = place(network, str(trained.lab.device), MERGED_DTYPE).float()
    return trained.held_out(network, ONTO)


def _requantize(trained: Trained, onto: Path | None = None) -> dict[str, Any]:
    """Quantize the sum again, in 4 bits as the base is."""
    network = trained.load()
    done = requantize(network, onto=onto)
    parts = ("error", "adapter", "kept")
    means = {part: sum(getattr(layer, part) for layer in done) / len(done) for part in parts}
    return {**trained.held_out(network, AGAIN), **means}


def _requantize_onto_original(trained: Trained) -> dict[str, Any]:
    return _requantize(trained, trained.subject.folder)


STUDIES = {"samples": _samples, MERGED: _merge}
ONLY_FULL = {ONTO: _merge_onto_original, AGAIN: _requantize, AGAIN_ONTO: _requantize_onto_original}


MERGED_MOST = 0.01


def _perplexity(result: Result, which: str) -> float:
    if which == "after":
        return result["after"][NF4_DQ]["held_out"]["perplexity"]
    return result[which]["perplexity"]


def _merge_change(result: Result) -> float:
    return _perplexity(result, MERGED) / _perplexity(result, "after") - 1


def _merge_changes(result: Result) -> list[float]:
    """Of the adapter to look at, then of the own model's, seed by seed."""
    own = (each[MERGED]["perplexity"] / each["after"]["perplexity"] - 1 for each in result["own"])
    return [_merge_change(result), *own]


CLAIMS = (
    Claim(
        statement="The adapter can be merged into a 16-bit model (LoRA, section 4.1)",
        paper="exact up to rounding",
        criterion=f"plain transformers loads the merged model; its perplexity is within {MERGED_MOST:.0%} of "
        f"the unmerged one's: SmolLM2 (seed {SEED}), the own model (seeds {', '.join(map(str, MERGE_SEEDS))})",
        passes=lambda r: max(map(abs, _merge_changes(r))) <= MERGED_MOST,
        measured=lambda r: " / ".join(f"{change:+.2%}" for change in _merge_changes(r)),
    ),
)


def section(result: Result) -> str:
    recipe, samples = result["recipe"], result["samples"]
    parameters = result["after"][NF4_DQ]["adapter_parameters"]
    share = parameters / samples["base_parameters"]
    return f"""{result["model"]}, {result["task"]}, {recipe["steps"]} steps of {recipe["micro_batch_size"]}, NF4 + DQ, \
LoRA rank {result["lora"]["rank"]} on all linear layers: the run of Tables 3 and 4 with seed {SEED}. What is judged \
here is merging; what fine-tuning gains is judged there, with several seeds.

- The adapter: {parameters:,} parameters, {share:.1%} of the base; {samples["adapter_bytes"]:,} bytes in the folder \
`adapter` beside this report.
- Merged into bf16 and read by plain transformers: perplexity {_perplexity(result, MERGED):.2f}, unmerged \
{_perplexity(result, "after"):.2f} ({_merge_change(result):+.2%}). {show_own(result)}
{show_further(result)}
Greedy continuations; none of these prompts was trained on:

{show_samples(result)}

Try it yourself; the model's folder is `models/smollm2-135m-instruct` in the cache:

```
qlora generate MODEL_FOLDER --adapter ADAPTER_FOLDER \\
    --prompt {shlex.quote(result["prompts"][0])}
```"""


def show_own(result: Result) -> str:
    """The own model, seed by seed."""
    changes = " / ".join(f"{change:+.2%}" for change in _merge_changes(result)[1:])
    seeds = ", ".join(map(str, result["seeds"]))
    return f"The own model's adapters of Tables 3 and 4, seeds {seeds}: {changes}."


def show_further(result: Result) -> str:
    """What --full measures besides."""
    if ONTO not in result:
        return ""
    again, again_onto = result[AGAIN], result[AGAIN_ONTO]
    return f"""- Merged over the weights that the base was quantized from: {_perplexity(result, ONTO):.2f}.
- Merged and quantized again to NF4 + DQ: {again["perplexity"]:.2f}, with {again["kept"]:.0%} of what the adapter had \
added; it is small ({again["adapter"]:.2%} of the weights), and the weights of a 4-bit base go back to the values \
where they were. Over the original weights, quantized then: {again_onto["perplexity"]:.2f}, with \
{again_onto["kept"]:.0%} kept.
"""


def show_samples(result: Result) -> str:
    prompts = [prompt.replace("\n", " / ") for prompt in result["prompts"]]
    said = result["samples"]
    columns = zip(prompts, said["before"], said["after"], result["answers"], strict=True)
    rows = [[_cell(words) for words in row] for row in columns]
    return table(["prompt", "before", "after", "reference"], rows, text=True)


def _cell(words: str) -> str:
    return " ".join(words.replace("|", "/").split()) or "(nothing)"


def plots(result: Result, folder: Path) -> dict[str, Path]:
    path = folder / "finetune.svg"
    with draw.figure(path) as axes:
        for (base, found), color in zip(
            result["after"].items(), (draw.GREY, draw.ORANGE), strict=True
        ):
            steps = range(1, len(found["losses"]) + 1)
            axes.plot(steps, found["losses"], color=color, alpha=0.3, linewidth=1)
            mean = show_running_mean(found["losses"])
            axes.plot(steps, mean, color=color, linewidth=2, label=f"base: {LABELS[base]}")
        axes.set(xlabel="step", ylabel="training loss, nats per token")
        axes.legend(frameon=False)
    return {"Training loss over both bases, each step and its running mean": path}


def show_running_mean(values: list[float], width: int = 10) -> list[float]:
    spans = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]


EXPERIMENT = Experiment(
    "finetune", "An adapter to look at, and merging", (0.6, 1), run, CLAIMS, section, plots
)
