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
