"""The ways a stage can end early, and the exit codes that report them to a scheduler."""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_BAD_INPUT = 3
EXIT_RESUMABLE = 75
KEPT = "Everything finished so far is kept; run the same command again to resume"  # the end of a remedy


class UsageError(ValueError):
    """A wrong option or recipe. Exit code 2."""


class InputDataError(ValueError):
    """An image, annotation, mask or checkpoint that cannot be used. Exit code 3."""


class UnreadableError(InputDataError):
    """A file that this user may not read. It may be a good one, so `--skip-bad` never leaves it out. Exit code 3."""


class StoppedEarly(BaseException):
    """The stage stopped early and resumes when started again. Exit code 75.

    Not an Exception, because readers of untrusted files catch those to call a file damaged. A signal that arrives while
    a file is read, or a disk that fails for a moment, says nothing about the file.
    """


class TrainingError(RuntimeError):
    """Training cannot continue: numbers are not finite, or memory ran out. Exit code 1. The last checkpoint is kept."""


class MachineError(RuntimeError):
    """The machine lacks what the job asked for, such as a GPU. Exit code 1: another one may have it."""
