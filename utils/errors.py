"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Bad input, told in one message that names the file, the entry and the mend.

    Entry points print it without a traceback and leave with status 2. Anything else that is
    raised is a fault of the program and keeps its traceback.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point: a UserError becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        # A loader process sends its error on with a traceback in front; the message is its end.
        message = str(error).rsplit("UserError: ", 1)[-1].strip()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
