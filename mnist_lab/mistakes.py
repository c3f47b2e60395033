"""Mistakes in a script's own calls, each as one sentence that names the field."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from mnist_lab.errors import LabError, is_script, script_line

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
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown_argument(function: str, known: Iterable[str], name: str, value: str) -> str:
    return f"{name}={value} is no argument of {function}{did_you_mean(name, known)}; it has {', '.join(known)}"


def explain_mistakes() -> None:
    """End a script with one sentence where Python refuses a call of its declaration; all else fails as before."""
    show_traceback = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sentence = str(error) if isinstance(error, LabError) else sentence_about(error)
        if sentence:
            print(f"error: {sentence}", file=sys.stderr)
        else:
            show_traceback(kind, error, trace)

    sys.excepthook = show


def sentence_about(error: BaseException) -> str | None:
    """Return the sentence about a call in a script, outside its functions, that is no mistake elsewhere."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [number for number, code in enumerate(codes) if is_script(Path(code.co_filename))]
    if not (own and isinstance(error, TypeError) and codes[own[-1]].co_name == "<module>"):
        return None
    called = codes[own[-1] + 1 :]
    # A call that Python itself refuses does not begin: only the message says what was called, "StepLR.__init__() ...".
    name = re.split(r"[.(]", called[0].co_qualname if called else str(error))[0]
    if name in ("Experiment", "Targets"):
        known = [*inspect.signature(getattr(sys.modules["mnist_lab.experiment"], name)).parameters]
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            begin = f"{unknown[1]}: is no argument of {name}{did_you_mean(unknown[1], known)}"
        else:
            begin = f"{name}: {str(error).partition(') ')[2]}"
        return f"{begin}; it has, by name, {', '.join(known)}{script_line(error)}"
    for module, field in DECLARED_AS.items():
        if getattr(getattr(sys.modules.get(module), name, None), "__module__", "").startswith(module):
            advice = f"write partial({name}, ...) with its arguments by name"
            return f"{field}: {name} is called here, but each run calls it; {advice}{script_line(error)}"
    return None
