"""The error that a user can fix; any other keeps its traceback."""


class UserError(ValueError):
    """Input that the library refuses: what, expected, got, remedy in one message.

    Programs print the message as one line. Every other exception is a fault of the
    program, so its traceback is shown.
    """
