"""The points of many runs' metrics at once: MLflow's client asks for one run and one metric at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import sqlalchemy
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

# The limits of a tracking server's route for the histories of several runs, which its own UI uses.
HISTORIES = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
RUNS_PER_REQUEST, POINTS_PER_REQUEST = 100, 25_000

Point = tuple[str, str, int, float | None]  # run id, metric, epoch, value; None stands for NaN


def read_points(uri: str, epochs: Mapping[str, int], metrics: Sequence[str]) -> Iterable[Point]:
    """Return every point of these metrics, in the order of logging.

    epochs: the runs' numbers of epochs by run id; they bound what a server is asked for at a time.

    Raises:
        MlflowException, SQLAlchemyError, OSError: if the store can't be read.
    """
    read = _over_http if uri.startswith(("http://", "https://")) else _by_sql
    return read(uri, epochs, metrics)


def _by_sql(uri: str, epochs: Mapping[str, int], metrics: Sequence[str]) -> list[Point]:
    query = sqlalchemy.text(
        "SELECT run_uuid, key, step, CASE WHEN is_nan THEN NULL ELSE value END FROM metrics "
        "WHERE run_uuid IN :run_ids AND key IN :keys ORDER BY timestamp"
    ).bindparams(sqlalchemy.bindparam("run_ids", expanding=True), sqlalchemy.bindparam("keys", metrics, expanding=True))
    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.connect() as connection:
            rows = connection.execute(query, {"run_ids": list(epochs)})
            return [(run_id, metric, epoch, value) for run_id, metric, epoch, value in rows]
    finally:
        engine.dispose()


def _over_http(uri: str, epochs: Mapping[str, int], metrics: Sequence[str]) -> Iterator[Point]:
    most = max(epochs.values(), default=1)
    at_a_time = max(1, min(RUNS_PER_REQUEST, POINTS_PER_REQUEST // (2 * most)))
    run_ids = list(epochs)
    for first in range(0, len(run_ids), at_a_time):
        for metric in metrics:
            asked = {"run_id": run_ids[first : first + at_a_time], "metric_key": metric}
            response = http_request(get_default_host_creds(uri), HISTORIES, "GET", params=asked)  # type: ignore[no-untyped-call]
            response.raise_for_status()
            for point in response.json()["metrics"]:
                yield point["run_id"], point["key"], int(point["step"]), float(point["value"])
