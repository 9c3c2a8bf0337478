"""docs/extending.md works: its code, put where it says, passes its own tests, lints and trains."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers import ROOT
from tools import docs

PAGE = (ROOT / "docs/extending.md").read_text()
BLOCKS = re.findall(r"```python\n# (\S+?)(?:, below: ([^\n]+))?\n(.*?)```", PAGE, flags=re.DOTALL)


def run(folder: Path, *command: object) -> str:
    """The output of a command in a folder, which must succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the repository that follows the page."""
    copy = tmp_path_factory.mktemp("extended")
    packages = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    for folder in (*packages, "configs", "docs"):
        ignore = shutil.ignore_patterns("__pycache__", "*.html", "*.png")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for file in (*docs.ENTRY_POINTS, "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, copy)
    for file, anchor, code in BLOCKS:
        path = copy / file
        if not anchor:
            if path.exists():
                pytest.skip(f"{file} exists: the examples are part of this repository already")
            path.write_text(code)
            continue
        lines = path.read_text().splitlines(keepends=True)
        (at,) = (i for i, line in enumerate(lines) if line.strip().startswith(anchor))
        lines.insert(at + 1, code)
        path.write_text("".join(lines))
    return copy


def test_the_page_has_an_example_of_each_with_its_rows_and_its_test():
    files = [file for file, anchor, _ in BLOCKS if not anchor]
    assert files == [
        "model/losses/triplet.py", "tests/model/test_triplet.py", "model/losses/domain.py",
        "tests/model/test_domain.py", "model/losses/easy.py", "tests/model/test_easy.py",
        "datasets/rooftop.py", "tests/datasets/test_rooftop.py",
    ]  # fmt: skip
    assert len(BLOCKS) == PAGE.count("```python") == len(files) + 11


def test_its_code_lints(extended):
    # The repository may have losses and data sets that sort between those of the page.
    run(extended, sys.executable, "-m", "ruff", "check", "--no-cache", "--fix", "--select=I", ".")
    run(extended, sys.executable, "-m", "ruff", "check", "--no-cache", ".")
    run(extended, sys.executable, "-m", "ruff", "format", "--no-cache", "--check", ".")
    linter = "from importlinter.cli import lint_imports_command as main; main()"
    run(extended, sys.executable, "-c", linter, "--no-cache", "--no-logo")
    # With the cache of `make lint`: most of the time goes to torch's types.
    run(extended, sys.executable, "-m", "mypy", "--cache-dir", ROOT / ".mypy_cache")


def test_its_tests_pass_and_none_that_was_there_has_to_be_edited(extended):
    own = [file for file, anchor, _ in BLOCKS if file.startswith("tests/")]
    code = "import sys, pytest; from tools import docs; docs.main(); sys.exit(pytest.main(sys.argv[1:]))"
    run(
        extended,
        sys.executable,
        "-c",
        code,
        "-p",
        "no:cacheprovider",
        *own,
        "tests/tools/test_docs.py",
    )


def test_its_commands_render_check_train_and_evaluate(extended, tmp_path):
    block = PAGE.split("```\npython -c ")[1].split("```")[0].replace("\\\n", "")
    render, check, train = (
        ("python -c " + block).replace("data/rooftop", str(tmp_path)).splitlines()
    )
    render = render.replace("p.mkdir(parents=True); ", "")  # the folder exists

    def python(command: str, *more: object) -> str:
        return run(extended, sys.executable, *shlex.split(command)[1:], *more)

    python(render)
    assert "\npass" in python(check)
    logs, small = tmp_path / "logs", ("--output_dir", tmp_path / "logs", "--num_workers", 0)
    python(train, *small, "--image_cache", "", "--precision", "fp32")
    (folder,) = (logs / "Rooftop").iterdir()
    config = yaml.safe_load((folder / "configs.yaml").read_text())
    assert (config["triplet_margin"], config["domain_loss_weight"]) == (0.3, 0.05)
    log = (folder / "train_log.txt").read_text()
    shown = r"loss \S+ \(sdm \S+, triplet \S+, domain \S+\)  triplet/active \S+  domain/accuracy \S+  lr"
    assert len(re.findall(shown, log)) == 2, log
    assert "domain_classifier.weight" in torch.load(folder / "best.pth")["model"]
    python(f"python test.py --config_file {folder}/configs.yaml --num_workers 0")
