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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_lab.commandline import DATA_DIR, TRACKING_URI, Flag, flag, interrupt_on_signals, number_from, sentences
from mnist_lab.console import say_what_is_done
from mnist_lab.errors import LabError, counted, without_password
from mnist_lab.paths import PROJECT_ROOT, PUBLISHED, script_named, sqlite_file, tracking_uri
from mnist_lab.verdicts.measures import percent

if TYPE_CHECKING:  # imported by the jobs that need it: it takes seconds
    import pandas as pd

    from mnist_lab.running.checkpoint import Checkpoint
    from mnist_lab.verdicts.comparison import Comparison

logger = logging.getLogger("mnist_lab.jobs")

READING = "Reading the tracked runs"
NETWORKS = "runs:/<id>, models:/<name>@<alias>, a script's name, docs/results (default: models:/mnist@champion if any)"
DATABASE = "postgresql://user:password@host:5432/database (default: MLFLOW_BACKEND_STORE_URI)"

# What the columns of `compare` mean.
TESTED = [
    "Test accuracies in %. last: of the last epoch, mean +- sd over seeds; it is what the verdict judges.",
    "verdict: of one run, its figure by itself. Of several seeds, what their mean shows at p < 0.01.",
    "best: of the best epoch, picked on the test images. train: training accuracy of the last epoch.",
    "seeds needed: about so many would show a difference of the observed size, with 80 % power.",
    "One run on 10,000 images is known to about +- 0.15 points (95 %) at 99.4.",
]
CROSS_VALIDATED = [
    "Accuracies in % on training images: each fold is judged by a network that was trained on the others.",
    "last: of the last epoch, mean +- sd over the folds. best: of the best epoch, picked on the same images.",
    "train: training accuracy of the last epoch. The test images were not read, and no target for them is judged.",
]

Run = Callable[[argparse.Namespace], None]
JOBS: dict[str, tuple[Run, str, Sequence[Flag]]] = {}


def job(begins: str, *flags: Flag) -> Callable[[Run], Run]:
    """List a function as a job: its docstring is its help; `begins` is what it is at before it says anything."""

    def listed(run: Run) -> Run:
        JOBS[run.__name__] = run, begins, flags
        return run

    return listed


def folder(default: str, what: str) -> Flag:
    return flag("--folder", f"{what} (default: {default}/)", type=Path, default=PROJECT_ROOT / default)


def port(default: int, what: str) -> Flag:
    return flag("--port", f"{what} (default {default})", type=number_from(), default=default)


def written(files: Iterable[Path]) -> None:
    for file in files:
        print(f"Written: {file}")


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `compare | head` ends quietly
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a step's name may have letters that a locale has not
    parser = argparse.ArgumentParser(prog="python -m mnist_lab", description="Jobs that belong to no experiment.")
    jobs = parser.add_subparsers(required=True, metavar="JOB", dest="job")
    for name, (run, _, flags) in JOBS.items():
        text = str(run.__doc__).rstrip(".")
        subparser = jobs.add_parser(name, help=text, description=text)
        for option, settings in flags:
            subparser.add_argument(option, **settings)
    arguments, unknown = parser.parse_known_args()
    if unknown:
        jobs.choices[arguments.job].error(f"unknown arguments: {' '.join(unknown)}")
    run, begins, _ = JOBS[arguments.job]
    interrupt_on_signals()
    with sentences():
        if begins:
            say_what_is_done()
            logger.info(begins)
        run(arguments)


@job("Looking for MNIST", DATA_DIR)
def data(arguments: argparse.Namespace) -> None:
    """Fetch and verify MNIST."""
    from mnist_lab.data import find_data_dir, load_mnist

    load_mnist(arguments.data_dir)
    print(f"MNIST is complete and verified in {find_data_dir(arguments.data_dir)}: 60,000 + 10,000 images")


@job(
    READING,
    TRACKING_URI,
    flag("steps", "only these, e.g. step3 step4 my_idea", nargs="*", metavar="STEP"),
    flag("--include-overrides", "also overridden runs of experiments that have others", action="store_true"),
    flag("--holdout", "runs that hold out N training images (default 0)", type=number_from(), default=0, metavar="N"),
    flag("--folds", "cross-validated runs with K folds", type=number_from(2), default=0, metavar="K"),
)
def compare(arguments: argparse.Namespace) -> None:
    """Print one row per experiment, and what each single change is worth."""
    from mnist_lab import results
    from mnist_lab.results.compare import newest_runs
    from mnist_lab.verdicts.comparison import effects_text

    steps, loaded = arguments.steps or None, results.load_runs(arguments.tracking_uri)
    holdout, folds = arguments.holdout, arguments.folds
    protocol: dict[str, Any] = {"holdout": holdout, "folds": folds, "loaded": loaded}
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    shown: dict[str, Any] = {**protocol, "include_overrides": arguments.include_overrides or "if_none"}
    table = results.compare_table(steps, **shown)
    if table.empty:
        raise LabError(f"no finished runs in {loaded.name}; train first, e.g. `make step1`")
    lines = [*(CROSS_VALIDATED if folds else TESTED)]
    if holdout:
        lines = [line.replace("on the test images", f"on the {holdout:,} training images held out") for line in lines]
    for row in table[table["left_out"] > 0].to_dict("records"):
        left_out = counted(row["left_out"], "older run")
        lines.append(f"{row['step']}: left out: {left_out} of other code (code_sha256) or other hyperparameters.")
    for row in table[table["seeds"] < folds].to_dict("records"):
        lines.append(f"{row['step']}: only {row['seeds']} of {folds} folds are there.")
    every = results.compare_table([*table["step"].unique()], include_overrides=True, **protocol)
    if overridden := len(every) - len(table):
        variants = counted(overridden, "overridden variant")
        lines.append(f"Left out: {variants} of these experiments; --include-overrides shows them.")
    lines += _origins(newest_runs(results.run_table(steps, columns="all", **shown)))
    print(results.compare_text(table, holdout=holdout, folds=folds, width=width), end="\n\n")
    folded = partial(textwrap.fill, width=width) if width else str
    print("\n".join(map(folded, lines)))
    comparisons, refused = _effects(arguments.steps, protocol)
    if len(table) > 1 and table["overrides"].ne("").all() and not comparisons:
        refused = ["not compared: all these runs were overridden, and changes are compared by runs as declared"]
    if comparisons:
        title = "What each change is worth: accuracy of the last epoch, in points, with 95 % interval"
        print(f"\n{folded(title)}\n")
        print(effects_text(comparisons, width, "folds" if folds else "seeds"))
        rule = "A difference is shown where p (Holm), which is adjusted for the rows of this table, is below 0.05."
        print("\n" + folded(rule))
    for sentence in refused:
        print("\n" + folded(sentence))


def _origins(runs: pd.DataFrame) -> Iterator[str]:
    """Yield a sentence for each step whose script has changed since these runs, or of which some were restored."""
    from mnist_lab.running.identity import code_sha256, find_sources

    for step, of_step in runs.groupby("step"):
        script, restored = PROJECT_ROOT / "experiments" / f"{step}.py", of_step["restored"].notna().sum()
        if 0 < restored < len(of_step):
            yield f"{step}: {restored} of its {len(of_step)} seeds were restored, the others trained in this store."
        if script.is_file() and {*of_step["code_sha256"].dropna()} - {code_sha256(find_sources(script))}:
            yield f"{step}: its script has changed since these runs; train it anew for figures of the script as it is."


def _effects(steps: Sequence[str], protocol: Mapping[str, Any]) -> tuple[list[Comparison], list[str]]:
    """Return what the declared changes among these steps are worth, or all, and why the others are not compared."""
    from mnist_lab import results
    from mnist_lab.results.compare import declared_pairs
    from mnist_lab.results.runs import full_names

    named = {*full_names(steps, protocol["loaded"])}
    pairs = [pair for pair in declared_pairs() if not named or {pair.a, pair.b} <= named]
    comparisons, refused = results.compare_pairs(pairs, **protocol)
    if comparisons or refused or len(steps) != 2:
        return comparisons, refused
    try:
        return [results.compare(*steps, **protocol)], []
    except LabError as error:
        return [], [f"not compared: {error}"]


@job(READING, TRACKING_URI, folder("reports/results", "where to"))
def export(arguments: argparse.Namespace) -> None:
    """Write the tracked runs' figures to reports/results."""
    from mnist_lab.results.publish import export_runs

    written(export_runs(arguments.folder, tracking_uri=arguments.tracking_uri))


@job("Reading the committed runs", TRACKING_URI, folder("docs/results", "where the CSVs are"))
def restore(arguments: argparse.Namespace) -> None:
    """Put the committed runs of docs/results into the store."""
    print(f"Reading the runs in {arguments.folder} ...", flush=True)

    from mnist_lab.results.restore import restore as restore_runs
    from mnist_lab.running.identity import commit_tags

    state = commit_tags(arguments.folder / "README.md")
    done = restore_runs(
        arguments.folder,
        commit=state["git_commit"] + (" + changes" if state["git_dirty"] == "true" else ""),
        tracking_uri=arguments.tracking_uri,
        progress=partial(print, flush=True),
    )
    studies = counted(done.studies, "study", "studies")
    print(f"Restored: {counted(done.runs, 'run')}, {studies} over them; there already: {done.there}.")
    if done.runs:
        print("`make ui` shows them, `make compare` and `make report` tell of them.")


@job(
    READING,
    TRACKING_URI,
    folder("docs/results", "where the CSVs are"),
    flag("--readme", "the page with the tables", type=Path, default=PROJECT_ROOT / "README.md"),
    flag("--replace", "also replace or remove published rows", action="store_true"),
)
def publish(arguments: argparse.Namespace) -> None:
    """Put the tracked runs' figures into docs/results and README."""
    from mnist_lab.results.publish import publish as publish_runs

    given = {"replace": arguments.replace, "tracking_uri": arguments.tracking_uri}
    written(publish_runs(arguments.folder, arguments.readme, **given))


@job(
    READING,
    TRACKING_URI,
    folder("reports", "where to"),
    flag("--steps", "only these, e.g. step4 my_idea", nargs="+", default=(), metavar="STEP"),
)
def report(arguments: argparse.Namespace) -> None:
    """Write steps.html and steps.md from the tracked runs."""
    from mnist_lab.results.report import write_report

    written(write_report(arguments.folder, arguments.steps, tracking_uri=arguments.tracking_uri))


@job(
    "Loading the network",
    TRACKING_URI,
    flag("images", "a file, or a folder of pictures", nargs="*", type=Path, metavar="PICTURE"),
    flag("--model", NETWORKS),
    flag("--show", "also print the 28x28 that the network sees", action="store_true"),
)
def predict(arguments: argparse.Namespace) -> None:
    """Say which digits are in pictures."""
    import numpy as np
    from tabulate import tabulate

    from mnist_lab.reading.pictures import UNSURE, find_pictures, find_reader, picture_of, read_digit, shown

    digits, refused = {}, []
    for file in find_pictures(arguments.images):
        try:
            digits[shown(file)] = read_digit(file)
        except LabError as error:
            refused.append(str(error))
    if digits:
        reader = find_reader(arguments.model, tracking_uri=arguments.tracking_uri)
        rows, unsure = [], []
        for name, shares in zip(digits, reader.probabilities(np.stack(list(digits.values()))), strict=True):
            first, second = np.argsort(-shares, kind="stable")[:2]
            rows.append((name, first, f"{100 * shares[first]:.2f} %", f"{second} ({100 * shares[second]:.2f} %)"))
            if shares[first] < UNSURE:
                unsure.append(name)
        print(tabulate(rows, headers=("picture", "digit", "probability", "runner-up"), disable_numparse=True))
        print(f"\nRead by {reader.run_name}, run {reader.run_id}.")
        for name in unsure:
            logger.warning("%s: the network is not sure of it; it may be no digit, or more than one", name)
        for name, image in digits.items() if arguments.show else ():
            print(f"\n{name}, as the network sees it:\n{picture_of(image)}")
    if refused:
        raise LabError("; ".join(refused))


@job("Loading the network", TRACKING_URI, flag("--model", NETWORKS), port(5050, "port to try first"))
def draw(arguments: argparse.Namespace) -> None:
    """Serve a page on loopback to draw digits on."""
    from mnist_lab.tracking.server import free_port

    port = free_port(arguments.port)

    from mnist_lab.reading import page
    from mnist_lab.reading.pictures import find_reader

    page.serve(find_reader(arguments.model, tracking_uri=arguments.tracking_uri), port)


@job(
    "",
    TRACKING_URI,
    flag("step", "a script's name, or step8 for short", metavar="STEP"),
    flag("--commit", "also make it the champion of docs/results", action="store_true"),
    flag("--folder", argparse.SUPPRESS, type=Path, default=PUBLISHED),
)
def champion(arguments: argparse.Namespace) -> None:
    """Let the median seed of a step read pictures: models:/mnist@champion."""
    from mnist_lab import results
    from mnist_lab.tracking import models
    from mnist_lab.tracking.store import open_store

    run = results.median_run(script_named(arguments.step), tracking_uri=arguments.tracking_uri)
    store = open_store(arguments.tracking_uri)
    version = models.register(store, run["run_id"])
    origin_text = (
        f"{run['step']} seed {run['seed']}, the median of its seeds, with {percent(run['final_test_accuracy'])} %"
    )
    print(f"{models.CHAMPION}, version {version}: {origin_text}")
    if arguments.commit:
        kept = {name: run[name] for name in ("step", "run_id", "code_sha256", "git_commit", "hardware", "torch")}
        seed, num_params, accuracy = int(run["seed"]), int(run["num_params"]), float(run["final_test_accuracy"])
        origin = models.Origin(**kept, seed=seed, num_params=num_params, accuracy=accuracy)
        written(models.commit(store, origin, arguments.folder))


@job("Starting MLflow's server", TRACKING_URI, port(5000, "port to try first"))
def ui(arguments: argparse.Namespace) -> None:
    """Serve the MLflow UI on loopback."""
    from mnist_lab.tracking.server import free_port, serve_ui

    uri = tracking_uri(arguments.tracking_uri)
    if sqlite_file(uri) is None:
        raise LabError(f"tracking store {without_password(uri)!r} is a server already: open it in a browser")
    serve_ui(uri, free_port(arguments.port))


@job(
    "Starting MLflow's server",
    flag("--backend-store-uri", DATABASE, metavar="URI"),
    folder("mlruns/server", "of its artifacts"),
    flag("--host", "address to listen on (default: this machine only)", default="127.0.0.1"),
    port(5000, "port to listen on"),
    flag("--workers", "processes that answer (default 2)", type=number_from(1), default=2),
    flag("--auth", "ask for a user name and a password", action="store_true"),
)
def server(arguments: argparse.Namespace) -> None:
    """Serve MLflow to a team, on PostgreSQL."""
    from mnist_lab.tracking.server import serve

    given = arguments.host, arguments.port, arguments.folder, arguments.workers
    database = arguments.backend_store_uri or os.environ.get("MLFLOW_BACKEND_STORE_URI", "")
    serve(*given, auth=arguments.auth, database=database)


@job("", TRACKING_URI, flag("run_id", "of MLflow", nargs="?", metavar="RUN_ID"))
def resume(arguments: argparse.Namespace) -> None:
    """Go on with the newest interrupted run that can go on, or the one named."""
    from mnist_lab.running import checkpoint

    uri, named = tracking_uri(arguments.tracking_uri), arguments.run_id
    found = [checkpoint.find(uri, run_id=named)] if named else [*checkpoint.interrupted(uri)]
    reasons = [(one, _why_not(one, uri, named=bool(named))) for one in found]
    refused = [f"{one.name} can't go on: {reason}" for one, reason in reasons if reason]
    able = [one for one, reason in reasons if not reason]
    if not able:
        none = f"there is no interrupted run with a finished epoch in {checkpoint.folder(uri)}"
        raise LabError(f"resume: {'; '.join(refused) or none}")
    newest = able[0]
    print(f"Going on with {newest.step} seed {newest.seed} after epoch {newest.epochs[-1].epoch}.")
    others = [f"Interrupted too: {one.name}" for one in able[1:]]
    for line in [*others, *(f"Left out: {sentence}" for sentence in refused)]:
        print(line)
    sys.stdout.flush()
    script = str(Path(newest.script).resolve())
    os.environ["MLFLOW_TRACKING_URI"] = uri  # other users can read a command line, and there may be a password in it
    os.execv(sys.executable, [sys.executable, script, "--resume", newest.run_id])  # noqa: S606 - a script of this project


def _why_not(found: Checkpoint, uri: str, *, named: bool) -> str:
    """Say why an interrupted run can't go on, or nothing; one that was named looks at its code itself."""
    from mnist_lab.running.identity import code_sha256, find_sources
    from mnist_lab.tracking.store import is_deleted

    script = Path(found.script).resolve()
    # A checkpoint from elsewhere must not name a program to be run, nor one that came with it in a store's folder.
    if script.parent != (PROJECT_ROOT / "experiments").resolve() or script.suffix != ".py":
        start = f"python {script} --resume {found.run_id}"
        return f"{script} is no script of this project; start it yourself, if you trust it: {start}"
    if not script.is_file():
        return f"{script} is not there any more; start it with --resume {found.run_id} where it is now"
    if named:
        return ""
    if is_deleted(uri, found.run_id):
        return "it was deleted in MLflow"
    changed = code_sha256(find_sources(script)) != found.identity.get("code_sha256")
    return f"{script.name} or the lab has changed; train it anew" if changed else ""


if __name__ == "__main__":
    main()
