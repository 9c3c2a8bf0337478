import pickle
from pathlib import Path

import pytest
import yaml
from easydict import EasyDict

from tests.helpers import ROOT
from utils.command_line import parse_options, parse_test_options
from utils.config import read_preset, write_config
from utils.errors import UserError
from utils.option_docs import PAGE, page
from utils.option_type import Option
from utils.options import GROUPS, OPTIONS


def preset(tmp_path, text):
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_preset_and_the_preset_over_the_defaults(tmp_path):
    path = preset(tmp_path, "lr: 1e-4\nnum_epoch: 7\nimg_aug: true\n")
    args = parse_options(["--config_file", path, "--num_epoch", "9", "--no-img_aug"])
    assert (args.lr, args.num_epoch, args.img_aug, args.batch_size) == (1e-4, 9, False, 128)


def test_the_documented_command_parses():
    args = parse_options(
        [
            "--name",
            "irra",
            "--batch_size",
            "64",
            "--MLM",
            "--loss_names",
            "supkl+queue+match2+dot",
            "--dataset_name",
            "AGDataAttr",
            "--root_dir",
            "path_to_dataset/TBAGPR",
            "--num_epoch",
            "60",
        ]
    )
    assert args.MLM and args.batch_size == 64 and args.img_size == [384, 128]


def test_a_written_config_reads_back_as_the_same_run(tmp_path):
    args = parse_options(["--lr", "3e-5", "--img_size", "128", "48", "--milestones", "3", "9"])
    write_config(tmp_path / "configs.yaml", args)
    assert parse_options(["--config_file", str(tmp_path / "configs.yaml")]) == args


def test_every_shipped_preset_is_valid():
    presets = [p for p in (ROOT / "configs").glob("*.yaml") if "attributes" not in p.name]
    assert presets
    for path in presets:
        assert parse_options(["--config_file", str(path)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown option 'learning_rate'"),
        ("num_epochs: 3", "unknown option 'num_epochs'. Did you mean 'num_epoch'?"),
        ("num_epoch: many", "num_epoch takes a value of type int, got 'many'"),
        ("num_epoch: 2.5", "num_epoch takes a value of type int, got 2.5"),
        ("num_epoch: 0", "num_epoch must be at least 1, got 0"),
        ("img_aug: 1", "img_aug takes a value of type bool, got 1"),
        ("img_size: [384]", "img_size takes 2 values"),
        ("optimizer: Adan", "optimizer is 'Adan'; choose one of: Adam, AdamW, SGD"),
        ("lr: .nan", "lr must be more than 0, got nan"),
        ("? \nlr: 1", "expected lines of 'option: value'"),
        ("- lr", "expected lines of 'option: value'"),
        ("lr: [", "not readable as YAML"),
        ("x: !!python/object/apply:os.system [true]", "not readable as YAML"),
    ],
)
def test_a_bad_preset_is_refused_with_its_name_and_key(text, message, tmp_path):
    path = preset(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_preset(path)
    assert str(error.value).startswith(path) and message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--batchsize 3", "unrecognized arguments: --batchsize 3"),
        ("--num_epoch x", "--num_epoch takes a value of type int, got 'x' (--help"),
        ("--config_file nowhere.yaml", "nowhere.yaml: No such file or directory"),
        ("--vision_layers 2", "--vision_layers 2 is for --pretrain_choice scratch"),
        ("--num_epoch 5", "--warmup_epochs 5 must be less than --num_epoch 5"),
        ("--milestones 9 3", "--milestones must increase"),
        (
            "--sampler identity --batch_size 10",
            "--batch_size 10 must be a multiple of --num_instance 4",
        ),
        ("--resume --output_dir /none", "--resume: /none/ has no run 'baseline'"),
        ("--resume maybe", "resume is 'maybe'; choose one of: no, yes, auto"),
        ("--resume_ckpt_file last.pth", "--resume_ckpt_file PATH needs --resume"),
        ("--save_period 0", "save_period cannot be '0'; time between saves"),
        ("--save_period 0.0min", "save_period cannot be '0.0min'"),
        ("--save_period 5h", "or minutes as 30min"),
        ("--name a/b", "without a slash"),
        ("--lr inf", "lr is out of range, got inf"),
        ("--seed 99999999999", "seed is out of range"),
        (f"--name {'a' * 101}", "name of the run, 1 to 100 characters"),
        ("--masked_token_rate 0.95", "add up to more than 1"),
        ("--val_dataset heldout --heldout 1", "must be more than 0 and less than 1, got 1.0"),
        ("--heldout 0.2", "--heldout 0.2 is for --val_dataset heldout and both"),
        ("--val_dataset last --heldout_seed 1", "--val_dataset last holds no identities out"),
        ("--pretrain_choice scratch --vision_width 100", "multiple of 64"),
        ("--img_aug --img_pool 2", "--img_pool 2 takes the place of --img_aug; leave one"),
        ("--noise_rate 1", "--noise_rate must be at least 0 and less than 1, got 1.0"),
        ("--noise_seed 3", "--noise_seed 3 is for --noise_rate; without it no captions are"),
        ("--img_pool -1", "--img_pool must be at least 0 and at most 20, got -1"),
    ],
)
def test_invalid_options_are_refused_with_the_reason(line, message):
    with pytest.raises(UserError) as error:
        parse_options(line.split())
    assert message in str(error.value)


def test_evaluation_reads_configs_of_the_original_with_tuple_tags_and_unknown_keys(tmp_path):
    path = preset(
        tmp_path,
        "img_size: !!python/tuple\n- 384\n- 128\nmilestones: !!python/tuple\n- 20\n- 50\n"
        "local_rank: 0\nlr: 1.0e-05\ntest: false\nstride_size: 16\nfoo: 1\n",
    )
    args, checkpoint, notes = parse_test_options(["--config_file", path, "--root_dir", "there"])
    assert args.img_size == [384, 128] and args.milestones == [20, 50] and args.root_dir == "there"
    assert checkpoint == tmp_path / "best.pth"
    assert notes == [f"{path}: ignored, unknown here: foo"]


def test_evaluation_finds_options_and_checkpoint_in_the_folder_of_a_run_or_of_an_export(tmp_path):
    words = ["--config_file", str(tmp_path)]
    for place, file in (("", "configs.yaml"), ("x", "x/configs.yaml"), ("x.yaml", "x.yaml")):
        with pytest.raises(
            UserError, match=f"^{tmp_path / file}: no such file; --config_file takes"
        ):
            parse_test_options(["--config_file", str(tmp_path / place)])
    (tmp_path / "config.json").write_text('{"lr": 0.5}')
    args, checkpoint, _ = parse_test_options(words)
    assert args.lr == 0.5 and checkpoint == tmp_path / "model.safetensors"
    assert parse_test_options([*words, "--checkpoint", "x.pth"])[1] == Path("x.pth")
    (tmp_path / "configs.yaml").write_text("lr: 0.25")
    args, checkpoint, _ = parse_test_options(words)
    assert args.lr == 0.25 and checkpoint == tmp_path / "best.pth"


def test_evaluation_refuses_options_of_training(tmp_path):
    with pytest.raises(UserError, match="unrecognized arguments: --lr 1"):
        parse_test_options(["--config_file", preset(tmp_path, "lr: 1.0"), "--lr", "1"])


def test_defaults_pass_their_own_checks():
    for option in OPTIONS.values():
        assert option.coerce(option.default, "default") == option.default


def test_docs_options_md_is_what_make_docs_writes():
    assert page() == PAGE.read_text()


def test_one_row_of_the_table_is_all_that_a_new_option_needs(tmp_path, monkeypatch):
    row = Option("my_weight", float, 1.0, ge=0, help="weight of the loss mine")
    monkeypatch.setitem(GROUPS, "Losses", [*GROUPS["Losses"], row])
    monkeypatch.setitem(OPTIONS, row.name, row)
    assert parse_options([]).my_weight == 1
    assert parse_options(["--config_file", preset(tmp_path, "my_weight: 2")]).my_weight == 2
    with pytest.raises(UserError, match="my_weight must be at least 0, got -1"):
        parse_options(["--my_weight", "-1"])
    write_config(tmp_path / "configs.yaml", parse_options(["--my_weight", "3"]))
    args, _, notes = parse_test_options(["--config_file", str(tmp_path / "configs.yaml")])
    assert args.my_weight == 3 and not notes
    assert "| `--my_weight` | number, at least 0 | `1.0` | weight of the loss mine |" in page()


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for option in OPTIONS.values():
        assert f"--{option.name}" in shown
    assert "(default: 1e-05)" in shown


def test_config_is_plain_yaml(tmp_path):
    write_config(tmp_path / "c.yaml", parse_options([]))
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["img_size"] == [384, 128]


def test_a_preset_inherits_from_its_base_the_options_that_it_does_not_set(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 2e-4\nnum_epoch: 7\nname: a\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nname: b\nslack: 0.3\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/c.yaml").write_text("base: ../b.yaml\nnum_epoch: 9\n")
    values = read_preset(tmp_path / "sub/c.yaml")
    assert values == {"lr": 2e-4, "num_epoch": 9, "name": "b", "slack": 0.3}
    (tmp_path / "a.yaml").write_text("base: sub/c.yaml\n")
    with pytest.raises(UserError, match="c.yaml: is its own base, through"):
        read_preset(tmp_path / "sub/c.yaml")
    (tmp_path / "a.yaml").write_text("base: none.yaml\n")
    with pytest.raises(UserError, match="none.yaml: No such file"):
        read_preset(tmp_path / "a.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_preset_is_accepted_and_repeats_no_option_of_its_base(path):
    if path.stem == "attributes":
        return
    assert parse_options(["--config_file", str(path)])
    own = yaml.safe_load(path.read_text())
    if "base" in own:
        inherited = read_preset(path.parent / own.pop("base"))
        assert not [name for name, value in own.items() if inherited.get(name) == value]


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
@pytest.mark.parametrize("eps", [1e-8, 1e-6, 5e-5])
def test_an_epsilon_that_is_too_small_for_half_precision_is_refused_for_training(
    optimizer, eps, tmp_path
):
    arguments = ["--precision", "half", "--optimizer", optimizer, "--adam_eps", str(eps)]
    with pytest.raises(UserError, match="too small for --precision half: .* Give 6e-05 or more"):
        parse_options(arguments)
    for change in (["--adam_eps", "6e-5"], ["--optimizer", "SGD"], ["--precision", "fp16"]):
        parse_options([*arguments, *change])
    # Every run may be evaluated in half precision.
    write_config(tmp_path / "configs.yaml", parse_options([*arguments, "--precision", "bf16"]))
    given = ["--config_file", str(tmp_path / "configs.yaml"), "--precision", "half"]
    assert parse_test_options(given)[0].precision == "half"


def test_options_are_an_easydict_that_is_written_as_a_plain_mapping(tmp_path):
    args = parse_options(["--img_size", "128", "48"])
    assert type(args) is EasyDict and args.img_size == args["img_size"] == [128, 48]
    args.seed = 3  # code may set an option
    write_config(tmp_path / "configs.yaml", args)
    plain = {name: args[name] for name in OPTIONS}
    expected = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)
    assert (tmp_path / "configs.yaml").read_text() == expected
    again = pickle.loads(pickle.dumps(args))  # loader processes get the options by pickle
    assert again == args and again.seed == again["seed"] == 3 and again.milestones == [20, 50]


def test_no_option_hides_a_method_of_dict():
    assert not set(OPTIONS) & set(dir(EasyDict))


def test_the_home_folder_is_expanded_in_every_path_option_and_preset(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for option in OPTIONS.values():
        home = str(tmp_path) if option.path else "~"
        if option.type is str and not option.choices and not option.pattern:
            assert option.coerce_one("~/x", "command line") == f"{home}/x"
            assert option.coerce_one("a~/~x", "command line") == "a~/~x"
    assert {"root_dir", "image_cache", "finetune"} <= {n for n, o in OPTIONS.items() if o.path}
    (tmp_path / "base.yaml").write_text("root_dir: ~/data\nseed: 7\n")
    (tmp_path / "own.yaml").write_text("base: ~/base.yaml\n")
    args = parse_options(["--config_file", "~/own.yaml", "--output_dir", "~"])
    assert (args.root_dir, args.seed) == (str(tmp_path / "data"), 7)
    assert args.output_dir == str(tmp_path)


def test_an_unknown_home_folder_is_an_error(monkeypatch):
    monkeypatch.setattr(
        "os.path.expanduser", lambda path: path
    )  # as without HOME and an entry in passwd
    with pytest.raises(UserError, match="~/data: no home folder is known here; set HOME"):
        parse_options(["--root_dir", "~/data"])
