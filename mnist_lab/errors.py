"""The one error class that means "the user can put this right", and where in the user's own code an error began."""

from __future__ import annotations

import inspect
import sys
import traceback
from pathlib import Path
from types import TracebackType


class LabError(ValueError):
    """Bad input or a missing precondition: one sentence that names the field, its value and what is allowed.

    The command line prints it on stderr without a traceback and exits with 1; a notebook shows the sentence alone.
    Every other exception is a bug and keeps its traceback.
    """

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def script_line(error: BaseException) -> str:
    """Return the last line of the user's own code that an error went through: " (my_idea.py, line 7)", or nothing."""
    frame = _script_frame(error)
    return "" if frame is None else f" ({Path(frame.filename).name}, line {frame.lineno})"


def show_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show a LabError that nothing has caught as its sentence, as `sys.excepthook`.

    So too what Optuna says of a space to search in: a script states it before it calls `main`, which could catch that.
    """
    frames, script = traceback.extract_tb(trace), _script_frame(error)
    if isinstance(error, LabError):
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, ValueError) and script and frames[-1].filename.endswith("optuna/distributions.py"):
        said = " ".join(str(error).split()).rstrip(".")
        print(f"error: search: {(script.line or '').rstrip(',')}: {said}{script_line(error)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _script_frame(error: BaseException) -> traceback.FrameSummary | None:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_script(Path(frame.filename))]
    return frames[-1] if frames else None


def is_script(file: Path) -> bool:
    """Say whether a file is the user's own code: neither the lab's nor a library's."""
    lab, standard_library = Path(__file__).parent, Path(inspect.__file__).parent
    if file.is_relative_to(lab) or file.is_relative_to(standard_library):
        return False
    return "site-packages" not in file.parts and file.suffix == ".py" and file.exists()
