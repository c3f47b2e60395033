"""The one error class that means "the user can put this right", and where in the user's own code an error began."""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path


class LabError(ValueError):
    """Bad input or a missing precondition: one sentence that names the field, its value and what is allowed.

    The command line prints it on stderr without a traceback and exits with 1; a notebook shows the sentence alone.
    Every other exception is a bug and keeps its traceback.
    """

    @property
    def field(self) -> str:
        """What the sentence is about, which is what stands before its first colon: "epochs", "targets.accuracy"."""
        return str(self).partition(": ")[0]

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def text_of(error: BaseException) -> str:
    """Return what an error says on one line, or its class's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def script_line(error: BaseException) -> str:
    """Return the last line of the user's own code that an error went through: " (my_idea.py, line 7)", or nothing."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_script(Path(frame.filename))]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def is_script(file: Path) -> bool:
    """Say whether a file is the user's own code: neither the lab's nor a library's."""
    lab, standard_library = Path(__file__).parent, Path(inspect.__file__).parent
    if file.is_relative_to(lab) or file.is_relative_to(standard_library):
        return False
    return "site-packages" not in file.parts and file.suffix == ".py" and file.exists()
