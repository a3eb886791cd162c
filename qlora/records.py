"""One JSON record to pieces of tokens, each either learned or only read.

Pieces are tokenized one by one, so a prompt has the same tokens here as when generating.
"""

from __future__ import annotations

from difflib import get_close_matches
from itertools import pairwise
from typing import Any

Pieces = list[tuple[list[int], bool]]  # (tokens, learned)

# (required fields, optional fields), in the order in which they are looked for: a structured
# form wins over a rendered "text" beside it.
FORMS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("messages",), ()),
    (("instruction", "output"), ("input",)),
    (("prompt", "completion"), ()),
    (("text",), ()),
)
EXPECTED = "prompt and completion, or instruction and output (and input), or messages, or text"
PROMPT_STYLES = ("plain", "instruction", "chat")


class Tokens:
    """A tokenizer with its habits: what it begins and ends a document with."""

    def __init__(self, tokenizer: Any) -> None:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.tokenizer = tokenizer
        self.begin = [bos] if bos is not None and bos in tokenizer("")["input_ids"] else []
        self.end = [] if eos is None else [eos]

    def __call__(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def format_instruction(instruction: str, context: str = "") -> str:
    """The prompt made of an instruction and, where there is one, its input."""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def prompt_tokens(tokens: Tokens, text: str, style: str = "plain") -> list[int]:
    """What the model is to continue: `text` in the form in which it was trained."""
    if style == "chat":  # the template brings the begin token
        message = {"role": "user", "content": text}
        return tokens(render_chat(tokens.tokenizer, [message], "style='chat'", prompt=True))
    if style not in PROMPT_STYLES:
        raise ValueError(f"style must be one of {', '.join(PROMPT_STYLES)}; got {style!r}")
    return tokens.begin + tokens(format_instruction(text) if style == "instruction" else text)


def record_pieces(record: dict[str, Any], tokens: Tokens, where: str) -> list[Pieces]:
    """Format and tokenize one record. Each list of pieces becomes one example."""
    form = _form(record, where)
    if form == "messages":
        return _chat_pieces(record["messages"], tokens, where)
    if form == "text":
        return [[(text_tokens(record, tokens, where), True)]]
    if form == "instruction":
        context = "" if record.get("input") is None else _string(record, "input", where)
        prompt = format_instruction(_string(record, "instruction", where), context)
        completion = _string(record, "output", where)
    else:
        prompt, completion = _string(record, "prompt", where), _string(record, "completion", where)
    return [[(tokens.begin + tokens(prompt), False), (tokens(completion) + tokens.end, True)]]


def text_tokens(record: dict[str, Any], tokens: Tokens, where: str) -> list[int]:
    """A whole document: begin token, text, end token."""
    text = _string(record, "text", where)
    if not text.strip():
        raise ValueError(f"{where}: field 'text' is empty")
    return tokens.begin + tokens(text) + tokens.end


def render_chat(tokenizer: Any, messages: list[dict[str, str]], where: str, prompt: bool) -> str:
    """A conversation as text; with `prompt=True` it ends where the assistant is to answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where}: messages need a tokenizer with a chat template, and this one has none"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # whatever a template raises: it is the model's code, not ours
        raise ValueError(f"{where}: the chat template refuses these messages ({error})") from error


def _chat_pieces(messages: Any, tokens: Tokens, where: str) -> list[Pieces]:
    """One example in which every assistant turn is learned.

    Some templates render a turn differently once others follow it (they drop its reasoning, say).
    Then each assistant turn is an example of its own: what the model sees when it answers.
    """
    _check_messages(messages, where)
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render_chat(tokens.tokenizer, messages[:i], where, prompt=True)
            whole = render_chat(tokens.tokenizer, messages[: i + 1], where, prompt=False)
            if not whole.startswith(prompt):
                raise ValueError(
                    f"{where}: the chat template renders message {i + 1} otherwise than as the "
                    "continuation of its prompt, so the reply cannot be told from the prompt"
                )
            turns.append((prompt, whole))
    if not turns:
        raise ValueError(f"{where}: no message has the role 'assistant', so nothing is learned")
    if not all(later.startswith(earlier) for (_, earlier), (later, _) in pairwise(turns)):
        return [_turn_pieces(prompt, whole, 0, tokens) for prompt, whole in turns]
    pieces, start = [], 0
    for prompt, whole in turns:
        pieces += _turn_pieces(prompt, whole, start, tokens)
        start = len(whole)
    return [pieces]


def _turn_pieces(prompt: str, whole: str, start: int, tokens: Tokens) -> Pieces:
    return [(tokens(prompt[start:]), False), (tokens(whole[len(prompt) :]), True)]


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: field 'messages' must be a list of messages")
    for i, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise ValueError(f"{where}: message {i} must be an object with role and content")
        for name in ("role", "content"):
            _string(message, name, f"{where}, message {i}")


def _form(record: dict[str, Any], where: str) -> str:
    """The first field of the form that the record is in."""
    for required, optional in FORMS:
        if all(name in record for name in required):
            _refuse_misspelt(set(record) - set(required), set(optional) - set(record), where)
            return required[0]
    found = ", ".join(map(repr, record)) or "none"
    for required, _ in FORMS:
        missing = [name for name in required if name not in record]
        if len(missing) < len(required):
            raise ValueError(f"{where}: field '{missing[0]}' is missing (fields found: {found})")
    raise ValueError(f"{where}: unknown fields ({found}); expected {EXPECTED}")


def _refuse_misspelt(found: set[str], allowed: set[str], where: str) -> None:
    """Other fields may stand beside a form's own (an id, a source), but not typing errors."""
    for name in sorted(found):
        if match := get_close_matches(name, allowed, n=1, cutoff=0.7):
            raise ValueError(f"{where}: unknown field '{name}', did you mean '{match[0]}'?")


def _string(record: dict[str, Any], name: str, where: str) -> str:
    if name not in record:
        raise ValueError(f"{where}: field '{name}' is missing")
    if not isinstance(record[name], str):
        found = type(record[name]).__name__
        raise ValueError(f"{where}: field '{name}' must be a string; got {found}")
    return record[name]
