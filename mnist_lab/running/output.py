"""Keeps a program going when its output can't be written: nobody reads it any more, or the disk is full."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class LastingStream:
    """A text stream that discards what it is given once its reader is gone or its disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._write_to_nowhere(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._write_to_nowhere(error)

    def _write_to_nowhere(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with suppress(OSError):
            self._stream.flush()  # what it still holds
        if not isinstance(error, BrokenPipeError) and self._stream is not sys.__stderr__:
            print(f"The output can't be written: {error.strerror}. The run goes on without it.", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Keep a reader that ends (`| head`) and a full disk from ending this program."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = LastingStream(before[0]), LastingStream(before[1])
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
