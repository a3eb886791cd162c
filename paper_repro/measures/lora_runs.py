"""LoRA trained over a base in any data type, and its held-out perplexity: what Tables 3 and 4 and Figures 2 and 4 share.

Runs of one subject differ in what a `Run` says and in nothing else: data, order, steps and evaluation are the same,
and with the same seed so is the adapter's start.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from paper_repro.harness.digests import code_digest, digest_of
from paper_repro.harness.lab import Lab
from paper_repro.materials import assets, model, own_model, text
from paper_repro.measures import perplexity
from paper_repro.measures.in_data_type import BASE, DATA_TYPES, NF4_DQ, DataType
from qlora import QLoRAConfig, files
from qlora.data import Example, load_dataset
from qlora.peft_format import WEIGHTS
from qlora.pretrained import load_quantized, load_tokenizer
from qlora.train import TrainConfig, train

DENSE = "dense"
BASES: dict[str, DataType] = {
    DENSE: DATA_TYPES[BASE],
    **{name: DATA_TYPES[name] for name in (NF4_DQ, "fp4", "int4")},
}
LABELS = {DENSE: "not quantized", NF4_DQ: "NF4 + DQ", "fp4": "FP4", "int4": "Int4"}

ALPHA = 16  # fixed, as in the paper: the learning rate makes up for it (appendix A)
EVAL_BATCH = 8
SMOLLM2_SIZES = ((20, 8, 96), (48, 16, 192))  # quick and full: steps, batch, held-out examples
OWN_SIZES = (32, 16, 240, 120)  # steps, batch, held-out and validation examples
RECIPE = TrainConfig(
    schedule="linear",
    warmup_steps=5,
    gradient_accumulation_steps=1,
    max_length=128,
    max_grad_norm=1.0,
    gradient_checkpointing=False,
    precision="float32",
    checkpoint_every=20,
    keep_checkpoints=1,
)


@dataclass(frozen=True)
class Run:
    """One adapter. `targets` as in QLoRAConfig; `base` one of BASES."""

    base: str
    learning_rate: float
    seed: int
    rank: int = 16
    targets: str | tuple[str, ...] | None = "all-linear"

    @property
    def config(self) -> QLoRAConfig:
        base = asdict(BASES[self.base])
        return QLoRAConfig(rank=self.rank, alpha=ALPHA, target_modules=self.targets, **base)


@dataclass(frozen=True)
class Subject:
    """A model and the texts that it is fine-tuned on, each example once.

    Attributes:
        name: the model's.
        folder: an ordinary model folder.
        task: what is learned; none of its parts shares a headword or an article with another.
        validation: further held-out records, on which a learning rate may be chosen.
        recipe: all of a run but its learning rate and its seed.
        settings: what determines results besides a Run: the model, the data, their sizes.
    """

    name: str
    folder: Path
    task: text.Task
    validation: list[dict[str, str]]
    recipe: TrainConfig
    settings: dict[str, Any]


def smollm2(lab: Lab) -> Subject:
    """SmolLM2; as many steps as there is time for with three seeds."""
    steps, batch, held_out = lab.choose(*SMOLLM2_SIZES)
    folder = model.model_folder(lab.folder)
    return _subject(lab, model.MODEL_NAME, folder, assets.MODEL_SHA256, steps, batch, held_out, 0)


def own(lab: Lab) -> Subject:
    """The model that was never quantized. It is small, so that dozens of runs take minutes."""
    folder = own_model.own_folder(lab)
    return _subject(lab, own_model.NAME, folder, model.weights_digest(folder), *OWN_SIZES)


def _subject(
    lab: Lab,
    name: str,
    folder: Path,
    digest: str,
    steps: int,
    batch: int,
    held_out: int,
    validation: int,
) -> Subject:
    task = _task(lab, steps * batch, held_out + validation)
    settings = {
        "model": digest,
        "data": data_digest(task),
        "examples": [steps, batch, held_out, validation],
    }
    rest = task.held_out[held_out:]
    task = replace(task, held_out=task.held_out[:held_out])
    recipe = replace(RECIPE, steps=steps, micro_batch_size=batch)
    return Subject(name, folder, task, rest, recipe, settings)


def _task(lab: Lab, train: int, held_out: int) -> text.Task:
    """WordNet's definitions, or Wikipedia's prose where they cannot be fetched."""
    data_noun = assets.wordnet_file(lab.folder)
    if data_noun is not None:
        return text.definition_task(data_noun, train, held_out)
    return text.continuation_task(assets.wikipedia_file(lab.folder), train, held_out)


def data_digest(task: text.Task) -> str:
    """The SHA-256 of all records."""
    return digest_of([task.train, task.held_out])


def before(lab: Lab, subject: Subject, base: str) -> dict[str, Any]:
    """Held-out perplexity of a base without an adapter, as of `perplexity.measure`."""

    def function() -> dict[str, Any]:
        network = load(lab, subject, Run(base, learning_rate=0.0, seed=0))
        return held_out(lab, subject, network, f"{subject.name}, {LABELS[base]}")

    settings = {**subject.settings, "base": BASES[base].settings, "batch": EVAL_BATCH}
    return lab.measure(_name("before", subject, base), settings, function, (perplexity,))


def after(lab: Lab, subject: Subject, run: Run) -> dict[str, Any]:
    """Train an adapter, and measure it as `before` does.

    Returns:
        "held_out", as of `perplexity.measure`; "validation_nll", or None where there are no such records; "losses" of
        the steps; "base_is_untouched", whether training left all but the adapter as it was; "adapter_parameters".
    """

    def function() -> dict[str, Any]:
        network = load(lab, subject, run)
        before = base_digest(network)
        folder = _train(lab, subject, run, network)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return {
            "held_out": held_out(lab, subject, network, in_words(run)),
            "validation_nll": _validation(lab, subject, network),
            "losses": [json.loads(line)["loss"] for line in lines],
            "base_is_untouched": base_digest(network) == before,
            "adapter_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        }

    what = _name("after", subject, run.base)
    return lab.measure(what, settings(subject, run), function, (perplexity,))


def in_words(run: Run) -> str:
    targets = run.targets if isinstance(run.targets, str) else ", ".join(run.targets)
    return (
        f"{LABELS[run.base]}, r {run.rank} on {targets}, lr {run.learning_rate:g}, seed {run.seed}"
    )


def adapter_folder(lab: Lab, subject: Subject, run: Run) -> Path:
    """Where the run's adapter lies. It is trained again if it is gone, though its numbers are remembered."""
    after(lab, subject, run)
    folder = _run_folder(lab, subject, run)
    if not (folder / WEIGHTS).is_file():
        _train(lab, subject, run, load(lab, subject, run))
    return folder


def _train(lab: Lab, subject: Subject, run: Run, network: torch.nn.Module) -> Path:
    """Train the network's adapter, and return the folder that it is in then."""
    print(f"LoRA, {subject.name}, {in_words(run)}", flush=True)
    recipe = replace(subject.recipe, learning_rate=run.learning_rate, seed=run.seed)
    folder, examples = _run_folder(lab, subject, run), _examples(lab, subject, subject.task.train)
    train(network, examples, recipe, folder, resume=not lab.fresh)
    return folder


def base_digest(network: torch.nn.Module) -> str:
    """The SHA-256 of all that is no adapter: codes, scales, embeddings, norms."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if ".adapters." not in name:
            digest.update(name.encode())
            values = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def _run_folder(lab: Lab, subject: Subject, run: Run) -> Path:
    """Where the run's adapter, checkpoints and metrics lie; another one when this code has changed."""
    key = {**settings(subject, run), "trained by": code_digest([Path(__file__)])}
    return lab.run_folder(_name("run", subject, run.base), key)


def load(lab: Lab, subject: Subject, run: Run, adapter: Path | None = None) -> torch.nn.Module:
    """The run's base with a fresh adapter, the same for the same seed, or with one from a folder."""
    torch.manual_seed(run.seed)
    device, precision = str(lab.device), RECIPE.precision
    return load_quantized(subject.folder, run.config, adapter, device, precision)[0]


def held_out(lab: Lab, subject: Subject, network: torch.nn.Module, what: str) -> dict[str, Any]:
    return _perplexity(lab, subject, network, subject.task.held_out, what)


def _validation(lab: Lab, subject: Subject, network: torch.nn.Module) -> float | None:
    if not subject.validation:
        return None
    return _perplexity(lab, subject, network, subject.validation, "validation")["nll"]


def _perplexity(
    lab: Lab, subject: Subject, network: torch.nn.Module, records: list[dict[str, str]], what: str
) -> dict[str, Any]:
    examples = sorted(_examples(lab, subject, records), key=len)
    batches = [examples[i : i + EVAL_BATCH] for i in range(0, len(examples), EVAL_BATCH)]
    return perplexity.measure(network, batches, what)


def _examples(lab: Lab, subject: Subject, records: list[dict[str, str]]) -> list[Example]:
    """By way of a JSON Lines file, as any user of the library would."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path = lab.folder / "data" / f"{hashlib.sha256(lines.encode()).hexdigest()[:12]}.jsonl"
    if not path.is_file():
        files.write_text(path, lines)
    return _load(path, subject.folder, RECIPE.max_length)


@cache
def _load(path: Path, model_folder: Path, max_length: int) -> list[Example]:
    """Tokenized once for all runs that see it."""
    return load_dataset(path, load_tokenizer(model_folder), max_length)


def settings(subject: Subject, run: Run) -> dict[str, Any]:
    recipe = asdict(replace(subject.recipe, learning_rate=run.learning_rate, seed=run.seed))
    return {
        **subject.settings,
        "recipe": recipe,
        "lora": asdict(run.config),
        "batch": EVAL_BATCH,
    }


def _name(what: str, subject: Subject, base: str) -> str:
    return f"{what}-{subject.name}-{base}".replace(" ", "-").lower()
