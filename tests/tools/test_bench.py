import json
import re

import pytest
import torch

import tools.bench as tool
from model.build import build_training_model
from tests.helpers import SCRATCH, golden_batch, options, run
from tests.reliability.runs import write_start
from tools._bench_memory import smallest_card
from tools.gpu import sections_of
from utils.errors import UserError

SMALL = (
    *[str(w) for name, value in SCRATCH.items() for w in (f"--{name}", value)],
    "--img_size", "32", "16", "--batch_size", "4", "--repeat", "2", "--device", "cpu",
    "--precision", "fp32", "--num_workers", "0", "--test_batch_size", "4",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_galleries(monkeypatch):
    monkeypatch.setattr(tool, "GALLERIES", (40, 80))
    monkeypatch.setattr(tool, "QUERIES", 20)


def measure(monkeypatch, path, *more):
    words = (*SMALL, "--loss_names", "supkl+queue+match2+dot", "--json", path, *more)
    run(tool.main, monkeypatch, *words)
    return {r["what"].strip(): r for r in json.loads(path.read_text())["rows"]}


def test_every_part_is_measured_and_two_files_are_compared(
    mini_root, tmp_path, monkeypatch, capsys
):
    what = ("--what", "data", "step", "encode", "rank", "--root_dir", mini_root)
    new = measure(monkeypatch, tmp_path / "new.json", *what)
    assert all(r["median_ms"] > 0 for r in new.values())
    for name in ("step", "image encoder, forward", "text encoder, forward", "losses, forward",
                 "backward, whole", "optimizer", "encode 4 images", "encode 4 captions",
                 "rank 20 x 40", "rank 20 x 80", "data, 0 processes"):  # fmt: skip
        assert name in new
    old = measure(monkeypatch, tmp_path / "old.json", "--plain", "--what", "step")
    # 77 tokens everywhere are more work than texts trimmed to the longest of the batch.
    assert old["step"]["tflop"] > new["step"]["tflop"] > 0
    capsys.readouterr()
    run(tool.main, monkeypatch, "--compare", tmp_path / "old.json", tmp_path / "new.json")
    shown = capsys.readouterr().out
    assert "times faster" in shown and "| step" in shown


def test_a_step_of_lora_has_less_work_and_says_what_it_trains(tmp_path, monkeypatch, capsys):
    full = measure(monkeypatch, tmp_path / "full.json", "--what", "step")
    start = write_start(tmp_path / "start.pth")
    lora = measure(monkeypatch, tmp_path / "lora.json", "--what", "step", "--lora_rank", "2",
                   "--finetune", start, "--ema", "0.9")  # fmt: skip
    assert full["step"]["trained"] == 1 and "moving average" not in full
    assert lora["step"]["tflop"] < full["step"]["tflop"] and lora["moving average"]["median_ms"] > 0
    share = f"{100 * lora['step']['trained']:.2f} % of the weights are trained"
    assert lora["step"]["trained"] < 0.01 and share in capsys.readouterr().out


@pytest.mark.parametrize("fusion", ["dot", "cat"])
def test_the_plain_step_computes_the_same_losses_and_gradients(fusion, clip_file):
    """So its time can be compared: it is the same step, without the optimisations."""
    names = ["supkl", "queue", "match2", fusion]
    args = options(pretrain_choice=str(clip_file), loss_names="+".join(names))
    results = []
    for plain in (True, False):
        model = build_training_model(args, names, num_classes=0)
        batch = golden_batch()
        losses = tool.plain_losses(model, batch) if plain else model(batch)
        sum(losses.values()).backward()
        results.append((losses, {n: p.grad for n, p in model.named_parameters()}))
    for plain, default in zip(*results, strict=True):
        for name, value in plain.items():
            if value is not None:
                torch.testing.assert_close(default[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_step_is_measured_until_its_times_are_stable(monkeypatch):
    def measured(*lengths):
        """The measured times of steps that take these seconds; the last one repeats."""
        now, steps = [0.0], iter(lengths)

        def step():
            now[0] += next(steps, lengths[-1])

        monkeypatch.setattr(tool.time, "perf_counter", lambda: now[0])
        return tool.SteadyClock(torch.device("cpu"), 30)(step, warm_up=2)

    assert measured(4, 3, 1) == pytest.approx([1] * 5)  # warm-up does not count
    assert 5 < len(measured(0, 0, 1, 2, 1, 2, 1, 2, 1)) < 30  # until the quartiles are close
    assert len(measured(0, 0, *[0.1, 0.2] * 50)) == 30
    assert measured(90, 9, 8, 7) == [9, 8, 7]  # long steps: one warm-up, three times


@pytest.mark.parametrize(("accum_steps", "measured"), [(1, 1), (4, 2), (32, 4), (64, 8)])
def test_a_measured_step_keeps_the_size_of_the_accumulated_parts(
    accum_steps, measured, monkeypatch
):
    measured_with = []

    def step(args, *_, **__):
        measured_with.append((args.batch_size, args.accum_steps))
        yield {"median_ms": 10, "low_ms": 9, "high_ms": 12}

    monkeypatch.setattr(tool, "bench_step", step)
    args = options(**SCRATCH, batch_size=64, accum_steps=accum_steps, device="cpu")
    assert tool.measured_step(args, pairs=True) == pytest.approx((0.08, 0.072, 0.096))
    assert measured_with == [(8, measured)]


def test_a_file_of_another_kind_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match="x.json: no result of tools/bench.py"):
        run(tool.main, monkeypatch, "--compare", tmp_path / "x.json", tmp_path / "x.json")
    with pytest.raises(UserError, match="--plain measures FIRM's loops"):
        run(tool.main, monkeypatch, *SMALL, "--plain", "--loss_names", "sdm")


def test_memory_is_measured_here_and_estimated_for_cuda(tmp_path, monkeypatch, capsys):
    path = tmp_path / "memory.json"
    words = (*SMALL, "--loss_names", "supkl+queue+match2+dot", "--what", "memory", "--json", path)
    run(tool.main, monkeypatch, *words)
    shown, rows = capsys.readouterr().out, json.loads(path.read_text())["memory"]
    assert "| bf16      | --grad_checkpointing |" in shown and "batch 4 here:" in shown
    measured, *estimates = rows
    assert measured["measured_gib"] > 0 and len(estimates) == 3 * 4 * 3
    for setting in ("", "--accum_steps 4", "both"):
        peaks = [
            r["peak_gib"] for r in estimates if (r["precision"], r["setting"]) == ("fp32", setting)
        ]
        assert peaks == sorted(peaks) and all(r["card_gib"] == 8 for r in estimates)


@pytest.mark.parametrize(("gib", "card"), [(1, 8), (7.0, 8), (7.2, 12), (22.2, 24), (79, None)])
def test_a_peak_fits_on_the_smallest_card_with_room_for_cuda_itself(gib, card):
    assert smallest_card(int(gib * 2**30)) == card


def test_the_page_of_a_card_says_which_goals_are_reached(mini_root, tmp_path, monkeypatch):
    results = {}
    for name, what in {
        "default": ("--what", "step", "memory"),
        "plain": ("--what", "step", "--plain"),
        "data": ("--what", "data", "--root_dir", mini_root),
    }.items():
        measure(monkeypatch, tmp_path / name, *what)
        results[name] = json.loads((tmp_path / name).read_text())
    step = next(r for r in results["default"]["rows"] if r["what"] == "step")
    step["utilisation"], step["memory_mib"] = 0.5, 13 * 1024
    goals, times, memory = sections_of(results)
    assert re.search(r"matrix peak +\| +50 % \| +45 % or more \| +yes", goals)
    assert re.search(r"peak memory, GiB +\| +13.0 \| +under 12 \| +no", goals)
    assert re.search(r"\| plain +\|", times) and "fits on" in memory


def test_indexing_is_compared_with_encoding_alone(tmp_path, monkeypatch):
    rows = measure(monkeypatch, tmp_path / "gallery.json", "--what", "gallery")
    assert set(rows) == {"encode 8 images", "index 8 JPEGs, 0 processes"}
    alone, indexed = rows.values()
    assert indexed["share"] == pytest.approx(indexed["per_second"] / alone["per_second"])


def test_a_search_is_measured_with_its_recall(tmp_path, monkeypatch, capsys):
    pytest.importorskip("faiss")
    monkeypatch.setattr("tools._bench_search.PERSONS", 2_000)
    monkeypatch.setattr("tools._bench_search.ADDED", 10)
    rows = measure(monkeypatch, tmp_path / "new.json", "--what", "search")
    assert rows["search, by the index"]["recall"] >= 0.9
    assert {name for name in rows if "exact" in name} == {
        "search, exact", "search, exact, 1 % by a filter", "search, exact, kept in memory"
    }  # fmt: skip
    assert "open the index with 10 new persons" in rows and "recall@50 " in capsys.readouterr().out


def test_the_methods_are_compared_with_infonce(monkeypatch, tmp_path):
    monkeypatch.setattr("tools._bench_methods.METHODS", ("tal+tse", "cda+fta"))
    file = tmp_path / "x.json"
    run(tool.main, monkeypatch, *SMALL, "--what", "methods", "--cmt_depth", 1, "--json", file)
    rows = json.loads(file.read_text())["rows"]
    assert [row["what"] for row in rows] == ["tal+tse", "cda+fta", "itc"]
    assert all(row["share"] > 0 for row in rows) and rows[-1]["share"] == 1
