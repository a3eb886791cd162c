"""The report and its page, from fixed results of all experiments."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from paper_repro.__main__ import _describe
from paper_repro.harness import draw, errata, out_of_reach, page, published, report
from paper_repro.harness.chapter import read_chapter
from paper_repro.harness.experiment import (
    ARITHMETIC,
    IN_TREND,
    KINDS,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    VERDICTS,
)
from paper_repro.harness.lab import Lab
from paper_repro.harness.registry import EXPERIMENTS
from qlora import files
from qlora.__main__ import _parser
from tests import pages
from tests.paper_world import results

ORIGIN = {
    "device": "a processor",
    "cores": 2,
    "python": "3.12",
    "torch": "2.13",
    "transformers": "5.23",
    "commit": "abc",
}


def passing(name: str) -> dict[str, Any]:
    return results(name).passing()


def write_record(
    folder: Path, name: str, result: dict[str, Any], seconds: dict[str, float] | None = None
) -> None:
    record = {"experiment": name, "mode": "quick", "measured_on": [ORIGIN], "result": result}
    record["measurements"] = {name: 90.0} if seconds is None else seconds
    files.write_json(folder / f"{name}.json", record)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of all experiments, one claim of which fails."""
    folder = tmp_path_factory.mktemp("out")
    for name in EXPERIMENTS:
        result = passing(name)
        if name == "bits":
            result["bits"]["nf4+dq"] = 4.25
        write_record(folder, name, result)
    report.write(folder)
    return folder


def rows(words: str, verdict: str) -> list[str]:
    return [line for line in words.splitlines() if line.endswith(f"| {verdict} |")]


def test_the_report_is_made_from_the_json_files_alone(everything: Path) -> None:
    words = (everything / "REPORT.md").read_text()
    failed = rows(words, NOT_REPRODUCED)
    assert len(failed) == 1
    assert failed[0].startswith("| [bits](#bits) | Double quantization takes 0.127")
    assert f"| {NOT_REPRODUCED} | 1 | 0 | 0 | 1 |" in words
    assert "this version" not in words
    assert "Mode: quick. Device: a processor, 2 cores. Commit: abc." in words
    assert "python 3.12, torch 2.13, transformers 5.23" in words
    for name, experiment in EXPERIMENTS.items():
        assert f'<a id="{name}"></a>\n\n## {experiment.title}\n' in words
        assert f"[{name}.json]({name}.json)" in words
    counts = [len(rows(words, verdict)) for verdict in VERDICTS]
    assert sum(counts) == sum(len(experiment.claims) for experiment in EXPERIMENTS.values())


def test_claims_are_counted_by_what_their_verdict_rests_on(everything: Path) -> None:
    words = (everything / "REPORT.md").read_text()
    table = words.partition("## Claims\n\n")[2].partition("\n\n")[0].splitlines()
    assert table[0] == "| verdict | arithmetic | measured | other claims | all |"
    counts = [[int(cell) for cell in line.split("|")[2:-1]] for line in table[2:]]
    claims = [claim for experiment in EXPERIMENTS.values() for claim in experiment.claims]
    for place, kind in enumerate(KINDS):
        assert sum(row[place] for row in counts) == sum(claim.kind == kind for claim in claims)
    assert all(row[-1] == sum(row[:-1]) for row in counts)


def test_tables_out_of_reach_are_counted_one_by_one(everything: Path) -> None:
    words = (everything / "REPORT.md").read_text()
    titles = [claim.claim.partition(":")[0] for claim in out_of_reach.CLAIMS]
    tables = sum(len(re.findall(r"\d+", title)) for title in titles)
    assert tables > len(titles)  # Tables 1 and 7 of QLoRA share a row
    assert f"Besides these, {tables} tables of the papers cannot be run here" in words
    assert '<a id="out-of-reach"></a>' in words


def test_the_list_names_each_claims_kind() -> None:
    for experiment in EXPERIMENTS.values():
        words = _describe(experiment)
        assert all(f": {claim.criterion} ({claim.kind})" in words for claim in experiment.claims)


def test_sections_come_in_order(everything: Path) -> None:
    words = (everything / "REPORT.md").read_text()
    titles = re.findall(r"^## (.*)$", words, re.MULTILINE)
    assert titles[:2] == ["Claims", "What is not run, and why"]
    assert titles[2:-3] == [experiment.title for experiment in EXPERIMENTS.values()]
    last = ["What does not add up in the papers", "What a researcher learns", "How it was measured"]
    assert titles[-3:] == last


def test_errata_and_lessons_of_all_experiments_are_together(everything: Path) -> None:
    words = (everything / "REPORT.md").read_text()
    off, learned = words.split("## What does not add up")[1].split("## What a researcher learns")
    assert all(f"- {line}" in off for line in errata.found())
    for name, experiment in EXPERIMENTS.items():
        result = files.read_json(everything / f"{name}.json")["result"]
        assert all(f"- {line}" in off for line in experiment.errata(result))
        assert " ".join(experiment.lessons(result)) in learned


def test_the_papers_values_are_there_where_nothing_can_run(everything: Path) -> None:
    words = (everything / "REPORT.md").read_text()
    for value in ("34.34", "60.9", "53.1", "63.9", "99.3", "1022", "87.2", "70.4", "175,255.8M"):
        assert f"| {value} |" in words
    assert all(claim.claim in report.unreachable_in_words() for claim in out_of_reach.CLAIMS)


def test_tables_of_the_papers_are_rectangular() -> None:
    for claim in out_of_reach.CLAIMS:
        assert len({len(row) for row in published.rows(claim.values)}) == 1, claim.claim


def test_commands_that_would_run_it_are_commands() -> None:
    commands = [c for claim in out_of_reach.CLAIMS for c in re.findall("`qlora (.*?)`", claim.how)]
    for command in (c for c in commands if " " in c and not c.endswith("finetune")):
        _, unknown = _parser().parse_known_args(command.split())
        assert not unknown, command


def test_the_report_says_what_was_not_run(tmp_path: Path) -> None:
    write_record(tmp_path, "bits", passing("bits"))
    words = report.write(tmp_path).read_text()
    others = [experiment for name, experiment in EXPERIMENTS.items() if name != "bits"]
    for experiment in others:
        assert f"| {experiment.name} | all claims | run `python -m paper_repro" in words
        assert f"## {experiment.title}\n" not in words
    assert len(rows(words, NOT_RUN)) == sum(len(experiment.claims) for experiment in others)


def test_nothing_at_all_was_run(tmp_path: Path) -> None:
    words = report.write(tmp_path).read_text()
    assert "Nothing was run yet." in words
    assert f"| {REPRODUCED} | 0 |" in words


def test_a_claim_that_needs_a_gpu_says_so(tmp_path: Path) -> None:
    write_record(tmp_path, "memory", passing("memory") | {"runs": {}})
    words = report.write(tmp_path).read_text()
    why = "needs a GPU: `memory --model 65b --run`, `memory --model 33b --run`"
    assert f"measured: a full step on a GPU | {why} |" in words


def test_a_shared_measurement_counts_once(tmp_path: Path) -> None:
    for name in ("bits", "datatypes"):
        write_record(tmp_path, name, passing(name), {"shared": 150.0, name: 60.0})
    words = report.write(tmp_path).read_text()
    assert "Time to measure it: 4 min." in words  # 150 + 60 + 60 s
    assert len(re.findall(r"\| 210\.0 \|$", words, re.MULTILINE)) == 2  # each by itself


def test_a_chapter_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bits, made = EXPERIMENTS["bits"], []

    def section(result: dict[str, Any]) -> str:
        made.append(1)
        return "A section."

    monkeypatch.setitem(EXPERIMENTS, "bits", replace(bits, section=section))
    write_record(tmp_path, "bits", passing("bits"))
    chapter = read_chapter(tmp_path, EXPERIMENTS["bits"])
    assert "A section." in report.write(tmp_path, {"bits": chapter}).read_text()
    assert len(made) == 1


def without_measurements(record: dict[str, Any]) -> None:
    del record["measurements"]


def without_sizes(record: dict[str, Any]) -> None:
    del record["result"]["models"]


def with_a_number_for_bits(record: dict[str, Any]) -> None:
    record["result"]["bits"] = 4.127


@pytest.mark.parametrize(
    ("age", "why"),
    [
        (without_measurements, "bits.json is of an earlier version"),
        (without_sizes, "bits.json does not fit this version (KeyError: 'models')"),
        (
            with_a_number_for_bits,
            "bits.json does not fit this version (TypeError: 'float' object is not subscriptable)",
        ),
    ],
)
def test_a_json_of_another_version_is_to_be_made_again(
    tmp_path: Path, age: Callable[[dict[str, Any]], None], why: str
) -> None:
    write_record(tmp_path, "bits", passing("bits"))
    record = files.read_json(tmp_path / "bits.json")
    age(record)
    files.write_json(tmp_path / "bits.json", record)
    words = report.write(tmp_path).read_text()
    assert f"| bits | all claims | {why}: run `python -m paper_repro bits` again |" in words
    assert f"## {EXPERIMENTS['bits'].title}" not in words


def test_a_result_that_its_plots_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plots(result: dict[str, Any], folder: Path) -> dict[str, Path]:
        raise IndexError("no such bar")

    monkeypatch.setitem(EXPERIMENTS, "bits", replace(EXPERIMENTS["bits"], plots=plots))
    write_record(tmp_path, "bits", passing("bits"))
    words = report.write(tmp_path).read_text()
    assert "| bits | all claims | bits.json does not fit this version (IndexError: no such" in words


def test_a_bar_or_a_line_break_does_not_end_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = EXPERIMENTS["bits"]
    claim = replace(bits.claims[0], statement="|error| of\nB A", measured=lambda r: "a | b")
    monkeypatch.setitem(EXPERIMENTS, "bits", replace(bits, claims=(claim,)))
    write_record(tmp_path, "bits", passing("bits"))
    words = report.write(tmp_path).read_text()
    assert "| [bits](#bits) | \\|error\\| of B A |" in words
    cells = parsed((tmp_path / "report.html").read_text()).cells
    start = cells.index("|error| of B A")
    assert cells[start - 1 : start + 3 : 3] == ["bits", "a | b"]
    assert cells[start + 4 : start + 6] == [ARITHMETIC, REPRODUCED]


# --- The page ---------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """A page's cells, words and elements; fails where an element is closed that is not open."""

    VOID = ("meta", "img", "br", "hr", "col")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.paragraphs = ""
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:  # <img ... />
            return
        assert self.open.pop() == tag, f"line {self.getpos()[0]}"

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data
        elif "p" in self.open and "code" not in self.open:
            self.paragraphs += data

    def values(self, attribute: str) -> list[str]:
        return [found[attribute] or "" for _, found in self.found if attribute in found]


def parsed(text: str) -> Parsed:
    reader = Parsed()
    reader.feed(text)
    assert not reader.open
    return reader


def test_the_page_needs_nothing_beside_it(everything: Path) -> None:
    text = (everything / "report.html").read_text()
    reader = parsed(text)
    plots = list(everything.glob("*.svg"))  # as many as there are images: none takes another's name
    sources = reader.values("src")
    assert len(plots) == len(sources) >= len(EXPERIMENTS) // 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert len(reader.values("alt")) == len(sources)
    assert all(reader.values("alt"))
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\(", text)
    anchors = set(reader.values("id"))
    names = {f"{name}.json" for name in EXPERIMENTS}
    for link in reader.values("href"):
        assert link.removeprefix("#") in anchors if link.startswith("#") else link in names


def test_all_tables_and_lists_are_read_as_such(everything: Path) -> None:
    reader = parsed((everything / "report.html").read_text())
    assert not re.search(r"^(\|.*\||[-*] .*|\d\. .*)$", reader.paragraphs, re.MULTILINE)
    assert not any(":--" in cell for cell in reader.cells)


def test_verdicts_have_their_colours(everything: Path) -> None:
    reader = parsed((everything / "report.html").read_text())
    classes = [value for value in reader.values("class") if value.startswith("verdict")]
    assert classes.count("verdict not-reproduced") == 2  # in the counts and among the claims
    for verdict in VERDICTS:
        name = verdict.replace(" ", "-")
        assert f"verdict {name}" in classes
        assert f"td.{name}" in page.STYLE


def test_the_same_results_give_the_same_plots(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, "bits", passing("bits"))
        report.write(tmp_path / name)
    one, other = ((tmp_path / name / "report.html").read_bytes() for name in ("one", "other"))
    assert one == other


def test_a_plot_that_is_half_written_does_not_replace_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def killed(self: Figure, path: Path, **options: Any) -> None:
        path.write_text("<svg")
        raise KeyboardInterrupt

    path = tmp_path / "plots" / "a.svg"
    with draw.figure(path) as axes:
        axes.plot([1, 2])
    whole = path.read_text()
    monkeypatch.setattr(Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt), draw.figure(path):
        pass
    assert path.read_text() == whole
    assert list(path.parent.iterdir()) == [path]


def test_a_plot_is_an_svg(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"must end in \.svg, got a\.png"),
        draw.figure(tmp_path / "a.png"),
    ):
        pass


# --- The page in docs/ ------------------------------------------------------------------------------

GUIDE = Path(__file__).parents[1] / "docs" / "reproducing.md"


def test_the_guide_names_all_experiments() -> None:
    names = re.findall(r"^\| `(\w+)` \|", GUIDE.read_text(), re.MULTILINE)
    assert [name for name in names if name in EXPERIMENTS] == list(EXPERIMENTS)


def test_the_guides_experiment_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "tails.py"
    found = [b.text for b in pages.blocks(GUIDE.read_text()) if "EXPERIMENT =" in b.text]
    module.write_text(found[0])
    spec = importlib.util.spec_from_file_location("tails", module)
    tails = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tails)
    monkeypatch.setitem(EXPERIMENTS, "tails", tails.EXPERIMENT)
    lab = Lab(tmp_path / "cache", tmp_path / "out")
    write_record(lab.out, "tails", tails.EXPERIMENT.run(lab))
    words = report.write(lab.out).read_text()
    assert "## Heavy tails" in words
    assert len(rows(words, IN_TREND)) == 1


# --- What needs no measurement ----------------------------------------------------------------------


def test_what_does_not_add_up_in_the_papers_tables() -> None:
    means = errata.table4_means()
    assert means["NF4 + DQ"] == pytest.approx(52.99, abs=0.005)
    assert errata.off_means()["GPT-4"] == (114.75, 114.5)
    assert "Guanaco 65B" not in errata.off_means()
    words = " ".join(errata.found())
    assert "Open Assistant 33B and Vicuna 13B are identical" in words
    assert "in 4 of 8 cases, by up to 0.7 points" in words
