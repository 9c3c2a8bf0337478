"""Untrusted files: whatever their content, the result is success or a UserError.

It is never another exception, more than 10 seconds or 1 GB, or a wrong result: what is read in
spite of a change is checked. Examples are the same in every run; `--fuzz` sets their number.
"""

import argparse
import copy
import io
import json
import os
import pickle
import resource
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

import test as test_entry
from datasets.fingerprint import changes, fingerprint
from datasets.images import read_image
from datasets.loaders import train_loader
from datasets.registry import read_dataset
from model.build import build_evaluation_model, build_training_model, load_fitting
from processor.best import epoch_and_best
from processor.result_tables import best_table
from processor.resume import read_state, resume
from processor.step import TrainStep
from processor.trainer import Trainer
from tests.helpers import ROOT, golden_clip, options, run
from tests.reliability.runs import train_small_run
from tools import report
from tools._reproduce_output import write_tables
from tools._reproduce_table import read_table
from tools.compare_runs import compare
from utils.attributes import read_attributes
from utils.checkpoint import digest, load_checkpoint, save_checkpoint
from utils.command_line import parse_options, parse_test_options
from utils.config import write_config
from utils.errors import UserError
from utils.expansion import refuse_oversized
from utils.files import lock, remove_unfinished
from utils.options import OPTIONS
from utils.run_log import setup_logger
from utils.runs import EVENTS
from utils.text import visible

CPU = torch.device("cpu")


def fuzz(test):
    """Run a test with `--fuzz` examples. It names its slow fixtures in `usefixtures`, so that they
    are made before the first example and its deadline."""

    def fuzzed(pytestconfig, tally, request):
        count = pytestconfig.getoption("fuzz")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        settings(
            max_examples=count, deadline=10_000, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # shrinking would keep hundreds of models in memory
        )(test)(request)  # fmt: skip
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
        tally[f"fuzzed {fuzzed.__doc__}"] += count

    fuzzed.__name__, fuzzed.__doc__ = test.__name__, test.__doc__
    return fuzzed


def unless_refused(action):
    """The result of an action, or None if it raises a UserError."""
    try:
        return action()
    except UserError as error:
        assert str(error).strip() and len(str(error)) < 5000
        return None


# Values that a JSON or YAML file may hold in the wrong place.
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 70), st.floats(), st.text(max_size=20),
    st.sampled_from(
        ["", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "train", "test", "..",
         "~", "CON", "a/./b", "imgs", 10**30, -1, 2**63, 1e400, "1", "&nbsp;", "jekyll"]
    ),
)  # fmt: skip
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


def places(tree, path=()):
    """Paths of all nodes of a tree."""
    yield path
    if isinstance(tree, (list, dict)):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*path, key))


def changed(draw, tree):
    """A copy with up to three nodes replaced, removed, repeated or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(tree))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(trees)
            continue
        *way, last = path
        parent = tree
        for key in way:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "double", "move"]))
        if how == "remove":
            del parent[last]
        elif how == "double" and isinstance(parent, list):
            parent.insert(last, copy.deepcopy(parent[last]))
        elif how == "move":
            source = tree
            for key in draw(st.sampled_from(list(places(tree)))):
                source = source[key]
            parent[last] = copy.deepcopy(source)
        else:
            parent[last] = draw(trees)
    return tree


def corrupted(draw, data: bytes) -> bytes:
    """A copy with some bytes flipped, cut out, repeated or overwritten."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        count = draw(st.sampled_from([1, 1, 1, 8, 100, 5000]))
        how = draw(st.sampled_from(["flip", "flip", "cut", "end", "zero", "random", "double"]))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[at : at + count]
        elif how == "end":
            del data[at:]
        elif how == "zero":
            data[at : at + count] = bytes(len(data[at : at + count]))
        elif how == "random":
            data[at : at + 8] = draw(st.binary(max_size=16))
        else:
            data[at:at] = data[at : at + count]
    return bytes(data)


ANNOTATIONS = {
    "AGDataAttr": [
        "attrs.json", "AG-ReID/agtext_train.json", "AG-ReID/agtext_test.json",
        "G2APS-AG/g2aps_train.json", "G2APS-AG/g2aps_val.json",
    ],
    "CUHK-PEDES": ["reid_raw.json"],
    "RSTPReid": ["data_captions.json"],
    "AERI-PEDES": ["train_caption.json", "test_caption.json"],
    "TAG-PEDES": ["train_reid.json", "test_reid.json"],
    "custom": ["dataset.json"],
}  # fmt: skip


@pytest.fixture(scope="module")
def linked(mini_root, rendered, tmp_path_factory):
    """A folder for each data set. Its JSON files may be changed; its images are links."""
    folders = {}
    for name in ANNOTATIONS:
        source = mini_root if name == "AGDataAttr" else rendered(name)
        target = folders[name] = tmp_path_factory.mktemp(name)
        for path in source.rglob("*"):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json":
                place.write_bytes(path.read_bytes())
            elif path.is_file():
                os.link(path, place)
    return folders


@pytest.mark.usefixtures("linked")
@fuzz
@given(data=st.data())
def test_annotations(request, data):
    """annotations"""
    folders = request.getfixturevalue("linked")
    name = data.draw(st.sampled_from(list(ANNOTATIONS)))
    path = folders[name] / data.draw(st.sampled_from(ANNOTATIONS[name]))
    original = path.read_bytes()
    if data.draw(st.integers(0, 3)):
        content = json.dumps(changed(data.draw, json.loads(original))).encode()
    else:
        content = corrupted(data.draw, original)
    args = options(dataset_name=name, root_dir=str(folders[name]))
    try:
        path.write_bytes(content)
        data_set = unless_refused(lambda: read_dataset(args))
        if data_set is not None:
            check(data_set, folders[name])
            unless_refused(lambda: train_loader(data_set, args, CPU))
    finally:
        path.write_bytes(original)


def check(data, root: Path) -> None:
    """Assert that images are in the folder, and labels in their range."""
    assert {s.pid for s in data.train} <= set(range(data.num_identities))
    for sample in data.train:
        for image in (sample.image, *([sample.pair] if sample.pair else [])):
            assert Path(os.path.normpath(image.path)).is_relative_to(root)
            assert os.path.isfile(image.path)
            for value, count in zip(image.attributes or (), data.attribute_classes.values(), strict=False):  # fmt: skip
                assert 0 <= value < count
        assert sample.caption.strip()
    for split in data.splits.values():
        for gallery in split.galleries.values():
            assert len(gallery.images) == len(gallery.pids) == len(gallery.sources)
        assert len(split.captions) == len(split.caption_pids) > 0
        torch.tensor(split.caption_pids + split.image_pids)  # fit into 64 bits
        images = [image for gallery in split.galleries.values() for image in gallery.images]
        assert all(os.path.isfile(image.path) for image in images)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[" * 100_000 + "]" * 100_000, "1" * 10_000, '{"a": ' * 50_000, "\xff", ""],
)
def test_json_that_is_deep_or_large_is_refused(text, linked):
    path = linked["custom"] / "dataset.json"
    original = path.read_bytes()
    try:
        path.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="dataset.json"):
            read_dataset(options(dataset_name="custom", root_dir=str(linked["custom"])))
    finally:
        path.write_bytes(original)


def test_an_identity_number_that_is_huge_takes_no_memory(mini_copy):
    path = mini_copy / "AG-ReID/agtext_train.json"
    rows = json.loads(path.read_text())
    for pid, message in (
        (2**31 - 1, "contiguous; . is missing"),
        (10**30, "from 0 to 2147483647, got 1000"),
    ):
        rows[3][0] = pid
        path.write_text(json.dumps(rows))
        with pytest.raises(UserError, match=message):
            read_dataset(options(dataset_name="AGDataAttr", root_dir=str(mini_copy)))


@st.composite
def anchored(draw) -> str:
    """YAML whose values refer to each other, merge each other, or are long numbers."""
    lines = ["lr: &a0 {lr: 1}"]
    for i in range(1, draw(st.integers(2, 30))):
        one, other = (f"*a{draw(st.integers(max(0, i - 3), i - 1))}" for _ in range(2))
        long = draw(st.sampled_from([3, 50, 5000]))
        value = draw(st.sampled_from([
            f"{{<<: {one}}}", f"{{<<: [{one}, {other}], x: 1}}", f"[{one}, {other}]",
            f"{{x: {one}, y: {other}}}", "0x" + "f" * long, "1" + ":59" * long, "9" * long,
            "0b" + "1" * long, "1" + ":59" * long + ".5", "." + "9" * long, "{<<: [1, a], <<: 3}",
        ]))  # fmt: skip
        lines.append(f"{draw(keys) or 'x'}: &a{i} {value}")
    return "\n".join(lines)


anchored = anchored()
PRESETS = [p.read_text() for p in sorted((ROOT / "configs").glob("*.yaml"))]
keys = st.sampled_from([*OPTIONS, "base", "learning_rate", "", "test"])


@fuzz
@given(data=st.data())
def test_configs(request, data):
    """configs"""
    path = request.getfixturevalue("tmp_path") / "configs.yaml"
    how = data.draw(st.sampled_from(["options", "options", "text", "bytes", "anchors"]))
    if how == "options":
        tree = data.draw(st.dictionaries(keys, trees, max_size=4))
        content = yaml.dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    elif how == "anchors":
        content = data.draw(anchored).encode()
    elif how == "text":
        content = data.draw(st.text(max_size=60)).encode("utf-8", "surrogatepass")
    else:
        content = corrupted(data.draw, data.draw(st.sampled_from(PRESETS)).encode())
    path.write_bytes(content)
    args = unless_refused(lambda: parse_options(["--config_file", str(path)]))
    if args is not None:  # what was accepted can be written and read back
        write_config(path, args)
        assert parse_options(["--config_file", str(path), "--resume", args.resume, "--resume_ckpt_file", args.resume_ckpt_file]) == args  # fmt: skip
        path.write_bytes(content)
    unless_refused(lambda: parse_test_options(["--config_file", str(path)]))
    unless_refused(lambda: read_attributes(str(path)))


@fuzz
@given(data=st.data())
def test_attribute_files(request, data):
    """attribute files"""
    path = request.getfixturevalue("tmp_path") / "attributes.yaml"
    tree = yaml.safe_load((ROOT / "configs/attributes.yaml").read_text())
    path.write_text(yaml.safe_dump(changed(data.draw, tree)), encoding="utf-8", errors="replace")
    attributes = unless_refused(lambda: read_attributes(str(path)))
    if attributes is not None:
        assert all(isinstance(s, str) and s for a in attributes for g in a.sentences for s in g)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b]\n"
        "d: &d [*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d]\nlr: [*e,*e,*e,*e,*e,*e,*e]",
        "[" * 5000,
        "lr: !!python/object/apply:os.system ['touch harm']",
        "&a [*a]",
        "lr: &a [*a]",
        "? [a, b]\n: 1",
        "{a: 1}: 2",
        "1: 2",
    ],
)
def test_yaml_that_expands_recurses_or_runs_commands_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match="p.yaml") as error:
        parse_options(["--config_file", "p.yaml"])
    assert len(str(error.value)) < 1000 and os.listdir() == ["p.yaml"]


@pytest.fixture(scope="module")
def trained(mini_root, tmp_path_factory):
    """The folder of a small run."""
    return train_small_run(mini_root, tmp_path_factory.mktemp("trained"), num_epoch=2)


@pytest.mark.usefixtures("trained")
@fuzz
@given(data=st.data())
def test_corrupted_checkpoints(request, data):
    """corrupted checkpoints"""
    folder, path = request.getfixturevalue("trained"), request.getfixturevalue("tmp_path") / "x.pth"
    original = folder / data.draw(st.sampled_from(["last.pth", "best.pth"]))
    content = original.read_bytes()
    small = len(content) - 40_000  # the small directory at the end gets half of the changes
    if data.draw(st.booleans()):
        content = content[:small] + corrupted(data.draw, content[small:])
    else:
        content = corrupted(data.draw, content)
    path.write_bytes(content)
    checkpoint = unless_refused(lambda: load_checkpoint(path))
    if checkpoint is not None:
        assert digest(checkpoint) == digest(load_checkpoint(original))


@pytest.mark.usefixtures("trainer")
@fuzz
@given(data=st.data())
def test_checkpoints_with_unusual_content(request, data):
    """checkpoints with unusual content"""
    folder, path = request.getfixturevalue("trained"), request.getfixturevalue("tmp_path") / "x.pth"
    trainer = request.getfixturevalue("trainer")
    state = load_checkpoint(folder / "last.pth")
    small = {k: v for k, v in state.items() if k not in ("model", "optimizer", "generators")}
    values = st.one_of(scalars.filter(lambda v: v != "\ud800"), tensors, unusual_tensors, doubled)
    how = data.draw(st.sampled_from(["entry", "inner", "weight", "optimizer", "generators"]))
    if how == "entry":
        name = data.draw(st.sampled_from(sorted(small)))
        state[name] = data.draw(values)
    elif how == "inner":
        name = data.draw(
            st.sampled_from(sorted(k for k, v in small.items() if isinstance(v, dict)))
        )
        part = data.draw(st.sampled_from([*state[name], "new"]))
        state[name][part] = data.draw(values)
        if data.draw(st.booleans()):
            del state[name][part]
    elif how == "weight":
        name = data.draw(st.sampled_from(sorted(state["model"])))
        state["model"][name] = data.draw(values)
    elif how == "optimizer":
        part = data.draw(st.sampled_from(["state", "param_groups"]))
        state["optimizer"][part] = data.draw(values)
    else:
        part = data.draw(st.sampled_from(["model", "processes"]))
        state["generators"][part] = data.draw(values)
    try:
        if data.draw(st.booleans()):
            refuse_oversized(state, 2**20)  # otherwise its hash would take for ever
            save_checkpoint(path, state)
        else:
            torch.save({**state, "sha256": "0"}, path)
    except Exception:  # such a file cannot be written
        return
    if how != "weight":
        if unless_refused(lambda: resume(trainer, read_state(path))) is not None:
            best_table(trainer.best.by_split)
        checkpoint = unless_refused(lambda: load_checkpoint(path))
        if checkpoint is not None:
            json.dumps([*epoch_and_best(checkpoint), changes(checkpoint.get("data"), trainer.data)])
        return
    checkpoint = unless_refused(lambda: load_checkpoint(path))
    if checkpoint is not None:
        unless_refused(lambda: load_fitting(trainer.model, checkpoint, str(path)))
        if data.draw(st.booleans()):
            unless_refused(lambda: build_evaluation_model(trainer.args, checkpoint, str(path)))


unusual_tensors = st.builds(
    lambda make: make(),
    st.sampled_from([
        lambda: torch.eye(3).to_sparse(), lambda: torch.zeros(2, device="meta"),
        lambda: torch.zeros(1).expand(2**15, 2**15), lambda: torch.zeros(6)[::2],
        lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
        lambda: torch.full((2,), float("nan")), lambda: torch.zeros(0), lambda: torch.tensor(True),
    ]),
)  # fmt: skip


@st.composite
def doubled(draw):
    """Up to 40 levels of lists, tuples or dicts that each hold the previous one twice."""
    value = draw(scalars.filter(lambda v: v != "\ud800"))
    for _ in range(draw(st.integers(1, 40))):
        kind = draw(
            st.sampled_from(["list", "tuple", "dict"])
        )  # Hypothesis would walk the values themselves
        value = {"list": [value] * 2, "tuple": (value, value), "dict": {"a": value, 1: value}}[kind]
    return value


doubled = doubled()
tensors = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]),
)


@pytest.fixture(scope="module")
def trainer(trained, mini_root):
    import logging

    from solver.build import build_optimizer

    args = parse_options(["--config_file", str(trained / "configs.yaml")])
    args.root_dir = str(mini_root)
    data = read_dataset(args)
    loader = train_loader(data, args, CPU)
    model = build_training_model(args, args.loss_names.split("+"), data.num_identities)
    train_step = TrainStep(model, build_optimizer(model.named_parameters(), args), args)
    log = logging.getLogger("fuzz")
    return Trainer(args, train_step, loader, [], trained, log, fingerprint(data))


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory):
    """Weights in every format that can be read."""
    folder = tmp_path_factory.mktemp("weights")
    clip = golden_clip()

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(3, 4)

        def forward(self, x):
            return self.proj(x)

    torch.save(clip, folder / "a.pt")
    torch.save(clip, folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.jit.script(Holder()).save(folder / "jit.pt")
    safetensors.torch.save_file(clip, folder / "a.safetensors")
    return sorted(folder.iterdir())


@pytest.mark.usefixtures("weight_files")
@fuzz
@given(data=st.data())
def test_weight_files(request, data):
    """weight files"""
    source = data.draw(st.sampled_from(request.getfixturevalue("weight_files")))
    path = request.getfixturevalue("tmp_path") / f"x{source.suffix}"
    content = source.read_bytes()
    if zipfile.is_zipfile(source) and data.draw(st.booleans()):
        content = rezipped(content, lambda pickled: corrupted(data.draw, pickled))
    elif source.suffix == ".safetensors" and data.draw(st.booleans()):
        head = 8 + int.from_bytes(content[:8], "little")
        content = corrupted(data.draw, content[:head]) + content[head:]
    else:
        content = corrupted(data.draw, content)
    path.write_bytes(content)
    checkpoint = unless_refused(lambda: load_checkpoint(path))
    if checkpoint is not None:
        assert all(isinstance(v, torch.Tensor) for v in checkpoint["model"].values())
        args = options(pretrain_choice=str(path), img_size=[96, 32])
        unless_refused(lambda: build_training_model(args, ["itc"], 0))


def rezipped(content: bytes, change) -> bytes:
    """The archive with a changed pickle and correct checksums."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return target.getvalue()


class Harm:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.system, eval, exec, os.mkdir, print, __import__])
def test_pickles_that_call_are_refused_in_every_format(function, protocol, tmp_path, tally):
    """As a plain file, in torch's archive and in a TorchScript archive, in different entries."""
    harm = tmp_path / "harm"
    argument = {os.mkdir: str(harm), os.system: f"touch {harm}"}.get(
        function, f"open('{harm}', 'w')"
    )
    evil = Harm(function, argument)
    for number, content in enumerate((evil, {"model": evil}, {"model": {}, "best": [evil]})):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(pickle.dumps(content, protocol))
        zipped = tmp_path / f"{number}.zip"
        torch.save(content, zipped, pickle_protocol=max(2, protocol))
        script = tmp_path / f"{number}.jit"
        with zipfile.ZipFile(script, "w") as archive:
            archive.writestr("x/constants.pkl", b"")
            archive.writestr("x/data.pkl", pickle.dumps(content, protocol))
        for file in (path, zipped, script):
            for read in (load_checkpoint, read_state):
                with pytest.raises(UserError, match=f"{file}: "):
                    read(file)
                tally["pickles with code refused"] += 1
    assert not harm.exists()


@pytest.mark.usefixtures("mini_root")
@fuzz
@given(data=st.data())
def test_images(request, data):
    """images"""
    folder = Path(request.getfixturevalue("mini_root"))
    source = sorted(folder.rglob("*.jpg"))[0]
    path = request.getfixturevalue("tmp_path") / "x.jpg"
    if data.draw(st.booleans()):
        content = source.read_bytes()
    else:
        from PIL import Image

        kind = data.draw(st.sampled_from(["PNG", "BMP", "TIFF", "GIF", "WEBP", "PPM"]))
        held = io.BytesIO()
        Image.open(source).convert("RGB").save(held, kind)
        content = held.getvalue()
    path.write_bytes(corrupted(data.draw, content))
    image = unless_refused(lambda: read_image(str(path), "entry", (64, 32)))
    assert image is None or image.mode == "RGB"


RUN_FILES = [
    "configs.yaml", "last.pth", "best.pth", "train_log.txt", "lock", "test_results.json",
    "test_queries.npz", "nonfinite", "events",
]  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(trained, mini_root, tmp_path_factory):
    """The files of an evaluated run, by name, with one gallery in its results and one curve: a
    report takes 25 ms for each."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        argv = ["--config_file", trained / "configs.yaml", "--root_dir", mini_root]
        run(test_entry.main, monkeypatch, *argv, "--device", "cpu")
    folder = tmp_path_factory.mktemp("evaluated")
    with SummaryWriter(folder, filename_suffix=EVENTS.format(1)) as writer:
        for epoch in (1, 2):
            writer.add_scalar("loss/total", 1 / epoch, epoch)
    for path in trained.iterdir():
        if path.is_file() and not path.name.startswith(("lock", "x.pth", "events")):
            (folder / path.name).write_bytes(path.read_bytes())
    results = json.loads((folder / "test_results.json").read_text())
    galleries = results["splits"]["test"]["galleries"]
    results["splits"]["test"]["galleries"] = {"aerial": galleries["aerial"]}
    (folder / "test_results.json").write_text(json.dumps(results))
    _draw_report(folder)  # loads Matplotlib
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("evaluated")
@fuzz
@given(data=st.data())
def test_run_folders(request, data):
    """run folders with links, pipes and unusual content"""
    files = request.getfixturevalue("evaluated")
    with tempfile.TemporaryDirectory() as parent:
        folder, intact, outside = (Path(parent, name) for name in ("run", "intact", "outside"))
        for each in (folder, intact, outside):
            each.mkdir()
            for name, content in files.items() if each != outside else ():
                (each / name).write_bytes(content)
        for name in sorted(data.draw(st.sets(st.sampled_from(RUN_FILES), min_size=1, max_size=2))):
            if name == "events":
                name = next(file for file in files if file.startswith("events"))
            _replace(data.draw, folder / name, outside)
        before = {path.name: path.read_bytes() for path in outside.iterdir()}
        _use_run(folder, intact)
        assert before == {path.name: path.read_bytes() for path in outside.iterdir()}


def _replace(draw, path: Path, outside: Path) -> None:
    """Replace a file of a run by a link, a pipe, a folder or other content."""
    original = path.read_bytes() if path.is_file() else b""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    how = draw(st.sampled_from(["link", "dangling", "pipe", "folder", "bytes", "tree", "tree"]))
    if how == "link":
        (outside / path.name).write_bytes(original)
        path.symlink_to(outside / path.name)
    elif how == "dangling":
        path.symlink_to(outside / f"no {path.name}")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "bytes" or not original:
        path.write_bytes(corrupted(draw, original))
    elif path.suffix == ".yaml":
        tree = changed(draw, yaml.safe_load(original))
        path.write_bytes(yaml.dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"))
    elif path.suffix == ".json":
        path.write_text(json.dumps(changed(draw, json.loads(original))))
    elif path.suffix == ".npz":
        path.write_bytes(_npz(draw, original))
    elif path.name.startswith("events"):
        curve = draw(st.lists(st.tuples(st.integers(-1, 5), st.floats()), max_size=6))
        with SummaryWriter(path.parent, filename_suffix=".more") as writer:
            for step, value in curve:
                writer.add_scalar(
                    draw(st.sampled_from(["loss/total", "lr", "\x1b[2J<b>"])), value, step
                )
        path.write_bytes(original)
    else:
        path.write_bytes(original)


def _npz(draw, original: bytes) -> bytes:
    """The archive with one array replaced, removed or corrupted."""
    with np.load(io.BytesIO(original)) as archive:
        arrays = dict(archive)
    name = draw(st.sampled_from(sorted(arrays)))
    how = draw(st.sampled_from(["remove", "type", "shape", "empty", "nan", "bytes"]))
    if how == "remove":
        del arrays[name]
    elif how != "bytes":
        arrays[name] = {
            "type": lambda: arrays[name].astype(draw(st.sampled_from(["U8", "c16", "bool", "S3"]))),
            "shape": lambda: np.zeros(draw(st.sampled_from([(), (3,), (2, 2), (0,)]))),
            "empty": lambda: np.zeros(0), "nan": lambda: np.full(arrays[name].shape, np.nan),
        }[how]()  # fmt: skip
    held = io.BytesIO()
    np.savez_compressed(held, **arrays)
    return corrupted(draw, held.getvalue()) if how == "bytes" else held.getvalue()


def _draw_report(*folders: Path) -> None:
    args = argparse.Namespace(queries=0, root_dir="", device="cpu", attributes_file="")
    report.report([report.read_run(folder, "red") for folder in folders], args).encode()


def _use_run(folder: Path, intact: Path) -> None:
    """Resume, evaluate, report and compare a run."""

    def resume_run() -> None:
        argv = ["--resume", "--resume_ckpt_file", str(folder / "last.pth"), "--device", "cpu"]
        parse_options(argv)
        os.close(lock(folder))
        remove_unfinished(folder)
        setup_logger(folder / "train_log.txt").info("resumed")
        read_state(folder / "last.pth")

    try:
        unless_refused(resume_run)
    finally:
        setup_logger()
    unless_refused(lambda: load_checkpoint(parse_test_options(["--config_file", str(folder / "configs.yaml")])[1]))  # fmt: skip
    unless_refused(lambda: _draw_report(folder, intact))
    unless_refused(lambda: compare({"a": [folder], "b": [intact]}, "test", "aerial", 20))
    unless_refused(lambda: write_config(folder / "configs.yaml", options()))


@fuzz
@given(data=st.data())
def test_table_files(request, data):
    """tables of reproduce.py"""
    path = request.getfixturevalue("tmp_path") / "table.yaml"
    names = st.sampled_from(sorted((ROOT / "configs/tables").glob("*.yaml")))
    tree = changed(data.draw, yaml.safe_load(data.draw(names).read_text()))
    rows = tree.get("rows") if isinstance(tree, dict) else None
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and isinstance(row.get("base"), str):
            row["base"] = str(ROOT / "configs/tables" / row["base"])
    if isinstance(tree, dict) and isinstance(tree.get("base"), str):
        tree["base"] = str(ROOT / "configs/tables" / tree["base"])
    path.write_bytes(yaml.dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"))
    table = unless_refused(lambda: read_table(str(path)))
    if table is not None:
        out = request.getfixturevalue("tmp_path") / "out"
        write_tables(table, [], {row["name"]: "left out" for row in table.rows}, out)
        assert len({row["name"] for row in table.rows}) == len(table.rows)


@given(text=st.text())
@settings(derandomize=True, database=None)
def test_text_of_others_does_not_control_the_terminal(text):
    shown = visible(text)
    assert shown == visible(shown) == visible(text, lines=True).replace("\n", r"\n")
    assert all(letter.isprintable() or unicodedata.category(letter) in ("Cf", "Cn", "Co", "Zs") for letter in shown)  # fmt: skip
    shown.encode()
