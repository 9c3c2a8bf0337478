"""Each package has one version on every Python. `make resolve` also asks the package index."""

import runpy

import pytest
from packaging.requirements import Requirement

from tests.helpers import ROOT

FILES = [f"requirements{part}.txt" for part in ("", "-construction", "-search", "-lora", "-dev")]
PYTHONS = runpy.run_path(str(ROOT / ".ci/resolve.py"))["PYTHONS"]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_package_has_one_pin_on_every_python(python):
    lines = {
        line.split("#")[0].strip()
        for name in FILES
        for line in (ROOT / name).read_text().splitlines()
    }  # a set: two files may have the same pin
    requirements = [Requirement(line) for line in lines if line and not line.startswith("-r")]
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pins = [r for r in requirements if r.marker is None or r.marker.evaluate(environment)]
    assert sorted(r.name for r in pins) == sorted({r.name for r in requirements})
    assert all([s.operator for s in r.specifier] == ["=="] for r in pins)
