"""The error of a run that cannot go on because of what it was given."""


class UserError(Exception):
    """Bad input. The message is one line that names the option or file, what was expected and what came.

    The command line prints the message alone and exits with code 1.
    """
