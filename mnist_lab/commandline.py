"""What the command lines of scripts and of jobs share. It imports no torch, which takes seconds: few jobs need it."""

import argparse
import logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from mnist_lab.errors import LabError


def whole_number(text: str) -> int:
    """Read a whole number in the digits 0 to 9; raises ValueError."""
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def finite_number(text: str) -> float:
    """Read a number in the digits 0 to 9, such as 0.05 or 5e-2; raises ValueError, also if it is too large."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) or math.isinf(float(text)):
        raise ValueError(f"{text!r} is not a finite number")
    return float(text)


Flag = tuple[str, dict[str, Any]]  # of a command line: its name, and how argparse reads it


def flag(name: str, text: str, **options: Any) -> Flag:
    return name, {"help": text, **options}


def say_what_is_done() -> None:
    """Let the lab's loggers show warnings, and on a terminal also what is being done."""
    logger = logging.getLogger("mnist_lab")
    # Without a level of its own the root's counts, which importing mlflow.pytorch raises to ERROR.
    logger.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    if sys.stderr.isatty() and not logger.handlers:  # without one, Python shows warnings by itself
        logger.addHandler(logging.StreamHandler())
        logger.propagate = False


@contextmanager
def sentences(consequence: str = "") -> Iterator[None]:
    """Show a LabError as its sentence, and Ctrl-C as a word and `consequence`; a bug keeps its traceback."""
    try:
        yield
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {consequence}".rstrip(), file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def number_from(least: float = -math.inf, most: float = math.inf) -> Callable[[str], int]:
    """Return a reader of whole numbers for argparse, which refuses others before anything slow is imported."""

    def number(text: str) -> int:
        try:
            value = whole_number(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if not least <= value <= most:
            limit = f"less than {least}" if value < least else f"more than {most:,}"
            raise argparse.ArgumentTypeError(f"{value} is {limit}")
        return value

    return number


def interrupt_on_signals() -> None:
    """Let SIGTERM and a closed terminal end the program as Ctrl-C does, so that what is open is closed in order."""
    if threading.current_thread() is not threading.main_thread():  # no other may say what a signal does
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it, to let it outlive the terminal
            signal.signal(number, signal.default_int_handler)


class LastingStream:
    """A text stream that discards what it is given once its reader is gone or its disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._stream, name)
        return partial(self._try, attribute) if name in ("write", "flush") else attribute

    def _try(self, call: Callable[..., object], *given: str) -> None:
        try:
            call(*given)
        except OSError as error:
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            with suppress(OSError):
                self._stream.flush()  # what it still holds
            if not isinstance(error, BrokenPipeError) and self._stream is not sys.__stderr__:
                print(f"The output can't be written: {error.strerror}. The run goes on without it.", file=sys.stderr)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Keep a reader that ends (`| head`) and a full disk from ending this program."""
    streams: list[Any] = [LastingStream(sys.stdout), LastingStream(sys.stderr)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()


DATA_DIR = flag("--data-dir", "where MNIST is kept (default: MNIST_LAB_DATA, else data/)", type=Path)
TRACKING_URI = flag("--tracking-uri", "MLflow store (default: MLFLOW_TRACKING_URI, else mlruns/mlflow.db)")
