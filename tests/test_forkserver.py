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
