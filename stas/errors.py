"""The ways a stage can end early, and the exit codes that tell a scheduler which it was."""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_BAD_INPUT = 3
EXIT_RESUMABLE = 75


class UsageError(ValueError):
    """A wrong option or recipe. Nothing was tried; exit code 2."""


class InputDataError(ValueError):
    """An image, annotation, mask or checkpoint that cannot be used; exit code 3."""


class StoppedEarly(Exception):
    """The stage stopped before its end and goes on when started again; exit code 75."""


class TrainingError(RuntimeError):
    """Training cannot go on as it is: numbers or memory are gone; exit code 1. The last checkpoint is kept."""
