"""Options, files, logs, processes and metrics, for all other packages.

Every entry point imports this package first, because torch must be loaded after these steps:

- Unsupported systems get one line in place of an ImportError.
- OpenMP is set to wait passively. The threads of a CPU's matrix products wait for each other many
  times a step, by default in a busy loop that takes the cores from other programs: on a busy
  machine a run then takes many times as long. On an idle machine passive waiting costs about 13 %
  (docs/performance.md). OpenMP reads the setting once, while torch loads it; child processes
  inherit it.
- Ctrl-C while libraries are imported, which takes seconds, is one line in place of a traceback.
- A user that the machine does not know, as in containers, gets a name, because torch asks for one.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

# A user who sets one of these keeps that setting: OpenMP's variable, GNU's, Intel's and LLVM's.
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")

try:
    import fcntl  # noqa: F401
    import pwd
    import resource  # noqa: F401
except ImportError as error:
    print(f"error: {sys.platform} lacks {error.name}; this runs on Linux and macOS (on Windows, in "
          "WSL)", file=sys.stderr)  # fmt: skip
    sys.exit(2)

_report = sys.excepthook


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        _report(kind, error, trace)


sys.excepthook = _quiet  # Python then ends as SIGINT ends it, which a shell reports as 130

if not any(name in os.environ for name in WAIT_VARIABLES):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
