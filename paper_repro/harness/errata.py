"""What does not add up in the papers and needs no measurement to see it: their own tables are enough."""

from __future__ import annotations

from collections import defaultdict

from paper_repro.harness import published

ROUNDING = 0.1
"""How far a printed mean may be from that of printed values: both are rounded to 0.1."""


def found() -> list[str]:
    """Markdown, a sentence or two each."""
    return [*_identical_rows(), _means_of_orders(), _mean_of_nf4(), _tables_4_and_5(), _table_1()]


def _identical_rows() -> list[str]:
    by_values = defaultdict(list)
    for model, _, *values in published.rows(published.TABLE6)[1:]:
        by_values[tuple(values)].append(model)
    return [
        f"QLoRA, Table 6: the rows of {' and '.join(models)} are identical ({' / '.join(values)}): probably a "
        "print error."
        for values, models in by_values.items()
        if len(models) > 1
    ]


def off_means() -> dict[str, tuple[float, float]]:
    """Models of Table 6 whose printed mean is not that of both orders: that mean, and what is printed."""
    means = {}
    for model, _, first, second, printed, _ in published.rows(published.TABLE6)[1:]:
        mean = (float(first) + float(second)) / 2
        if abs(mean - float(printed)) > ROUNDING + 1e-9:
            means[model] = (mean, float(printed))
    return means


def _means_of_orders() -> str:
    off, count = off_means(), len(published.rows(published.TABLE6)) - 1
    furthest = max(off, key=lambda model: abs(off[model][0] - off[model][1]))
    mean, printed = off[furthest]
    return (
        f"QLoRA, Table 6: in {len(off)} of {count} rows the printed mean is not the mean of both orders, by more "
        f"than rounding explains: {furthest}'s would be {mean:g} and is {printed:g}."
    )


def table4_means() -> dict[str, float]:
    """The mean of a data type's eight values in Table 4."""
    rows = ((name, values) for name, *values, _ in published.rows(published.TABLE4)[1:])
    return {name: sum(map(float, values)) / len(values) for name, values in rows}


def _mean_of_nf4() -> str:
    means = table4_means()
    printed = published.rows(published.TABLE4)[-1][-1]
    return (
        f"QLoRA, Table 4: the mean of NF4 + DQ's eight values is {means['NF4 + DQ']:.2f}, printed is {printed}; "
        f"BF16's is {means['BF16']:.2f}. By its own values NF4 + DQ is not above BF16, although its printed mean is."
    )


def _tables_4_and_5() -> str:
    name, *cells, _ = published.rows(published.TABLE4)[-1]
    table5 = published.by_name(published.TABLE5)
    again = [table5["Alpaca"], table5["FLAN v2"]]
    gaps = [abs(float(cell) - float(again[i % 2][i // 2])) for i, cell in enumerate(cells)]
    return (
        f"QLoRA, Tables 4 and 5: what reads as the same models ({name}, Alpaca and FLAN v2) have other MMLU scores in "
        f"{sum(gap > 0.05 for gap in gaps)} of {len(gaps)} cases, by up to {max(gaps):.1f} points, which is not "
        "explained."
    )


def _table_1() -> str:
    return (
        "QLoRA, Tables 1, 6 and 7: Guanaco 13B has an Elo of 916 in Table 1 and of 913 in Table 7; Guanaco 7B "
        "takes 6 GB in Table 1 and 5 GB in Table 6."
    )
