"""MLflow's own server with one page more, for `make ui`: /lab, which leads to the runs.

MLflow opens on pages made for language models, with an assistant beside them, until both are put away by hand; the
browser remembers that, and the server can't. This page puts them away before it goes on. `mlflow server --app-name
mnist-lab` finds `make_app` by the entry point in pyproject.toml.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from mnist_lab.paths import EXPERIMENT_NAME
from mnist_lab.tracking.ui import PATH
from mnist_lab.tracking.view import VIEW

if TYPE_CHECKING:
    from fastapi import FastAPI

# What MLflow's pages keep in the browser (its 3.17): which kind of work is done, and that the assistant was shown.
KEPT = {"mlflow.workflowType_v1": "machine_learning", "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True}
PAGE = f"""<!doctype html><html lang="en"><title>mnist_lab</title><p>Opening the runs ...</p><script>
try {{
  for (const [name, value] of Object.entries({json.dumps(KEPT)})) localStorage.setItem(name, JSON.stringify(value))
}} catch (refused) {{ }}
fetch("/ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name={EXPERIMENT_NAME}")
  .then(answer => answer.json())
  .then(found => location.replace(`/#/experiments/${{found.experiment.experiment_id}}/runs?{VIEW}`))
  .catch(() => location.replace("/"))
</script><noscript>MLflow's pages need JavaScript.</noscript></html>"""


def make_app() -> FastAPI:
    """Return the application that is served."""
    from mlflow.server import app as routes  # slow to import, and the command that starts the server looks in here too
    from mlflow.server.fastapi_app import app as served

    # What two runs write at the same moment, one of them writes again (`TrackedRun._log_input`).
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    routes.add_url_rule(PATH, "lab", lambda: PAGE)
    app: FastAPI = served
    return app
