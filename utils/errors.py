"""What an entry point says, and the status it leaves with, when it cannot go on."""

from __future__ import annotations

import difflib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from utils.logger import note_in_file, say

FAILED, STOPPED, KILLED = 2, 75, 130  # 75: "try again later" (sysexits.h)
LONGEST = 2000  # characters of a message
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class UserError(Exception):
    """Bad input, told in one message that names the file, the entry and the mend.

    Entry points print it without a traceback and leave with status 2. Anything else that is
    raised is a fault of the program and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST:  # it quotes something large
            message = f"{message[: LONGEST // 2]} [...] {message[-LONGEST // 2 :]}"
        super().__init__(message)


class Stopped(BaseException):
    """A signal asked a run to leave, and it has saved: status 75, which schedulers may requeue.

    Like KeyboardInterrupt it may come at any moment, and is nobody's error: what reads a file must
    not take it for damage.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def words_of(error: UserError) -> str:
    """Its message. A loader process sends its error on with a traceback in front."""
    return str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point: a UserError becomes one line on stderr and exit status 2."""
    for name in ("stdout", "stderr"):  # closed by who started us (>&-)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    try:
        main()
    except UserError as error:
        _leave(f"error: {words_of(error)}", FAILED)
    except OSError as error:
        if error.errno not in DISK:
            raise
        _leave(f"error: {error.filename or 'the disk'}: {error.strerror}", FAILED)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, outside of steps, which say more
            _leave(f"error: {' '.join(str(error).split())}", FAILED)
        if "RANK" not in os.environ or " by peer" not in str(error):  # closed, or reset
            raise
        _leave("error: another process has ended", FAILED, cause=False)
    except Stopped as stopped:
        _leave(str(stopped), STOPPED)
    except KeyboardInterrupt:
        _leave("interrupted", KILLED)


def _leave(message: str, status: int, cause: bool = True) -> None:
    """With several processes each may have met the same error: the first tells it, and torchrun
    ends the others before they repeat it, as it does those that only noticed (no `cause`)."""
    rank = int(os.environ.get("RANK", 0))
    if (rank or not cause) and status == FAILED:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
        message = f"rank {rank}: {message}"
    if rank == 0 or status == FAILED:
        note_in_file(message)
        say(message, sys.stderr)
    # torchrun's own report ends with what stands in a file of its choice.
    if cause and "TORCHELASTIC_ERROR_FILE" in os.environ:
        told = {"py_callstack": message, "timestamp": str(int(time.time()))}
        content = json.dumps({"message": {"message": message, "extraInfo": told}})
        with suppress(OSError):  # its disk may be full
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(content, encoding="utf-8")
    if "RANK" in os.environ:
        os._exit(status)  # other processes may be gone; a farewell to them would wait
    sys.exit(status)
