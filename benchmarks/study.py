"""A study of several seeds of step 4 by the lab, against the write-ups' way: one training after another.

Whole processes, from start to end, on few images and epochs. Start-up (imports, first use of a store, figures, models,
all that is not an epoch) weighs much more here than in full runs, so its share is shown, and the ratio without it,
which is what long runs come near.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
from measure import Report, Sample, Setting, interleave, make_parser, parse, run_fresh, script_of, temporary_store

from mnist_lab import results

STEP = "step4_augment_steplr"
TEN = 10
WRITE_UPS = "write-ups, 1 seed"


@dataclass(frozen=True)
class Trained:
    """Some seeds trained: wall seconds of all, of these in epochs, and how many seeds trained at once."""

    wall: float
    epochs: float
    workers: int

    @property
    def rest(self) -> float:
        """Seconds of start-up and all else that is no epoch."""
        return self.wall - self.epochs

    def turns(self, seeds: int) -> int:
        """Return how often the workers must begin a seed, all of them counted as one."""
        return math.ceil(seeds / self.workers)


def estimate(measured: dict[int, Trained], seeds: int) -> Trained:
    """Return what was measured with so many seeds, or an estimate by the turns that the workers need for them.

    A turn takes the difference of the two largest studies that differ in turns; where there is one only, its mean turn.
    """
    if seeds in measured:
        return measured[seeds]
    most = max(measured)
    large = measured[most]
    turns, wanted = large.turns(most), large.turns(seeds)
    fewer = max((count for count in measured if large.turns(count) < turns), default=None)
    base = 0.0 if fewer is None else measured[fewer].wall
    turn = (large.wall - base) / (turns - (0 if fewer is None else large.turns(fewer)))
    return Trained(large.wall + turn * (wanted - turns), large.epochs * wanted / turns, large.workers)


def lab(seeds: int, limit: int, epochs: int) -> Trained:
    """Train a study in a fresh process, into a store that does not exist yet."""
    with temporary_store() as uri:
        flags = ("--seeds", str(seeds), "--limit", str(limit), "--epochs", str(epochs), "--tracking-uri", uri)
        process = run_fresh(script_of(STEP), *flags)
        history = results.epoch_history(include_overrides=True, tracking_uri=uri)
        runs = results.run_table(columns="all", include_overrides=True, tracking_uri=uri)
    assert len(runs) == seeds, f"{len(runs)} of {seeds} seeds have finished"
    starts = runs["start_time"]
    ends = starts + pd.to_timedelta(runs["minutes"], unit="min")
    workers = max(int(((starts <= start) & (start < ends)).sum()) for start in starts)
    return Trained(process.wall, history["epoch_seconds"].sum() / workers, workers)


def write_ups(limit: int, epochs: int) -> Trained:
    """Train one seed in a fresh process in the way of the write-ups."""
    flags = ("--images", str(limit), "--epochs", str(epochs))
    process = run_fresh("benchmarks/writeups.py", STEP, *flags)
    trained = json.loads(process.output.splitlines()[-1])
    return Trained(process.wall, sum(epoch["seconds"] for epoch in trained), 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "study",
        __doc__,
        rounds=Setting(2, 1, "rounds"),
        limit=Setting(6000, 128, "training images of each epoch"),
        epochs=Setting(1, 1, "epochs"),
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="default 1 2 4 8, with --quick 2")
    arguments = parse(parser, argv)
    counts = sorted(arguments.seeds or ([2] if arguments.quick else [1, 2, 4, 8]))
    report = Report(arguments)
    ways: dict[str, Callable[[], Trained]] = {
        f"lab, {seeds} seeds": lambda seeds=seeds: lab(seeds, arguments.limit, arguments.epochs) for seeds in counts
    }
    ways[WRITE_UPS] = lambda: write_ups(arguments.limit, arguments.epochs)
    trained = interleave(ways, arguments.rounds)
    alone = trained[WRITE_UPS]
    in_round = [
        {seeds: trained[f"lab, {seeds} seeds"][number] for seeds in counts} for number in range(arguments.rounds)
    ]
    walls = {name: Sample(tuple(one.wall for one in trained[name])) for name in ways}
    shares = {name: Sample(tuple(one.rest / one.wall for one in trained[name])) for name in ways}
    ratios, epochs_alone = {}, {}
    for seeds in sorted({*counts, TEN}):
        pairs = list(zip(alone, (estimate(measured, seeds) for measured in in_round), strict=True))
        name = f"write-ups / lab, {seeds} seeds{'' if seeds in counts else ', estimated'}"
        ratios[name] = Sample(tuple((one.rest + seeds * one.epochs) / own.wall for one, own in pairs))
        epochs_alone[f"{name}: epochs alone"] = Sample(tuple(seeds * one.epochs / own.epochs for one, own in pairs))
    report.section("wall time", walls, {**ratios, **epochs_alone}, unit="s")
    report.section("start-up and all else that is no epoch", shares, {}, unit="share of wall time")
    workers = in_round[0][counts[-1]].workers
    report.note(
        f"{arguments.epochs} epoch(s) of {arguments.limit:,} images and an evaluation on all test images; "
        f"{workers} seeds trained at once in the lab. The write-ups' way is measured with one seed; for more, its "
        f"start-up counts once and its epochs as often. Ten seeds of the lab are estimated: {workers} workers need "
        f"{in_round[0][counts[-1]].turns(TEN)} turns for them. A turn takes what the largest study took more "
        f"than one of fewer turns; where there is none, its mean turn."
    )
    report.write()


if __name__ == "__main__":
    main()
