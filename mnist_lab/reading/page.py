"""`make draw`: a page on loopback to draw a digit on, which shows what a network reads while it is drawn."""

import base64
import io
import socket
import sys
from html import escape
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, JSONResponse

from mnist_lab.errors import LabError
from mnist_lab.reading.pictures import NoDigit, Reader, read_digit
from mnist_lab.tracking.server import HOST

PAGE = Path(__file__).with_suffix(".html")
MOST_BYTES = 2**20  # of a drawing; the page sends some 10 kB
CONTENT = "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def read(reader: Reader, picture: bytes) -> dict[str, Any]:
    """Return ten probabilities and the 28x28 that the network saw, one byte a pixel; None where no digit is yet."""
    try:
        digit = read_digit(io.BytesIO(picture))
    except NoDigit:
        return {"probabilities": None, "image": None}
    probabilities = reader.probabilities(digit[None])[0].tolist()
    return {"probabilities": probabilities, "image": base64.b64encode(digit.tobytes()).decode()}


def make_app(reader: Reader) -> FastAPI:
    """Return the page and what it asks for; it answers to this machine's own names only."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @app.get("/")
    def page() -> HTMLResponse:
        headers = {"Content-Security-Policy": CONTENT, "Cache-Control": "no-store"}
        return HTMLResponse(PAGE.read_text("utf-8").replace("NETWORK", escape(reader.run_name)), headers=headers)

    @app.post("/read")
    async def answer(request: Request) -> JSONResponse:
        if int(request.headers.get("content-length", MOST_BYTES + 1)) > MOST_BYTES:
            return JSONResponse({"sentence": f"a drawing has at most {MOST_BYTES:,} bytes"}, status_code=413)
        try:
            return JSONResponse(await run_in_threadpool(read, reader, await request.body()))
        except LabError as error:
            return JSONResponse({"sentence": str(error)}, status_code=422)

    return app


def serve(reader: Reader, port: int) -> None:
    """Serve the page on loopback until interrupted."""
    # An answer under way has two seconds when the server ends.
    config = uvicorn.Config(make_app(reader), log_level="warning", lifespan="off", timeout_graceful_shutdown=2)
    with socket.create_server((HOST, port)) as listening:
        print(f"Draw a digit: http://{HOST}:{port}/\nCtrl-C stops the server.", flush=True)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            print(file=sys.stderr)
