"""How many requests a second `make server` takes, and so how many trainings at once one server carries.

A run of step 4, on few images, is tracked once, and what it sends is kept. Then writers, each a process of its own,
send that again as runs of theirs, one after another and without a pause. They share the cores with the server and
PostgreSQL, so a server that has a machine to itself takes more.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Report, Sample, Setting, interleave, load_experiment, make_parser, parse, script_of
from tabulate import tabulate

STEP = "step4_augment_steplr"
WRITERS = (1, 4, 16)
TRAININGS = {"step 4, two cores": 238.0, "a minute": 60.0, "a GPU's 3 s": 3.0}  # seconds of a run of 14 epochs
NODES = (1, 10, 100, 1000)
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


WRITES = ("_log_points", "set_tags", "log_file", "_log_input", "_publish_model")  # by which a run writes all it leaves
CALLS = "calls.json"


def record(uri: str, folder: Path, limit: int) -> None:
    """Train and track in this process, and keep each thing that is written, with its files."""
    from mnist_lab.running import run as runner
    from mnist_lab.running.job import Job
    from mnist_lab.running.progress import Progress
    from mnist_lab.tracking.run import TrackedRun

    calls: list[tuple[str, list[Any], dict[str, Any]]] = []

    def keep(value: Any) -> Any:
        if not isinstance(value, Path):
            return value
        kept = folder / str(len(calls)) / value.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if value.is_dir() else shutil.copy)(value, kept)
        return {"path": str(kept.relative_to(folder))}

    def keeping(name: str, write: Callable[..., None]) -> Callable[..., None]:
        def kept(tracked: TrackedRun, *arguments: Any, **named: Any) -> None:
            calls.append((name, [keep(value) for value in arguments], named))
            write(tracked, *arguments, **named)

        return kept

    for name in WRITES:
        setattr(TrackedRun, name, keeping(name, getattr(TrackedRun, name)))

    job = Job(script=script_of(STEP), experiment=load_experiment(STEP), limit=limit, tracking_uri=uri)
    runner.run(job, 0, Progress())
    (folder / CALLS).write_text(json.dumps(calls))


def write(uri: str, folder: Path) -> dict[str, Any]:
    """Write what was kept as runs, from one moment to another; return how many runs, and the seconds of requests.

    Both moments are read from stdin, once this process is ready and has said so.
    """
    from mnist_lab.tracking.run import track
    from mnist_lab.tracking.store import open_store

    own = Path(shutil.copytree(folder, f"{folder}.{os.getpid()}"))  # publishing a model changes its files
    store = open_store(uri)
    params = {f"param_{number}": number for number in range(15)}
    tags = {f"tag_{number}": str(number) for number in range(20)}
    calls = json.loads((own / CALLS).read_text())

    def there(value: Any) -> Any:
        return own / value["path"] if isinstance(value, dict) and value.keys() == {"path"} else value

    requests = Requests()
    print("ready", flush=True)
    begin, end = map(float, input().split())
    time.sleep(max(0.0, begin - time.time()))
    runs = 0.0
    while time.time() < end:
        with track(store, "a run", params=params, tags=tags) as tracked:
            for name, arguments, named in calls:
                if time.time() > end:
                    break
                here = [there(value) for value in arguments]
                getattr(tracked, name)(*here, **named)
                runs += 1 / len(calls)
    return {"runs": runs, "seconds": requests.seconds, "end": time.time()}


@dataclass(frozen=True)
class Load:
    """What some writers at once got through: requests and runs a second, and the median wait for an answer."""

    requests: float
    runs: float
    wait: float


def load(uri: str, records: Path, writers: int, seconds: float) -> Load:
    command = [sys.executable, __file__, "--write", "--uri", uri, "--records", str(records)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
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
    took = max(result["end"] for result in results) - begin
    waits = [wait for result in results for wait in result["seconds"]]
    return Load(len(waits) / took, sum(result["runs"] for result in results) / took, statistics.median(waits))


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "server",
        __doc__,
        rounds=Setting(3, 1, "rounds"),
        seconds=Setting(20, 2, "seconds that the writers of a round write"),
        limit=Setting(640, 256, "training images of each epoch of the run that is recorded"),
        workers=Setting(2, 1, "processes of the server"),
    )
    parser.add_argument("--auth", action="store_true", help="with passwords")
    parser.add_argument("--writers", type=int, nargs="+", metavar="N", help="default 1 4 16, with --quick 1")
    for flag, kind in {"uri": str, "records": Path}.items():
        parser.add_argument(f"--{flag}", type=kind, help=argparse.SUPPRESS)
    for flag in ("--write", "--record"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    arguments = parse(parser, argv)
    if arguments.write:
        print(json.dumps(write(arguments.uri, arguments.records)))
        return
    if arguments.record:
        requests = Requests()
        record(arguments.uri, arguments.records, arguments.limit)
        print(len(requests.seconds))
        return
    report = Report(arguments)
    counts = arguments.writers or ([1] if arguments.quick else WRITERS)
    flags = ["--workers", str(arguments.workers), *(["--auth"] if arguments.auth else [])]
    with served(*flags) as uri, tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records"
        command = [sys.executable, __file__, "--record", "--uri", uri, "--records", str(records)]
        command += ["--limit", str(arguments.limit)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        per_run = int(done.stdout.splitlines()[-1])
        ways = {
            f"{writers} writers": lambda writers=writers: load(uri, records, writers, arguments.seconds)
            for writers in counts
        }
        loads = interleave(ways, arguments.rounds)
    rates = {name: Sample(tuple(one.requests for one in loads[name])) for name in ways}
    report.section("requests that the server takes", rates, {}, unit="a second")
    waits = {name: Sample(tuple(1000 * one.wait for one in loads[name])) for name in ways}
    report.section("how long one waits for its answer, median", waits, {}, unit="ms")
    runs = {name: Sample(tuple(one.runs for one in loads[name])) for name in ways}
    report.section("whole runs, one after another and without training", runs, {}, unit="a second")
    best = max(rates.values(), key=lambda sample: sample.median)
    carried = {
        f"{name}: {seconds:g} s": Sample(tuple(rate * seconds / per_run for rate in best.rounds))
        for name, seconds in TRAININGS.items()
    }
    report.section("trainings at once that it carries, by what one takes", carried, {}, unit="trainings")
    report.note(
        f"A run of 14 epochs makes {per_run} requests, one of them for each epoch. Trainings at once: "
        f"N = Q * T / R = {best.median:.0f} a second * T / {per_run}, on paper; a run's artifacts are among them."
    )
    rows = [
        (f"{nodes:,}", *(f"{2 * nodes * per_run / seconds:,.1f}" for seconds in TRAININGS.values())) for nodes in NODES
    ]
    headers = ("nodes, two trainings each", *(f"{seconds:g} s a training" for seconds in TRAININGS.values()))
    report.note("\nRequests a second that nodes ask for, on paper:")
    report.note(tabulate(rows, headers=headers, disable_numparse=True))
    report.write()


if __name__ == "__main__":
    main()
