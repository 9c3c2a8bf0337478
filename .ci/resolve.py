"""Check that the requirements can be installed on every supported Python, without those Pythons.

    make resolve

pip finds the wheels of all dependencies for another Python and reads only their metadata.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements-dev.txt"


def resolve(python: str) -> int:
    """Run pip for that Python. Its report of what it would install goes to stdout."""
    from pip._internal.cli.main import main
    from pip._vendor.packaging import markers

    # pip evaluates `; python_version < "3.11"` for its own Python, not for --python-version.
    changes = {"python_version": python, "python_full_version": f"{python}.0"}
    default = markers.default_environment()
    markers.default_environment = lambda: default | changes
    with tempfile.TemporaryDirectory() as target:
        return main(
            ["install", "--dry-run", "--quiet", "--ignore-installed", "--only-binary=:all:",
             "--use-feature=fast-deps", "--python-version", python, "--target", target,
             "--report", "-", "--requirement", str(REQUIREMENTS)]
        )  # fmt: skip


def main() -> None:
    """Check all Pythons at once; exit with 1 if one fails."""
    processes = {
        python: subprocess.Popen(
            [sys.executable, __file__, python], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for python in PYTHONS
    }
    failed = False
    for python, pip in processes.items():
        report, errors = pip.communicate()
        if pip.returncode:
            failed = True
            lines = errors.decode(errors="replace").splitlines()
            print(f"Python {python}: FAIL")
            print("\n".join(line for line in lines if line.startswith("ERROR")) or lines[-1])
        else:
            print(f"Python {python}: {len(json.loads(report)['install'])} packages")
    sys.exit(failed)


if __name__ == "__main__":
    sys.exit(resolve(sys.argv[1])) if len(sys.argv) > 1 else main()
