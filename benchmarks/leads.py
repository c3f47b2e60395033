"""What was tried to make a training step faster on a CPU: each lead beside the lab's step, on one resident batch.

python benchmarks/leads.py --threads 1 --experiment step4_augment_steplr
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_lab.data import load_mnist
from mnist_lab.training.dropout import SparseDropout
from mnist_lab.training.loop import normalize

ROOT = Path(__file__).resolve().parents[1]
BATCHES = 469
# Settings that must stand before Python starts, so each is measured in processes of its own.
ENVIRONMENTS = {
    "the lab, transparent huge pages by torch": {"THP_MEM_ALLOC_ENABLE": "1"},
    "the lab, transparent huge pages by glibc": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "the lab, malloc thresholds of 1 GiB": {
        "MALLOC_TRIM_THRESHOLD_": "1073741824",
        "MALLOC_MMAP_THRESHOLD_": "1073741824",
    },
}
Step = Callable[[], None]


def make_step(
    make_net: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    channels_last: bool = True,
    sparse: bool = True,
    compiled: bool = False,
    bf16: bool = False,
    fused: bool = False,
) -> Step:
    net = make_net().train()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=fused or None)
    forward = torch.compile(net) if compiled else net
    context = SparseDropout if sparse else contextlib.nullcontext

    def step() -> None:
        optimizer.zero_grad()
        with context(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()

    return step


def leads(make_net: Callable[..., nn.Module], images: Tensor, labels: Tensor) -> dict[str, Step]:
    make = partial(make_step, make_net, images, labels)
    steps = {
        "torch as it comes": make(channels_last=False, sparse=False),
        "channels_last": make(sparse=False),
        "dropout by gaps": make(channels_last=False),
        "the lab: channels_last and dropout by gaps": make(),
        "the lab, fused SGD": make(fused=True),
        "the lab, bfloat16 autocast": make(bf16=True),
        "torch.compile": make(channels_last=False, sparse=False, compiled=True),
        "torch.compile, channels_last": make(sparse=False, compiled=True),
    }
    if has_dropout(make_net()):
        make = partial(make_step, lambda: make_net(dropout=0.0), images, labels)
        steps["no dropout at all, channels_last"] = make()
        steps["no dropout at all, channels_last, torch.compile"] = make(sparse=False, compiled=True)
    return steps


def has_dropout(net: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) for module in net.modules())


def seconds(step: Step, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", default="step4_augment_steplr")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=15, help="training steps per round")
    parser.add_argument("--lab-only", action="store_true", help="print the lab's seconds per step and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    make_net = runpy.run_path(str(ROOT / "experiments" / f"{arguments.experiment}.py"))["Net"]
    mnist = load_mnist()
    images, labels = normalize(mnist.train_images[:128].float() / 255), mnist.train_labels[:128]

    if arguments.lab_only:
        step = make_step(make_net, images, labels)
        seconds(step, 5)
        print(seconds(step, arguments.steps * 3))
        return
    steps = leads(make_net, images, labels)
    for step in steps.values():
        seconds(step, 3)  # compiles, and makes the optimizer's state
    measured: dict[str, list[float]] = {name: [] for name in [*steps, *ENVIRONMENTS, "the lab, as it is"]}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            seconds(step, 1)
            measured[name].append(seconds(step, arguments.steps))
        for name, settings in [*ENVIRONMENTS.items(), ("the lab, as it is", {})]:
            command = [sys.executable, __file__, "--lab-only", "--threads", str(arguments.threads)]
            command += ["--experiment", arguments.experiment, "--steps", str(arguments.steps)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), **settings}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            measured[name].append(float(done.stdout))

    plain = measured["torch as it comes"]
    print(f"{arguments.experiment}, {arguments.threads} thread(s), batch of 128; medians of {arguments.rounds} rounds")
    print(f"{'':50} {'ms a step':>10} {'s an epoch':>11} {'faster than torch as it comes':>31}")
    for name, values in measured.items():
        ratios = [base / value for base, value in zip(plain, values, strict=True)]
        middle = statistics.median(values)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:50} {1000 * middle:10.1f} {BATCHES * middle:11.1f} {spread:>31}")
    print(json.dumps({"torch": torch.__version__, "medians": {k: statistics.median(v) for k, v in measured.items()}}))


if __name__ == "__main__":
    main()
