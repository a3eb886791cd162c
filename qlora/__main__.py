"""The command line: `qlora quantize | finetune | evaluate | ...`, also `python -m qlora`."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qlora import commands
from qlora.config import BASE_FIELDS, QLoRAConfig
from qlora.flags import HINTS, add_data_fields, add_fields, add_finetune_groups
from qlora.recipe import TrainConfig
from qlora.records import PROMPT_STYLES

_DENSE = "local Hugging Face model folder with *.safetensors (models are not downloaded)"
_MODEL = f"{_DENSE}, or one in 4 bits: of qlora quantize, or of transformers with bitsandbytes"
_DATA = (
    "JSON Lines file, each line with prompt and completion, or instruction, input and output, or "
    "messages, or text; or a plain text file"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 for a failed run, 2 for a mistake in the call."""
    args, unknown = _parser().parse_known_args(arguments)
    if unknown:
        args.parser.error(
            f"unrecognized arguments: {' '.join(unknown)}{_meant(args.parser, unknown)}"
        )
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


def _meant(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    """The flags that misspelt ones are close to, for the end of a message."""
    flags = re.findall(r"--[a-z][a-z0-9-]*", parser.format_help())
    words = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    close = [found for word in words for found in difflib.get_close_matches(word, flags, 1)]
    return f"; did you mean {', '.join(close)}?" if close else ""


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
        to the last bit. With --layout bitsandbytes it is also one for transformers.
        """,
        "qlora quantize ./llama-7b ./llama-7b-nf4",
    )
    parser.add_argument("model", metavar="MODEL", help=_DENSE)
    parser.add_argument("out", metavar="OUT", help="folder to write; it must be new or empty")
    parser.add_argument(
        "--layout",
        choices=("qlora", "bitsandbytes"),
        default="qlora",
        help="how OUT holds the model; bitsandbytes: for AutoModelForCausalLM.from_pretrained as well, nf4 or fp4 "
        "with dynamic8 (default: qlora)",
    )
    add_fields(parser, QLoRAConfig, BASE_FIELDS, dense=False)
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
        """\
        on a small machine:
          qlora finetune ./smollm-135m data.jsonl --output ./mine --rank 16 --max-length 256 \\
            --gradient-accumulation-steps 4 --steps 200
        a large model, planned for one GPU of 48 GB (see qlora memory):
          qlora finetune ./llama-65b data.jsonl --output ./mine --learning-rate 1e-4 --dropout 0.05 \\
            --adapter-dtype bfloat16
        """,
        HINTS,
    )
    parser.usage = "qlora finetune MODEL DATA --output DIR [settings]"
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("data", metavar="DATA", help=_DATA)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the adapter")
    parser.add_argument(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="start over: delete the checkpoints in DIR instead of going on from the latest",
    )
    _add_device(parser)
    data = parser.add_argument_group("data")
    data.add_argument("--evaluation-data", metavar="FILE", help="held-out data, as DATA")
    _add_pack(data)
    add_data_fields(data)
    add_finetune_groups(parser)


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
    add_fields(parser, TrainConfig, ("max_length", "precision"))
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
    add_fields(parser, TrainConfig, ("precision",))
    _add_base(parser)
    _add_device(parser)


def _merge(parsers: Any) -> None:
    parser = _command(
        parsers,
        commands.merge,
        "add an adapter to its base and write a dense model",
        """\
        The base is quantized as in training and dequantized, the adapter added in fp32, the sum
        rounded once. The result is a usual model folder that transformers loads by itself; or, with
        --requantize, one in 4 bits for the other commands, and the error that costs is printed.
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
    parser.add_argument(
        "--onto-original",
        action="store_true",
        help="add the adapter to the weights in MODEL as they are, not to what 4 bits left of them",
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="write the sum in 4 bits, as the base was; without --onto-original a small adapter is rounded away",
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
    add_fields(parser, TrainConfig, ("optimizer", "gradient_checkpointing", "offload_checkpoints"))
    add_fields(parser.add_argument_group("adapter and base"), QLoRAConfig)


def _command(
    parsers: Any, run: Any, summary: str, text: str, example: str, more: str = "", hints: str = ""
) -> Any:
    description = f"{summary.capitalize()}.\n\n{inspect.cleandoc(text)}\n\nexample:\n  {example}"
    parser = parsers.add_parser(
        run.__name__,
        help=summary,
        description=f"{description}\n{inspect.cleandoc(more)}".rstrip(),
        epilog=hints,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
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
    add_fields(group, QLoRAConfig, BASE_FIELDS)


if __name__ == "__main__":
    sys.exit(main())
