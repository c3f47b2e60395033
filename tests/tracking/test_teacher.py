"""A teacher is found in the store and loaded as it was trained; one that can't teach is refused before any training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from torch import nn
from torch.optim import SGD

from helpers import TrackedRun, read_runs
from mnist_lab import Experiment
from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.objectives import distillation
from mnist_lab.running import run as runner
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress
from mnist_lab.running.run import with_teacher
from mnist_lab.tracking.connection import environment_variables
from mnist_lab.tracking.models import Teacher, find_teacher, load_teacher
from mnist_lab.tracking.store import open_store

CPU = torch.device("cpu")


STUDENT: Any = partial(distillation, teacher="large", temperature=2.0, weight=0.5)


def net(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))


@pytest.fixture
def train(small_mnist: Mnist, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrackedRun]:
    monkeypatch.setattr(runner, "load_mnist", lambda folder, device: small_mnist)
    monkeypatch.setattr(runner, "hold_out", lambda mnist, count: mnist)

    def train(name: str, seed: int = 0, holdout: int = 0, **changes: Any) -> TrackedRun:
        script = tmp_path / f"{name}.py"
        script.touch()
        fields: dict[str, Any] = {"net": net, "epochs": 1, "batch_size": 100, "optimizer": partial(SGD, lr=0.05)}
        experiment = Experiment(**(fields | changes))
        runner.run(Job(script=script, experiment=experiment, tracking_uri=uri, threads=1), seed, Progress())
        run = read_runs(Path(uri.removeprefix("sqlite:///")))[-1]
        if holdout:
            client = mlflow.MlflowClient(tracking_uri=uri)
            client.log_param(run.run_id, "holdout", holdout)
        return run

    return train


def test_a_teacher_is_found_by_its_run_model_or_script(train: Callable[..., TrackedRun], uri: str) -> None:
    store = open_store(uri)
    older, run = train("large"), train("large", seed=1)
    client = mlflow.MlflowClient(tracking_uri=uri)
    model_id = client.get_run(run.run_id).outputs.model_outputs[0].model_id
    with environment_variables({"MLFLOW_TRACKING_URI": uri}):
        mlflow.register_model(f"runs:/{run.run_id}/large", "teacher")
    client.set_registered_model_alias("teacher", "best", "1")

    declared = [
        f"runs:/{run.run_id}/model",
        f"runs:/{run.run_id}/large",
        "models:/teacher/1",
        "models:/teacher@best",
        f"models:/{model_id}",
        "large",
    ]
    found = [find_teacher(store, one, holdout=0) for one in declared]

    assert {one.run_id for one in found} == {run.run_id}
    assert len(set(found)) == 1
    assert find_teacher(store, f"runs:/{older.run_id}/model", holdout=0).sha256 != found[0].sha256


def test_a_teacher_is_loaded_frozen(train: Callable[..., TrackedRun], uri: str, small_mnist: Mnist) -> None:
    run = train("large", normalize=(0.5, 0.5))
    store = open_store(uri)
    teacher = find_teacher(store, "large", holdout=0)

    own = load_teacher(store, teacher, CPU, (0.5, 0.5))
    other = load_teacher(store, teacher, CPU, (0.1307, 0.3081))

    images = small_mnist.test_images[:50].float() / 255
    given = own((images - 0.5) / 0.5)
    torch.testing.assert_close(other((images - 0.1307) / 0.3081), given, atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in own.parameters())
    correct = (own((small_mnist.test_images.float() / 255 - 0.5) / 0.5).argmax(1) == small_mnist.test_labels).sum()
    assert 100 * correct.item() / 300 == pytest.approx(run.metrics["final_test_accuracy"][0][1])


def test_a_student_keeps_its_teacher(train: Callable[..., TrackedRun], uri: str, tmp_path: Path) -> None:
    teacher = train("large")
    run = train("small", objective=STUDENT)

    assert run.tags["teacher_run_id"] == teacher.run_id
    assert len(run.tags["teacher_sha256"]) == 64
    assert run.params["teacher"] == "large"
    assert run.metrics["num_params"] == [(0, 7850)]  # the teacher's do not count

    store = open_store(uri)
    experiment = Experiment(net=net, epochs=1, batch_size=64, optimizer=partial(SGD, lr=0.1), objective=STUDENT)
    job = Job(script=tmp_path / "small.py", experiment=experiment, tracking_uri=uri)
    begun = with_teacher(job, store)
    train("large", seed=1)
    assert begun.teacher is not None
    assert with_teacher(job, store, begun.identity).teacher == begun.teacher
    assert begun.teacher.run_id == teacher.run_id
    assert with_teacher(job, store).teacher != begun.teacher


def test_a_teacher_that_is_not_there_or_not_finished_is_refused(train: Callable[..., TrackedRun], uri: str) -> None:
    store, client = open_store(uri), mlflow.MlflowClient(tracking_uri=uri)
    run = train("large")
    refused = {
        "runs:/0123456789abcdef0123456789abcdef/model": "Run with id=0123456789abcdef.* not found",
        f"runs:/{run.run_id}/other": f"run {run.run_id} \\(FINISHED\\) has no model 'other'",
        "models:/nobody/3": "Registered Model with name=nobody not found",
        "s3://bucket/model": "is neither runs:/<id>/model nor models:/<name>/<version> nor the name of a script",
        "unheard_of": "has no finished run of that script as declared; train it first",
    }
    for declared, sentence in refused.items():
        with pytest.raises(LabError, match=f"^objective: teacher.* ?({sentence})"):
            find_teacher(store, declared, holdout=0)
    client.set_terminated(run.run_id, "FAILED")
    with pytest.raises(LabError, match=f"run {run.run_id} is FAILED, not FINISHED"):
        find_teacher(store, f"runs:/{run.run_id}/model", holdout=0)
    with pytest.raises(LabError, match="no finished run of that script"):
        find_teacher(store, "large", holdout=0)
    client.delete_run(run.run_id)
    with pytest.raises(LabError, match=f"run {run.run_id} is deleted, not FINISHED"):
        find_teacher(store, f"runs:/{run.run_id}/model", holdout=0)


def test_a_teacher_that_has_seen_the_images_held_out_is_refused(train: Callable[..., TrackedRun], uri: str) -> None:
    store = open_store(uri)
    run = train("large")

    with pytest.raises(LabError, match=f"run {run.run_id} held out 0 images, and so has seen some of the 5000"):
        find_teacher(store, f"runs:/{run.run_id}/model", holdout=5000)
    with pytest.raises(LabError, match="as declared with --holdout 5000; train it first"):
        find_teacher(store, "large", holdout=5000)
    held_out = train("large", seed=1, holdout=5000)
    assert find_teacher(store, "large", holdout=5000).run_id == held_out.run_id
    assert find_teacher(store, "large", holdout=0).run_id == run.run_id


def test_a_model_that_is_pickled_or_changed_is_refused(train: Callable[..., TrackedRun], uri: str) -> None:
    store, run = open_store(uri), train("large")
    with environment_variables({"MLFLOW_TRACKING_URI": uri}), mlflow.start_run(run_id=run.run_id):
        mlflow.pytorch.log_model(net(), name="pickled", serialization_format="pickle")
        example = torch.zeros(2, 1, 28, 28).numpy()
        mlflow.pytorch.log_model(net(9).eval(), name="nine", serialization_format="pt2", input_example=example)

    with pytest.raises(LabError, match="it is not kept by torch.export, so loading it might run code"):
        find_teacher(store, f"runs:/{run.run_id}/pickled", holdout=0)
    nine = find_teacher(store, f"runs:/{run.run_id}/nine", holdout=0)
    with pytest.raises(LabError, match=r"gives an output of shape \(2, 9\) for 2 images, not \(2, 10\)"):
        load_teacher(store, nine, CPU, (0.1307, 0.3081))
    changed = Teacher(nine.model_id, nine.run_id, "0" * 64)
    with pytest.raises(LabError, match="its file is another one than its digest says"):
        load_teacher(store, changed, CPU, (0.1307, 0.3081))
