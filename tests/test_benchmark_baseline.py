"""Two commits compared, with a library whose speed is a number in a file and benchmarks that read it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks import baseline
from benchmarks.harness import Case, Contender
from tests.stored import case, result, timing

PROGRAM = '''\
"""Writes {template}, with the library's own speed in it, and notes the turn."""
import json, sys, pathlib, qlora

if __name__ == "__main__":
    stored = json.loads({template!r})
    ours = stored["cases"][0]["timings"][0]
    ours["p50_ms"] = qlora.milliseconds()
    if qlora.milliseconds() < 0:
        ours |= {{"status": "failed", "reason": "no such speed"}}
    log = pathlib.Path({log!r})
    with log.open("a") as file:
        print(qlora.NAME, *sys.argv[1:-1], file=file)
    pathlib.Path(sys.argv[-1]).write_text(json.dumps(stored))
    sys.exit(1)  # as after a missed target
'''

Repository = Callable[[str], str]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def commit(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    """A function that commits a library with this `__init__.py`, in a repository with fake benchmarks."""
    root = tmp_path / "repository"
    for folder in ("qlora", "kernels", "benchmarks"):
        (root / folder).mkdir(parents=True)
    (root / "qlora" / "kernels").symlink_to("../kernels")
    (root / "kernels" / "ops.py").write_text("")
    stored = result(case("layer", "8 x 8", timing("qlora", 1.0), timing("copy", 4.0, 1.0)))
    program = PROGRAM.format(template=json.dumps(stored), log=str(log))
    (root / "benchmarks" / "__main__.py").write_text(program)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(baseline, "ROOT", root)
    for variable in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(variable)

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        command = ["git", *who, *arguments]
        return subprocess.run(
            command, cwd=root, check=True, capture_output=True, text=True
        ).stdout.strip()

    def make(source: str) -> str:
        (root / "qlora" / "__init__.py").write_text(source)
        git("add", ".")
        git("commit", "-m", "a state")
        return git("rev-parse", "HEAD")

    git("init")
    yield make
    assert not list(scratch.iterdir()), "a temporary folder was left behind"


def library(name: str, milliseconds: float) -> str:
    return f"import qlora.kernels.ops\nNAME = {name!r}\ndef milliseconds(): return {milliseconds}\n"


def test_both_take_turns_on_todays_benchmarks(
    commit: Repository, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = commit(library("old", 3.0))
    commit(library("new", 2.0))
    (baseline.ROOT / "qlora" / "__init__.py").write_text(library("uncommitted", 1.5))
    assert baseline.compare(old[:8], ["--baseline", old[:8], "--only", "layer", "--quick"]) == 0
    handed_on = "--only layer --quick --ours-only --output"
    sides = 2 * ("uncommitted", "old", "old", "uncommitted")
    assert log.read_text().splitlines() == [f"{side} {handed_on}" for side in sides]
    ours, copy = capsys.readouterr().out.splitlines()[-2:]
    assert ours.split() == ["qlora", "1.5", "0.0%", "3", "0.0%", "2.000", "faster", "now"]
    assert copy.split()[:6] == ["copy", "4", "0.0%", "4", "0.0%", "1.000"]


def test_nothing_is_stored_unless_asked_for(commit: Repository, tmp_path: Path) -> None:
    old = commit(library("old", 3.0))
    before = set(baseline.ROOT.rglob("*"))
    assert baseline.compare("HEAD", []) == 0
    assert {path for path in baseline.ROOT.rglob("*") if "__pycache__" not in str(path)} == before
    output = tmp_path / "comparison.json"
    assert baseline.compare("HEAD", ["--output", str(output)]) == 0
    stored = json.loads(output.read_text())
    assert stored["revision"] == old
    assert stored["cases"][0] == {
        "group": "layer",
        "name": "8 x 8",
        "contender": "qlora",
        "is_yardstick": False,
        "status": "timed",
        "reason": "",
        "now_ms": [3.0] * 4,
        "then_ms": [3.0] * 4,
        "then_over_now": 1.0,
    }


@pytest.mark.parametrize("revision", ["nowhere", "--all", ""])
def test_an_unknown_revision_is_an_error(
    commit: Repository, revision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(library("only", 1.0))
    assert baseline.compare(revision, []) == 2
    expected = f"error: baseline must be a commit of this repository; got {revision!r}"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import a_module_that_is_gone", "cannot import it (ModuleNotFoundError"),
        ("NAME = 'old'", "status 1 (AttributeError: module 'qlora' has no attribute"),
        (library("old", -1.0), "today's cases cannot drive it (no such speed)"),
    ],
)
def test_a_library_that_todays_cases_cannot_drive_is_an_error(
    commit: Repository, source: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(source)
    (baseline.ROOT / "qlora" / "__init__.py").write_text(library("new", 1.0))
    assert baseline.compare("HEAD", []) == 2
    message = capsys.readouterr().err
    assert "error: baseline HEAD: " in message
    assert words in message


def test_a_commit_without_a_library_is_an_error(
    commit: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(library("old", 1.0))
    run = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", "-c"]
    run += ["commit.gpgsign=false", "commit", "-m", "gone"]
    subprocess.run(["git", "rm", "-r", "-q", "kernels"], cwd=baseline.ROOT, check=True)
    subprocess.run(run, cwd=baseline.ROOT, check=True, capture_output=True)
    assert baseline.compare("HEAD", []) == 2
    assert "has no library" in capsys.readouterr().err


def turns(*p50_ms: float) -> list[dict]:
    return [result(case("layer", "8 x 8", timing("qlora", p50))) for p50 in p50_ms]


@pytest.mark.parametrize(
    ("now", "then", "verdict"),
    [
        ((1.0, 1.2), (1.3, 1.5), "faster now"),
        ((1.3, 1.5), (1.0, 1.2), "slower now"),
        ((1.0, 1.4), (1.3, 1.5), "no difference beyond the spread"),
    ],
)
def test_a_difference_must_exceed_the_spread(
    now: tuple[float, ...], then: tuple[float, ...], verdict: str
) -> None:
    comparison = baseline.summarize({"now": turns(*now), "then": turns(*then)})
    assert comparison["cases"][0]["then_over_now"] == pytest.approx(sum(then) / sum(now))
    assert baseline.table(comparison | {"revision": "0" * 40}).endswith(verdict)


def test_a_case_that_one_side_fails_is_said() -> None:
    wrong = result(case("layer", "8 x 8", timing("qlora", None, status="wrong", reason="off")))
    comparison = baseline.summarize({"now": turns(1.0, 1.0), "then": [*turns(1.0), wrong]})
    assert comparison["cases"][0]["status"] == "wrong"
    assert "wrong (then: off)" in baseline.table(comparison | {"revision": "0" * 40})


# --- The command line -------------------------------------------------------------------------------


def test_the_command_hands_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "compare", lambda *arguments: arguments)
    argv = ["--baseline", "HEAD~1", "--only", "layer", "--output", "a.json"]
    assert program.main(argv) == ("HEAD~1", argv)


def test_ours_only_leaves_out_the_peers_and_keeps_the_yardsticks() -> None:
    contenders = (
        Contender("qlora", list, print),
        Contender("bitsandbytes", list, print),
        Contender("copy", list, None),
    )
    everyone = Case("layer", "8 x 8", {}, list, contenders)
    assert [c.name for c in program.without_peers(everyone).contenders] == ["qlora", "copy"]
