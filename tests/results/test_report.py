"""The report, written from a small real store and read back as a reader's program would."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from bs4 import BeautifulSoup

from helpers import ROOT
from mnist_lab import results
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.results.report import write_report
from mnist_lab.story import read_story
from mnist_lab.tracking.store import Store, open_store
from run_writer import T0, TARGETS, log_predictions, write_run, write_sample_store, write_seeds

HOSTILE = "../a|b <script>alert(1)</script>"  # a step's name is free text to the store
SCRIPTS = {
    "step1_plain": '''"""Step 1, plain: the ground.

Target: come near 99.4 %.

Change: none.

Result: 98.90 +- 0.10 (2 seeds).

Analysis: it over-fits.

Still the analysis, in a second paragraph with a list:

- one
- two
"""
raise RuntimeError("a report imports no script")
''',
    "step2_better": '"""Step 2: <script>alert("2")</script> &c.\n\nTarget: a < b\nChange: c\nResult: r\nAnalysis:\n"""',
    "step3_next": '"""Step 3: not run yet.\n\nTarget: t\n\nChange: c\n\nResult: -\n\nAnalysis: -\n"""',
    "an_idea": '"""An idea."""',
    "no_words": "x = 1",
}


@dataclass(frozen=True)
class Report:
    folder: Path
    html: str
    md: str
    page: BeautifulSoup

    @property
    def texts(self) -> tuple[str, str]:
        return self.page.get_text(), self.md

    def rows(self, table: int) -> list[list[str]]:
        rows = self.page.find_all("table")[table].find_all("tr")
        return [[" ".join(cell.get_text().split()) for cell in row.find_all(["td", "th"])] for row in rows]


def write(folder: Path, uri: str, scripts: Path, *steps: str) -> Report:
    files = write_report(folder, steps, tracking_uri=uri, scripts=scripts)
    assert files == (folder / "steps.html", folder / "steps.md")
    html, md = (file.read_text() for file in files)
    return Report(folder, html, md, BeautifulSoup(html, "html.parser"))


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiments")
    for name, text in SCRIPTS.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def store(new_store: Callable[[], Store], mnist: Mnist) -> Store:
    store = write_sample_store(new_store(), mnist)
    hostile = write_run(store, HOSTILE, 0, [97.0], start_time=T0, num_params=20_000, tags={})
    few = np.zeros(50, np.uint8)
    log_predictions(store, hostile, truth=few, prediction=few, logits=np.zeros((50, 10), np.float32))
    write_run(store, "step2_better", 0, [99.9], start_time=T0 + 10**9, tags=TARGETS | {"overrides": "lr=0.2"})
    write_run(store, "step2_better", 7, [99.9], start_time=T0 + 10**9, status="FAILED")
    write_run(store, "step3_next", 0, [99.9], start_time=T0 + 10**9, status=None)
    return store


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, store: Store, scripts: Path) -> Report:
    return write(tmp_path_factory.mktemp("reports") / "new" / "folder", store.uri, scripts)


# ---- the tables

ROWS = [  # the newest run of each seed counts; HOSTILE states no target
    ["step1_plain", "98.90 ± 0.099", "10,970", "3", "2", "98.90", "98.80", "–", "99.46", "99.32"],
    ["step2_better", "99.82 ± 0.014", "7,852", "3", "2", "99.84", "99.72", "–", "99.46", "99.32"],
    [HOSTILE, "97.00", "20,000", "1", "1", "97.00", "96.90", "–", "–", "–"],
]


def test_the_comparison_has_figures_and_verdicts_in_html_and_in_markdown(report: Report) -> None:
    _, _, *rows = report.rows(0)
    assert [[re.sub(r"[✓✗?].*", "", cell) for cell in row] for row in rows] == ROWS
    assert [[re.findall("met|missed|not shown", cell) for cell in row[1:4]] for row in rows] == [
        [["not shown"], ["missed"], ["met"]],  # two seeds at 98.97 and 98.83 don't refute it at p < 0.01
        [["met"], ["met"], ["met"]],
        [[], [], []],
    ]
    assert "missed < 10,000" in rows[0][2]
    assert "✓ met ≥ 99.4" in rows[1][1]

    lines = [line for line in report.md.splitlines() if line.startswith("|")]
    name = HOSTILE.replace("|", r"\|").replace("<", "&lt;").replace(">", "&gt;")
    shown = [re.sub(r" \((met|missed|not shown)\)", "", line) for line in lines[2:5]]
    assert shown == [f"| {' | '.join(row)} |" for row in (*ROWS[:2], [name, *ROWS[2][1:]])]
    assert "| 10,970 (missed) |" in lines[2]


def test_the_runs_behind_it_are_listed_with_hardware_and_commit(report: Report, store: Store) -> None:
    _, *rows = report.rows(1)
    names = [f"{step} seed {seed}" for step in ("step1_plain", "step2_better") for seed in (0, 1)]
    assert [row[0] for row in rows] == [*names, f"{HOSTILE} seed 0"]
    newest = results.run_table("step2_better", 0, columns="all", tracking_uri=store.uri).iloc[0]
    assert rows[2][1] == "99.81"
    assert rows[2][2] == f"{newest['start_time']:%Y-%m-%d %H:%M}"
    assert rows[2][3:] == ["1.0", "cpu: a CPU", "abc", newest["run_id"]]
    assert newest["run_id"] in report.md
    assert "mlflow 3" in report.texts[0]
    assert "lr=0.2" not in report.html + report.md  # an overridden run
    assert all("These meet all of their targets: step2_better." in text for text in report.texts)


# ---- the story


def test_the_experiments_stand_in_order(report: Report) -> None:
    order = ["step1_plain", "step2_better", "step3_next", HOSTILE, "an_idea", "no_words"]
    assert [h2["id"] for h2 in report.page.find_all("h2")] == ["comparison", *order, "provenance"]
    headings = re.findall(r"^Experiment (\w+)$", report.md, flags=re.MULTILINE)
    assert headings == [step for step in order if step != HOSTILE]


def test_a_result_is_told_under_its_own_script(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    write_run(open_store(uri), "mine", 0, [98.0], start_time=T0)
    original = (ROOT / "experiments" / "step3_gap.py").read_text()
    for name in ("mine", "a_copy", "step3_gap"):
        (tmp_path / f"{name}.py").write_text(original)
    (result,) = re.findall(r"^Result: (.+? \+- .+? %)", original, re.MULTILINE)
    (tmp_path / "changed.py").write_text(original.replace(result, "98.00 +- 0.01 %"))
    for name in ("new", "newer"):
        (tmp_path / f"{name}.py").write_text('"""New.\n\nResult: not trained yet\n"""')  # without a figure: nobody's
    (tmp_path / "broken.py").write_text('"""Title."""\ndef')
    report = write(tmp_path / "reports", uri, tmp_path)
    for page in report.texts:
        page = " ".join(page.split())
        assert page.count(f"{result} in the last epoch") == 1
        assert page.count("98.00 +- 0.01 % in the last epoch") == 1
        assert page.count("This docstring was copied from ") == 2
        assert page.count("This docstring was copied from step3_gap, so its Result and Analysis are not told") == 2
        committed = "The figures under Result are the committed ones, of docs/results; no run in this store"
        assert page.count(committed) == 1  # of step 3, which has no run here
    for text in (*report.texts, caplog.text):
        assert re.search(r"script .*broken\.py can't be read: .*line 2", text)


def test_what_a_script_lacks_is_said(report: Report) -> None:
    for step in ("step3_next", "an_idea", "no_words"):
        assert f"No finished run yet: make {step}" in report.texts[0]
        assert f"No finished run yet: `make {step}`" in report.md
    for text in report.texts:
        assert text.count("has nothing under: Target, Change, Result, Analysis.") == 2
        assert re.search(r"No confusion matrix and .*: run \w+ has predictions of 50 images, not of 10,000", text)
    assert "There is no script of this name" in report.texts[0]


def test_a_story_in_markdown_has_no_html(scripts: Path) -> None:
    text = read_story(scripts / "step2_better.py").markdown()
    assert text.startswith('**Step 2: &lt;script&gt;alert("2")&lt;/script&gt; &amp;c**')
    assert "a &lt; b" in text


# ---- the figures


def test_every_figure_says_what_it_shows(report: Report) -> None:
    texts = [str(image["alt"]) for image in report.page.find_all("img")]
    assert len(texts) == 1 + 2 * 3 + 1
    assert "Highest: step2_better, 99.82 % with 7,852 parameters. Lowest: ../a|b <script>" in texts[0]
    assert "97.30 % after the first epoch and 98.90 % after the last; training accuracy ends at 98.80 %" in texts[1]
    assert "9,883 of 10,000 test images are read rightly" in texts[2]  # of seed 1, which is newer than seed 0
    assert "The most confident of 117 mistakes" in texts[3]
    assert "The first is a 7 read as 8 with 99.9 %." in texts[3]
    assert "9,981 of 10,000" in texts[5]
    paths = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", report.md)
    files = [report.folder / unquote(path) for path in paths]
    assert sorted(files) == sorted((report.folder / "steps_files").iterdir())
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert all(f"![{text.replace('<', '&lt;').replace('>', '&gt;')}](" in report.md for text in texts)


# ---- one file, and safe


def test_the_page_loads_nothing_runs_nothing_and_shows_hostile_text_as_text(report: Report) -> None:
    page = report.page
    assert not page.find_all(["script", "link", "iframe", "object", "base", "video", "audio"])
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.find_all("img"))
    assert not {name for tag in page.find_all(True) for name in tag.attrs if name.startswith("on")}
    assert not re.search(r"url\(|@import", report.html[: report.html.index("</style>")])
    assert '<script>alert("2")</script> &c' in report.texts[0]
    assert "&lt;script&gt;alert(&#34;2&#34;)" in report.html
    assert "<script" not in report.html + report.md
    assert "&lt;script&gt;" in report.md


def test_links_lead_somewhere_and_tables_are_labelled(report: Report) -> None:
    ids = [tag["id"] for tag in report.page.find_all(id=True)]
    assert len(ids) == len(set(ids))
    assert {unquote(str(link["href"])) for link in report.page.find_all("a")} <= {f"#{one}" for one in ids}
    assert len(report.page.find_all("table")) == len(report.page.find_all("caption")) == 2
    assert all(th["scope"] in ("col", "colgroup", "row") for th in report.page.find_all("th"))


# ---- stores and scripts that won't do


def test_overridden_runs_and_those_of_other_code_are_told_apart(tmp_path: Path, uri: str, scripts: Path) -> None:
    store = open_store(uri)
    write_run(store, "step1_plain", 0, [97.0], start_time=T0, tags=TARGETS | {"overrides": "epochs=1"})
    report = write(tmp_path / "all", uri, scripts)
    assert report.rows(0)[1][0] == "step1_plain [epochs=1] seed 0"  # the runs; there is no comparison
    for text in report.texts:
        assert "No experiment has a finished run as declared yet" in text
        assert "No finished run as declared yet. This is step1_plain [epochs=1]" in text
        assert "98.90 +- 0.10 (2 seeds)." not in text  # the Result of the script as declared
    asked = write(tmp_path / "asked", uri, scripts, "step1")
    assert asked.rows(0)[2][0] == "step1_plain [epochs=1]"
    write_seeds(store, "step2_better", 98.0, 98.0, num_params=7_852, tags={"code_sha256": "old"})
    write_run(store, "step2_better", 0, [99.0], start_time=T0 + 9, num_params=10_970, tags={"code_sha256": "new"})
    report = write(tmp_path / "two", uri, scripts)
    assert [row[0] for row in report.rows(0)[2:]] == ["step2_better"]
    assert "No finished run as declared yet. This is step1_plain [epochs=1]" in report.texts[0]
    assert "2 runs are left out: they are of other code" in report.texts[0]
    assert "Left out: 2 runs of other code" in report.md
    assert "98.00" not in report.md


def test_a_report_of_some_steps_tells_of_these_alone(tmp_path: Path, store: Store, scripts: Path) -> None:
    report = write(tmp_path, store.uri, scripts, "step2", "an_idea")
    assert [h2["id"] for h2 in report.page.find_all("h2")] == ["comparison", "step2_better", "an_idea", "provenance"]
    assert "step1_plain" not in report.html + report.md
    assert all("open" in details.attrs for details in report.page.find_all("details")[:2])
    with pytest.raises(LabError, match="^steps: no run of 'nothing'"):
        write(tmp_path, store.uri, scripts, "nothing")


def test_what_cannot_be_reported_is_refused_and_nothing_written(tmp_path: Path, scripts: Path, uri: str) -> None:
    def refuse(sentence: str, steps: Sequence[str] = ()) -> None:
        with pytest.raises(LabError, match=sentence):
            write_report(tmp_path / "reports", steps, tracking_uri=uri, scripts=scripts)

    write_run(open_store(uri), "step1_plain", 0, [97.0], start_time=T0, status="FAILED")
    refuse("train first, e.g. `make step1`$")
    write_run(open_store(uri), "step1_plain", 0, [97.0], start_time=T0)
    refuse("train first, e.g. `make step1`$", steps=["an_idea"])
    assert not (tmp_path / "reports").exists()
    (tmp_path / "reports" / "steps.md").mkdir(parents=True)
    refuse("^.*/steps.md can't be written: Is a directory$")
    assert not list(tmp_path.rglob("*.new"))
