"""`mnist_lab server`, on a real PostgreSQL with users and writers, and `mnist_lab ui`, over a store."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from helpers import TINY, all_gone, free_port, log_points, point, ports_of, serving, wait_until
from mnist_lab import paths
from mnist_lab.errors import LabError
from mnist_lab.tracking import server as servers
from mnist_lab.tracking import view
from mnist_lab.tracking.connection import environment_variables
from mnist_lab.tracking.run import track
from mnist_lab.tracking.store import open_store
from mnist_lab.verdicts.comparison import step_order

WRITERS = 4
NAMES = ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "epoch_seconds"]
SECRET, ADMIN = secrets.token_hex(8), secrets.token_hex(8)
PASSWORD = f"p%ss/w@rd:{SECRET}"  # with what has a meaning in a URI and in MLflow's settings


class Database:
    def __init__(self, folder: Path, programs: str) -> None:
        self.folder, self.programs, self.port = folder / "data", Path(programs).parent, free_port()
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        flags = ["--username=owner", f"--pwfile={folder}/password", "--auth=scram-sha-256", "--encoding=UTF8"]
        self._call("initdb", *flags)
        self.start()

    def _call(self, program: str, *flags: str) -> None:
        user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}  # it refuses root
        command = [self.programs / program, "--pgdata", self.folder, *flags]
        subprocess.run(command, cwd="/", check=True, stdout=subprocess.DEVNULL, **user)

    def start(self) -> None:
        options = f"-p {self.port} -k '' -c listen_addresses=127.0.0.1 -c max_connections=200"
        self._call("pg_ctl", "start", f"--log={self.folder}/log", f"--options={options}")

    def stop(self) -> None:
        self._call("pg_ctl", "stop", "--mode=immediate")  # SIGQUIT to all of it: as a power cut

    def uri(self, name: str = "postgres", password: str = PASSWORD) -> str:
        return f"postgresql://owner:{quote(password, safe='')}@127.0.0.1:{self.port}/{name}"

    def create(self, name: str) -> str:
        with psycopg.connect(self.uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.uri(name)

    def sql(self, query: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.uri()) as connection:
            return connection.execute(query.encode()).fetchall()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Database]:
    debian = [str(path) for path in Path("/usr/lib/postgresql").glob("*/bin")]
    programs = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *debian]))
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp(prefix="mnist-lab-test-"))
    folder.chmod(0o777)  # for the other user
    database = Database(folder, str(Path(programs).resolve()))
    yield database
    database.stop()
    shutil.rmtree(folder)


def begin(project: Path, *, anew: bool = False) -> None:
    paths.PROJECT_ROOT = project
    if anew:  # MLflow's module of passwords can't be loaded in a copy of a process that has MLflow
        forkserver._can_be_copied = lambda: False


def family(program: Program) -> list[psutil.Process]:
    started = psutil.Process(program.pid)
    return [started, *started.children(recursive=True)]


class Team:
    def __init__(self, folder: Path, *flags: str, **variables: str) -> None:
        self.folder, self.flags, self.variables = folder, flags, variables
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = ["-m", "mnist_lab", "server", "--folder", self.folder / "server", "--port", str(self.port)]
        environment = {**os.environ, **self.variables}
        first = partial(begin, self.folder / "project", anew="--auth" in self.flags)
        self.process = Program(*words, *self.flags, cwd=self.folder, env=environment, first=first)
        wait_until(lambda: "Ready. Ctrl-C stops the server." in self.process.stdout, self.process)

    def kill(self) -> None:
        """Kill all of it outright, as a power cut does."""
        for process in family(self.process):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def one_team(postgres: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    team = Team(tmp_path_factory.mktemp("team"), MLFLOW_BACKEND_STORE_URI=postgres.uri())
    team.start()
    yield team
    team.stop()


@pytest.fixture
def team(one_team: Team) -> Team:
    if one_team.process.poll() is not None:
        one_team.start()
    return one_team


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paths, "PROJECT_ROOT", tmp_path / "project")
    for name in ("MLFLOW_BACKEND_STORE_URI", servers.ADMIN_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_it_says_what_to_set_and_listens_on_one_port(team: Team, postgres: Database, tmp_path: Path) -> None:
    lines = team.process.stdout.splitlines()
    assert lines[:2] == [f"The runs: {team.uri}/lab", f"export MLFLOW_TRACKING_URI={team.uri}"]
    assert ports_of(family(team.process)) == {("127.0.0.1", team.port)}

    flags = ["--port", str(team.port), "--backend-store-uri", postgres.uri()]
    second = run_program("-m", "mnist_lab", "server", *flags, cwd=tmp_path)

    assert second.returncode == 1
    (sentence,) = second.stderr.splitlines()
    assert sentence.startswith(f"error: port: {team.port} ")


def test_writers_lose_no_point_though_server_and_database_are_killed(team: Team, postgres: Database) -> None:
    store, together, epochs = open_store(team.uri), processes.Barrier(WRITERS), 10
    patient = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(PATIENCE),  # a busy machine is no outage
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",  # it asks again after 0, 1, 2, 4, 8 seconds
    }
    started = [
        processes.Process(target=log_points, args=(store, writer, epochs, NAMES, together, patient))
        for writer in range(WRITERS)
    ]
    for process in started:
        process.start()
    of_writers = "FROM metrics m JOIN params p USING (run_uuid) WHERE p.key = 'writer'"
    wait_until(lambda: postgres.sql(f"SELECT count(DISTINCT p.value) {of_writers}") == [(WRITERS,)])

    postgres.stop()
    team.kill()
    postgres.start()
    team.start()

    for process in started:
        process.join(PATIENCE)
    assert [process.exitcode for process in started] == [0] * WRITERS
    assert sorted(postgres.sql(f"SELECT p.value, m.key, m.step, m.value {of_writers}")) == sorted(
        (str(writer), name, epoch, point(writer, epoch, number))
        for writer in range(WRITERS)
        for epoch in range(1, epochs + 1)
        for number, name in enumerate(NAMES)
    )
    assert postgres.sql("SELECT status FROM runs WHERE name LIKE 'writer %'") == [("FINISHED",)] * WRITERS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_server_ends_all_that_it_started(number: signal.Signals, team: Team) -> None:
    started = family(team.process)
    assert len(started) >= 5  # this one, MLflow's with its workers, and who watches

    team.process.send_signal(number)

    assert team.process.wait() == (0 if number == signal.SIGTERM else -9)
    wait_until(lambda: all_gone(started))
    assert "Traceback" not in team.process.stderr


# ---- passwords, and other machines


@pytest.fixture(scope="module")
def guarded(postgres: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    flags = ["--auth", "--host", "0.0.0.0", "--workers", "1"]  # noqa: S104
    variables = {"MLFLOW_BACKEND_STORE_URI": postgres.create("guarded"), servers.ADMIN_VARIABLE: ADMIN}
    team = Team(tmp_path_factory.mktemp("guarded"), *flags, **variables)
    team.start()
    yield team
    team.stop()


@pytest.fixture
def _admin(guarded: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = guarded.process.stdout
    assert "\nexport MLFLOW_TRACKING_USERNAME=admin\n" in shown
    assert f'\nexport MLFLOW_TRACKING_PASSWORD="${servers.ADMIN_VARIABLE}"\n' in shown
    for name, text in {"URI": guarded.uri, "USERNAME": "admin", "PASSWORD": ADMIN}.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", text)


def test_nobody_is_let_in_without_the_right_password(guarded: Team) -> None:
    wrong = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "not-the-password"}
    for variables, wanted in (({}, "USERNAME"), (wrong, "USERNAME"), ({"MLFLOW_TRACKING_TOKEN": "none"}, "TOKEN")):
        with environment_variables(variables), pytest.raises(LabError, match=f"MLFLOW_TRACKING_{wanted}"):
            open_store(guarded.uri)


@pytest.mark.usefixtures("_admin")
def test_a_user_whom_the_admin_adds_trains_and_one_who_is_denied_is_told_so(guarded: Team, tmp_path: Path) -> None:
    users, own = get_app_client("basic-auth", guarded.uri), secrets.token_urlsafe(18)
    for name in ("max", "mia"):
        users.create_user(name, own)
    users.grant_user_permission("max", "experiment", open_store(guarded.uri).experiment_id, "DENY")
    of_max, of_mia = ({"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": own} for name in ("max", "mia"))
    with environment_variables(of_max), pytest.raises(LabError, match="HTTP 403.*'mnist'"):
        open_store(guarded.uri)
    environment = os.environ | of_mia
    flags = ["--epochs", "1", "--limit", "256", "--threads", "1"]
    trained = Program(TINY, *flags, cwd=tmp_path, env=environment, first=partial(begin, tmp_path / "project"))
    assert trained.wait() == 0, trained.stderr
    compared = run_program("-m", "mnist_lab", "compare", "--include-overrides", cwd=tmp_path, env=environment)

    assert compared.returncode == 0, compared.stderr
    assert "tiny" in compared.stdout
    client = mlflow.MlflowClient(guarded.uri)
    (run,) = client.search_runs([open_store(guarded.uri).experiment_id])
    assert run.info.status == "FINISHED"
    assert "View run" not in trained.stdout  # which MLflow prints for each run that ends
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")  # no path of the server's machine
    assert list((guarded.folder / "server" / "artifacts").rglob("predictions.npz"))
    assert mlflow.pytorch.load_model(f"runs:/{run.info.run_id}/{run.data.tags['step']}") is not None


def test_no_password_is_in_a_command_line_nor_in_what_is_printed_or_kept(guarded: Team) -> None:
    commands = [" ".join(process.cmdline()) for process in family(guarded.process)]
    for secret in (SECRET, ADMIN):
        assert [command for command in commands if secret in command] == []
        assert secret not in guarded.process.stdout + guarded.process.stderr
        kept = [path for path in guarded.folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
        assert kept == []


@pytest.mark.usefixtures("_admin")
def test_other_machines_are_answered_under_this_ones_names_only(guarded: Team) -> None:
    for name in (socket.gethostname(), socket.gethostbyname(socket.gethostname())):
        assert open_store(f"http://{name}:{guarded.port}").experiment_id
    assert f"export MLFLOW_TRACKING_URI=http://{socket.gethostname()}:{guarded.port}\n" in guarded.process.stdout
    assert f"0.0.0.0:{guarded.port}" in guarded.process.stderr.splitlines()[0]
    with pytest.raises(LabError, match="MLFLOW_SERVER_ALLOWED_HOSTS"):
        open_store(f"http://127.0.0.9:{guarded.port}")


# ---- what is refused


def test_a_database_that_cannot_be_used_is_refused_and_left_alone(postgres: Database) -> None:
    with pytest.raises(LabError, match="password authentication failed") as refused:
        servers._prepare(postgres.uri("postgres", "wrong-password"))
    assert f"owner:***@127.0.0.1:{postgres.port}" in str(refused.value)
    assert "wrong-password" not in str(refused.value)
    other = postgres.create("other")
    with psycopg.connect(other) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('another')")
    with pytest.raises(LabError, match="another program's"):
        servers._prepare(other)
    with psycopg.connect(other) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    assert tables == [("alembic_version",)]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--port", "80"], "port: 80 "),
        (["--host", "192.0.2.1"], "host: '192.0.2.1' "),
        (["--auth"], "auth: set MLFLOW_AUTH_ADMIN_PASSWORD "),
        ([], "backend store: no database is named; give --backend-store-uri postgresql://"),
        (["--backend-store-uri", "mysql://me:secret@db/x"], "backend store: 'mysql://me:***@db/x' "),
        (["--backend-store-uri", "host=db password=secret"], "backend store: no database is named"),
        (["--backend-store-uri", "postgresql://me:secret@127.0.0.1:1/x"], "backend store: 'postgresql://me:***@127"),
        (["--backend-store-uri", "postgresql://me:secret@127.0.0.1:p/x"], "backend store: 'postgresql://me:***@127"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_sentence(
    flags: list[str], sentence: str, lab: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    port = [] if "--port" in flags else ["--port", free_port()]
    with pytest.raises(SystemExit, match="1"):
        lab("server", "--folder", tmp_path / "s", *flags, *port)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {sentence}")
    assert "secret" not in said
    assert not (tmp_path / "s").exists()


# ---- the UI


@contextlib.contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[int]:
    with socket.create_server((host, 0)) as taken:
        yield taken.getsockname()[1]


@dataclass(frozen=True)
class Ui:
    taken_port: int
    process: Program
    database: Path
    address: str

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=PATIENCE) as answer:
            return answer.read().decode()


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    """Start the UI where the port that is asked for is taken, over a store that is not there yet."""
    folder = tmp_path_factory.mktemp("ui")
    with listening() as port:
        flags = ["--port", str(port), "--tracking-uri", "sqlite:///store/mlflow.db"]
        with serving("ui", *flags, cwd=folder) as process:
            address = process.stdout.partition("/lab\n")[0].removeprefix("The runs: ")
            yield Ui(port, process, folder / "store" / "mlflow.db", address)


def test_a_taken_port_gives_the_next_which_is_said_and_alone_listens_on_loopback(ui: Ui) -> None:
    port = int(ui.address.rpartition(":")[2])
    assert ui.taken_port < port < ui.taken_port + servers.PORTS_TRIED
    assert ui.process.stderr.startswith(f"Port {ui.taken_port} is taken; using {port}.\n")
    assert "Warning" not in ui.process.stderr
    assert ports_of(family(ui.process)) == {("127.0.0.1", port)}


def test_it_serves_mlflow_with_the_page_that_leads_to_the_runs(ui: Ui) -> None:
    assert "<title>mnist_lab</title>" in ui.get("/lab")
    assert "<title>MLflow</title>" in ui.get("/")
    found = json.loads(ui.get("/api/2.0/mlflow/experiments/get-by-name?experiment_name=mnist"))["experiment"]
    assert found["artifact_location"] == (ui.database.parent / "artifacts").as_uri()  # not the server's own


def test_it_answers_nobody_who_is_led_to_it_by_another_page(ui: Ui) -> None:
    opener = urllib.request.build_opener()
    opener.process_response.clear()  # a refusal is an answer too
    address = f"{ui.address}/api/2.0/mlflow/experiments/search"
    for headers, status in (({}, 200), ({"Host": "evil.example"}, 403), ({"Origin": "http://evil.example"}, 403)):
        of_json = {"Content-Type": "application/json"}
        asked = urllib.request.Request(address, data=b'{"max_results": 1}', headers=of_json | headers)
        with opener.open(asked, timeout=PATIENCE) as answer:
            assert answer.status == status


def test_a_running_server_needs_no_ui(ui: Ui, lab: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        lab("ui", "--tracking-uri", ui.address)
    (sentence,) = capsys.readouterr().err.splitlines()
    assert ui.address in sentence


def test_kill_9_of_the_program_ends_all_that_it_started(ui: Ui) -> None:
    """The last test of this server."""
    started = family(ui.process)
    # this program, MLflow's command, its server, and who watches this program
    assert len(started) >= 4, (ui.process.poll(), ui.process.stderr)

    ui.process.kill()

    wait_until(lambda: all_gone(started))


def test_a_taken_port_is_passed_over_and_one_that_cannot_be_had_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):  # noqa: S104
        with listening(host) as port:
            assert port < servers.free_port(port) < port + servers.PORTS_TRIED
        assert servers.free_port(port) == port
    for wrong in (-1, 1023, 65536):
        with pytest.raises(LabError, match=f"^port: {wrong} .*1024 and 65535"):
            servers.free_port(wrong)
    monkeypatch.setattr(servers, "PORTS_TRIED", 1)
    with listening() as port, pytest.raises(LabError, match=f"^port: {port} to {port} "):
        servers.free_port(port)


# ---- the view


def test_the_server_imports_nothing_that_takes_seconds(tmp_path: Path) -> None:
    """MLflow and torch each do, and a person would wait."""
    program = (
        "import sys; from mnist_lab import __main__; from mnist_lab.tracking import server; "
        "print([name for name in ('mlflow', 'torch', 'sqlalchemy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "[]\n"


def test_a_store_gets_todays_view_studies_first_in_the_order_of_the_steps_then_the_newest_runs(uri: str) -> None:
    store = open_store(uri)
    store.client.set_experiment_tag(store.experiment_id, view.TAG, "{}")
    open_store(uri)
    assert store.client.get_experiment(store.experiment_id).tags[view.TAG] == view.state()
    for name, step in (("b", "step10_b"), ("seed", ""), ("a", "step9_a"), ("newest", "")):
        with track(store, name, params={}, tags={"order": step_order(step)} if step else {}):
            pass
    shown = json.loads(view.state())
    order = f"{shown['orderByKey']} {'ASC' if shown['orderByAsc'] else 'DESC'}"
    runs = store.client.search_runs([store.experiment_id], order_by=[order])
    assert [run.info.run_name for run in runs] == ["a", "b", "newest", "seed"]
