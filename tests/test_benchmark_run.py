"""The command line of the benchmarks, and what a run leaves behind when something fails."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as program
from benchmarks import results, suite
from benchmarks.harness import Case
from tests.test_benchmarks import contender, doubled, doubling, no_inputs


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    text = capsys.readouterr().out
    for word in (*suite.GROUPS, "--only step", "--quick", "static", "plot", "exit status"):
        assert word in text


def test_an_unknown_group_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(["--only", "step,walk"])
    assert "got walk" in capsys.readouterr().err


def test_static_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Static:
        main = staticmethod(lambda argv: argv)

    monkeypatch.setitem(sys.modules, "benchmarks.static", Static)
    monkeypatch.setattr("benchmarks.static", Static, raising=False)
    assert program.main(["static", "--json"]) == ["--json"]


def test_readme_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import readme

    monkeypatch.setattr(readme, "main", lambda argv: argv)
    assert program.main(["readme", "--check"]) == ["--check"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "above 0; got 0"),
        (["--seconds", "nan"], "above 0; got nan"),
        (["--seconds", "soon"], "above 0; got soon"),
        (["--base", "HEAD"], "unrecognized arguments: --base HEAD"),
    ],
)
def test_a_wrong_argument_is_an_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        program.main(["--device", "cuda"])
    assert "--device cuda needs a CUDA GPU" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--quick", "--only", "quantize", "--output", "/dev/null/x.json"]
    assert program.main(arguments) == 2
    assert "error: --output: cannot write to /dev/null/x.json" in capsys.readouterr().err


def test_a_group_without_cases_here_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--device", "cpu", "--quick", "--only", "launch"]) == 2
    assert "no case of launch runs on cpu" in capsys.readouterr().err


# --- A run --------------------------------------------------------------------------------------------


@pytest.fixture
def run_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs the program on these cases; returns its status and what it stored."""
    monkeypatch.setattr(program, "useful_dtypes", lambda device: [])
    monkeypatch.setattr(program.ceilings, "measure", lambda *arguments: {})

    def run(cases: list[Case], *arguments: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(program, "all_cases", lambda *arguments: cases)
        path = tmp_path / "result.json"
        common = ["--device", "cpu", "--seconds", "0.001", "--output", str(path)]
        return program.main([*common, *arguments]), results.read(path)

    return run


def test_only_a_run_of_everything_is_complete(run_of: Any) -> None:
    cases = [doubling(contender("ours", doubled()), contender("peer", doubled()))]
    for arguments in ([], ["--quick"], ["--only", "step"], ["--ours-only"]):
        status, result = run_of(cases, *arguments)
        assert status == 0
        assert result["complete"] is (not arguments)


def test_a_case_that_fails_ends_nothing(run_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It is reported before anything is drawn, where there may be nothing to draw."""
    case = doubling(contender("ours", doubled()))
    status, result = run_of([replace(case, name="large", inputs=no_inputs), case])
    assert status == 1
    assert [one["timings"][0]["status"] for one in result["cases"]] == ["failed", "timed"]
    assert result["complete"]
    printed = capsys.readouterr()
    assert "FAILED large: ours failed: inputs: MemoryError: too large" in printed.err
    assert "not drawn: " in printed.out


def test_what_is_measured_is_stored_whatever_comes(
    run_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(seed: int) -> Tensor:
        raise KeyboardInterrupt

    case = doubling(contender("ours", doubled()))
    with pytest.raises(KeyboardInterrupt):
        run_of([case, replace(case, inputs=killed)])
    result = results.read(tmp_path / "result.json")
    assert len(result["cases"]) == 1
    assert not result["complete"]


def test_a_device_that_breaks_down_ends_the_run(
    run_of: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "device_error", lambda device: "illegal access")
    status, result = run_of([doubling(contender("ours", doubled()))] * 2)
    assert status == 1
    assert len(result["cases"]) == 1
    assert not result["complete"]
    assert "FAILED 3: the device takes no more work: illegal access" in capsys.readouterr().err
