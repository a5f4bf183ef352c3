"""The one exception a user's mistake raises."""


class CoreInferError(ValueError):
    """A mistake in what the caller passed in; the message is one line that names the value and the remedy.

    The command line prints that line and exits with status 2. From Python it is an ordinary `ValueError`.
    """
