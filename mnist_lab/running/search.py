"""A search over hyperparameters: Optuna decides, the lab trains, and no trial is given the test images.

A trial is the job with values drawn from the space, judged by the validation accuracy of its last epoch. Who trains it
tells Optuna's storage, a database beside MLflow's, of each epoch and of the end. So the same command goes on.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution, distribution_to_json
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from tabulate import tabulate

from mnist_lab.errors import LabError, counted, one_line
from mnist_lab.experiment import Experiment, quoted
from mnist_lab.paths import SEARCHES, own_folder
from mnist_lab.running import identity
from mnist_lab.running.job import Job
from mnist_lab.running.progress import Counts, Progress, Pruned, Trial
from mnist_lab.running.record import DESCRIPTION, run_name_of
from mnist_lab.running.run import tried, with_teacher
from mnist_lab.running.workers import Failed, Outcome, SeedTask, Trainers, reason_of
from mnist_lab.tracking.connection import short_timeouts
from mnist_lab.tracking.run import TrackedRun, track
from mnist_lab.tracking.store import adopt, alone, find_run, finished_runs, open_store, quiet
from mnist_lab.training.loop import EpochMetrics
from mnist_lab.verdicts.measures import percent
from mnist_lab.verdicts.statistics import expected_maximum, sd_of_accuracy

Space = Mapping[str, BaseDistribution]
FIGURE = "final_validation_accuracy"
REDUCTION = 2  # after the epochs 1, 2, 4, 8 and so on, the better half of the trials goes on
BUSY_SECONDS = 60  # that Optuna's database is waited for while another process writes
BEST = 5  # trials that are shown at the end
# What a trial has in Optuna's storage: that its training began, why it failed, and what was too large to be trained.
BEGUN, REASON, TOO_LARGE = "begun", "reason", "num_params"


@dataclass(frozen=True)
class SearchResult:
    """A search that came to its end, with its best trials, the best first; none where no trial has finished.

    too_good: by about how many points the best accuracy is too good, were all trials equally good in truth.
    """

    run_id: str
    name: str
    counts: Counts
    best: list[Trial]
    too_good: float


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
        storage = _open_storage(job)
        study = _open_study(job, space, storage, again=again)
        job = job.replaced(search=study.study_name)
        trainers.prepare(job, store)
        _, _, rehearsal = tried(job, store)
        for name in [name for name in rehearsal.no_effect if name in space]:
            raise LabError(f"search: {rehearsal.no_effect[name]}; give more --epochs, or leave {name} out of the space")
        rehearsal.notice(job.overrides)
        run_id = study.user_attrs.get("run_id")
        with store.failures("can't be read"), short_timeouts():
            begun = run_id and find_run(store.uri, run_id)  # None too where the database was removed, or is another
        with track(
            store,
            run_name_of(job, f"search of {counted(count, 'trial')}"),
            params={**job.params, **{name: str(distribution) for name, distribution in space.items()}},
            tags={**job.tags, **job.commit_tags, "hardware": identity.hardware(job.device)},
            resume_run_id=begun.info.run_id if begun else None,
            reopen=True,
        ) as tracked:
            study.set_user_attr("run_id", tracked.run_id)
            reached = trainers.storage(storage)

            def tasks() -> Iterator[TrialTask]:  # a trial is drawn when there is room for it
                for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                    if trial.params.keys() == space.keys():
                        yield TrialTask(job, trial.number, tracked.run_id, storage=reached)
                    else:  # this process was killed while it was drawn
                        study.tell(trial.number, state=TrialState.FAIL)
                for _ in range(count - len(study.trials)):
                    yield TrialTask(job, study.ask(dict(space)).number, tracked.run_id, storage=reached)

            def on_end(task: SeedTask, outcome: Outcome) -> None:
                if isinstance(outcome, Failed):
                    if not outcome.lost:  # so Optuna was not told
                        raise LabError(f"search: {outcome.reason.removeprefix('search: ')}")
                    study.tell(task.number, state=TrialState.FAIL, skip_if_finished=True)
                trial = study.get_trials(deepcopy=False)[task.number]
                progress.on_trial(trial.number, _values(trial), _outcome_text(trial), _counts(study))

            progress.on_search(study.study_name, count, _counts(study).done, trainers.room(), job.device)
            trainers.train(store, tracked.run_id, tasks(), progress, on_end)
            counts, best = _counts(study), _finished(study)[:BEST]
            sd = sd_of_accuracy(best[0].accuracy, job.holdout) if best else 0.0
            too_good = expected_maximum(max(1, counts.finished + counts.pruned)) * sd
            result = SearchResult(tracked.run_id, study.study_name, counts, best, too_good)
            _log(tracked, study, job, result)
    return result


def check_space(job: Job, space: Space) -> None:
    if not isinstance(space, Mapping) or not space:
        raise LabError(f"search: {quoted(space)} is no space; give a dict of Optuna's distributions by name")
    for name, distribution in space.items():
        if not isinstance(distribution, BaseDistribution):
            example = "not one of Optuna's distributions, e.g. FloatDistribution(0.05, 0.5, log=True)"
            raise LabError(f"search: {name} is {quoted(distribution)}, {example}")
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


def trial_text(values: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def best_table(result: SearchResult, style: str = "simple") -> str:
    """Return the best trials as a table with a column for each value, in one of the styles of tabulate."""
    rows = [(trial.number, f"{trial.accuracy:.2f}", *trial.values.values()) for trial in result.best]
    names = result.best[0].values if result.best else ()
    return tabulate(rows, ("trial", "validation", *names), tablefmt=style, disable_numparse=True)


# ---- where a trial is trained


@dataclass(frozen=True, kw_only=True)
class TrialTask(SeedTask):
    storage: BaseStorage

    def train(self, progress: Progress) -> None:
        """Train the trial with the seed 0, or go on with it, and tell Optuna what came of it."""
        with _storage_failures():
            pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
            study = optuna.load_study(study_name=self.job.search, storage=self.storage, pruner=pruner)
            drawn = study.get_trials(deepcopy=False)[self.number]
            if not drawn.state.is_finished():  # by a process that was lost before it could say so
                trial = optuna.Trial(study, drawn._trial_id)
                trial.set_user_attr(BEGUN, True)
                study.tell(trial, *self._outcome(trial, is_lost=BEGUN in drawn.user_attrs))

    def _outcome(self, trial: optuna.Trial, *, is_lost: bool) -> tuple[float | None, TrialState]:
        try:
            store = open_store(self.job.tracking_uri)
            values = _values(trial)
            experiment, overrides = self.job.experiment.override(values)
            teacher = None if "teacher" in values else self.job.teacher
            overrides = {**self.job.overrides, **overrides}
            job = with_teacher(self.job.replaced(experiment=experiment, overrides=overrides, teacher=teacher), store)
            # The same values may have been drawn before, and a process may be lost when it has pruned its run.
            run = finished_runs(store, job.params, job.tags, "validation_accuracy").get(0)
            if run is None:
                run = SeedTask(job, 0, self.parent_run_id, is_lost=is_lost).train(_Judge(trial, job.experiment))
                assert run is not None
            else:
                adopt(store, self.parent_run_id, run.run_id)
            trial.set_user_attr("run", run.run_id)
            accuracy = run.metrics.get(FIGURE)
            return accuracy, TrialState.PRUNED if accuracy is None else TrialState.COMPLETE
        except Pruned:
            return None, TrialState.PRUNED
        except Exception as error:
            trial.set_user_attr(REASON, reason_of(error))
            return None, TrialState.FAIL


class _Judge(Progress):
    def __init__(self, trial: optuna.Trial, experiment: Experiment) -> None:
        self.trial, self.experiment = trial, experiment

    def on_run(self, name: str, device: torch.device, num_params: int, summary: str, num_images: int) -> None:
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


# ---- Optuna's storage


def _open_storage(job: Job) -> RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = f"sqlite:///{own_folder(job.tracking_uri) / SEARCHES}"
    with quiet():
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": BUSY_SECONDS}})


@contextmanager
def _storage_failures() -> Iterator[None]:
    try:
        yield
    except (optuna.exceptions.OptunaError, SQLAlchemyError) as error:
        raise LabError(f"search: Optuna's database {SEARCHES} can't be used: {one_line(error)[:200]}") from error


def _digest(job: Job) -> str:  # which names the searches of a job
    return hashlib.sha256(json.dumps(job.identity, sort_keys=True).encode()).hexdigest()[:12]


def _open_study(job: Job, space: Space, storage: RDBStorage, *, again: bool) -> optuna.Study:
    """Open the newest search of this job, or make a new one; raises LabError if that drew from another space."""
    family = f"{job.step} {_digest(job)}"
    names = [name.rpartition(" ") for name in optuna.get_all_study_names(storage)]
    newest = max((int(number) for of_family, _, number in names if of_family == family), default=0)
    name = f"{family} {newest + (again or not newest)}"
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # one that goes on draws other values
    declared = {name: distribution_to_json(one) for name, one in space.items()}
    if "space" not in study.user_attrs:
        study.set_user_attr("space", declared)
    drawn = study.user_attrs["space"]
    if other := [name for name in {**drawn, **declared} if drawn.get(name) != declared.get(name)]:
        changed = f"{', '.join(other)} had another range when {study.study_name} began"
        raise LabError(f"search: {changed}; go on with that one, or begin a new search with --again")
    return study


def _counts(study: optuna.Study) -> Counts:
    trials = study.get_trials(deepcopy=False)
    too_large = sum(TOO_LARGE in trial.user_attrs for trial in trials)
    states = Counter(trial.state for trial in trials)
    finished, pruned, failed = states[TrialState.COMPLETE], states[TrialState.PRUNED], states[TrialState.FAIL]
    return Counts(finished, pruned - too_large, failed, too_large, next(iter(_finished(study)), None))


def _finished(study: optuna.Study) -> list[Trial]:
    """Return the trials that were trained to their end, the best first, and each set of values once."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    unique = {repr(sorted(trial.params.items())): trial for trial in reversed(trials)}
    found = [Trial(one.number, _values(one), one.value) for one in unique.values() if one.value is not None]
    return sorted(found, key=lambda trial: (-trial.accuracy, trial.number))


def _outcome_text(trial: FrozenTrial) -> str:
    if trial.value is not None and trial.state is TrialState.COMPLETE:
        return f"{percent(trial.value)} %"
    if TOO_LARGE in trial.user_attrs:
        return f"too large: {trial.user_attrs[TOO_LARGE]:,} parameters"
    if trial.state is TrialState.PRUNED:
        return "pruned"
    return f"failed: {trial.user_attrs.get(REASON, 'its process ended early')}"


def _log(tracked: TrackedRun, study: optuna.Study, job: Job, result: SearchResult) -> None:
    counts = result.counts
    metrics: dict[str, float] = {"trials": counts.done}
    metrics |= {f"trials_{name}": getattr(counts, name) for name in ("pruned", "failed", "too_large")}
    if result.best:
        metrics |= {"best_validation_accuracy": result.best[0].accuracy, "too_good": result.too_good}
        tracked.set_tags({DESCRIPTION: best_table(result, "github")})
        tracked.log_text("\n".join(paste_lines(job, result.best[0].values)) + "\n", "best.txt")
    tracked.log_missing({counts.done: metrics})
    with quiet():
        tracked.log_text(study.trials_dataframe().to_csv(index=False), "trials.csv")
