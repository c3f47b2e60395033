"""Start scripts and jobs as a user does, but each as a copy of a process that has done the slow imports already.

What such a program is given and leaves is as from a shell: arguments, environment, current folder, signals, exit code
and output; each leads a session of its own. `multiprocessing` keeps a process to copy from for each process of pytest.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

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


class Program:
    """A program that is running or has ended; its methods are those of `subprocess.Popen`.

    `ignored` are the signals that it ignores, as with `nohup`. `first` is called in the program before anything else,
    e.g. to let it die at some point.
    """

    def __init__(
        self,
        *command: str | Path,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        ignored: tuple[signal.Signals, ...] = (),
        first: Callable[[], None] = bool,
    ) -> None:
        self.args = [str(word) for word in command]
        self._output = [tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()]  # noqa: SIM115
        environment = dict(os.environ if env is None else env)
        start = (self.args, str(cwd), environment, [file.name for file in self._output], ignored, first)
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


def _run(
    command: list[str],
    cwd: str,
    environment: dict[str, str],
    output: list[str],
    ignored: tuple[signal.Signals, ...],
    first: Callable[[], None],
) -> None:
    """Be that program, in the copied process."""
    for number in SIGNALS:  # as from a shell, however pytest itself was started
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in ignored else usual)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    multiprocessing.process.ORIGINAL_DIR = cwd  # where its own processes look for the script
    os.setsid()
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=False)  # type: ignore[attr-defined]
    first()
    is_module = command[0] == "-m"
    sys.argv = command[is_module:]
    try:
        if is_module:
            sys.path.insert(0, cwd)
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
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
