"""The command line: `qlora quantize | finetune | evaluate | ...`, also `python -m qlora`."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import torch

from qlora import commands
from qlora.config import BASE_FIELDS, QLoRAConfig
from qlora.recipe import TrainConfig
from qlora.records import PROMPT_STYLES

_DENSE = "local Hugging Face model folder with *.safetensors (models are not downloaded)"
_MODEL = f"{_DENSE}, or what qlora quantize made of one"
_DATA = (
    "JSON Lines file, each line with prompt and completion, or instruction, input and output, or "
    "messages, or text; or a plain text file"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 for a failed run, 2 for a mistake in the call."""
    args = _parser().parse_args(arguments)
    try:
        with _plain_warnings():
            args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _fail(error, 2, args.debug)
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        return _fail(error, 1, args.debug)
    except KeyboardInterrupt:
        goes_on = args.run is commands.finetune
        hint = " (the same command goes on from its latest checkpoint)" if goes_on else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show our own warnings without the place in the code that they come from."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, *rest: Any
        ) -> None:
            if Path(filename).parent == Path(__file__).parent:
                print(f"qlora: warning: {message}", file=sys.stderr)
            else:
                usual(message, category, filename, *rest)

        warnings.showwarning = show
        yield


def _fail(error: Exception, status: int, debug: bool) -> int:
    if debug:
        raise error
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        text += "; the command line needs the extra [hf]"
    print(f"qlora: {text} (--debug shows where)", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlora",
        description="Fine-tune language models through a frozen base in 4 bits (QLoRA).",
        epilog="'qlora COMMAND --help' explains a command and shows an example.",
    )
    parsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_quantize, _finetune, _evaluate, _generate, _merge, _memory):
        add(parsers)
    return parser


def _quantize(parsers: Any) -> None:
    parser = _command(
        parsers,
        commands.quantize,
        "write a model in 4 bits, which loads in seconds",
        """\
        The weights are read, quantized and dropped one at a time: the dense model is never in
        memory, unless transformers merges weights (mixtures of experts) or changes them otherwise,
        of which a warning tells. OUT is then a MODEL for the other commands, with the same results
        to the last bit.
        """,
        "qlora quantize ./llama-7b ./llama-7b-nf4",
    )
    parser.add_argument("model", metavar="MODEL", help=_DENSE)
    parser.add_argument("out", metavar="OUT", help="folder to write; it must be new or empty")
    _add_fields(parser, QLoRAConfig, BASE_FIELDS, dense=False)
    _add_device(parser)


def _finetune(parsers: Any) -> None:
    parser = _command(
        parsers,
        commands.finetune,
        "train adapters through a quantized model",
        """\
        The base is quantized in memory and stays frozen; the adapter goes to DIR in PEFT's format,
        with metrics.jsonl (one line per step) and checkpoints. After an interruption the same
        command goes on where it was, to the same result. The defaults are the recipe of Guanaco.
        """,
        "qlora finetune ./llama-7b oasst1.jsonl --output ./guanaco --steps 1875",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("data", metavar="DATA", help=_DATA)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the adapter")
    parser.add_argument("--evaluation-data", metavar="FILE", help="held-out data, as DATA")
    _add_pack(parser)
    parser.add_argument(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="start over: delete the checkpoints in DIR instead of going on from the latest",
    )
    _add_fields(parser.add_argument_group("adapter and base"), QLoRAConfig)
    _add_fields(parser.add_argument_group("training"), TrainConfig)
    _add_device(parser)


def _evaluate(parsers: Any) -> None:
    parser = _command(
        parsers,
        commands.evaluate,
        "mean loss and perplexity on held-out data",
        """\
        Prints the perplexity, the mean loss in nats per token, and the number of tokens it is
        taken over: completions, outputs, assistant turns and texts, each counting the same.
        """,
        "qlora evaluate ./llama-7b held-out.jsonl --adapter ./guanaco",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("data", metavar="DATA", help=_DATA)
    _add_adapter(parser)
    _add_pack(parser)
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="examples at once (default: 8)"
    )
    _add_fields(parser, TrainConfig, ("max_length", "precision"))
    _add_base(parser)
    _add_device(parser)


def _generate(parsers: Any) -> None:
    parser = _command(
        parsers,
        commands.generate,
        "continue a prompt",
        "Prints the continuation of a prompt, as it comes.",
        "qlora generate ./llama-7b --adapter ./guanaco --style chat --prompt 'Who was Gauss?'",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    _add_adapter(parser)
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the text to continue")
    parser.add_argument(
        "--style",
        choices=PROMPT_STYLES,
        default="plain",
        help="form of the prompt: as it is, as an instruction in training data, or as a chat "
        "message (default: plain)",
    )
    _add_number(parser, "--max-new-tokens", 128, "tokens after which to stop")
    _add_number(parser, "--temperature", 0.0, "0: always the likeliest token; above: sample")
    _add_number(parser, "--top-p", 1.0, "sample from the likeliest tokens of this probability")
    _add_number(parser, "--seed", 0, "seed of the sampling")
    _add_fields(parser, TrainConfig, ("precision",))
    _add_base(parser)
    _add_device(parser)


def _merge(parsers: Any) -> None:
    parser = _command(
        parsers,
        commands.merge,
        "add an adapter to its base and write a dense model",
        """\
        The base is quantized as in training and dequantized, the adapter added in fp32, the sum
        rounded once. The result is a usual model folder that transformers loads by itself.
        """,
        "qlora merge ./llama-7b ./guanaco ./guanaco-merged --dtype bfloat16",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument("out", metavar="OUT", help="folder to write; it must be new or empty")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="dtype of the written weights (default: bfloat16)",
    )
    _add_base(parser)


def _memory(parsers: Any) -> None:
    parser = _command(
        parsers,
        commands.memory,
        "what a training step will take, and which cards it fits",
        """\
        Nothing is loaded and nothing runs on a device: the sizes come from the model's shapes, quantized as they
        would be, and from a training step in which every tensor has a size and no values. CUDA's own memory comes
        on top, and is allowed for where cards are named.
        """,
        "qlora memory llama-65b --adapter-dtype bfloat16",
    )
    parser.add_argument(
        "model",
        metavar="MODEL_OR_SHAPE",
        help="llama-7b, -13b, -33b or -65b; a model folder or config.json",
    )
    _add_number(parser, "--batch", 1, "examples that go through the model at once")
    _add_number(parser, "--length", 512, "tokens of an example")
    _add_number(parser, "--accumulation", 16, "micro-batches in one optimizer step")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="dtype of the computation (default: bfloat16)",
    )
    _add_fields(parser, TrainConfig, ("optimizer", "gradient_checkpointing", "offload_checkpoints"))
    _add_fields(parser.add_argument_group("adapter and base"), QLoRAConfig)


def _command(parsers: Any, run: Any, summary: str, text: str, example: str) -> Any:
    parser = parsers.add_parser(
        run.__name__,
        help=summary,
        description=f"{summary.capitalize()}.\n\n{inspect.cleandoc(text)}\n\nexample:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser


def _add_adapter(parser: Any) -> None:
    parser.add_argument(
        "--adapter", metavar="DIR", help="adapter to use; without one, the quantized base alone"
    )


def _add_pack(parser: Any) -> None:
    parser.add_argument(
        "--pack", action="store_true", help="join the texts of {text} data and cut full chunks"
    )


def _add_device(parser: Any) -> None:
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)"
    )


def _add_number(parser: Any, flag: str, default: float, help: str) -> None:
    metavar = "N" if isinstance(default, int) else "X"
    help = f"{help} (default: {default})"
    parser.add_argument(flag, type=type(default), default=default, metavar=metavar, help=help)


def _add_base(parser: Any) -> None:
    group = parser.add_argument_group(
        "base",
        "by default as MODEL is in 4 bits, or as the adapter was trained; the defaults below where "
        "that is not known",
    )
    _add_fields(group, QLoRAConfig, BASE_FIELDS)


def _add_fields(
    parser: Any, config: type, names: Iterable[str] | None = None, dense: bool = True
) -> None:
    """A flag for each field of a config class; its help is what the class says of the field.

    A flag that is not given leaves no attribute behind, so the class's own default holds. Help that
    offers a dense base says so after "; or None", which is left out where `dense` is false.
    """
    descriptions = field_descriptions(config)
    for item in fields(config):
        if names is None or item.name in names:
            description = descriptions[item.name]
            description = description if dense else description.partition("; or None")[0]
            text = f"{description} (default: {_shown(item.default)})"
            parser.add_argument(
                "--" + item.name.replace("_", "-"),
                help=text.replace("%", "%%").replace("None", "none"),
                default=argparse.SUPPRESS,
                **_parsing(item),
            )


def _parsing(item: Field[Any]) -> dict[str, Any]:
    if item.name == "target_modules":
        return {"nargs": "+", "metavar": "NAME"}
    if item.name == "format":
        return {"type": lambda text: None if text == "none" else text, "metavar": "NAME"}
    if isinstance(item.default, bool):
        return {"action": argparse.BooleanOptionalAction}
    metavars = {int: "N", float: "X", str: "NAME"}
    # alpha's default is written as an integer, and any number is allowed for it
    kind = float if item.type == "float" else type(item.default)
    return {"type": kind, "metavar": metavars[kind]}


def _shown(default: Any) -> str:
    return {True: "yes", False: "no"}[default] if isinstance(default, bool) else str(default)


def field_descriptions(config: type) -> dict[str, str]:
    """What the Attributes section of a dataclass's docstring says of each field."""
    text = inspect.getdoc(config) or ""
    section = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    found = re.findall(
        r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", section.group(1), re.MULTILINE | re.DOTALL
    )
    return {name: " ".join(description.split()).rstrip(".") for name, description in found}


if __name__ == "__main__":
    sys.exit(main())
