"""Seconds that a recipe trains until its last epoch, evaluations included, beside step 4's, in one process.

The mean accuracy of the last epoch stands beside each, from the published seeds (docs/results): what the time buys.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from measure import ROOT, STEP, Report, Sample, Setting, interleave, load_experiment, make_parser, parse, silenced

from mnist_lab.data import load_mnist
from mnist_lab.results.publish import PUBLISHED
from mnist_lab.results.records import read_runs, rows_of
from training import Task, first, lab, quiet

STEPS = ("five_epochs", "three_epochs", "quick")


def published(step: str) -> str:
    """Return the mean accuracy of a step's published seeds as a text."""
    last = rows_of(step, read_runs(PUBLISHED))["last"].astype("float64").tolist()
    if not last:
        return "no published seeds"
    return f"{statistics.mean(last):.2f} % over {len(last)} {'seed' if len(last) == 1 else 'seeds'}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "time_to_accuracy",
        __doc__,
        rounds=Setting(5, 1, "rounds"),
        images=Setting(12_800, 256, "training images that one measurement takes; at least two batches are"),
        test_images=Setting(5000, 1000, "test images that one measurement takes"),
    )
    scripts = sorted(file.stem for file in (ROOT / "experiments").glob("*.py"))
    text = f"default: {', '.join(STEPS)}"
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=scripts, metavar="STEP", help=text)
    arguments = parse(parser, argv)
    report, mnist = Report(arguments), load_mnist()
    experiments = {step: load_experiment(step) for step in dict.fromkeys([STEP, *arguments.steps])}

    def task(step: str, images: int) -> Task:
        experiment = experiments[step]
        batches = max(2, images // experiment.batch_size)
        return Task(step, experiment, first(mnist, batches * experiment.batch_size, arguments.test_images))

    with silenced():
        for step in experiments:
            lab(task(step, 0))
    measured = interleave({step: quiet(lab, task(step, arguments.images)) for step in experiments}, arguments.rounds)
    seconds = {
        step: Sample([experiments[step].epochs * epoch.total for epoch in epochs]) for step, epochs in measured.items()
    }
    ratios = {f"{step} / {STEP}": seconds[step].per(seconds[STEP]) for step in experiments if step != STEP}
    report.section("All epochs of a recipe", seconds, ratios, unit="s")
    for step, experiment in experiments.items():
        report.note(f"{step}: {experiment.epochs} epochs, then {published(step)}.")
    report.note(
        f"Scaled to whole epochs from {arguments.images:,} training and {arguments.test_images:,} test images in each "
        f"round. What a run does before its first and after its last epoch is left out."
    )
    report.write()


if __name__ == "__main__":
    main()
