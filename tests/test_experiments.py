"""The scripts in experiments/ and docs/frontier.md: their code and what they say are those of the committed runs."""

import ast
import csv
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from helpers import ROOT
from mnist_lab.checking import rehearsal
from mnist_lab.data import Mnist
from mnist_lab.results.records import read_records, rows_of
from mnist_lab.running.identity import code_sha256, find_sources
from mnist_lab.running.summary import summarize
from mnist_lab.verdicts.comparison import p_text
from mnist_lab.verdicts.statistics import judge_mean, lower_bound

STEMS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")
TEXTS = {stem: (ROOT / "experiments" / f"{stem}.py").read_text() for stem in STEMS}
Load = Callable[[str], ModuleType]


# ---- every script


@pytest.mark.parametrize("stem", STEMS)
def test_a_script_says_what_it_tries_and_its_code_is_that_of_its_committed_runs(stem: str, load_script: Load) -> None:
    script = load_script(stem)
    title, *parts = re.split(r"\n\n(Target|Change|Result|Analysis): ", script.__doc__ or "")
    assert title.strip()
    assert parts[::2] == ["Target", "Change", "Result", "Analysis"]
    assert all(text.strip() for text in parts[1::2])

    published = ROOT / "docs" / "results" / f"{stem}.csv"
    assert published.exists() != ("Result: not trained yet" in TEXTS[stem])
    if published.exists():
        (committed,) = {row["code_sha256"] for row in csv.DictReader(published.read_text().splitlines())}
        assert code_sha256(find_sources(Path(script.__file__ or ""))).startswith(committed)


@pytest.mark.parametrize("stem", STEMS)
def test_declaration_passes_its_checks_and_its_rehearsal(stem: str, load_script: Load, mnist: Mnist) -> None:
    experiment = load_script(stem).EXPERIMENT
    experiment.check()
    if "teacher" in getattr(experiment.objective, "keywords", {}):  # which a run finds in its store
        teacher = load_script(experiment.objective.keywords["teacher"]).EXPERIMENT.net()
        experiment = replace(experiment, objective=partial(experiment.objective, teacher=teacher))

    notices = rehearsal.rehearse(experiment, mnist).notices
    assert not [notice for notice in notices if notice.startswith(("scheduler", "net", "loss", "optimizer", "mlflow"))]


@pytest.mark.parametrize("stem", [stem for stem, text in TEXTS.items() if "# after each: output (" in text])
def test_comments_state_the_shape_and_the_receptive_field(stem: str, load_script: Load) -> None:
    summary = summarize(load_script(stem).Net())
    rows = re.findall(r"^(\w+)-\d+ +\[([\d, ]+)\] .* (\d+)x\3$", summary, re.MULTILINE)
    comments = re.findall(r"^ +(?:nn\.(\w+)\(.*\)|\w+(?:\(\))?),  # \(([\d, ]+)\), (\d+)$", TEXTS[stem], re.MULTILINE)
    assert len(comments) == len(re.findall(r"  # \(\d+, ", TEXTS[stem])) > 4

    left = iter(rows)
    for kind, *stated in comments:  # a layer that is shared, or in a block, has only a name
        assert (kind or "Conv2d", *stated) in left


RESULTS = ROOT / "docs" / "results"
RECORDS = read_records(RESULTS)
PAGE = (ROOT / "docs" / "frontier.md").read_text()
STEPS = sorted({*RECORDS.runs["step"]})


def figures(step: str, column: str = "last") -> list[float]:
    return rows_of(step, RECORDS.runs)[column].astype("float64").tolist()


def check_mean_and_sd(step: str, text: str) -> None:
    (mean, sd) = re.findall(r"(\d+\.\d+) \+- (\d+\.\d+)", text)[0]
    assert float(mean) == pytest.approx(statistics.mean(figures(step)), abs=0.0051)
    assert float(sd) == pytest.approx(statistics.stdev(figures(step)), abs=0.0051)


def check_shown(step: str, text: str) -> None:
    """Check each "... above 99.45 (p = 0.001)": that p is below 0.01, and as many digits of it as are said."""
    for target, sign, said in re.findall(r"above (\d+\.\d+) \(p ([=<]) ([\d.]+)\)", text):
        _, p, _ = judge_mean(figures(step), float(target))
        assert statistics.mean(figures(step)) > float(target)
        assert p < 0.01
        if sign == "<":
            assert p_text(p) == f"<{said}"
        else:
            digits = len(said.partition(".")[2])
            assert f"{p:.{digits}f}" == said


@pytest.mark.parametrize("step", STEPS)
def test_a_result_is_that_of_the_committed_runs(step: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / "experiments" / f"{step}.py").read_text()))
    assert docstring is not None
    told = " ".join(docstring.partition("\n\nResult: ")[2].split())
    result = told.partition(" Reported were ")[0].partition(" Analysis: ")[0]
    if len(figures(step)) == 1:
        assert float(re.findall(r"(\d+\.\d+) % in the last epoch", result)[0]) == figures(step)[0]
    else:
        check_mean_and_sd(step, result)
        ((first, last),) = re.findall(r"mean and sd of seeds (\d+) to (\d+)", result)
        assert figures(step, "seed") == list(range(int(first), int(last) + 1))
    for pattern, column in ((r"(\d+\.\d+) at best", "best"), (r"training accuracy (\d+\.\d+)", "train")):
        for mean in re.findall(pattern, result):
            assert float(mean) == pytest.approx(statistics.mean(figures(step, column)), abs=0.0051)
    for least in re.findall(r"ends at (\d+\.\d+) or above", result):
        assert float(least) == min(figures(step))
    for least, most in re.findall(r"(?:from|between) (\d+\.\d+) (?:to|and) (\d+\.\d+)", result):
        assert (float(least), float(most)) == (min(figures(step)), max(figures(step)))
    for raw in re.findall(r"[Ww]ithout (?:averaging|it) the same ten networks end at (\d+\.\d+)", told):
        (final,) = {*rows_of(step, RECORDS.runs)["epochs"]}
        last = rows_of(step, RECORDS.epochs)
        raw_accuracies = last["raw_test_accuracy"][last["epoch"] == final].astype("float64")
        assert float(raw) == pytest.approx(raw_accuracies.mean(), abs=0.0051)
    check_shown(step, told)


@pytest.mark.parametrize("line", re.findall(r"^\|[^|]*\| `\w+`.* \+- .*$", PAGE, re.MULTILINE))
def test_a_budget_has_the_figures_of_the_committed_runs(line: str) -> None:
    (step,) = re.findall(r"`(\w+)`", line)
    _, _, _, seeds, accuracy, shown, reach, *_ = map(str.strip, line.split("|"))
    assert int(seeds) == len(figures(step))
    check_mean_and_sd(step, accuracy)
    assert 0 <= lower_bound(figures(step)) - float(shown) < 0.01
    for record, distance in re.findall(r"^([\d.]+): ([\d.]+) more$", reach):
        assert float(distance) == pytest.approx(float(record) - statistics.mean(figures(step)), abs=0.0051)
