"""How many requests a second `make server` takes, and so how many trainings at once one server carries.

A run of step 4, on few images, says how many requests a run sends. Then writers, each a process of its own, log points,
params, tags and artifacts as such a run does, one run after another and without a pause. They share the cores with the
server and PostgreSQL, so a server that has a machine to itself takes more.

A training that takes T seconds and sends R requests asks for R / T requests a second, so a server that takes Q carries
N = Q * T / R trainings at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import Report, Sample, Setting, interleave, load_experiment, make_parser, parse, script_of

STEP = "step4_augment_steplr"
WRITERS = (1, 4, 16)
TRAININGS = {"step 4, two cores": 238.0, "a minute": 60.0, "a GPU's 3 s": 3.0}  # seconds of a run of 14 epochs
EPOCHS, METRICS, ARTIFACTS = 14, 8, 20
PATIENCE = 600  # seconds


@contextmanager
def served(*flags: str) -> Iterator[str]:
    """Start `make server` in a folder of its own, and yield its address."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)  # PostgreSQL may run as another user
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "mnist_lab", "server", "--folder", str(folder / "server"), "--port", port, *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        while line := server.stdout.readline():
            name, _, value = line.removeprefix("export ").strip().partition("=")
            if line.startswith("export "):  # the password is in a file, as a shell would read it
                os.environ[name] = subprocess.check_output(["sh", "-c", f"printf %s {value}"], text=True)
            if "Ctrl-C" in line:
                break
        else:
            sys.exit("server.py: the server did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(PATIENCE)
        shutil.rmtree(folder)


class Requests:
    """Counts the requests that this process makes, and how long each waits for its answer."""

    def __init__(self) -> None:
        import requests

        self.seconds: list[float] = []
        send: Callable[..., Any] = requests.Session.send

        def counted(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return send(*arguments, **named)
            finally:
                self.seconds.append(time.perf_counter() - start)

        requests.Session.send = counted  # type: ignore[method-assign]


def count(uri: str, limit: int) -> int:
    """Return how many requests a training and its tracking make in this process."""
    from mnist_lab.running import run as runner
    from mnist_lab.running.job import Job
    from mnist_lab.running.progress import Progress

    requests = Requests()
    job = Job(script=script_of(STEP), experiment=load_experiment(STEP), limit=limit, tracking_uri=uri)
    runner.run(job, 0, Progress())
    return len(requests.seconds)


def write(uri: str) -> dict[str, Any]:
    """Log runs from one moment to another; return the seconds that each request took.

    Both moments are read from stdin, once this process is ready and has said so.
    """
    from mnist_lab.tracking.run import track
    from mnist_lab.tracking.store import open_store

    store = open_store(uri)
    params = {f"param_{number}": number for number in range(15)}
    tags = {f"tag_{number}": str(number) for number in range(20)}
    requests = Requests()
    print("ready", flush=True)
    begin, end = map(float, input().split())
    time.sleep(max(0.0, begin - time.time()))
    while time.time() < end:
        with track(store, "a run", params=params, tags=tags) as tracked:
            for epoch in range(1, EPOCHS + 1):
                tracked.log_epoch(epoch, {f"metric_{number}": float(epoch) for number in range(METRICS)})
            for number in range(ARTIFACTS):
                tracked.log_text("x" * 50_000, f"texts/{number}.txt")
    return {"seconds": requests.seconds, "end": time.time()}


def load(uri: str, writers: int, seconds: float) -> tuple[float, float]:
    """Return what some writers at once got through: requests a second, and the median wait for an answer."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, __file__, "--write", "--uri", uri]
    started = [subprocess.Popen(command, **pipes) for _ in range(writers)]
    for one in started:
        one.stdout.readline()
    begin = time.time() + 1
    for one in started:
        one.stdin.write(f"{begin} {begin + seconds}\n")
        one.stdin.flush()
    printed = [one.communicate(timeout=PATIENCE)[0] for one in started]
    if any(one.returncode for one in started):
        sys.exit("server.py: a writer failed")
    results = [json.loads(text.splitlines()[-1]) for text in printed]
    waits = [wait for result in results for wait in result["seconds"]]
    return len(waits) / (max(result["end"] for result in results) - begin), statistics.median(waits)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "server",
        __doc__,
        rounds=Setting(3, 1, "rounds"),
        seconds=Setting(20, 2, "seconds that the writers of a round write"),
        limit=Setting(640, 256, "training images of each epoch of the run whose requests are counted"),
        workers=Setting(2, 1, "processes of the server"),
    )
    parser.add_argument("--auth", action="store_true", help="with passwords")
    parser.add_argument("--writers", type=int, nargs="+", metavar="N", help="default 1 4 16, with --quick 1")
    for flag in ("--write", "--count"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--uri", help=argparse.SUPPRESS)
    arguments = parse(parser, argv)
    if arguments.write or arguments.count:
        print(json.dumps(write(arguments.uri) if arguments.write else count(arguments.uri, arguments.limit)))
        return
    report = Report(arguments)
    counts = arguments.writers or ([1] if arguments.quick else WRITERS)
    flags = ["--workers", str(arguments.workers), *(["--auth"] if arguments.auth else [])]
    with served(*flags) as uri:
        command = [sys.executable, __file__, "--count", "--uri", uri, "--limit", str(arguments.limit)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        per_run = int(done.stdout.splitlines()[-1])
        ways = {f"{n} writers": lambda n=n: load(uri, n, arguments.seconds) for n in counts}
        loads = interleave(ways, arguments.rounds)
    rates = {name: Sample(tuple(rate for rate, _ in loads[name])) for name in ways}
    report.section("requests that the server takes", rates, {}, unit="a second")
    waits = {name: Sample(tuple(1000 * wait for _, wait in loads[name])) for name in ways}
    report.section("how long one waits for its answer, median", waits, {}, unit="ms")
    best = max(rates.values(), key=lambda sample: sample.median)
    carried = {
        f"{name}: {seconds:g} s": Sample(tuple(rate * seconds / per_run for rate in best.rounds))
        for name, seconds in TRAININGS.items()
    }
    report.section("trainings at once that it carries, by what one takes", carried, {}, unit="trainings")
    report.note(f"A run of {EPOCHS} epochs makes {per_run} requests, its artifacts among them.")
    report.write()


if __name__ == "__main__":
    main()
