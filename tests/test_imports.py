"""Imports point one way (`make lint`): the contracts in pyproject.toml cover all packages."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tools.docs import ENTRY_POINTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
CONFIG = TOOL["importlinter"]


def lint(folder: Path) -> subprocess.CompletedProcess:
    command = [*LINT, "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_every_package_is_in_a_layer_and_is_installed():
    packages = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    layers = " | ".join(CONFIG["contracts"][0]["layers"]).split(" | ")
    assert packages == sorted(CONFIG["root_packages"]) == sorted(layers)
    installed = TOOL["setuptools"]["packages"]["find"]["include"]
    assert packages == sorted(["tests", *(name.removesuffix("*") for name in installed)])


def test_entry_points_have_fewer_than_100_lines():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in ENTRY_POINTS}
    assert max(lines.values()) < 100, lines


def imported(*command: str) -> set[str]:
    """Packages that a Python process imports."""
    words = [sys.executable, "-X", "importtime", *command]
    error = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stderr
    return {line.rsplit("|")[-1].strip() for line in error.splitlines() if "import time:" in line}


@pytest.mark.parametrize("entry_point", ["train.py", "test.py", "search.py"])
@pytest.mark.parametrize("word", ["--help", "--unknown"])
def test_help_and_wrong_options_are_told_before_torch_is_imported(entry_point, word):
    modules = imported(entry_point, word)
    assert "utils.command_line" in modules and "torch" not in modules


def test_open_clip_imports_no_models_that_are_refused():
    modules = imported("-c", "import model.backbone")
    refused = {"timm.models", "transformers.utils"}  # the packages are asked for, and not found
    assert "open_clip.model" in modules and not refused & modules


def test_imports_keep_their_directions():
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("model/backbone.py", "import datasets", "model is not allowed to import datasets"),
        ("datasets/records.py", "import model.build", "datasets is not allowed to import model"),
        ("processor/step.py", "import train", "processor is not allowed to import train"),
        (
            "utils/runs.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import solver.build",
            "utils is not allowed to import solver",
        ),
        ("processor/state.py", "import processor.resume", "No cycles are allowed in processor"),
    ],
)
def test_an_import_in_another_direction_is_an_error(file, line, message, tmp_path):
    for package in CONFIG["root_packages"]:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=lambda folder, names: [n for n in names if not (n.endswith(".py") or Path(folder, n).is_dir())])  # fmt: skip
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode == 1 and message in result.stdout, result.stdout
