"""Text from a model, quantized or not."""

from __future__ import annotations

import math
from typing import Any

import torch

from qlora.evaluation import autocast, check_input, device_of, max_positions, module_modes
from qlora.recipe import check_seed
from qlora.records import Tokens, prompt_tokens


def generate(
    model: torch.nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    style: str = "plain",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    precision: str = "auto",
    stream: bool = False,
) -> str:
    """Continue a prompt and return the continuation.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        prompt: the text to continue.
        style: "plain" takes the prompt as it is, "instruction" puts it into the form in which
            {"instruction", "output"} data is trained, "chat" into the tokenizer's chat template.
        max_new_tokens: tokens after which to stop, if the model does not stop before or its positions end.
        temperature: 0 for always the likeliest token; above, the sampling temperature.
        top_p: sample from the likeliest tokens that make up this probability, in (0, 1].
        seed: seed of the sampling; torch's generators are left as they were.
        precision: "auto", "bfloat16" or "float32", as in TrainConfig.
        stream: print the text as it comes.
    """
    check_sampling(max_new_tokens, temperature, top_p, seed)
    device = device_of(model)
    ids = prompt_tokens(Tokens(tokenizer), prompt, style)
    if not ids:
        raise ValueError("prompt must have at least one token, it is empty")
    inputs = torch.tensor([ids], device=device)
    room = max_positions(model) - len(ids)
    if room < 1:
        limit = max_positions(model)
        raise ValueError(f"prompt must have fewer tokens than the model's {limit}; got {len(ids)}")
    check_input(model, [inputs])
    with (
        module_modes(model, training=False),
        torch.no_grad(),
        autocast(device, precision),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=_settings(
                model, tokenizer, min(max_new_tokens, room), temperature, top_p
            ),
            streamer=_streamer(tokenizer) if stream else None,
        )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def _settings(
    model: Any, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float
) -> Any:
    from transformers import GenerationConfig

    stop = model.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        **sampling,
    )


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0; got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1; got {top_p}")
    check_seed(seed)
