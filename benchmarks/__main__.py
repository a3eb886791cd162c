"""The command line: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import ceilings, machine, plot, results
from benchmarks.clocks import device_error
from benchmarks.harness import Case, Settings, measure
from benchmarks.peers import quiet
from benchmarks.suite import GROUPS, all_cases, useful_dtypes
from qlora import files

_DESCRIPTION = """\
Time what this machine can run, beside the peers that are installed.

All contenders of a case run in turns in this process, on the same weights, down to the bytes. Each one's result is
held to an fp64 oracle first: one that is wrong is not timed. Ratios are of medians, percentages are of what a
large copy and a large product reach in the same run.

other commands:
  python -m benchmarks static    what the compiler makes of the GPU kernels; needs no GPU
  python -m benchmarks.loading   memory and time of quantizing a folder of 3 GB while it is loaded
  python -m benchmarks plot      draw speed-ups and rooflines from stored results
  python -m benchmarks readme    write the stored results into README.md

groups of cases:
"""
_EPILOG = """\
examples:
  python -m benchmarks                       everything: minutes, on a GPU and on two cores
  python -m benchmarks --quick               small shapes and few rounds, to see that all runs
  python -m benchmarks --only step           the fine-tuning step alone
  OMP_NUM_THREADS=1 python -m benchmarks     on one thread

The exit status is 1 if a case of ours failed or was wrong, or a required target was missed; other targets that
are missed are marked in the table. What is measured is stored after every case. For figures to publish, leave the
machine idle: compare p20 and p80 to see how much others disturbed.
"""
_QUICK = Settings(seconds=1.0, min_rounds=3, max_rounds=10)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["static"]:
        from benchmarks import static  # needs triton, which not every platform has

        return static.main(argv[1:])
    if argv[:1] == ["plot"]:
        return plot.main(argv[1:])
    if argv[:1] == ["readme"]:
        from benchmarks import readme

        return readme.main(argv[1:])
    parser = _parser()
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU that torch sees; there is none")
    if options.baseline is not None:
        from benchmarks import baseline

        return baseline.compare(options.baseline, argv)
    return _run(options)


def _parser() -> argparse.ArgumentParser:
    groups = "\n".join(f"  {name:<12}{what}" for name, what in GROUPS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=_DESCRIPTION + groups,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --baseline hands arguments on, without itself
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--only", type=_groups, metavar="GROUP[,GROUP]", help="these groups")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument(
        "--seconds", type=_seconds, help="time to spend on the rounds of a case (default: 4)"
    )
    parser.add_argument(
        "--baseline",
        metavar="REVISION",
        help="compare ours in the working tree with ours at this commit; stored only with --output",
    )
    parser.add_argument(
        "--ours-only", action="store_true", help="time ours and the yardsticks, and draw nothing"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="JSON",
        help="where to write the result (default: benchmarks/results/DEVICE.json, with the groups or"
        " 'quick' in its name if it is not everything)",
    )
    return parser


def _groups(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in GROUPS]:
        raise argparse.ArgumentTypeError(
            f"must be of {', '.join(GROUPS)}; got {', '.join(unknown)}"
        )
    return chosen


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0; got {text}")
    return seconds


def _run(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    settings = _QUICK if options.quick else Settings()
    if options.seconds is not None:
        settings = replace(settings, seconds=options.seconds)
    with quiet():
        dtypes = useful_dtypes(device)
        cases = all_cases(device, dtypes, options.only or list(GROUPS), options.quick)
        if not cases:
            print(f"no case of {', '.join(options.only)} runs on {device.type}", file=sys.stderr)
            return 2
        if options.ours_only:
            cases = [without_peers(case) for case in cases]
        path = options.output or plot.RESULTS / f"{_stem(options, device)}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass  # what cannot be written is told before anything is measured
        except OSError as error:
            print(f"error: --output: cannot write to {path}: {error.strerror}", file=sys.stderr)
            return 2
        result = results.begin(settings, device, ceilings.measure(device, dtypes, options.quick))
        broken = _measure(cases, settings, result, path)
    result["complete"] = not (broken or options.only or options.quick or options.ours_only)
    files.write_json(path, result)
    print(results.table(result))
    print(f"\nwritten to {path}")
    failures = results.failures(result) + [broken] * bool(broken)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if not options.ours_only:
        _draw(result, path, options.output is None)
    return 1 if failures else 0


def _measure(cases: list[Case], settings: Settings, result: dict[str, Any], path: Path) -> str:
    """Add the cases to the result, and write it after each: what is measured stays, whatever comes.

    Returns why the device broke down before the last case, or an empty string.
    """
    with tqdm(cases, unit="case", dynamic_ncols=True) as bar:
        # In a log file a line for each case is enough.
        report = bar.set_postfix_str if sys.stderr.isatty() else lambda doing: None
        for case in bar:
            bar.set_description(f"{case.group}: {case.name}")
            result["cases"].append(results.case_record(measure(case, settings, report=report)))
            files.write_json(path, result)
            if error := device_error(case.device):
                return f"{case.name}: the device takes no more work: {error}"
    return ""


def without_peers(case: Case) -> Case:
    """The case with ours and its yardsticks alone."""
    ours, *others = case.contenders
    yardsticks = [contender for contender in others if contender.is_yardstick]
    return replace(case, contenders=(ours, *yardsticks))


def _stem(options: argparse.Namespace, device: torch.device) -> str:
    words = [machine.file_stem(machine.describe(device)), *(options.only or [])]
    words += ["ours"] * options.ours_only + ["quick"] * options.quick
    return "-".join(words)


def _draw(result: dict, path: Path, in_place: bool) -> None:
    folder = plot.PLOTS if in_place else path.parent
    try:
        for drawn in plot.draw(result, folder / f"{path.stem}.png"):
            print(f"drawn to {drawn}")
    except ImportError:
        print("not drawn: matplotlib is not installed")
    except ValueError as error:
        print(f"not drawn: {error}")


if __name__ == "__main__":
    sys.exit(main())
