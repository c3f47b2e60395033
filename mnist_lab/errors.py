"""The one error class that means "the user can put this right", and where in the user's own code an error began."""

from __future__ import annotations

import inspect
import re
import traceback
from pathlib import Path

# A user name and a password in a URI, alone or in the midst of a text; and what else may be secret in one.
CREDENTIALS = re.compile(r"\b([a-z][a-z0-9+.-]*://)([^\s'\"/?#:@]*)(:[^\s'\"]*)?@", re.IGNORECASE)
SECRET_PARAMETER = re.compile(
    r"([?&;][^\s'\"=&;]*(?:pass|pwd|secret|token|key|odbc_connect)[^\s'\"=&;]*=)[^\s'\"&;#]+", re.IGNORECASE
)


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


def one_line(error: BaseException) -> str:
    """Return an error's text as one line, without the passwords of URIs in it."""
    return without_password(text_of(error))[:500]


def without_password(text: str) -> str:
    """Return a URI, or a text with URIs, with *** in place of each password and token."""

    def hide(found: re.Match[str]) -> str:
        scheme, user, password = found.groups()
        if password is None:  # a token stands alone before a server; before a database, it is a user name
            return f"{scheme}***@" if scheme.lower() in ("http://", "https://") else found[0]
        return f"{scheme}{user}:***@"

    return SECRET_PARAMETER.sub(r"\1***", CREDENTIALS.sub(hide, text))


def script_line(error: BaseException) -> str:
    """Return the last line of the user's own code that an error went through: " (my_idea.py, line 7)", or nothing."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_script(Path(frame.filename))]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def is_script(file: Path) -> bool:
    """Say whether a file is the user's own code: neither the lab's nor a library's."""
    file = file.resolve()
    libraries = Path(__file__).resolve().parent, Path(inspect.__file__).resolve().parent
    if any(map(file.is_relative_to, libraries)) or {"site-packages", "dist-packages"} & {*file.parts}:
        return False
    return file.suffix == ".py" and file.is_file()
