"""Averaged weights are what is evaluated, judged, kept and logged; the network itself is trained on as it is."""

from functools import partial
from pathlib import Path

import mlflow
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers import read_runs
from mnist_lab.data import Mnist
from mnist_lab.running import run as runner
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress
from mnist_lab.training.loop import evaluate, num_params, predict
from networks import Small, declare, train

EMA = partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
averaged = partial(declare, net=Small, average=EMA)


def test_the_average_is_torchs_over_the_batches(small_mnist: Mnist) -> None:
    weights: list[Tensor] = []

    class Watched(Small):
        def forward(self, images: Tensor) -> Tensor:
            weights.append(self[6].weight.detach().clone())
            return super().forward(images)

    training, _ = train(averaged(net=Watched, epochs=1), small_mnist)

    _, first, *others = [*weights[:4], training.net[6].weight]  # type: ignore[index,misc]
    expected = first
    for later in others:
        expected = 0.7 * expected + 0.3 * later
    torch.testing.assert_close(training.result[6].weight, expected)  # type: ignore[index]


def test_averaging_leaves_the_training_as_it_is_and_both_accuracies_are_reported(small_mnist: Mnist) -> None:
    _, raw = train(declare(net=Small), small_mnist)
    training, epochs = train(averaged(), small_mnist)

    assert [(one.train_loss, one.raw_correct) for one in epochs] == [(one.train_loss, one.eval_correct) for one in raw]
    assert {one.raw_correct for one in raw} == {None}
    assert (epochs[-1].eval_loss, epochs[-1].eval_correct) == evaluate(
        predict(training.result, small_mnist.test_images), small_mnist.test_labels
    )
    assert epochs[-1].eval_loss != raw[-1].eval_loss


def frozen(net: nn.Module) -> AveragedModel:
    return EMA(net).requires_grad_(False)


def test_a_run_logs_the_average_as_its_model_with_both_numbers_of_the_normalisation(
    uri: str, database: Path, small_mnist: Mnist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "load_mnist", lambda folder, device: small_mnist)
    script = tmp_path / "averaged.py"
    script.touch()
    job = Job(script=script, experiment=averaged(normalize=(0.5, 0.5), average=frozen), tracking_uri=uri, threads=1)

    result = runner.run(job, 0, Progress())

    (run,) = read_runs(database)
    mlflow.set_tracking_uri(uri)
    try:
        model = mlflow.pytorch.load_model(f"runs:/{run.run_id}/averaged")
        metadata = mlflow.models.get_model_info(f"runs:/{run.run_id}/averaged").metadata
    finally:
        mlflow.set_tracking_uri(None)
    mean, deviation = metadata["normalize"]
    logits = model((small_mnist.test_images.float() / 255 - mean) / deviation)
    assert (logits.argmax(1) == small_mnist.test_labels).sum().item() == result.epochs[-1].eval_correct
    assert run.metrics["raw_test_accuracy"] == [(epoch.epoch, epoch.raw_accuracy) for epoch in result.epochs]
    assert run.metrics["num_params"][0][1] == num_params(Small())
    assert run.params["average"] == "frozen"
