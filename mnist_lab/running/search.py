"""A search over hyperparameters: Optuna decides, the lab trains, and no trial is given the test images.

A trial is the job with values drawn from the space, judged by the validation accuracy of its last epoch. The process
that trains it reports each epoch and the end to Optuna's storage, a database beside MLflow's, so a search can go on.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, distribution_to_json
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from tabulate import tabulate

from mnist_lab.errors import LabError, counted, one_line
from mnist_lab.experiment import Experiment, quoted
from mnist_lab.measures import percent
from mnist_lab.paths import SEARCHES, own_folder
from mnist_lab.running import identity
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Progress, Pruned, SearchResult, Trial
from mnist_lab.running.run import DESCRIPTION, run_name_of, tried, with_teacher
from mnist_lab.running.workers import Failed, SeedTask, Trainers, reason_of
from mnist_lab.tracking.connection import short_timeouts
from mnist_lab.tracking.run import TrackedRun, track
from mnist_lab.tracking.store import alone, find_run, finished_runs, open_store, quiet
from mnist_lab.training.loop import EpochMetrics
from mnist_lab.verdicts.statistics import chance_of_best

Space = Mapping[str, BaseDistribution]
# What a trial has in Optuna's storage: that its training began, why it failed, and what was too large to be trained.
BEGUN, REASON, TOO_LARGE = "begun", "reason", "num_params"


def search(
    job: Job, space: Space, count: int, progress: Progress, trainers: Trainers, *, again: bool = False
) -> SearchResult:
    """Train trials, with the seed 0, until the search has `count` of them; raises LabError before any training.

    A search of the same script, code, settings and space goes on; `again` begins a new one. Trials that were
    interrupted go on too. One that fails counts; the others are still trained.
    """
    check_space(job, space)
    store = open_store(job.tracking_uri)
    busy = f"search: another process is searching {job.step} with these settings"
    with alone(job.tracking_uri, f"search-{_digest(job)}", busy), _storage_failures():
        job = with_teacher(job, store)
        study, storage = _open_study(job, space, again=again)
        job = replace(job, search=study.study_name)
        trainers.prepare(job, store)
        _, _, rehearsal = tried(job, store)
        for name in [name for name in rehearsal.no_effect if name in space]:
            raise LabError(f"search: {rehearsal.no_effect[name]}; give more --epochs, or leave {name} out of the space")
        rehearsal.notice(job.overrides)
        run_id = study.user_attrs.get("run_id")
        with store.failures("can't be read"), short_timeouts():
            begun = run_id and find_run(store.uri, run_id)  # None too where the database was removed, or is another
        called, resumed = run_name_of(job, f"search of {counted(count, 'trial')}"), begun.info.run_id if begun else None
        params = {**job.params, **{name: str(distribution) for name, distribution in space.items()}}
        tags = {**job.tags, **job.commit_tags, "hardware": identity.hardware(job.device)}
        tasks = partial(_tasks, study, space, count, job=job, storage=trainers.storage(storage))
        with (
            track(store, called, params=params, tags=tags, resume_run_id=resumed, reopen=True) as tracked,
            closing(trainers.train(store, tracked.run_id, tasks(parent_run_id=tracked.run_id), progress)) as ended,
        ):
            study.set_user_attr("run_id", tracked.run_id)
            result = _stand(study, tracked.run_id)
            progress.on_search(study.study_name, count, result.done, trainers.room, job.device)
            for task, outcome in ended:
                if isinstance(outcome, Failed) and not outcome.lost:  # so Optuna was not told
                    raise LabError(f"search: {outcome.reason.removeprefix('search: ')}")
                if isinstance(outcome, Failed):
                    study.tell(task.number, state=TrialState.FAIL, skip_if_finished=True)
                trial, result = study.get_trials(deepcopy=False)[task.number], _stand(study, tracked.run_id)
                progress.on_trial(trial.number, _values(trial), _outcome_text(trial), result)
            _log(tracked, study, job, result)
    return result


def check_space(job: Job, space: Space) -> None:
    wrong: object = space
    if isinstance(space, Mapping):
        wrong = {name: one for name, one in space.items() if not isinstance(one, BaseDistribution)}
    if wrong or not space:
        example = 'give a dict of Optuna\'s distributions by name, e.g. {"lr": FloatDistribution(0.05, 0.5, log=True)}'
        raise LabError(f"search: {quoted(wrong)} is no space; {example}")
    for name, distribution in space.items():
        if name in job.overrides:
            raise LabError(f"search: {name} is searched, so it can't be set to {quoted(job.overrides[name])} too")
        given = vars(distribution)
        for value in given.get("choices", (given.get("low"), given.get("high"))):
            try:
                job.experiment.override({name: value})[0].check()
            except LabError as error:
                raise LabError(f"search: {error}") from error


def paste_lines(job: Job, values: Mapping[str, object]) -> list[str]:
    """Return the values as arguments to write into the script, each with the part that it belongs to."""
    declared = {name: job.experiment.flat()[name] for name in values}
    return [f"{one.argument}={values[name]!r},  # {one.part or 'EXPERIMENT'}" for name, one in declared.items()]


def best_table(result: SearchResult, style: str = "simple") -> str:
    """Return the five best trials as a table with a column for each value, in one of the styles of tabulate."""
    rows = [(trial.number, f"{trial.accuracy:.2f}", *trial.values.values()) for trial in result.best[:5]]
    return tabulate(rows, ("trial", "validation", *result.best[0].values), tablefmt=style, disable_numparse=True)


def too_good(result: SearchResult, holdout: int) -> float:
    """Return by about how many points the best accuracy is too good, were all trials equally good in truth."""
    return chance_of_best(result.best[0].accuracy, holdout, result.finished + result.pruned)


@dataclass(frozen=True, kw_only=True)
class TrialTask(SeedTask):
    storage: BaseStorage

    def train(self, progress: Progress) -> None:
        """Train the trial with the seed 0, or go on with it, and tell Optuna what came of it."""
        with _storage_failures():
            # After a quarter of the epochs, and again after twice as many, the better half of the trials goes on.
            quarter = max(1, self.job.experiment.epochs // 4)
            pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=quarter, reduction_factor=2)
            study = optuna.load_study(study_name=self.job.search, storage=self.storage, pruner=pruner)
            drawn = study.get_trials(deepcopy=False)[self.number]
            if not drawn.state.is_finished():  # by a process that was lost before it could say so
                trial = optuna.Trial(study, drawn._trial_id)
                trial.set_user_attr(BEGUN, True)
                study.tell(trial, *self._outcome(trial, is_lost=BEGUN in drawn.user_attrs))

    def _outcome(self, trial: optuna.Trial, *, is_lost: bool) -> tuple[float | None, TrialState]:
        try:
            store = open_store(self.job.tracking_uri)
            experiment, drawn = self.job.experiment.override(_values(trial))
            overrides, teacher = {**self.job.overrides, **drawn}, None if "teacher" in drawn else self.job.teacher
            job = with_teacher(replace(self.job, experiment=experiment, overrides=overrides, teacher=teacher), store)
            # The same values may have been drawn before, and a process may be lost when it has pruned its run.
            run = finished_runs(store, job.params, job.tags, "validation_accuracy").get(0)
            if run is None:
                run = SeedTask(job, 0, self.parent_run_id, is_lost=is_lost).train(_Judge(trial, job.experiment))
                assert run is not None
            trial.set_user_attr("run", run.run_id)
            accuracy = run.metrics.get("final_validation_accuracy")
            return accuracy, TrialState.PRUNED if accuracy is None else TrialState.COMPLETE
        except Pruned:
            return None, TrialState.PRUNED
        except Exception as error:
            trial.set_user_attr(REASON, reason_of(error))
            return None, TrialState.FAIL


def _tasks(study: optuna.Study, space: Space, count: int, **given: Any) -> Iterator[TrialTask]:
    """Yield the trials that were interrupted, then new ones, each of which is drawn when there is room for it."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.params.keys() == space.keys():
            yield TrialTask(number=trial.number, **given)
        else:  # this process was killed while it was drawn
            study.tell(trial.number, state=TrialState.FAIL)
    for _ in range(count - len(study.trials)):
        yield TrialTask(number=study.ask(dict(space)).number, **given)


class _Judge(Progress):
    def __init__(self, trial: optuna.Trial, experiment: Experiment) -> None:
        self.trial, self.experiment = trial, experiment

    def on_run(self, name: str, num_params: int, summary: str, num_images: int, done: int) -> None:
        limit = self.experiment.targets.params
        if limit is not None and num_params >= limit:
            self.trial.set_user_attr(TOO_LARGE, num_params)
            raise Pruned

    def on_epoch(self, seed: int, metrics: EpochMetrics) -> None:
        self.trial.report(metrics.eval_accuracy, metrics.epoch)
        if metrics.epoch < self.experiment.epochs and self.trial.should_prune():
            raise Pruned


def _values(trial: optuna.Trial | FrozenTrial) -> dict[str, object]:
    """Return the values of a trial, floats with four digits that count: what is pasted later is what was trained."""
    values = dict(trial.params)
    for name, distribution in trial.distributions.items():
        if isinstance(distribution, FloatDistribution) and distribution.step is None:
            values[name] = min(max(float(f"{values[name]:.4g}"), distribution.low), distribution.high)
    return values


@contextmanager
def _storage_failures() -> Iterator[None]:
    try:
        yield
    except (optuna.exceptions.OptunaError, SQLAlchemyError) as error:
        raise LabError(f"search: Optuna's database {SEARCHES} can't be used: {one_line(error)[:200]}") from error


def _digest(job: Job) -> str:  # which names the searches of a job
    return hashlib.sha256(json.dumps(job.identity, sort_keys=True).encode()).hexdigest()[:12]


def _open_study(job: Job, space: Space, *, again: bool) -> tuple[optuna.Study, RDBStorage]:
    """Open the newest search of this job, or make a new one; raises LabError if that drew from another space."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = f"sqlite:///{own_folder(job.tracking_uri) / SEARCHES}"
    with quiet():
        storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})  # seconds, while another one writes
    family = f"{job.step} {_digest(job)}"
    names = [name.rpartition(" ") for name in optuna.get_all_study_names(storage)]
    newest = max((int(number) for of_family, _, number in names if of_family == family), default=0)
    name = f"{family} {newest + (again or not newest)}"
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # one that goes on draws other values
    declared = {name: distribution_to_json(one) for name, one in space.items()}
    drawn = study.user_attrs.get("space", declared)
    if other := [name for name in {**drawn, **declared} if drawn.get(name) != declared.get(name)]:
        changed = f"{', '.join(other)} had another range when {study.study_name} began"
        raise LabError(f"search: {changed}; go on with that one, or begin a new search with --again")
    study.set_user_attr("space", declared)
    return study, storage


def _stand(study: optuna.Study, run_id: str) -> SearchResult:
    trials = study.get_trials(deepcopy=False)
    states = Counter(trial.state for trial in trials)
    finished, pruned, failed = states[TrialState.COMPLETE], states[TrialState.PRUNED], states[TrialState.FAIL]
    too_large = sum(TOO_LARGE in trial.user_attrs for trial in trials)
    unique = {repr(sorted(one.params.items())): one for one in reversed(trials) if one.state is TrialState.COMPLETE}
    found = [Trial(one.number, _values(one), one.value) for one in unique.values() if one.value is not None]
    best = sorted(found, key=lambda trial: (-trial.accuracy, trial.number))
    return SearchResult(run_id, study.study_name, finished, pruned - too_large, failed, too_large, best)


def _outcome_text(trial: FrozenTrial) -> str:
    if trial.value is not None and trial.state is TrialState.COMPLETE:
        return f"{percent(trial.value)} %"
    if TOO_LARGE in trial.user_attrs:
        return f"too large: {trial.user_attrs[TOO_LARGE]:,} parameters"
    if trial.state is TrialState.PRUNED:
        return "pruned"
    return f"failed: {trial.user_attrs.get(REASON, 'its process ended early')}"


def _log(tracked: TrackedRun, study: optuna.Study, job: Job, result: SearchResult) -> None:
    metrics: dict[str, float] = {"trials": result.done}
    metrics |= {f"trials_{name}": getattr(result, name) for name in ("pruned", "failed", "too_large")}
    if result.best:
        metrics |= {"best_validation_accuracy": result.best[0].accuracy, "too_good": too_good(result, job.holdout)}
        tracked.set_tags({DESCRIPTION: best_table(result, "github")})
        tracked.log_text("\n".join(paste_lines(job, result.best[0].values)) + "\n", "best.txt")
    tracked.log_missing({result.done: metrics})
    with quiet():
        tracked.log_text(study.trials_dataframe().to_csv(index=False), "trials.csv")
