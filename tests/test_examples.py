"""The examples, as a user runs them, on a tiny model."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import qlora
from qlora.__main__ import main
from qlora.generate import generate
from qlora.kernels.formats import FORMATS
from qlora.pretrained import load_quantized, load_tokenizer
from tests import tiny

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
PROMPT = "3+1="
ANSWERS = {"plus": "yes", "other": "no."}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data to learn and two adapters, which have learned different answers."""
    path = tmp_path_factory.mktemp("examples")
    tiny.model_folder(path / "model")
    records = [{"prompt": f"{i}+1=", "completion": f"{i + 1}."} for i in range(8)]
    tiny.write_lines(path / "data.jsonl", records)
    for name in ANSWERS:
        taught = [record | {"completion": ANSWERS[name]} for record in records]
        data = tiny.write_lines(path / f"{name}.jsonl", taught)
        files = [str(path / "model"), str(data), "--output", str(path / name)]
        recipe = ["--steps", "4", "--rank", "4", "--learning-rate", "3e-2", "--device", "cpu"]
        assert main(["finetune", *files, *recipe]) == 0
    return path


def call(place: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


class Run:
    """Runs scripts as `python SCRIPT` does, in the place, but in this process, which has imported torch."""

    def __init__(self, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = patch, capsys

    def __call__(self, place: Path, script: str, *arguments: str) -> str:
        path = str(EXAMPLES / script)
        self._patch.chdir(place)
        self._patch.setattr(sys, "argv", [path, *arguments])
        self._capsys.readouterr()
        with mock.patch.dict(FORMATS):  # what a script registers is gone afterwards
            runpy.run_path(path, run_name="__main__")
        return self._capsys.readouterr().out


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)


def answer(place: Path, weights: dict[str, float]) -> tuple[str, str]:
    """What the base says with the weighted sum of these adapters, loaded alone; and its next token."""
    tokenizer = load_tokenizer(place / "model")
    model, _ = load_quantized(place / "model", qlora.QLoRAConfig(target_modules=None))
    for name in weights:
        qlora.load_adapter(model, place / name, name)
    qlora.set_adapter(model, weights or None)
    text = generate(model, tokenizer, PROMPT, max_new_tokens=4)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    return text, tokenizer.decode(tiny.logits(model, ids)[0, -1].argmax())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_is_short_and_says_how_to_run_it(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"    python examples/{script.name} path/to/model" in text


def test_finetune_and_chat(place: Path) -> None:
    """As a process."""
    arguments = ["model", "data.jsonl", "--prompt", PROMPT, "--style", "plain"]
    done = call(place, "finetune_and_chat.py", *arguments, "--steps", "3", "--rank", "4")
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    for line in ("before: ", r"3 steps in \d+ s, last loss \d", "after: ", "is in my-adapter"):
        assert re.search(line, printed), printed
    assert (place / "my-adapter" / "adapter_model.safetensors").is_file()


def test_many_adapters(place: Path, run: Run) -> None:
    """Switched, mixed and in one batch, they say what each says that is loaded alone."""
    arguments = ["model", "plus", "other", "--prompt", PROMPT, "--tokens", "4"]
    printed = run(place, "many_adapters.py", *arguments)
    assert re.search(r"^plus: [\d,]+ bytes, \d+\.\d\d% of the base", printed, re.MULTILINE)
    sums = {"plus": {"plus": 1.0}, "other": {"other": 1.0}, "mix": {"plus": 0.5, "other": 0.5}}
    expected = {name: answer(place, sums.get(name, {})) for name in (*sums, "base")}
    assert len({text for text, _ in expected.values()}) == 4
    for name, (text, _) in expected.items():
        assert f"\n{name}: {text}\n" in printed
    del expected["mix"]
    assert len({token for _, token in expected.values()}) == 3
    for name, (_, token) in expected.items():
        assert f"\nnext token, one batch, {name}: {token!r}\n" in printed


def test_adapters_without_a_sum_are_not_mixed(place: Path, run: Run) -> None:
    files = [str(place / "model"), str(place / "data.jsonl"), "--output", str(place / "dora")]
    assert main(["finetune", *files, "--steps", "1", "--dora", "--device", "cpu"]) == 0
    arguments = ["model", "plus", "dora", "--prompt", PROMPT, "--tokens", "2"]
    printed = run(place, "many_adapters.py", *arguments)
    assert "no mix: plus, dora: " in printed
    assert "\nmix: " not in printed
    assert "next token, one batch, dora: " in printed


def test_a_new_data_type(place: Path, run: Run) -> None:
    printed = run(place, "new_data_type.py", "model", "data.jsonl", "--steps", "3")
    rows = re.findall(r"^(nf4|mine) +([\d.]+), +([\d.]+), ([\d.]+)$", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == ["nf4", "mine"]
    for _, error, before, after in rows:
        assert 0.05 < float(error) < 0.15
        assert float(after) < float(before)


def test_a_mistake_in_a_codebook_is_named(place: Path) -> None:
    values = [str(i / 10) for i in range(16)]
    done = call(place, "new_data_type.py", "model", "data.jsonl", "--values", *values)
    assert done.returncode != 0
    assert "values must be finite and in [-1, 1]; got [1.1, 1.2, 1.3, 1.4, 1.5]" in done.stderr
