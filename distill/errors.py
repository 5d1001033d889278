"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """What was given, what is allowed, what to do.

    Programs print it on one screen and exit with 2; everything else is a bug and keeps its traceback.

    Attributes:
        everyones: all processes of a run raise this same error, so that one of them is enough to print it.
    """

    everyones = False
