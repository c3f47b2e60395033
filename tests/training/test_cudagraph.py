"""A batch's work as a CUDA graph: the same training. What needs a CUDA device is marked and skips without one."""

import dataclasses
import logging
import random
from collections.abc import Callable
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from mnist_lab.data import Mnist, load_mnist
from mnist_lab.experiment import Experiment
from mnist_lab.running.run import initial_network
from mnist_lab.training.cudagraph import WARM_UP_BATCHES, Captured, _drawn_on_the_cpu
from mnist_lab.training.loop import EpochMetrics, fit
from mnist_lab.training.stacked import fit_stacked

Load = Callable[[str], ModuleType]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def test_on_a_cpu_every_batch_is_worked_on_as_it_comes() -> None:
    seen: list[list[int]] = []
    captured = Captured(lambda batch: seen.append(batch.tolist()))

    for start in range(WARM_UP_BATCHES + 3):
        captured(torch.arange(start, start + 2), key=0.1)

    assert seen == [[start, start + 1] for start in range(WARM_UP_BATCHES + 3)]
    assert captured.graphs == {}


@pytest.fixture
def on_cuda() -> Mnist:
    mnist = load_mnist(device="cuda")
    return dataclasses.replace(mnist, train_images=mnist.train_images[:3000], train_labels=mnist.train_labels[:3000])


def step4(load_script: Load, **changes: object) -> Experiment:
    """Return step 4 without its random parts and with a schedule that asks for a new graph after the first epoch."""
    script = load_script("step4_augment_steplr")
    still = {"net": partial(script.Net, dropout=0.0), "augmentation": None}
    schedule = partial(StepLR, step_size=1, gamma=0.5)
    return dataclasses.replace(script.EXPERIMENT, epochs=2, scheduler=schedule, **{**still, **changes})


def train(experiment: Experiment, mnist: Mnist, seed: int = 0) -> tuple[nn.Module, list[EpochMetrics]]:
    net = initial_network(experiment, seed, mnist.train_images.device)
    return net, list(fit(net, experiment, mnist, seed=seed))


@needs_cuda
@pytest.mark.gpu
def test_a_graph_trains_as_single_launches_do(
    load_script: Load, on_cuda: Mnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = step4(load_script)
    net, epochs = train(experiment, on_cuda)
    monkeypatch.setattr("mnist_lab.training.cudagraph.WARM_UP_BATCHES", 10**9)  # never captured
    launched_net, launched = train(experiment, on_cuda)

    for graphed, single in zip(epochs, launched, strict=True):
        assert graphed.train_loss == pytest.approx(single.train_loss, rel=1e-2)
        assert graphed.lr == single.lr
    first, second = (torch.cat([p.flatten() for p in one.parameters()]) for one in (net, launched_net))
    assert torch.nn.functional.cosine_similarity(first, second, dim=0) > 0.99


@needs_cuda
@pytest.mark.gpu
def test_dropout_and_augmentation_draw_anew_in_each_launch_of_a_graph(on_cuda: Mnist) -> None:
    drawn = torch.zeros(4, device="cuda")
    captured = Captured(lambda batch: drawn.copy_(torch.rand(4, device="cuda")))
    results = []
    for _ in range(WARM_UP_BATCHES + 5):
        captured(torch.zeros(1, dtype=torch.int64, device="cuda"), key=0.1)
        results.append(tuple(drawn.tolist()))
    assert len(captured.graphs) == 1
    assert len(set(results)) == len(results)


@needs_cuda
@pytest.mark.gpu
def test_work_that_reads_a_value_goes_on_without_a_graph(on_cuda: Mnist, caplog: pytest.LogCaptureFixture) -> None:
    total = torch.zeros((), device="cuda")

    def work(batch: Tensor) -> None:
        total.add_(batch.sum().item())

    captured = Captured(work)
    with caplog.at_level(logging.WARNING):
        for _ in range(WARM_UP_BATCHES + 4):
            captured(torch.ones(2, device="cuda"), key=0.1)
    assert total.item() == 2 * (WARM_UP_BATCHES + 4)
    assert [record.message[:14] for record in caplog.records] == ["no CUDA graph,"]


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), random.random, np.random.rand])
def test_work_that_draws_on_the_cpu_goes_on_without_a_graph(draw: Callable[[], float]) -> None:
    results: list[Tensor] = []
    captured = Captured(lambda batch: results.append(batch * draw()))
    for _ in range(WARM_UP_BATCHES + 4):
        captured(torch.ones(1, device="cuda"), key=0.1)

    assert captured.refused
    assert len({result.item() for result in results[-3:]}) == 3


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random, np.random.rand])
def test_a_number_that_is_drawn_on_the_cpu_is_noticed(draw: Callable[[], object]) -> None:
    before = _drawn_on_the_cpu()
    assert _drawn_on_the_cpu() == before

    draw()

    assert _drawn_on_the_cpu() != before


@needs_cuda
@pytest.mark.gpu
def test_stacked_seeds_train_as_separate_ones_on_cuda(load_script: Load, on_cuda: Mnist) -> None:
    experiment = step4(load_script)
    nets = [initial_network(experiment, seed, torch.device("cuda")) for seed in (0, 1)]
    *_, stacked = fit_stacked(nets, experiment, on_cuda, (0, 1))
    for seed, metrics in zip((0, 1), stacked, strict=True):
        _, alone = train(experiment, on_cuda, seed)
        assert metrics.train_loss == pytest.approx(alone[-1].train_loss, rel=2e-2)
