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
from mnist_lab.tracking.store import open_store
from run_writer import PAGE, T0, Published, new_place, write_run

RESULTS = ROOT / "docs" / "results"
COMMITTED = read_records(RESULTS)
STEPS = ("step1_baseline", "step2_dropout", "idea")


# ---- what is committed


@pytest.mark.parametrize("page", [ROOT / "README.md", RESULTS / "README.md"], ids=["README", "docs/results"])
def test_the_committed_tables_are_made_of_the_committed_csvs(page: Path) -> None:
    text = page.read_text()
    assert files.with_tables(text, files.tables(COMMITTED)) == text, "make publish"


def test_the_committed_picture_is_drawn_from_the_committed_csvs() -> None:
    made = files.picture(COMMITTED.runs)
    (points,) = re.findall(r"<dc:description>(.*?)</dc:description>", made, flags=re.DOTALL)
    assert "step4_augment_steplr: 7,852 parameters, 99.43 %" in points
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


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def copied(published: Published, tmp_path: Path) -> Published:
    place = Path(shutil.copytree(published.folder.parent, tmp_path / "copy"))
    return Published(published.uri, place / "results", place / "README.md")


def test_a_publication_has_a_row_per_seed(published: Published) -> None:
    folder = published.folder
    names = {"README.md", "accuracy.svg", *(f"{name}.csv" for name in (*OTHER_FILES, *STEPS))}
    assert {file.name for file in folder.iterdir()} == names
    rows = rows_of(folder / "step1_baseline.csv")
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    assert rows[1] == {
        **{"seed": "1", "last": "99.31", "best": "99.31", "best_epoch": "2", "train": "99.210", "test_loss": "0.02300"},
        **{"num_params": "7852", "epochs": "2", "minutes": "1.0", "hardware": "a CPU, 2 cores, AVX2"},
        **{"torch": "2.15.0", "git_commit": "abc", "git_dirty": "False", "code_sha256": "0123456789ab"},
        **{"date": "2026-09-21 14:14", "target_accuracy": "99.4", "target_params": "10000", "target_epochs": "15"},
        "reported_best": "99.46",
    }
    epochs = rows_of(folder / "epochs.csv")
    assert epochs[0] == {
        **{"step": "step1_baseline", "seed": "0", "epoch": "1", "test_accuracy": "98.00", "test_loss": "0.06667"},
        **{"train_accuracy": "97.900", "train_loss": "1.00000", "lr": "0.1", "epoch_seconds": "21.0"},
    }
    assert [row["step"] for row in epochs[::2]] == ["step1_baseline"] * 3 + ["step2_dropout"] * 3 + ["idea"]
    (effect,) = rows_of(folder / "effects.csv")
    assert (effect["points"], effect["test"], effect["seeds"]) == ("0.030", "paired t-test", "3")


def test_the_page_gets_its_tables_and_keeps_its_prose(published: Published) -> None:
    page = published.readme.read_text()
    tables = re.compile(r"(<!-- (\w+) -->).*?(<!-- /\2 -->)", re.DOTALL)
    assert tables.sub(r"\1\3", page) == tables.sub(r"\1\3", PAGE)
    assert "old" not in page
    one = "| `step1_baseline` | 3 | **99.31** ± 0.010 | too few runs | – | 99.26 | 99.4 | 99.31 | 99.21 | 7,852 | 2 |"
    assert f"{one} accuracy missed, params met, epochs met | 99.46 |" in page
    new = "| `idea` | 1 | **99.36** | too few runs | – | – | 99.4 | 99.36 | 99.26 | 7,852 | 2 |"
    assert f"{new} accuracy missed, params met" in page
    assert "| `step1_baseline` → `step2_dropout` | +0.03 | too few runs |" in page
    assert "| no difference shown |" in page
    made = (published.folder / "README.md").read_text()
    assert "| `python experiments/step1_baseline.py --seed N` | 0-2 | abc |" in made


def test_rows_of_other_steps_and_of_the_same_code_elsewhere_are_kept(copied: Published) -> None:
    folder = copied.folder
    file, epochs, earlier = (folder / f"{name}.csv" for name in ("step1_baseline", "epochs", "earlier"))
    earlier.write_text((folder / "step2_dropout.csv").read_text().replace("99.33", "99.30"))
    kept = earlier.read_text()
    header, first, *rest = file.read_text().splitlines()
    elsewhere = first.replace("0,", "7,", 1)
    other_code = first.replace("0,", "8,", 1).replace("0123456789ab", "other")
    file.write_text("\n".join([header, first, elsewhere, other_code, *rest, ""]))
    lines = epochs.read_text()
    of_seeds = ["step1_baseline,7,1,97.00,,,,,\n", "step1_baseline,8,1,97.00,,,,,\n"]
    epochs.write_text("".join([lines, *of_seeds, "earlier,0,1,97.00,,,,,\n"]))

    copied.publish(replace=True)

    assert file.read_text().splitlines() == [header, first, *rest, elsewhere]
    assert earlier.read_text() == kept
    of_step = [row["seed"] for row in rows_of(epochs) if row["step"] == file.stem]
    assert of_step == [*"001122", "7"]
    assert {*lines.splitlines(), "earlier,0,1,97.00,,,,,"} < {*epochs.read_text().splitlines()}
    page = copied.readme.read_text()
    assert "| `step1_baseline` | 4 |" in page
    assert "| `earlier` | 3 |" in page
    assert copied.publish() == ["The published rows are those of the store already."]
    assert copied.readme.read_text() == page


def test_figures_that_were_not_recorded_are_empty(uri: str, tmp_path: Path) -> None:
    write_run(open_store(uri), "idea", 0, [99.0], start_time=T0, tags={})
    place = new_place(uri, tmp_path / "place")
    place.publish()
    (row,) = rows_of(place.folder / "idea.csv")
    unknown = ("torch", "code_sha256", "target_accuracy", "target_params", "target_epochs", "reported_best")
    assert [row[name] for name in unknown] == [""] * 6
    assert "| no target stated | – |" in place.readme.read_text()
    assert "No change has runs of several seeds on both sides yet." in place.readme.read_text()


def test_a_page_without_markers_or_a_full_disk_leaves_every_file_as_it_was(copied: Published) -> None:
    csv_file = copied.folder / "step2_dropout.csv"
    csv_file.write_text(csv_file.read_text().replace("99.33", "99.30"))  # which is to be replaced, before settings.csv
    there = [copied.readme, *sorted(copied.folder.iterdir())]
    before = [file.read_bytes() for file in there]
    with largest_file(1000), pytest.raises(LabError, match=r"settings\.csv .*: File too large"):
        copied.publish(replace=True)
    assert [copied.readme, *sorted(copied.folder.iterdir())] == there
    assert [file.read_bytes() for file in there] == before
    copied.readme.write_text("# Page\n")
    with pytest.raises(LabError, match="has no markers for a table: <!-- summary -->, <!-- results -->"):
        copied.publish(replace=True)
    assert [file.read_bytes() for file in there] == [b"# Page\n", *before[1:]]


def test_a_store_of_overridden_runs_alone_is_not_exported(uri: str, tmp_path: Path) -> None:
    write_run(open_store(uri), "idea", 0, [99.0], start_time=T0, tags={"overrides": "lr=0.2"})
    with pytest.raises(LabError, match="^no finished run as declared in "):
        files.export_runs(tmp_path / "export", tracking_uri=uri)
    assert not (tmp_path / "export").exists()


def test_publish_needs_replace(copied: Published, lab: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    file = copied.folder / "idea.csv"
    kept = file.read_text().replace("5,99.36", "5,99.61")
    file.write_text(kept + kept.splitlines()[1].replace("5,", "1,", 1).replace("0123", "4567"))
    command = ("publish", "--folder", copied.folder, "--readme", copied.readme, "--tracking-uri", copied.uri)
    with pytest.raises(SystemExit, match="1"):
        lab(*command)
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "idea seed 1: removed, 99.61; the store's runs of the step are of other code",
        "idea seed 5: replaced, last 99.61 -> 99.36",
    ]
    assert "nothing was written: published rows that would be replaced or removed: 2; " in said.err
    assert len(said.err.splitlines()) == 1
    assert "99.61" in file.read_text()
    lab(*command, "--replace")
    assert "99.36" in file.read_text()


def test_an_export_is_of_one_store(published: Published, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "new" / "results"
    names = ["README.md", *(f"{name}.csv" for name in (*OTHER_FILES, *STEPS))]
    assert files.export_runs(folder, tracking_uri=published.uri) == sorted(folder / name for name in names)
    page = (folder / "README.md").read_text()
    assert "| `step1_baseline` | 3 | **99.31**" in page
    (folder / "README.md").write_text(page + "My notes.\n")
    (folder / "earlier.csv").write_text((folder / "idea.csv").read_text())
    files.export_runs(folder, tracking_uri=published.uri)
    assert (folder / "README.md").read_text() == page + "My notes.\n"
    assert caplog.messages[-1] == "left as it is: earlier.csv, as the store has no runs of that step"
    with pytest.raises(LabError, match="holds the published figures; `make publish` adds to them"):
        files.export_runs(RESULTS, tracking_uri=published.uri)
