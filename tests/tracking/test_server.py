"""`python -m mnist_lab server`: a real server on a real PostgreSQL, with users, writers, and ends of many kinds."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mlflow
import psutil
import psycopg
import pytest
from mlflow.server import get_app_client

import forkserver
from forkserver import PATIENCE, Program, processes, run_program
from helpers import TINY, all_gone, free_port, ports_of, wait_until
from load_workers import log_points, value
from mnist_lab import paths
from mnist_lab.errors import LabError
from mnist_lab.tracking import server as servers
from mnist_lab.tracking.connection import environment_variables
from mnist_lab.tracking.store import open_store

WRITERS = 8
NAMES = ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "epoch_seconds"]
PASSWORD = f"p%ss/w@rd:{secrets.token_hex(4)}"  # with what has a meaning in a URI and in MLflow's settings


@pytest.fixture(scope="module")
def reachable() -> Iterator[Path]:
    """Return a folder that PostgreSQL can enter too, which runs as another user where the tests run as root."""
    try:
        servers.find_programs()
    except LabError as error:
        pytest.skip(str(error))
    folder = Path(tempfile.mkdtemp(prefix="mnist-lab-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def begin(project: Path, *, anew: bool = False) -> None:
    servers.START_TIMEOUT = PATIENCE
    paths.PROJECT_ROOT = project
    if anew:  # MLflow's module of passwords can't be loaded in a copy of a process that has MLflow
        forkserver._can_be_copied = lambda: False


class Team:
    """`make server` on a folder and a port of its own."""

    def __init__(self, folder: Path, *flags: str, **variables: str) -> None:
        self.folder, self.flags, self.variables = folder, flags, variables
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def begin(self) -> None:
        words = ["-m", "mnist_lab", "server", "--folder", self.folder / "server", "--port", str(self.port)]
        environment = {**os.environ, **self.variables}
        first = partial(begin, self.folder / "project", anew="--auth" in self.flags)
        self.process = Program(*words, *self.flags, cwd=self.folder, env=environment, first=first)

    def start(self) -> None:
        self.begin()
        wait_until(lambda: "Ready. Ctrl-C stops the server." in self.process.stdout, self.process)

    def family(self) -> list[psutil.Process]:
        started = psutil.Process(self.process.pid)
        return [started, *started.children(recursive=True)]

    def kill(self) -> None:
        """Kill all of it outright, as a power cut does."""
        family = self.family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        wait_until(lambda: not any(one.is_running() for one in family))  # to PostgreSQL, a zombie is one that runs

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()

    def pid_of_database(self) -> int:
        return int((self.folder / "server" / "postgres" / "postmaster.pid").read_text().split()[0])

    def sql(self, query: str) -> list[tuple[Any, ...]]:
        sockets = (self.folder / "server" / "postgres" / "postmaster.pid").read_text().splitlines()[4]
        with psycopg.connect(host=sockets, user="mnist_lab", dbname="postgres") as connection:
            return connection.execute(query.encode()).fetchall()


@pytest.fixture(scope="module")
def one_team(reachable: Path) -> Iterator[Team]:
    team = Team(reachable)
    team.start()
    yield team
    team.stop()


@pytest.fixture
def team(one_team: Team) -> Team:
    """Return a server that is there; the tests share it, and its runs."""
    if one_team.process.poll() is not None:
        one_team.start()
    return one_team


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paths, "PROJECT_ROOT", tmp_path / "project")
    for name in ("MLFLOW_BACKEND_STORE_URI", servers.ADMIN_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_it_says_what_to_set_and_listens_on_one_port_of_loopback(team: Team) -> None:
    lines = team.process.stdout.splitlines()
    assert lines[:2] == [f"The runs: {team.uri}/lab", f"export MLFLOW_TRACKING_URI={team.uri}"]
    assert ports_of(team.family()) == {("127.0.0.1", team.port)}


def test_eight_writers_at_once_lose_no_point(team: Team) -> None:
    store, together, epochs = open_store(team.uri), processes.Barrier(WRITERS), 25
    started = [
        processes.Process(target=log_points, args=(store, writer, epochs, NAMES, together)) for writer in range(WRITERS)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)

    assert [process.exitcode for process in started] == [0] * WRITERS
    of_writers = "FROM metrics m JOIN params p USING (run_uuid) WHERE p.key = 'writer'"
    assert sorted(team.sql(f"SELECT p.value, m.key, m.step, m.value {of_writers}")) == sorted(
        (str(writer), name, epoch, value(writer, epoch, number))
        for writer in range(WRITERS)
        for epoch in range(1, epochs + 1)
        for number, name in enumerate(NAMES)
    )
    assert team.sql("SELECT status FROM runs WHERE name LIKE 'writer %'") == [("FINISHED",)] * WRITERS


def test_a_study_whose_server_is_killed_and_comes_back_lacks_no_point(team: Team, tmp_path: Path) -> None:
    seeds, epochs = 2, 6
    flags = ["--seeds", str(seeds), "--epochs", str(epochs), "--limit", "256"]
    first = partial(begin, tmp_path / "project")
    patient = {
        **os.environ,
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(PATIENCE),  # a busy machine is no outage
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",  # it asks again after 0, 1, 2, 4 seconds
    }
    study = Program(TINY, *flags, "--tracking-uri", team.uri, cwd=tmp_path, env=patient, first=first)
    of_seeds = "FROM metrics JOIN params USING (run_uuid) WHERE params.key = 'seed' AND metrics.key = 'test_accuracy'"
    wait_until(lambda: team.sql(f"SELECT count(DISTINCT run_uuid) {of_seeds}") == [(seeds,)], study)

    team.kill()
    team.start()

    assert study.wait() == 0, study.stderr
    assert "View run" not in study.stdout  # which MLflow prints for each run that ends
    points = team.sql(f"SELECT params.value, step {of_seeds} ORDER BY 1, 2")
    assert points == [(str(seed), epoch) for seed in range(seeds) for epoch in range(1, epochs + 1)]
    runs = team.sql("SELECT name, status FROM runs WHERE name LIKE 'tiny%' ORDER BY name")
    assert [status for _, status in runs] == ["FINISHED"] * (seeds + 1), runs


def test_a_second_server_is_refused(team: Team, tmp_path: Path) -> None:
    flags = ["-m", "mnist_lab", "server", "--folder", team.folder / "server"]
    same_port = run_program(*flags, "--port", str(team.port), cwd=tmp_path)
    same_database = run_program(*flags, "--port", str(free_port()), cwd=tmp_path)

    assert (same_port.returncode, same_database.returncode) == (1, 1)
    assert same_port.stderr.startswith(f"error: port: {team.port} ")
    assert f"PID {team.pid_of_database()}" in same_database.stderr
    assert same_port.stderr.count("\n") == same_database.stderr.count("\n") == 1
    open_store(team.uri)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_server_ends_all_that_it_started(number: signal.Signals, team: Team) -> None:
    started = team.family()
    assert len(started) >= 8  # this one, MLflow's with its workers, PostgreSQL's, and who watches

    team.process.send_signal(number)

    assert team.process.wait() == (0 if number == signal.SIGTERM else -9)
    wait_until(lambda: all_gone(started))
    assert not (team.folder / "server" / "postgres" / "postmaster.pid").exists()  # so it ended in order
    assert "Traceback" not in team.process.stderr


def test_a_database_that_dies_ends_the_server(team: Team) -> None:
    os.kill(team.pid_of_database(), signal.SIGKILL)

    assert team.process.wait() == 1
    assert team.process.stderr.splitlines()[-1].startswith("error: PostgreSQL ")


# ---- a database that is named, passwords, and other machines


class Foreign:
    """A PostgreSQL of somebody else's: on a port, with a password."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder = folder / "foreign"
        account = servers.ACCOUNT if os.geteuid() == 0 else {}
        programs = servers.find_programs()
        self.folder.mkdir(mode=0o700)
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        servers._give(self.folder, account)
        flags = ["--username", "owner", "--pwfile", folder / "password", "--auth", "scram-sha-256"]
        subprocess.run([programs / "initdb", "-D", self.folder, *flags], cwd="/", check=True, **account)
        (folder / "password").unlink()
        flags = ["-p", str(self.port), "-k", "", "-c", "listen_addresses=127.0.0.1"]
        with (folder / "foreign.log").open("wb") as log:
            command = [programs / "postgres", "-D", self.folder, *flags]
            self.process = subprocess.Popen(command, cwd="/", stdout=log, stderr=log, **account)
        wait_until(lambda: not servers._problem(self.uri()))

    def uri(self, password: str = PASSWORD) -> str:
        return f"postgresql://owner:{quote(password, safe='')}@127.0.0.1:{self.port}/postgres"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def foreign(reachable: Path) -> Iterator[Foreign]:
    foreign = Foreign(reachable)
    yield foreign
    foreign.stop()


@pytest.fixture(scope="module")
def guarded(foreign: Foreign, reachable: Path) -> Iterator[Team]:
    """Return a server that asks for passwords, on a database that is named, for other machines too."""
    (reachable / "guarded").mkdir()
    flags = ["--auth", "--host", "0.0.0.0", "--workers", "1"]  # noqa: S104
    team = Team(reachable / "guarded", *flags, MLFLOW_BACKEND_STORE_URI=foreign.uri())
    team.start()
    yield team
    team.stop()


@pytest.fixture
def admin(guarded: Team, monkeypatch: pytest.MonkeyPatch) -> str:
    """Follow what the server prints, in this process's environment, and return the admin's password."""
    exports = "\n".join(line for line in guarded.process.stdout.splitlines() if line.startswith("export "))
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    shell = subprocess.run(
        ["sh", "-c", f"{exports}\nprintenv {' '.join(names)}"], capture_output=True, text=True, check=True
    )
    values = dict(zip(names, shell.stdout.splitlines(), strict=True))
    for name, text in values.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded.uri)
    return values["MLFLOW_TRACKING_PASSWORD"]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "not-the-password"},
        {"MLFLOW_TRACKING_TOKEN": "not-a-token"},
    ],
    ids=["nothing", "a wrong password", "a wrong token"],
)
def test_nobody_is_let_in_without_the_right_password(variables: dict[str, str], guarded: Team) -> None:
    wanted = "MLFLOW_TRACKING_USERNAME|MLFLOW_TRACKING_TOKEN"
    with environment_variables(variables), pytest.raises(LabError, match=wanted):
        open_store(guarded.uri)


def add_user(name: str, guarded: Team, deny: str = "") -> dict[str, str]:
    """Add a user as the admin, who is denied an experiment; return the user's environment."""
    own, users = secrets.token_urlsafe(18), get_app_client("basic-auth", guarded.uri)
    users.create_user(name, own)
    if deny:
        users.grant_user_permission(name, "experiment", deny, "DENY")
    return {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": own}


@pytest.mark.usefixtures("admin")
def test_a_user_whom_the_admin_adds_trains_and_compares_and_one_who_is_denied_is_told_so(
    guarded: Team, tmp_path: Path
) -> None:
    denied = add_user("max", guarded, deny=open_store(guarded.uri).experiment_id)
    with environment_variables(denied), pytest.raises(LabError, match="HTTP 403.*'mnist'"):
        open_store(guarded.uri)
    environment = os.environ | add_user("mia", guarded)
    flags = ["--epochs", "2", "--limit", "256", "--threads", "1"]
    trained = Program(TINY, *flags, cwd=tmp_path, env=environment, first=partial(begin, tmp_path / "project"))
    assert trained.wait() == 0, trained.stderr
    compared = run_program("-m", "mnist_lab", "compare", "--include-overrides", cwd=tmp_path, env=environment)

    assert compared.returncode == 0, compared.stderr
    assert "tiny" in compared.stdout
    client = mlflow.MlflowClient(guarded.uri)
    (run,) = client.search_runs([open_store(guarded.uri).experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")  # no path of the server's machine
    assert list((guarded.folder / "server" / "artifacts").rglob("predictions.npz"))
    assert len(client.get_metric_history(run.info.run_id, "test_accuracy")) == 2
    assert mlflow.pytorch.load_model(f"runs:/{run.info.run_id}/{run.data.tags['step']}") is not None


def test_no_password_is_in_a_command_line_nor_in_what_is_printed_or_kept(guarded: Team, admin: str) -> None:
    commands = [" ".join(process.cmdline()) for process in guarded.family()]
    own_file = guarded.folder / "server" / "admin_password"
    for secret, files in ((PASSWORD, []), (quote(PASSWORD, safe=""), []), (admin, [own_file])):
        assert [command for command in commands if secret in command] == []
        assert secret not in guarded.process.stdout + guarded.process.stderr
        kept = [path for path in guarded.folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
        assert kept == files
    modes = [(guarded.folder / "server" / name).stat().st_mode & 0o777 for name in ("admin_password", "auth.ini")]
    assert modes == [0o600, 0o600]


def test_other_machines_are_answered_under_this_ones_names_only(guarded: Team, admin: str) -> None:
    for name in (socket.gethostname(), socket.gethostbyname(socket.gethostname())):
        assert open_store(f"http://{name}:{guarded.port}").experiment_id
    assert f"export MLFLOW_TRACKING_URI=http://{socket.gethostname()}:{guarded.port}\n" in guarded.process.stdout
    assert f"0.0.0.0:{guarded.port}" in guarded.process.stderr.splitlines()[0]
    with pytest.raises(LabError, match="MLFLOW_SERVER_ALLOWED_HOSTS"):
        open_store(f"http://127.0.0.9:{guarded.port}")


# ---- what is refused


def test_a_named_database_that_cannot_be_used_is_refused_and_left_alone(foreign: Foreign) -> None:
    with pytest.raises(LabError) as refused, servers.named_database(foreign.uri("wrong-password")):
        pytest.fail("it was let in")
    assert f"owner:***@127.0.0.1:{foreign.port}" in str(refused.value)
    assert "password authentication failed" in str(refused.value)
    assert "wrong-password" not in str(refused.value)
    with psycopg.connect(foreign.uri(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE other")
    other = foreign.uri().replace("/postgres", "/other")
    with psycopg.connect(other) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('another')")
    with pytest.raises(LabError, match="another program's"), servers.named_database(other):
        pytest.fail("it was used")


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--port", "80"], "port: 80 "),
        (["--host", "192.0.2.1"], "host: '192.0.2.1' "),
        (["--backend-store-uri", "mysql://me:secret@db/x"], "backend store 'mysql://me:***@db/x' "),
        (["--backend-store-uri", "host=db password=secret"], "backend store '...' "),
        (["--backend-store-uri", "postgresql://me:secret@127.0.0.1:1/x"], "backend store 'postgresql://me:***@127"),
        (["--backend-store-uri", "postgresql://me:secret@127.0.0.1:port/x"], "backend store 'postgresql://me:***@127"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_sentence(
    flags: list[str], field: str, lab: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    port = [] if "--port" in flags else ["--port", free_port()]
    with pytest.raises(SystemExit, match="1"):
        lab("server", "--folder", tmp_path / "s", *flags, *port)
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"error: {field}")
    assert "secret" not in sentence
    assert not (tmp_path / "s").exists()


def test_where_postgresql_is_missing_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(servers, "DEBIAN", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match=r"not installed: .*apt-get install postgresql.*--backend-store-uri"):
        servers.find_programs()


def test_a_folder_that_is_no_database_or_cannot_be_entered_is_named_and_left_alone(reachable: Path) -> None:
    for name, mode, sentence in (
        ("empty", 0o755, "PostgreSQL did not start .*empty"),
        ("closed/postgres", 0o700, "closed/postgres.*'postgres'.*Permission denied"),  # PostgreSQL is another user
    ):
        folder = reachable / name
        (reachable / name.partition("/")[0]).mkdir(mode=mode)
        if os.geteuid() == 0 or mode == 0o755:
            with pytest.raises(LabError, match=sentence), servers.own_database(folder):
                pytest.fail("it started")
            assert list((reachable / name.partition("/")[0]).iterdir()) == []
