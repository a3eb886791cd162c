"""How `beyond` is shown: its tables and plots."""

from __future__ import annotations

from pathlib import Path

from paper_repro import beyond_plots
from paper_repro.beyond_errors import BLOCKSIZE, CODES, COMPARED, LABELS, NORMAL, OF_NORMAL
from paper_repro.beyond_plots import front, relative
from paper_repro.harness.experiment import Result, table
from paper_repro.harness.stats import gap
from paper_repro.measures import in_data_type
from paper_repro.measures.in_data_type import BASE

SCALES = {"fp32": "fp32", "dynamic8": "8-bit dynamic map", "e4m3": "8-bit float e4m3"}


def section(result: Result) -> str:
    return "\n\n".join(
        (
            "Any 16 values are a data type here (`qlora.register_format`). AF4 and the codes of least error are "
            "computed from their definitions, for normal weights in blocks of each size. They keep -1, 0 and 1, so "
            "that a block's largest weight and a zero decode to themselves; those called free keep nothing. A code "
            "is fitted to the very weights that it then holds by Lloyd and Max's iteration, in which a weight "
            "counts the square of its block's largest magnitude: so it is the weights' squared error that becomes "
            "least, and not that of the scaled weights. Errors are those of the weights; normal numbers are "
            f"{result['draws']:,} draws, seed {result['seeds'][0]}. AF4 is Yoshida's (2023, arXiv 2306.06965).",
            "**Codebooks by block size, on normal numbers**, squared and absolute error relative to NF4's",
            _normal_table(result),
            f"**Codebooks on weights**, blocks of {BLOCKSIZE}, relative RMSE",
            _codes_table(result),
            "**NF4 by block size**, relative RMSE; a star where no other row has fewer bits and a smaller "
            "error. Bits are those of normal numbers",
            _sizes_table(result),
            f"**Format of the scales**, NF4 in blocks of {BLOCKSIZE}: relative RMSE of the scales, and of the "
            "weights",
            _scales_table(result),
            *(_perplexity_table(result, name) for name in result["models"]),
        )
    )


def _normal_table(result: Result) -> str:
    rows = []
    for code in OF_NORMAL:
        cells = []
        for size in COMPARED:
            found = result["normal"][str(size)]
            cells += [f"{relative(found, code, key):+.1%}" for key in ("mse", "mae")]
        rows.append((CODES[code], *cells))
    header = ["codebook", *(f"{size}, {kind}" for size in COMPARED for kind in ("MSE", "MAE"))]
    return table(header, rows)


def _codes_table(result: Result) -> str:
    of = {source: found["codes"] for source, found in result["sources"].items()}
    rows = [
        (label, *(f"{of[source][code]['rmse']:.2%}" for source in of))
        for code, label in CODES.items()
    ]
    return table(["codebook", *(LABELS[source] for source in of)], rows)


def _sizes_table(result: Result) -> str:
    of = {source: found["sizes"] for source, found in result["sources"].items()}
    best = {source: front(points) for source, points in of.items()}
    rows = []
    for i, point in enumerate(of[NORMAL]):
        errors = [
            f"{points[i]['rmse']:.2%}{' *' if points[i] in best[source] else ''}"
            for source, points in of.items()
        ]
        scales = "8 bit" if point["double_quant"] else "fp32"
        rows.append((point["blocksize"], scales, f"{point['bits']:.4f}", *errors))
    return table(["block size", "scales", "bits", *(LABELS[source] for source in of)], rows)


def _scales_table(result: Result) -> str:
    of = {source: found["scales"] for source, found in result["sources"].items()}
    rows = []
    for name, label in SCALES.items():
        cells = [
            f"{of[source][name]['scale_rmse']:.2%}, {of[source][name]['rmse']:.3%}" for source in of
        ]
        rows.append((label, f"{of[NORMAL][name]['bits']:.3f}", *cells))
    return table(["scales", "bits", *(LABELS[source] for source in of)], rows)


def _perplexity_table(result: Result, name: str) -> str:
    of = result["models"][name]
    rows = []
    for variant, found in of.items():
        is_base = variant == BASE
        size = "" if is_base else variant.partition("@")[2]
        rows.append(
            (
                _label(variant),
                "-" if is_base else f"{found['weight_rmse']:.2%}",
                f"{found['perplexity']:.2f}",
                "-" if is_base else gap(found, of[BASE]),
                "-" if is_base or variant == f"nf4@{size}" else gap(found, of[f"nf4@{size}"]),
            )
        )
    header = ["codebook, block size", "relative RMSE of weights", "perplexity"]
    header += ["nats above base", "nats above NF4 in such blocks"]
    return (
        f"**Perplexity, {in_data_type.MODELS[name]}**, on Table 2's text, {of[BASE]['tokens']:,} predicted "
        "tokens. Intervals are 95 %, over articles: another text would move the difference so much. How "
        "roundings fall out in one model they do not cover.\n\n" + table(header, rows)
    )


def _label(variant: str) -> str:
    if variant == BASE:
        return "base"
    code, _, size = variant.partition("@")
    return f"{CODES[code]}, {size}"


def plots(result: Result, folder: Path) -> dict[str, Path]:
    return {
        "Errors of codebooks on normal numbers relative to NF4's, by block size": (
            beyond_plots.show_normal(result, folder / "beyond_codebooks.svg")
        ),
        "NF4's error against the bits that its scales take; the line joins what nothing beats on normal "
        "numbers": beyond_plots.show_bits(result, folder / "beyond_bits.svg"),
        f"Codebooks on weights in blocks of {BLOCKSIZE}": (
            beyond_plots.show_codes(result, folder / "beyond_weights.svg")
        ),
        "Our own model's log-perplexity by codebook, with 95 % intervals over articles; scales differ": (
            beyond_plots.show_perplexity(result["models"]["own"], folder / "beyond_perplexity.svg")
        ),
    }
