"""Small weight files that once took hours or all memory, or ended in a traceback."""

import io
import pickle
import resource
import time
import zipfile

import pytest
import torch

import test as test_entry
import train as train_entry
from processor.best import epoch_and_best
from tests.helpers import run
from tests.reliability.runs import train_small_run
from utils.checkpoint import load_checkpoint
from utils.errors import UserError, run_main

W = torch.zeros(2)


def shared(levels):
    """Nested lists that each hold the previous one twice: 2 ** levels items when walked."""
    value = ["x"]
    for _ in range(levels):
        value = [value, value]
    return value


def circle():
    value = {"w": W}
    value["more"] = [value]
    return value


def under_names(value, count):
    return {str(i): value for i in range(count)}


def saved(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def compressed(content) -> bytes:
    """A file of torch.save with compressed records."""
    buffer = io.BytesIO()
    old = zipfile.ZipFile(io.BytesIO(saved(content)))
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


class Module:
    """The class that the pickle of a TorchScript archive calls `__torch__.M`."""

    def __reduce__(self):
        return Module, (), self.__dict__


class _Pickler(pickle._Pickler):
    """Writes modules and tensors as TorchScript does."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_global(self, obj, name=None):
        if obj is Module:
            self.write(b"c__torch__\nM\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    dispatch[type] = save_global


class Stored:
    """A tensor of `count` float values of record `key`, with this size and stride."""

    def __init__(self, size, stride, count=4, key="0"):
        self.size, self.stride, self.count, self.key = size, stride, count, key


def torchscript(root, compression=zipfile.ZIP_STORED, record=b"\0" * 16) -> bytes:
    """An archive with this root object, whose Stored objects are tensors."""
    plain = io.BytesIO()
    pickler = _Pickler(plain, protocol=2)

    def reduced(obj):
        if isinstance(obj, Stored):
            storage = _Persistent(("storage", torch.FloatStorage, obj.key, "cpu", obj.count))
            return torch._utils._rebuild_tensor_v2, (storage, 0, obj.size, obj.stride, False, {})
        return NotImplemented

    pickler.reducer_override = reduced
    pickler.persistent_id = lambda obj: obj.saved if isinstance(obj, _Persistent) else None
    pickler.dump(root)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("x/data.pkl", plain.getvalue())
        archive.writestr("x/constants.pkl", pickle.dumps(()))
        archive.writestr("x/data/0", record)
    return buffer.getvalue()


class _Persistent:
    def __init__(self, saved):
        self.saved = saved


def module(**parts):
    value = Module()
    value.__dict__.update(parts)
    return value


def modules(levels):
    value = module(w=Stored((4,), (1,)))
    for _ in range(levels):
        value = module(a=value, b=value)
    return value


def ring():
    value = module(w=Stored((4,), (1,)))
    value.again = value
    return value


BOMBS = {
    "1 KB: 30 nested lists that each hold the previous one twice": (
        lambda: saved({"model": {"w": W}, "x": shared(30), "sha256": "0"}), "never ended", "expands to"
    ),
    "1 KB: 40 nested lists that each hold the previous one twice, without a hash": (
        lambda: saved({"model": {"w": W}, "x": shared(40)}), "never ended when resumed", "expands to"
    ),
    "1 KB: 30 nested lists that each hold the previous one twice, torch's old format": (
        lambda: saved({"model": {"w": W}, "x": shared(30), "sha256": "0"}, _use_new_zipfile_serialization=False),
        "never ended", "expands to",
    ),
    "torch's old format: a tensor that claims 8 GB": (
        lambda: saved({"model": {"w": torch.zeros(77)}}, _use_new_zipfile_serialization=False).replace(
            b"KM", b"J\xff\xff\xff\x7f"
        ),
        "8 GB", "not readable as a checkpoint, or corrupted",
    ),
    "a dict that holds itself": (
        lambda: saved({"model": circle(), "sha256": "0"}), "RecursionError", "holds itself"
    ),
    "1.6 KB: a tensor of stride 0 that claims 4.2 GB": (
        lambda: saved({"model": {"w": torch.zeros(1).expand(2**15, 2**15)}, "sha256": "0"}),
        "4.2 GB", "expands to",
    ),
    "compressed records, 4 MB in 6 KB": (
        lambda: compressed({"model": {"w": torch.zeros(2**20)}}), "3 MB took 6 GB", "is compressed"
    ),
    "one tensor under 3,000 names": (
        lambda: saved({"model": {"w": W}, "x": under_names(torch.zeros(2**16), 3000), "sha256": "0"}),
        "hashed 3,000 times", "expands to",
    ),
    "a sparse tensor": (
        lambda: saved({"model": {"w": torch.eye(3).to_sparse()}}), "traceback", "sparse, quantized or nested"
    ),
    "a sparse tensor in CSR format": (
        lambda: saved({"model": {"w": torch.eye(3).to_sparse_csr()}}), "traceback", "sparse, quantized"
    ),
    "a quantized tensor": (
        lambda: saved({"model": {"w": torch.quantize_per_tensor(W, 0.1, 0, torch.qint8)}}),
        "traceback", "sparse, quantized or nested",
    ),
    "a meta tensor": (
        lambda: saved({"model": {"w": torch.zeros(2, device="meta")}}), "traceback", "on meta without values"
    ),
    "TorchScript: 30 nested modules that each hold the previous one twice": (
        lambda: torchscript(modules(30)), "never ended", None
    ),
    "TorchScript: a module that holds itself": (lambda: torchscript(ring()), "RecursionError", None),
    "TorchScript: a list as the root": (
        lambda: torchscript([1, 2]), "TypeError", "its root is a list"
    ),
    "TorchScript: a tensor of stride 0 that claims 4.2 GB": (
        lambda: torchscript(module(w=Stored((2**15, 2**15), (0, 0)))), "4.2 GB", "expands to"
    ),
    "TorchScript: compressed records": (
        lambda: torchscript(module(w=Stored((4,), (1,))), zipfile.ZIP_DEFLATED, b"\0" * 10**8),
        "3 MB took 6 GB", "is compressed",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("tried", BOMBS)
def test_a_small_file_takes_neither_time_nor_memory(tried, tmp_path, attempt):
    make, before, message = BOMBS[tried]
    path = tmp_path / "x.pth"
    path.write_bytes(make())
    peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if message is None:  # each object is walked once
        assert list(load_checkpoint(path)["model"])
        now = "read; each module is visited once"
    else:
        with pytest.raises(UserError, match=message) as error:
            load_checkpoint(path)
        now = str(error.value)
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**20  # 1 GB
    kind = "5" if before in ("traceback", "RecursionError", "TypeError") else "4"
    attempt(kind, tried, before, now)


def test_many_names_of_small_tensors_are_accepted(tmp_path):
    """Tied weights, and an expanded vector."""
    tied = torch.zeros(1000)
    path = tmp_path / "x.pth"
    torch.save({"model": {"a": tied, "b": tied, "c": torch.zeros(1).expand(200)}}, path)
    assert list(load_checkpoint(path)["model"]) == ["a", "b", "c"]


UNUSUAL = [
    {"epoch": torch.zeros(3)}, {"epoch": "7"}, {"epoch": [1]}, {"best": [1]}, {"best": "x"},
    {"best": torch.zeros(2)}, {"best": {"split": "test"}}, {"best": {"split": 3, "epoch": 1}},
    {"best": {"split": "test", "epoch": 1, "R@1": "x"}},
    {"best": {"split": "test", "epoch": torch.zeros(2), "R@1": 1.0}}, {"data": [1]},
    {"data": {"fingerprint": {"test": 1}, "counts": {"test": [2]}}}, {"input": {"img_size": "x"}},
    {1: 2, (3, 4): torch.zeros(2), None: None},
]  # fmt: skip


@pytest.fixture(scope="module")
def source(mini_root, tmp_path_factory):
    return train_small_run(mini_root, tmp_path_factory.mktemp("unusual"))


@pytest.mark.parametrize("entries", UNUSUAL, ids=lambda entries: ascii(entries)[:60])
def test_unusual_entries_of_a_checkpoint_do_not_stop_an_evaluation(
    entries, source, tmp_path, monkeypatch, attempt
):
    content = load_checkpoint(source / "best.pth")
    torch.save({**content, **entries}, tmp_path / "best.pth")
    (tmp_path / "configs.yaml").write_bytes((source / "configs.yaml").read_bytes())
    run(test_entry.main, monkeypatch, "--config_file", tmp_path / "configs.yaml", "--device", "cpu")
    assert (tmp_path / "test_results.json").is_file() and (tmp_path / "test_queries.npz").is_file()
    if entries is UNUSUAL[0]:
        attempt("5", "epoch is a tensor", "a traceback after the evaluation", "evaluated")


def test_the_best_entry_of_a_checkpoint_is_used_only_if_it_is_complete():
    metrics = {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "mAP": 1.0, "mINP": 1.0}
    best = {**metrics, "epoch": 3, "split": "test"}
    assert epoch_and_best({"epoch": 3, "best": best}) == (3, best)
    assert epoch_and_best({"best": {"epoch": 3, "split": "last"}}) == (
        None,
        {"epoch": 3, "split": "last"},
    )
    assert epoch_and_best({"epoch": True, "best": {**best, "mAP": "1"}}) == (None, {})
    assert epoch_and_best({"best": {"epoch": 3, "split": "test"}}) == (None, {})
    assert epoch_and_best({"best": {**best, "split": "\x1b[2J" * 9999}}) == (None, {})


BEST = [
    {"test": {"epoch": "1", "metrics": {"test": {}}}}, {"test": {"epoch": 1, "metrics": {"test": {"R@1": 3}}}},
    {"test": {"epoch": 1, "metrics": {}}}, {"test": 1}, {3: {"epoch": 1, "metrics": {}}},
]  # fmt: skip


@pytest.mark.parametrize("best", BEST, ids=lambda best: ascii(best)[:60])
def test_unusual_best_entries_are_refused_before_training(
    best, source, tmp_path, monkeypatch, capsys
):
    content = load_checkpoint(source / "last.pth")
    torch.save({**content, "best": best}, tmp_path / "last.pth")
    (tmp_path / "configs.yaml").write_bytes((source / "configs.yaml").read_bytes())
    argv = ["--resume", "--resume_ckpt_file", tmp_path / "last.pth", "--num_epoch", 2]
    with pytest.raises(SystemExit):
        run(lambda: run_main(train_entry.main), monkeypatch, *argv)
    assert "does not fit these options" in capsys.readouterr().err
