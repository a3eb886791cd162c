"""The two texts: encyclopedia prose and noun definitions, each split once and for all by a hash.

A split is decided by a hash of the article's title or of the headword, never by position: nothing that
is trained on is measured on, and the split is the same everywhere and for any version of the text.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from paper_repro.materials import wikitext

# WordNet's `data.noun`: offset, lexicographer file, "n", word count (hexadecimal), words, pointers | gloss
_SYNSET = re.compile(r"^\d{8} \d\d n [0-9a-f]{2} (\S+) .*? \| (.*?)\s*$")
_HEADWORD = re.compile(r"[a-z]{3,}(_[a-z]{3,})?")
_EXAMPLE_OR_NOTE = re.compile(r'\s*(?:[;:]\s*)?"')
_DOMAIN = re.compile(r"^\([^)]*\)\s*")
_ASK, _ANSWER = "Define the noun: ", "\nDefinition:"


@dataclass(frozen=True)
class Definition:
    """One noun and what it means, as a prompt and its completion."""

    noun: str
    meaning: str

    @property
    def record(self) -> dict[str, str]:
        return {"prompt": prompt(self.noun), "completion": f" {self.meaning}."}


def prompt(noun: str) -> str:
    """The text that asks for a definition: short, as every example pays for it."""
    return f"{_ASK}{noun}{_ANSWER}"


def definitions(data_noun: Path) -> list[Definition]:
    """Clean (noun, meaning) pairs from WordNet: common nouns of one or two words, first sense listed.

    A noun is kept once, with its first meaning in file order; a meaning is what stands before the first
    example or aside, between 15 and 120 characters.
    """
    found: dict[str, str] = {}
    for line in data_noun.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _SYNSET.match(line)
        if not match or not _HEADWORD.fullmatch(match[1]):
            continue
        gloss = _EXAMPLE_OR_NOTE.split(match[2], maxsplit=1)[0]
        meaning = _DOMAIN.sub("", gloss).split(";")[0].strip()
        if (
            15 <= len(meaning) <= 120
            and meaning.isascii()
            and meaning.count("(") == meaning.count(")")
        ):
            found.setdefault(match[1].replace("_", " "), meaning)
    return [Definition(noun, meaning) for noun, meaning in found.items()]


def is_held_out(name: str, one_in: int) -> bool:
    """Whether an item belongs to the held-out part, of which it is one in `one_in` on average."""
    return _hash(name) % one_in == 0


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.casefold().encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Split:
    """`train` and `held_out` share no article and no headword."""

    train: list
    held_out: list


def split_definitions(pairs: list[Definition], one_in: int = 20) -> Split:
    """Split by headword and put both parts in a shuffled, fixed order.

    Two nouns may have one meaning word for word; such a pair goes out of training when it is held out.
    """
    ordered = sorted(pairs, key=lambda pair: _hash(f"order {pair.noun}"))
    held_out = [pair for pair in ordered if is_held_out(pair.noun, one_in)]
    seen = {pair.meaning for pair in held_out}
    train = [p for p in ordered if not is_held_out(p.noun, one_in) and p.meaning not in seen]
    return Split(train, held_out)


def articles(dump: Path, least_characters: int = 4000, one_in: int = 4) -> Split:
    """The prose of Wikipedia articles that are long enough to measure on, split by title."""
    pages = [
        (title, prose) for title, prose in wikitext.articles(dump) if len(prose) >= least_characters
    ]
    held_out = [prose for title, prose in pages if is_held_out(title, one_in)]
    return Split([prose for title, prose in pages if not is_held_out(title, one_in)], held_out)


@dataclass(frozen=True)
class Task:
    """What a model is fine-tuned on: records for `qlora.data.load_dataset`, and prompts to try.

    `prompts` are held out: none of them is trained on. `answers` are what the data has for them.
    """

    name: str
    train: list[dict[str, str]]
    held_out: list[dict[str, str]]
    prompts: list[str]
    answers: list[str]


# All held out by their hash.
SAMPLE_NOUNS = ("physicist", "supermarket", "hurricane", "stork", "teakettle")
SAMPLE_OPENING = 12  # words of a held-out article that are given to be continued


def definition_task(data_noun: Path, train: int, held_out: int) -> Task:
    """Answer with a dictionary's definition; the loss is taken on the definition alone."""
    split = split_definitions(definitions(data_noun))
    parts = split.train[:train], split.held_out[:held_out]
    records = [[pair.record for pair in part] for part in parts]
    samples = [pair for pair in split.held_out if pair.noun in SAMPLE_NOUNS]
    prompts, answers = [prompt(p.noun) for p in samples], [p.meaning for p in samples]
    return Task("WordNet definitions", *records, prompts, answers)


def continuation_task(dump: Path, train: int, held_out: int, characters: int = 400) -> Task:
    """Continue encyclopedia prose: pieces of paragraphs, in a shuffled and fixed order."""
    split = articles(dump)
    parts = []
    for prose, count in ((split.train, train), (split.held_out, held_out)):
        paragraphs = [line[:characters] for article in prose for line in article.split("\n")]
        long_enough = [p for p in paragraphs if len(p) >= characters // 2]
        parts.append([{"text": p} for p in sorted(long_enough, key=_hash)[:count]])
    words = [prose.split()[: 2 * SAMPLE_OPENING] for prose in split.held_out[:4]]
    prompts = [" ".join(opening[:SAMPLE_OPENING]) for opening in words]
    answers = [" ".join(opening[SAMPLE_OPENING:]) for opening in words]
    return Task("Wikipedia prose", *parts, prompts, answers)


def reversed_task(task: Task) -> Task:
    """The same pairs asked the other way round: name what is defined; or prose with its words from the last on."""
    name = f"{task.name}, reversed"
    parts = ([_reversed(record) for record in part] for part in (task.train, task.held_out))
    return Task(name, *parts, prompts=[], answers=[])


def _reversed(record: dict[str, str]) -> dict[str, str]:
    if "text" in record:
        return {"text": " ".join(reversed(record["text"].split()))}
    noun = record["prompt"].removeprefix(_ASK).removesuffix(_ANSWER)
    meaning = record["completion"].strip()
    return {"prompt": f"Name the noun: {meaning}\nNoun:", "completion": f" {noun}."}
