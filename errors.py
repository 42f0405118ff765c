"""UserError: the base of every error whose message is for the person at the keyboard."""

import sys
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """A flag, file or package has to be changed; the message names it."""


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; a UserError ends it with status 1 and its message, without a traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # not in notebooks; characters that stdout's encoding lacks are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        message = str(error)
        if message.startswith("Caught "):  # a loader process's: DataLoader puts the traceback before the message
            message = message.rpartition(f"{type(error).__name__}: ")[2].strip()
        module = sys.modules["__main__"].__spec__  # of python -m, else None
        sys.exit(f"{module.name.removesuffix('.__main__') if module else Path(sys.argv[0]).name}: {message}")
