"""What an entry point says, and the status it leaves with, when it cannot go on."""

from __future__ import annotations

import difflib
import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from utils.logger import note_in_file, say
from utils.text import visible

FAILED, STOPPED, KILLED = 2, 75, 130  # 75: "try again later" (sysexits.h)
LONGEST = 2000  # characters of a message
# Of the system's errors those that are no fault of the program: its disk, rights, limits.
MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM,
    errno.ESTALE, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE,
}  # fmt: skip
TOO_MANY_FILES = os.strerror(errno.EMFILE)


class UserError(Exception):
    """Bad input, told in one line that names the file, the entry and the mend.

    Entry points print it without a traceback and leave with status 2. Anything else that is
    raised is a fault of the program and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        # A loader process's error comes as its traceback, whose last line is the message.
        if message.startswith(f"Caught {type(self).__name__} in DataLoader worker process "):
            name = f"{type(self).__module__}.{type(self).__qualname__}: "
            message = message.rstrip("\n").rsplit("\n", 1)[-1].removeprefix(name)
        message = visible(message)
        if len(message) > LONGEST:  # it quotes something large
            message = f"{message[: LONGEST // 2]} [...] {message[-LONGEST // 2 :]}"
        super().__init__(message)


class StoppedBySignal(BaseException):
    """A signal asked a run to leave, and it has saved: status 75, which schedulers may requeue.

    Like KeyboardInterrupt it may come at any moment, and is nobody's error: what reads a file must
    not take it for damage.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def rank() -> int:
    """This process's number among those of a training; RANK means nothing where it is alone."""
    alone = os.environ.get("WORLD_SIZE", "1").strip() in ("", "1")
    text = os.environ.get("RANK", "").strip()
    return int(text) if text.isdecimal() and not alone else 0


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point: a UserError becomes one line on stderr and exit status 2."""
    for name in ("stdout", "stderr"):  # closed by who started us (>&-)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        # What a console has no letter for is shown by its number, and is no error.
        with suppress(AttributeError, OSError):  # not a console but some object; or it is gone
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        _leave(f"error: {error}{_more_files(error)}", FAILED)
    except (OSError, RuntimeError) as error:
        if hint := _more_files(error):  # of this process, or of a loader's, as text
            _leave(f"error: {TOO_MANY_FILES}{hint}", FAILED)
        if isinstance(error, OSError) and error.errno in MACHINE:
            _leave(f"error: {error.filename or 'the disk'}: {error.strerror}", FAILED)
        # torch's, on the GPU or not, outside of steps, which say more.
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            _leave(f"error: {' '.join(str(error).split())}", FAILED)
        if "RANK" not in os.environ or " by peer" not in str(error):  # closed, or reset
            raise
        _leave("error: another process has ended", FAILED, cause=False)
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        if encoding == "utf-8":
            raise
        _leave(
            f"error: {ascii(error.object)}: names of files are in {encoding} here, which lacks "
            "some of these letters; set PYTHONUTF8=1",
            FAILED,
        )
    except StoppedBySignal as stopped:
        _leave(str(stopped), STOPPED)
    except KeyboardInterrupt:
        _leave("interrupted", KILLED)


def _more_files(error: Exception) -> str:
    """What to do about too many open files, if an error speaks of them."""
    if TOO_MANY_FILES not in str(error):
        return ""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f": {limit} at once are allowed here (ulimit -n); allow more (ulimit -n 4096), or give "
        "--num_workers 0"
    )


def _leave(message: str, status: int, cause: bool = True) -> None:
    """With several processes each may have met the same error: the first tells it, and torchrun
    ends the others before they repeat it, as it does those that only noticed (no `cause`)."""
    message = visible(message)
    number = rank()
    if (number or not cause) and status == FAILED:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
        message = f"rank {number}: {message}"
    if number == 0 or status == FAILED:
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
