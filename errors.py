"""UserError: the base of every error whose message is for the person at the keyboard."""

import sys
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """A flag, file or package has to be changed; the message names it."""


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; at a UserError end with status 1, and print the message instead of the traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
