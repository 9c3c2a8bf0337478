"""A construction that is killed ends with the same data set, and pays for nothing twice."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import yaml

from datasets.mini import render_raw
from tests.construction.server import ModelServer
from tests.helpers import ROOT

SENTENCE = (
    "A {} with short dark hair wears a {} jacket over a light shirt, blue jeans and black shoes, "
    "and carries a small brown bag over the left shoulder while walking along the path."
)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    for name, layout in (("AG-ReID", "AG-ReID-raw"), ("G2APS", "G2APS-raw")):
        render_raw(root / name, layout, train_ids=14, test_ids=6, pairs=2, workers=1)
    return root


class Server(ModelServer):
    """Counts its answers. They depend on the picture alone; one in five is refused by the checks."""

    def __init__(self):
        super().__init__(self.caption, self.trouble, delay=0.05)
        self.answers = 0

    def caption(self, prompt, pictures, nth):
        number = zlib.crc32(pictures[0].encode())
        with self.lock:
            self.answers += 1
        if number % 5 == 0:
            return "I'm sorry, but I cannot describe people in pictures."
        return SENTENCE.format(("man", "woman")[number % 2], ("red", "green", "grey")[number % 3])

    def trouble(self, prompt, nth):
        return {3: 429, 7: 500, 11: "reset", 13: "malformed"}.get(nth % 17)


def start(raw, output, url):
    recipe = yaml.safe_load((ROOT / "configs/construction/mini.yaml").read_text())
    recipe["captions"] = {"by": "vision"}
    recipe["models"] = {"endpoints": [{"url": url, "model": "tiny", "at_once": 4}]}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    argv = ["--recipe", path, "--ag_reid", raw / "AG-ReID", "--g2aps", raw / "G2APS",
            "--output", output, "--workers", "1"]  # fmt: skip
    command = [sys.executable, "build_dataset.py", *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def manifest(output: Path) -> str:
    return (output / "manifest.sha256").read_text()


def test_kills_at_random_moments_end_with_the_same_data_set_and_no_answer_is_paid_for_twice(
    raw, tmp_path, pytestconfig, tally
):
    with Server() as server:
        began = time.monotonic()
        child = start(raw, tmp_path / "whole", server.url)
        assert child.wait() == 0, child.stdout.read().decode()
        longest, answers = time.monotonic() - began, server.answers
        # A tenth of the kills of a training: each start takes seconds.
        kills, survived, rng = pytestconfig.getoption("kills") // 10, 0, random.Random(1)
        server.answers = 0
        output = tmp_path / "killed"
        while survived < kills:
            child = start(raw, output, server.url)
            try:
                child.wait(rng.uniform(0, longest))
                assert child.returncode == 0, child.stdout.read().decode()
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                survived += 1
            if output.exists():  # it was faster than the kill: check it, and begin anew
                assert manifest(output) == manifest(tmp_path / "whole")
                for path in (output, output.with_name("killed.work")):
                    shutil.rmtree(path)
                assert server.answers <= answers + 4 * kills
                server.answers = 0
        child = start(raw, output, server.url)
        assert child.wait() == 0, child.stdout.read().decode()
    assert manifest(output) == manifest(tmp_path / "whole")
    # Only what was under way when a kill came may have been asked again.
    assert answers <= server.answers <= answers + 4 * kills
    tally["kills of build_dataset.py survived"] += survived
