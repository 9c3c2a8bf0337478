"""From the command line to the results: short trainings, their evaluation, and mistakes.

A good place to start reading: these tests use the project as its users do.
"""

import json
import re

import pytest
import torch
import yaml

import test as test_entry
import train as train_entry
from processor.history import read_history
from processor.results import read_queries
from processor.state import PARTS
from tests.helpers import SCRATCH, golden_clip, run
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.metrics import METRICS, SHOWN

RECIPE = "supkl+queue+match2+dot"


def flags(root, out, **overrides):
    values = {
        "root_dir": root, "output_dir": out, "loss_names": RECIPE, "img_size": (32, 16),
        "batch_size": 6, "test_batch_size": 8, "num_epoch": 3, "warmup_epochs": 1, "lr": 1e-3,
        "num_workers": 0, "device": "cpu", "precision": "fp32", **SCRATCH, **overrides,
    }  # fmt: skip
    argv = []
    for name, value in values.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not None:
            many = isinstance(value, (tuple, list))
            argv += [f"--{name}", *(map(str, value) if many else [str(value)])]
    return argv


def train(monkeypatch, root, out, **overrides):
    """Train and return the run's folder."""
    run(train_entry.main, monkeypatch, *flags(root, out, **overrides))
    if out is None:  # a resumed run stays in its folder
        return overrides["resume_ckpt_file"].parent
    return max(out.glob("*/*/"), key=lambda p: p.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def finished(mini_root, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return train(monkeypatch, mini_root, tmp_path_factory.mktemp("logs"))


def test_a_run_leaves_what_the_documentation_says(finished):
    names = {p.name for p in finished.iterdir()}
    assert {"train_log.txt", "configs.yaml", "history.jsonl", "best.pth", "last.pth"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    log = (finished / "train_log.txt").read_text()
    assert len(re.findall(r"epoch \d/3  loss .*supkl .*match2 .*test: R@1", log)) == 3
    assert "best.pth is chosen by R@1 on the test split: this is the paper's protocol" in log
    rows = read_history(finished)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert f"loss {rows[2]['loss/total']:.3f} (supkl {rows[2]['loss/supkl']:.3f}" in log
    assert f"test: R@1 {rows[2]['test']['R@1']:.2f}" in log and rows[2]["lr"] > 0
    for name in ("best", "last"):
        assert list(load_checkpoint(finished / f"{name}.pth")["data"]["counts"]) == ["train", "val", "test"]  # fmt: skip
    best, last = (load_checkpoint(finished / f"{n}.pth") for n in ("best", "last"))
    assert last["epoch"] == 3 and best["epoch"] == best["best"]["epoch"]
    assert set(last) == {*PARTS, "epoch", "batches", "input", "data"}
    assert last["input"] == best["input"] == {"img_size": [32, 16], "stride_size": 16}
    assert last["best"]["test"]["epoch"] == best["epoch"]
    assert (last["model"]["queue.pids"] >= 0).any()


def test_evaluation_repeats_the_best_epochs_metrics_on_every_gallery(finished, monkeypatch, capsys):
    run(test_entry.main, monkeypatch, "--config_file", finished / "configs.yaml")
    shown = capsys.readouterr().out
    assert re.search(r"training at epoch \d: .*: equal", shown)
    assert re.search(r"\| gallery .*\| +mINP \| +RSum \|", shown)
    results = json.loads((finished / "test_results.json").read_text())
    galleries = results["splits"]["test"]["galleries"]
    expected = ["aerial", "ground", "aerial + ground", "aerial, AG-ReID", "aerial, G2APS-AG"]
    assert list(galleries) == expected
    stored = load_checkpoint(finished / "best.pth")["best"]
    assert all(galleries["aerial"][name] == stored[name] for name in METRICS)
    # Every metric is the mean over the captions in the archive.
    for name, metrics in galleries.items():
        ranked = read_queries(finished / "test_queries.npz", "test", name)
        means = ranked.percentages()[~ranked.rows_Q3[:, 0].isnan()].mean(dim=0).tolist()
        assert means == pytest.approx([metrics[k] for k in SHOWN])
    accuracy = results["splits"]["test"]["attribute_accuracy"]
    assert len(accuracy) == 7
    assert all(0 <= row[view] <= 100 for row in accuracy.values() for view in ("aerial", "ground"))


def test_intervals_contain_their_metrics_and_are_saved(finished, monkeypatch, capsys):
    run(test_entry.main, monkeypatch, "--config_file", finished / "configs.yaml", "--bootstrap", 200)  # fmt: skip
    assert (
        "95 % confidence intervals, 200 bootstrap samples of identities" in capsys.readouterr().out
    )
    split = json.loads((finished / "test_results.json").read_text())["splits"]["test"]
    low, high = split["intervals"]["aerial"]["mAP"]
    assert 0 <= low <= split["galleries"]["aerial"]["mAP"] <= high <= 100


def test_the_clean_protocol_reports_both_splits(mini_root, tmp_path, monkeypatch, capsys):
    folder = train(monkeypatch, mini_root, tmp_path, val_dataset="val", num_epoch=2)
    run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml")
    shown = capsys.readouterr().out
    assert "val split, which chose this checkpoint" in shown and ": equal" in shown
    message = "test split, which had no part in choosing this checkpoint: val shares no image and no known person with it"
    assert message in shown
    results = json.loads((folder / "test_results.json").read_text())
    assert results["protocol"]["overlap"] == {"images": 0, "people": 0}
    assert results["data"]["fingerprint"].keys() == {"train", "val", "test"}
    assert results["data"]["changed"] == {}


def test_a_val_that_is_not_disjoint_from_test_is_reported_with_counts(
    like_real, tmp_path, monkeypatch, capsys
):
    """Half of its images and all of its people are also in test."""
    folder = train(monkeypatch, like_real, tmp_path, val_dataset="val", num_epoch=1, warmup_epochs=0)  # fmt: skip
    overlap = "val shares 8 of its 16 images and 4 of its 4 people with test"
    log = (folder / "train_log.txt").read_text()
    assert (
        f"best.pth is chosen by R@1 on the val split, which is not disjoint from test: {overlap}"
        in log
    )
    run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml")
    shown = capsys.readouterr().out
    assert f"test split, which had a part in choosing this checkpoint: {overlap}" in shown
    assert not re.search("unseen|clean|no part", log + shown)
    protocol = json.loads((folder / "test_results.json").read_text())["protocol"]
    assert protocol["chosen_on"] == "val" and protocol["overlap"] == {"images": 8, "people": 4}
    assert overlap in protocol["text"]


def test_best_pth_is_of_the_last_epoch_if_no_split_selects_it(
    mini_root, tmp_path, monkeypatch, capsys
):
    folder = train(monkeypatch, mini_root, tmp_path, val_dataset="last", num_epoch=2)
    shown = capsys.readouterr().out
    assert "best.pth is the last epoch's: no split chooses it" in shown
    assert not re.search(r"R@1 \d", shown)
    assert re.search(r"\| +2 +\| no split: the last epoch \|", shown)
    best, last = (load_checkpoint(folder / f"{n}.pth") for n in ("best", "last"))
    assert all(torch.equal(v, last["model"][n]) for n, v in best["model"].items())
    (folder / "best.pth").unlink()  # as if killed before it was written
    train(monkeypatch, None, None, resume=True, resume_ckpt_file=folder / "last.pth")
    run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml")
    shown = capsys.readouterr().out
    assert (
        "best.pth is missing or corrupted; written with the weights of this save, epoch 2" in shown
    )
    assert "test split, which had no part in choosing this checkpoint\n" in shown
    results = json.loads((folder / "test_results.json").read_text())
    assert results["protocol"]["chosen_on"] == "last" and results["protocol"]["overlap"] is None
    assert list(results["splits"]) == ["test"]


def test_evaluation_reports_data_that_differs_from_training(
    mini_copy, tmp_path, monkeypatch, capsys
):
    """Held-out people are sampled again. If that is impossible, only test is evaluated."""
    few = {"num_epoch": 1, "warmup_epochs": 0, "loss_names": "itc"}
    folder = train(monkeypatch, mini_copy, tmp_path / "logs", val_dataset="heldout", **few)
    argv = ["--config_file", folder / "configs.yaml"]
    moved = mini_copy.rename(tmp_path / "moved")
    run(test_entry.main, monkeypatch, *argv, "--root_dir", moved)
    shown = capsys.readouterr().out
    assert "heldout split, which chose this checkpoint" in shown and ": equal" in shown
    assert "not what it was" not in shown
    for source, name in (("AG-ReID", "agtext"), ("G2APS-AG", "g2aps")):
        file = moved / source / f"{name}_train.json"
        rows = json.loads(file.read_text())
        file.write_text(json.dumps([row for row in rows if row[0] == 0]))
    run(test_entry.main, monkeypatch, *argv, "--root_dir", moved)
    shown = capsys.readouterr().out
    assert "AG-ReID has 1 training identities of 1 people" in shown
    assert (
        "train is not what it was in training: 6 identities, 12 captions, 24 images then" in shown
    )
    assert "heldout is not what it was in training: 2 identities" in shown
    assert "may have had a part in choosing this checkpoint: heldout, which chose it" in shown
    results = json.loads((folder / "test_results.json").read_text())
    assert list(results["splits"]) == ["test"] and results["protocol"]["overlap"] is None
    assert set(results["data"]["changed"]) == {"train", "heldout"}


def test_both_protocols_are_tracked_in_one_run(mini_root, tmp_path, monkeypatch, capsys):
    """Heldout selects best.pth, test selects best_test.pth; the log has the test metrics of both."""
    folder = train(monkeypatch, mini_root, tmp_path, val_dataset="both", num_epoch=4)
    lines = (folder / "train_log.txt").read_text().splitlines()
    epochs = [dict(re.findall(r"(heldout|test): R@1 ([\d.]+)", x)) for x in lines if "epoch" in x and "test:" in x]  # fmt: skip
    assert len(epochs) == 4 and all(set(e) == {"heldout", "test"} for e in epochs)
    capsys.readouterr()
    for split, file in (("heldout", "best.pth"), ("test", "best_test.pth")):
        scores = [float(e[split]) for e in epochs]
        checkpoint = load_checkpoint(folder / file)
        assert checkpoint["epoch"] == 1 + scores.index(
            max(scores)
        )  # the first epoch of the best score
        row = next(x for x in lines if re.search(rf"\| +{split} +\| +test +\|", x))
        assert f" {epochs[checkpoint['epoch'] - 1]['test']} " in row
        run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml", "--checkpoint", folder / file)  # fmt: skip
        shown = capsys.readouterr().out
        assert f"{split} split, which chose this checkpoint" in shown and ": equal" in shown


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    finished, mini_root, tmp_path, monkeypatch
):
    again = train(monkeypatch, mini_root, tmp_path / "a")
    other = train(monkeypatch, mini_root, tmp_path / "b", seed=2)
    weights = [load_checkpoint(f / "last.pth")["model"] for f in (finished, again, other)]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    name = "base_model.text_projection"
    assert not torch.equal(weights[0][name], weights[2][name])


def test_a_run_resumes_with_its_own_options_and_with_more_epochs(
    mini_root, tmp_path, monkeypatch, capsys
):
    """`--resume --resume_ckpt_file RUN/last.pth` is enough. The new schedule sets learning rates."""
    folder = train(monkeypatch, mini_root, tmp_path, num_epoch=2)
    run(train_entry.main, monkeypatch, "--resume", "--resume_ckpt_file", folder / "last.pth", "--num_epoch", 4)  # fmt: skip
    assert yaml.safe_load((folder / "configs.yaml").read_text())["num_epoch"] == 4
    longer = train(monkeypatch, mini_root, tmp_path / "longer", num_epoch=4)

    def rates(folder):
        log = (folder / "train_log.txt").read_text()
        return re.findall(r"epoch (\d/4)  loss .*lr ([\d.e-]+)", log)

    assert rates(folder) == rates(longer)[2:]


def test_what_cannot_be_resumed_is_refused_and_leaves_nothing(
    finished, mini_root, tmp_path, monkeypatch
):
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk/no.pth").write_text("no checkpoint")
    log = (finished / "train_log.txt").read_text()
    for path, message in (
        (tmp_path / "none/last.pth", "last.pth: no such file"),
        (tmp_path / "junk/no.pth", "no.pth: not a checkpoint: not a file of torch.save"),
        (finished / "lst.pth", "lst.pth: no such file"),
        (finished / "best.pth", "cannot be resumed, it lacks optimizer, scaler"),
    ):
        with pytest.raises(UserError, match=message):
            run(train_entry.main, monkeypatch, *flags(mini_root, None), "--resume", "--resume_ckpt_file", path)  # fmt: skip
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["junk", "lock", "no.pth"]
    assert (finished / "train_log.txt").read_text() == log
    with pytest.raises(UserError, match="leave --output_dir out"):
        run(train_entry.main, monkeypatch, "--resume", "--resume_ckpt_file", finished / "last.pth", "--output_dir", tmp_path)  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        {"loss_names": "supitc+queue+match2+cat", "negatives": "random", "precision": "bf16"},
        {"loss_names": "sdm+id+mlm", "MLM": True, "cmt_depth": 1, "img_aug": True},
        {"loss_names": None, "cmt_depth": 1},  # the defaults of train.py
        {"loss_names": "itc+cmpm", "dataset_name": "AGData", "optimizer": "SGD", "stride_size": 8},
        {"loss_names": "bisdm+biitc", "sampler": "identity", "num_instance": 2, "eval_period": 2},
        {"loss_names": "tal+trl+nitc+ritc+citc+cda", "txt_aug": "rde", "precision": "bf16"},
        {"loss_names": RECIPE, "precision": "half", "lrscheduler": "step", "optimizer": "AdamW"},
        {"loss_names": "supkl", "precision": "fp16", "num_workers": 1, "log_period": 1},
        {"loss_names": "itc", "ema": 0.9, "precision": "half", "grad_checkpointing": True},
    ],
    ids=lambda overrides: f"{overrides['loss_names']},{overrides.get('precision', 'fp32')}",
)
def test_short_trainings_of_every_kind_run_and_evaluate(
    overrides, mini_root, tmp_path, monkeypatch, capsys
):
    folder = train(monkeypatch, mini_root, tmp_path, **{"num_epoch": 2, **overrides})
    run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml")
    assert re.search(r"training at epoch \d: .*: equal", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("AGSGData", {"loss_names": "sdm+id+mlm", "MLM": True, "cmt_depth": 1, "views": "a"}),
        ("AGSGData", {"loss_names": "sdm+itc+cmpm"}),
        ("AGTBPR", {"loss_names": RECIPE, "val_dataset": "heldout", "heldout": 0.3,
                    "sampler": "identity", "num_instance": 2}),
        ("G2APS", {"loss_names": "supitc+queue"}),
        ("CUHK-PEDES", {"loss_names": "sdm+id+mlm", "MLM": True, "cmt_depth": 1}),
        ("ICFG-PEDES", {"loss_names": "itc+id", "val_dataset": "heldout"}),
        ("RSTPReid", {"loss_names": "sdm", "MLM": True, "val_dataset": "val"}),
        ("AERI-PEDES", {"loss_names": "supkl+queue"}),
        ("TAG-PEDES", {"loss_names": "sdm+id", "val_dataset": "heldout", "heldout": 0.3}),
        ("custom", {"loss_names": RECIPE, "firm_attributes": ["gender", "age"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["loss_names"],
)  # fmt: skip
def test_short_trainings_on_every_data_set_run_and_evaluate(
    name, overrides, mini_root, rendered, tmp_path, monkeypatch, capsys
):
    root = mini_root if name.startswith(("AG", "G2")) else rendered(name)
    folder = train(monkeypatch, root, tmp_path, dataset_name=name, num_epoch=2, **overrides)
    run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml")
    assert re.search(r"training at epoch \d: .*: equal", capsys.readouterr().out)


def test_training_learns(mini_root, tmp_path, monkeypatch):
    """Twelve epochs on eight identities bring the loss down by a fifth or more."""
    folder = train(monkeypatch, mini_root, tmp_path, num_epoch=12, lr=2e-3, adam_eps=1e-8,
                   weight_decay=0, loss_names="itc", temperature=0.1, eval_period=12)  # fmt: skip
    losses = re.findall(r"epoch \d+/12  loss ([\d.]+)", (folder / "train_log.txt").read_text())
    assert float(losses[-1]) < 0.8 * float(losses[0])


def test_finetuning_starts_from_weights_of_this_family(
    mini_root, clip_file, tmp_path, monkeypatch, capsys
):
    """A `model` entry, `module.` prefix, half precision, another grid and other identities."""
    foreign = {f"module.base_model.{n}": v.half() for n, v in golden_clip().items()}
    foreign["module.classifier.weight"] = torch.zeros(11003, 64)
    torch.save({"model": foreign, "epoch": 3}, tmp_path / "mllm4text.pth")
    none = dict.fromkeys(SCRATCH)
    folder = train(monkeypatch, mini_root, tmp_path / "logs", finetune=tmp_path / "mllm4text.pth",
                   num_epoch=2, lr=1e-9, **{**none, "pretrain_choice": clip_file})  # fmt: skip
    log = (folder / "train_log.txt").read_text()
    assert f"the run started from {tmp_path / 'mllm4text.pth'}, whose training and" in log
    rows = dict(re.findall(r"^\| ([a-z][a-z, ]+?) +\| (\d+) +\|", log, re.MULTILINE))
    assert f"{clip_file}: assumed to be an OpenAI CLIP, with heads of 64 channels, QuickGELU" in log
    count = len(foreign) - 1
    assert rows["loaded"] == str(count - 1) and rows["resized"] == "1"
    assert rows["skipped, unknown here"] == "1"
    weights = load_checkpoint(folder / "last.pth")["model"]
    start = golden_clip()["visual.proj"].half().float()
    torch.testing.assert_close(weights["base_model.visual.proj"], start, rtol=0, atol=1e-6)


def test_the_originals_checkpoint_evaluates_as_it_is(
    mini_root, clip_file, tmp_path, monkeypatch, capsys
):
    """Its best.pth (model, optimizer, ...) is next to its configs.yaml with tuple tags."""
    from model.backbone import load_backbone

    backbone = load_backbone(str(clip_file), (96, 32))
    weights = {f"base_model.{n}": v for n, v in backbone.state_dict().items()}
    state = {"model": weights, "optimizer": {"state": {}}, "scheduler": {}, "epoch": 4}
    torch.save(state, tmp_path / "best.pth")
    (tmp_path / "configs.yaml").write_text(
        f"dataset_name: AGDataAttr\nroot_dir: {mini_root}\nimg_size: !!python/tuple\n- 96\n- 32\n"
        "stride_size: 16\nloss_names: supkl+queue\nlocal_rank: 0\nnum_workers: 0\ntraining: false\nfoo: 1\n"
    )
    run(
        test_entry.main,
        monkeypatch,
        "--config_file",
        tmp_path / "configs.yaml",
        "--precision",
        "fp32",
    )
    shown = capsys.readouterr().out
    assert "ignored, unknown here: foo" in shown and "aerial, G2APS-AG" in shown


def assert_refused(message, monkeypatch, root, out, **overrides):
    with pytest.raises(UserError, match=message):
        train(monkeypatch, root, out, **overrides)
    assert not list(out.glob("*/*")), "a run that never started leaves nothing"


def test_mistakes_are_reported_before_a_run_folder_is_made(mini_root, tmp_path, monkeypatch):
    def check(message, root=mini_root, **overrides):
        assert_refused(message, monkeypatch, root, tmp_path / "logs", **overrides)

    check("--root_dir .*nowhere: no such folder", root=tmp_path / "nowhere")
    check("unknown loss 'supkI'. Did you mean 'supkl'", loss_names="supkI+queue")
    check("'queue' needs supkl or supitc", loss_names="sdm+queue")
    check("'match2' needs exactly one of dot, cat", loss_names="supkl+match2")
    check("'match2' needs exactly one of dot, cat", loss_names="supkl+match2+dot+cat")
    check("needs attribute labels; AGData has none", dataset_name="AGData")
    check("--dataset_name TBAGPR: unknown", dataset_name="TBAGPR")
    check(
        "--min_temperature 0.05 is above --temperature 0.02",
        learn_temperature=True, min_temperature=0.05, temperature=0.02,
    )  # fmt: skip
    check(
        "nowhere.yaml: No such file or directory .--attributes_file", attributes_file="nowhere.yaml"
    )
    check("none.pth: no such file", finetune=tmp_path / "none.pth")
    if not torch.cuda.is_available():
        check("--device cuda: torch finds no usable GPU here", device="cuda")


@pytest.mark.parametrize("choice", ["RN50", "RN50@rn.pt", "RN50/yfcc15m"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--loss_names tal+tse", "'tse' needs a class token .*--pretrain_choice RN50.* leave tse"),
        ("--accum_steps 2", "--accum_steps: a ResNet"),
        ("--grad_checkpointing", "--grad_checkpointing: open_clip's ResNets do not support it"),
        ("--lora_rank 4", "--lora_rank: a ResNet has no attention"),
    ],
)
def test_what_a_resnet_cannot_do_is_refused_before_data_and_weights_are_looked_for(
    choice, words, message, tmp_path, monkeypatch
):
    """There are none; and a ViT gets as far as the data."""
    words = [*words.split(), "--root_dir", tmp_path, "--output_dir", tmp_path / "logs"]
    with pytest.raises(UserError, match=message):
        run(train_entry.main, monkeypatch, *words, "--pretrain_choice", choice)
    with pytest.raises(UserError, match="--root_dir .*AG-ReID and folder G2APS-AG are"):
        run(train_entry.main, monkeypatch, *words)


def test_a_finetuning_file_of_which_nothing_fits_is_refused(mini_root, tmp_path, monkeypatch):
    torch.save({"model": {"backbone.weight": torch.ones(3)}}, tmp_path / "x.pth")
    assert_refused("nothing fits: none of its 1 weights", monkeypatch, mini_root, tmp_path / "logs",
                   finetune=tmp_path / "x.pth")  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_stops_the_run_with_its_file_and_entry(
    workers, mini_copy, tmp_path, monkeypatch, capsys
):
    from utils.errors import run_main

    row = json.loads((mini_copy / "AG-ReID/agtext_train.json").read_text())[5]
    path = mini_copy / "AG-ReID" / "/".join(row[2])
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: train(monkeypatch, mini_copy, tmp_path / "logs", num_workers=workers))
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert message.startswith(
        f"error: {path} (AG-ReID/agtext_train.json, sample 5): the image cannot"
    )


def evaluate(monkeypatch, config, checkpoint):
    run(test_entry.main, monkeypatch, "--config_file", config, "--checkpoint", checkpoint)


def test_a_checkpoint_of_another_shape_is_refused(finished, tmp_path, monkeypatch):
    config = yaml.safe_load((finished / "configs.yaml").read_text())
    config["img_size"] = [64, 32]
    (tmp_path / "configs.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(
        UserError, match="trained on images of 32x16 at stride 16, the options say 64x32"
    ):
        evaluate(monkeypatch, tmp_path / "configs.yaml", finished / "best.pth")
    state = load_checkpoint(finished / "best.pth")
    del state["input"]  # as in checkpoints of other code
    torch.save(state, tmp_path / "best.pth")
    with pytest.raises(UserError, match="positional_embedding has the shape .*of the same run"):
        evaluate(monkeypatch, tmp_path / "configs.yaml", tmp_path / "best.pth")


def test_a_checkpoint_that_is_missing_or_of_another_kind_is_refused(
    finished, tmp_path, monkeypatch
):
    with pytest.raises(UserError, match="none.pth: no such file"):
        evaluate(monkeypatch, finished / "configs.yaml", tmp_path / "none.pth")
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="no weights named base_model"):
        evaluate(monkeypatch, finished / "configs.yaml", tmp_path / "w.pth")
