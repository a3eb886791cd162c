"""What the commands of `qlora` do. What is slow to import is imported when it is needed."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from qlora.config import ALL_LINEAR, QLoRAConfig
from qlora.recipe import TrainConfig

_DEVICES = "--device must be cpu, cuda, cuda:1, ..."


def finetune(args: Namespace) -> None:
    from qlora.adapter_files import adapter_bytes
    from qlora.data import load_dataset
    from qlora.pretrained import load_quantized, load_tokenizer
    from qlora.train import train

    config = TrainConfig(**_given(args, TrainConfig))
    lora = _on_base(args, QLoRAConfig())
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise ValueError(f"--output {args.output}: exists already and is not a folder")
    tokenizer = load_tokenizer(args.model)
    dataset = load_dataset(args.data, tokenizer, config.max_length, args.pack)
    held_out = None
    if args.evaluation_data:
        held_out = load_dataset(args.evaluation_data, tokenizer, config.max_length, args.pack)
    torch.manual_seed(config.seed)  # the adapter's first values
    device = _device(args)
    model, report = load_quantized(args.model, lora, None, device, config.precision)
    print(report)
    result = train(model, dataset, config, args.output, eval_dataset=held_out, resume=args.resume)
    print(f"steps {result.steps}, last loss {result.loss:.4f}, {result.seconds:.0f} s")
    if result.evaluation:
        print(_in_words(result.evaluation))
    size, base = adapter_bytes(model)
    share = f"{size:,} bytes, {size / base:.2%} of the model's {base:,}"
    print(f"adapter written to {args.output}: {share}")


def evaluate(args: Namespace) -> None:
    from qlora.data import load_dataset
    from qlora.evaluation import check_batch_size, evaluate
    from qlora.pretrained import load_tokenizer

    config = TrainConfig(**_given(args, TrainConfig))
    check_batch_size(args.batch_size)
    tokenizer = load_tokenizer(args.model)
    dataset = load_dataset(args.data, tokenizer, config.max_length, args.pack)
    model = _load(args, config.precision)
    result = evaluate(model, dataset, args.batch_size, config.precision, progress=True)
    print(_in_words(result))


def generate(args: Namespace) -> None:
    from qlora.generate import check_sampling, generate
    from qlora.pretrained import load_tokenizer

    check_sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    precision = TrainConfig(**_given(args, TrainConfig, ("precision",))).precision
    tokenizer = load_tokenizer(args.model)
    generate(
        _load(args, precision),
        tokenizer,
        args.prompt,
        style=args.style,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        precision=precision,
        stream=True,
    )


def merge(args: Namespace) -> None:
    from qlora.files import check_new_folder
    from qlora.merging import merge, requantize
    from qlora.pretrained import check_dense, load_quantized, place, save_dense

    out, source = Path(args.out), Path(args.model)
    check_new_folder(out)
    if args.onto_original:
        check_dense(source)
    config = _base_config(args)
    model, _ = load_quantized(source, config, args.adapter, precision="float32")
    dtype, onto = getattr(torch, args.dtype), source if args.onto_original else None
    if args.requantize:
        done = requantize(model, dtype, onto)
        _save_quantized(place(model, "cpu", dtype), dtype, source, out)
        print(_losses_in_words(done))
    else:
        save_dense(place(merge(model, dtype, onto), "cpu", dtype), source, out)
    print(f"merged model written to {out}")


def _save_quantized(model: torch.nn.Module, dtype: torch.dtype, source: Path, out: Path) -> None:
    from qlora import quantized_folder
    from qlora.files import new_folder
    from qlora.pretrained import copy_tokenizer

    model.config.dtype = dtype
    with new_folder(out) as temporary:
        copy_tokenizer(source, temporary)
        quantized_folder.save(model, source, temporary)


def _losses_in_words(done: list[Any]) -> str:
    worst = max(done, key=lambda layer: layer.error)
    error, adapter, kept = (
        sum(getattr(layer, part) for layer in done) / len(done)
        for part in ("error", "adapter", "kept")
    )
    return (
        f"error of the weights in 4 bits: {error:.2%} on average, {worst.error:.2%} at worst ({worst.name}); "
        f"the adapter had changed them by {adapter:.2%}, of which {kept:.0%} is kept"
    )


def quantize(args: Namespace) -> None:
    from qlora.pretrained import quantize_folder

    config = QLoRAConfig(**_given(args, QLoRAConfig))
    report = quantize_folder(args.model, args.out, config, _device(args), args.layout)
    print(report)
    size = sum(path.stat().st_size for path in Path(args.out).iterdir())
    print(f"written to {args.out}: {size:,} bytes ({size / 2**20:,.1f} MiB)")


def memory(args: Namespace) -> None:
    from qlora import fit
    from qlora.shapes import model_config

    for name, least in (("batch", 1), ("length", 2), ("accumulation", 1)):
        if (value := getattr(args, name)) < least:
            raise ValueError(f"--{name} must be at least {least}; got {value}")
    lora = QLoRAConfig(**_given(args, QLoRAConfig))
    train = TrainConfig(
        micro_batch_size=args.batch,
        max_length=args.length,
        gradient_accumulation_steps=args.accumulation,
        precision=args.dtype,
        **_given(args, TrainConfig),
    )
    config = model_config(args.model)
    title = (
        f"{args.model}: {args.batch} x {args.length} tokens in {args.dtype}, {args.accumulation} times a step; "
        f"adapters of rank {lora.rank} in {lora.adapter_dtype}; {train.optimizer}"
    )
    for part in (title, *fit.report(config, lora, train)):
        print(f"{part}\n", flush=True)


def _load(args: Namespace, precision: str) -> torch.nn.Module:
    """The model that evaluate and generate ask for: with an adapter, or the base alone."""
    from qlora.adapters import enable_adapters
    from qlora.evaluation import compute_dtype
    from qlora.pretrained import load_dense, load_quantized, place

    device, config = _device(args), _base_config(args)
    if args.adapter is None and config.format is None:
        return place(load_dense(args.model), device, compute_dtype(torch.device(device), precision))
    model, _ = load_quantized(args.model, config, args.adapter, device, precision)
    enable_adapters(model, args.adapter is not None)
    return model


def _base_config(args: Namespace) -> QLoRAConfig:
    """As the adapter was trained, but for what the command line says otherwise."""
    from qlora.adapter_files import BASE_CONFIG, read_config
    from qlora.pretrained import base_settings

    config = read_config(args.adapter) if args.adapter else QLoRAConfig(rank=1)
    unknown = args.adapter and not Path(args.adapter, BASE_CONFIG).exists()
    if unknown and "format" not in _given(args, QLoRAConfig) and not base_settings(args.model):
        print(
            f"qlora: {args.adapter} does not say which base it was trained on; {config.format} is "
            "assumed (--format none for a base that was not quantized)",
            file=sys.stderr,
        )
    return _on_base(args, config)


def _on_base(args: Namespace, config: QLoRAConfig) -> QLoRAConfig:
    """A config with what the command line says, on the base that a folder in 4 bits holds."""
    from qlora.pretrained import base_settings, check_base

    config = replace(config, **base_settings(args.model) | _given(args, QLoRAConfig))
    check_base(args.model, config)
    return config


def _given(args: Namespace, config: type, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Those fields of a config class that the command line sets."""
    names = names or tuple(item.name for item in fields(config))
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if "target_modules" in given:
        given["target_modules"] = _targets(given["target_modules"])
    if "modules_to_save" in given:
        given["modules_to_save"] = tuple(given["modules_to_save"])
    return given


def _targets(names: list[str]) -> str | tuple[str, ...]:
    """Names of layers; or, given alone, "all-linear" or a regular expression."""
    first, *others = names
    is_pattern = first == ALL_LINEAR or re.search(r"[\\^$*+?()\[\]{}|]", first)
    return first if is_pattern and not others else tuple(names)


def _device(args: Namespace) -> str:
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{_DEVICES}; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{_DEVICES}; got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no CUDA GPU that torch can use")
    return name


def _in_words(result: Any) -> str:
    return (
        f"perplexity {result.perplexity:.4f}, loss {result.nll:.4f} nats per token, "
        f"{result.tokens:,} tokens"
    )
