"""The committed figures: the tables say what the CSVs say, and what was tracked is exported or published."""

import csv
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import ROOT, largest_file
from mnist_lab.errors import LabError
from mnist_lab.results import publish as files
from mnist_lab.results.records import IMAGES, OTHER_FILES, read_records
from mnist_lab.running.identity import code_sha256, find_sources
from mnist_lab.tracking.store import Store, open_store
from pages import PAGE
from run_writer import T0, TARGETS, write_run

RESULTS = ROOT / "docs" / "results"
COMMITTED = read_records(RESULTS)
SCRIPTS = sorted((ROOT / "experiments").glob("*.py"))
STEPS = {"step1_baseline": (99.0, 99.1, 98.9), "step2_dropout": (99.2, 99.28, 99.12), "step10_new": (99.5,)}


# ---- what is committed


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_committed_runs_are_those_of_the_script_as_it_is(script: Path) -> None:
    file = RESULTS / f"{script.stem}.csv"
    says_so = "Result: not trained yet" in script.read_text()
    assert file.exists() != says_so
    if file.exists():
        assert {row["code_sha256"] for row in rows_of(file)} == {code_sha256(find_sources(script))[:12]}


@pytest.mark.parametrize("page", [ROOT / "README.md", RESULTS / "README.md"], ids=["README", "docs/results"])
def test_the_committed_tables_are_made_of_the_committed_csvs(page: Path) -> None:
    text = page.read_text()
    assert files.with_tables(text, files.tables(COMMITTED)) == text, "make publish"


def test_the_committed_picture_is_drawn_from_the_committed_csvs() -> None:
    made = files.picture(COMMITTED.runs)
    (points,) = re.findall(r"<dc:description>(.*?)</dc:description>", made, flags=re.DOTALL)
    assert "step4_augment_steplr: 7,852 parameters, 99.41 %" in points
    assert f"<dc:description>{points}</dc:description>" in (RESULTS / "accuracy.svg").read_text(), "make publish"


def test_the_committed_files_say_the_same_of_every_run() -> None:
    """Of the first runs neither epochs nor mistakes were kept."""
    runs, settings, epochs, mistakes = (
        part.set_index(["step", "seed"])
        for part in (COMMITTED.runs, COMMITTED.settings, COMMITTED.epochs, COMMITTED.mistakes)
    )
    assert {*settings.index, *epochs.index, *mistakes.index} == {*runs.index}
    digests = settings["value"][settings["name"] == "code_sha256"].str[:12]
    assert digests.to_dict() == runs["code_sha256"].to_dict()
    for run, of in epochs["test_accuracy"].groupby(level=[0, 1]):
        last, best, best_epoch, count = runs.loc[run, ["last", "best", "best_epoch", "epochs"]]
        assert len(of) == int(count)
        assert of.iloc[-1] == last
        assert max(of, key=float) == best == of.iloc[int(best_epoch) - 1]
    for run, wrong in mistakes.index.value_counts().items():
        assert wrong == IMAGES - round(100 * float(runs.loc[run, "last"]))


# ---- a publication


Pages = tuple[Path, Path]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def make_pages(place: Path) -> Pages:
    """Return a folder of results and a README, both with markers."""
    folder, readme = place / "results", place / "README.md"
    folder.mkdir()
    readme.write_text(PAGE)
    (folder / "README.md").write_text("<!-- runs -->\n<!-- /runs -->\n")
    return folder, readme


@pytest.fixture(scope="module")
def store(new_store: Callable[[], Store]) -> str:
    """Return a store of three steps, which the tests only read."""
    store = new_store()
    tags = TARGETS | {"code_sha256": "0123456789abcdef", "torch": "2.15.0", "reported_best_test_accuracy": "99.46"}
    for step, accuracies in STEPS.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(store, step, seed, [98.0, accuracy + 0.01, accuracy], start_time=T0 + seed, tags=tags)
    return store.uri


@pytest.fixture(scope="module")
def publication(store: str, tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Return what a publication of the store has written, for tests that only read it."""
    folder, readme = make_pages(tmp_path_factory.mktemp("publication"))
    written = files.publish(folder, readme, tracking_uri=store)
    assert sorted(written) == sorted([readme, *folder.iterdir()])
    return folder, readme


@pytest.fixture
def published(publication: Pages, tmp_path: Path) -> Pages:
    """Return a copy of it."""
    folder, readme = publication
    return shutil.copytree(folder, tmp_path / "results"), Path(shutil.copy(readme, tmp_path))


def test_a_publication_has_a_row_per_seed(publication: Pages) -> None:
    folder, _ = publication
    names = {"README.md", "accuracy.svg", *(f"{name}.csv" for name in (*OTHER_FILES, *STEPS))}
    assert {file.name for file in folder.iterdir()} == names
    rows = rows_of(folder / "step1_baseline.csv")
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    assert rows[1] == {
        **{"seed": "1", "last": "99.10", "best": "99.11", "best_epoch": "2", "train": "99.000", "test_loss": "0.03000"},
        **{"num_params": "7852", "epochs": "3", "minutes": "1.0", "hardware": "a CPU", "torch": "2.15.0"},
        **{"git_commit": "abc", "git_dirty": "False", "code_sha256": "0123456789ab", "date": "2023-11-14 22:13"},
        **{"target_accuracy": "99.4", "target_params": "10000", "target_epochs": "15", "reported_best": "99.46"},
    }
    epochs = rows_of(folder / "epochs.csv")
    assert len(epochs) == 7 * 3
    assert epochs[0] == {
        **{"step": "step1_baseline", "seed": "0", "epoch": "1", "test_accuracy": "98.00", "test_loss": "0.06667"},
        **{"train_accuracy": "97.900", "train_loss": "1.00000", "lr": "0.1", "epoch_seconds": "21.0"},
    }
    assert [row["step"] for row in epochs[::3]] == ["step1_baseline"] * 3 + ["step2_dropout"] * 3 + ["step10_new"]
    (effect,) = rows_of(folder / "effects.csv")
    assert (effect["points"], effect["test"], effect["seeds"]) == ("0.200", "paired t-test", "3")


def test_the_page_gets_its_tables_and_keeps_its_prose(publication: Pages) -> None:
    folder, readme = publication
    page = readme.read_text()
    tables = re.compile(r"(<!-- (\w+) -->).*?(<!-- /\2 -->)", re.DOTALL)
    assert tables.sub(r"\1\3", page) == tables.sub(r"\1\3", PAGE)
    assert "old" not in page
    one = "| `step1_baseline` | 3 | **99.00** ± 0.100 | too few seeds | – | 98.59 | 99.4 | 99.01 | 98.90 | 7,852 | 3 |"
    assert f"{one} accuracy not shown (needs about 4 seeds), params met, epochs met | 99.46 |" in page
    new = "| `step10_new` | 1 | **99.50** | too few seeds | – | – | 99.4 | 99.51 | 99.40 | 7,852 | 3 |"
    assert f"{new} accuracy met, params met" in page
    assert "| `step1_baseline` → `step2_dropout` | +0.20 | too few seeds |" in page
    assert "| better by 0.20 points |" in page
    assert "| `python experiments/step1_baseline.py --seed N` | 0-2 | abc |" in (folder / "README.md").read_text()


def test_rows_of_other_steps_and_of_the_same_code_elsewhere_are_kept(store: str, published: Pages) -> None:
    folder, readme = published
    file, epochs, earlier = (folder / f"{name}.csv" for name in ("step1_baseline", "epochs", "earlier"))
    earlier.write_text((folder / "step2_dropout.csv").read_text().replace("99.20", "99.21"))
    kept = earlier.read_text()
    header, first, *rest = file.read_text().splitlines()
    elsewhere = first.replace("0,", "7,", 1)
    other_code = first.replace("0,", "8,", 1).replace("0123456789ab", "other")
    file.write_text("\n".join([header, first, elsewhere, other_code, *rest, ""]))
    lines = epochs.read_text()
    of_seeds = ["step1_baseline,7,1,97.00,,,,,\n", "step1_baseline,8,1,97.00,,,,,\n"]
    epochs.write_text("".join([lines, *of_seeds, "earlier,0,1,97.00,,,,,\n"]))

    files.publish(folder, readme, replace=True, tracking_uri=store)

    assert file.read_text().splitlines() == [header, first, *rest, elsewhere]
    assert earlier.read_text() == kept
    of_step = [row["seed"] for row in rows_of(epochs) if row["step"] == file.stem]
    assert of_step == [*"000111222", "7"]
    assert {*lines.splitlines(), "earlier,0,1,97.00,,,,,"} < {*epochs.read_text().splitlines()}
    page = readme.read_text()
    assert "| `step1_baseline` | 4 |" in page
    assert "| `earlier` | 3 |" in page
    files.publish(folder, readme, tracking_uri=store)
    assert readme.read_text() == page


def test_figures_that_were_not_recorded_are_empty(uri: str, tmp_path: Path) -> None:
    folder, readme = make_pages(tmp_path)
    write_run(open_store(uri), "idea", 0, [99.0], start_time=T0, tags={})
    files.publish(folder, readme, tracking_uri=uri)
    (row,) = rows_of(folder / "idea.csv")
    unknown = ("torch", "code_sha256", "target_accuracy", "target_params", "target_epochs", "reported_best")
    assert [row[name] for name in unknown] == [""] * 6
    assert "| no target stated | – |" in readme.read_text()
    assert "No change has runs of several seeds on both sides yet." in readme.read_text()


def test_a_page_without_markers_or_a_full_disk_leaves_every_file_as_it_was(store: str, published: Pages) -> None:
    folder, readme = published
    csv_file = folder / "step2_dropout.csv"
    csv_file.write_text(csv_file.read_text().replace("99.20", "99.21"))  # which is to be replaced, before epochs.csv
    there = [readme, *sorted(folder.iterdir())]
    before = [file.read_bytes() for file in there]
    with largest_file(1000), pytest.raises(LabError, match=r"File too large: .*epochs\.csv"):
        files.publish(folder, readme, replace=True, tracking_uri=store)
    assert [readme, *sorted(folder.iterdir())] == there
    assert [file.read_bytes() for file in there] == before
    readme.write_text("# Page\n")
    with pytest.raises(LabError, match="has no markers for a table: <!-- summary -->, <!-- results -->"):
        files.publish(folder, readme, replace=True, tracking_uri=store)
    assert [file.read_bytes() for file in there] == [b"# Page\n", *before[1:]]


def test_publish_says_what_it_would_do_and_waits_for_replace(
    store: str, published: Pages, lab: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, readme = published
    file = folder / "step10_new.csv"
    kept = file.read_text().replace("0,99.50", "0,99.61")
    file.write_text(kept + kept.splitlines()[1].replace("0,", "1,", 1).replace("0123", "4567"))
    command = ("publish", "--folder", folder, "--readme", readme, "--tracking-uri", store)
    with pytest.raises(SystemExit, match="1"):
        lab(*command)
    said = capsys.readouterr()
    replaced, removed = said.out.splitlines()
    assert replaced == "step10_new seed 0: replaced, last 99.61 -> 99.50"
    assert removed.startswith("step10_new seed 1: removed, 99.61")
    assert "nothing was written: published rows that would be replaced or removed: 2; " in said.err
    assert len(said.err.splitlines()) == 1
    assert "99.61" in file.read_text()
    lab(*command, "--replace")
    assert "99.50" in file.read_text()


def test_an_export_is_of_the_store_alone(store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "new" / "results"
    names = ["README.md", *(f"{name}.csv" for name in (*OTHER_FILES, *STEPS))]
    assert files.export_runs(folder, tracking_uri=store) == sorted(folder / name for name in names)
    page = (folder / "README.md").read_text()
    assert "| `step1_baseline` | 3 | **99.00** ± 0.100 | too few seeds |" in page
    assert "`step1_baseline` → `step2_dropout`" in page
    assert "--seed N` | 0-2 | abc |" in page
    (folder / "README.md").write_text(page + "My notes.\n")
    (folder / "earlier.csv").write_text((folder / "step10_new.csv").read_text())
    files.export_runs(folder, tracking_uri=store)
    assert (folder / "README.md").read_text() == page + "My notes.\n"
    not_known, left = caplog.messages[-2:]
    assert not_known.startswith("not known: which test images 7 runs got wrong, the first is ")
    assert left == "left as it is: earlier.csv, as the store has no runs of that step"
    with pytest.raises(LabError, match="holds the published figures; `make publish` adds to them"):
        files.export_runs(RESULTS, tracking_uri=store)
