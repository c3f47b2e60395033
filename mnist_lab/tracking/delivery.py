"""How records reach their run in MLflow: each once, and what a server that was away did not take when it is back."""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, LoggedModelOutput, Metric, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from mlflow.utils.rest_utils import http_request
from requests import RequestException, Timeout
from urllib3.exceptions import ResponseError

from mnist_lab.errors import LabError, one_line
from mnist_lab.paths import EXPERIMENT_NAME, sqlite_file
from mnist_lab.tracking.outbox import Outbox, Record, all_outboxes

SERVER_TIMEOUT = 4  # seconds that a training waits for a server; MLflow's own two minutes would hold it up

PAUSES = (0.05, 0.2, 0.5)  # seconds until what another run was writing at the same moment is written
WRITTEN_BY_ANOTHER = ("unique constraint", "duplicate entry", "duplicate key")  # in the words of the databases


@dataclass(frozen=True)
class Delivery:
    """What came of sending one run's records: how many were sent, how many still wait, and why.

    target: the URI of their store, without its password; empty where the outbox does not say.
    """

    target: str
    run_id: str
    sent: int
    waiting: int
    reason: str = ""


def sync(uri: str) -> list[Delivery]:
    """Send what waits for a tracking store, each run's records in their order.

    uri: of the store. What waits in its folder for another one is not sent, and neither is what can't be read: the
        folder may come from elsewhere. Runs whose process still has records of its own to send are left to it.
    """
    deliveries = []
    away = ""  # why the server gives no answer
    for outbox in all_outboxes(uri):
        if not outbox.lock():
            continue
        try:
            before = len(outbox.waiting())
            if not before:  # another process has sent it all since
                continue
            target, reason = "", away
            try:
                target = outbox.target(uri)
                if not away:
                    ask(uri)
                    send_waiting(mlflow.MlflowClient(tracking_uri=uri), outbox)
            except Exception as error:  # what is wrong with one run's records concerns no other's
                reason = why_refused(error)
                away = reason if is_away(uri, error) else away
            waiting = len(outbox.waiting())
            deliveries.append(Delivery(target, outbox.run_id, before - waiting, waiting, reason))
        finally:
            outbox.unlock()
    return deliveries


def send_waiting(client: mlflow.MlflowClient, outbox: Outbox) -> int:
    """Send the records in their order, each forgotten when it is sent, and return how many they were."""
    waiting = outbox.waiting()
    for entry in waiting:
        with briefly():
            send(client, outbox.run_id, outbox.read(entry))
        outbox.remove(entry)
    return len(waiting)


def send(client: mlflow.MlflowClient, run_id: str, record: Record) -> None:
    """Write a record into its run. Sent twice, it is there once: an answer can be lost after a record was written.

    Two runs can both be the first to write what MLflow keeps once, such as a data set; the database then refuses one of
    them, which finds it there when it tries again.
    """
    for pause in PAUSES:
        try:
            return _send_once(client, run_id, record)
        except MlflowException as error:
            if not any(word in str(error).lower() for word in WRITTEN_BY_ANOTHER):
                raise
        time.sleep(pause)
    return _send_once(client, run_id, record)


def _send_once(client: mlflow.MlflowClient, run_id: str, record: Record) -> None:
    content = record.content
    match record.kind:
        case "metrics":  # MLflow drops a point that it has, with the same time and value
            timestamp, step = content["timestamp"], content["step"]
            metrics = [Metric(name, value, timestamp, step) for name, value in content["values"].items()]
            client.log_batch(run_id, metrics=metrics)
        case "tags":
            client.log_batch(run_id, tags=[RunTag(name, value) for name, value in content.items()])
        case "artifact":
            client.log_artifact(run_id, str(record.path), content["folder"])
        case "dataset":
            tags = [InputTag(MLFLOW_DATASET_CONTEXT, content["context"])]
            client.log_inputs(run_id, [DatasetInput(Dataset(**content["dataset"]), tags)])
        case "model":
            assert record.path is not None
            _send_model(client, run_id, content["name"], content["step"], record.path)
        case "end":
            client.set_terminated(run_id, content["status"], content["end_time"])
        case _:  # from elsewhere, or of a newer version of the lab
            raise LabError(f"a record is of an unknown kind, {record.kind!r}")


def _send_model(client: mlflow.MlflowClient, run_id: str, name: str, step: int, folder: Path) -> None:
    """Make a saved model the run's, in the steps of `mlflow.pytorch.log_model`, which can't be taken up half-way."""
    run = client.get_run(run_id)
    logged = _logged_model(client, run, name)
    try:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
    except MlflowException:  # MLflow refuses one that it has
        outputs = client.get_run(run_id).outputs
        if outputs is None or logged.model_id not in {output.model_id for output in outputs.model_outputs}:
            raise
    points = [point for key in run.data.metrics for point in client.get_metric_history(run_id, key)]
    at_step = [point for point in points if point.step == step]
    metrics = [Metric(p.key, p.value, p.timestamp, step, logged.model_id, run_id=run_id) for p in at_step]
    client.log_batch(run_id, metrics=metrics)
    model = Model.load(str(folder))
    model.run_id, model.model_id, model.model_uuid = run_id, logged.model_id, logged.model_id
    model.artifact_path = logged.artifact_location
    new = folder / "MLmodel.new"
    model.save(str(new))
    new.replace(folder / "MLmodel")  # it is sent again if this process is killed
    client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")


def _logged_model(client: mlflow.MlflowClient, run: Run, name: str) -> LoggedModel:
    """Return the run's model of that name, made if there is none.

    A slow server can make one for a request that was given up, after a second one was made; the oldest stays.
    """

    def there() -> list[LoggedModel]:
        of_run = f"source_run_id = '{run.info.run_id}'"
        models = client.search_logged_models([run.info.experiment_id], of_run)
        return sorted((model for model in models if model.name == name), key=lambda model: model.creation_timestamp)

    info = run.info
    if not (models := there()):
        client.create_logged_model(info.experiment_id, name, info.run_id, tags=resolve_tags(), params=run.data.params)
        models = there()
    for surplus in models[1:]:
        client.delete_logged_model(surplus.model_id)
    return models[0]


def ask(uri: str) -> None:
    """Ask a server for the experiment, once: MLflow itself would try again for longer than a user waits.

    Raises:
        ValueError: if what answers is no MLflow server, or refuses the user; in a sentence.
        MlflowException, RequestException: if there is no answer.
    """
    if not uri.startswith(("http://", "https://")):
        return
    answer = http_request(  # type: ignore[no-untyped-call]
        get_default_host_creds(uri),  # type: ignore[no-untyped-call]
        "/api/2.0/mlflow/experiments/get-by-name",
        "GET",
        params={"experiment_name": EXPERIMENT_NAME},
        timeout=SERVER_TIMEOUT,
        max_retries=0,
    )
    if answer.status_code == 403 and "Host header" in answer.text:
        raise ValueError(
            f"the server does not answer to the name {urlsplit(uri).netloc.rpartition('@')[2]!r}: call it by another "
            "one, or start it with MLFLOW_SERVER_ALLOWED_HOSTS"
        )
    if answer.status_code in (401, 403):
        raise ValueError(
            f"the server refuses you (HTTP {answer.status_code}): give MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
        )
    try:
        content = answer.json()
    except ValueError:
        content = None
    if not isinstance(content, dict) or not content.keys() & {"experiment", "error_code"}:
        raise ValueError(f"what answers there is no MLflow server (HTTP {answer.status_code})")


def why_refused(error: Exception) -> str:
    """Say why a store can't be used, the cause first: what a server or the network says of it can be long."""
    for cause in _causes(error):
        match cause:
            case ssl.SSLCertVerificationError():
                return (
                    f"the server's certificate is not trusted ({cause.verify_message}); if it should be, name the file "
                    "of its authority in MLFLOW_TRACKING_SERVER_CERT_PATH"
                )
            case ssl.SSLError():
                return f"the server and this machine can't agree on a secure connection ({cause.reason or cause})"
            case socket.gaierror():
                return f"its host's name can't be resolved ({cause.strerror})"
            case ConnectionRefusedError():
                return f"no server listens there ({cause.strerror})"
            case Timeout() | TimeoutError():
                return f"the server does not answer within {SERVER_TIMEOUT} seconds"
            case ResponseError():
                return f"the server answers that it fails ({cause})"
    return one_line(error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it came of, as libraries of the network nest it."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        inner = [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]
        waiting += [cause for cause in inner if isinstance(cause, BaseException)]


def is_away(uri: str, error: Exception) -> bool:
    """Say whether a server gave no answer, or said that the fault is its own. What it refuses stays an error."""
    if sqlite_file(uri) is not None:
        return False
    if isinstance(error, MlflowException):
        return bool(error.get_http_status_code() >= 500)  # type: ignore[no-untyped-call]
    return isinstance(error, RequestException) and (error.response is None or error.response.status_code >= 500)


def briefly() -> AbstractContextManager[None]:
    """Let MLflow ask a server once, and wait for it no longer than a training should, or as long as the user has said.

    It prints nothing of its own meanwhile. MLflow's own repetitions could write a thing twice; `send` looks first.
    """
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    if "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT" not in os.environ:
        limits["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # two lines for each run that ends on a server
    if "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ:
        limits["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(SERVER_TIMEOUT)
    return environment_variables(limits)


@contextmanager
def environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set these variables of the environment within this context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
