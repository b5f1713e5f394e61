"""The error that a user can fix; any other keeps its traceback."""


class UserError(ValueError):
    """Refused input: what, expected, got, remedy; shown without a traceback."""
