"""UserError: the base of every error whose message is for the person at the keyboard."""

import sys
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """A flag, file or package has to be changed; the message names it."""


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; at a UserError end with status 1, and print the message instead of the traceback. Stdout escapes
    characters that its encoding lacks, as stderr does."""
    if hasattr(sys.stdout, "reconfigure"):  # notebooks replace it
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
