"""A downstream measure of the data types on a model never quantized before: MiniLM's embeddings of sentences.

The paper compares data types by perplexity. Here it is by how far a sentence encoder, its linear layers held in
4 bits by `qlora.quantize_model`, keeps to its own fp32 self: in the direction of its embeddings, and in which
definition it finds for a noun.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from paper_repro.harness import panels, stats
from paper_repro.harness.digests import digest_of
from paper_repro.harness.experiment import Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from paper_repro.harness.stats import Interval
from paper_repro.materials import assets
from paper_repro.measures import in_data_type, sentences
from paper_repro.measures.in_data_type import BASE, DATA_TYPES, LABELS, NF4, NF4_DQ
from paper_repro.measures.sentences import Encoder

TEXTS, QUERIES = (1000, 5000), (500, 2000)  # in a quick and in a full run
WORSE = ("e2m1", "int4", "fp4", "e3m0")


def run(lab: Lab) -> Result:
    words = sentences.pairs(lab.folder, lab.choose(*TEXTS), lab.choose(*QUERIES))
    encoder = Encoder(assets.minilm_folder(lab.folder), lab.device, words)
    settings = {"model": assets.MINILM_SHA256, "words": digest_of([words.queries, words.texts])}

    def measure(variant: str) -> dict[str, Any]:
        return _compare(encoder, variant)

    found = in_data_type.measure_each(
        lab, "embeddings", settings, DATA_TYPES, measure, (sentences,)
    )
    intervals = lab.measure(
        "embeddings-intervals", {"of": digest_of(found)}, lambda: _intervals(found), (stats,)
    )
    return {
        "source": words.source,
        "blocksize": DATA_TYPES[NF4].blocksize,
        "seeds": [stats.SEED],
        "variants": found,
        "intervals": intervals,
    }


def _compare(encoder: Encoder, variant: str) -> dict[str, Any]:
    """Cosine of each text's embedding with the original's; rank of the right text for each query, and the first."""
    queries, texts = encoder.original if variant == BASE else encoder.embed(variant)
    scores = queries @ texts.T
    right = scores.diagonal()[:, None]
    return {
        "cosine": (texts.double() * encoder.original[1].double()).sum(1).tolist(),
        "rank": (1 + (scores > right).sum(1)).tolist(),
        "first": scores.argmax(1).tolist(),
    }


def _intervals(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Means and 95 % intervals over texts and over queries, by data type.

    cosine: with the original's embeddings. cosine below: that of NF4 + DQ above it, text by text. recall below:
    recall at 1 of the original above it, query by query.
    """
    cosine = {name: np.array(of["cosine"]) for name, of in found.items() if name != BASE}
    hit = {name: np.array(of["rank"]) == 1 for name, of in found.items()}
    values = {
        "cosine": cosine,
        "cosine below": {n: cosine[NF4_DQ] - cosine[n] for n in (NF4, *WORSE)},
        "recall below": {n: hit[BASE].astype(float) - hit[n] for n in cosine},
    }
    return {
        what: {name: asdict(stats.bootstrap(of)) for name, of in by_type.items()}
        for what, by_type in values.items()
    }


DQ_MOST = 0.005


def _interval(result: Result, what: str, name: str) -> Interval:
    return Interval(**result["intervals"][what][name])


def _lost(result: Result, name: str) -> float:
    """1 - mean cosine with the original's embeddings."""
    return 1 - _interval(result, "cosine", name).mean


def _dq_cost(result: Result) -> float:
    return _lost(result, NF4_DQ) / _lost(result, NF4) - 1


def _recall(result: Result, name: str) -> float:
    ranks = result["variants"][name]["rank"]
    return sum(rank == 1 for rank in ranks) / len(ranks)


def _reciprocal_rank(result: Result, name: str) -> float:
    ranks = result["variants"][name]["rank"]
    return sum(1 / rank for rank in ranks) / len(ranks)


def _same_first(result: Result, name: str) -> float:
    """Share of queries for which the first text is the one that the original finds first."""
    first, original = (result["variants"][n]["first"] for n in (name, BASE))
    return sum(a == b for a, b in zip(first, original, strict=True)) / len(first)


def show_hundredths(result: Result, what: str, name: str) -> Interval:
    return _interval(result, what, name).scaled(100)


CLAIMS = (
    Claim(
        statement="NF4 + DQ keeps a model closest to what it was of the 4-bit data types (Table 2), here MiniLM's "
        "embeddings: weights never quantized before",
        paper="Table 2's order by perplexity",
        criterion=f"mean cosine with the fp32 model's embeddings above that of "
        f"{', '.join(LABELS[name] for name in WORSE)}, the 95 % interval of each difference above zero",
        passes=lambda r: all(_interval(r, "cosine below", name).low > 0 for name in WORSE),
        measured=lambda r: (
            f"{1 - _lost(r, NF4_DQ):.4f}; below it by, in hundredths, "
            + ", ".join(f"{show_hundredths(r, 'cosine below', n)} ({LABELS[n]})" for n in WORSE)
        ),
        trend=True,
    ),
    Claim(
        statement="Double quantization does not degrade the model (section 3), here MiniLM's embeddings",
        paper="no loss",
        criterion=f"1 - mean cosine of NF4 + DQ at most {DQ_MOST:.1%} above NF4's",
        passes=lambda r: _dq_cost(r) <= DQ_MOST,
        measured=lambda r: (
            f"{_dq_cost(r):+.1%}: {_lost(r, NF4_DQ):.5f} against {_lost(r, NF4):.5f}"
        ),
        trend=True,
    ),
    Claim(
        statement="A model in NF4 + DQ does what it does in 16 bits (section 4), here without training: which "
        "text is found for a query",
        paper="no figure given",
        criterion="none: the paper trains adapters first",
        passes=None,
        measured=lambda r: (
            f"recall at 1 {_recall(r, NF4_DQ):.1%}, in fp32 {_recall(r, BASE):.1%}: lower by "
            f"{show_hundredths(r, 'recall below', NF4_DQ)} points"
        ),
    ),
)


def section(result: Result) -> str:
    order = sorted(result["intervals"]["cosine"], key=lambda name: _lost(result, name))
    rows = [
        (
            LABELS[name],
            f"{1 - _lost(result, name):.4f}",
            "-" if name == NF4_DQ else str(show_hundredths(result, "cosine below", name)),
            f"{_recall(result, name):.1%}",
            str(show_hundredths(result, "recall below", name)),
            f"{_reciprocal_rank(result, name):.3f}",
            f"{_same_first(result, name):.1%}",
        )
        for name in order
    ]
    mrr = f"{_reciprocal_rank(result, BASE):.3f}"
    rows.insert(0, ("fp32", "1", "-", f"{_recall(result, BASE):.1%}", "-", mrr, "100%"))
    header = ["encoder in", "mean cosine with fp32", "hundredths below NF4 + DQ", "recall at 1"]
    header += ["points below fp32", "mean reciprocal rank", "same first text as fp32"]
    ranks, texts = (len(result["variants"][BASE][what]) for what in ("rank", "cosine"))
    return (
        f"MiniLM, its linear layers held in each data type by `quantize_model`, blocks of {result['blocksize']}, "
        f"fp32 arithmetic. {texts:,} texts and {ranks:,} queries for them: {result['source']}. 95 % intervals by "
        "bootstrap, each difference paired over the same texts or queries.\n\n"
        + table(header, rows)
    )


def lessons(result: Result) -> list[str]:
    ours, original = (result["variants"][name]["rank"] for name in (NF4_DQ, BASE))
    ranks = list(zip(ours, original, strict=True))
    lost, won = (sum(a != 1 and b == 1 for a, b in of) for of in (ranks, [r[::-1] for r in ranks]))
    return [
        f"With NF4 + DQ the embeddings of MiniLM have a mean cosine of {1 - _lost(result, NF4_DQ):.4f} with those "
        f"in fp32, and yet {1 - _same_first(result, NF4_DQ):.1%} of {len(ranks):,} queries find another text "
        f"first; {lost} right ones are lost thereby and {won} won."
    ]


def plots(result: Result, folder: Path) -> dict[str, Path]:
    order = sorted(result["intervals"]["cosine"], key=lambda name: _lost(result, name))
    turned, missed = {}, {}
    for name in order:
        cosine = _interval(result, "cosine", name)
        turned[LABELS[name]] = Interval(1 - cosine.mean, 1 - cosine.high, 1 - cosine.low)
        missed[LABELS[name]] = show_hundredths(result, "recall below", name)
    found = {"1 - mean cosine": turned, "recall at 1 lost, points": missed}
    path = folder / "embeddings.svg"
    panels.panels(path, [LABELS[name] for name in order], found, "against fp32", line=0)
    caption = "MiniLM in each data type against itself in fp32, with 95 % intervals"
    return {caption: path}


EXPERIMENT = Experiment(
    "embeddings",
    "Data types on a sentence encoder, by its embeddings",
    (0.4, 2),
    run,
    CLAIMS,
    section,
    plots,
    lessons=lessons,
)
