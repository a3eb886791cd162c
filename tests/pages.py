"""Documents whose code runs: the blocks of a page, and the folder that they find what they name in.

A page's blocks run in order: ```python in one namespace, ```shell by the command line's own `main`. ```output is
what the block before it must print. Any other block is read only.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from qlora.__main__ import main
from qlora.kernels.formats import FORMATS
from tests import tiny

RUN = ("python", "shell")
READ_ONLY = ("text", "json")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page that it begins at, from 1."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], page.count("\n", 0, m.start(2)) + 1) for m in found]


def prepare(folder: Path) -> Path:
    """A model and data under the names that pages use."""
    tiny.model_folder(folder / "path/to/model")
    record = {"prompt": "2 + 2 = ", "completion": "4"}
    for name in ("data.jsonl", "held-out.jsonl"):
        tiny.write_lines(folder / name, [record] * 4)
    return folder


def shortened(text: str) -> str:
    """With one step of training in place of many, and one example in a step."""
    return re.sub(r"(--steps |\b(?:\w+_)?steps=)\d+", r"\g<1>1", text)


def run(page: Path) -> dict[str, Any]:
    """Run a page's blocks in the current folder, and compare what they print; the names that they leave behind."""
    with mock.patch.dict(FORMATS):  # what a page registers is gone afterwards
        return _run_all(page)


def _run_all(page: Path) -> dict[str, Any]:
    names: dict[str, Any] = {}
    printed = ""
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}:{block.line}"
        if block.language == "output":
            assert printed == block.text, f"{where}: printed\n{printed}"
        elif block.language in RUN:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                _run(block, where, names)
            printed = out.getvalue()
    return names


def _run(block: Block, where: str, names: dict[str, Any]) -> None:
    text = shortened(block.text)
    if block.language == "python":
        exec(compile("\n" * (block.line - 1) + text, where, "exec"), names)
        return
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "qlora", f"{where}: only qlora's commands run; got {line}"
            assert main(words[1:]) == 0, f"{where}: {line}"
