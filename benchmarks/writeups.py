"""The way of the write-ups, as their notebooks train: what the lab is measured against.

    python benchmarks/writeups.py [STEP] [--epochs N] [--images N]

torchvision's data set with transforms on single PIL images, a DataLoader with two workers, a progress bar with loss
and accuracy after each batch, and an evaluation by a DataLoader after each epoch. Started as a script it trains one
seed, and prints the seconds and the test accuracy of each epoch as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import STEP, TEST_IMAGES, TRAIN_IMAGES, load_experiment
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from tqdm import tqdm

from mnist_lab.data import find_data_dir, load_mnist

WORKERS = 2
Loader = DataLoader[tuple[Tensor, Tensor]]
OnBatch = Callable[[], None]
# What stands before ToTensor and Normalize. Where no interpolation is given, torchvision takes the nearest pixel.
AUGMENTATIONS: dict[str, list[Callable[..., object]]] = {
    "step4_augment_steplr": [transforms.RandomRotation((-7.0, 7.0), fill=0)],
    "four_conv": [
        transforms.RandomApply([transforms.CenterCrop(22)], p=0.1),
        transforms.Resize((28, 28)),
        transforms.RandomRotation((-15.0, 15.0), fill=0),
    ],
}


def dataset(train: bool, transform: Callable[..., object], images: int) -> datasets.MNIST:
    """Return the first so many images of torchvision's MNIST."""
    data = datasets.MNIST(str(find_data_dir()), train=train, transform=transform)
    data.data, data.targets = data.data[:images], data.targets[:images]
    return data


def loaders(
    step: str, batch_size: int, *, images: int = TRAIN_IMAGES, test_images: int = TEST_IMAGES
) -> tuple[Loader, Loader]:
    """Return the loaders of training and test images."""
    to_input = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    train_data = dataset(True, transforms.Compose([*AUGMENTATIONS.get(step, []), *to_input]), images)
    test_data = dataset(False, transforms.Compose(to_input), test_images)
    pinned = torch.cuda.is_available()
    arguments = {"shuffle": True, "batch_size": batch_size, "num_workers": WORKERS, "pin_memory": pinned}
    return DataLoader(train_data, **arguments), DataLoader(test_data, **arguments)


def train(
    model: nn.Module, device: torch.device, train_loader: Loader, optimizer: Optimizer, on_batch: OnBatch = lambda: None
) -> tuple[list[float], list[float]]:
    """Train for one epoch; return the loss and the running accuracy in percent after each batch."""
    losses, accuracies = [], []
    model.train()
    bar = tqdm(train_loader)
    correct = 0
    processed = 0
    for batch_idx, (data, target) in enumerate(bar):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = model(data)
        loss = F.cross_entropy(output, target)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        prediction = output.argmax(dim=1, keepdim=True)
        correct += prediction.eq(target.view_as(prediction)).sum().item()
        processed += len(data)
        accuracy = 100 * correct / processed
        bar.set_description(desc=f"Loss={losses[-1]} Batch_id={batch_idx} Accuracy={accuracy:0.2f}")
        accuracies.append(accuracy)
        on_batch()
    return losses, accuracies


def evaluate(
    model: nn.Module, device: torch.device, test_loader: Loader, on_batch: OnBatch = lambda: None
) -> tuple[float, float]:
    """Return mean loss and accuracy in percent, and print them."""
    model.eval()
    test_loss = 0.0
    correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            data, target = data.to(device), target.to(device)
            output = model(data)
            test_loss += F.cross_entropy(output, target, reduction="sum").item()
            prediction = output.argmax(dim=1, keepdim=True)
            correct += prediction.eq(target.view_as(prediction)).sum().item()
            on_batch()
    total = len(test_loader.dataset)
    test_loss /= total
    print(f"\nTest set: Average loss: {test_loss:.4f}, Accuracy: {correct}/{total} ({100 * correct / total:.2f}%)\n")
    return test_loss, 100 * correct / total


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", default=STEP)
    parser.add_argument("--epochs", type=int, help="default: as declared")
    parser.add_argument("--images", type=int, default=TRAIN_IMAGES, help="train on the first so many (default: all)")
    arguments = parser.parse_args(argv)
    load_mnist()  # fetches and verifies the files where need be
    experiment = load_experiment(arguments.step)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = experiment.net().to(device)
    train_loader, test_loader = loaders(arguments.step, experiment.batch_size, images=arguments.images)
    optimizer = experiment.optimizer(model.parameters())
    scheduler = experiment.scheduler(optimizer) if experiment.scheduler is not None else None
    epochs = []
    for epoch in range(1, (arguments.epochs or experiment.epochs) + 1):
        start = time.perf_counter()
        train(model, device, train_loader, optimizer)
        if scheduler is not None:
            scheduler.step()
        print(f"EPOCH: {epoch}")
        _, accuracy = evaluate(model, device, test_loader)
        epochs.append({"epoch": epoch, "seconds": time.perf_counter() - start, "test_accuracy": accuracy})
    json.dump(epochs, sys.stdout)


if __name__ == "__main__":
    main()
