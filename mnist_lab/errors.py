"""LabError, for what the user can put right; errors as one line, and where in the user's own code they began."""

import ast
import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import reduce
from pathlib import Path
from types import TracebackType

# A user name and a password in a URI, alone or in the midst of a text; and what else may be secret in one.
CREDENTIALS = re.compile(r"\b([a-z][a-z0-9+.-]*://)([^\s'\"/?#:@]*)(:[^\s'\"]*)?@", re.IGNORECASE)
SECRET_PARAMETER = re.compile(
    r"([?&;][^\s'\"=&;]*(?:pass|pwd|secret|token|key|odbc_connect)[^\s'\"=&;]*=)[^\s'\"&;#]+", re.IGNORECASE
)


class LabError(ValueError):
    """Bad input or a missing precondition: one sentence that names the field, its value and what is allowed.

    It is shown without a traceback. Every other exception is a bug and keeps its own.
    """

    @property
    def field(self) -> str:
        """Return what stands before the first colon: "epochs", "targets.accuracy"."""
        return str(self).partition(": ")[0]

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def text_of(error: BaseException) -> str:
    """Return an error's message on one line, or its class's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def counted(number: int, noun: str, plural: str = "") -> str:
    """Say "1 epoch" or "2,000 epochs"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def one_line(error: BaseException) -> str:
    """Return an error's text as one line, without the passwords of URIs, SQL, and SQLAlchemy's words on its flush."""
    return without_password(re.sub(r"^\(raised as a result of [^)]*\) | \[SQL:.*", "", text_of(error)))[:500]


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
    is_library = any(map(file.is_relative_to, libraries)) or {"site-packages", "dist-packages"} & {*file.parts}
    return not is_library and file.suffix == ".py" and file.is_file()


# ---- mistakes in a script's own calls, each as one sentence that names the field


# Modules whose functions and classes are declared, not called, and the field that each belongs to.
DECLARED_AS = {
    "torch.optim.lr_scheduler": "scheduler",
    "torch.optim.swa_utils": "average",
    "torch.optim": "optimizer",
    "torch.nn.functional": "loss",
    "mnist_lab.augmentation": "augmentation",
    "mnist_lab.objectives": "objective",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    names = {part: one for one in known for part in (one.partition("_")[0], one)}  # "step4" for step4_augment_steplr
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def unknown_argument(function: str, known: Iterable[str], name: str, value: str) -> str:
    return f"{name}={value} is no argument of {function}{did_you_mean(name, known)}; it has {', '.join(known)}"


def explain_mistakes() -> None:
    """End a script with one sentence where Python refuses a call of its declaration; all else fails as before."""
    show_traceback = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if sentence := str(error) if isinstance(error, LabError) else sentence_about(error):
            print(f"error: {sentence}", file=sys.stderr)
        else:
            show_traceback(kind, error, trace)

    sys.excepthook = show


def sentence_about(error: BaseException) -> str | None:
    """Return a sentence about a call at a script's top level that Python refused; None for any other error."""
    steps = zip(traceback.walk_tb(error.__traceback__), traceback.extract_tb(error.__traceback__), strict=True)
    own = [(frame, step) for (frame, _), step in steps if is_script(Path(step.filename))]
    if not (own and isinstance(error, TypeError) and own[-1][1].name == "<module>"):
        return None
    frame, step = own[-1]
    place = (step.lineno, step.end_lineno, step.colno, step.end_colno)
    for node in ast.walk(ast.parse(Path(step.filename).read_bytes())):
        if isinstance(node, ast.Call) and place == (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset):
            with suppress(AttributeError, KeyError, TypeError, ValueError):
                first, *more = ast.unparse(node.func).split(".")
                sentence = _about(node, reduce(getattr, more, frame.f_globals[first]))
                return sentence and sentence + script_line(error)
    return None


def _about(call: ast.Call, function: Callable[..., object]) -> str | None:
    name, parameters = ast.unparse(call.func), inspect.signature(function).parameters
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}
    unknown = next((argument for argument in given if argument not in parameters), None)
    module = function.__module__
    if unknown and module in ("mnist_lab.experiment", "mnist_lab.cli", "torch.nn.modules.loss"):
        field = {"mnist_lab.experiment": unknown, "mnist_lab.cli": "main"}.get(module, "loss")
        return f"{field}: {unknown_argument(name, parameters, unknown, given[unknown])}"
    if module in ("mnist_lab.experiment", "mnist_lab.cli"):
        needed = ", ".join(one.name for one in parameters.values() if one.default is one.empty)
        return f"{name}: takes its fields by name, and needs {needed}"
    for declared, field in DECLARED_AS.items():
        if module.startswith(declared):
            named = dict(zip([*parameters][1:], map(ast.unparse, call.args), strict=False)) | given
            arguments = "".join(f", {argument}={value}" for argument, value in named.items())
            return f"{field}: {ast.unparse(call)} is for each run to call; write partial({name}{arguments})"
    return None
