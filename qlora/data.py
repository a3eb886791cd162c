"""From a text file to examples: tokenize, mask prompts, truncate, pack.

A dataset is a list of `Example`. Whatever makes such a list can be trained on;
`load_dataset` makes it from a file:

- JSON Lines (`.jsonl`, `.json`, `.ndjson`), one example a line, in one of these forms:

  `{"prompt", "completion"}`               both taken as they are
  `{"instruction", "input", "output"}`     `input` may be left out
  `{"messages": [{"role", "content"}]}`    formatted by the tokenizer's chat template
  `{"text"}`                               every token is learned

- any other file is plain text, cut into chunks of `max_length` tokens.

The loss is taken on completions, outputs, assistant turns and texts. Prompts are only read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.records import Pieces, Tokens, record_pieces, text_tokens

IGNORE = -100  # the label of a token that is not learned, as torch's cross_entropy has it
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True, eq=False)
class Example:
    """Tokens, and for each of them the label: the token again, or IGNORE where it is not learned.

    Labels are not shifted: position i's label is compared with the prediction made at i - 1.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 1 or self.input_ids.shape != self.labels.shape:
            raise ValueError(
                "an Example needs one-dimensional input_ids and labels of the same length; got "
                f"shapes {tuple(self.input_ids.shape)} and {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> int:
        """How many tokens the loss is taken on (the first is never predicted)."""
        return int((self.labels[1:] != IGNORE).sum())


def load_dataset(
    path: str | os.PathLike[str], tokenizer: Any, max_length: int = 512, pack: bool = False
) -> list[Example]:
    """Read a JSON Lines or plain text file into examples of at most `max_length` tokens.

    Longer examples lose their end. `pack=True` joins the texts of a `{"text"}` file and cuts
    them into full chunks instead.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(f"max_length must be an integer of at least 2 tokens; got {max_length!r}")
    tokens = Tokens(tokenizer)
    if path.suffix.lower() not in JSON_SUFFIXES:
        text = _read_text(path)
        if not text.strip():
            raise ValueError(f"{path}: the file is empty")
        return pack_tokens(tokens.begin + tokens(text), max_length, str(path))
    records = read_records(path)
    if pack:
        joined = [t for where, record in records for t in text_tokens(record, tokens, where)]
        return pack_tokens(joined, max_length, str(path))
    return [
        make_example(pieces, max_length, where)
        for where, record in records
        for pieces in record_pieces(record, tokens, where)
    ]


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, record) for each line of a JSON Lines file; blank lines are passed over."""
    path = Path(path)
    empty = True
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(record, dict):
            found = type(record).__name__
            raise ValueError(f"{where}: expected a JSON object on each line; got a {found}")
        empty = False
        yield where, record
    if empty:
        raise ValueError(f"{path}: the file is empty")


def make_example(pieces: Pieces, max_length: int, where: str = "example") -> Example:
    """Join (tokens, learned) pieces, mask those that are not learned, cut at `max_length`."""
    ids = [token for tokens, _ in pieces for token in tokens]
    labels = [token if learned else IGNORE for tokens, learned in pieces for token in tokens]
    example = Example(torch.tensor(ids[:max_length]), torch.tensor(labels[:max_length]))
    if example.targets == 0:
        first = next((i for i, label in enumerate(labels) if i > 0 and label != IGNORE), None)
        if first is None:
            raise ValueError(f"{where}: no token to learn")
        raise ValueError(
            f"{where}: the prompt takes {first} tokens and max_length is {max_length}, so nothing "
            "of the completion is left. Raise max_length or shorten the prompt"
        )
    return example


def pack_tokens(tokens: Sequence[int], length: int, where: str = "the text") -> list[Example]:
    """Cut a run of tokens into examples of `length` tokens; a shorter last one is kept."""
    chunks = torch.tensor(tokens, dtype=torch.long).split(length)
    examples = [Example(chunk, chunk) for chunk in chunks if len(chunk) > 1]
    if not examples:
        raise ValueError(f"{where}: {len(tokens)} token(s) are too few to learn from")
    return examples


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}, byte {error.start})") from error
