"""The jobs that belong to no experiment: `python -m mnist_lab data | resume | compare | publish | ...`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_lab import commandline, paths
from mnist_lab.commandline import DATA_DIR, TRACKING_URI, Flag, flag, number_from
from mnist_lab.errors import LabError, counted, without_password
from mnist_lab.measures import percent
from mnist_lab.paths import PROJECT_ROOT, PUBLISHED, script_named, sqlite_file

if TYPE_CHECKING:  # imported by the jobs that need it: it takes seconds
    import pandas as pd

    from mnist_lab.running.checkpoint import Checkpoint

logger = logging.getLogger("mnist_lab.jobs")

READING = "Reading the tracked runs"
NETWORKS = "runs:/<id>, models:/<name>@<alias>, a script's name, docs/results (default: models:/mnist@champion if any)"

# What the columns of `compare` mean.
TESTED = [
    "Test accuracies in %. last: of the last epoch, mean +- sd over seeds; the verdict judges it.",
    "verdict: for one run, whether its figure reaches the target; for several seeds, what the mean shows at p < 0.01.",
    "best: of the best epoch, picked on the test images. train: training accuracy of the last epoch.",
    "seeds needed: about how many would show a difference of the observed size, with 80 % power.",
    "On 10,000 images the accuracy of one run is known to about +- 0.15 points (95 %) at 99.4.",
]
CROSS_VALIDATED = [
    "Accuracies in % on training images: each fold is judged by a network that was trained on the others.",
    "last: of the last epoch, mean +- sd over the folds. best: of the best epoch, picked on the same images.",
    "train: training accuracy of the last epoch. The test images were not read, and no target for them is judged.",
]

PARSER = argparse.ArgumentParser(prog="python -m mnist_lab", description="Jobs that belong to no experiment.")
JOBS = PARSER.add_subparsers(required=True, metavar="JOB")
Run = Callable[..., None]


def job(begins: str, *flags: Flag) -> Callable[[Run], Run]:
    """List a function as a job: its docstring is its help; `begins` says what it does first."""

    def listed(run: Run) -> Run:
        text = str(run.__doc__).rstrip(".")
        parser = JOBS.add_parser(run.__name__, help=text, description=text)
        parser.set_defaults(run=run, begins=begins, parser=parser)
        for option, settings in flags:
            parser.add_argument(option, **settings)
        return run

    return listed


def folder_flag(default: str, what: str) -> Flag:
    return flag("--folder", f"{what} (default: {default}/)", type=Path, default=PROJECT_ROOT / default)


def port_flag(default: int, what: str) -> Flag:
    return flag("--port", f"{what} (default {default})", type=number_from(), default=default)


def written(files: Iterable[Path]) -> None:
    for file in files:
        print(f"Written: {file}")


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `compare | head` ends quietly
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a step's name may have letters that a locale has not
    arguments, unknown = PARSER.parse_known_args()
    given = vars(arguments)
    run, begins, parser = given.pop("run"), given.pop("begins"), given.pop("parser")
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")  # below this job's own flags
    commandline.interrupt_on_signals()
    with commandline.sentences():
        commandline.say_what_is_done()
        logger.info(begins)
        run(**given)


@job("Looking for MNIST", DATA_DIR)
def data(data_dir: Path | None) -> None:
    """Fetch and verify MNIST."""
    from mnist_lab.data import find_data_dir, load_mnist

    load_mnist(data_dir)
    print(f"MNIST is complete and verified in {find_data_dir(data_dir)}: 60,000 + 10,000 images")


@job(
    READING,
    TRACKING_URI,
    flag("steps", "only these, e.g. step3 step4 my_idea", nargs="*", metavar="STEP"),
    flag("--include-overrides", "also overridden runs of experiments that have runs as declared", action="store_true"),
    flag("--holdout", "runs that hold out N training images (default 0)", type=number_from(), default=0, metavar="N"),
    flag("--folds", "cross-validated runs with K folds", type=number_from(2), default=0, metavar="K"),
)
def compare(steps: list[str], include_overrides: bool, holdout: int, folds: int, tracking_uri: str | None) -> None:
    """Print one row per experiment, and what each single change is worth."""
    from mnist_lab import results
    from mnist_lab.results.compare import UNSAID, declared_pairs, newest_runs, summarise
    from mnist_lab.results.runs import full_names
    from mnist_lab.verdicts.comparison import Pair, effects_text

    loaded = results.load_runs(tracking_uri)
    protocol: dict[str, Any] = {"holdout": holdout, "folds": folds, "loaded": loaded}
    overrides: Any = include_overrides or "if_none"
    runs = newest_runs(results.run_table(steps or None, columns="all", include_overrides=overrides, **protocol))
    if runs.empty:
        raise LabError(f"no finished runs in {loaded.name}; train first, e.g. `make step1`")
    table = summarise(runs, folds)
    every = results.compare_table([*table["step"]], include_overrides=True, **protocol)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    folded = partial(textwrap.fill, width=width) if width else str
    print(results.compare_text(table, holdout=holdout, folds=folds, width=width), end="\n\n")
    print("\n".join(map(folded, _notes(table, runs, holdout, folds, len(every) - len(table)))))

    named = [*dict.fromkeys(full_names(steps, loaded))]
    pairs = [pair for pair in declared_pairs() if not named or {pair.a, pair.b} <= {*named}]
    for step in [*named[1:], named[0]] if len(named) > 1 else []:  # what no docstring compares with another of these
        if not any(step in (pair.a, pair.b) for pair in pairs):
            pairs.append(Pair(named[1] if step == named[0] else named[0], step, UNSAID))
    comparisons, refused = results.compare_pairs(pairs, **protocol)
    if comparisons:
        print("\n" + folded("What each change is worth: accuracy of the last epoch, in points, with 95 % interval"))
        print("\n" + effects_text(comparisons, width, "folds" if folds else "seeds"))
        rows = f"this table's rows{' alone, not for all that `make compare` has' * bool(named)}"
        print("\n" + folded(f"A difference is shown where p (Holm), adjusted for {rows}, is below 0.05."))
    overridden = {*table["step"]} - {*table.loc[table["overrides"] == "", "step"]}
    refused += [f"not compared: {step}, as its runs are overridden" for step in sorted(overridden)]
    for sentence in refused:
        print("\n" + folded(sentence))


def _notes(table: pd.DataFrame, runs: pd.DataFrame, holdout: int, folds: int, overridden: int) -> Iterator[str]:
    """Yield what the columns mean, and what is to be known of these runs; `overridden`: how many rows are left out."""
    from mnist_lab.results.compare import codes, failures, named

    for line in CROSS_VALIDATED if folds else TESTED:
        held_out = f"on the {holdout:,} training images held out"
        if not (line.startswith("seeds needed") and table["seeds_needed"].isna().all()):  # then it is no column
            yield line.replace("on the test images", held_out) if holdout else line
    for row in table.to_dict("records"):
        if row["left_out"]:
            left_out = counted(row["left_out"], "run")
            yield f"{named(row)}: left out: {left_out} of other code (code_sha256) or other hyperparameters."
        if row["seeds"] < folds:
            yield f"{named(row)}: only {row['seeds']} of {folds} folds are there."
    yield from failures(table)
    if overridden:
        variants = counted(overridden, "overridden variant")
        yield f"Left out: {variants} of these experiments; --include-overrides shows them."
    as_they_stand = codes({*runs["step"]})
    for (step, _), of_step in runs.groupby(["step", "overrides"]):
        name, restored = named(of_step.iloc[0]), of_step["restored"].notna().sum()
        if 0 < restored < len(of_step):
            yield f"{name}: {restored} of its {len(of_step)} seeds were restored, the rest trained in this store."
        if {*of_step["code_sha256"].dropna()} - {as_they_stand.get(str(step), of_step["code_sha256"].iloc[0])}:
            yield f"{name}: its script has changed since these runs; train it anew for figures of the script as it is."


@job(READING, TRACKING_URI, folder_flag("reports/results", "where to write"))
def export(folder: Path, tracking_uri: str | None) -> None:
    """Write the tracked runs' figures to reports/results."""
    from mnist_lab.results.publish import export_runs

    written(export_runs(folder, tracking_uri=tracking_uri))


@job("Reading the committed runs", TRACKING_URI, folder_flag("docs/results", "where the CSVs are"))
def restore(folder: Path, tracking_uri: str | None) -> None:
    """Put the committed runs of docs/results into the store."""
    from mnist_lab.results.restore import restore as restore_runs
    from mnist_lab.running.identity import commit_tags

    state = commit_tags(folder / "README.md")
    commit = state["git_commit"] + (" + changes" if state["git_dirty"] == "true" else "")
    done = restore_runs(folder, commit=commit, tracking_uri=tracking_uri, progress=partial(print, flush=True))
    studies = counted(done.studies, "study", "studies")
    print(f"Restored: {counted(done.runs, 'run')}, {studies} over them; there already: {done.there}.")
    if done.runs:
        print("`make ui`, `make compare` and `make report` show them.")


@job(
    READING,
    TRACKING_URI,
    folder_flag("docs/results", "where the CSVs are"),
    flag("--readme", "the page with the tables", type=Path, default=PROJECT_ROOT / "README.md"),
    flag("--replace", "also replace or remove published rows", action="store_true"),
)
def publish(folder: Path, readme: Path, replace: bool, tracking_uri: str | None) -> None:
    """Put the tracked runs' figures into docs/results and README."""
    from mnist_lab.results.publish import publish as publish_runs

    written(publish_runs(folder, readme, replace=replace, tracking_uri=tracking_uri))


@job(
    READING,
    TRACKING_URI,
    folder_flag("reports", "where to write"),
    flag("--steps", "only these, e.g. step4 my_idea", nargs="+", default=(), metavar="STEP"),
)
def report(folder: Path, steps: Sequence[str], tracking_uri: str | None) -> None:
    """Write steps.html and steps.md from the tracked runs."""
    from mnist_lab.results.report import write_report

    written(write_report(folder, steps, tracking_uri=tracking_uri))


@job(
    "Loading the network",
    TRACKING_URI,
    flag("images", "a file, or a folder of pictures", nargs="*", type=Path, metavar="PICTURE"),
    flag("--model", NETWORKS),
    flag("--show", "also print the 28x28 that the network sees", action="store_true"),
)
def predict(images: list[Path], model: str | None, show: bool, tracking_uri: str | None) -> None:
    """Say which digits are in pictures."""
    import numpy as np
    from tabulate import tabulate

    from mnist_lab.reading.pictures import UNSURE, find_pictures, find_reader, picture_of, read_digit, shown

    digits, refused = {}, []
    for file in find_pictures(images):
        try:
            digits[shown(file)] = read_digit(file)
        except LabError as error:
            refused.append(str(error))
    if digits:
        reader = find_reader(model, tracking_uri=tracking_uri)
        read = reader.probabilities(np.stack(list(digits.values())))
        rows = []
        for name, shares in zip(digits, read, strict=True):
            first, second = np.argsort(-shares, kind="stable")[:2]
            rows.append((name, first, f"{100 * shares[first]:.2f} %", f"{second} ({100 * shares[second]:.2f} %)"))
        print(tabulate(rows, headers=("picture", "digit", "probability", "runner-up"), disable_numparse=True))
        print(f"\nRead by {reader.run_name}, run {reader.run_id}.")
        for (name, image), shares in zip(digits.items(), read, strict=True):
            if shares.max() < UNSURE:
                logger.warning("%s: the network is not sure of it; it may be no digit, or more than one", name)
            if show:
                print(f"\n{name}, as the network sees it:\n{picture_of(image)}")
    if refused:
        raise LabError("; ".join(refused))


@job("Loading the network", TRACKING_URI, flag("--model", NETWORKS), port_flag(5050, "port to try first"))
def draw(model: str | None, port: int, tracking_uri: str | None) -> None:
    """Serve a page on loopback to draw digits on."""
    from mnist_lab.reading import page
    from mnist_lab.tracking.server import free_port

    page.serve(page.Networks(model, store=tracking_uri), free_port(port))


@job(
    READING,
    TRACKING_URI,
    flag("step", "a script's name, or step8 for short", metavar="STEP"),
    flag("--commit", "also make it the champion of docs/results", action="store_true"),
    flag("--folder", argparse.SUPPRESS, type=Path, default=PUBLISHED),
)
def champion(step: str, commit: bool, folder: Path, tracking_uri: str | None) -> None:
    """Make the network of a step's median seed the one that reads pictures, models:/mnist@champion."""
    from mnist_lab import results
    from mnist_lab.tracking import models
    from mnist_lab.tracking.store import open_store

    run = results.median_run(script_named(step), tracking_uri=tracking_uri)
    seed, num_params, accuracy = int(run["seed"]), int(run["num_params"]), float(run["final_test_accuracy"])
    store = open_store(tracking_uri)
    version = models.register(store, run["run_id"])
    origin = f"{run['step']} seed {seed}, the median of those trained in this store, with {percent(accuracy)} %"
    print(f"{models.CHAMPION}, version {version}: {origin}")
    if commit:
        kept = {name: run[name] for name in ("step", "run_id", "code_sha256", "git_commit", "hardware", "torch")}
        committed = models.Origin(**kept, seed=seed, num_params=num_params, accuracy=accuracy)
        written(models.commit(store, committed, folder))


@job("Starting MLflow's server", TRACKING_URI, port_flag(5000, "port to try first"))
def ui(port: int, tracking_uri: str | None) -> None:
    """Serve the MLflow UI on loopback."""
    from mnist_lab.tracking.server import free_port, serve_ui

    uri = paths.tracking_uri(tracking_uri)
    if sqlite_file(uri) is None:
        raise LabError(f"tracking store {without_password(uri)!r} is a server already: open it in a browser")
    serve_ui(uri, free_port(port))


@job(
    "Starting MLflow's server",
    flag("--backend-store-uri", "PostgreSQL database (default: MLFLOW_BACKEND_STORE_URI)", metavar="URI"),
    folder_flag("mlruns/server", "where the artifacts are"),
    flag("--host", "address to listen on (default: this machine only)", default="127.0.0.1"),
    port_flag(5000, "port to listen on"),
    flag("--workers", "processes that answer requests (default 2)", type=number_from(1), default=2),
    flag("--auth", "ask for a user name and a password", action="store_true"),
)
def server(backend_store_uri: str | None, folder: Path, host: str, port: int, workers: int, auth: bool) -> None:
    """Serve MLflow to a team, on PostgreSQL."""
    from mnist_lab.tracking.server import serve

    database = backend_store_uri or os.environ.get("MLFLOW_BACKEND_STORE_URI", "")
    serve(host, port, folder, workers, auth=auth, database=database)


@job("Looking for interrupted runs", TRACKING_URI, flag("run_id", "a run's MLflow id", nargs="?", metavar="RUN_ID"))
def resume(run_id: str | None, tracking_uri: str | None) -> None:
    """Continue the newest interrupted run that can go on, or the one named."""
    from mnist_lab.running import checkpoint

    uri = paths.tracking_uri(tracking_uri)
    able, refused = [], []
    for one in [checkpoint.find(uri, run_id=run_id)] if run_id else checkpoint.interrupted(uri):
        if reason := _why_not(one, uri):
            refused.append(f"{one.name} can't go on: {reason}")
        else:
            able.append(one)
    if not able:
        none = f"there is no interrupted run with a finished epoch in {checkpoint.folder(uri)}"
        raise LabError(f"resume: {'; '.join(refused) or none}")
    newest, *others = able
    lines = [f"Going on with {newest.step} seed {newest.seed} after epoch {newest.epochs[-1].epoch}."]
    lines += [f"Interrupted too: {one.name}" for one in others] + [f"Left out: {sentence}" for sentence in refused]
    print("\n".join(lines), flush=True)
    script = str(Path(newest.script).resolve())
    os.environ["MLFLOW_TRACKING_URI"] = uri  # other users can read a command line, and there may be a password in it
    os.execv(sys.executable, [sys.executable, script, "--resume", newest.run_id])  # noqa: S606 - a script of this project


def _why_not(found: Checkpoint, uri: str) -> str:
    """Say why an interrupted run can't go on, or nothing."""
    from mnist_lab.running.identity import code_sha256, find_sources
    from mnist_lab.tracking.store import is_deleted

    script = Path(found.script).resolve()
    if not script.is_file():
        return f"{script} is not there"
    # A checkpoint from elsewhere must not name a program to be run, nor one that came with it in a store's folder.
    if script.parent != (PROJECT_ROOT / "experiments").resolve() or script.suffix != ".py":
        start = f"python {script} --resume {found.run_id}"
        return f"{script} is no script of this project; start it where it is, if you trust it: {start}"
    if is_deleted(uri, found.run_id):
        return "it was deleted in MLflow"
    changed = code_sha256(find_sources(script)) != found.identity.get("code_sha256")
    return f"{script.name} or the lab has changed; train it anew" if changed else ""


if __name__ == "__main__":
    main()
