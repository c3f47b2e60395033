"""The one error class that means "the user can put this right"."""


class LabError(ValueError):
    """Bad input or a missing precondition: one sentence that names the field, its value and what is allowed.

    The command line prints it on stderr without a traceback and exits with 1.
    Every other exception is a bug and keeps its traceback.
    """
