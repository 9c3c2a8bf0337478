import errno
import os
import pickle
import warnings

import pytest
import torch

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError, run_main
from utils.files import write_atomically
from utils.runs import new_run_dir


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path):
    target = tmp_path / "made_by_the_file"
    for path, save in (
        (tmp_path / "zip.pth", lambda p: torch.save({"model": Malicious(str(target))}, p)),
        (tmp_path / "plain.pth", lambda p: p.write_bytes(pickle.dumps(Malicious(str(target))))),
    ):
        save(path)
        with warnings.catch_warnings(), pytest.raises(UserError) as error:
            warnings.simplefilter("error")
            load_checkpoint(path)
        assert str(error.value).startswith(f"{path}: refused") and "\n" not in str(error.value)
    assert not target.exists()


@pytest.mark.parametrize("keep", [0, 10, 900, -20])
def test_a_truncated_checkpoint_is_refused(keep, tmp_path):
    path = tmp_path / "cut.pth"
    save_checkpoint(path, {"model": {"w": torch.randn(100)}})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{path}: .*corrupted"):
        load_checkpoint(path)


def test_a_checkpoint_with_a_wrong_hash_is_refused(tmp_path):
    path = tmp_path / "corrupted.pth"
    save_checkpoint(path, {"model": {"w": torch.zeros(3)}})
    content = torch.load(path, weights_only=True)
    content["model"]["w"][1] = 1
    torch.save(content, path)
    with pytest.raises(UserError, match="corrupted: its content does not match the hash"):
        load_checkpoint(path)


def test_a_missing_file_and_a_file_without_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_checkpoint(tmp_path / "none.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match=r"no weights in it; it holds epoch \(int\)"):
        load_checkpoint(tmp_path / "empty.pth")


def test_a_full_disk_leaves_the_previous_file_complete_and_no_other_files(tmp_path):
    path = tmp_path / "best.pth"
    save_checkpoint(path, {"model": {"w": torch.ones(1)}})

    def fail(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="best.pth: could not be written: No space left"):
        write_atomically(path, fail)
    assert load_checkpoint(path)["model"]["w"].item() == 1
    assert os.listdir(tmp_path) == ["best.pth"]


def test_runs_that_start_in_the_same_second_get_different_folders(tmp_path):
    folders = {new_run_dir(str(tmp_path), "X", "run") for _ in range(5)}
    assert len(folders) == 5 and all(folder.is_dir() for folder in folders)


def test_user_errors_become_one_line_and_status_2(capsys):
    def main():
        raise UserError("a.jpg:\n broken")

    with pytest.raises(SystemExit) as leave:
        run_main(main)
    assert leave.value.code == 2 and capsys.readouterr().err == "error: a.jpg:\\n broken\n"


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_files_get_the_mode_of_the_users_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a", lambda file: file.write(b"x"))
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask
    finally:
        os.umask(before)
