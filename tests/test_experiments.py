"""The scripts in experiments/: they are the ones whose runs are committed, and the comments are true."""

import csv
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from mnist_lab.checking import rehearsal
from mnist_lab.data import Mnist
from mnist_lab.running.identity import code_sha256, find_sources
from mnist_lab.running.summary import summarize

ROOT = Path(__file__).parent.parent
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


# ---- the comments beside the layers


@pytest.mark.parametrize("stem", [stem for stem, text in TEXTS.items() if "# after each: output (" in text])
def test_comments_state_the_shape_and_the_receptive_field(stem: str, load_script: Load) -> None:
    summary = summarize(load_script(stem).Net())
    rows = re.findall(r"^(\w+)-\d+ +\[([\d, ]+)\] .* (\d+)x\3$", summary, re.MULTILINE)
    comments = re.findall(r"^ +(?:nn\.(\w+)\(.*\)|\w+),  # \(([\d, ]+)\), (\d+)$", TEXTS[stem], re.MULTILINE)
    assert len(comments) == len(re.findall(r"  # \(\d+, ", TEXTS[stem])) > 5

    left = iter(rows)
    for kind, *stated in comments:  # a layer that is shared has only a name
        assert (kind or "Conv2d", *stated) in left
