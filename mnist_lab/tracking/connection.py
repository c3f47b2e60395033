"""A tracking server: asked once before a run, waited for during one; and why a store can't be used, cause first."""

import logging
import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress

from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from requests import Timeout
from urllib3.exceptions import ResponseError

from mnist_lab.errors import one_line
from mnist_lab.paths import EXPERIMENT_NAME

SHORT_TIMEOUT = 4  # seconds: who starts a training wants to hear within ten that there is no server
REFUSALS = {
    401: "give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment, or MLFLOW_TRACKING_TOKEN",
    403: f"its admin can permit it, by a permission on the experiment {EXPERIMENT_NAME!r}; or, where the server was "
    "called by another name than its own, by MLFLOW_SERVER_ALLOWED_HOSTS",
}

logger = logging.getLogger(__name__)


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def ask(uri: str) -> None:
    """Ask a server for the experiment, once; OSError with a sentence if it fails, refuses, or is no MLflow server."""
    if not is_server(uri):
        return
    route, params = "/api/2.0/mlflow/experiments/get-by-name", {"experiment_name": EXPERIMENT_NAME}
    once = {"timeout": SHORT_TIMEOUT, "max_retries": 0, "raise_on_status": False}
    credentials = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
    answer = http_request(credentials, route, "GET", params=params, **once)  # type: ignore[no-untyped-call]
    if answer.status_code in REFUSALS:
        raise OSError(f"the server refuses you (HTTP {answer.status_code}): {REFUSALS[answer.status_code]}")
    content = {}
    with suppress(TypeError, ValueError):
        content = dict(answer.json())
    if answer.status_code >= 500:
        token = "it may not take MLFLOW_TRACKING_TOKEN; " if os.environ.get("MLFLOW_TRACKING_TOKEN") else ""
        why = content.get("message") or f"{token}its own log says why"
        raise OSError(f"the server fails (HTTP {answer.status_code}): {why}")
    if not content.keys() & {"experiment", "error_code"}:
        raise OSError(f"what answers there is no MLflow server (HTTP {answer.status_code})")


def why_refused(error: Exception, uri: str = "") -> str:
    """Say why the store at this URI can't be used, the cause first."""
    causes: list[BaseException] = [error]
    for cause in causes:  # with what it came of in turn, as libraries of the network nest it
        inner = [cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args]
        causes += [one for one in inner if isinstance(one, BaseException) and one not in causes]
        status = getattr(getattr(cause, "response", None), "status_code", 0)  # of artifacts
        if isinstance(cause, MlflowException) and is_server(uri):
            status = cause.get_http_status_code()  # type: ignore[no-untyped-call]
        if status in REFUSALS:
            return f"the server refuses you (HTTP {status}): {REFUSALS[status]}"
        match cause:
            case ssl.SSLError() | socket.gaierror() | ConnectionError():
                return f"no connection to the server ({cause.strerror or cause})"
            case Timeout() | TimeoutError():
                return "the server does not answer in time"
            case ResponseError():  # MLflow keeps nothing of a server's answers but their number, so it is asked again
                try:
                    ask(uri)
                except (MlflowException, OSError) as answer:
                    return one_line(answer)
    return one_line(error)


def short_timeouts() -> AbstractContextManager[None]:
    """Let MLflow ask a server only once, with a timeout of seconds, or of MLFLOW_HTTP_REQUEST_TIMEOUT."""
    return patience(SHORT_TIMEOUT, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")


def patience(timeout: int = 30, **more: str) -> AbstractContextManager[None]:
    """Let MLflow wait for a server as it does by itself: seven more attempts, the last after four minutes."""
    # The second suppresses two lines for each run that ends on a server. The jitter would draw from a run's `random`.
    defaults = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout), "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
    more["MLFLOW_HTTP_REQUEST_BACKOFF_JITTER"] = "0"
    return environment_variables(more | {name: os.environ.get(name, value) for name, value in defaults.items()})


def _say_that_it_waits(record: logging.LogRecord) -> bool:
    """Put the lab's words for those of urllib3 before it tries again."""
    if not str(record.msg).startswith("Retrying"):
        return True
    reason = next((why_refused(part) for part in record.args or () if isinstance(part, Exception)), "")
    logger.warning("the tracking server gives no answer, and the run waits for it: %s", reason)
    return False


logging.getLogger("urllib3.connectionpool").addFilter(_say_that_it_waits)


@contextmanager
def environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
