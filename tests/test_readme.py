"""The README's code runs as it stands, but for the folder's name and the number of steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora.__main__ import main
from tests import pages

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = [block.text for block in pages.blocks(README) if block.language == "python"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data under the names that the README uses."""
    monkeypatch.chdir(pages.prepare(tmp_path))
    return tmp_path


def test_fine_tuning_in_ten_lines(workplace: Path) -> None:
    block = PYTHON_BLOCKS[0]
    assert len(block.strip().splitlines()) <= 10
    names: dict[str, object] = {}
    exec(pages.shortened(block), names)
    exec(pages.shortened(PYTHON_BLOCKS[2]), names)  # and several adapters, of which this is one
    merged = AutoModelForCausalLM.from_pretrained(workplace / "merged")
    assert torch.isfinite(merged(torch.tensor([[0, 5, 9]])).logits).all()


def test_tensors_on_their_own() -> None:
    names = {"weight": torch.randn(512, 512)}
    exec("import qlora\n" + PYTHON_BLOCKS[1], names)
    assert f"{names['q'].bits_per_parameter:.3f}" == "4.127"
    assert names["w"].shape == names["weight"].shape


def test_every_command_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"^qlora (\w+) ", README, re.MULTILINE)
    assert commands == [*("finetune", "evaluate", "generate", "merge", "quantize", "memory")]
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"usage: qlora {command}" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["kernels", "qlora"])
def test_the_floor_plan_names_every_file(folder: str) -> None:
    files = {file.name for file in Path(__file__).parents[1].glob(f"{folder}/*.py")}
    assert {name for name in files - {"__init__.py"} if name not in README} == set()


def test_the_counts_of_verdicts_are_those_of_the_full_run_that_is_kept() -> None:
    section = README.partition("The last full run")[2]
    link = re.search(r"\((paper_repro/results/.*/REPORT\.md)\)", section)[1]
    table = section[section.index("| verdict") :].partition("\n\n")[0]
    report = (Path(__file__).parents[1] / link).read_text(encoding="utf-8")
    assert table in report
    every = sum(int(line.split("|")[-2]) for line in table.splitlines()[2:])
    assert f"judges {every} claims" in section
