"""The one exception for the user's mistakes; programs print its text on one screen and exit with code 2."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message says what was given, what is allowed and what to do. Programs turn it into exit code 2;
    library callers may catch it as the ``ValueError`` it is.
    """
