"""Wall and CPU time of commands in fresh processes, beside what Python and the imports alone take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from measure import STEP, Report, Sample, Setting, interleave, make_parser, parse, run_fresh, script_of, temporary_store

PYTHON, TORCH, LIBRARIES = "python, nothing else", "import torch", "import torch, mlflow"
SCRIPT_HELP, LAB_HELP = "step4 --help", "python -m mnist_lab --help"
COMPARE, RUN = "make compare's command", "step4 --limit 128 --epochs 1"


def fill(uri: str, runs: int) -> None:
    """Write so many runs of 14 epochs into a new store."""
    from mnist_lab.tracking.store import open_store
    from run_writer import write_run

    store, accuracies = open_store(uri), [98 + epoch / 10 for epoch in range(14)]
    for number in range(runs):
        start_time = 1_700_000_000_000 + 1000 * number
        write_run(store, f"step{1 + number % 4}", number // 4, accuracies, start_time=start_time)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "startup",
        __doc__,
        rounds=Setting(3, 1, "rounds"),
        runs=Setting(40, 2, "runs in the store that is compared"),
    )
    arguments = parse(parser, argv)
    report = Report(arguments)
    script = script_of(STEP)
    with temporary_store() as uri:
        fill(uri, arguments.runs)
        ways = {
            PYTHON: partial(run_fresh, "-c", "pass"),
            TORCH: partial(run_fresh, "-c", "import torch"),
            LIBRARIES: partial(run_fresh, "-c", "import torch, mlflow"),
            SCRIPT_HELP: partial(run_fresh, script, "--help"),
            LAB_HELP: partial(run_fresh, "-m", "mnist_lab", "--help"),
            COMPARE: partial(run_fresh, "-m", "mnist_lab", "compare", "--tracking-uri", uri),
            RUN: partial(run_fresh, script, "--limit", "128", "--epochs", "1", "--tracking-uri", uri),
        }
        if arguments.quick:
            del ways[RUN]
        else:
            for name in (LIBRARIES, COMPARE):
                ways[name]()  # brings the files into the page cache
        results = interleave(ways, arguments.rounds)
    for title, field in (("wall time", "wall"), ("CPU time", "cpu")):
        seconds = {name: Sample([getattr(process, field) for process in results[name]]) for name in results}
        pairs = ((SCRIPT_HELP, TORCH), (LAB_HELP, PYTHON), (COMPARE, LIBRARIES), (RUN, LIBRARIES))
        ratios = {f"{name} / {other}": seconds[name].per(seconds[other]) for name, other in pairs if name in results}
        report.section(title, seconds, ratios, unit="s")
    report.note(f"Each is a fresh process. Compared are {arguments.runs} runs.")
    if not arguments.quick:
        report.note("Files are in the page cache. The run includes an evaluation, its figures and its model.")
    report.write()


if __name__ == "__main__":
    main()
