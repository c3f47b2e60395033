"""A search over hyperparameters: Optuna decides, the lab trains, and no trial is given the test images.

A trial is the job with values drawn from the space. It is judged by the validation accuracy of its last epoch, the mean
over its seeds. Each process that trains asks Optuna for its trials and tells it what came of them; they share nothing
but Optuna's storage, a database beside MLflow's. So the same command goes on where a search has stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import optuna
import torch
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, distribution_to_json
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from tabulate import tabulate

from mnist_lab.checking.rehearsal import Rehearsal, rehearse
from mnist_lab.checking.schedule import without_effect
from mnist_lab.errors import LabError, one_line
from mnist_lab.experiment import quoted
from mnist_lab.paths import LOCKS, SEARCHES, own_folder
from mnist_lab.running import identity, teaching
from mnist_lab.running.job import Job
from mnist_lab.running.machine import use_float32
from mnist_lab.running.progress import Counts, Progress, Pruned, Trial
from mnist_lab.running.record import DESCRIPTION, run_name_of
from mnist_lab.running.run import load_parts
from mnist_lab.running.tasks import Done, Failed, Given, Message, OnEpoch, SeedTask, Task, Trainers, Tried, reason_of
from mnist_lab.running.tasks import train as train_seed
from mnist_lab.tracking.run import TrackedRun, track
from mnist_lab.tracking.store import Store, adopt, finished_runs, open_store, quiet
from mnist_lab.training.generators import kept_generators
from mnist_lab.training.loop import EpochMetrics, initial_network, num_params
from mnist_lab.verdicts.comparison import mean_interval_text
from mnist_lab.verdicts.statistics import Aggregate, aggregate, expected_maximum, sd_of_accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Space = Mapping[str, BaseDistribution]
Table = tuple[list[tuple[str, ...]], tuple[str, ...]]  # rows and headers
FIGURE = "final_validation_accuracy"
REDUCTION = 2  # after the epochs 1, 2, 4, 8 and so on, the better half of the trials goes on
MAX_DRAWS = 100  # in a row that have too many parameters
MORE_EPOCHS = 15  # that are tried for a number with which a hyperparameter has an effect
BUSY_SECONDS = 60  # that Optuna's database is waited for while another process writes
BEST = 5  # trials that are shown at the end


@dataclass(frozen=True)
class SearchResult:
    """A search that came to its end.

    best: the best trials, the best first; none where no trial has finished.
    too_good: by about how many points the best accuracy is too good, were all trials equally good in truth.
    """

    run_id: str
    name: str
    counts: Counts
    best: list[Trial]
    too_good: float


@dataclass
class Confirmed:
    """A trial that is trained again with other seeds, and the accuracy of each seed that has a run."""

    trial: Trial
    of_seeds: dict[int, float] = field(default_factory=dict)

    @property
    def accuracies(self) -> Aggregate | None:
        return aggregate([*self.of_seeds.values()]) if self.of_seeds else None


def search(
    job: Job, space: Space, count: int, seeds: int, progress: Progress, trainers: Trainers, *, again: bool = False
) -> SearchResult:
    """Train trials until the search has `count` of them, each with the seeds 0 to `seeds` - 1.

    A search of the same script, code, settings and space goes on; `again` begins a new one. Trials that were
    interrupted go on too. One that fails counts; the others are still trained.

    Raises:
        LabError: before any training, if the space, the declaration, the data or the store is unusable.
    """
    with _opened(job, space, seeds, trainers, again=again) as (job, study, store, at_a_time):
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            _begin_again(study, trial)
        with _track(job, store, f"search of {count} trials", space, study.user_attrs.get("run_id")) as tracked:
            study.set_user_attr("run_id", tracked.run_id)
            task = TrialTask(job, tracked.run_id, space, seeds, trainers.storage(_url(job)))
            done = _counts(study).done
            drawn = len(study.trials)  # a search that goes on must not draw the same values again
            waiting = [(task, number) for number in range(drawn, drawn + count - done)]

            def on_message(task: Task, message: Message) -> None:
                number = message.number if isinstance(message, Tried) else _fail(study, message)
                trial = study.get_trials(deepcopy=False)[number]
                progress.on_trial(number, _values(trial), _outcome_text(trial), _counts(study))

            at_a_time = min(at_a_time, max(1, len(waiting)))
            progress.on_search(study.study_name, count, done, at_a_time, job.device)
            trainers.train(waiting, at_a_time, on_message, progress.on_time)
            result = _result(study, job, tracked.run_id)
            _log(tracked, study, job, result)
    return result


def confirm(
    job: Job, space: Space, best: int, seeds: Sequence[int], progress: Progress, trainers: Trainers
) -> list[Confirmed]:
    """Train the best trials of a search again, with seeds that had no part in choosing them; the best mean comes first.

    seeds: a range is counted from the first seed that the search has not used. Runs that have finished count.

    Raises:
        LabError: as `search`, and if there is no such search or one of the seeds was used in it.
    """
    with _opened(job, space, None, trainers) as (job, study, store, at_a_time):
        seeds = _unused_seeds(study, seeds)
        confirmed = [Confirmed(trial) for trial in _finished(study)[:best]]
        if not confirmed:
            raise LabError(f"confirm: no trial of {study.study_name} has finished")
        with _track(job, store, f"{len(confirmed)} best trials, {len(seeds)} seeds", space) as tracked:
            waiting: list[Given] = []
            of_params = {}
            for one in confirmed:
                of_trial = _with_values(job, one.trial.values, store)
                of_params[repr(of_trial.params)] = one
                hardware = identity.hardware(job.device)
                found = finished_runs(store, of_trial.params, of_trial.tags, FIGURE, hardware=hardware)
                for seed in set(seeds) & set(found):
                    adopt(store, tracked.run_id, found[seed].run_id)
                    one.of_seeds[seed] = found[seed].metrics[FIGURE]
                task = SeedTask(of_trial, tracked.run_id)
                waiting.extend((task, seed) for seed in seeds if seed not in found)
            wanted, failed = len(confirmed) * len(seeds), Counter[str]()

            def on_message(task: Task, message: Message) -> None:
                one = of_params[repr(task.job.params)]
                if isinstance(message, Done):
                    accuracy = message.run.metrics[FIGURE]
                    one.of_seeds[message.run.seed] = accuracy
                    outcome = f"seed {message.run.seed}: {accuracy:.2f} %"
                elif isinstance(message, Failed):
                    failed["seeds"] += 1
                    outcome = f"seed {message.seed} failed: {message.reason}"
                else:
                    return
                counts = Counts(sum(len(one.of_seeds) for one in confirmed), failed=failed["seeds"])
                progress.on_trial(one.trial.number, one.trial.values, outcome, counts)

            at_a_time, done = min(at_a_time, max(1, len(waiting))), wanted - len(waiting)
            name = f"{study.study_name}, {len(confirmed)} best trials"
            progress.on_search(name, wanted, done, at_a_time, job.device)
            trainers.train(waiting, at_a_time, on_message, progress.on_time)
            confirmed.sort(key=lambda one: one.accuracies.mean if one.accuracies else 0.0, reverse=True)
            tracked.set_tags({DESCRIPTION: _markdown(confirmed_table(confirmed))})
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
        if isinstance(distribution, CategoricalDistribution):
            values = list(distribution.choices)
        else:
            values = [distribution.low, distribution.high]  # type: ignore[attr-defined]
        for value in values:
            job.experiment.override({name: value})[0].check()


def paste_lines(job: Job, values: Mapping[str, object]) -> list[str]:
    """Return the values as arguments to write into the script, each with the part that it belongs to."""
    parts = {name: job.experiment.where(name) for name in values}
    return [f"{argument}={values[name]!r},  # {part or 'EXPERIMENT'}" for name, (part, argument) in parts.items()]


def trial_text(values: Mapping[str, object]) -> str:
    """Return the values of a trial on one line."""
    return " ".join(f"{name}={value}" for name, value in values.items())


def best_table(best: Sequence[Trial]) -> Table:
    """Return rows and headers of the best trials."""
    rows: list[tuple[str, ...]] = [(str(t.number), f"{t.accuracy:.2f}", trial_text(t.values)) for t in best]
    return rows, ("trial", "validation accuracy", "values")


def confirmed_table(confirmed: Sequence[Confirmed]) -> Table:
    """Return rows and headers of trials that were trained again."""
    rows: list[tuple[str, ...]] = []
    for one in confirmed:
        shown = ("0", "-", "-", "-")
        if (a := one.accuracies) is not None:
            sd = f"{a.sd:.3f}" if a.n > 1 else "-"
            shown = (str(a.n), f"{a.mean:.2f}", sd, mean_interval_text(a.n, a.low, a.high))
        rows.append((str(one.trial.number), f"{one.trial.accuracy:.2f}", *shown, trial_text(one.trial.values)))
    return rows, ("trial", "in the search", "seeds", "mean", "sd", "95 % interval", "values")


def _markdown(table: Table) -> str:
    return tabulate(*table, tablefmt="github", disable_numparse=True)


# ---- where a trial is trained


class TrialTask(NamedTuple):
    """One more trial of a search; its seed seeds Optuna's draw. job: names the search. storage: Optuna's."""

    job: Job
    parent_run_id: str
    space: Space
    seeds: int
    storage: str | BaseStorage

    def train(self, seed: int, on_epoch: OnEpoch) -> Tried:
        """Ask Optuna for values, again where they give too large a network, train them, and tell what came of it."""
        with _storage_failures():
            storage = _open_storage(self.storage) if isinstance(self.storage, str) else self.storage
            study = optuna.load_study(
                study_name=self.job.search,
                storage=storage,
                sampler=optuna.samplers.TPESampler(seed=seed),
                pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION),
            )
            if (lost := _trial_of_task(study, seed)) is not None:  # the cluster gave this task to a node that is gone
                _begin_again(study, lost)
            for _ in range(MAX_DRAWS):
                trial = study.ask(dict(self.space))
                trial.set_user_attr("task", seed)
                state, accuracy = self._outcome(trial)
                study.tell(trial, accuracy, state)
                if "num_params" not in trial.user_attrs:
                    return Tried(seed, trial.number)
        raise LabError(
            f"search: of the last {MAX_DRAWS} draws none has fewer than {self.job.experiment.targets.params:,} "
            "parameters, which is the target; narrow the space"
        )

    def _outcome(self, trial: optuna.Trial) -> tuple[TrialState, float | None]:
        try:
            store = open_store(self.job.tracking_uri)
            job = _with_values(self.job, _values(trial), store)
            size, limit = _num_params(job), job.experiment.targets.params
            if size is not None and limit is not None and size >= limit:
                trial.set_user_attr("num_params", size)
                return TrialState.PRUNED, None
            return TrialState.COMPLETE, self._accuracy(trial, job, store)
        except optuna.TrialPruned:
            return TrialState.PRUNED, None
        except Exception as error:
            trial.set_user_attr("reason", reason_of(error))
            return TrialState.FAIL, None

    def _accuracy(self, trial: optuna.Trial, job: Job, store: Store) -> float:
        """Train the seeds that these values were not trained with yet; return the mean over all seeds."""
        found = finished_runs(store, job.params, job.tags, FIGURE)
        accuracies, run_ids = [], []

        def judge(metrics: EpochMetrics) -> None:
            trial.report(metrics.eval_accuracy, metrics.epoch)
            if metrics.epoch < job.experiment.epochs and trial.should_prune():
                raise Pruned

        for seed in range(self.seeds):
            if seed in found:
                adopt(store, self.parent_run_id, found[seed].run_id)
                run_id, metrics = found[seed].run_id, found[seed].metrics
            else:
                on_epoch: OnEpoch = judge if seed == 0 else lambda metrics: None
                is_lost = "replaces" in trial.user_attrs
                result = train_seed(job, seed, self.parent_run_id, on_epoch, is_lost=is_lost)
                run_id, metrics = result.run_id, result.measured
            run_ids.append(run_id)
            trial.set_user_attr("runs", run_ids)
            if FIGURE not in metrics:
                raise optuna.TrialPruned
            accuracies.append(metrics[FIGURE])
        return fmean(accuracies)


def _values(trial: optuna.Trial | FrozenTrial) -> dict[str, object]:
    """Return the values of a trial, floats with four digits that count: what is pasted later is what was trained."""
    values = dict(trial.params)
    for name, distribution in trial.distributions.items():
        if isinstance(distribution, FloatDistribution) and distribution.step is None:
            values[name] = min(max(float(f"{values[name]:.4g}"), distribution.low), distribution.high)
    return values


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


# ---- Optuna's storage


def _url(job: Job) -> str:
    return f"sqlite:///{own_folder(job.tracking_uri) / SEARCHES}"


@lru_cache(maxsize=1)
def _open_storage(url: str) -> RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with quiet():
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": BUSY_SECONDS}})


@contextmanager
def _storage_failures() -> Iterator[None]:
    """Turn an error of Optuna's storage into a LabError."""
    try:
        yield
    except (optuna.exceptions.OptunaError, SQLAlchemyError) as error:
        raise LabError(f"search: Optuna's database {SEARCHES} can't be used: {one_line(error)[:200]}") from error


def _open_study(job: Job, space: Space, seeds: int | None, *, again: bool) -> optuna.Study:
    """Open the newest search of this job, or make a new one; raises LabError if that drew from another space.

    seeds: of each trial, or None to open a search that is there.
    """
    own_folder(job.tracking_uri).mkdir(parents=True, exist_ok=True)
    storage, family = _open_storage(_url(job)), f"{job.step} {_digest(job)}"
    names = [name.rpartition(" ") for name in optuna.get_all_study_names(storage)]
    newest = max((int(number) for of_family, _, number in names if of_family == family), default=0)
    if seeds is None and not newest:
        raise LabError(f"confirm: there is no search of {job.step} with these settings; run one first with --search N")
    name = f"{family} {newest + (again or not newest)}"
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    declared = {name: distribution_to_json(one) for name, one in space.items()}
    if "space" not in study.user_attrs:
        study.set_user_attr("seeds", seeds)
        study.set_user_attr("space", declared)
    drawn, of_each = study.user_attrs["space"], study.user_attrs["seeds"]
    if other := [name for name in {**drawn, **declared} if drawn.get(name) != declared.get(name)]:
        raise LabError(
            f"search: {', '.join(other)} had another range when {study.study_name} began; "
            "go on with that one, or begin a new search with --again"
        )
    if seeds not in (None, of_each):
        raise LabError(
            f"search: {study.study_name} trains {of_each} seeds a trial, not {seeds}; "
            "go on with as many, or begin a new search with --again"
        )
    return study


def _digest(job: Job) -> str:
    """Return what names the searches of a job: script, code and all settings but the space."""
    return hashlib.sha256(json.dumps(job.identity, sort_keys=True).encode()).hexdigest()[:12]


def _begin_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Let a trial whose process is gone begin again: as a new trial with its values, which counts in its place."""
    if trial.number not in _replaced(study.get_trials(deepcopy=False)):
        study.enqueue_trial(trial.params, user_attrs={"replaces": trial.number})
    study.tell(trial.number, state=TrialState.FAIL)


def _replaced(trials: Sequence[FrozenTrial]) -> set[int]:
    return {trial.user_attrs["replaces"] for trial in trials if "replaces" in trial.user_attrs}


def _trial_of_task(study: optuna.Study, task: int) -> FrozenTrial | None:
    """Return the trial that a task has begun and not ended."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return next((trial for trial in running if trial.user_attrs.get("task") == task), None)


def _fail(study: optuna.Study, message: Message) -> int:
    """Let the trial fail whose process is gone for good, and return its number; raises LabError if there is none."""
    assert isinstance(message, Failed)
    trial = _trial_of_task(study, message.seed)
    if trial is None or not message.lost:
        raise LabError(f"search: {message.reason.removeprefix('search: ')}")
    study.tell(trial.number, state=TrialState.FAIL)
    return trial.number


def _counts(study: optuna.Study) -> Counts:
    """Count the trials by how they ended."""
    trials = study.get_trials(deepcopy=False)
    replaced = _replaced(trials)
    states = Counter(t.state for t in trials if t.number not in replaced and "num_params" not in t.user_attrs)
    return Counts(
        finished=states[TrialState.COMPLETE],
        pruned=states[TrialState.PRUNED],
        failed=states[TrialState.FAIL],
        too_large=sum("num_params" in trial.user_attrs for trial in trials),
        best=next(iter(_finished(study)), None),
    )


def _finished(study: optuna.Study) -> list[Trial]:
    """Return the trials that were trained to their end, the best first, and each set of values once."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    unique = {repr(sorted(trial.params.items())): trial for trial in reversed(trials)}
    found = [Trial(one.number, _values(one), one.value) for one in unique.values() if one.value is not None]
    return sorted(found, key=lambda trial: (-trial.accuracy, trial.number))


def _outcome_text(trial: FrozenTrial) -> str:
    if trial.state is TrialState.COMPLETE:
        return f"{trial.value:.2f} %"
    if trial.state is TrialState.PRUNED:
        return "pruned"
    return f"failed: {trial.user_attrs.get('reason', 'its process ended early')}"


def _unused_seeds(study: optuna.Study, seeds: Sequence[int]) -> Sequence[int]:
    used = study.user_attrs["seeds"]
    if isinstance(seeds, range):
        return [seed + used for seed in seeds]
    if (twice := min(seeds)) < used:
        raise LabError(f"seeds: {twice} was used in the search; give seeds from {used} on")
    return seeds


# ---- before and after the trials


@contextmanager
def _opened(
    job: Job, space: Space, seeds: int | None, trainers: Trainers, *, again: bool = False
) -> Iterator[tuple[Job, optuna.Study, Store, int]]:
    """Check all that can be before a search; give the job with the search's name, and how many train at a time.

    Other processes are kept from the searches of this job. Raises LabError.
    """
    trainers.check(job)
    check_space(job, space)
    store = open_store(job.tracking_uri)
    lock = FileLock(own_folder(store.uri) / LOCKS / f"search-{_digest(job)}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise LabError(f"search: another process is searching {job.step} with these settings") from None
    except OSError as error:
        raise LabError(f"lock {lock.lock_file} can't be made: {error.strerror}") from error
    try:
        with _storage_failures():
            job = teaching.find(job, store)
            study = _open_study(job, space, seeds, again=again)
            job = job.replaced(search=study.study_name)
            at_a_time = trainers.prepare(job, store)
            use_float32(job.device)
            mnist = load_parts(job)
            rehearsal = rehearse(teaching.load(job, store), mnist)
            _check_effects(job, space, rehearsal, len(mnist.train_images))
            rehearsal.notice(job.overrides)
            yield job, study, store, at_a_time
    finally:
        lock.release()


def _check_effects(job: Job, space: Space, rehearsal: Rehearsal, images: int) -> None:
    """Refuse to search for what has no effect in this run, and say what to do; raises LabError."""
    for name in [name for name in rehearsal.no_effect if name in space]:
        way_out = f"leave {name} out of the space"
        for epochs in range(job.experiment.epochs + 1, job.experiment.epochs + MORE_EPOCHS):
            longer, _ = job.experiment.override({"epochs": epochs})
            with kept_generators(torch.device("cpu")):
                if name not in without_effect(longer, longer.net(), images):
                    way_out = f"train {epochs} epochs, or {way_out}"
                    break
        raise LabError(f"{rehearsal.no_effect[name]}; {way_out}")


@contextmanager
def _track(job: Job, store: Store, what: str, space: Space, earlier: str | None = None) -> Iterator[TrackedRun]:
    """Open the run whose children are those of the trials, or go on with the earlier one."""
    tags = {
        **job.tags,
        **identity.commit(job.script, written=job.written_by_lab).tags,
        "hardware": identity.hardware(job.device),
    }
    params = {**job.params, **{name: str(distribution) for name, distribution in space.items()}}
    name = run_name_of(job, what)
    with track(store, name, params=params, tags=tags, resume_run_id=earlier, reopen=True) as tracked:
        yield tracked


def _result(study: optuna.Study, job: Job, run_id: str) -> SearchResult:
    counts, best, too_good = _counts(study), _finished(study)[:BEST], 0.0
    if best:
        too_good = expected_maximum(counts.finished + counts.pruned) * sd_of_accuracy(best[0].accuracy, job.holdout)
    return SearchResult(run_id, study.study_name, counts, best, too_good)


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
        tracked.set_tags({DESCRIPTION: _markdown(best_table(result.best))})
        tracked.log_text("\n".join(paste_lines(job, result.best[0].values)) + "\n", "best.txt")
    tracked.log_missing({counts.done: metrics})
    with quiet():
        tracked.log_text(study.trials_dataframe().to_csv(index=False), "trials.csv")
        tracked.log_figures(_figures(study))


def _figures(study: optuna.Study) -> dict[str, Figure]:
    """Draw Optuna's figures, as far as there are trials enough for them."""
    from matplotlib import pyplot as plt
    from optuna.visualization import matplotlib as plots

    plt.switch_backend("agg")
    accuracies = [trial.accuracy for trial in _finished(study)]
    wanted: dict[str, Callable[..., object]] = {}
    if accuracies:
        wanted |= {"history": plots.plot_optimization_history, "parallel_coordinate": plots.plot_parallel_coordinate}
    if len(set(accuracies)) > 1:  # else nothing is important
        wanted["importances"] = plots.plot_param_importances
    figures = {}
    for name, plot in wanted.items():
        with plt.rc_context({"figure.figsize": (9, 5), "figure.constrained_layout.use": True}):
            plot(study, target_name="validation accuracy")
            figures[name] = plt.gcf()
        plt.close()
    return figures
