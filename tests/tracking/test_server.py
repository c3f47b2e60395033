"""`python -m mnist_lab server`: a real server on a real PostgreSQL, with users, writers, and ends of many kinds."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote

import mlflow
import psutil
import psycopg
import pytest
from mlflow.server import get_app_client

import forkserver
from forkserver import PATIENCE, Program, processes, run_program
from helpers import TINY, wait_until
from load_workers import log_points, value
from mnist_lab import paths
from mnist_lab.errors import LabError
from mnist_lab.tracking import postgres, serving
from mnist_lab.tracking.run import track
from mnist_lab.tracking.server import Settings
from mnist_lab.tracking.store import open_store
from run_writer import write_run

WRITERS = 8
NAMES = ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "epoch_seconds"]
PASSWORD = f"p%ss/w@rd:{secrets.token_hex(4)}"  # with what has a meaning in a URI and in MLflow's settings


@pytest.fixture(scope="module")
def reachable() -> Iterator[Path]:
    """Return a folder that PostgreSQL can enter too, which runs as another user where the tests run as root."""
    try:
        postgres.programs(Path("nowhere")), postgres.account()
    except LabError as error:
        pytest.skip(str(error))
    folder = Path(tempfile.mkdtemp(prefix="mnist-lab-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def begin(project: Path, *, anew: bool = False) -> None:
    serving.START_TIMEOUT = postgres.START_TIMEOUT = PATIENCE
    paths.PROJECT_ROOT = project
    if anew:  # MLflow's module of passwords can't be loaded in a copy of a process that has MLflow
        forkserver._can_be_copied = lambda: False


class Team:
    """`make server` on a folder and a port of its own."""

    def __init__(self, folder: Path, *flags: str, **variables: str) -> None:
        self.folder, self.flags, self.variables = folder, flags, variables
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.project = folder / "project"

    def begin(self) -> None:
        words = ["-m", "mnist_lab", "server", "--folder", self.folder / "server", "--port", str(self.port)]
        environment = {**os.environ, **self.variables}
        first = partial(begin, self.project, anew="--auth" in self.flags)
        self.process = Program(*words, *self.flags, cwd=self.folder, env=environment, first=first)

    def start(self) -> None:
        self.begin()
        wait_until(lambda: "Ready. Ctrl-C stops the server." in self.process.stdout, self.process)

    def family(self) -> list[psutil.Process]:
        started = psutil.Process(self.process.pid)
        return [started, *started.children(recursive=True)]

    def kill(self) -> None:
        """Kill all of it outright, as a power cut does."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()

    @contextlib.contextmanager
    def sql(self) -> Iterator[psycopg.Connection]:
        sockets = (self.folder / "server" / "postgres" / "postmaster.pid").read_text().splitlines()[4]
        with psycopg.connect(host=sockets, user="mnist_lab", dbname="postgres", autocommit=True) as connection:
            yield connection

    def count(self, query: str) -> int:
        with self.sql() as connection:
            row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return int(row[0])


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
def _nothing_waits_in_the_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mnist_lab.paths.PROJECT_ROOT", tmp_path / "project")
    for name in ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_AUTH_ADMIN_USERNAME"):
        monkeypatch.delenv(name, raising=False)


def test_it_says_what_to_set_and_listens_on_one_port_of_loopback(team: Team) -> None:
    runs, export, last = team.process.stdout.splitlines()
    sockets = [
        (connection.laddr.ip, connection.laddr.port)
        for process in team.family()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]

    assert runs == f"The runs: {team.uri}/lab"
    assert export == f"export MLFLOW_TRACKING_URI={team.uri}"
    assert last == "Ready. Ctrl-C stops the server."
    assert set(sockets) == {("127.0.0.1", team.port)}


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
    with team.sql() as connection:
        points = connection.execute(
            "SELECT p.value, m.key, m.step, m.value FROM metrics m JOIN params p USING (run_uuid) "
            "WHERE p.key = 'writer'"
        ).fetchall()
        status = connection.execute("SELECT status FROM runs WHERE name LIKE 'writer %'").fetchall()
    assert sorted(points) == sorted(
        (str(writer), name, epoch, value(writer, epoch, number))
        for writer in range(WRITERS)
        for epoch in range(1, epochs + 1)
        for number, name in enumerate(NAMES)
    )
    assert status == [("FINISHED",)] * WRITERS


def test_a_study_whose_server_is_killed_and_comes_back_lacks_no_point(team: Team, tmp_path: Path) -> None:
    seeds, epochs = 2, 40
    flags = ["--seeds", str(seeds), "--epochs", str(epochs), "--limit", "256"]
    first = partial(begin, tmp_path / "project")
    patient = {**os.environ, "MLFLOW_HTTP_REQUEST_TIMEOUT": str(PATIENCE)}  # a busy machine is no outage
    study = Program(TINY, *flags, "--tracking-uri", team.uri, cwd=tmp_path, env=patient, first=first)
    of_seeds = "FROM metrics JOIN params USING (run_uuid) WHERE params.key = 'seed' AND metrics.key = 'test_accuracy'"
    wait_until(lambda: team.count(f"SELECT count(DISTINCT run_uuid) {of_seeds}") == seeds, study)

    team.kill()
    team.start()

    assert study.wait() == 0, study.stderr
    assert "View run" not in study.stdout  # which MLflow prints for each run that ends
    assert team.count(f"SELECT count(*) {of_seeds}") == seeds * epochs
    assert team.count(f"SELECT count(DISTINCT (run_uuid, step)) {of_seeds}") == seeds * epochs
    with team.sql() as connection:
        runs = connection.execute("SELECT name, status FROM runs WHERE name LIKE 'tiny%' ORDER BY name").fetchall()
    assert [status for _, status in runs] == ["FINISHED"] * (seeds + 1), runs


def test_artifacts_are_fetched_from_the_other_side(team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with track(open_store(team.uri), "with an artifact", params={}, tags={}) as tracked:
        tracked.log_text("hello", "texts/hello.txt")

    uri = mlflow.MlflowClient(team.uri).get_run(tracked.run_id).info.artifact_uri
    assert uri.startswith("mlflow-artifacts:/")  # no path of the server's machine
    fetched = mlflow.artifacts.download_artifacts(f"{uri}/texts/hello.txt", dst_path=".", tracking_uri=team.uri)
    assert Path(fetched).read_text() == "hello"
    assert list((team.folder / "server" / "artifacts").rglob("hello.txt"))


def test_the_tables_are_those_of_the_same_runs_in_sqlite(team: Team, uri: str, tmp_path: Path) -> None:
    tables = []
    for store in (open_store(uri), open_store(team.uri)):
        for seed in range(3):
            write_run(store, "step4_augment_steplr", seed, [98.5, 99.3 + seed / 50], start_time=1_700_000_000_000)
        done = run_program("-m", "mnist_lab", "compare", "--tracking-uri", store.uri, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        tables.append([line for line in done.stdout.splitlines() if "step4_augment_steplr" in line])
    assert len(tables[0]) == 1
    assert tables[0] == tables[1]


def test_a_second_server_on_the_same_database_is_refused(team: Team, tmp_path: Path) -> None:
    other = Team(team.folder)
    other.begin()

    assert other.process.wait() == 1
    pid = (team.folder / "server" / "postgres" / "postmaster.pid").read_text().split()[0]
    assert re.fullmatch(
        rf"error: PostgreSQL did not start on .*postgres: lock file .* already exists .*PID {pid}.*\n",
        other.process.stderr,
    )
    assert team.process.poll() is None
    open_store(team.uri)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_end_of_the_server_ends_all_that_it_started(number: signal.Signals, team: Team) -> None:
    family = team.family()
    assert len(family) >= 6  # this one, MLflow's with its workers, PostgreSQL's

    team.process.send_signal(number)

    assert team.process.wait() == 0
    wait_until(lambda: not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE])
    assert not (team.folder / "server" / "postgres" / "postmaster.pid").exists()  # so it ended in order
    assert "Traceback" not in team.process.stderr


def test_a_database_that_dies_ends_the_server(team: Team) -> None:
    pid = int((team.folder / "server" / "postgres" / "postmaster.pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)

    assert team.process.wait() == 1
    assert team.process.stderr.splitlines()[-1] == "error: PostgreSQL ended by itself with exit code -9"


# ---- a database that is named, and passwords


class Foreign:
    """A PostgreSQL of somebody else's: on a port, with a password."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder = folder / "foreign"
        account = postgres.account()
        programs = postgres.programs(self.folder)
        self.folder.mkdir(mode=0o700)
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        if account:
            shutil.chown(self.folder, account["user"], account["group"])
        flags = ["--username", "owner", "--pwfile", folder / "password", "--auth", "scram-sha-256"]
        subprocess.run([programs / "initdb", "-D", self.folder, *flags], cwd="/", check=True, **account)
        (folder / "password").unlink()
        flags = ["-p", str(self.port), "-k", "", "-c", "listen_addresses=127.0.0.1"]
        with (folder / "foreign.log").open("wb") as log:
            command = [programs / "postgres", "-D", self.folder, *flags]
            self.process = subprocess.Popen(command, cwd="/", stdout=log, stderr=log, **account)
        wait_until(lambda: not postgres.problem(self.uri().replace("postgresql", postgres.DRIVER, 1)))

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
    """Return a server that asks for passwords, on a database that is named."""
    (reachable / "guarded").mkdir()
    team = Team(reachable / "guarded", "--auth", MLFLOW_BACKEND_STORE_URI=foreign.uri())
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
    return values["MLFLOW_TRACKING_PASSWORD"]


def test_without_a_password_nobody_is_let_in(guarded: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LabError, match=r"the server refuses you \(HTTP 401\): give MLFLOW_TRACKING_USERNAME"):
        open_store(guarded.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password")
    with pytest.raises(LabError, match=r"the server refuses you \(HTTP 401\)"):
        open_store(guarded.uri)


def test_a_user_whom_the_admin_adds_trains_and_compares(
    guarded: Team, admin: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = secrets.token_urlsafe(18)
    get_app_client("basic-auth", guarded.uri).create_user("mia", own)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "mia")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", own)

    flags = ["--epochs", "2", "--limit", "256", "--threads", "1"]
    trained = Program(TINY, *flags, cwd=tmp_path, first=partial(begin, tmp_path / "project"))
    assert trained.wait() == 0, trained.stderr
    compared = run_program("-m", "mnist_lab", "compare", "--include-overrides", cwd=tmp_path)

    assert compared.returncode == 0, compared.stderr
    assert "tiny" in compared.stdout
    client = mlflow.MlflowClient(guarded.uri)
    (run,) = client.search_runs([open_store(guarded.uri).experiment_id])
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "test_accuracy")) == 2
    assert mlflow.pytorch.load_model(f"runs:/{run.info.run_id}/{run.data.tags['step']}") is not None


def test_no_password_is_in_a_command_line_nor_in_what_is_printed_or_kept(guarded: Team, admin: str) -> None:
    commands = [" ".join(process.cmdline()) for process in guarded.family()]
    for secret in (PASSWORD, quote(PASSWORD, safe=""), admin):
        assert [command for command in commands if secret in command] == []
        assert secret not in guarded.process.stdout + guarded.process.stderr
        kept = [path for path in guarded.folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
        assert kept == ([guarded.folder / "server" / "admin_password"] if secret == admin else [])
    assert (guarded.folder / "server" / "admin_password").stat().st_mode & 0o777 == 0o600
    settings = next(process.environ()["MLFLOW_AUTH_CONFIG_PATH"] for process in guarded.family()[1:])
    assert Path(settings).parent.stat().st_mode & 0o777 == 0o700


def test_a_password_that_is_not_the_admins_any_more_is_not_printed_as_such(
    guarded: Team, foreign: Foreign, reachable: Path
) -> None:
    """Another folder knows no password of the users who are in the database already."""
    (reachable / "later").mkdir()
    later = Team(reachable / "later", "--auth", MLFLOW_BACKEND_STORE_URI=foreign.uri())
    later.start()
    try:
        password = next(line for line in later.process.stdout.splitlines() if "PASSWORD" in line)
        assert password.startswith("export MLFLOW_TRACKING_PASSWORD=...  # the one that was set when")
        assert not (reachable / "later" / "server" / "admin_password").exists()
    finally:
        later.stop()


def test_a_wrong_password_of_the_database_is_one_sentence(foreign: Foreign, tmp_path: Path) -> None:
    wrong = foreign.uri("wrong-password")

    flags = ["--port", str(free_port()), "--backend-store-uri", wrong]
    done = run_program("-m", "mnist_lab", "server", *flags, cwd=tmp_path)

    assert done.returncode == 1
    shown = f"postgresql+psycopg://owner:***@127.0.0.1:{foreign.port}/postgres"
    assert done.stderr.startswith(f"error: backend store '{shown}' can't be used: ")
    assert 'password authentication failed for user "owner"' in done.stderr
    assert done.stderr.count("\n") == 1
    assert "wrong-password" not in done.stderr


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--port", "80"], "port: 80 is not between 1024 and 65535"),
        (["--host", "192.0.2.1"], "host: '192.0.2.1' is no address of this machine (Cannot assign requested address)"),
        (["--backend-store-uri", "mysql://me:secret@db/x"], "backend store 'mysql://me:***@db/x' is no database of"),
        (["--backend-store-uri", "postgresql:nonsense"], "backend store 'postgresql:...' is no database of"),
        (
            ["--backend-store-uri", "postgresql://me:secret@127.0.0.1:1/x"],
            "backend store 'postgresql+psycopg://me:***@127.0.0.1:1/x' can't be used: connection failed: ",
        ),
    ],
)
def test_a_wrong_flag_is_refused_in_one_sentence(flags: list[str], sentence: str, tmp_path: Path) -> None:
    port = [] if "--port" in flags else ["--port", str(free_port())]
    done = run_program("-m", "mnist_lab", "server", "--folder", tmp_path / "s", *flags, *port, cwd=tmp_path)

    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sentence}")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
    assert not (tmp_path / "s").exists()


def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    """A team has the address in its environment, so it does not move to the next port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_program("-m", "mnist_lab", "server", "--port", str(port), cwd=tmp_path)

    assert (done.returncode, done.stderr) == (1, f"error: port: {port} is taken; name another with --port\n")


def test_a_short_password_is_refused(tmp_path: Path) -> None:
    flags = ["--auth", "--port", str(free_port())]
    environment = {**os.environ, "MLFLOW_AUTH_ADMIN_PASSWORD": "secret"}
    done = run_program("-m", "mnist_lab", "server", *flags, cwd=tmp_path, env=environment)

    assert done.stderr == "error: MLFLOW_AUTH_ADMIN_PASSWORD has 6 characters; give 12 or more\n"


def test_where_postgresql_is_missing_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(postgres, "DEBIAN", "no/such/folder")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        LabError, match=r"^PostgreSQL is not installed: install it \(.*apt-get install postgresql\), or"
    ):
        postgres.programs(tmp_path / "new")


def test_a_database_of_another_version_is_named_and_left_alone(reachable: Path) -> None:
    folder = reachable / "old"
    folder.mkdir()
    (folder / "PG_VERSION").write_text("9\n")
    with pytest.raises(LabError, match=r"old is a database of PostgreSQL 9, and \d+ is installed here"):
        postgres.programs(folder)
    (folder / "PG_VERSION").unlink()
    with pytest.raises(LabError, match="old is no database of PostgreSQL"), postgres.own(folder):
        pytest.fail("it started")
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as another user")
def test_a_folder_that_postgresql_cannot_enter_is_named(reachable: Path) -> None:
    (reachable / "closed").mkdir(mode=0o700)
    folder = reachable / "closed" / "postgres"
    with (
        pytest.raises(
            LabError, match=r"closed.postgres: PostgreSQL can't make a database there: .*the user 'postgres'"
        ),
        postgres.own(folder),
    ):
        pytest.fail("it started")
    assert list((reachable / "closed").iterdir()) == []


# ---- other machines


@pytest.mark.parametrize(
    ("host", "auth", "notice"),
    [
        ("127.0.0.1", False, None),
        ("localhost", False, None),
        ("::1", False, None),
        ("0.0.0.0", False, "No password is asked for: whoever reaches 0.0.0.0:5000 can read, change and delete"),  # noqa: S104
        ("0.0.0.0", True, "Passwords and figures cross the network to 0.0.0.0:5000 unencrypted"),  # noqa: S104
        ("192.0.2.1", False, "No password is asked for: whoever reaches 192.0.2.1:5000 can"),
    ],
)
def test_who_lets_other_machines_in_is_told_what_that_means(host: str, auth: bool, notice: str | None) -> None:
    notices = Settings(Path("x"), host=host, auth=auth).notices()
    assert notices == [] if notice is None else notices[0].startswith(notice)


def test_other_machines_are_answered_under_this_ones_names_only(reachable: Path) -> None:
    (reachable / "open").mkdir()
    team = Team(reachable / "open", "--host", "0.0.0.0", "--workers", "1")  # noqa: S104
    team.start()
    try:
        own = socket.gethostbyname(socket.gethostname())
        for name in (socket.gethostname(), own):
            assert open_store(f"http://{name}:{team.port}").experiment_id
        assert f"export MLFLOW_TRACKING_URI=http://{socket.gethostname()}:{team.port}\n" in team.process.stdout
        assert team.process.stderr.startswith("No password is asked for: ")
        with pytest.raises(LabError, match=r"does not answer to the name '127\.0\.0\.9:\d+'"):
            open_store(f"http://127.0.0.9:{team.port}")
    finally:
        team.stop()
