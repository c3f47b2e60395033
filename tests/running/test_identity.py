"""What a run is of: the code in one digest, the state of a repository, this machine, and what is declared."""

import os
import pickle
import platform
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch

import tiny
from helpers import ROOT, read_runs
from mnist_lab import cli
from mnist_lab.cli import make_job, parser
from mnist_lab.errors import LabError
from mnist_lab.running import checkpoint, identity
from mnist_lab.running.identity import code_sha256, commit_tags, environment, find_sources
from mnist_lab.running.job import Job, read_declaration, with_own_figures
from mnist_lab.tracking.store import finished_runs, open_store
from networks import example

# Puts empty modules in the place of the lab's training and of libraries, and prints the digest of the script.
ON_ANOTHER_PYTHON = """
import sys, types
from pathlib import Path
names = ["mnist_lab", "mnist_lab.training", "mnist_lab.running", "torch", "git"]
modules = {{name: types.ModuleType(name) for name in names}}
modules["mnist_lab"].__path__, modules["mnist_lab.running"].__path__ = [{lab!r}], [{lab!r} + "/running"]
modules["mnist_lab.training"].RECIPE = {recipe}
modules["git"].GitError = modules["git"].InvalidGitRepositoryError = modules["git"].Repo = Exception
modules["torch"].device = object
sys.modules.update(modules)
from mnist_lab.running.identity import code_sha256, find_sources
print(code_sha256(find_sources(Path({script!r}))))
"""
# What the syntax trees of Python 3.11 to 3.13 differ in, among others: f-strings, empty lists, type parameters.
ODD_SCRIPT = '''
"""A script."""
import torch
width, text = 3, "abc"
shown = f"{text!r:>{width}}" f"a{text}" "b" f"{text:}" f"{width=}" rf"\\d{text}"
def f(a, /, b: int = 3, *c, d=4, **e):
    """Return None."""
class Net:
    "A network."
    async def g(self):
        async with self as b, self as c:
            pass
        match self:
            case {"a": 1, **rest}:
                return -1 + 1e999 + 2j
            case [1, *_] | None:
                return lambda *a, k=1: (yield)
'''


def digest(script: Path) -> str:
    return code_sha256(find_sources(script))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    files = {
        "idea.py": "import math\nimport torch\nfrom nets.deep import Net\nimport tricks\n\nLR = 0.1\n",
        "nets/__init__.py": "",
        "nets/deep.py": "from . import blocks\nfrom .sizes import WIDTH\n\nclass Net:\n    width = WIDTH\n",
        "nets/blocks.py": "BLOCKS = 3\n",
        "nets/sizes.py": "WIDTH = 8\n",
        "nets/unused.py": "WIDTH = 9\n",
        "tricks.py": "def warm_up(epoch):\n    import late\n    return late.FACTOR\n",
        "late.py": "FACTOR = 0.5\n",
        "other.py": "LR = 0.2\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path / "idea.py"


def test_the_sources_are_what_the_script_imports_wherever_the_import_stands(script: Path) -> None:
    found = {name: file.relative_to(script.parent).as_posix() for name, file in find_sources(script).items()}
    assert found == {
        **{"script": "idea.py", "tricks": "tricks.py", "late": "late.py", "nets": "nets/__init__.py"},
        **{f"nets.{name}": f"nets/{name}.py" for name in ("deep", "blocks", "sizes")},
    }


def test_a_change_of_any_source_changes_it(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(script)
    for name in ("idea.py", "nets/__init__.py", "nets/blocks.py", "nets/sizes.py", "late.py", "other.py"):
        file = script.parent / name
        text = file.read_text()
        file.write_text(text + "CHANGED = True\n")
        assert (digest(script) == before) == (name == "other.py"), name
        file.write_text(text)

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(script.parent, elsewhere, ignore=shutil.ignore_patterns("elsewhere"))
    assert digest(elsewhere / "idea.py") == before
    monkeypatch.setattr(identity, "RECIPE", identity.RECIPE + 1)
    assert digest(script) != before


def test_modules_outside_the_folder_count(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script.parent / "nets" / "__init__.py").unlink()
    (tmp_path / "far").mkdir()
    (script.parent / "tricks.py").rename(tmp_path / "far" / "tricks.py")
    monkeypatch.syspath_prepend(str(tmp_path / "far"))

    assert find_sources(script).keys() == {"script", "nets.deep", "nets.blocks", "nets.sizes", "tricks", "late"}


def test_comments_docstrings_layout_and_a_space_to_search_in_do_not_count(tmp_path: Path) -> None:
    def of(text: str) -> str:
        (tmp_path / "step.py").write_text(text)
        return digest(tmp_path / "step.py")

    declared = of('"""Result: not known."""\n\n\nclass Net:\n    lr = 0.1\n')
    assert of('"""Result: 99.4 %."""\n\nclass Net:\n    """A network."""\n    lr = (0.1)  # high\n') == declared
    assert of('"""Result: not known."""\n\n\nclass Net:\n    lr = 0.2\n') != declared
    assert len(declared) == 64

    plain = "from mnist_lab import main\n\nLR = 0.1\nmain(LR)\n"
    searched = (
        "import optuna\nfrom mnist_lab import main\nfrom optuna.distributions import FloatDistribution\n\n"
        'LR = 0.1\nSPACE = {"lr": FloatDistribution(0.1, 0.2)}\nmain(LR, search=SPACE)\n'
    )
    assert of(plain) == of(searched) != of(searched.replace("LR = 0.1", "LR = 0.2"))


def test_what_the_running_script_loads_by_other_means_counts_too(script: Path) -> None:
    script.write_text("""
import importlib, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent / "far"))
net = importlib.import_module("far" + "_net")  # a name that no reader of the text can know
from mnist_lab.running.identity import find_sources
print(sorted(find_sources(Path(__file__))))
""")
    (script.parent / "far").mkdir()
    (script.parent / "far" / "far_net.py").write_text("WIDTH = 1\n")

    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["['far_net', 'script']"]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_digest_is_that_of_every_python(version: str, script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.write_text(script.read_text() + ODD_SCRIPT)
    program = ON_ANOTHER_PYTHON.format(recipe=identity.RECIPE, lab=str(identity.LAB), script=str(script))
    monkeypatch.setenv("PYENV_VERSION", version)  # pyenv's programs refuse to start another
    if subprocess.run(f"python{version} -c ''", shell=True, capture_output=True).returncode != 0:  # noqa: S602
        pytest.skip(f"there is no Python {version} on this machine")

    done = subprocess.run([f"python{version}", "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == digest(script)


# ---- where it comes from


def git(folder: Path, *arguments: str) -> str:
    return subprocess.check_output(["git", "-C", str(folder), *arguments], text=True).rstrip("\n")


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a repository with one commit: experiments/idea.py, notes.txt, and an ignored folder."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # set where a git hook runs the tests
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    (tmp_path / "gitconfig").write_text("[user]\n\tname = A\n\temail = a@example.org\n")
    root = tmp_path / "repository"
    for name, text in {"experiments/idea.py": "EPOCHS = 14\n", "notes.txt": "one\n", ".gitignore": "runs/\n"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "--quiet")
    git(root, "add", "--all", "--force")
    git(root, "commit", "--quiet", "--message", "First")
    (root / "runs").mkdir()
    (root / "runs" / "mlflow.db").write_text("ignored")
    return root


def tags(commit: str, dirty: str) -> dict[str, str]:
    return {"git_commit": commit, "git_dirty": dirty}


def test_the_commit_and_whether_any_file_differs_from_it(repository: Path, tmp_path: Path) -> None:
    script, commit = repository / "experiments" / "idea.py", git(repository, "rev-parse", "HEAD")
    assert commit_tags(script) == tags(commit, "false")
    (repository / "new.py").touch()
    assert commit_tags(script) == tags(commit, "true")
    (repository / "new.py").unlink()
    (repository / "notes.txt").write_text("other\n")
    assert commit_tags(script) == tags(commit, "true")

    assert commit_tags(tmp_path / "idea.py") == tags("none", "false")
    git(tmp_path, "init", "--quiet")
    assert commit_tags(tmp_path / "idea.py") == tags("none", "true")  # before the first commit


@pytest.mark.parametrize("fault", ["another user's", "no git"])
def test_where_git_refuses_the_state_is_unknown_and_that_is_said(
    fault: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "another user's":
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))

    assert commit_tags(repository / "experiments" / "idea.py") == tags("unknown", "unknown")
    assert "recorded as unknown" in caplog.text


def test_what_the_lab_writes_and_fetches_is_no_change(repository: Path) -> None:
    script, store = repository / "experiments" / "idea.py", repository / "experiments" / "store"
    (store / "artifacts").mkdir(parents=True)
    (store / "mlflow.db").write_text("runs")
    written = [store / "mlflow.db", store / "artifacts"]
    commit = git(repository, "rev-parse", "HEAD")
    assert commit_tags(script, written) == tags(commit, "false")
    (repository / "notes.txt").write_text("other\n")
    # A folder around the script hides no change.
    assert commit_tags(script, [*written, repository, repository.parent]) == tags(commit, "true")


def test_versions_and_hardware_are_those_in_use() -> None:
    versions = environment(torch.device("cpu"))
    assert (versions["python"], versions["mlflow"]) == (platform.python_version(), mlflow.__version__)
    name, cores, instructions = versions["hardware"].rsplit(", ", 2)
    assert cores == f"{os.cpu_count()} cores"
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        cpuinfo = Path("/proc/cpuinfo").read_text()
        assert f": {name}\n" in cpuinfo
        assert instructions == ("AVX512" if "avx512f" in cpuinfo else "AVX2" if "avx2" in cpuinfo else "DEFAULT")


SCRIPT = """
from functools import partial

import torch
from nets.wide import Net

from mnist_lab import Experiment, main

EXPERIMENT = Experiment(net=Net, epochs=1, batch_size=64, optimizer=partial(torch.optim.SGD, lr=0.01))
main(EXPERIMENT)
"""
NET = """
from torch import nn

from .sizes import WIDTH


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, WIDTH), nn.Linear(WIDTH, 10))
"""
# ---- what a command line makes of a declaration

Command = Callable[..., int]


def forget_nets() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
        del sys.modules[name]


@pytest.fixture
def idea(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "__init__.py").touch()
    (tmp_path / "nets" / "wide.py").write_text(NET)
    (tmp_path / "nets" / "sizes.py").write_text("WIDTH = 4\n")
    (tmp_path / "my_idea.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "my_idea.py"


@pytest.fixture
def command(idea: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs the script in this process, on few images, and returns its exit code."""

    def run(*flags: str) -> int:
        given = ["--tracking-uri", uri, "--device", "cpu", "--limit", "64", *flags]
        monkeypatch.setattr(sys, "argv", [str(idea), *given])
        forget_nets()
        try:
            runpy.run_path(str(idea), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


def job_of(idea: Path, uri: str) -> Job:
    forget_nets()
    return Job(script=idea, experiment=read_declaration(idea), tracking_uri=uri, limit=64)


def test_a_module_that_changes_is_another_experiment(command: Command, idea: Path, uri: str, database: Path) -> None:
    assert command() == 0
    (run,) = read_runs(database)
    store, job = open_store(uri), job_of(idea, uri)
    assert set(finished_runs(store, job.params, job.tags)) == {0}
    assert run.tags["code_sha256"] == job.code_sha256

    (idea.parent / "nets" / "sizes.py").write_text("WIDTH = 8\n")

    widened = job_of(idea, uri)
    assert finished_runs(store, widened.params, widened.tags) == {}
    kept = {path.relative_to(run.artifacts).as_posix() for path in (run.artifacts / "source").rglob("*.py")}
    assert kept == {f"source/{name}.py" for name in ("my_idea", "nets/__init__", "nets/wide", "nets/sizes")}
    assert (run.artifacts / "source" / "nets" / "sizes.py").read_text() == "WIDTH = 4\n"


def test_a_job_is_sent_without_its_experiment_and_read_anew(idea: Path, uri: str) -> None:
    job = job_of(idea, uri)

    sent = pickle.loads(pickle.dumps(job))  # noqa: S301
    assert sent.experiment is None
    sent.read_experiment()

    assert sent.identity == job.identity
    (idea.parent / "nets" / "sizes.py").write_text("# a remark\nWIDTH = 4\n")
    job.check_unchanged()
    (idea.parent / "nets" / "sizes.py").write_text("WIDTH = 8\n")
    for check in (job.check_unchanged, pickle.loads(pickle.dumps(job)).read_experiment):  # noqa: S301
        with pytest.raises(LabError) as refusal:
            check()
        assert refusal.value.field == "script"


WITH_CALLABLES = """
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mnist_lab import Experiment, main


class Net(nn.Module):
    def __init__(self, act=F.relu, last=nn.LeakyReLU(0.2), kind=nn.GELU, scale=torch.tensor([1.0, 2.0])):
        super().__init__()
        self.act, self.linear = act, nn.Linear(784, 10)

    def forward(self, images):
        return self.act(self.linear(images.flatten(1)))


def warm_up(epoch):
    return min(1.0, (epoch + 1) / 3)


EXPERIMENT = Experiment(
    net=Net,
    epochs=3,
    batch_size=64,
    optimizer=partial(torch.optim.SGD, lr=0.01),
    scheduler=partial(LambdaLR, lr_lambda=warm_up),
)
main(EXPERIMENT)
"""


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_functions_classes_modules_and_tensors_are_declared_alike_in_every_process(
    command: Command, idea: Path, uri: str, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idea.write_text(WITH_CALLABLES)
    pickle.loads(pickle.dumps(job_of(idea, uri))).read_experiment()  # noqa: S301  as a worker does

    with monkeypatch.context() as patch:
        patch.setattr(cli.Console, "on_epoch", interrupt)
        assert command() == 130
    assert command("--resume") == 0

    (run,) = read_runs(database)
    assert run.status == "FINISHED"
    texts = {"lr_lambda": "warm_up", "act": "relu", "last": "LeakyReLU(negative_slope=0.2)", "kind": "GELU"}
    assert {name: run.params[name] for name in texts} == texts
    assert re.fullmatch(r"Tensor\(shape=\(2,\), dtype=float32, sha256=[0-9a-f]{12}\)", run.params["scale"])
    again = job_of(idea, uri)
    assert set(finished_runs(open_store(uri), again.params, again.tags)) == {0}


def test_a_value_without_effect_is_tagged_and_refused_as_an_override(
    command: Command, idea: Path, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overridden = WITH_CALLABLES.replace("partial(LambdaLR, lr_lambda=warm_up)", "partial(OneCycleLR, max_lr=0.1)")
    idea.write_text(overridden.replace("import LambdaLR", "import OneCycleLR"))

    assert command("--set", "lr=5") == 1
    assert capsys.readouterr().err.startswith("error: lr: 5.0 ")
    assert command() == 0

    (run,) = read_runs(database)
    assert run.tags["no_effect"] == "lr"


# ---- which interrupted run `--resume` goes on with


# Of runs that were stopped after their first epoch; the last is the newest.
INTERRUPTED = [
    {"run_id": "a", "seed": 11, "changes": {"epochs": 3}, "limit": 128},
    {"run_id": "b", "seed": 12, "changes": {"epochs": 3}, "limit": 128},
    {"run_id": "c", "seed": 11, "limit": 128},
    {"run_id": "d", "seed": 11, "changes": {"epochs": 2, "lr": 0.05}, "limit": 64, "holdout": 500},
    {"run_id": "e", "seed": 13, "changes": {"epochs": 5}, "limit": 256},
]


def test_the_flags_choose_the_interrupted_run_or_are_refused_by_name(
    idea: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, fields in enumerate(INTERRUPTED):
        one = example(**{"script": str(idea), "changes": {}, **fields})  # type: ignore[arg-type]
        checkpoint.save(one, uri)
        os.utime(checkpoint.file_of(uri, one.run_id), (age, age))
    experiment = read_declaration(idea)

    stated = replace(experiment, reported={"best_test_accuracy": 99.0})
    job, _ = make_job(stated, idea, parser(idea, stated).parse_args([]))
    assert job.experiment.reported == {}  # not by it
    monkeypatch.setattr("mnist_lab.running.job.read_declaration", lambda _: stated)
    job.read_experiment()
    assert job.experiment.reported == {}  # nor in a worker
    published = shutil.copy(script := ROOT / "experiments" / "step1_baseline.py", idea.parent), script
    taken = replace(stated, reported=read_declaration(script).reported)
    assert [with_own_figures(taken, Path(one)).reported for one in published] == [{}, taken.reported]  # of a copy, none

    def choose(flags: str) -> str:
        given = [*flags.split(), "--resume", "--tracking-uri", uri]
        _, resume = make_job(experiment, idea, parser(idea, experiment).parse_args(given))
        assert resume is not None
        return resume.run_id

    chosen = {"--epochs 3 --limit 128 --seed 11": "a", "--seed 12": "b", "--set epochs=1": "c", "--holdout 500": "d"}
    for flags, run_id in {**chosen, "--limit 64": "d", "": "e"}.items():
        assert choose(flags) == run_id, flags
    for flags, asked in [
        ("--epochs 7 --seed 11", "seed 11, epochs 7"),
        ("--epochs 1 --seed 12", "seed 12, epochs as declared"),
    ]:
        with pytest.raises(LabError, match=f"^resume: .*{asked}.*seed 12 epochs=3 limit=128"):
            choose(flags)


def test_params_are_those_declared_though_an_object_changes_in_use(idea: Path, uri: str) -> None:
    norm = torch.nn.BatchNorm2d(1)
    job = Job(script=idea, experiment=replace(tiny.EXPERIMENT, augmentation=norm), tracking_uri=uri)
    before = dict(job.params)
    norm(torch.ones(1, 1, 28, 28))
    assert job.params == before
