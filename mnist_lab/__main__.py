"""The jobs that belong to no experiment, for the Makefile: `python -m mnist_lab data | compare | report | ui`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from mnist_lab.cli import interrupt_on_signals
from mnist_lab.errors import LabError
from mnist_lab.store import PROJECT_ROOT, sqlite_file, tracking_uri


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `compare | head` ends quietly
    arguments = _parser().parse_args()
    arguments.job(arguments)


def data(arguments: argparse.Namespace) -> None:
    """Fetch and verify MNIST."""
    from mnist_lab.data import find_data_dir, load_mnist

    mnist = load_mnist(arguments.data_dir)
    total, tests = len(mnist.train_images), len(mnist.test_images)
    print(f"MNIST is complete and verified in {find_data_dir(arguments.data_dir)}: {total:,} + {tests:,} images")


def compare(arguments: argparse.Namespace) -> None:
    """Print one row per experiment."""
    from tabulate import tabulate

    from mnist_lab import results

    table = results.compare_table(include_overrides=arguments.include_overrides, tracking_uri=arguments.tracking_uri)
    if table.empty:
        uri = tracking_uri(arguments.tracking_uri)
        raise LabError(f"no finished runs without overrides in {uri}; train first, e.g. `make step1`")
    print(tabulate(*results.compare_text(table), disable_numparse=True))
    print(
        "\nAccuracies in %. last: of the last epoch, mean +- sd over seeds; it is what the verdict judges.\n"
        "best: of the best epoch, picked on the test images. train: training accuracy of the last epoch.\n"
        "One run on 10,000 images is known to about +- 0.15 points (95 %) at 99.4."
    )


def report(arguments: argparse.Namespace) -> None:
    """Write the report of the tracked runs."""
    from mnist_lab.report import write_report

    for file in write_report(arguments.folder, tracking_uri=arguments.tracking_uri):
        print(f"Written: {file}")


def ui(arguments: argparse.Namespace) -> None:
    """Serve the MLflow UI on loopback."""
    from mnist_lab import ui as server

    if sqlite_file(tracking_uri(arguments.tracking_uri)) is None:
        raise LabError(
            f"tracking store {tracking_uri(arguments.tracking_uri)!r} is a server already: open it in a browser"
        )
    server.check_port(arguments.port)

    from mnist_lab.tracking import open_store

    interrupt_on_signals(signal.SIGTERM, signal.SIGHUP)
    store = open_store(arguments.tracking_uri)
    port = server.free_port(arguments.port)
    if port != arguments.port:
        print(f"Port {arguments.port} is taken; using {port}.", file=sys.stderr)
    server.serve(store.uri, store.experiment_id, port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mnist_lab", description="Jobs that belong to no experiment.")
    jobs = parser.add_subparsers(required=True, metavar="JOB")

    def add(job: object, name: str, text: str) -> argparse.ArgumentParser:
        command = jobs.add_parser(name, help=text, description=text)
        command.set_defaults(job=job)
        return command

    add(data, "data", "fetch and verify MNIST").add_argument(
        "--data-dir", type=Path, help="where MNIST is kept (default: MNIST_LAB_DATA, else data/)"
    )
    command = add(compare, "compare", "print one row per experiment from the tracked runs")
    command.add_argument("--include-overrides", action="store_true", help="also runs with overridden hyperparameters")
    _add_tracking_uri(command)
    command = add(report, "report", "write steps.html and steps.md from the tracked runs")
    command.add_argument("--folder", type=Path, default=PROJECT_ROOT / "reports", help="where to (default: reports/)")
    _add_tracking_uri(command)
    command = add(ui, "ui", "serve the MLflow UI on loopback")
    command.add_argument("--port", type=int, default=5000, help="port to try first (default 5000)")
    _add_tracking_uri(command)
    return parser


def _add_tracking_uri(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlruns/mlflow.db)")


if __name__ == "__main__":
    main()
