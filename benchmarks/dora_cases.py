"""What DoRA costs: the fine-tuning step and the decoder layer with it, beside our own LoRA and PEFT's DoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch

from benchmarks.decoder_cases import decoder_cases
from benchmarks.harness import Case, Contender
from benchmarks.models import OURS, PEFT_BITSANDBYTES, Trained
from benchmarks.step_cases import step_cases

OUR_LORA = "qlora LoRA NF4+DQ"
TARGETS = {OUR_LORA: 1 / 1.3, PEFT_BITSANDBYTES: 1.0}
"""Wherever LoRA's own case has targets; on a CPU they are required."""


def dora_cases(device: torch.device, dtypes: list[torch.dtype], quick: bool) -> list[Case]:
    """One for each case of the groups "step" and "decoder"."""
    cases = step_cases(device, dtypes[:1] if quick else dtypes, quick)
    return [_with_dora(case) for case in cases + decoder_cases(device, dtypes, quick)]


class DoraInputs:
    """The inputs of LoRA's case twice: the same model and data, with DoRA and with LoRA."""

    def __init__(self, inputs: Callable[..., Trained], seed: int) -> None:
        self.dora, self.lora = inputs(seed, dora=True), inputs(seed)


def _with_dora(case: Case) -> Case:
    """LoRA's case with DoRA in its place. Its operations are counted as LoRA's, which are nearly all."""
    ours, peer = (
        next(c for c in case.contenders if c.name == n) for n in (OURS, PEFT_BITSANDBYTES)
    )
    return replace(
        case,
        group="dora",
        name=f"{case.name}, DoRA",
        inputs=partial(DoraInputs, case.inputs),
        contenders=(
            _given("dora", ours),
            replace(_given("lora", ours), name=OUR_LORA),
            _given("dora", peer),
        ),
        targets=TARGETS if case.targets else {},
    )


def _given(kind: str, contender: Contender) -> Contender:
    """The contender with one of the two as its inputs."""
    own: Callable[[DoraInputs], Any] = attrgetter(kind)
    prepare, check, model = contender.prepare, contender.check, contender.model
    return replace(
        contender,
        prepare=lambda inputs: prepare(own(inputs)),
        check=lambda inputs, result: check(own(inputs), result),
        model=None if model is None else lambda inputs: model(own(inputs)),
    )
