"""A study of several seeds of step 4 by the lab, against the write-ups' way: one training after another.

Whole processes, from start to end, on few images and epochs. Start-up (imports, first use of a store, figures, models,
all that is not an epoch) weighs much more here than in full runs, so its share is shown, and the ratio without it,
which is what long runs come near.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from measure import STEP, Report, Sample, Setting, interleave, make_parser, parse, run_fresh, script_of, temporary_store

from mnist_lab import results
from mnist_lab.commandline import number_from

WRITE_UPS = "write-ups, 1 seed"


@dataclass(frozen=True)
class Trained:
    """Some seeds trained: wall seconds of all, and of these in epochs."""

    wall: float
    epochs: float

    @property
    def rest(self) -> float:
        """Seconds of start-up and all else that is no epoch."""
        return self.wall - self.epochs

    def repeated(self, seeds: int) -> Trained:
        """Return what so many seeds take one after another, of which one was measured; start-up counts once."""
        return Trained(self.rest + seeds * self.epochs, seeds * self.epochs)


def lab(seeds: int, workers: int, limit: int, epochs: int) -> Trained:
    """Train a study in a fresh process, into a store that does not exist yet."""
    with temporary_store() as uri:
        flags = ("--limit", limit, "--epochs", epochs, "--workers", workers, "--tracking-uri", uri)
        process = run_fresh(script_of(STEP), "--seeds", seeds, *flags)
        history = results.epoch_history(include_overrides=True, tracking_uri=uri)
    assert len(history) == seeds * epochs, f"{len(history)} of {seeds * epochs} epochs were trained"
    return Trained(process.wall, history["epoch_seconds"].sum() / min(workers, seeds))


def write_ups(limit: int, epochs: int) -> Trained:
    """Train one seed in a fresh process in the way of the write-ups."""
    process = run_fresh("benchmarks/writeups.py", STEP, "--images", limit, "--epochs", epochs)
    return Trained(process.wall, sum(epoch["seconds"] for epoch in process.result))


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "study",
        __doc__,
        rounds=Setting(2, 1, "rounds"),
        limit=Setting(6000, 128, "training images of each epoch"),
        epochs=Setting(1, 1, "epochs"),
        workers=Setting(os.cpu_count() or 1, 2, "seeds that the lab trains at once"),
    )
    text = "default 1 2 4 10, with --quick 2"
    parser.add_argument("--seeds", type=number_from(1), nargs="+", metavar="N", help=text)
    arguments = parse(parser, argv)
    counts = sorted(arguments.seeds or ([2] if arguments.quick else [1, 2, 4, 10]))
    report = Report(arguments)
    sizes = (arguments.limit, arguments.epochs)
    ways = {f"lab, {seeds} seeds": partial(lab, seeds, arguments.workers, *sizes) for seeds in counts}
    trained = interleave({**ways, WRITE_UPS: partial(write_ups, *sizes)}, arguments.rounds)
    walls = {name: Sample([one.wall for one in rounds]) for name, rounds in trained.items()}
    shares = {name: Sample([one.rest / one.wall for one in rounds]) for name, rounds in trained.items()}
    ratios = {}
    for seeds, name in zip(counts, ways, strict=True):
        pairs = [(alone.repeated(seeds), own) for alone, own in zip(trained[WRITE_UPS], trained[name], strict=True)]
        ratios[f"write-ups / {name}"] = Sample([alone.wall / own.wall for alone, own in pairs])
        ratios[f"write-ups / {name}: epochs alone"] = Sample([alone.epochs / own.epochs for alone, own in pairs])
    report.section("wall time", walls, ratios, unit="s")
    report.section("start-up and all else that is no epoch", shares, {}, unit="share of wall time")
    report.note(
        f"{arguments.epochs} epoch(s) of {arguments.limit:,} images and an evaluation on all test images; the lab "
        f"trains {arguments.workers} seeds at once. The write-ups' way is measured with one seed; for more, its "
        f"start-up counts once and its epochs as often."
    )
    report.write()


if __name__ == "__main__":
    main()
