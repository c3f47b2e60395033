"""One experiment trained with several seeds: what is missing is trained, and all of it is judged together.

On a CPU the seeds train side by side in worker processes with one thread each: two such processes do nearly twice the
work of one process with two threads. On a GPU they train in this process, stacked into one program where the optimizer
allows that, else one after another.

The workers are processes of `multiprocessing`, started by "spawn" (torch's threads don't survive a fork). They are no
`Pool`: a pool is broken as a whole when one of its processes dies, while here only that seed fails.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol

import torch
from tabulate import tabulate
from torch import Tensor, nn

from mnist_lab.data import Mnist
from mnist_lab.errors import LabError
from mnist_lab.experiment import Experiment
from mnist_lab.running import checkpoint, declaration, provenance
from mnist_lab.running import run as runner
from mnist_lab.running.checkpoint import Checkpoint
from mnist_lab.running.rehearsal import rehearse
from mnist_lab.running.run import RunResult
from mnist_lab.running.sources import code_sha256, find_sources
from mnist_lab.running.threads import available_cores
from mnist_lab.tracking.delivery import sync
from mnist_lab.tracking.run import TrackedRun, track
from mnist_lab.tracking.store import FinishedRun, Store, adopt, can_resume, close_abandoned, finished_runs, open_store
from mnist_lab.training.loop import EpochMetrics
from mnist_lab.training.stacked import can_stack, fit_stacked
from mnist_lab.verdicts import targets
from mnist_lab.verdicts.statistics import Aggregate, StudyVerdict, aggregate, judge_mean
from mnist_lab.verdicts.targets import Verdict

LOOK_SECONDS = 1.0  # how often the display is told that time passes
END_SECONDS = 20.0  # that a worker gets to close its run when the study is stopped
# What is aggregated over the seeds: the last epoch first, then the best.
FIGURES = ("final_test_accuracy", "best_test_accuracy")
FIGURES_WITH_HOLD_OUT = ("final_test_accuracy", "final_validation_accuracy", "best_validation_accuracy")


class Progress(Protocol):
    """Who listens to a study: the console, or nobody."""

    def on_start(
        self, name: str, seeds: Sequence[int], missing: Sequence[int], workers: int, device: torch.device
    ) -> None: ...
    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None: ...
    def on_seed(self, seed: int, metrics: Mapping[str, float]) -> None: ...
    def on_failure(self, seed: int, reason: str) -> None: ...
    def on_time(self) -> None: ...


@dataclass(frozen=True)
class StudyResult:
    """A study that came to its end.

    runs: the finished run of each seed, in the order of the seeds that were asked for.
    failed: why the other seeds have none.
    aggregates: by the name of the figure, the last epoch's accuracy first; empty if no seed has finished.
    accuracy: the verdict on the accuracy target; None where none was stated or no seed has finished.
    verdicts: on the other targets.
    """

    run_id: str
    runs: list[FinishedRun]
    reused: list[int]
    failed: dict[int, str]
    aggregates: dict[str, Aggregate]
    accuracy: StudyVerdict | None
    verdicts: list[Verdict]
    overrides: Mapping[str, object]


@dataclass(frozen=True)
class _Job:
    """What a worker is told: everything but the seed."""

    script: Path
    sources: dict[str, Path]
    code_sha256: str
    hyperparameters: dict[str, object]
    overrides: dict[str, object]  # without those on the data
    data_dir: Path | None
    tracking_uri: str
    limit: int | None
    holdout: int | None
    again: bool
    parent_run_id: str


def run_study(
    experiment: Experiment,
    script: Path,
    progress: Progress,
    *,
    overrides: Mapping[str, object],
    seeds: Sequence[int],
    workers: int | None = None,
    again: bool = False,
    device: str | None = None,
    data_dir: Path | None = None,
    tracking_uri: str | None = None,
    limit: int | None = None,
    holdout: int | None = None,
) -> StudyResult:
    """Train and track the experiment that `script` declares with each of these seeds, and judge them together.

    A seed with a finished run of the same declaration, code and kind of device is not trained again: its run becomes a
    child of this study. `again` trains all. A seed that fails does not keep the others from being trained.

    workers: how many processes train at once on a CPU; as many as this process may use cores if not given, and never
        more than there are seeds to train.
    The other arguments are those of `runner.run`.

    Raises:
        LabError: before any training, if the declaration, an argument, the data or the tracking store is unusable.
    """
    experiment.check()
    _check(seeds, workers)
    where = runner.choose_device(device)
    if workers is not None and where.type != "cpu":
        raise LabError(f"workers: {workers} is for a CPU; on {where.type} the seeds train in one process")
    store = open_store(tracking_uri)
    sync(store.uri)
    close_abandoned(store)
    all_overrides = runner.all_overrides(overrides, limit=limit)
    params, identity = runner.identify(experiment, script, where, all_overrides, holdout)
    found = {} if again else finished_runs(store, params, identity)
    runs = {seed: found[seed] for seed in seeds if seed in found}
    missing = [seed for seed in seeds if seed not in found]
    mnist = None
    if missing:  # else there is nothing to refuse
        mnist = runner.load_parts(data_dir, where, limit=limit, holdout=holdout)
        rehearse(experiment, mnist)
    count = min(workers or available_cores(), len(missing)) if where.type == "cpu" else min(1, len(missing))

    step = identity["step"]
    name = f"{step} {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    commit = provenance.commit(script)
    tags = {
        **{tag: text for tag, text in identity.items() if tag != "step"},
        "study": step,
        "seeds": " ".join(map(str, seeds)),
        "seeds_reused": " ".join(map(str, runs)),
        "git_commit": commit.sha,
        "git_dirty": str(commit.dirty).lower(),
        "hardware": provenance.hardware(where),
        **runner.target_tags(experiment),
    }
    failed: dict[int, str] = {}
    with track(store, name, params=params, tags=tags) as study:
        for run in runs.values():
            adopt(store, study.run_id, run.run_id)
        progress.on_start(name, seeds, missing, count, where)
        if where.type == "cpu":
            job = _Job(
                script=script,
                sources=find_sources(script),
                code_sha256=identity["code_sha256"],
                hyperparameters=experiment.hyperparameters(),
                overrides=dict(overrides),
                data_dir=data_dir,
                tracking_uri=store.uri,
                limit=limit,
                holdout=holdout,
                again=again,
                parent_run_id=study.run_id,
            )
            messages = _train_in_workers(job, missing, count, progress.on_time)
        elif mnist is not None and where.type == "cuda" and can_stack(experiment, len(mnist.train_images)):
            messages = train_stacked(
                experiment,
                script,
                mnist,
                store,
                missing,
                overrides=all_overrides,
                holdout=holdout,
                data_dir=data_dir,
                parent_run_id=study.run_id,
            )
        else:
            messages = _train_here(
                missing,
                lambda seed, listener: runner.run(
                    experiment,
                    script,
                    listener,
                    overrides=overrides,
                    seed=seed,
                    device=str(where),
                    data_dir=data_dir,
                    tracking_uri=store.uri,
                    limit=limit,
                    holdout=holdout,
                    parent_run_id=study.run_id,
                    resume=None
                    if again
                    else _interrupted(store, experiment, script, where, all_overrides, holdout, seed),
                ),
                progress,
            )
        try:
            for message in messages:
                if isinstance(message, _Epoch):
                    progress.on_epoch(message.seed, message.metrics)
                elif isinstance(message, _Done):
                    runs[message.run.seed] = message.run
                    progress.on_seed(message.run.seed, message.run.metrics)
                else:
                    failed[message.seed] = message.reason
                    progress.on_failure(message.seed, message.reason)
        finally:
            messages.close()  # ends the workers, before the study's run is closed
            with suppress(LabError):  # a server that is away: the next run there closes them
                close_abandoned(store)  # the runs of workers that died
        result = _judge(
            experiment,
            study.run_id,
            [runs[seed] for seed in seeds if seed in runs],
            [seed for seed in seeds if seed not in missing],
            failed,
            FIGURES if holdout is None else FIGURES_WITH_HOLD_OUT,
            all_overrides,
        )
        _log(study, result)
        if failed:
            study.end_status = "FAILED"
    return result


def _check(seeds: Sequence[int], workers: int | None) -> None:
    if not seeds:
        raise LabError("seeds: there is none; give at least one")
    for seed in seeds:
        runner.check_seed(seed)
    if twice := [seed for seed in seeds if list(seeds).count(seed) > 1]:
        raise LabError(f"seeds: {twice[0]} is there twice")
    if workers is not None and workers < 1:
        raise LabError(f"workers: {workers} is not a whole number of at least 1")


# ---- what the seeds show together


def _judge(
    experiment: Experiment,
    run_id: str,
    runs: list[FinishedRun],
    reused: list[int],
    failed: dict[int, str],
    figures: Sequence[str],
    overrides: Mapping[str, object],
) -> StudyResult:
    aggregates, accuracy, verdicts = {}, None, []
    target = experiment.targets.accuracy
    if runs:
        aggregates = {name: aggregate([run.metrics[name] for run in runs], target) for name in figures}
        last = [run.metrics["final_test_accuracy"] for run in runs]
        accuracy = None if target is None else judge_mean(last, target)
        verdicts = [
            verdict
            for verdict in targets.judge(
                experiment.targets,
                final_test_accuracy=aggregates["final_test_accuracy"].mean,
                num_params=int(runs[0].metrics["num_params"]),
                epochs=experiment.epochs,
            )
            if verdict.name != "accuracy"  # `accuracy` judges that, by how much the seeds differ
        ]
    return StudyResult(run_id, runs, reused, failed, aggregates, accuracy, verdicts, overrides)


def words(result: StudyResult) -> dict[str, str]:
    """Return the verdict on each target: met, missed, or for the accuracy also "not shown"."""
    accuracy = {} if result.accuracy is None else {"accuracy": result.accuracy.word}
    return {**accuracy, **{verdict.name: verdict.word for verdict in result.verdicts}}


def overall(result: StudyResult) -> str:
    """Return "met" if all targets are, "missed" if any is, else "not shown"; "none" where nothing can be judged."""
    given = words(result).values()
    if not given:
        return "none"
    return "missed" if "missed" in given else "not shown" if "not shown" in given else "met"


def _log(study: TrackedRun, result: StudyResult) -> None:
    metrics = {"seeds": float(len(result.runs))}
    for name, figures in result.aggregates.items():
        metrics |= {f"{name}_{key}": value for key, value in asdict(figures).items() if key != "n"}
    if result.runs:
        metrics["num_params"] = result.runs[0].metrics["num_params"]
    if result.accuracy is not None:
        metrics["p"] = result.accuracy.p
    study.log_once({name: value for name, value in metrics.items() if math.isfinite(value)})
    tags = {"targets": overall(result), **{f"verdict_{name}": word for name, word in words(result).items()}}
    if result.failed:
        tags["seeds_failed"] = " ".join(map(str, result.failed))
    text = "\n\n".join(tabulate(*table, tablefmt="github", disable_numparse=True) for table in tables(result))
    study.set_tags({**tags, "mlflow.note.content": text})  # what MLflow's UI shows as the run's description


def tables(result: StudyResult) -> list[tuple[list[tuple[str, ...]], tuple[str, ...]]]:
    """Return rows and headers of two tables as text: one row per figure over the seeds, and one per seed."""
    if not result.aggregates:
        return []
    over_seeds: list[tuple[str, ...]] = [
        (
            _label(name),
            _percent(a.mean),
            f"{a.sd:.3f}" if math.isfinite(a.sd) else "-",
            f"{a.low:.2f} to {a.high:.2f}" if math.isfinite(a.low) else "-",
            _percent(a.minimum),
            _percent(a.median),
            f"{round(a.share_at_target * a.n)} of {a.n}" if math.isfinite(a.share_at_target) else "-",
        )
        for name, a in result.aggregates.items()
    ]
    headers = ("accuracy in percent", "mean", "sd", "95 % interval", "minimum", "median", "at target")
    per_seed: list[tuple[str, ...]] = [
        (str(run.seed), *(_percent(run.metrics[name]) for name in result.aggregates), run.run_id) for run in result.runs
    ]
    return [(over_seeds, headers), (per_seed, ("seed", *map(_label, result.aggregates), "run"))]


def _label(name: str) -> str:
    """Say "last epoch, test" for `final_test_accuracy`."""
    epoch, part, _ = name.split("_")
    return f"{'last' if epoch == 'final' else epoch} epoch, {part}"


def _percent(accuracy: float) -> str:
    return f"{accuracy:.2f}"


# ---- training the seeds that are missing


class _Epoch(NamedTuple):
    seed: int
    metrics: EpochMetrics


class _Done(NamedTuple):
    run: FinishedRun


class _Failed(NamedTuple):
    seed: int
    reason: str


_Message = _Epoch | _Done | _Failed


def _done(seed: int, result: RunResult) -> _Done:
    return _Done(FinishedRun(result.run_id, seed, result.measured))


class _Listener:
    """Listens to one seed's run and passes its epochs on."""

    def __init__(self, on_epoch: Callable[[EpochMetrics], None]) -> None:
        self.on_epoch = on_epoch

    def on_start(self, run_name: str, device: torch.device, net: nn.Module, summary: str, num_images: int) -> None: ...
    def on_batch(self, seen: int, loss_sum: Tensor, correct: Tensor) -> None: ...


def _train_here(
    seeds: Sequence[int], train: Callable[[int, _Listener], RunResult], progress: Progress
) -> Generator[_Message, None, None]:
    """Train the seeds one after another in this process."""
    for seed in seeds:
        try:
            result = train(seed, _Listener(partial(progress.on_epoch, seed)))
        except Exception as error:
            yield _Failed(seed, _reason(error))
        else:
            yield _done(seed, result)


def train_stacked(
    experiment: Experiment,
    script: Path,
    mnist: Mnist,
    store: Store,
    seeds: Sequence[int],
    *,
    overrides: Mapping[str, object],
    holdout: int | None,
    data_dir: Path | None,
    parent_run_id: str,
) -> Generator[_Message, None, None]:
    """Train all seeds at once on the device of `mnist`, then track each as a run of its own.

    The arguments are those of `runner.record`. The runs are written when all epochs are through.
    """
    nets = [runner.initial_network(experiment, seed, mnist.train_images.device) for seed in seeds]
    epochs: list[list[EpochMetrics]] = []
    try:
        for metrics_of_seeds in fit_stacked(nets, experiment, mnist, seeds):
            epochs.append(metrics_of_seeds)
            for seed, metrics in zip(seeds, metrics_of_seeds, strict=True):
                yield _Epoch(seed, metrics)
    except Exception as error:  # they stand or fall together
        for seed in seeds:
            yield _Failed(seed, _reason(error))
        return
    for index, seed in enumerate(seeds):
        own = [of_seeds[index] for of_seeds in epochs]
        diverged = next((metrics.epoch for metrics in own if not math.isfinite(metrics.train_loss)), None)
        if diverged is not None:
            yield _Failed(seed, f"loss: is not finite in epoch {diverged} of {len(own)}; the training has diverged")
            continue
        try:
            for metrics in own:
                runner.check_eval_loss(metrics)
            result = runner.record(
                partial(_already_trained, own),
                nets[index],
                experiment,
                script,
                mnist,
                store,
                _Listener(lambda metrics: None),
                overrides=overrides,
                seed=seed,
                holdout=holdout,
                data_dir=data_dir,
                parent_run_id=parent_run_id,
            )
        except Exception as error:
            yield _Failed(seed, _reason(error))
        else:
            yield _done(seed, result)


def _already_trained(epochs: list[EpochMetrics], run_id: str) -> list[EpochMetrics]:
    return epochs


def _interrupted(
    store: Store,
    experiment: Experiment,
    script: Path,
    device: torch.device,
    overrides: Mapping[str, object],
    holdout: int | None,
    seed: int,
) -> Checkpoint | None:
    """Return the checkpoint of an earlier run of this seed that can go on, if there is one."""
    identity = runner.identity_text(experiment, script, device, overrides, holdout)
    found = checkpoint.alike(store.uri, identity, seed)
    return next((one for one in found if can_resume(store, one.run_id)), None)


def _reason(error: Exception) -> str:
    """Return the sentence of a LabError; of a bug, the traceback."""
    return str(error) if isinstance(error, LabError) else "".join(traceback.format_exception(error)).rstrip()


class _Worker:
    """A process that trains one seed after another, and the connection to it."""

    def __init__(self, job: _Job, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, job), name=f"{declaration.WORKER} {number}", daemon=True
        )
        self.seed: int | None = None
        with _one_thread(), _signals_held_back():
            self.process.start()
        theirs.close()  # so that this end hears of it when the process ends

    def give(self, seed: int | None) -> None:
        """Let it train a seed next, or with None come to its end."""
        self.seed = seed
        with suppress(OSError):  # where it has died: receiving says so too
            self.connection.send(seed)


def _train_in_workers(
    job: _Job, seeds: Sequence[int], count: int, on_time: Callable[[], None]
) -> Generator[_Message, None, None]:
    """Train the seeds in `count` processes at a time. However this ends, the processes end before it."""
    waiting = deque(seeds)
    workers: list[_Worker] = []
    started = 0
    try:
        while waiting or workers:
            while waiting and len(workers) < count:
                started += 1
                workers.append(worker := _Worker(job, started))
                worker.give(waiting.popleft())
            ready = wait([worker.connection for worker in workers], timeout=LOOK_SECONDS)
            for worker in [worker for worker in workers if worker.connection in ready]:
                try:
                    message: _Message = worker.connection.recv()
                except (EOFError, OSError):
                    workers.remove(worker)
                    worker.process.join()
                    if worker.seed is not None:
                        yield _Failed(worker.seed, f"its process ended early ({_ending(worker.process.exitcode)})")
                    continue
                if not isinstance(message, _Epoch):
                    worker.give(waiting.popleft() if waiting else None)
                yield message
            on_time()
    finally:
        _end(workers)


def _ending(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"


def _end(workers: Sequence[_Worker]) -> None:
    """Let the workers close their runs and end; kill those that do not."""
    for worker in workers:
        worker.process.terminate()
    deadline = time.monotonic() + END_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        worker.process.kill()
        worker.process.join()
        worker.connection.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let processes that are started meanwhile compute with one thread each."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Keep Ctrl-C and a closed terminal, which reach all processes at once, from those that are started meanwhile.

    This process sees them, and then ends its workers by SIGTERM.
    """
    resource_tracker.ensure_running()  # starting it would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in a worker


def _work(connection: Connection, job: _Job) -> None:
    """Train the seeds that come over the connection, and send back what comes of them."""
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        while (seed := connection.recv()) is not None:
            try:
                message: _Message = _done(seed, _train(job, seed, connection))
            except Exception as error:
                message = _Failed(seed, _reason(error))
            connection.send(message)
    except (KeyboardInterrupt, EOFError, OSError):  # stopped, or the study's process is gone
        os._exit(1)


def _train(job: _Job, seed: int, connection: Connection) -> RunResult:
    """Train and track one seed."""
    if code_sha256(job.sources) != job.code_sha256:
        raise LabError(f"{job.script.name} or the lab's code was changed while the study ran")
    experiment, overrides = declaration.read(job.script).override(job.overrides)
    if experiment.hyperparameters() != job.hyperparameters:
        raise LabError(
            f"{job.script.name} does not declare the same experiment in a worker process; "
            "a study needs a script that declares one experiment"
        )

    def send(metrics: EpochMetrics) -> None:
        try:
            connection.send(_Epoch(seed, metrics))
        except OSError:
            raise KeyboardInterrupt from None  # the study's process is gone

    on_data = runner.all_overrides(overrides, limit=job.limit)
    cpu, store = torch.device("cpu"), open_store(job.tracking_uri)
    return runner.run(
        experiment,
        job.script,
        _Listener(send),
        overrides=overrides,
        seed=seed,
        device="cpu",
        data_dir=job.data_dir,
        tracking_uri=job.tracking_uri,
        limit=job.limit,
        holdout=job.holdout,
        parent_run_id=job.parent_run_id,
        resume=None if job.again else _interrupted(store, experiment, job.script, cpu, on_data, job.holdout, seed),
    )


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """Wait for the end of the study's process, then end this one, and with it its run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os._exit(1)
