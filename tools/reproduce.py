"""Train and evaluate the rows of a table, each with several seeds, and print the table.

    python tools/reproduce.py --table main --root_dir path_to_dataset/TBAGPR --seeds 1 2 3
    python tools/reproduce.py --table mini --root_dir data/mini-TBAGPR --seeds 1 2

A table is a file in configs/tables/ (or any path): rows of options over a base preset, with the
published metrics. Each row and seed is a job with its own folder in --output_dir. The folder's name
has a hash of the data and of all options that change a metric. So finished jobs are skipped,
interrupted ones resume from their last checkpoint, and other data or options make a new job. The
folder records which code the job ran with. If that code differs from the present code, a line says
so, and --strict trains the job again. A job that fails is reported, and the others continue. The
table is printed and written as Markdown, LaTeX and CSV. With --cluster, submitit runs the jobs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

from easydict import EasyDict

from tools._reproduce_cluster import Cluster, add_cluster_options, run_on_cluster
from tools._reproduce_jobs import check_data, code_version, make_jobs, mark_other_code
from tools._reproduce_output import plan, write_tables
from tools._reproduce_runner import cpu_slots, gpu_slots, run_jobs
from tools._reproduce_table import TABLES, read_table
from utils.command_line import parse_given
from utils.console import say
from utils.errors import UserError, run_main
from utils.files import expand
from utils.options import MAY_DIFFER, OPTIONS, SAME_RESULTS
from utils.text import visible

# Options of train.py that this command takes too: not those that say what to train and where files
# are. The first ones make other jobs; the rest change no metric.
OTHER_JOBS = ("num_epoch", "precision", "val_dataset")
SAME_JOBS = tuple(
    name
    for name in (*MAY_DIFFER, *SAME_RESULTS)
    if name not in ("name", "output_dir", "root_dir", "finetune", "attributes_file", "resume",
                    "resume_ckpt_file")
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(sorted(p.stem for p in TABLES.glob("*.yaml")))
    add = parser.add_argument_group("Tables").add_argument
    add("--table", required=True, type=expand, help=f"{names}, or a YAML file")
    add("--root_dir", required=True, type=expand, help="folder that holds the data set")
    add("--rows", nargs="+", default=[], metavar="NAME",
        help="train only these; the other rows have what is done (default: all)")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[1, 2, 3],
        help="train each row with each seed (default: 1 2 3)")  # fmt: skip
    add("--output_dir", default="logs/reproduce", type=expand,
        help="receives all jobs (default: logs/reproduce)")  # fmt: skip
    add("--mllm4text", default="", type=expand,
        help="checkpoint of MLLM4Text-ReID, for the rows that start from it")  # fmt: skip
    add("--ham", default="", type=expand,
        help="checkpoint of HAM, for the rows that start from it")  # fmt: skip
    add("--gpus", nargs="+", default=[], help="run one job at a time on each of these")
    add("--jobs", type=int, default=1, metavar="INT",
        help="without --gpus: jobs at a time, which share the cores (default: 1)")  # fmt: skip
    add("--strict", action="store_true", default=False,
        help="train jobs again that ran with other code")  # fmt: skip
    add("--dry_run", action="store_true", default=False,
        help="only list the jobs, with estimated hours")  # fmt: skip
    add_cluster_options(parser)


def main() -> None:
    options, own = parse_given(
        (*OTHER_JOBS, *SAME_JOBS),
        "Train and evaluate the rows of a table, each with several seeds, and print the table. "
        "The rows set all options of train.py that the command line does not.",
        add_options,
        defaults=False,
    )
    given = EasyDict(own)
    given.seeds = [OPTIONS["seed"].coerce_one(seed, "--seeds") for seed in given.seeds]
    if len(set(given.seeds)) < len(given.seeds):
        seeds = " ".join(map(str, given.seeds))
        raise UserError(f"--seeds {seeds}: a seed twice is not a second sample; give each once")
    if given.jobs < 1:
        raise UserError(f"--jobs {given.jobs}: must be at least 1")
    if given.jobs > 1 and (given.gpus or given.cluster):
        raise UserError("--jobs: the number of jobs at a time follows from --gpus or --cluster")
    cluster = Cluster(given) if given.cluster else None
    table = read_table(given.table)
    changed = [f"{name} {options[name]}" for name in OTHER_JOBS if name in options]
    if changed:  # the title must not hide that these jobs are other ones
        table.title += f" (but {', '.join(changed)})"
    jobs, left_out = make_jobs(table, given, options)
    code = code_version()
    if note := mark_other_code(jobs, code, given.strict):
        say(visible(note))
    if note := check_data(jobs, all_needed=given.dry_run):
        say(visible(f"warning: jobs without their data will fail: {note}"))
    if given.dry_run:
        say(plan(jobs, left_out))
        return
    if cluster is None:
        run_jobs(jobs, gpu_slots(given.gpus) or cpu_slots(given.jobs), code)
    elif not run_on_cluster(jobs, cluster):
        return
    failed = [job for job in jobs if job.error]
    try:
        write_tables(table, jobs, left_out, Path(given.output_dir, table.name))
    finally:
        for job in failed:
            say(visible(f"FAILED {job.label}: {job.error}"))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_main(main)
