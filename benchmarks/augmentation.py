"""Images per second of random rotation: the lab's on batches of tensors, PIL's in a DataLoader with two workers.

Both go from uint8 images in memory to float batches of 128 in [0, 1]. The write-ups' rotation takes the nearest pixel,
which is torchvision's default; the lab's is bilinear, so PIL's bilinear one is measured too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import writeups
from measure import STEP, Laps, Report, Sample, Setting, interleave, load_experiment, make_parser, parse
from torch.utils.data import DataLoader
from torchvision import transforms

from mnist_lab.augmentation import random_rotation
from mnist_lab.data import load_mnist
from mnist_lab.training.loop import training_batch
from mnist_lab.training.transforms import Augmentation

BATCH_SIZE, DEGREES = 128, 7.0
LAB, ALONE = "lab", "lab: random_rotation alone"
NEAREST, BILINEAR, NO_ROTATION = "write-ups (nearest pixel)", "write-ups, bilinear", "write-ups without rotation"


def images_per_second(batches: Iterable[object]) -> float:
    """Return the rate from batch to batch: the start of a loader's workers is left out."""
    laps = Laps()
    for _ in batches:
        laps.lap()
    return BATCH_SIZE / laps.batch


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "augmentation",
        __doc__,
        rounds=Setting(5, 1, "rounds"),
        batches=Setting(100, 10, f"batches of {BATCH_SIZE} images in one measurement; at least 2"),
    )
    arguments = parse(parser, argv)
    batches = max(2, arguments.batches)
    report = Report(arguments)
    mnist, augment = load_mnist(), Augmentation(load_experiment(STEP).augmentation)
    order = torch.randperm(batches * BATCH_SIZE)
    ready = mnist.train_images[:BATCH_SIZE].float() / 255

    def lab() -> float:
        return images_per_second(training_batch(mnist, batch, augment) for batch in torch.split(order, BATCH_SIZE))

    def loader(*rotation: Callable[..., object]) -> Callable[[], float]:
        data = writeups.dataset(True, transforms.Compose([*rotation, transforms.ToTensor()]), batches * BATCH_SIZE)
        batched = DataLoader(data, shuffle=True, batch_size=BATCH_SIZE, num_workers=writeups.WORKERS)
        return lambda: images_per_second(batched)

    bounds, bilinear = (-DEGREES, DEGREES), transforms.InterpolationMode.BILINEAR
    ways = {
        LAB: lab,
        ALONE: lambda: images_per_second(random_rotation(ready, DEGREES) for _ in range(batches)),
        NEAREST: loader(transforms.RandomRotation(bounds, fill=0)),
        BILINEAR: loader(transforms.RandomRotation(bounds, interpolation=bilinear, fill=0)),
        NO_ROTATION: loader(),
    }
    lab()  # warm up
    rates = {name: Sample(rounds) for name, rounds in interleave(ways, arguments.rounds).items()}
    ratios = {f"{LAB} / {other}": rates[LAB].per(rates[other]) for other in (NEAREST, BILINEAR, NO_ROTATION)}
    report.section("random rotation", rates, ratios, unit="images/s", goals={f"{LAB} / {NEAREST}": "10 or more"})
    report.note("The lab works in the training process; the loader's two workers have the machine to themselves here.")
    report.write()


if __name__ == "__main__":
    main()
