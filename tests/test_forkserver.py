"""A program that is copied from one with the imports done is as one that a shell starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from forkserver import run_program, set_default_signals

LOOKS = """
import os, signal, sys
print(__name__, sys.argv, os.getcwd(), sys.path[0], os.environ["WORD"], sys.modules["__main__"].__file__)
print([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)])
print(os.getpid() == os.getsid(0), sys.stdout.isatty(), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("sys.exit('no more')", None),
        ("raise ValueError('wrong')", "ValueError: wrong"),
        ("raise KeyboardInterrupt", ""),
    ],
    ids=["sentence", "error", "Ctrl-C"],
)
def test_a_program_begins_and_ends_as_from_a_shell(
    end: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORD", "ünïcödé")
    script = tmp_path / "program.py"
    script.write_text(f"{LOOKS}sys.stdout.flush()\n{end}\n")

    copied = run_program(script, "--flag", "a b", cwd=tmp_path)

    real = subprocess.run(
        [sys.executable, script, "--flag", "a b"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        start_new_session=True,
        preexec_fn=set_default_signals,
    )
    assert (copied.returncode, copied.stdout) == (real.returncode, real.stdout)
    if said is None:
        assert copied.stderr == real.stderr
    else:
        assert said in copied.stderr


STARTS = """
import multiprocessing, os, signal, subprocess, sys

sys.stdout.reconfigure(line_buffering=True)
COMMANDS = {
    "script": [os.path.abspath("child.py"), "--flag", "a b"],
    "-c": ["-c", "import sys; print(__name__, sys.argv); sys.exit('no more')", "word"],
    "-m": ["-m", "child"],
    "Ctrl-C": ["-c", "raise KeyboardInterrupt"],
}

def report(connection):
    print("in a process", __name__, flush=True)
    connection.send([sys.argv[0], multiprocessing.parent_process().pid == os.getppid()])

print("begins as", __name__)  # no guard: a process of multiprocessing reads this script too
if __name__ == "__main__":
    held = open("held.txt", "w")
    for name, command in COMMANDS.items():
        print(name)
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env={**os.environ, "WORD": name}
        )
        print(name, done.returncode, done.stdout, done.stderr.splitlines()[-1:] if done.returncode >= 0 else None)
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=report, args=(theirs,))
    process.start()
    print(mine.recv())
    process.join()
    print(process.exitcode)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    print(os.getsid(sleeper.pid) == sleeper.pid)
    os.killpg(sleeper.pid, signal.SIGTERM)
    print(sleeper.wait())
"""


def test_what_a_program_starts_begins_and_ends_as_usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORD", "")
    (tmp_path / "child.py").write_text(LOOKS)
    script = tmp_path / "program.py"
    script.write_text(STARTS)

    copied = run_program(script, cwd=tmp_path)

    real = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert (copied.returncode, copied.stdout.splitlines()) == (0, real.stdout.splitlines())
