"""A search over hyperparameters: Optuna decides, the lab trains, and no trial is given the test images.

A trial is the job with values drawn from the space. It is judged by the validation accuracy of its last epoch, the mean
over its seeds. Optuna's database stands beside MLflow's, so the same command goes on where a search has stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean
from typing import TYPE_CHECKING

import matplotlib
import optuna
import torch
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from tabulate import tabulate

from mnist_lab.errors import LabError, one_line
from mnist_lab.experiment import quoted
from mnist_lab.paths import LOCKS, SEARCHES, own_folder
from mnist_lab.running import provenance, teaching
from mnist_lab.running.job import Job
from mnist_lab.running.precision import use_float32
from mnist_lab.running.progress import Progress
from mnist_lab.running.record import DESCRIPTION, run_name_of
from mnist_lab.running.rehearsal import rehearse
from mnist_lab.running.run import load_parts
from mnist_lab.running.workers import (
    Epoch,
    Failed,
    Judge,
    Message,
    Take,
    Task,
    TrainTasks,
    check_workers,
    choose_trainers,
)
from mnist_lab.tracking.run import TrackedRun, track
from mnist_lab.tracking.store import (
    FinishedRun,
    Store,
    adopt,
    check_resumable,
    close_abandoned,
    finished_runs,
    open_store,
    quiet,
)
from mnist_lab.tracking.store import search as find_runs
from mnist_lab.training.generators import kept_generators
from mnist_lab.training.loop import EpochMetrics, initial_network, num_params
from mnist_lab.verdicts.comparison import mean_interval_text
from mnist_lab.verdicts.statistics import Aggregate, aggregate, expected_maximum, sd_of_accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mnist_lab.running.cluster import Cluster

logger = logging.getLogger(__name__)

Space = Mapping[str, BaseDistribution]
FIGURE = "final_validation_accuracy"
REDUCTION = 2  # after the epochs 1, 2, 4, 8 and so on, the better half of the trials goes on
MAX_DRAWS = 100  # in a row that have too many parameters
BEST = 5  # trials that are shown at the end


@dataclass(frozen=True)
class Trial:
    """A trial that was trained to its end: its number, its values by flat name, and its accuracy in percent."""

    number: int
    values: Mapping[str, object]
    accuracy: float


@dataclass(frozen=True)
class Counts:
    """Where a search stands. too_large: draws that were not trained; they count as no trial."""

    finished: int
    pruned: int
    failed: int
    running: int
    too_large: int
    best: Trial | None

    @property
    def done(self) -> int:
        return self.finished + self.pruned + self.failed


@dataclass(frozen=True)
class SearchResult:
    """A search that came to its end.

    best: the best trials, the best first; none where no trial has finished.
    too_good: by about how many points the best accuracy is too good, were all trials equally good in truth.
    """

    run_id: str
    name: str
    seeds: int
    counts: Counts
    best: list[Trial]
    too_good: float


@dataclass(frozen=True)
class Confirmed:
    """A trial that was trained again with other seeds; without accuracies where none of them has a run."""

    trial: Trial
    accuracies: Aggregate | None


def search(
    job: Job,
    space: Space,
    count: int,
    seeds: int,
    progress: Progress,
    *,
    workers: int | None = None,
    again: bool = False,
    cluster: Cluster | None = None,
) -> SearchResult:
    """Train trials until the search has `count` of them, each with the seeds 0 to `seeds` - 1.

    A search of the same script, code, settings and space goes on; `again` begins a new one. Trials that were
    interrupted go on too. One that fails counts; the others are still trained.
    workers: how many processes train at once on a CPU; by default one per core.
    cluster: trains the trials in place of this machine; then `workers` is the number of its tasks at once.

    Raises:
        LabError: before any training, if the space, the declaration, the data or the store is unusable.
    """
    if cluster is None:
        check_workers(workers, job.device)
    check_space(job, space)
    store = open_store(job.tracking_uri)
    with _storage_failures(job), _alone(job, store):
        job = teaching.find(job, store)
        study = _open_study(job, space, seeds, again)
        job = job.replaced(search=study.study_name)
        trainers, at_a_time = choose_trainers(job, store, workers, cluster)
        _rehearse(job, space, store)
        _take_up_interrupted(study)
        at_a_time = min(at_a_time, count)
        earlier = _earlier_run(study, store)
        with _track(job, store, f"search of {count} trials", space, earlier) as tracked:
            if earlier is None:
                study.set_user_attr("run_id", tracked.run_id)
                study.set_user_attr("logged", 0)
                _adopt_earlier(study, store, tracked.run_id)
            trials = _Trials(study, job, space, count, seeds, store, tracked.run_id, progress)
            progress.on_search(study.study_name, count, trials.counts().done, at_a_time, job.device)
            _train(trainers, trials.take, trials.hear, trials.judge, at_a_time, progress, store)
            result = _result(study, job, tracked.run_id, seeds, trials.counts())
            _log(tracked, study, job, result)
    return result


def confirm(
    job: Job,
    space: Space,
    best: int,
    seeds: Sequence[int],
    progress: Progress,
    *,
    workers: int | None = None,
    cluster: Cluster | None = None,
) -> list[Confirmed]:
    """Train the best trials of a search again, with seeds that had no part in choosing them; the best mean comes first.

    seeds: a range is counted from the first seed that the search has not used. Runs that have finished count.
    workers, cluster: as in `search`.

    Raises:
        LabError: as `search`, and if there is no such search or one of the seeds was used in it.
    """
    if cluster is None:
        check_workers(workers, job.device)
    check_space(job, space)
    store = open_store(job.tracking_uri)
    with _storage_failures(job), _alone(job, store):
        job = teaching.find(job, store)
        study = _open_study(job, space, None, again=False)
        job = job.replaced(search=study.study_name)
        used = study.user_attrs["seeds"]
        if isinstance(seeds, range):
            seeds = [seed + used for seed in seeds]
        elif (twice := min(seeds)) < used:
            raise LabError(f"seeds: {twice} was used in the search; give seeds from {used} on")
        trials = {trial.number: trial for trial in _finished(study)[:best]}
        if not trials:
            raise LabError(f"confirm: no trial of {study.study_name} has finished")
        trainers, at_a_time = choose_trainers(job, store, workers, cluster)
        _rehearse(job, space, store)
        with _track(job, store, f"{len(trials)} best trials, {len(seeds)} seeds", space) as tracked:
            runs: dict[int, dict[int, FinishedRun]] = {}
            waiting: deque[tuple[Task, int]] = deque()
            for trial in trials.values():
                of_trial = _with_values(job, trial.values, store)
                hardware = provenance.hardware(job.device)
                found = finished_runs(store, of_trial.params, of_trial.tags, FIGURE, hardware=hardware)
                runs[trial.number] = {seed: found[seed] for seed in seeds if seed in found}
                for run in runs[trial.number].values():
                    adopt(store, tracked.run_id, run.run_id)
                task = Task(of_trial, tracked.run_id, False, trial.number)
                waiting.extend((task, seed) for seed in seeds if seed not in found)
            done, wanted = sum(map(len, runs.values())), len(trials) * len(seeds)
            at_a_time = min(at_a_time, max(1, len(waiting)))
            progress.on_search(f"{study.study_name}, {len(trials)} best trials", wanted, done, at_a_time, job.device)
            failed = 0

            def hear(task: Task, message: Message) -> None:
                nonlocal failed
                assert task.trial is not None
                if isinstance(message, Epoch):
                    return
                if isinstance(message, Failed):
                    failed += 1
                    outcome = f"seed {message.seed} failed: {message.reason}"
                else:
                    runs[task.trial][message.run.seed] = message.run
                    outcome = f"seed {message.run.seed}: {message.run.metrics[FIGURE]:.2f} %"
                counts = Counts(sum(map(len, runs.values())), 0, failed, 0, 0, None)
                progress.on_trial(task.trial, trials[task.trial].values, outcome, counts)

            def take() -> tuple[Task, int] | None:
                return waiting.popleft() if waiting else None

            _train(trainers, take, hear, lambda task, metrics: True, at_a_time, progress, store)
            confirmed = [
                Confirmed(trial, aggregate([run.metrics[FIGURE] for run in of_seeds.values()]) if of_seeds else None)
                for trial, of_seeds in zip(trials.values(), runs.values(), strict=True)
            ]
            confirmed.sort(key=lambda one: one.accuracies.mean if one.accuracies else 0.0, reverse=True)
            rows, headers = confirmed_table(confirmed)
            tracked.set_tags({DESCRIPTION: tabulate(rows, headers, tablefmt="github", disable_numparse=True)})
    return confirmed


def check_space(job: Job, space: Space) -> None:
    """Refuse a space that can't be drawn from; raises LabError."""
    if not isinstance(space, Mapping) or not space:
        raise LabError(f"search: {quoted(space)} is no space; give a dict of Optuna's distributions by name")
    for name, distribution in space.items():
        if not isinstance(distribution, BaseDistribution):
            raise LabError(
                f"search: {name} is {quoted(distribution)}, not one of Optuna's distributions, "
                "e.g. FloatDistribution(0.05, 0.5, log=True)"
            )
        if name in job.overrides:
            raise LabError(f"search: {name} is searched, so it can't be set to {quoted(job.overrides[name])} too")
        if distribution.single():
            raise LabError(f"search: {name} is {distribution}, which holds one value only")
        if isinstance(distribution, CategoricalDistribution):
            values = list(distribution.choices)
        else:
            values = [distribution.low, distribution.high]  # type: ignore[attr-defined]
        for value in values:
            job.experiment.override({name: value})[0].check()


def paste_lines(job: Job, values: Mapping[str, object]) -> list[str]:
    """Return the values as arguments to write into the script, each with the part that it belongs to."""
    lines = []
    for name, value in values.items():
        part, argument = job.experiment.where(name)
        lines.append(f"{argument}={value!r},  # {part or 'EXPERIMENT'}")
    return lines


def trial_text(values: Mapping[str, object]) -> str:
    """Return the values of a trial on one line, numbers with four digits."""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def best_table(best: Sequence[Trial]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Return rows and headers of the best trials."""
    rows: list[tuple[str, ...]] = [(str(t.number), f"{t.accuracy:.2f}", trial_text(t.values)) for t in best]
    return rows, ("trial", "validation accuracy", "values")


def confirmed_table(confirmed: Sequence[Confirmed]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Return rows and headers of trials that were trained again."""
    rows: list[tuple[str, ...]] = []
    for one in confirmed:
        a = one.accuracies
        shown = ("0", "-", "-", "-")
        if a is not None:
            shown = (
                str(a.n),
                f"{a.mean:.2f}",
                f"{a.sd:.3f}" if a.n > 1 else "-",
                mean_interval_text(a.n, a.low, a.high),
            )
        rows.append((str(one.trial.number), f"{one.trial.accuracy:.2f}", *shown, trial_text(one.trial.values)))
    return rows, ("trial", "in the search", "seeds", "mean", "sd", "95 % interval", "values")


class _Trials:
    """The trials of one search as they go on."""

    def __init__(
        self,
        study: optuna.Study,
        job: Job,
        space: Space,
        wanted: int,
        seeds: int,
        store: Store,
        parent_run_id: str,
        progress: Progress,
    ) -> None:
        self.study, self.job, self.space, self.seeds, self.store = study, job, dict(space), seeds, store
        self.parent_run_id, self.progress = parent_run_id, progress
        self.left = wanted - self.counts().done
        self.running: dict[int, optuna.Trial] = {}
        self.runs: dict[int, list[FinishedRun]] = {}
        self.following: deque[tuple[Task, int]] = deque()  # the further seeds of trials

    def take(self) -> tuple[Task, int] | None:
        """Return the next seed of a trial, or the first one of a new trial."""
        if self.following:
            return self.following.popleft()
        while self.left > 0:
            self.left -= 1
            trial, job = self._draw()
            runs = self._runs_there(job)
            self.running[trial.number], self.runs[trial.number] = trial, runs
            if len(runs) == self.seeds:
                self._finish(trial, runs)
            else:
                return Task(job, self.parent_run_id, False, trial.number), len(runs)
        return None

    def _runs_there(self, job: Job) -> list[FinishedRun]:
        """Return the runs of the first seeds that were trained with these values already, to their end.

        A trial may have ended in the moment in which its search was killed, and values can be drawn twice.
        """
        found = finished_runs(self.store, job.params, job.tags, FIGURE)
        runs = [found[seed] for seed in takewhile(found.__contains__, range(self.seeds))]
        for run in runs:
            adopt(self.store, self.parent_run_id, run.run_id)
        return runs

    def _draw(self) -> tuple[optuna.Trial, Job]:
        """Ask Optuna for values, again where they give a network with too many parameters."""
        for _ in range(MAX_DRAWS):
            trial = self.study.ask(self.space)
            job = _with_values(self.job, trial.params, self.store)
            size, limit = _num_params(job), job.experiment.targets.params
            if size is None or limit is None or size < limit:
                return trial, job
            trial.set_user_attr("num_params", size)
            self.study.tell(trial, state=TrialState.PRUNED)
        raise LabError(
            f"search: of the last {MAX_DRAWS} draws none has fewer than {limit:,} parameters, which is the target; "
            "narrow the space"
        )

    def judge(self, task: Task, metrics: EpochMetrics) -> bool:
        """Say whether a trial is worth another epoch; that is judged with its first seed."""
        assert task.trial is not None
        if self.runs[task.trial]:
            return True
        trial = self.running[task.trial]
        trial.report(metrics.eval_accuracy, metrics.epoch)
        return metrics.epoch == task.job.experiment.epochs or not trial.should_prune()

    def hear(self, task: Task, message: Message) -> None:
        """Tell Optuna what came of a seed, once its trial is through."""
        if isinstance(message, Epoch):
            return
        assert task.trial is not None
        trial, runs = self.running[task.trial], self.runs[task.trial]
        if isinstance(message, Failed):
            trial.set_user_attr("reason", message.reason)
            self._end(trial, TrialState.FAIL, f"failed: {message.reason}")
            return
        runs.append(message.run)
        if FIGURE not in message.run.metrics:
            trial.set_user_attr("runs", [run.run_id for run in runs])
            self._end(trial, TrialState.PRUNED, "pruned")
        elif len(runs) < self.seeds:
            trial.set_user_attr("runs", [run.run_id for run in runs])
            self.following.append((task, len(runs)))
        else:
            self._finish(trial, runs)

    def _finish(self, trial: optuna.Trial, runs: Sequence[FinishedRun]) -> None:
        trial.set_user_attr("runs", [run.run_id for run in runs])
        accuracy = fmean(run.metrics[FIGURE] for run in runs)
        self._end(trial, None, f"{accuracy:.2f} %", accuracy)

    def _end(self, trial: optuna.Trial, state: TrialState | None, outcome: str, accuracy: float | None = None) -> None:
        self.study.tell(trial, accuracy, state)
        del self.running[trial.number]
        self.progress.on_trial(trial.number, trial.params, outcome, self.counts())

    def counts(self) -> Counts:
        """Count the trials by how they ended."""
        trials = self.study.get_trials(deepcopy=False)
        replaced = {trial.user_attrs["replaces"] for trial in trials if "replaces" in trial.user_attrs}
        states = Counter(t.state for t in trials if t.number not in replaced and "num_params" not in t.user_attrs)
        return Counts(
            finished=states[TrialState.COMPLETE],
            pruned=states[TrialState.PRUNED],
            failed=states[TrialState.FAIL],
            running=states[TrialState.RUNNING],
            too_large=sum("num_params" in trial.user_attrs for trial in trials),
            best=next(iter(_finished(self.study)), None),
        )


def _open_study(job: Job, space: Space, seeds: int | None, again: bool) -> optuna.Study:
    """Open the newest search of this job, or make a new one; raises LabError if that drew from another space.

    seeds: of each trial, or None to open a search that is there.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    own_folder(job.tracking_uri).mkdir(parents=True, exist_ok=True)
    with quiet():
        storage = optuna.storages.RDBStorage(f"sqlite:///{own_folder(job.tracking_uri) / SEARCHES}")
    family = f"{job.step} {_digest(job)}"
    numbers = [
        int(name.rpartition(" ")[2])
        for name in optuna.get_all_study_names(storage)
        if name.rpartition(" ")[0] == family
    ]
    newest, declared = max(numbers, default=0), {name: distribution_to_json(one) for name, one in space.items()}
    if newest and not again:
        study = optuna.load_study(study_name=f"{family} {newest}", storage=storage)
        drawn = study.user_attrs["space"]
        if other := [name for name in {**drawn, **declared} if drawn.get(name) != declared.get(name)]:
            raise LabError(
                f"search: {', '.join(other)} had another range when {study.study_name} began; "
                "go on with that one, or begin a new search with --again"
            )
        if seeds not in (None, study.user_attrs["seeds"]):
            raise LabError(
                f"search: {study.study_name} trains {study.user_attrs['seeds']} seeds a trial, not {seeds}; "
                "go on with as many, or begin a new search with --again"
            )
    elif seeds is None:
        raise LabError(f"confirm: there is no search of {job.step} with these settings; run one first with --search N")
    else:
        study = optuna.create_study(study_name=f"{family} {newest + 1}", storage=storage, direction="maximize")
        study.set_user_attr("space", declared)
        study.set_user_attr("seeds", seeds)
    # A search that goes on must not draw the same values again.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.get_trials(deepcopy=False)))
    study.pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
    return study


def _digest(job: Job) -> str:
    """Return what names the searches of a job: script, code and all settings but the space."""
    return hashlib.sha256(json.dumps(job.identity, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def _alone(job: Job, store: Store) -> Iterator[None]:
    """Keep other processes from the searches of this job; raises LabError if one has them."""
    lock = FileLock(own_folder(store.uri) / LOCKS / f"search-{_digest(job)}.lock", timeout=0)
    with suppress(OSError):  # the lock says so
        own_folder(store.uri).joinpath(LOCKS).mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise LabError(f"search: another process is searching {job.step} with these settings") from None
    except OSError as error:
        raise LabError(f"lock {lock.lock_file} can't be made: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _storage_failures(job: Job) -> Iterator[None]:
    """Turn an error of Optuna's database into a LabError."""
    try:
        yield
    except (optuna.exceptions.OptunaError, SQLAlchemyError) as error:
        file = own_folder(job.tracking_uri) / SEARCHES
        reason = one_line(error)
        raise LabError(f"search: Optuna's database {file} can't be used: {reason[:200]}") from error


def _rehearse(job: Job, space: Space, store: Store) -> None:
    """Try the declaration as it stands before any trial; raises LabError."""
    use_float32(job.device)
    mnist = load_parts(job)
    rehearse(teaching.load(job, store), mnist).notice({**job.overrides, **space})


def _take_up_interrupted(study: optuna.Study) -> None:
    """Let the trials of a process that is gone begin again, as new trials with their values."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.enqueue_trial(trial.params, user_attrs={"replaces": trial.number})
        study.tell(trial.number, state=TrialState.FAIL)


def _earlier_run(study: optuna.Study, store: Store) -> str | None:
    """Return the run that the search has had so far, unless it was deleted."""
    run_id: str | None = study.user_attrs.get("run_id")
    if run_id is not None:
        try:
            check_resumable(store, run_id, finished_too=True)
        except LabError:
            return None
    return run_id


def _adopt_earlier(study: optuna.Study, store: Store, parent_run_id: str) -> None:
    """Make the runs of earlier trials children of this run, but for those that were deleted since."""
    ended = {run_id for trial in study.get_trials(deepcopy=False) for run_id in trial.user_attrs.get("runs", [])}
    for run in find_runs(store, f"tags.search = '{study.study_name}'"):
        if run.info.run_id in ended:
            adopt(store, parent_run_id, run.info.run_id)


def _with_values(job: Job, values: Mapping[str, object], store: Store) -> Job:
    experiment, overrides = job.experiment.override(values)
    teacher = None if "teacher" in values else job.teacher
    changed = job.replaced(experiment=experiment, overrides={**job.overrides, **overrides}, teacher=teacher)
    return teaching.find(changed, store)


def _num_params(job: Job) -> int | None:
    """Count the parameters of the job's network; None where it can't be built, of which the training says why."""
    try:
        with kept_generators(torch.device("cpu")):
            return num_params(initial_network(job.experiment, 0, torch.device("cpu")))
    except Exception:
        return None


@contextmanager
def _track(job: Job, store: Store, what: str, space: Space, earlier: str | None = None) -> Iterator[TrackedRun]:
    """Open the run whose children are those of the trials, or go on with the earlier one."""
    tags = {
        **job.tags,
        **provenance.commit(job.script, written=job.written_by_lab).tags,
        "hardware": provenance.hardware(job.device),
    }
    params = {**job.params, **{name: str(distribution) for name, distribution in space.items()}}
    name = run_name_of(job, what)
    with track(store, name, params=params, tags=tags, resume_run_id=earlier, reopen=True) as tracked:
        yield tracked


def _train(
    trainers: TrainTasks,
    take: Take,
    hear: Callable[[Task, Message], None],
    judge: Judge,
    at_a_time: int,
    progress: Progress,
    store: Store,
) -> None:
    """Train what `take` gives until there is no more, and let `hear` know what comes of it."""
    messages = trainers(take, at_a_time, progress.on_time, judge)
    try:
        with closing(messages):
            for task, message in messages:
                hear(task, message)
    finally:
        with suppress(LabError):  # a server that is away: the next run there closes them
            close_abandoned(store)  # the runs of workers that died


def _finished(study: optuna.Study) -> list[Trial]:
    """Return the trials that were trained to their end, the best first, and each set of values once."""
    trials: list[FrozenTrial] = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    unique = {repr(sorted(trial.params.items())): trial for trial in reversed(trials)}
    found = [Trial(trial.number, trial.params, trial.value) for trial in unique.values() if trial.value is not None]
    return sorted(found, key=lambda trial: (-trial.accuracy, trial.number))


def _result(study: optuna.Study, job: Job, run_id: str, seeds: int, counts: Counts) -> SearchResult:
    best, too_good = _finished(study)[:BEST], 0.0
    if best:
        too_good = expected_maximum(counts.finished + counts.pruned) * sd_of_accuracy(best[0].accuracy, job.holdout)
    return SearchResult(run_id, study.study_name, seeds, counts, best, too_good)


def _log(tracked: TrackedRun, study: optuna.Study, job: Job, result: SearchResult) -> None:
    counts = result.counts
    metrics: dict[str, float] = {
        "trials": counts.done,
        "trials_pruned": counts.pruned,
        "trials_failed": counts.failed,
        "trials_too_large": counts.too_large,
    }
    if result.best:
        metrics["best_validation_accuracy"] = result.best[0].accuracy
        metrics["too_good"] = result.too_good
        rows, headers = best_table(result.best)
        tracked.set_tags({DESCRIPTION: tabulate(rows, headers, tablefmt="github", disable_numparse=True)})
        tracked.log_text("\n".join(paste_lines(job, result.best[0].values)) + "\n", "best.txt")
    if study.user_attrs["logged"] != counts.done:  # a point can be repeated, not replaced
        tracked.log_epoch(counts.done, metrics)
        study.set_user_attr("logged", counts.done)
    with quiet():
        tracked.log_text(study.trials_dataframe().to_csv(index=False), "trials.csv")
    with quiet(), matplotlib.rc_context({"savefig.bbox": "tight"}):  # Optuna's labels do not fit their figures
        tracked.log_figures(_figures(study, counts))


def _figures(study: optuna.Study, counts: Counts) -> dict[str, Figure]:
    """Draw Optuna's figures, as far as there are trials enough for them."""
    from matplotlib import pyplot as plt
    from optuna.visualization import matplotlib as plots

    plt.switch_backend("agg")
    wanted: dict[str, Callable[..., object]] = {}
    if counts.finished:
        wanted |= {"history": plots.plot_optimization_history, "parallel_coordinate": plots.plot_parallel_coordinate}
    if len({trial.accuracy for trial in _finished(study)}) > 1:  # else nothing is important
        wanted["importances"] = plots.plot_param_importances
    figures = {}
    for name, plot in wanted.items():
        plot(study, target_name="validation accuracy")
        figures[name] = plt.gcf()
        figures[name].set_size_inches(9, 5)
        plt.close()
    return figures
