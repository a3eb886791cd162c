"""Files to examples, and examples to batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from qlora.batching import StepBatches, collate, epoch_batches
from qlora.data import IGNORE, Example, load_dataset, pack_tokens
from qlora.recipe import TrainConfig
from qlora.records import Tokens, format_instruction, prompt_tokens
from tests import tiny

TOKENIZER = tiny.tokenizer()


def load(tmp_path: Path, *records: Any, **options: Any) -> list[Example]:
    path = tiny.write_lines(tmp_path / "data.jsonl", list(records))
    return load_dataset(path, options.pop("tokenizer", TOKENIZER), **options)


def read(example: Example) -> str:
    """All of an example's text."""
    return TOKENIZER.decode(example.input_ids)


def learned(example: Example) -> str:
    """The text on which the loss is taken; it must be the input's own tokens."""
    mask = example.labels != IGNORE
    assert torch.equal(example.labels[mask], example.input_ids[mask])
    return TOKENIZER.decode(example.labels[mask])


def test_a_prompt_is_read_and_its_completion_learned(tmp_path: Path) -> None:
    (example,) = load(tmp_path, {"prompt": "1 + 1 = ", "completion": "2."})
    assert read(example) == "1 + 1 = 2.</s>"
    assert learned(example) == "2.</s>"
    assert example.targets == 3


@pytest.mark.parametrize("context", ["", "numbers"])
def test_an_instruction_is_put_into_words(tmp_path: Path, context: str) -> None:
    record = {"instruction": "Count.", "input": context, "output": "One, two."}
    (example,) = load(tmp_path, record)
    assert read(example) == format_instruction("Count.", context) + "One, two.</s>"
    assert learned(example) == "One, two.</s>"
    assert ("### Input" in read(example)) == bool(context)


def test_all_of_a_text_is_learned(tmp_path: Path) -> None:
    (example,) = load(tmp_path, {"text": "Once upon a time."})
    assert read(example) == learned(example) == "Once upon a time.</s>"


def test_other_fields_may_stand_beside_a_form(tmp_path: Path) -> None:
    record = {"id": 7, "instruction": "Count.", "output": "One.", "text": "rendered"}
    (example,) = load(tmp_path, record)
    assert learned(example) == "One.</s>"


def test_documents_begin_as_the_tokenizer_begins_them(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tiny.BOS), ("</s>", tiny.EOS)]
    )
    records = [{"prompt": "a", "completion": "b"}, {"messages": chat("user", "assistant")}]
    plain, chatted = load(tmp_path, *records, tokenizer=tokenizer)
    assert read(plain) == "<s>ab</s>"
    assert read(chatted).startswith("<user>"), "a chat begins as its template says"


def chat(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]


def test_every_assistant_turn_is_learned(tmp_path: Path) -> None:
    messages = chat("system", "user", "assistant", "user", "assistant")
    (example,) = load(tmp_path, {"messages": messages})
    assert read(example) == TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert learned(example) == "assistant 2</assistant>\nassistant 4</assistant>\n"


def test_a_template_that_rewrites_earlier_turns_gives_an_example_per_turn(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' and loop.last %}(thinks){% endif %}{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = chat("user", "assistant", "user", "assistant")
    first, second = load(tmp_path, {"messages": messages}, tokenizer=tokenizer)
    assert learned(first) == "(thinks)assistant 1\n"
    assert read(second).startswith("<user>user 0\n<assistant>assistant 1\n<user>")
    assert learned(second) == "(thinks)assistant 3\n"


@pytest.mark.parametrize("style", ["plain", "instruction", "chat"])
def test_a_prompt_has_the_same_tokens_in_training_and_in_generation(
    tmp_path: Path, style: str
) -> None:
    record = {
        "plain": {"prompt": "Hello", "completion": "x"},
        "instruction": {"instruction": "Hello", "output": "x"},
        "chat": {"messages": [{"role": r, "content": "Hello"} for r in ("user", "assistant")]},
    }[style]
    (example,) = load(tmp_path, record)
    prompt = example.input_ids[example.labels == IGNORE]
    assert prompt.tolist() == prompt_tokens(Tokens(TOKENIZER), "Hello", style)


def test_long_examples_lose_their_end(tmp_path: Path) -> None:
    (example,) = load(tmp_path, {"prompt": "abc", "completion": "defgh"}, max_length=5)
    assert read(example) == "abcde"
    assert learned(example) == "de"


def test_plain_text_is_cut_into_chunks(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("0123456789", encoding="utf-8")
    chunks = load_dataset(path, TOKENIZER, max_length=4)
    assert [read(chunk) for chunk in chunks] == ["0123", "4567", "89"]
    assert all(read(chunk) == learned(chunk) for chunk in chunks)


def test_packing_joins_whole_documents(tmp_path: Path) -> None:
    chunks = load(tmp_path, {"text": "abc"}, {"text": "defg"}, max_length=4, pack=True)
    assert [read(chunk) for chunk in chunks] == ["abc</s>", "defg"]  # the last one token is dropped


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a b"}\r\n\n{"text": "c"}\n')
    assert len(load_dataset(path, TOKENIZER)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: expected a JSON object on each line; got a list"),
        ('{"promt": "a", "completion": "b"}', "line 2: field 'prompt' is missing .*'promt'"),
        ('{"question": "a"}', r"line 2: unknown fields \('question'\); expected prompt and"),
        ("{}", r"line 2: unknown fields \(none\)"),
        ('{"instruction": "a", "inptu": "b", "output": "c"}', "did you mean 'input'"),
        (
            '{"prompt": "a", "completion": 3}',
            "line 2: field 'completion' must be a string; got int",
        ),
        ('{"text": null}', "line 2: field 'text' must be a string; got NoneType"),
        ('{"text": " "}', "line 2: field 'text' is empty"),
        ('{"messages": "a"}', "line 2: field 'messages' must be a list"),
        ('{"messages": ["a"]}', "line 2: message 1 must be an object"),
        ('{"messages": [{"role": "user"}]}', "line 2, message 1: field 'content' is missing"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: no message has the role"),
        ('{"prompt": "%s", "completion": "b"}' % ("a" * 600), "line 2: the prompt takes 600 tok"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(path, TOKENIZER)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"\n \n", "the file is empty"),
        ("empty.txt", b"", "the file is empty"),
        ("short.txt", b"a", "too few to learn from"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(path, TOKENIZER)
    assert str(path) in str(caught.value)


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: no such data file"):
        load_dataset(tmp_path / "missing.jsonl", TOKENIZER)
    with pytest.raises(ValueError, match="max_length must be an integer of at least 2"):
        load(tmp_path, {"text": "a"}, max_length=1)
    with pytest.raises(ValueError, match="line 1: field 'text' is missing"):
        load(tmp_path, {"prompt": "a", "completion": "b"}, pack=True)
    without = tiny.tokenizer()
    without.chat_template = None
    with pytest.raises(ValueError, match="line 1: messages need a tokenizer with a chat template"):
        load(tmp_path, {"messages": chat("user", "assistant")}, tokenizer=without)
    with pytest.raises(ValueError, match="same length"):
        Example(torch.ones(3), torch.ones(2))


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=400),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
    group=st.booleans(),
)
def test_an_epoch_holds_each_example_once(
    lengths: list[int], batch_size: int, seed: int, epoch: int, group: bool
) -> None:
    batches = epoch_batches(lengths, batch_size, seed, epoch, group)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert max(map(len, batches)) <= batch_size
    assert len(batches) == -(-len(lengths) // batch_size)
    assert batches == epoch_batches(lengths, batch_size, seed, epoch, group)
    if group and epoch == 0:
        assert max(lengths) in [lengths[i] for i in batches[0]]


def test_the_order_changes_with_seed_and_epoch() -> None:
    orders = [epoch_batches([5] * 64, 8, *key, True) for key in ((0, 1), (0, 2), (1, 1))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_grouping_by_length_saves_padding() -> None:
    lengths = [int(n) for n in torch.randint(1, 500, (640,), generator=torch.manual_seed(0))]

    def padding(group: bool) -> int:
        batches = epoch_batches(lengths, 8, 0, 1, group)
        return sum(max(lengths[i] for i in b) * len(b) for b in batches) - sum(lengths)

    assert padding(True) < padding(False) / 5


def test_batches_depend_on_the_step_alone() -> None:
    config = TrainConfig(micro_batch_size=2, gradient_accumulation_steps=2)
    data = tiny.examples(10)
    forward, backward = StepBatches(data, config), StepBatches(data, config)
    ahead = [forward[step] for step in range(8)]
    behind = [backward[step] for step in reversed(range(8))][::-1]
    for left, right in zip(ahead, behind, strict=True):
        for a, b in zip(left, right, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    sizes = [sum(len(batch["labels"]) for batch in batches) for batches in ahead[:3]]
    assert sorted(sizes) == [2, 4, 4]


def test_collate_pads_with_what_counts_for_nothing() -> None:
    short, long = (Example(torch.arange(n) + 5, torch.arange(n) + 5) for n in (2, 4))
    batch = collate([short, long])
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0], [5, 6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[5, 6, IGNORE, IGNORE], [5, 6, 7, 8]]


@given(st.lists(st.integers(0, 99), min_size=2, max_size=60), st.integers(2, 9))
def test_packing_keeps_every_token_but_a_single_last_one(tokens: list[int], length: int) -> None:
    joined = torch.cat([example.input_ids for example in pack_tokens(tokens, length)]).tolist()
    assert joined == (tokens[:-1] if len(tokens) % length == 1 else tokens)
