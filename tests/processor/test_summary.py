import test as test_entry
import train as train_entry
from tests.datasets.test_tbagpr import TRAIN, edit
from tests.helpers import run
from tests.reliability.runs import flags, folder_of


def test_the_log_has_the_readers_warnings(mini_copy, tmp_path, monkeypatch):
    edit(mini_copy, TRAIN, lambda rows: rows + rows[:2])
    values = {"num_epoch": 1, "warmup_epochs": 0, "text_length": 12, "loss_names": "itc"}
    run(train_entry.main, monkeypatch, *flags(mini_copy, tmp_path, **values))
    lines = (folder_of(tmp_path) / "train_log.txt").read_text().splitlines()
    assert [x.split("  ", 1)[1] for x in lines if "warning" in x] == [
        f"warning: repeated: 2 samples of train ({TRAIN}, sample 8 repeats {TRAIN}, sample 0)"
    ]


def test_noise_is_told_by_the_training_alone_and_as_no_warning(
    mini_root, tmp_path, monkeypatch, capsys
):
    """The evaluation knows it all the same, else the training data would be other ones."""
    values = {"num_epoch": 1, "warmup_epochs": 0, "loss_names": "itc", "noise_rate": 0.5}
    run(train_entry.main, monkeypatch, *flags(mini_root, tmp_path, **values))
    lines = (folder_of(tmp_path) / "train_log.txt").read_text().splitlines()
    (line,) = [x.split("  ", 1)[1] for x in lines if "noise_rate" in x]
    assert line.startswith("--noise_rate 0.5, --noise_seed 0: 8 of 16 training samples have")
    capsys.readouterr()
    run(test_entry.main, monkeypatch, "--config_file", folder_of(tmp_path) / "configs.yaml")
    printed = capsys.readouterr()
    shown = printed.out + printed.err
    assert "noise_rate" not in shown and "not what it was in training" not in shown
