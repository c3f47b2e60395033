"""`make draw`: a page on loopback to draw a digit on, which shows what a network reads while it is drawn."""

import base64
import io
import socket
import sys
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, JSONResponse

from mnist_lab import results
from mnist_lab.errors import LabError
from mnist_lab.measures import percent
from mnist_lab.paths import is_there, tracking_uri
from mnist_lab.reading.pictures import NoDigit, Reader, find_reader, read_digit
from mnist_lab.tracking.server import HOST
from mnist_lab.tracking.store import open_store, search

PAGE = Path(__file__).with_suffix(".html")
MOST_BYTES = 2**20  # of a drawing; the page sends some 10 kB
CONTENT = "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Networks:
    """The networks that a page can choose from, each loaded when it is first asked for."""

    def __init__(self, model: str | None = None, *, store: str | None = None) -> None:
        """Load the network that reads at first, as `find_reader` finds it; raises LabError."""
        self.uri = tracking_uri(store)
        self.first = find_reader(model, tracking_uri=self.uri)
        self._readers = {"": self.first}
        self._lock = threading.Lock()

    @cached_property
    def names(self) -> list[dict[str, str]]:
        """The networks to choose from, with their labels: first, committed, and one of each script that has a model."""
        first = [{"name": "", "shown": self.first.run_name}]
        if (committed := find_reader("docs/results")).run_id != self.first.run_id:
            first.append({"name": "docs/results", "shown": committed.run_name})
        if not is_there(self.uri) or (loaded := results.load_runs(self.uri)).tested.empty:
            return first
        finished = search(open_store(loaded.uri), "attributes.status = 'FINISHED'")
        have_one = {run.info.run_id for run in finished if run.outputs is not None and run.outputs.model_outputs}
        runs = results.newest_runs(results.run_table(columns="all", loaded=loaded))
        runs = runs[runs["run_id"].isin(have_one - {self.first.run_id})].drop_duplicates("step")
        runs = runs.dropna(subset="final_test_accuracy").sort_values("final_test_accuracy", ascending=False)
        shown = runs[["run_id", "step", "seed", "final_test_accuracy"]].itertuples(index=False)
        return first + [
            {"name": f"runs:/{run_id}", "shown": f"{step} seed {seed}, {percent(accuracy)} %"}
            for run_id, step, seed, accuracy in shown
        ]

    def reader(self, name: str) -> Reader:
        """Return a network by its name in `names`; raises LabError if it is none of them or can't be loaded."""
        with self._lock:
            if name not in self._readers:
                if name not in {one["name"] for one in self.names}:
                    raise LabError(f"network: {name!r} is none of those that this page can choose from")
                self._readers[name] = find_reader(name, tracking_uri=self.uri)
            return self._readers[name]

    def read(self, name: str, picture: bytes) -> dict[str, Any]:
        """Return ten probabilities and the 28x28 that the network saw, one byte a pixel; None where no digit is yet."""
        try:
            digit = read_digit(io.BytesIO(picture))
        except NoDigit:
            return {"probabilities": None, "image": None}
        probabilities = self.reader(name).probabilities(digit[None])[0].tolist()
        return {"probabilities": probabilities, "image": base64.b64encode(digit.tobytes()).decode()}


def make_app(networks: Networks) -> FastAPI:
    """Return the app that serves the page and its requests; it answers only to this machine's own names."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @app.get("/")
    def page() -> HTMLResponse:
        headers = {"Content-Security-Policy": CONTENT, "Cache-Control": "no-store"}
        return HTMLResponse(PAGE.read_text("utf-8"), headers=headers)

    @app.get("/networks")
    def names() -> list[dict[str, str]]:
        return networks.names

    @app.post("/read")
    async def read(request: Request, network: str = "") -> JSONResponse:
        if int(request.headers.get("content-length", MOST_BYTES + 1)) > MOST_BYTES:
            return JSONResponse({"sentence": f"a drawing has at most {MOST_BYTES:,} bytes"}, status_code=413)
        try:
            return JSONResponse(await run_in_threadpool(networks.read, network, await request.body()))
        except LabError as error:
            return JSONResponse({"sentence": str(error)}, status_code=422)

    return app


def serve(networks: Networks, port: int) -> None:
    """Serve the page on loopback until interrupted."""
    # An answer under way has two seconds when the server ends.
    config = uvicorn.Config(make_app(networks), log_level="warning", lifespan="off", timeout_graceful_shutdown=2)
    with socket.create_server((HOST, port)) as listening:
        print(f"Draw a digit: http://{HOST}:{port}/\nCtrl-C stops the server.", flush=True)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            print(file=sys.stderr)
