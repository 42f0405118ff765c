"""UserError: the base of every error whose message is for the person at the keyboard."""


class UserError(ValueError):
    """A flag, file or package has to be changed; the message names it. Scripts print the message, not the traceback."""
