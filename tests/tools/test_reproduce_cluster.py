"""reproduce.py --cluster: with submitit's local executor, and with stand-ins for SLURM's commands."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import submitit

from tests.helpers import ROOT, run
from tests.tools.test_reproduce import ROWS, arguments, done, jobs_of, reproduce, table
from tools import _reproduce_cluster as cluster
from tools import reproduce as tool
from tools._reproduce_cluster import Submission, run_on_cluster, state_of
from utils.errors import UserError
from utils.metrics import METRICS

ONE = ["--seeds", 1, "--num_epoch", 10]  # long enough to be stopped before the end
BROKEN = {"name": "broken", "options": {"loss_names": "supkl+dot"}}
SLURM = {
    "sbatch": """
        id=$(($(ls DIR/jobs | wc -l) + 1))
        cp "$1" DIR/jobs/$id
        start $id
        echo "Submitted batch job $id" """,
    "start": """
        SLURM_JOB_ID=$1 setsid bash DIR/jobs/$1 > DIR/log.$1 2>&1 < /dev/null &
        echo $! > DIR/pid.$1""",
    "srun": """
        while [[ $1 == --* ]]; do
            case $1 in
                --output | --error) file=${2//%j/$SLURM_JOB_ID} name=${1#--} && shift
                    declare $name=${file//%t/0} ;;
            esac
            shift
        done
        exec "$@" >> $output 2>> $error""",
    "scontrol": 'echo "$@" >> DIR/requeued; start $2',
    "sacct": """
        echo "JobID|State|NodeList"
        while (($#)); do
            if [ $1 = -j ]; then
                word=COMPLETED
                kill -0 -- -$(cat DIR/pid.$2) 2> /dev/null && word=RUNNING
                echo "$2|$(cat DIR/state.$2 2> /dev/null || echo $word)|node"
            fi
            shift
        done""",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder with stand-ins for SLURM's commands, which are on PATH."""
    folder = tmp_path / "slurm"
    (folder / "jobs").mkdir(parents=True)
    for name, text in SLURM.items():
        (folder / name).write_text(f"#!/bin/bash\n{text.replace('DIR', str(folder))}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    submitit.SlurmJob.watcher.clear()
    yield folder
    for pid in folder.glob("pid.*"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Look often; leave the handlers of signals as they were."""
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(cluster, "LATE_SECONDS", 0)
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def complete(mini_root, tmp_path_factory):
    """The metrics of the row itc, without a cluster."""
    folder = tmp_path_factory.mktemp("complete")
    with pytest.MonkeyPatch.context() as monkeypatch:
        path = table.__wrapped__(folder)(ROWS[1:])
        assert reproduce(monkeypatch, path, mini_root, folder / "out", *ONE) == 0
    return metrics(folder / "out"), (folder / "out/small/table.md").read_text()


def metrics(out):
    ((_, results),) = done(out).items()
    return {name: results["paper"][name] for name in (*METRICS, "epoch")}


def wait_for(found, seconds=100):
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def saved(out):
    return list(out.glob("small/*/logs/*/*/last.pth"))


def records(out):
    return list(out.glob("small/*/submission.json"))


def test_local_jobs_give_the_same_table_and_a_failed_one_is_reported(
    table,
    mini_root,
    tmp_path,
    monkeypatch,
    capsys,
    complete,
):
    out, path = tmp_path / "out", table([BROKEN, ROWS[1]])
    assert reproduce(monkeypatch, path, mini_root, out, *ONE, "--cluster", "local") == 1
    shown = capsys.readouterr().out
    assert "FAILED broken, seed 1: error: --loss_names supkl+dot: 'dot' needs match2" in shown
    assert "2 jobs: 1 not submitted, 1 running" in shown and "2 jobs: 1 done, 1 failed" in shown
    assert "itc, seed 1: done" in shown and metrics(out) == complete[0] and not records(out)
    (row,) = (line for line in complete[1].splitlines() if line.startswith("| itc"))
    lines = (out / "small/table.md").read_text().splitlines()
    assert [x.split() for x in lines if x.startswith("| itc")] == [row.split()]
    # The next call submits only the job that has failed.
    tried = []
    monkeypatch.setattr(
        cluster.Cluster, "submit", lambda self, job, gpus: tried.append(job) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        reproduce(monkeypatch, path, mini_root, out, *ONE, "--cluster", "local")
    assert [job.row for job in tried] == ["broken"]


def test_a_local_job_outlives_ctrl_c_and_a_killed_one_is_resumed(
    table,
    mini_root,
    tmp_path,
    monkeypatch,
    capsys,
    complete,
):
    out, path = tmp_path / "out", table(ROWS[1:])
    words = [*map(str, arguments(path, mini_root, out, *ONE)), "--cluster", "local"]
    with open(tmp_path / "shown", "w") as shown:
        child = subprocess.Popen(
            [sys.executable, "tools/reproduce.py", *words], cwd=ROOT, start_new_session=True,
            stdout=shown, stderr=subprocess.STDOUT,
        )  # fmt: skip
    wait_for(lambda: records(out))
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    child.wait(100)
    shown = (tmp_path / "shown").read_text()
    assert child.returncode == 130 and "1 jobs go on" in shown, shown
    (job,) = jobs_of(path, mini_root, out, device="cpu", num_epoch=10)
    assert state_of(job) == "running"
    wait_for(lambda: saved(out))
    os.killpg(child.pid, signal.SIGKILL)
    wait_for(lambda: state_of(job) == "no such process")
    assert not done(out)
    assert reproduce(monkeypatch, path, mini_root, out, *ONE, "--cluster", "local") == 0
    assert "has gone (no such process); it is submitted again" in capsys.readouterr().out
    assert "resumed after" in (job.folder / "console.txt").read_text()
    assert metrics(out) == complete[0]


def test_a_slurm_job_is_found_again_and_goes_on_after_its_warning(
    table,
    mini_root,
    tmp_path,
    monkeypatch,
    capsys,
    complete,
    slurm,
):
    out, path = tmp_path / "out", table(ROWS[1:])
    words = [*ONE, "--cluster", "slurm"]
    more = ["--partition", "gpu", "--gpus_per_job", 0, "--cpus_per_job", 2, "--time", 60,
            "--slurm", "mem=64G", "mail-user=me@here", "exclusive"]  # fmt: skip
    run(tool.main, monkeypatch, *arguments(path, mini_root, out, *words, *more, "--no_wait"))
    text = (slurm / "jobs/1").read_text()
    for line in ("partition=gpu", "time=60", "cpus-per-task=2", "ntasks-per-node=1", "requeue",
                 "signal=USR1@120", "mem=64G", "mail-user=me@here", "exclusive", "open-mode=append",
                 "job-name=itc-seed1"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text
    assert "gpus-per-node" not in text
    wait_for(lambda: saved(out))
    os.killpg(int((slurm / "pid.1").read_text()), signal.SIGUSR1)  # all processes of the step
    assert reproduce(monkeypatch, path, mini_root, out, *words) == 0
    shown = capsys.readouterr().out
    assert "0 done and 1 submitted already" in shown and "itc, seed 1: done" in shown
    assert (slurm / "requeued").read_text() == "requeue 1\n"
    assert len(list((slurm / "jobs").iterdir())) == 1 and metrics(out) == complete[0]
    console = next(out.glob("small/*/console.txt")).read_text()
    assert ": saved at epoch" in console and "resumed after" in console


def test_a_slurm_job_that_ends_without_a_result_is_reported_then_submitted_again(
    table,
    mini_root,
    tmp_path,
    monkeypatch,
    capsys,
    slurm,
):
    out, path = tmp_path / "out", table(ROWS[1:])
    (slurm / "start").write_text("#!/bin/bash\n")  # nothing runs
    (slurm / "state.1").write_text("NODE_FAIL")
    (slurm / "state.2").write_text("PENDING")
    words = [*ONE, "--cluster", "slurm"]
    assert reproduce(monkeypatch, path, mini_root, out, *words) == 1
    shown = capsys.readouterr().out
    assert "FAILED itc, seed 1: SLURM job 1 has ended without a result (NODE_FAIL; see" in shown
    assert "itc (1 failed)" in shown and not records(out)
    assert "#SBATCH --gpus-per-node=1\n" in (slurm / "jobs/1").read_text()
    run(tool.main, monkeypatch, *arguments(path, mini_root, out, *words, "--no_wait"))
    (job,) = jobs_of(path, mini_root, out, device="cpu", num_epoch=10)
    assert state_of(job) == "queued"
    # Nobody waits, and its time runs out.
    (slurm / "state.2").write_text("TIMEOUT")
    submitit.SlurmJob.watcher.clear()
    run(tool.main, monkeypatch, *arguments(path, mini_root, out, *words, "--no_wait"))
    shown = capsys.readouterr().out
    assert "SLURM job 2 has gone (TIMEOUT); it is submitted again" in shown
    assert json.loads((job.folder / "submission.json").read_text())["id"] == "3"


@pytest.mark.parametrize(
    ("word", "state"),
    [("PENDING", "queued"), ("REQUEUED", "queued"), ("UNKNOWN", "queued"), ("RUNNING", "running"),
     ("CANCELLED by 7", "CANCELLED"), ("OUT_OF_MEMORY", "OUT_OF_MEMORY")],
)  # fmt: skip
def test_the_state_of_a_job_follows_from_slurm_and_its_files(
    word,
    state,
    table,
    mini_root,
    tmp_path,
    monkeypatch,
):
    (job,) = jobs_of(table(ROWS[1:]), mini_root, tmp_path)
    job.folder.mkdir(parents=True)
    record = job.folder / "submission.json"
    record.write_text(json.dumps({"cluster": "slurm", "id": "5", "gpus": ""}))
    monkeypatch.setattr(submitit.SlurmJob.watcher, "get_state", lambda job_id: word)
    assert state_of(job) == state
    (job.folder / "error.txt").write_text("error: x")
    assert state_of(job) == "failed"
    record.write_text(json.dumps({"cluster": "slurm", "id": "5 --x", "gpus": ""}))
    with pytest.raises(UserError, match="submission.json: corrupted; delete it"):
        run_on_cluster([job], None)


def test_a_job_of_two_processes_reports_the_error_of_train_py(table, mini_root, tmp_path):
    (job,) = jobs_of(table([BROKEN]), mini_root, tmp_path, device="cpu")
    Submission(job, "", 2)()
    error = (job.folder / "error.txt").read_text()
    assert (
        error.startswith("error: --loss_names supkl+dot: 'dot' needs match2") and "\n" not in error
    )


def test_local_jobs_share_the_gpus_that_are_given(table, mini_root, tmp_path):
    given = tool.EasyDict(cluster="local", gpus=["4", "5", "6", "7"], gpus_per_job=2, time=1,
                          cpus_per_job=1, slurm=[], partition=None, no_wait=False)  # fmt: skip
    jobs = jobs_of(table(ROWS), mini_root, tmp_path)
    local = cluster.Cluster(given)
    assert local.free_slot([]) == "4,5"
    for job, gpus in zip(jobs, ("4,5", "6,7"), strict=True):
        job.folder.mkdir(parents=True)
        record = {"cluster": "local", "id": "1", "gpus": gpus}
        (job.folder / "submission.json").write_text(json.dumps(record))
    assert local.free_slot(jobs[:1]) == "6,7" and local.free_slot(jobs) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("local --slurm mem=1G", "--partition, --slurm and --no_wait are for --cluster slurm"),
        ("slurm --slurm =1G", "--slurm =1G: expected name=value"),
        ("slurm --time 0", "--time 0: must be at least 1"),
        ("slurm --gpus 0", "--gpus: SLURM chooses the GPUs"),
        ("local --gpus 0 1 2 --gpus_per_job 2", "--gpus: 3 GPUs are no multiple"),
        ("slurm", "--cluster slurm: no srun here"),
        ("cloud", "invalid choice: 'cloud'"),
    ],
)
def test_wrong_options_of_a_cluster_are_refused(
    words,
    message,
    table,
    mini_root,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = arguments(table(ROWS[1:]), mini_root, tmp_path / "out", "--cluster", *words.split())
    with pytest.raises(UserError, match=message):
        run(tool.main, monkeypatch, *argv)


def test_a_job_that_sbatch_refuses_is_named(table, mini_root, tmp_path, monkeypatch, slurm):
    (slurm / "sbatch").write_text("#!/bin/bash\necho 'invalid partition: x' >&2; exit 1\n")
    argv = arguments(table(ROWS[1:]), mini_root, tmp_path / "out", "--cluster", "slurm")
    with pytest.raises(UserError, match=r"itc, seed 1: not submitted: .*invalid partition: x"):
        run(tool.main, monkeypatch, *argv)
