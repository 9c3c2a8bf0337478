"""What is installed: one version of each package on every Python. `make resolve` asks a registry."""

import runpy

import pytest
from packaging.requirements import Requirement

from tests.helpers import ROOT

PYTHONS = runpy.run_path(str(ROOT / ".ci/resolve.py"))["PYTHONS"]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_package_has_one_pin_on_every_python(python):
    lines = [
        line.split("#")[0].strip()
        for name in ("requirements.txt", "requirements-dev.txt")
        for line in (ROOT / name).read_text().splitlines()
    ]
    all_of = [Requirement(line) for line in lines if line and not line.startswith("-r")]
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    found = [r for r in all_of if r.marker is None or r.marker.evaluate(here)]
    assert sorted(r.name for r in found) == sorted({r.name for r in all_of})
    assert all([s.operator for s in r.specifier] == ["=="] for r in found)
