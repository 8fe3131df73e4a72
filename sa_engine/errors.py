"""Errors that a user can mend; each module's own errors derive from these."""

from typing import Any


class SaEngineError(Exception):
    """A mistake in what was asked for, told in one message that says what to do about it.

    The command line prints `Error: <message>` and ends with `exit_code`.
    """

    exit_code = 2

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross processes, whatever a subclass's constructor takes."""
        return _unpickled, (type(self), self.args), self.__dict__


def _unpickled(kind: type[SaEngineError], args: tuple[Any, ...]) -> SaEngineError:
    return kind.__new__(kind, *args)


class TooManyFailures(SaEngineError):
    """The run is finished and committed, but more images failed than `max_failed` allows."""

    exit_code = 3
