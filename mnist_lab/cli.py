"""The command line of every experiment script: `main(EXPERIMENT)`. Flags, console output, exit codes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import TYPE_CHECKING

from mnist_lab import commandline
from mnist_lab.arguments import stable_text
from mnist_lab.commandline import DATA_DIR, TRACKING_URI, number_from
from mnist_lab.console import Console, SearchConsole, StudyConsole, print_run_id, print_search
from mnist_lab.errors import LabError, explain_mistakes, is_script
from mnist_lab.experiment import Experiment, quoted
from mnist_lab.paths import tracking_uri
from mnist_lab.running.job import Job, choose_device, only_read, with_own_figures
from mnist_lab.running.machine import without_collections
from mnist_lab.training.states import drawn_unseeded

if TYPE_CHECKING:  # imported when a run starts: MLflow takes seconds, and `--help` needs none of it
    from optuna.distributions import BaseDistribution

    from mnist_lab.running.checkpoint import Checkpoint
    from mnist_lab.running.workers import Trainers

logger = logging.getLogger(__name__)

LARGEST_SEED = 2**32 - 1  # more numpy would not take
MAX_SEEDS = 10_000  # of one study
INTERRUPTED = "To go on: `make resume` or --resume; with --seeds, --folds, --search the same command, no --again."


def main(
    experiment: Experiment, argv: Sequence[str] | None = None, *, search: Mapping[str, BaseDistribution] | None = None
) -> None:
    """Train one run, a study or a search, as the command line says, print its verdict, and track it in MLflow.

    search: the space that `--search` draws from: Optuna's distributions, by the names that `--set` takes.
    The step is named after the script that was started, so a script may call this only once. An error that the user
    can fix ends the program with one sentence on stderr and exit code 1.
    """
    if only_read(experiment):
        return
    script = _started_script(sys._getframe(1))  # a notebook shows a LabError's sentence by itself
    with commandline.lasting_output(), commandline.sentences(INTERRUPTED):
        if not isinstance(experiment, Experiment):
            raise LabError(f"main: {quoted(experiment)} is no Experiment(net=..., ...)")
        experiment.check()
        arguments = _parse(script, experiment, argv)
        commandline.say_what_is_done()
        if drawn_unseeded():
            logger.warning(
                "the script draws from torch before main(), where the run's seed has no effect: what it keeps of that "
                "differs from run to run; draw in the network's __init__, or call torch.manual_seed first"
            )
        logger.info("Preparing %s: starting MLflow", script.stem)
        job, resume = make_job(experiment, script, arguments)
        _check_as_read(sys._getframe(1), script)
        commandline.interrupt_on_signals()
        if arguments.search is not None:
            _search(job, search, arguments)
        elif arguments.seeds is not None or arguments.folds is not None:
            _study(job, arguments)
        else:
            from mnist_lab.running.run import run

            with closing(Console(job)) as console:
                result = run(job, arguments.seed or 0, console, resume=resume)
            print_run_id(result.run_id, job)


def _started_script(caller: FrameType) -> Path:
    """Return the script that was started; raises LabError in a notebook, or if it or a module called `main` before."""
    program, file = sys.modules["__main__"], Path(caller.f_code.co_filename)
    started = Path(getattr(program, "__file__", None) or "")  # absolute, whatever folder the script has gone to
    script = (started if started.name == Path(sys.argv[0]).name else Path(sys.argv[0])).resolve()
    is_own = caller.f_globals is vars(program) and file.name == script.name
    if not (is_script(script) and (is_own or file.exists())):
        advice = "save the cell as experiments/NAME.py (%%writefile experiments/NAME.py) and start it by `make NAME`"
        raise LabError(f"main: must be called from a script, as its name and code identify its runs; {advice}")
    if not is_own and caller.f_code.co_name == "<module>" and file.resolve() != script:
        advice = 'there, put it under `if __name__ == "__main__":`'
        raise LabError(f"main: {script.name} imports {file.name}, which calls main when it is imported; {advice}")
    if started.resolve() == script:  # else a program has called it
        if hasattr(program, "_has_called_main"):
            advice = "give each experiment a script of its own, or vary a value with --set"
            raise LabError(f"script: {script.name} calls main a second time; {advice}")
        program._has_called_main = True  # type: ignore[attr-defined]
    return script


def _check_as_read(caller: FrameType, script: Path) -> None:
    """Refuse a script that was saved since Python read it: its run would be taken for one of what it says now."""
    for frame, _ in walk_stack(caller):
        if frame.f_code.co_name == "<module>" and Path(frame.f_code.co_filename).resolve() == script:
            with suppress(OSError, SyntaxError, ValueError):  # it is being written
                if frame.f_code == compile(script.read_bytes(), script, "exec", dont_inherit=True):
                    return
            raise LabError(f"script: {script.name} was changed since it was read; start again")


@without_collections()
def make_job(experiment: Experiment, script: Path, arguments: argparse.Namespace) -> tuple[Job, Checkpoint | None]:
    """Return the job that is asked for, and with `--resume` the checkpoint to go on from; raises LabError."""
    from mnist_lab.running import checkpoint

    given = [("epochs", arguments.epochs), ("batch_size", arguments.batch_size), *map(assignment, arguments.set)]
    changes: dict[str, object] = {}
    for name, value in given:
        if name in changes:
            raise LabError(f"--set: {quoted(name)} is given twice")
        if value is not None:
            changes[name] = value
    experiment = with_own_figures(experiment, script)
    changed, overrides = experiment.override(changes)
    resume, uri = None, tracking_uri(arguments.tracking_uri)
    if arguments.resume is not None:
        wanted = {name: getattr(arguments, name) for name in ("seed", "limit", "holdout", "threads")}
        wanted_changes = {name: overrides.get(name) for name in changes}  # None: as declared
        resume = checkpoint.find(uri, wanted_changes, step=script.stem, run_id=arguments.resume or None, **wanted)
        changed, overrides = experiment.override(resume.changes)
        arguments.seed, arguments.limit, arguments.holdout = resume.seed, resume.limit, resume.holdout
    job = Job(
        script=script,
        experiment=changed,
        overrides=overrides,
        device=choose_device(arguments.device),
        threads=arguments.threads,
        data_dir=arguments.data_dir,
        tracking_uri=uri,
        limit=arguments.limit,
        holdout=arguments.holdout or (10_000 if arguments.search else 0),
        folds=arguments.folds or 0,
    )
    return job, resume


def _parse(script: Path, experiment: Experiment, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags; refuse those that don't go together, or hold what neither a file name nor a database can."""
    flags = parser(script, experiment)
    arguments = flags.parse_args(argv)
    several = next((name for name in ("seeds", "folds", "search") if getattr(arguments, name) is not None), None)
    if several and arguments.resume:
        flags.error(f"argument --resume: --{several} resumes by itself; leave out the run {arguments.resume}")
    if several:
        arguments.resume = None
    if arguments.folds and arguments.holdout:
        flags.error("argument --folds: not allowed with --holdout: each fold is held out in turn")
    for name, value in vars(arguments).items():
        if name in ("workers", "again", "cluster") and value and not several:
            flags.error(f"argument --{name}: only allowed with --seeds, --folds or --search")
        for text in map(str, value if isinstance(value, list) else [value]):
            if "\0" in text or text != text.encode("utf-8", "ignore").decode("utf-8"):
                flags.error(f"argument --{name.replace('_', '-')}: {text!r} is not text in UTF-8")
    return arguments


def _study(job: Job, arguments: argparse.Namespace) -> None:
    from mnist_lab.running.study import study

    unit, seeds = job.protocol.unit, arguments.seeds or range(job.folds)
    with _trainers(job, arguments) as trainers, closing(StudyConsole(job)) as console:
        result = study(job, seeds, console, trainers, again=arguments.again)
    print_run_id(result.run_id, job, f"with the runs of the {unit}s below it")
    if result.failed:
        raise LabError(f"{unit}s: {', '.join(map(str, result.failed))} failed; the same command tries again")


def _search(job: Job, space: Mapping[str, BaseDistribution] | None, arguments: argparse.Namespace) -> None:
    if space is None:
        raise LabError(f"search: {job.script.name} declares no space; give one by main(EXPERIMENT, search=SEARCH)")
    from mnist_lab.running import search

    with _trainers(job, arguments) as trainers, closing(SearchConsole(job)) as console:
        result = search.search(job, space, arguments.search, console, trainers, again=arguments.again)
    print_search(result, job)
    if not result.best:
        raise LabError("search: no trial was trained to its end")


def _trainers(job: Job, arguments: argparse.Namespace) -> AbstractContextManager[Trainers]:
    if arguments.cluster is None:
        from mnist_lab.running.workers import local

        return nullcontext(local(job, arguments.workers))
    from mnist_lab.running.cluster import Cluster

    return closing(Cluster(arguments.cluster, arguments.workers))


def parser(script: Path, experiment: Experiment) -> argparse.ArgumentParser:
    """Return the flags that every experiment script takes; their help ends with what the script declares."""
    description = f"Train {script.stem} on MNIST and track the run in MLflow."
    declared = " ".join(f"{name}={stable_text(value)}" for name, value in experiment.hyperparameters().items())
    epilog = f"declared: {declared}".replace("%", "%%")
    parser = argparse.ArgumentParser(prog=script.name, description=description, epilog=epilog)
    add, one_of = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--epochs", type=number_from(), help="epochs to train (an override)")
    add("--batch-size", type=number_from(), help="images per batch (an override)")
    one_of("--seed", type=number_from(0, LARGEST_SEED), help="seed of weights, image order and so on (default 0)")
    one_of("--seeds", type=_seeds, metavar="N", help="a study of N seeds, or of these (3,7,9 or 0-9), judged together")
    one_of("--folds", type=number_from(2, 100), metavar="K", help="cross-validate on K parts of the training images")
    one_of("--search", type=number_from(1, 100_000), metavar="N", help="search in N trials, judged on held-out images")
    add("--workers", type=number_from(1), metavar="N", help="processes on a CPU (default: one per core)")
    add("--cluster", metavar="ADDRESS", help="train on a Ray cluster: its head's HOST:PORT, or auto (docs/cluster.md)")
    add("--resume", nargs="?", const="", metavar="RUN_ID", help="continue the newest interrupted run, or this one")
    add("--again", action="store_true", help="train all seeds or folds anew, finished or not; begin a new search")
    add("--device", help="cuda, mps or cpu (default: the first that is available)")
    threads = "torch's threads on a CPU (default: one per core, in a study or search 1; beside other work give 1)"
    add("--threads", type=number_from(1, 1_024), metavar="N", help=threads)  # very many would end the process
    for flag, options in (DATA_DIR, TRACKING_URI):
        add(flag, **options)
    add("--limit", type=number_from(1), metavar="N", help="train on the first N images, for a quick look")
    add("--holdout", type=number_from(1), metavar="N", help="validate on N training images, and test once, at the end")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="override a hyperparameter, e.g. lr=0.05")
    return parser


def _seeds(text: str) -> Sequence[int]:
    """Read "10" as the seeds 0 to 9, "3,7,9" as these, and "0-4,9" as those from 0 to 4, and 9."""
    if text.startswith("-") or not {*",-"} & {*text}:
        return [*range(number_from(1, MAX_SEEDS)(text))]
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        low = number_from(0, LARGEST_SEED)(first)
        seeds += range(low, number_from(low, min(low + MAX_SEEDS - 1, LARGEST_SEED))(last if dash else first) + 1)
    if not len({*seeds}) == len(seeds) <= MAX_SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} has a seed twice, or more than {MAX_SEEDS:,} of them")
    return seeds


def assignment(text: str) -> tuple[str, str]:
    name, _, value = (part.strip() for part in text.partition("="))
    if not (name and value):
        raise LabError(f"--set: {quoted(text)} is not NAME=VALUE, e.g. lr=0.05")
    return name, value


explain_mistakes()  # a script imports this module before it declares anything
