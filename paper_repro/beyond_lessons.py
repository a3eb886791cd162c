"""What one learns from `beyond`, and what does not add up in AF4's paper: sentences by the numbers that come."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from paper_repro.beyond_errors import BLOCKSIZE, COMPARED, NORMAL
from paper_repro.beyond_models import LARGEST
from paper_repro.beyond_plots import front, relative
from paper_repro.harness.experiment import Result
from paper_repro.harness.stats import gap
from paper_repro.measures.in_data_type import BASE

SAME_VALUES = 1e-3
OWN = "own"


def deviation(result: Result, code: str) -> float:
    """The largest difference of AF4's published values from those of a definition, over both block sizes."""
    return max(found[code] for found in result["definitions"].values())


def errata(result: Result) -> Sequence[str]:
    if not deviation(result, "af4") <= SAME_VALUES < deviation(result, "least_absolute"):
        return ()
    sizes = list(result["definitions"])
    off = [f"{result['definitions'][s]['least_absolute']:.3f} in blocks of {s}" for s in sizes]
    more = [relative(result["normal"][s], "af4", "scaled_mae", "least_absolute") for s in sizes]
    return (
        "AF4 (Yoshida 2023, arXiv 2306.06965) is derived by minimizing the expected absolute error with -1, 0 "
        f"and 1 kept. Its values are off that minimum by up to {' and '.join(off)}, and their error on normal "
        f"numbers is {' and '.join(f'{value:+.1%}' for value in more)} from the least. They follow to "
        f"{deviation(result, 'af4'):.0e} if the shares of the two values beside 0 are taken to end at 0, as though "
        "no weight were rounded to 0.",
    )


def lessons(result: Result) -> Sequence[str]:
    """A sentence each, five in all."""
    return (
        _on_af4(result),
        _on_measures(result),
        _on_bits(result),
        _on_fitting(result),
        _on_perplexity(result),
    )


def _on_af4(result: Result) -> str:
    sizes = list(result["definitions"])
    gains = [relative(result["normal"][s], "least_absolute", "scaled_mae", "af4") for s in sizes]
    verdict = "are" if deviation(result, "least_absolute") <= SAME_VALUES else "are not"
    return (
        f"AF4's values {verdict} those of the least absolute error that it is derived for: on normal numbers "
        "that code's error differs from AF4's by "
        + " and by ".join(f"{g:+.1%} in blocks of {s}" for g, s in zip(gains, sizes, strict=True))
        + "."
    )


def _on_measures(result: Result) -> str:
    squared, absolute = (_winners(result, key) for key in ("mse", "mae"))
    depends = "does not depend" if squared == absolute and " and " not in squared else "depends"
    return (
        f"Which of NF4 and AF4 holds normal weights better {depends} on the measure and the block size: the "
        f"smaller squared error has {squared}, the smaller absolute error {absolute}."
    )


def _winners(result: Result, key: str) -> str:
    """For example "NF4 at 64, 256 and AF4 at 1024, 4096"."""
    better: dict[str, list[str]] = {"NF4": [], "AF4": []}
    for size in map(str, COMPARED):
        name = "AF4" if relative(result["normal"][size], "af4", key) < 0 else "NF4"
        better[name].append(size)
    return " and ".join(f"{name} at {', '.join(found)}" for name, found in better.items() if found)


def _on_bits(result: Result) -> str:
    points = result["sources"][NORMAL]["sizes"]
    best = front(points)
    doubled = sum(point["double_quant"] for point in best)
    own, half = (
        next(p for p in points if p["blocksize"] == size and p["double_quant"])
        for size in (BLOCKSIZE, BLOCKSIZE // 2)
    )
    dynamic, e4m3 = (result["sources"][NORMAL]["scales"][name] for name in ("dynamic8", "e4m3"))
    return (
        f"Of NF4's {len(points)} block sizes and kinds of scales {len(best)} are such that none of the others "
        f"has both no more bits and no more error on normal numbers, {doubled} of them with scales in 8 bits "
        f"and the paper's choice {'' if own in best else 'not '}among them: from there, blocks of "
        f"{half['blocksize']} take {half['bits'] - own['bits']:+.3f} bits a weight and change the error by "
        f"{_change(half, own):+.1%}, and scales in e4m3, {e4m3['scale_rmse'] / dynamic['scale_rmse']:.1f} times as "
        f"far off as those in the dynamic map, by {_change(e4m3, dynamic):+.2%}."
    )


def _change(one: dict[str, float], other: dict[str, float]) -> float:
    return one["rmse"] / other["rmse"] - 1


def _on_fitting(result: Result) -> str:
    sources = [found for name, found in result["sources"].items() if name != NORMAL]
    kept, free, general = (
        [relative(found["codes"], code, "rmse") for found in sources]
        for code in ("fitted", "fitted_free", "least_squared_free")
    )
    halved = [_halved(found["sizes"]) for found in sources]
    more = sum(fit < half for fit, half in zip(free, halved, strict=True))
    return (
        f"16 values fitted to a model's own weights in blocks of {BLOCKSIZE} change NF4's RMSE by {_range(kept)} with "
        f"-1, 0 and 1 kept and by {_range(free)} with nothing kept, the best for normal blocks with nothing kept by "
        f"{_range(general)}, and NF4 in blocks of {BLOCKSIZE // 2} by {_range(halved)}: the fit with nothing kept "
        f"gains more than the smaller blocks in {more} of {len(sources)} models."
    )


def _halved(points: Sequence[dict[str, float]]) -> float:
    """The change of error by blocks of half the paper's size, both with scales in fp32."""
    by_size = {p["blocksize"]: p for p in points if not p["double_quant"]}
    return _change(by_size[BLOCKSIZE // 2], by_size[BLOCKSIZE])


def _range(values: Sequence[float]) -> str:
    return f"{min(values):+.1%} to {max(values):+.1%}"


def _on_perplexity(result: Result) -> str:
    of = result["models"][OWN]
    counts, pairs, turned = [], 0, 0
    for size in (BLOCKSIZE, LARGEST):
        names = [variant for variant in of if variant.endswith(f"@{size}")]
        gaps = [gap(of[name], of[f"nf4@{size}"]) for name in names if name != f"nf4@{size}"]
        lower, higher = sum(g.high < 0 for g in gaps), sum(g.low > 0 for g in gaps)
        counts.append(
            f"in blocks of {size} lower with {lower} and higher with {higher} of {len(gaps)} others (NF4 is "
            f"{gap(of[f'nf4@{size}'], of[BASE])} nats per token above the base)"
        )
        for one, other in combinations([of[name] for name in names], 2):
            pairs += 1
            by_error = one["weight_rmse"] < other["weight_rmse"]
            turned += by_error != (one["perplexity"] < other["perplexity"])
    return (
        f"The error of the weights orders {pairs - turned} of {pairs} pairs of codebooks as our own model's "
        "perplexity does, which by 95 % intervals over the text is, against NF4's, "
        f"{' and '.join(counts)}."
    )
