"""The hyperparameters of a run; the defaults are Guanaco's (QLoRA, section 5 and table 9)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("auto", "bfloat16", "float32")
OPTIMIZERS = ("paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch")

_AT_LEAST = {
    **dict.fromkeys(("steps", "micro_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("warmup_steps", "seed", "evaluate_every", "checkpoint_every"), 0),
    **dict.fromkeys(("learning_rate", "max_grad_norm", "weight_decay", "epsilon"), 0),
    "keep_checkpoints": 1,
    "loraplus_ratio": 1,
    "max_length": 2,
    "beta1": 0,
    "beta2": 0,
}


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        learning_rate: peak learning rate.
        loraplus_ratio: how many times higher the learning rate of the adapters' factor B is (LoRA+, Hayou et al.
            2024, who recommend 16).
        schedule: course of the learning rate after the warm-up: "constant", or falling to 0 as
            "linear" or "cosine".
        warmup_steps: optimizer steps over which the learning rate rises from 0.
        steps: optimizer steps in all.
        micro_batch_size: examples that go through the model at once.
        gradient_accumulation_steps: micro-batches in one optimizer step.
        max_length: tokens at which an example is cut.
        group_by_length: put examples of about the same length into a batch.
        max_grad_norm: norm to which the gradient is clipped; 0 for no clipping.
        weight_decay: AdamW's decoupled weight decay.
        beta1: AdamW's decay of the mean gradient.
        beta2: AdamW's decay of the mean squared gradient.
        epsilon: AdamW's term against division by zero.
        optimizer: "paged_adamw_32bit", the paper's, or "paged_adamw_8bit", with state in 32 or 8 bits that
            makes room when GPU memory is short; or "adamw_torch", torch's fused AdamW.
        stochastic_rounding: round bf16 adapters at random in proportion, so that small steps are not lost;
            for the paged optimizers.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them,
            where the model can.
        offload_checkpoints: keep what gradient checkpointing does keep, a hidden state per block, in host
            memory.
        precision: dtype of the computation: "bfloat16", "float32", or "auto", which is bfloat16 on
            a GPU that computes in it and float32 elsewhere.
        seed: seed of the order of examples and of dropout.
        evaluate_every: optimizer steps between evaluations; 0 for only after the last.
        checkpoint_every: optimizer steps between checkpoints; 0 for only after the last.
        keep_checkpoints: how many of the latest checkpoints are kept.

    Raises:
        TypeError, ValueError: a value is not one of the allowed; the message names it.
    """

    learning_rate: float = 2e-4
    loraplus_ratio: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    steps: int = 1875
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 16
    max_length: int = 512
    group_by_length: bool = True
    max_grad_norm: float = 0.3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    optimizer: str = "paged_adamw_32bit"
    stochastic_rounding: bool = False
    gradient_checkpointing: bool = True
    offload_checkpoints: bool = False
    precision: str = "auto"
    seed: int = 0
    evaluate_every: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for item in fields(self):
            value, kind = getattr(self, item.name), type(item.default)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise TypeError(f"{item.name} must be of type {kind.__name__}; got {value!r}")
        for name, minimum in _AT_LEAST.items():
            if not minimum <= getattr(self, name) < math.inf:
                got = getattr(self, name)
                raise ValueError(f"{name} must be finite and at least {minimum}; got {got!r}")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be below 1; got {getattr(self, name)!r}")
        if self.epsilon == 0:
            raise ValueError("epsilon must be above 0; got 0: a gradient of 0 would become NaN")
        check_seed(self.seed)
        choices = {"schedule": SCHEDULES, "precision": PRECISIONS, "optimizer": OPTIMIZERS}
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        if self.stochastic_rounding and self.optimizer == "adamw_torch":
            raise ValueError(
                "stochastic_rounding must be False with optimizer='adamw_torch'; got True"
            )
        if self.offload_checkpoints and not self.gradient_checkpointing:
            raise ValueError(
                "offload_checkpoints must be False without gradient_checkpointing, which makes the "
                "checkpoints; got True"
            )

    @property
    def batch_size(self) -> int:
        """Examples in one optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_seed(seed: int) -> None:
    """Torch takes 64 bits."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2**63; got {seed}")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    falling = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": (1.0 + math.cos(math.pi * progress)) / 2,
    }
    return config.learning_rate * falling[config.schedule]
