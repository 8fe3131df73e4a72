"""Errors that a user can mend; each module's own errors derive from these."""


class SaEngineError(Exception):
    """A mistake in what was asked for, told in one message that says what to do about it.

    The command line prints `Error: <message>` and ends with `exit_code`.
    """

    exit_code = 2


class TooManyFailures(SaEngineError):
    """The run is finished and committed, but more images failed than `max_failed` allows."""

    exit_code = 3
