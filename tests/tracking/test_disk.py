"""Files that are replaced: whole or not at all, and in UTF-8."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import largest_file
from mnist_lab.tracking.store import replace_files

ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_files_are_written_with_their_folders(tmp_path: Path) -> None:
    old, new = tmp_path / "old.md", tmp_path / "a" / "b" / "new.png"
    old.write_text("old")
    old.chmod(0o604)
    (tmp_path / "link").symlink_to("old.md")
    replace_files({tmp_path / "link": "Ärger – 99,4 %\n", new: b"\x89PNG"})
    assert (tmp_path / "link").is_symlink()
    assert old.read_bytes() == "Ärger – 99,4 %\n".encode()
    assert new.read_bytes() == b"\x89PNG"
    assert stat.S_IMODE(old.stat().st_mode) == 0o604
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "link", "new.png", "old.md"]


def test_where_one_of_the_files_has_no_room_all_are_as_they_were(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for file in (first, second):
        file.write_text("old")
    with largest_file(1000), pytest.raises(OSError, match=f"File too large: '{second}'"):
        replace_files({first: "new", second: "new" * 1000})
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["old", "old"]


def test_what_is_renamed_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deeds: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: deeds.append("fsync") or fsync(descriptor))
    monkeypatch.setattr(Path, "replace", lambda self, to: deeds.append("replace") or replace(self, to))
    replace_files({tmp_path / "a": "1", tmp_path / "b": "2"})
    assert deeds == ["fsync", "fsync", "replace", "replace", "fsync"]  # the last is the folder's


def test_text_is_utf_8_in_an_ascii_locale(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from mnist_lab.tracking.store import replace_files
replace_files({Path(sys.argv[1], "a"): "\\u2013 \\u00b1"})
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=os.environ | ASCII_LOCALE, check=True)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ["– ±".encode()]
