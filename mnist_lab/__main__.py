"""The jobs that belong to no experiment: `python -m mnist_lab data | resume | sync | compare | publish | ...`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_lab.commandline import interrupt_on_signals, number_from, sentences
from mnist_lab.console import say_what_is_done
from mnist_lab.errors import LabError
from mnist_lab.tracking.sqlite import PROJECT_ROOT, script_named, sqlite_file, tracking_uri, without_password

if TYPE_CHECKING:
    from mnist_lab.pictures import Reading


logger = logging.getLogger("mnist_lab.jobs")

READING = "Reading the tracked runs"


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `compare | head` ends quietly
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a step's name may have letters that a locale has not
    arguments = _parser().parse_args()
    with sentences():
        if arguments.first:
            say_what_is_done()
            logger.info(arguments.first)
        arguments.job(arguments)


def data(arguments: argparse.Namespace) -> None:
    """Fetch and verify MNIST."""
    from mnist_lab.data import find_data_dir, load_mnist

    load_mnist(arguments.data_dir)
    print(f"MNIST is complete and verified in {find_data_dir(arguments.data_dir)}: 60,000 + 10,000 images")


def compare(arguments: argparse.Namespace) -> None:
    """Print one row per experiment, and what each single change is worth."""
    from tabulate import tabulate

    from mnist_lab import results
    from mnist_lab.verdicts.comparison import effects_text

    holdout, loaded = arguments.holdout, results.load_runs(arguments.tracking_uri)
    table = results.compare_table(include_overrides=arguments.include_overrides, holdout=holdout, loaded=loaded)
    if table.empty:
        if not results.compare_table(include_overrides=True, holdout=holdout, loaded=loaded).empty:
            flags = "--include-overrides" + (f" --holdout {holdout}" if holdout else "")
            raise LabError(
                f'the finished runs in {loaded.name} are all overridden; `make compare ARGS="{flags}"` shows them'
            )
        raise LabError(f"no finished runs in {loaded.name}; train first, e.g. `make step1`")
    print(tabulate(*results.compare_text(table, holdout=holdout), disable_numparse=True))
    best = f"on the {holdout:,} training images held out" if holdout else "on the test images"
    print(
        "\nTest accuracies in %. last: of the last epoch, mean +- sd over seeds; it is what the verdict judges.\n"
        "verdict: of one run, its figure by itself. Of several seeds, what their mean shows at p < 0.01.\n"
        f"best: of the best epoch, picked {best}. train: training accuracy of the last epoch.\n"
        "seeds needed: about so many would show a difference of the observed size, with 80 % power.\n"
        "One run on 10,000 images is known to about +- 0.15 points (95 %) at 99.4."
    )
    for row in table[table["left_out"] > 0].to_dict("records"):
        print(f"{row['step']}: {row['left_out']} older runs by other code (code_sha256) are left out.")
    comparisons, refused = results.compare_pairs(holdout=holdout, loaded=loaded)
    if comparisons:
        print("\nWhat each change is worth: test accuracy of the last epoch, in points, with 95 % interval\n")
        print(tabulate(*effects_text(comparisons), disable_numparse=True))
        print("\np (Holm) is adjusted for the rows of this table; a difference is shown where it is below 0.05.")
    for sentence in refused:
        print(sentence)


def export(arguments: argparse.Namespace) -> None:
    """Write the tracked runs' figures for oneself: CSVs and the tables made of them."""
    from mnist_lab.results.evidence import export_runs

    for file in export_runs(arguments.folder, tracking_uri=arguments.tracking_uri):
        print(f"Written: {file}")


def restore(arguments: argparse.Namespace) -> None:
    """Put the committed runs into the store."""
    print(f"Reading the runs in {arguments.folder} ...", flush=True)

    from mnist_lab.restore import restore as restore_runs
    from mnist_lab.running.provenance import commit

    interrupt_on_signals(signal.SIGTERM, signal.SIGHUP)
    state = commit(arguments.folder / "README.md")
    done = restore_runs(
        arguments.folder,
        commit=state.sha + (" + changes" if state.dirty else ""),
        tracking_uri=arguments.tracking_uri,
        progress=partial(print, flush=True),
    )
    removed = f" {done.removed} that the files say something else of by now were taken away." if done.removed else ""
    print(
        f"Restored: {done.runs} runs, {done.studies} studies over them; {done.there} runs were there already.{removed}"
    )
    if done.without_mistakes:
        print(f"Of {done.without_mistakes} runs it was not kept which images they got wrong.")
    if done.runs:
        print("`make ui` shows them, `make compare` and `make report` tell of them.")


def publish(arguments: argparse.Namespace) -> None:
    """Put the tracked runs' figures among those that are committed, and say what that changes."""
    from mnist_lab.results.evidence import prepare_publication

    publication = prepare_publication(arguments.folder, arguments.readme, tracking_uri=arguments.tracking_uri)
    print("\n".join(publication.changes) or "The published rows are those of the store already.")
    if publication.refusals and not arguments.replace:
        reasons = ", and ".join(publication.refusals)
        raise LabError(f'nothing was written: {reasons}; if that is meant, `make publish ARGS="--replace"`')
    for file in publication.write():
        print(f"Written: {file}")


def report(arguments: argparse.Namespace) -> None:
    """Write the report of the tracked runs."""
    from mnist_lab.results.report import write_report

    for file in write_report(arguments.folder, tracking_uri=arguments.tracking_uri):
        print(f"Written: {file}")


def predict(arguments: argparse.Namespace) -> None:
    """Say which digits are in pictures."""
    import csv

    from mnist_lab.pictures import find_pictures, find_reader, picture_of, read_digit, shown

    digits, refused = {}, []
    for file in find_pictures(arguments.images):
        try:
            digits[shown(file)] = read_digit(file)
        except LabError as error:
            refused.append(str(error))
    if digits:
        reader = find_reader(arguments.model, tracking_uri=arguments.tracking_uri)
        readings = dict(zip(digits, reader.read(list(digits.values())), strict=True))
        if arguments.csv:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(["picture", "digit", "probability", "runner_up", "runner_up_probability", "run"])
            for name, r in readings.items():
                shares = (f"{share:.6f}" for share in (r.probability, r.runner_up_probability))
                writer.writerow([name, r.digit, next(shares), r.runner_up, next(shares), reader.run_id])
        else:
            _print_readings(readings, reader.run_name, reader.run_id)
            if arguments.show:
                for name, digit in digits.items():
                    print(f"\n{name}, as the network sees it:\n{picture_of(digit)}")
    if refused:
        raise LabError("; ".join(refused))


def _print_readings(readings: Mapping[str, Reading], run_name: str, run_id: str) -> None:
    from tabulate import tabulate

    rows = [
        (name, r.digit, f"{100 * r.probability:.2f} %", f"{r.runner_up} ({100 * r.runner_up_probability:.2f} %)")
        for name, r in readings.items()
    ]
    print(tabulate(rows, headers=("picture", "digit", "probability", "runner-up"), disable_numparse=True))
    print(f"\nRead by {run_name}, run {run_id}.")


def draw(arguments: argparse.Namespace) -> None:
    """Serve a page on loopback to draw digits on."""
    from mnist_lab.tracking.serving import check_port
    from mnist_lab.tracking.ui import free_port

    check_port(arguments.port)

    from mnist_lab import draw as page

    interrupt_on_signals(signal.SIGTERM, signal.SIGHUP)
    networks = page.Networks(arguments.model, store=arguments.tracking_uri)
    port = free_port(arguments.port)
    if port != arguments.port:
        print(f"Port {arguments.port} is taken; using {port}.", file=sys.stderr)
    page.serve(networks, port)


def champion(arguments: argparse.Namespace) -> None:
    """Register the median seed of a step as models:/mnist@champion, which reads pictures from then on."""
    from mnist_lab import results
    from mnist_lab.tracking import champion as champions
    from mnist_lab.tracking.store import open_store

    run = results.median_run(script_named(arguments.step), tracking_uri=arguments.tracking_uri)
    store = open_store(arguments.tracking_uri)
    version = champions.register(store, run["run_id"])
    said = f"{run['step']} seed {run['seed']}, the median of its seeds, with {run['final_test_accuracy']:.2f} %"
    print(f"{champions.URI}, version {version}: {said}")
    if arguments.commit:
        origin = champions.Origin(
            step=run["step"],
            seed=int(run["seed"]),
            run_id=run["run_id"],
            accuracy=float(run["final_test_accuracy"]),
            num_params=int(run["num_params"]),
            code_sha256=str(run["code_sha256"]),
            git_commit=str(run["git_commit"]),
            hardware=str(run["hardware"]),
            torch=str(run["torch"]),
        )
        for file in champions.commit(store, origin, arguments.folder):
            print(f"Written: {file}")


def ui(arguments: argparse.Namespace) -> None:
    """Serve the MLflow UI on loopback."""
    from mnist_lab.tracking import serving
    from mnist_lab.tracking import ui as pages

    uri = tracking_uri(arguments.tracking_uri)
    if sqlite_file(uri) is None:
        raise LabError(f"tracking store {without_password(uri)!r} is a server already: open it in a browser")
    serving.check_port(arguments.port)

    interrupt_on_signals(signal.SIGTERM, signal.SIGHUP)
    pages.make_ready(uri)
    port = pages.free_port(arguments.port)
    if port != arguments.port:
        print(f"Port {arguments.port} is taken; using {port}.", file=sys.stderr)
    pages.serve(uri, port)


def server(arguments: argparse.Namespace) -> None:
    """Serve MLflow to a team, on PostgreSQL."""
    from mnist_lab.tracking.server import Settings, serve

    interrupt_on_signals(signal.SIGTERM, signal.SIGHUP)
    serve(
        Settings(
            folder=arguments.folder,
            host=arguments.host,
            port=arguments.port,
            workers=arguments.workers,
            auth=arguments.auth,
            backend_store_uri=arguments.backend_store_uri or os.environ.get("MLFLOW_BACKEND_STORE_URI"),
        )
    )


def sync(arguments: argparse.Namespace) -> None:
    """Send what runs logged while their tracking server was away."""
    from mnist_lab.tracking import delivery

    deliveries = delivery.sync(tracking_uri(arguments.tracking_uri))
    for one in deliveries:
        left = f"; {one.waiting} wait still: {one.reason}" if one.waiting else ""
        where = f" on {one.target}" if one.target else ""
        print(f"run {one.run_id}{where}: {one.sent} records sent{left}")
    if not deliveries:
        print("Nothing waits for a tracking server.")
    if any(one.waiting for one in deliveries):
        raise LabError("not all could be sent; what waits stays on disk, and the same command tries again")


def resume(arguments: argparse.Namespace) -> None:
    """Go on with an interrupted run, whatever script it is of."""
    from mnist_lab.running import checkpoint

    uri = tracking_uri(arguments.tracking_uri)
    found = checkpoint.find(uri, run_id=arguments.run_id)
    script = Path(found.script).resolve()
    # A checkpoint from elsewhere must not name a program to be run, nor one that came with it in a store's folder.
    if script.parent != (PROJECT_ROOT / "experiments").resolve() or script.suffix != ".py":
        start = f"python {script} --resume {found.run_id}"
        raise LabError(f"resume: {script} is no script of this project; start it yourself, if you trust it: {start}")
    if not script.is_file():
        gone = f"the script of run {found.run_id}, {script}, is not there any more"
        raise LabError(f"resume: {gone}; start it with --resume where it is now")
    print(f"Going on with {found.step} seed {found.seed} after epoch {found.epochs[-1].epoch}.", flush=True)
    os.environ["MLFLOW_TRACKING_URI"] = uri  # other users can read a command line, and there may be a password in it
    os.execv(sys.executable, [sys.executable, str(script), "--resume", found.run_id])  # noqa: S606 - a script of this project


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mnist_lab", description="Jobs that belong to no experiment.")
    jobs = parser.add_subparsers(required=True, metavar="JOB")

    def add(job: Callable[[argparse.Namespace], None], text: str, first: str = "") -> argparse.ArgumentParser:
        """first: what the job is at for a while before it says anything."""
        command = jobs.add_parser(job.__name__, help=text, description=text)
        command.set_defaults(job=job, first=first)
        if job not in (data, server):
            uri = "MLflow store (default: MLFLOW_TRACKING_URI, else mlruns/mlflow.db)"
            command.add_argument("--tracking-uri", help=uri)
        return command

    command = add(data, "fetch and verify MNIST", "Looking for MNIST")
    command.add_argument("--data-dir", type=Path, help="where MNIST is kept (default: MNIST_LAB_DATA, else data/)")
    command = add(resume, "go on with the newest interrupted run, or the one named")
    command.add_argument("run_id", nargs="?", metavar="RUN_ID", help="of MLflow")
    add(sync, "send what runs logged while their tracking server was away")
    command = add(compare, "print one row per experiment from the tracked runs", READING)
    command.add_argument("--include-overrides", action="store_true", help="also runs with overridden hyperparameters")
    held_out = "runs that hold out N training images (default 0)"
    command.add_argument("--holdout", type=number_from(), default=0, metavar="N", help=held_out)
    command = add(export, "write the tracked runs' figures to reports/results", READING)
    folder = PROJECT_ROOT / "reports" / "results"
    command.add_argument("--folder", type=Path, default=folder, help="where to (default: reports/results/)")
    command = add(publish, "put the tracked runs' figures into docs/results and README", READING)
    command.add_argument("--folder", type=Path, default=PROJECT_ROOT / "docs" / "results", help="where the CSVs are")
    command.add_argument("--readme", type=Path, default=PROJECT_ROOT / "README.md", help="the page with the tables")
    command.add_argument("--replace", action="store_true", help="also replace published rows and mix hardware")
    command = add(restore, "put the committed runs of docs/results into the store", "Reading the committed runs")
    command.add_argument("--folder", type=Path, default=PROJECT_ROOT / "docs" / "results", help="where the CSVs are")
    command = add(report, "write steps.html and steps.md from the tracked runs", READING)
    command.add_argument("--folder", type=Path, default=PROJECT_ROOT / "reports", help="where to (default: reports/)")
    command = add(predict, "say which digits are in pictures", "Loading the network")
    command.add_argument("images", nargs="*", type=Path, metavar="PICTURE", help="a file, or a folder of pictures")
    networks = (
        "runs:/<id>, models:/<name>@<alias> or a script's name (default: models:/mnist@champion, else docs/results)"
    )
    command.add_argument("--model", help=networks)
    form = command.add_mutually_exclusive_group()
    form.add_argument("--show", action="store_true", help="also print the 28x28 that the network sees")
    form.add_argument("--csv", action="store_true", help="print CSV")
    command = add(draw, "serve a page on loopback to draw digits on", "Loading the network")
    command.add_argument("--model", help=networks)
    command.add_argument("--port", type=number_from(), default=5050, help="port to try first (default 5050)")
    command = add(champion, "let the median seed of a step read pictures: models:/mnist@champion")
    command.add_argument("step", metavar="STEP", help="a script's name, or step8 for short")
    command.add_argument("--commit", action="store_true", help="also make it the champion of docs/results")
    command.add_argument("--folder", type=Path, default=PROJECT_ROOT / "docs" / "results", help=argparse.SUPPRESS)
    command = add(ui, "serve the MLflow UI on loopback", "Starting MLflow's server")
    command.add_argument("--port", type=number_from(), default=5000, help="port to try first (default 5000)")
    command = add(server, "serve MLflow to a team, on PostgreSQL", "Starting the database and the server")
    uris = "postgresql://user@host:5432/database (default: MLFLOW_BACKEND_STORE_URI, else a database of its own)"
    command.add_argument("--backend-store-uri", metavar="URI", help=uris)
    folder = PROJECT_ROOT / "mlruns" / "server"
    command.add_argument("--folder", type=Path, default=folder, help="of its artifacts (default: mlruns/server/)")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    command.add_argument("--port", type=number_from(), default=5000, help="port to listen on (default 5000)")
    command.add_argument("--workers", type=number_from(1), default=2, help="processes that answer (default 2)")
    command.add_argument("--auth", action="store_true", help="ask for a user name and a password")
    return parser


if __name__ == "__main__":
    main()
