"""What the command lines of scripts and of jobs share. It imports no torch, which takes seconds: few jobs need it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mnist_lab.errors import LabError
from mnist_lab.numerals import whole_number


@contextmanager
def sentences(consequence: str = "") -> Iterator[None]:
    """Show a LabError as its sentence, and Ctrl-C as a word with what follows from it; a bug keeps its traceback."""
    try:
        yield
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {consequence}".rstrip(), file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def number_from(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """Return what reads a whole number for argparse and refuses another one, before anything slow is imported."""

    def number(text: str) -> int:
        try:
            value = whole_number(text)
            if least is not None and value < least:
                raise ValueError
        except ValueError:
            bound = "" if least is None else f" of at least {least}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number{bound}") from None
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{value} is more than {most:,}")
        return value

    return number


def interrupt_on_signals(*signals: signal.Signals) -> None:
    """Let these signals end the program as Ctrl-C does, so that what is open is closed in order.

    A signal that is ignored stays so: `nohup` starts programs that way, to let them outlive the terminal.
    """

    for number in signals:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
