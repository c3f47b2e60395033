"""How long the run table and the whole history take as a store grows: 10, 100 and 1,000 runs of 14 epochs x 6 metrics.

Builds real SQLite stores in temporary folders, writing each run as the runner does, and reads them in turns.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence

from measure import Report, Sample, Setting, interleave, make_parser, parse, show, temporary_store
from startup import fill

from mnist_lab import results

EPOCHS = 14
TABLES = {"run_table": results.run_table, "epoch_history": results.epoch_history}


def reading(table: str, uri: str, rows: int) -> Callable[[], float]:
    """Return what reads a table, and gives the seconds that it took."""

    def measure() -> float:
        start = time.perf_counter()
        found = TABLES[table](tracking_uri=uri)
        seconds = time.perf_counter() - start
        assert len(found) == rows
        return seconds

    return measure


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("run_tables", __doc__, rounds=Setting(5, 2, "rounds"))
    parser.add_argument("--runs", type=int, nargs="+", metavar="N", help="default 10 100 1000, with --quick 2 and 4")
    arguments = parse(parser, argv)
    counts = sorted(arguments.runs or ([2, 4] if arguments.quick else [10, 100, 1000]))
    report = Report(arguments)
    with contextlib.ExitStack() as stores:
        ways = {}
        for runs in counts:
            show(f"writing {runs} runs")
            uri = stores.enter_context(temporary_store())
            fill(uri, runs)
            ways[f"run_table, {runs} runs"] = reading("run_table", uri, runs)
            ways[f"epoch_history, {runs} runs"] = reading("epoch_history", uri, runs * EPOCHS)
        for way in ways.values():
            way()  # warm up
        seconds = {name: Sample(tuple(rounds)) for name, rounds in interleave(ways, arguments.rounds).items()}
    ratios = {}
    for table in TABLES:
        for fewer, more in itertools.pairwise(counts):
            ratios[f"{table}: {more} runs / {fewer}"] = seconds[f"{table}, {more} runs"].per(
                seconds[f"{table}, {fewer} runs"]
            )
    report.section("reading a store", seconds, ratios, unit="s")
    report.note("epoch_history lists the runs too, so it takes the longer of the two.")
    report.write()


if __name__ == "__main__":
    main()
