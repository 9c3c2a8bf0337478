"""Errors of entry points: one-line messages and exit statuses."""

from __future__ import annotations

import difflib
import errno
import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from utils.console import log_to_file, process_rank, say
from utils.text import visible

# 75: "try again later" (sysexits.h); 130: as a shell reports SIGINT.
FAILED, STOPPED, INTERRUPTED = 2, 75, 130
MAX_MESSAGE = 2000  # characters
# Errors of the operating system that are not bugs: a full disk, missing rights, limits.
MACHINE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM,
    errno.ESTALE, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE,
}  # fmt: skip
TOO_MANY_FILES = os.strerror(errno.EMFILE)


class UserError(Exception):
    """Bad input; the message is one line that names the file, the entry and the fix.

    Entry points print it without a traceback and exit with status 2. Any other exception is a bug
    and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        # The DataLoader passes on a worker's error as a traceback; its last line is the message.
        if message.startswith(f"Caught {type(self).__name__} in DataLoader worker process "):
            name = f"{type(self).__module__}.{type(self).__qualname__}: "
            message = message.rstrip("\n").rsplit("\n", 1)[-1].removeprefix(name)
        message = visible(message)
        if len(message) > MAX_MESSAGE:  # it quotes something large
            message = f"{message[: MAX_MESSAGE // 2]} [...] {message[-MAX_MESSAGE // 2 :]}"
        super().__init__(message)


class StoppedBySignal(BaseException):
    """A signal stopped the run, which has saved: status 75, after which schedulers may requeue it.

    Like KeyboardInterrupt it may be raised anywhere. It is not an Exception, so that code that
    reads a file does not report it as a corrupted file.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """The text " Did you mean 'x'?" with the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def run_main(main: Callable[[], object]) -> None:
    """Run an entry point; turn a UserError into one line on stderr and exit status 2."""
    for name in ("stdout", "stderr"):  # the caller may have closed them (>&-)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        # A console shows characters that it lacks as escapes, and raises no error.
        with suppress(AttributeError, OSError):  # another object than a stream, or a closed one
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        _exit_with(f"error: {error}{_open_files_hint(error)}", FAILED)
    except (OSError, RuntimeError) as error:
        if hint := _open_files_hint(error):  # raised here, or in a worker and passed on as text
            _exit_with(f"error: {TOO_MANY_FILES}{hint}", FAILED)
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            _exit_with(f"error: {error.filename or 'the disk'}: {error.strerror}", FAILED)
        # torch is out of memory, on a GPU or a CPU. Training steps report this themselves.
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            _exit_with(f"error: {' '.join(str(error).split())}", FAILED)
        lost_peer = " by peer" in str(error)  # "closed by peer", "reset by peer"
        if "RANK" not in os.environ or not lost_peer:
            raise
        _exit_with("error: another process has ended", FAILED, cause=False)
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        if encoding == "utf-8":
            raise
        _exit_with(
            f"error: {ascii(error.object)}: names of files are in {encoding} here, which lacks "
            "some of these characters; set PYTHONUTF8=1",
            FAILED,
        )
    except StoppedBySignal as stopped:
        _exit_with(str(stopped), STOPPED)
    except KeyboardInterrupt:
        _exit_with("interrupted", INTERRUPTED)
    finally:
        gc.freeze()  # else Python looks for cycles in all of torch before it exits: a second


def _open_files_hint(error: Exception) -> str:
    """The fix for too many open files, if that is the error."""
    if TOO_MANY_FILES not in str(error):
        return ""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f": {limit} at once are allowed here (ulimit -n); allow more (ulimit -n 4096), or give "
        "--num_workers 0"
    )


def _exit_with(message: str, status: int, cause: bool = True) -> None:
    """Report a message and exit.

    Several processes may fail with the same error. Rank 0 reports it at once. The others wait, so
    that torchrun ends them before they repeat it, and so does a process that only noticed that
    another one has failed (`cause` is False).
    """
    message = visible(message)
    number = process_rank()
    if (number or not cause) and status == FAILED:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
        message = f"rank {number}: {message}"
    if number == 0 or status == FAILED:
        log_to_file(message)
        say(message, sys.stderr)
    # torchrun ends its report with the content of this file.
    if cause and "TORCHELASTIC_ERROR_FILE" in os.environ:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        content = json.dumps({"message": {"message": message, "extraInfo": extra}})
        with suppress(OSError):  # its disk may be full
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(content, encoding="utf-8")
    if "RANK" in os.environ:
        os._exit(status)  # a regular exit would wait for processes that may have ended
    sys.exit(status)
