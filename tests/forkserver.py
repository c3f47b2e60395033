"""Start scripts and jobs as a user does, but each as a copy of a process that has done the slow imports already.

What such a program is given and leaves is as from a shell: arguments, environment, current folder, signals, exit code,
output, and a terminal; each leads a session of its own. `multiprocessing` keeps one process to copy from for each
process of pytest. What such a program starts with this Python in turn, by `subprocess` or by "spawn" of
`multiprocessing`, is a copy of the program.
"""

import atexit
import fcntl
import gc
import multiprocessing
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import termios
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 400  # seconds until a program counts as hung, on a machine that is very busy too

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        *("mnist_lab", "mlflow.pytorch", "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "alembic.command"),
        *("git", "torch.export._trace", "mnist_lab.results.report", "mnist_lab.running.run", "mnist_lab.running.study"),
        *("mnist_lab.tracking.connection", "mnist_lab.tracking.server", "mnist_lab.figures", "pytest"),
    ]
)


def _set_signals(ignored: tuple[signal.Signals, ...]) -> None:
    """Let this program's signals be as from a shell, however pytest itself was started."""
    for number in SIGNALS:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in ignored else usual)


class Program:
    """A program that is running or has ended; its methods are those of `subprocess.Popen`.

    `ignored` are the signals that it ignores, as with `nohup`. `terminal` is the path of a pseudo-terminal. `first` is
    called in the program before anything else, e.g. to let it die at some point.
    """

    def __init__(
        self,
        *command: str | Path,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        ignored: tuple[signal.Signals, ...] = (),
        terminal: str | None = None,
        first: Callable[[], None] = bool,
    ) -> None:
        self.args = [str(word) for word in command]
        self._output = [tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()]  # noqa: SIM115
        output = [terminal or file.name for file in self._output]
        environment = dict(os.environ if env is None else env)
        start = (self.args, str(cwd), environment, output, terminal is not None, ignored, first)
        self._process = processes.Process(target=_run, args=start)
        self._process.start()
        atexit.register(self._process.kill)  # else multiprocessing would wait for it where pytest is interrupted
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return Path(self._output[0].name).read_text()

    @property
    def stderr(self) -> str:
        return Path(self._output[1].name).read_text()

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Return the exit code, negative for a signal; a program that hangs is killed."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout, self.stdout, self.stderr)
        return self.returncode


def run_program(
    *command: str | Path, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script, or "-m" and a module, with its arguments to its end, from the folder `cwd`."""
    program = Program(*command, cwd=cwd, env=env)
    code = program.wait()
    return subprocess.CompletedProcess(program.args, code, program.stdout, program.stderr)


_path = list(sys.path)


def _run(
    command: list[str],
    cwd: str,
    environment: dict[str, str],
    output: list[str],
    terminal: bool,
    ignored: tuple[signal.Signals, ...],
    first: Callable[[], None],
) -> None:
    """Be that program, in the copied process."""
    _set_signals(ignored)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    _path[:] = sys.path
    multiprocessing.process.ORIGINAL_DIR = cwd  # where its own processes look for the script
    os.setsid()
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
    if terminal:
        os.dup2(1, 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that the program gets SIGHUP when the terminal is closed
    sys.stdout.reconfigure(line_buffering=terminal)  # type: ignore[attr-defined]
    first()
    subprocess.Popen = _Popen  # type: ignore[misc]
    multiprocessing.util.spawnv_passfds = _spawn
    _carry_out(command)


def _carry_out(command: Sequence[str]) -> None:
    """Run a script, or what stands after "-m" or "-c", as the main program."""
    kind = command[0] if command[0] in ("-m", "-c") else "script"
    sys.argv = list(command[kind == "-m" :])
    try:
        if kind == "-m":
            sys.path.insert(0, os.getcwd())  # noqa: PTH109
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            del sys.argv[1]
            sys.path.insert(0, "")
            exec(command[1], sys.modules["__main__"].__dict__)  # noqa: S102
        else:
            script = Path(sys.argv[0]).absolute()
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit:
        raise  # its code is the exit code of a process of multiprocessing too
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


# ---- what a program starts with this Python


class _Popen(subprocess.Popen):  # type: ignore[type-arg]
    """Starts programs; one of this Python is a copy of the process that starts it."""

    def __init__(self, args: Any, *more: Any, **named: Any) -> None:
        if not isinstance(args, str) and args[0] == sys.executable and _can_be_copied():
            words = [str(word) for word in args[1:]]
            named["preexec_fn"] = partial(_become, words, named.get("env"), named.get("pass_fds", ()))
        super().__init__(args, *more, **named)


_spawn_anew = multiprocessing.util.spawnv_passfds


def _spawn(path: bytes, args: Sequence[bytes | str], kept: Sequence[int]) -> int:
    """Start a process of multiprocessing's "spawn"."""
    if not _can_be_copied():
        return _spawn_anew(path, args, kept)
    pid = os.fork()
    if pid == 0:
        _become([os.fsdecode(word) for word in args[1:]], None, kept)
    return pid


def _can_be_copied() -> bool:
    """Leave nothing that two processes would print; say whether no database is open, which SQLite forbids to copy."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "sqlalchemy.engine" in sys.modules:
        for engine in [found for found in gc.get_objects() if type(found) is sys.modules["sqlalchemy.engine"].Engine]:
            engine.dispose()
    return not any(os.path.realpath(file).endswith("-wal") for file in Path("/dev/fd").iterdir())


def _become(words: list[str], environment: Mapping[str, str] | None, kept: Sequence[int]) -> NoReturn:
    """Be that program, in a copy of the one that starts it, and end."""
    code: object = 1
    try:
        _forget_the_parent(kept)
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        for option in filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")):
            warnings._setoption(option)  # type: ignore[attr-defined]
        while words[0] not in ("-c", "-m") and words[0].startswith("-"):
            del words[0]  # a flag of Python's own
        _carry_out(words)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forget_the_parent(kept: Sequence[int]) -> None:
    """Give up the files, locks, signals and modules of the program that this one is a copy of."""
    null = os.open(os.devnull, os.O_RDWR)
    for file in [int(path.name) for path in Path("/dev/fd").iterdir()]:
        if file > 2 and file not in (null, *kept):
            os.dup2(null, file)  # what still holds its number must not meet another file there
    _set_signals(tuple(number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN))
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as Python begins; `subprocess` has undone it
        signal.signal(number, signal.SIG_IGN)
    atexit._clear()
    sys.stdin, sys.stdout, sys.stderr = (open(file, mode, closefd=False) for file, mode in enumerate("rww"))  # noqa: SIM115
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[attr-defined]
    sys.path[:] = _path
    sys.modules["__main__"] = ModuleType("__main__")
    for name in [name for name in sys.modules if name.startswith("mlflow.server")]:
        del sys.modules[name]  # it is another one in a server than in the program that starts it
