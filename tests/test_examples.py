"""The examples, as a user runs them, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.__main__ import main
from tests import tiny

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data to learn and two adapters."""
    path = tmp_path_factory.mktemp("examples")
    tiny.model_folder(path / "model")
    records = [{"prompt": f"{i}+1=", "completion": f"{i + 1}."} for i in range(8)]
    tiny.write_lines(path / "data.jsonl", records)
    for name, rate in (("plus", "1e-2"), ("other", "1e-3")):
        files = [str(path / "model"), str(path / "data.jsonl"), "--output", str(path / name)]
        recipe = ["--steps", "2", "--rank", "4", "--learning-rate", rate, "--device", "cpu"]
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


def run(place: Path, script: str, *arguments: str) -> str:
    done = call(place, script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_is_short_and_says_how_to_run_it(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"    python examples/{script.name} path/to/model" in text


def test_finetune_and_chat(place: Path) -> None:
    arguments = ["model", "data.jsonl", "--prompt", "3+1=", "--style", "plain"]
    printed = run(place, "finetune_and_chat.py", *arguments, "--steps", "3", "--rank", "4")
    for line in ("before: ", r"3 steps in \d+ s, last loss \d", "after: ", "is in my-adapter"):
        assert re.search(line, printed), printed
    assert (place / "my-adapter" / "adapter_model.safetensors").is_file()


def test_many_adapters(place: Path) -> None:
    arguments = ["model", "plus", "other", "--prompt", "3+1=", "--tokens", "4"]
    printed = run(place, "many_adapters.py", *arguments)
    assert re.search(r"^plus: [\d,]+ bytes, \d+\.\d\d% of the base", printed, re.MULTILINE)
    for name in ("plus", "other", "base", "mix"):
        assert re.search(rf"^{name}: ", printed, re.MULTILINE), printed
    for name in ("plus", "other", "base"):
        assert f"next token, one batch, {name}: " in printed


def test_a_new_data_type(place: Path) -> None:
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
