"""Two commits compared: the library as it was beside the library as it is, timed by today's benchmarks.

python -m benchmarks --baseline REVISION [--only ...] [--quick] [--output JSON]

The two take turns in processes of their own, in the order now, then, then, now, twice over: a machine that grows
slower during the run slows both alike. Contenders other than ours are left out; the yardsticks stay, to show what the
machine itself did.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks import machine, results
from qlora import files

ROOT = Path(__file__).resolve().parents[1]
NOW, THEN = "now", "then"
TURNS = 2 * (NOW, THEN, THEN, NOW)

_LIBRARY = ("qlora", "kernels")
_TAIL = 4000

Sample = tuple[str, str, str]
"""What is compared: group, case and contender."""


def compare(revision: str, arguments: Sequence[str]) -> int:
    """Time `revision` and the working tree in turns and print a table; returns the exit status.

    Args:
        revision: anything that git takes for a commit.
        arguments: those of `python -m benchmarks`; `--output` says where to store the comparison, which is
            not stored otherwise.
    """
    output, arguments = _own_arguments(arguments)
    try:
        commit = _resolve(revision)
        with _library_of(commit) as folder, tempfile.TemporaryDirectory() as scratch:
            turns = _take_turns({NOW: ROOT, THEN: folder}, revision, arguments, Path(scratch))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    comparison = summarize(turns) | {"revision": commit}
    print(table(comparison))
    if output is not None:
        files.write_json(output, comparison)
        print(f"\nwritten to {output}")
    return 1 if any(case["status"] != "timed" for case in comparison["cases"]) else 0


def _own_arguments(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Where to store the comparison, and what to hand on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--baseline")
    parser.add_argument("--output", type=Path)
    own, others = parser.parse_known_args(arguments)
    return own.output, others


# --- The library of another commit ------------------------------------------------------------------


def _resolve(revision: str) -> str:
    name = f"{revision}^{{commit}}"
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", name)
    if found.returncode:
        raise ValueError(f"baseline must be a commit of this repository; got {revision!r}")
    return found.stdout.strip()


@contextmanager
def _library_of(commit: str) -> Iterator[Path]:
    """A folder with the library of a commit beside a link to today's benchmarks; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="qlora-baseline-") as name:
        folder = Path(name).resolve()
        archive = folder / "library.tar"
        packed = _git("archive", "--format=tar", f"--output={archive}", commit, *_LIBRARY)
        if packed.returncode:
            raise ValueError(
                f"baseline {commit[:12]}: has no library ({_last_line(packed.stderr)})"
            )
        subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)
        archive.unlink()
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks", target_is_directory=True)
        yield folder


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise ValueError("baseline needs git, which is not installed") from error


# --- Turns ------------------------------------------------------------------------------------------


def _take_turns(
    folders: Mapping[str, Path], revision: str, arguments: Sequence[str], scratch: Path
) -> dict[str, list[dict[str, Any]]]:
    """The results of each side, in the order of its turns."""
    names = {NOW: "the working tree", THEN: f"baseline {revision}"}
    for side, folder in folders.items():
        _check_import(folder, names[side])
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in folders}
    for number, side in enumerate(tqdm(TURNS, unit="turn", dynamic_ncols=True)):
        output = scratch / f"{number}.json"
        command = ["-m", "benchmarks", *arguments, "--ours-only", "--output", str(output)]
        status, errors = _python(folders[side], command, forward=True)
        # A missed target is a status of 1, too: what counts is whether there is a result.
        if not output.exists():
            raise ValueError(
                f"{names[side]}: today's benchmarks ended with status {status} ({_last_line(errors)})"
            )
        result = results.read(output)
        _check_ours(result, names[side])
        turns[side].append(result)
    return turns


def _check_import(folder: Path, name: str) -> None:
    """Refuse a library that today's benchmarks cannot import, or that Python finds elsewhere."""
    probe = "import sys, qlora, benchmarks.__main__; sys.stderr.write(qlora.__file__)"
    status, errors = _python(folder, ["-c", probe], forward=False)
    if status:
        raise ValueError(f"{name}: today's benchmarks cannot import it ({_last_line(errors)})")
    if not Path(_last_line(errors)).resolve().is_relative_to(folder):
        raise ValueError(f"{name}: Python imports qlora from {_last_line(errors)} instead")


def _check_ours(result: Mapping[str, Any], name: str) -> None:
    """Refuse a side on which not one case could be timed."""
    ours = [case["timings"][0] for case in result["cases"]]
    if all(timing["status"] != "timed" for timing in ours):
        reason = ours[0]["reason"] if ours else "there are no cases"
        raise ValueError(f"{name}: today's cases cannot drive it ({reason})")


def _python(folder: Path, arguments: Sequence[str], forward: bool) -> tuple[int, str]:
    """Run Python on the library in `folder`; returns its exit status and the end of its standard error.

    Args:
        forward: whether standard error, where the progress bar is, is shown while it runs.
    """
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    tail = b""
    with process:
        while chunk := process.stderr.read1():
            tail = (tail + chunk)[-_TAIL:]
            if forward:
                sys.stderr.write(chunk.decode(errors="replace"))
    return process.returncode, tail.decode(errors="replace")


def _last_line(text: str) -> str:
    lines = text.replace("\r", "\n").strip().splitlines()
    return lines[-1] if lines else "no message"


# --- What came of it --------------------------------------------------------------------------------


def summarize(turns: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The comparison as a JSON object.

    `cases` is a list of {group, name, contender, is_yardstick, status, reason, now_ms, then_ms,
    then_over_now}: the times are the medians of the turns, in order, and the ratio is of their medians.
    """
    by_side = {side: [*map(_timings, turns[side])] for side in (NOW, THEN)}
    everywhere = [timings for side in by_side.values() for timings in side]
    shared = [key for key in everywhere[0] if all(key in timings for timings in everywhere)]
    last = turns[NOW][-1]
    return {
        "date": last["date"],
        "commit": machine.commit(),
        **{key: last[key] for key in ("device", "versions", "settings")},
        "cases": [_compared(key, by_side) for key in shared],
    }


def _timings(result: Mapping[str, Any]) -> dict[Sample, Mapping[str, Any]]:
    return {
        (case["group"], case["name"], timing["contender"]): timing
        for case in result["cases"]
        for timing in case["timings"]
    }


def _compared(
    key: Sample, by_side: Mapping[str, Sequence[Mapping[Sample, Mapping[str, Any]]]]
) -> dict[str, Any]:
    timings = {side: [one[key] for one in by_side[side]] for side in by_side}
    refused = [
        (f"{side}: {timing['reason']}", timing["status"])
        for side in (THEN, NOW)
        for timing in timings[side]
        if timing["status"] != "timed"
    ]
    reason, status = refused[0] if refused else ("", "timed")
    now, then = ([timing["p50_ms"] for timing in timings[side]] for side in (NOW, THEN))
    return {
        **dict(zip(("group", "name", "contender"), key, strict=True)),
        "is_yardstick": timings[NOW][0]["is_yardstick"],
        "status": status,
        "reason": reason,
        "now_ms": now,
        "then_ms": then,
        "then_over_now": None if refused else median(then) / median(now),
    }


def table(comparison: Mapping[str, Any]) -> str:
    """A block for each case: medians, how far the turns lie apart, and whether that hides the difference."""
    lines = [
        f"then: {comparison['revision'][:12]}; now: the working tree, {comparison['commit']}",
        f"{'':<34}{'now ms':>10}{'spread':>8}{'then ms':>10}{'spread':>8}{'then / now':>12}",
    ]
    before = None
    for case in comparison["cases"]:
        title = f"{case['group']}: {case['name']}"
        lines += ["", title] if title != before else []
        lines.append(_line(case))
        before = title
    return "\n".join(lines)


def _line(case: Mapping[str, Any]) -> str:
    name = f"  {case['contender']}"
    if case["status"] != "timed":
        return f"{name:<34}{case['status']} ({case['reason']})"
    sides = "".join(
        f"{median(times):>10.4g}{(max(times) - min(times)) / median(times):>8.1%}"
        for times in (case["now_ms"], case["then_ms"])
    )
    return f"{name:<34}{sides}{case['then_over_now']:>12.3f}  {_verdict(case)}"


def _verdict(case: Mapping[str, Any]) -> str:
    """A difference counts if no turn of one side reaches into the range of the other's.

    With four turns each and no difference at all, that happens by chance in one case of 35.
    """
    if case["is_yardstick"]:
        return "yardstick"
    if max(case["now_ms"]) < min(case["then_ms"]):
        return "faster now"
    if min(case["now_ms"]) > max(case["then_ms"]):
        return "slower now"
    return "no difference beyond the spread"
