"""How long the run table and the whole history take as a store grows: 10, 100 and 1,000 runs of 14 epochs x 6 metrics.

    python benchmarks/run_tables.py [RUNS ...]

Builds real SQLite stores in a temporary folder, writing each run as the runner does, and reads them three times each.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from run_writer import write_run

from mnist_lab import results
from mnist_lab.tracking import open_store

EPOCHS = 14
ROUNDS = 3


def build(folder: Path, runs: int) -> str:
    """Return the URI of a new store with so many runs."""
    store = open_store(f"sqlite:///{folder / 'mlflow.db'}")
    accuracies = [98 + epoch / 10 for epoch in range(EPOCHS)]
    for number in range(runs):
        step, seed = f"step{1 + number % 4}", number // 4
        write_run(store, step, seed, accuracies, start_time=1_700_000_000_000 + 1000 * number)
    return store.uri


def seconds(read: object, uri: str) -> tuple[float, int]:
    """Return the median time of reading, and the rows that came back."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        table = read(tracking_uri=uri)
        times.append(time.perf_counter() - start)
    return statistics.median(times), len(table)


def main() -> None:
    rows = []
    for runs in [int(argument) for argument in sys.argv[1:]] or [10, 100, 1000]:
        with tempfile.TemporaryDirectory() as folder:
            uri = build(Path(folder), runs)
            table, table_rows = seconds(results.run_table, uri)
            history, history_rows = seconds(results.epoch_history, uri)
            assert (table_rows, history_rows) == (runs, runs * EPOCHS)
            rows.append((runs, f"{table:.2f} s", f"{history:.2f} s", f"{table + history:.2f} s", history_rows))
    print(tabulate(rows, headers=("runs", "run_table", "epoch_history", "together", "rows of history")))
    print(f"Medians of {ROUNDS} rounds. epoch_history lists the runs too, so it takes the longer of the two.")


if __name__ == "__main__":
    main()
