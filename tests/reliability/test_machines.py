"""Machines as containers and clusters have them: another home, user, console, or limit."""

import importlib
import sys

import pytest

from tests.helpers import ROOT
from utils.errors import UserError


@pytest.mark.parametrize(
    "command",
    [
        "train --config_file ~/x/preset.yaml",
        "train --loss_names sdm --root_dir ~/x",
        "test --config_file ~/x/configs.yaml",
        "tools.check_dataset --root_dir ~/x",
        "tools.report ~/x",
        "tools.compare_runs ~/x ~/y",
        "tools.export --config_file ~/x/configs.yaml --output y",
        "tools.bench --compare ~/x ~/y",
        "tools.reproduce --table mini --root_dir ~/x",
        "tools.reproduce --table ~/x/table.yaml --root_dir .",
        "datasets.mini.__main__ --out ~/x --figure ~/y",
    ],
)
def test_every_command_takes_a_home_in_its_paths(command, tmp_path, monkeypatch):
    module, *argv = command.split()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *argv])
    with pytest.raises(UserError) as error:
        importlib.import_module(module).main()
    assert f"{tmp_path}/x" in str(error.value) and "~" not in str(error.value)
