"""The one error class that means "the user can put this right"."""


class LabError(ValueError):
    """Bad input or a missing precondition: one sentence that names the field, its value and what is allowed.

    The command line prints it on stderr without a traceback and exits with 1; a notebook shows the sentence alone.
    Every other exception is a bug and keeps its traceback.
    """

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]
