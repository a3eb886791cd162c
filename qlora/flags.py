"""Flags of the command line that follow from the fields of a config class, and what help says of them."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

from qlora.config import BASE_FIELDS, QLoRAConfig
from qlora.recipe import TrainConfig

_MEMORY = {
    QLoRAConfig: ("adapter_dtype",),
    TrainConfig: (
        *("gradient_checkpointing", "offload_checkpoints", "optimizer", "stochastic_rounding"),
        "precision",
    ),
}
_DATA = ("max_length", "group_by_length")
_NO_ADAPTER = ", or None for no adapter yet"  # of no use on the command line
_RUN = ("evaluate_every", "checkpoint_every", "keep_checkpoints", "seed")

HINTS = """\
when memory runs out, in this order:
  --adapter-dtype bfloat16       4 bytes less for each parameter that is trained
  --max-length 256               shorter examples; --micro-batch-size is at its least, 1
  --offload-checkpoints          what gradient checkpointing keeps goes to host memory
  --optimizer paged_adamw_8bit   6 bytes less for each parameter that is trained
  --rank 16                      a quarter of the adapter, of its gradients and states
  qlora memory MODEL             says before anything runs what a step takes, and which cards it fits
when the loss is NaN or grows:
  --learning-rate 1e-4           or lower, above all with --init pissa and --modules-to-save
  --warmup-steps 50              less harm from the first steps
  --precision float32            tells whether 16 bits are to blame
when nothing is learned:
  The loss is taken on completions, outputs and assistant turns, not on prompts: compare a line of DATA with the
  forms above. Longer examples lose their end, where the answer is: --max-length. Then --steps, --learning-rate, and
  last --rank.
"""


def add_finetune_groups(parser: argparse.ArgumentParser) -> None:
    """All settings of a run, in the order in which one thinks of them. `parser` has a group "data" already."""
    kept_back = {*BASE_FIELDS, *_MEMORY[QLoRAConfig]}
    adapter = [item.name for item in fields(QLoRAConfig) if item.name not in kept_back]
    kept_back = {*_DATA, *_RUN, *_MEMORY[TrainConfig]}
    training = [item.name for item in fields(TrainConfig) if item.name not in kept_back]
    for title, text, config, names in (
        ("adapter", "what is trained", QLoRAConfig, adapter),
        ("base", "what stays as it is, in 4 bits", QLoRAConfig, BASE_FIELDS),
        ("training", "the recipe; by default Guanaco's", TrainConfig, training),
    ):
        add_fields(parser.add_argument_group(title, text), config, names)
    memory = parser.add_argument_group("memory", "what makes a model fit; see the hints below")
    for config, names in _MEMORY.items():
        add_fields(memory, config, names)
    add_fields(parser.add_argument_group("run"), TrainConfig, _RUN)


def add_data_fields(group: Any) -> None:
    """The settings of a run that are about examples."""
    add_fields(group, TrainConfig, _DATA)


def add_fields(
    parser: Any, config: type, names: Iterable[str] | None = None, dense: bool = True
) -> None:
    """A flag for each field of a config class, but for mappings; its help is what the class says of the field.

    A flag that is not given leaves no attribute behind, so the class's own default holds. Help that
    offers a dense base says so after "; or None", which is left out where `dense` is false.
    """
    descriptions = field_descriptions(config)
    for item in fields(config):
        if item.default is not MISSING and (names is None or item.name in names):
            description = descriptions[item.name]
            description = description.replace(_NO_ADAPTER, "")
            description = description if dense else description.partition("; or None")[0]
            text = f"{description} (default: {_shown(item.default)})"
            parser.add_argument(
                "--" + item.name.replace("_", "-"),
                help=text.replace("%", "%%").replace("None", "none"),
                default=argparse.SUPPRESS,
                **_parsing(item),
            )


def _parsing(item: Field[Any]) -> dict[str, Any]:
    if item.name in ("target_modules", "modules_to_save"):
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
    if isinstance(default, bool):
        return {True: "yes", False: "no"}[default]
    return str(default) if default != () else "none"


def field_descriptions(config: type) -> dict[str, str]:
    """What the Attributes section of a dataclass's docstring says of each field, also of several at once."""
    text = inspect.getdoc(config) or ""
    section = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    found = re.findall(
        r"^ {4}(\w+(?:, \w+)*): (.*?)(?=^ {4}\w|\Z)",
        section.group(1),
        re.MULTILINE | re.DOTALL,
    )
    return {
        name: " ".join(description.split()).rstrip(".")
        for names, description in found
        for name in names.split(", ")
    }
