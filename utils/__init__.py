"""Options, files, logs, processes and metrics, for all other packages.

Every entry point imports it first, since it settles what must be settled before torch is loaded:

- Which systems this runs on: told in a line, in place of an ImportError from some module below.
- How threads wait. Those of a CPU's matrix products wait for each other many times a step, by
  default in a busy loop that takes the cores from whoever has work: beside other work a run then
  takes many times as long. Passive waiting costs some 13 % alone (docs/performance.md). The
  OpenMP library reads this once, while torch loads it; processes that are started inherit it.
- A name for a user whom the machine does not know, as in containers: torch asks for one.
"""

from __future__ import annotations

import os
import sys

# Any of these says how to wait: OpenMP's own variable, GNU's, and Intel's and LLVM's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")

try:
    import fcntl  # noqa: F401
    import pwd
    import resource  # noqa: F401
except ImportError as error:
    print(f"error: {sys.platform} lacks {error.name}; this runs on Linux and macOS (on Windows, in "
          "WSL)", file=sys.stderr)  # fmt: skip
    sys.exit(2)

if not any(name in os.environ for name in WAITING):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
