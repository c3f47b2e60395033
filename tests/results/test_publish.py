"""The committed figures: the tables say what the CSVs say, and what was tracked is exported or published."""

import csv
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from helpers import ROOT, largest_file
from mnist_lab.__main__ import main
from mnist_lab.errors import LabError
from mnist_lab.results import publish as files
from mnist_lab.running.identity import code_sha256, find_sources
from mnist_lab.tracking.store import Store, open_store
from pages import PAGE, T0
from run_writer import TARGETS, write_run

RESULTS = ROOT / "docs" / "results"
SCRIPTS = sorted((ROOT / "experiments").glob("*.py"))
STEPS = {"step1_baseline": (99.0, 99.1, 98.9), "step2_dropout": (99.2, 99.28, 99.12), "step10_new": (99.5,)}


# ---- what is committed


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_committed_runs_are_those_of_the_script_as_it_is(script: Path) -> None:
    file = RESULTS / f"{script.stem}.csv"
    says_so = "Result: not trained yet" in script.read_text()
    assert file.exists() != says_so
    if file.exists():
        digests = {row["code_sha256"] for row in rows_of(file)}
        assert digests == {code_sha256(find_sources(script))[:12]}


@pytest.mark.parametrize("page", [ROOT / "README.md", RESULTS / "README.md"], ids=["README", "docs/results"])
def test_the_committed_tables_are_made_of_the_committed_csvs(page: Path) -> None:
    text = page.read_text()
    assert files.with_tables(text, files.tables(files.read_records(RESULTS))) == text, "make publish"


def test_the_committed_picture_is_drawn_from_the_committed_csvs() -> None:
    made = files.picture(files.read_rows(RESULTS))
    (points,) = re.findall(r"<dc:description>(.*?)</dc:description>", made, flags=re.DOTALL)
    assert "step4_augment_steplr: 7,852 parameters, 99.41 %" in points
    assert f"<dc:description>{points}</dc:description>" in (RESULTS / "accuracy.svg").read_text(), "make publish"


def test_the_committed_epochs_end_at_the_committed_figures() -> None:
    epochs = rows_of(RESULTS / "epochs.csv")
    assert epochs
    for run in files.read_rows(RESULTS):
        mine = [row for row in epochs if (row["step"], row["seed"]) == (run["step"], run["seed"])]
        if mine:  # the first runs' epochs were not kept
            accuracies = [row["test_accuracy"] for row in mine]
            assert len(accuracies) == int(run["epochs"])
            assert accuracies[-1] == run["last"]
            assert max(accuracies, key=float) == run["best"] == accuracies[int(run["best_epoch"]) - 1]


def test_the_committed_files_say_of_every_run_how_it_was_made() -> None:
    committed = files.read_records(RESULTS)
    runs = {files.run_of(row): row for row in committed.runs}
    digests = {files.run_of(row): row["value"] for row in committed.settings if row["name"] == "code_sha256"}
    assert {run: digest[:12] for run, digest in digests.items()} == {r: row["code_sha256"] for r, row in runs.items()}
    assert {files.run_of(row) for row in (*committed.settings, *committed.epochs, *committed.mistakes)} == {*runs}
    wrong = Counter(map(files.run_of, committed.mistakes))  # of the runs up to 25 November they were not kept
    assert {run: 10_000 - round(100 * float(runs[run]["last"])) for run in wrong} == wrong


# ---- a publication


def publish(folder: Path, readme: Path, uri: str) -> list[Path]:
    return files.publish(folder, readme, tracking_uri=uri)


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def pages(tmp_path: Path) -> tuple[Path, Path]:
    """Return a folder of results and a README, both with markers."""
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    folder.mkdir()
    readme.write_text(PAGE)
    (folder / "README.md").write_text("<!-- runs -->\n<!-- /runs -->\n")
    return folder, readme


@pytest.fixture
def store(uri: str) -> Store:
    store = open_store(uri)
    tags = TARGETS | {"code_sha256": "0123456789abcdef", "torch": "2.15.0", "reported_best_test_accuracy": "99.46"}
    for step, accuracies in STEPS.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(store, step, seed, [98.0, accuracy + 0.01, accuracy], start_time=T0 + seed, tags=tags)
    return store


def test_a_publication_has_a_row_per_seed(store: Store, pages: tuple[Path, Path]) -> None:
    folder, readme = pages
    written = publish(folder, readme, store.uri)
    names = ["README.md", "accuracy.svg", *(f"{name}.csv" for name in (*files.OTHER_FILES, *STEPS))]
    assert sorted(written) == sorted([readme, *(folder / name for name in names)])
    rows = rows_of(folder / "step1_baseline.csv")
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    assert rows[1] == {
        "seed": "1",
        "last": "99.10",
        "best": "99.11",
        "best_epoch": "2",
        "train": "99.000",
        "test_loss": "0.03000",
        "num_params": "7852",
        "epochs": "3",
        "minutes": "1.0",
        "hardware": "a CPU",
        "torch": "2.15.0",
        "git_commit": "abc",
        "git_dirty": "False",
        "code_sha256": "0123456789ab",
        "date": "2023-11-14 22:13",
        "target_accuracy": "99.4",
        "target_params": "10000",
        "target_epochs": "15",
        "reported_best": "99.46",
    }
    epochs = rows_of(folder / "epochs.csv")
    assert len(epochs) == 7 * 3
    assert epochs[0] == {
        **{"step": "step1_baseline", "seed": "0", "epoch": "1", "test_accuracy": "98.00", "test_loss": "0.06667"},
        **{"train_accuracy": "97.900", "train_loss": "1.00000", "lr": "0.1", "epoch_seconds": "21.0"},
    }
    assert [row["step"] for row in epochs[::3]] == ["step1_baseline"] * 3 + ["step2_dropout"] * 3 + ["step10_new"]


def test_the_page_gets_its_tables_and_keeps_its_prose(store: Store, pages: tuple[Path, Path]) -> None:
    folder, readme = pages
    publish(folder, readme, store.uri)
    page = readme.read_text()
    assert re.sub(r"(<!-- (\w+) -->).*?(<!-- /\2 -->)", r"\1\3", page, flags=re.DOTALL) == re.sub(
        r"(<!-- (\w+) -->).*?(<!-- /\2 -->)", r"\1\3", PAGE, flags=re.DOTALL
    )
    assert "old" not in page
    one = "| `step1_baseline` | 3 | **99.00** ± 0.100 | too few seeds | – | 98.59 | 99.4 | 99.01 | 98.90 | 7,852 | 3 |"
    assert f"{one} accuracy not shown (needs about 4 seeds), params met, epochs met | 99.46 |" in page
    new = "| `step10_new` | 1 | **99.50** | too few seeds | – | – | 99.4 | 99.51 | 99.40 | 7,852 | 3 |"
    assert f"{new} accuracy met, params met" in page
    assert "| `step1_baseline` → `step2_dropout` | +0.20 | too few seeds |" in page
    assert "| better by 0.20 points |" in page
    assert "| `python experiments/step1_baseline.py --seed N` | 0-2 | abc |" in (folder / "README.md").read_text()
    (effect,) = rows_of(folder / "effects.csv")
    assert (effect["points"], effect["test"], effect["seeds"]) == ("0.200", "paired t-test", "3")
    publish(folder, readme, store.uri)
    assert readme.read_text() == page


def test_a_step_without_runs_in_the_store_keeps_its_csv(store: Store, pages: tuple[Path, Path]) -> None:
    folder, readme = pages
    publish(folder, readme, store.uri)
    kept = (folder / "step2_dropout.csv").read_text().replace("99.20", "99.21")
    (folder / "earlier.csv").write_text(kept)
    lines = (folder / "epochs.csv").read_text()
    (folder / "epochs.csv").write_text(lines + "earlier,0,1,97.00,,,,,\n")
    publish(folder, readme, store.uri)
    assert (folder / "earlier.csv").read_text() == kept
    assert "| `earlier` | 3 |" in readme.read_text()
    assert (folder / "epochs.csv").read_text() == lines + "earlier,0,1,97.00,,,,,\n"


def test_seeds_that_the_same_code_computed_elsewhere_are_kept(store: Store, pages: tuple[Path, Path]) -> None:
    folder, readme = pages
    publish(folder, readme, store.uri)
    file, epochs = folder / "step1_baseline.csv", folder / "epochs.csv"
    header, first, *rest = file.read_text().splitlines()
    code = rows_of(file)[0]["code_sha256"]
    elsewhere, other_code = first.replace("0,", "7,", 1), first.replace("0,", "8,", 1).replace(code, "other")
    assert first.startswith("0,")
    assert code
    assert code in first
    file.write_text("\n".join([header, first, elsewhere, other_code, *rest, ""]))
    epochs.write_text(epochs.read_text() + "step1_baseline,7,1,97.00,,,,,\nstep1_baseline,8,1,97.00,,,,,\n")

    files.publish(folder, readme, replace=True, tracking_uri=store.uri)

    assert file.read_text().splitlines() == [header, first, *rest, elsewhere]
    assert {row["seed"] for row in rows_of(epochs) if row["step"] == "step1_baseline"} == {"0", "1", "2", "7"}
    assert "| `step1_baseline` | 4 |" in readme.read_text()


def test_figures_that_were_not_recorded_are_empty(uri: str, pages: tuple[Path, Path]) -> None:
    folder, readme = pages
    write_run(open_store(uri), "idea", 0, [99.0], start_time=T0, tags={})
    publish(folder, readme, uri)
    (row,) = rows_of(folder / "idea.csv")
    unknown = ("torch", "code_sha256", "target_accuracy", "target_params", "target_epochs", "reported_best")
    assert [row[name] for name in unknown] == [""] * 6
    assert "| no target stated | – |" in readme.read_text()
    assert "No change has runs of several seeds on both sides yet." in readme.read_text()


def test_a_page_without_markers_is_refused(store: Store, pages: tuple[Path, Path]) -> None:
    folder, readme = pages
    readme.write_text("# Page\n")
    with pytest.raises(LabError, match="has no markers for a table: <!-- summary -->, <!-- results -->"):
        publish(folder, readme, store.uri)
    assert readme.read_text() == "# Page\n"


def test_a_full_disk_leaves_every_file_as_it_was(store: Store, pages: tuple[Path, Path]) -> None:
    folder, readme = pages
    publish(folder, readme, store.uri)
    write_run(store, "step1_baseline", 3, [99.0] * 200, start_time=T0 + 9, tags=TARGETS)  # 200 epochs: 6 kB
    there = [readme, *sorted(folder.iterdir())]
    before = [file.read_bytes() for file in there]
    with largest_file(4000), pytest.raises(LabError, match=r"File too large: .*epochs\.csv"):
        files.publish(folder, readme, replace=True, tracking_uri=store.uri)
    assert [readme, *sorted(folder.iterdir())] == there
    assert [file.read_bytes() for file in there] == before


def test_publish_says_what_it_would_do_and_waits_for_replace(
    store: Store, pages: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, readme = pages
    publish(folder, readme, store.uri)
    file = folder / "step10_new.csv"
    kept = file.read_text().replace("0,99.50", "0,99.61")
    file.write_text(kept + kept.splitlines()[1].replace("0,", "1,", 1).replace("0123", "4567"))
    capsys.readouterr()
    command = ["mnist_lab", "publish", "--folder", str(folder), "--readme", str(readme), "--tracking-uri", store.uri]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr()
    replaced, removed = said.out.splitlines()
    assert replaced == "step10_new seed 0: replaced, last 99.61 -> 99.50"
    assert removed.startswith("step10_new seed 1: removed, 99.61")
    assert "nothing was written: published rows that would be replaced or removed: 2; " in said.err
    assert len(said.err.splitlines()) == 1
    assert "99.61" in file.read_text()
    monkeypatch.setattr(sys, "argv", [*command, "--replace"])
    main()
    assert "99.50" in file.read_text()


# ---- an export


def test_an_export_is_of_the_store_alone(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "new" / "results"
    names = ["README.md", *(f"{name}.csv" for name in (*files.OTHER_FILES, *STEPS))]
    assert files.export_runs(folder, tracking_uri=store.uri) == sorted(folder / name for name in names)
    page = (folder / "README.md").read_text()
    assert "| `step1_baseline` | 3 | **99.00** ± 0.100 | too few seeds |" in page
    assert "`step1_baseline` → `step2_dropout`" in page
    assert "--seed N` | 0-2 | abc |" in page
    (folder / "README.md").write_text(page + "My notes.\n")
    (folder / "earlier.csv").write_text((folder / "step10_new.csv").read_text())
    files.export_runs(folder, tracking_uri=store.uri)
    assert (folder / "README.md").read_text() == page + "My notes.\n"
    not_known, left = caplog.messages[-2:]
    assert not_known.startswith("not known: which test images 7 runs got wrong, the first is ")
    assert left == "left as it is: earlier.csv, as the store has no runs of that step"


def test_an_export_leaves_the_published_figures_alone(store: Store) -> None:
    with pytest.raises(LabError, match="holds the published figures; `make publish` adds to them"):
        files.export_runs(RESULTS, tracking_uri=store.uri)
