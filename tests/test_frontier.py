"""What the scripts' docstrings and docs/frontier.md say of the committed runs is what docs/results says."""

import ast
import re
import statistics
from collections import Counter, defaultdict

import pytest

from helpers import ROOT
from mnist_lab.results.records import read_records, rows_of
from mnist_lab.verdicts.comparison import p_text
from mnist_lab.verdicts.statistics import judge_mean, lower_bound

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
        p = judge_mean(figures(step), float(target)).p
        assert statistics.mean(figures(step)) > float(target)
        assert p < 0.01
        if sign == "<":
            assert p_text(p) == f"<{said}"
        else:
            digits = len(said.partition(".")[2])
            assert f"{p:.{digits}f}" == said


# ---- the scripts


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


# ---- docs/frontier.md


@pytest.mark.parametrize("line", re.findall(r"^\|.* \+- .*$", PAGE, re.MULTILINE))
def test_a_budget_has_the_figures_of_the_committed_runs(line: str) -> None:
    (step,) = re.findall(r"`(\w+)`", line)
    _, _, _, seeds, accuracy, shown, reach, *_ = map(str.strip, line.split("|"))
    assert int(seeds) == len(figures(step))
    check_mean_and_sd(step, accuracy)
    assert 0 <= lower_bound(figures(step)) - float(shown) < 0.01
    for record, distance in re.findall(r"^([\d.]+): ([\d.]+) more$", reach):
        assert float(distance) == pytest.approx(float(record) - statistics.mean(figures(step)), abs=0.0051)


def test_each_script_with_several_seeds_beyond_step_4_has_its_budget() -> None:
    told = {step for line in re.findall(r"^\|.* \+- .*$", PAGE, re.MULTILINE) for step in re.findall(r"`(\w+)`", line)}
    beyond = {step for step in STEPS if re.match(r"step[5-9]|quick|(three|five)_epochs|under_(1|2|5|8)k", step)}
    assert told == beyond


def test_the_candidates_are_counted() -> None:
    # A candidate is a line of a table above that section.
    tried, _, _ = PAGE.partition("## On all training images")
    lines = re.findall(r"^\| .* \|$", tried, re.MULTILINE)
    heads = re.findall(r"^\|---", tried, re.MULTILINE)
    (said,) = re.findall(r"^(\d+) candidates were compared", PAGE, re.MULTILINE)
    assert int(said) == len(lines) - len(heads)


def test_the_mistakes_are_those_of_the_committed_runs() -> None:
    (numbers,) = re.findall(r"chose the label: images ([\d,\s]+ and \d+)\.", PAGE)
    doubtful = {int(number) for number in re.findall(r"\d+", numbers)}
    assert len(doubtful) == 15
    wrong: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for row in RECORDS.mistakes.to_dict("records"):
        wrong[row["step"]][row["seed"]].add(int(row["image"]))

    (teacher,) = wrong["teacher"].values()
    numbers_of = r" \| ".join([r"([\d.]+)"] * 6)
    lines = re.findall(rf"^\| `(\w+)`(?:, seeds (\d+) to (\d+))? \| {numbers_of} \|$", PAGE, re.MULTILINE)

    assert {step for step, *_ in lines} == {step for step in wrong if len(wrong[step]) >= 10}
    for step, first, last, *told in lines:
        seeds = sorted(wrong[step], key=int)[:10]
        assert (first, last) == (("", "") if len(wrong[step]) == 10 else (seeds[0], seeds[-1]))
        by_seed = [wrong[step][seed] for seed in seeds]
        assert len(by_seed) == 10
        seeds_of = Counter(image for images in by_seed for image in images)
        assert told == [
            f"{statistics.mean(map(len, by_seed)):.1f}",
            f"{statistics.mean(len(images & doubtful) for images in by_seed):.1f}",
            *(str(sum(seeds > least for seeds in seeds_of.values())) for least in (9, 5, 0)),
            f"{statistics.mean(len(images & teacher) for images in by_seed):.1f}",
        ]
