"""Fine-tune the adapters of a quantized model: one readable loop.

    model = AutoModelForCausalLM.from_pretrained(folder)
    qlora.quantize_model(model, qlora.QLoRAConfig())
    train(model, load_dataset("data.jsonl", tokenizer), TrainConfig(), "output")

`output` then holds the adapter in PEFT's format, metrics.jsonl and the latest checkpoints. Run
the same call again after an interruption and it goes on to bit-identical results.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora import files
from qlora.adapter_files import save_adapter
from qlora.adapter_settings import adapted_layers, adapter_config
from qlora.adapters import adapter_parameters, sole_adapter
from qlora.batching import Batch, StepBatches
from qlora.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from qlora.config import QLoRAConfig
from qlora.data import Example
from qlora.evaluation import (
    EvalResult,
    autocast,
    check_input,
    count_targets,
    device_of,
    evaluate,
    module_modes,
    summed_loss,
)
from qlora.fingerprint import base_fingerprint
from qlora.kernels.user_formats import stored_codebook
from qlora.loraplus import loraplus_groups
from qlora.model_parts import plain_name
from qlora.paged import PagedAdamW
from qlora.progress import Progress
from qlora.recipe import TrainConfig, learning_rate
from qlora.recompute import recomputing

__all__ = ["EvalResult", "TrainConfig", "TrainResult", "evaluate", "make_optimizer", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        steps: optimizer steps done in all.
        resumed_from: the step of the checkpoint that this call went on from, 0 for none.
        loss: the last step's mean loss per learned token, in nats.
        evaluation: after the last step, where there was an evaluation set.
        seconds: of this call.
    """

    steps: int
    resumed_from: int
    loss: float
    evaluation: EvalResult | None
    seconds: float


def train(
    model: torch.nn.Module,
    dataset: Sequence[Example],
    config: TrainConfig | None = None,
    output_dir: str | os.PathLike[str] = "output",
    *,
    eval_dataset: Sequence[Example] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> TrainResult:
    """Train the adapters of `model`, in place, and save them to `output_dir`.

    Args:
        model: what `quantize_model` returned from; only its adapters may be trainable.
        dataset: examples, as `load_dataset` makes them.
        config: the recipe; by default Guanaco's.
        output_dir: folder for the adapter, `metrics.jsonl` (a line per step: loss in nats per
            learned token, learning rate, gradient norm before clipping, tokens, seconds) and
            `checkpoint-*`.
        eval_dataset: examples to evaluate on, every `config.evaluate_every` steps and at the end.
        resume: go on from the latest checkpoint in `output_dir`. False deletes the checkpoints
            and the metrics there and starts over.
        progress: show a progress bar.

    Raises:
        ValueError: nothing to train or to train on, or a checkpoint made with other settings.
        FloatingPointError: a loss or gradient that is not finite; the adapters are as before it.
    """
    config = config or TrainConfig()
    started = time.monotonic()
    _check_dataset(dataset, config)
    check_input(model, [item.input_ids for item in (*dataset, *(eval_dataset or ()))])
    parameters = _trainable(model)
    optimizer = make_optimizer(model, config)
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    settings = _settings(model, dataset, config)
    first = _prepare(output, model, optimizer, settings, resume)
    metrics = Metrics(output / "metrics.jsonl", first)
    batches = StepBatches(dataset, config)
    bar = Progress(range(first, config.steps), "train", progress, before=first)
    with _training(model, config):
        for step in bar:
            record = train_step(model, optimizer, parameters, batches[step], config, step)
            done = step + 1
            if eval_dataset and _is_due(done, config.evaluate_every, config.steps):
                result = evaluate(model, eval_dataset, config.micro_batch_size, config.precision)
                record |= {f"eval_{name}": value for name, value in asdict(result).items()}
            metrics.write({"step": done, **record})
            bar.note(loss=record["loss"])
            if _is_due(done, config.checkpoint_every, config.steps):
                files.flush(metrics.path)
                save_checkpoint(output, model, optimizer, done, settings, config.keep_checkpoints)
    save_adapter(model, output)
    return _result(metrics.last, max(first, config.steps), first, time.monotonic() - started)


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    micro_batches: Sequence[Batch],
    config: TrainConfig,
    step: int,
) -> dict[str, float]:
    """One optimizer step over micro-batches, in which each learned token counts the same."""
    started = time.monotonic()
    # All randomness of a step follows from (seed, step): nothing else is needed to repeat it.
    torch.manual_seed(random.Random(f"{config.seed}:{step}").getrandbits(32))
    device = device_of(model)
    targets = sum(count_targets(batch["labels"]) for batch in micro_batches)
    total = torch.zeros((), device=device)
    for batch in micro_batches:
        with autocast(device, config.precision):
            loss = summed_loss(model, batch, device) / targets
        loss.backward()
        total += loss.detach()
    max_norm = config.max_grad_norm or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    loss_value = total.item()
    _check_finite(loss_value, grad_norm, step)
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {
        "loss": loss_value,
        "lr": rate,
        "grad_norm": grad_norm,
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in micro_batches),
        "targets": targets,
        "seconds": round(time.monotonic() - started, 4),
    }


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; its learning rate is set before each step.

    With a `loraplus_ratio` above 1 the factors B are a group of their own, see `loraplus_groups`.
    """
    parameters: list[Any] = _trainable(model)
    if config.loraplus_ratio != 1:
        parameters = loraplus_groups(model, config.learning_rate, config.loraplus_ratio)
    settings = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw_torch":
        return torch.optim.AdamW(parameters, **settings, fused=True)
    bits = 8 if config.optimizer == "paged_adamw_8bit" else 32
    rounding = config.stochastic_rounding
    return PagedAdamW(parameters, **settings, bits=bits, stochastic_rounding=rounding)


class Metrics:
    """A JSON Lines file, one line per step, appended to by single writes."""

    def __init__(self, path: Path, steps: int) -> None:
        """Keep the lines of the first `steps` steps: those after it will be done again."""
        self.path = path
        self.last: dict[str, Any] = {}
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                record = _parse(line)
                if record and record["step"] <= steps:
                    kept.append(line + "\n")
                    self.last = record
        files.write_text(path, "".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.last = record


def _prepare(
    output: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Mapping[str, Any]],
    resume: bool,
) -> int:
    """The step to go on from: restored from a checkpoint, or 0."""
    files.remove_leftovers(output)
    if not resume:
        remove_checkpoints(output)
        return 0
    path = latest_checkpoint(output)
    return load_checkpoint(path, model, optimizer, settings) if path else 0


@contextmanager
def _training(model: torch.nn.Module, config: TrainConfig) -> Iterator[None]:
    """Training mode with gradient checkpointing; afterwards all is as before, generators too."""
    device = device_of(model)
    with (
        module_modes(model, training=True),
        recomputing(model, config.gradient_checkpointing, config.offload_checkpoints),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        yield


def _trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The adapters' parameters. Any others could not be saved, so they must be frozen."""
    trainable = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("model must have adapters to train: call quantize_model(model) first")
    if others := sorted(trainable.keys() - adapter_parameters(model).keys()):
        raise ValueError(
            f"only adapters can be trained, and {len(others)} other parameters of the model are "
            f"trainable: {', '.join(others[:3])}. Freeze them with requires_grad_(False)"
        )
    if off := sum(getattr(m, "adapter_enabled", True) is False for m in model.modules()):
        raise ValueError(f"adapters are switched off in {off} layers: call enable_adapters(model)")
    return list(trainable.values())


def _settings(
    model: torch.nn.Module, dataset: Sequence[Example], config: TrainConfig
) -> dict[str, dict[str, Any]]:
    """All that the course of a run depends on."""
    recipe = asdict(config)
    no_effect = ("evaluate_every", "checkpoint_every", "keep_checkpoints", "offload_checkpoints")
    for name in no_effect:
        del recipe[name]
    if config.schedule == "constant":
        del recipe["steps"]  # a finished run may be prolonged
    digest = hashlib.sha256()
    for example in dataset:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.input_ids.numpy().tobytes() + example.labels.numpy().tobytes())
    data = {"examples": len(dataset), "sha256": digest.hexdigest()}
    adapter = adapter_config(model)
    layers = adapted_layers(model, sole_adapter(model))
    base = {"fingerprint": base_fingerprint(layers), "codebook": stored_codebook(adapter.format)}
    return {"recipe": recipe, "adapter": _as_json(adapter), "base": base, "data": data}


def _as_json(config: QLoRAConfig) -> dict[str, Any]:
    """The fields as they come back from a JSON file; without the layers, which the adapter's file names."""
    fields = asdict(config)
    del fields["target_modules"]
    return {n: list(value) if isinstance(value, tuple) else value for n, value in fields.items()}


def _check_dataset(dataset: Sequence[Example], config: TrainConfig) -> None:
    if len(dataset) == 0:
        raise ValueError("dataset must have at least one example, it is empty")
    for i, example in enumerate(dataset):
        if not isinstance(example, Example):
            raise TypeError(f"dataset must hold Examples, item {i} is a {type(example).__name__}")
        if len(example) > config.max_length:
            raise ValueError(
                f"dataset: example {i} has {len(example)} tokens, more than max_length = "
                f"{config.max_length}"
            )
        if example.targets == 0:
            raise ValueError(f"dataset: example {i} has no token to learn")


def _check_finite(loss: float, grad_norm: float, step: int) -> None:
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {name} is {value} at step {step + 1}; the step was not taken. A lower "
                "learning_rate, warmup_steps or precision='float32' may help"
            )


def _is_due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _parse(line: str) -> dict[str, Any] | None:
    """None for the half-written last line of an interrupted run."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _result(last: dict[str, Any], steps: int, resumed_from: int, seconds: float) -> TrainResult:
    evaluation = None
    if "eval_nll" in last:
        names = ("nll", "perplexity", "tokens")
        evaluation = EvalResult(*(last[f"eval_{name}"] for name in names))
    return TrainResult(steps, resumed_from, last.get("loss", math.nan), evaluation, seconds)
