"""The table of options: every flag of train.py with its type, default, allowed values and meaning.

To add an option, add one row to a group of the table:

    Option("my_weight", float, 1.0, ge=0, help="weight of the loss mine"),

Nothing else is needed: the command line, --help, presets, configs.yaml and the check of the value
follow from the row, and code reads `args.my_weight`. Then run `make docs` to update
docs/options.md. utils/option_type.py explains the fields of a row (`ge`, `choices`, `may_differ`,
...). A rule about two options is a check in `resolve`, utils/config.py.
"""

from __future__ import annotations

from utils.option_type import Option

NAME = r"[^/\0-\x1f\x7f-\x9f]{1,100}"
PERIOD = r"[1-9]\d{0,8}|(?!0+(\.0*)?min)\d{1,8}(\.\d+)?min"
SCRATCH = "Model sizes for --pretrain_choice scratch"

# fmt: off
GROUPS: dict[str, list[Option]] = {
    "Run": [
        Option("name",        str,  "baseline", pattern=NAME, may_differ=True,
            help="name of the run, 1 to 100 characters without a slash or control character"),
        Option("output_dir",  str,  "logs", path=True, may_differ=True,
            help="folder of all runs; a run writes to DATASET_NAME/TIME_NAME below it"),
        Option("seed",        int,  1, ge=0,
            help="seed of initial weights, batches, augmentation and sampling"),
        Option("device",      str,  "auto", choices=("auto", "cpu", "cuda"), may_differ=True,
            help="auto: CUDA if available, else CPU"),
        Option("precision",   str,  "auto",
            choices=("auto", "fp32", "bf16", "fp16", "half", "fp64"),
            help="bf16, fp16: mixed precision (autocast); half: fp16 weights, as in the original; "
                 "fp64: for exact comparisons; auto: bf16 if the device computes it natively, else "
                 "fp32; a resumed run keeps its precision"),
        Option("compile",     bool, False, same_results=True,
            help="compile the encoders with torch.compile; the first steps are slow"),
        Option("grad_checkpointing", bool, False, same_results=True,
            help="recompute activations in the backward pass: less memory, a third more time"),
        Option("accum_steps", int,  1, ge=1, same_results=True,
            help="encode each batch in this many parts: less memory, more time, the same losses"),
        Option("num_workers", int,  8, ge=0, may_differ=True,
            help="processes that load images; at most one per CPU core is started"),
        Option("log_period",  int,  100, ge=1, may_differ=True, help="steps between log lines"),
    ],
    "Evaluation and checkpoints": [
        Option("eval_period",   int,   1, ge=1, help="epochs between evaluations"),
        Option("save_period",   str,   "1", pattern=PERIOD, may_differ=True,
            help="time between saves of last.pth: whole epochs as 2, or minutes as 30min"),
        Option("keep_last",     int,   1, ge=1, le=1000, may_differ=True,
            help="number of saves to keep: last.pth, the one before it as last.1.pth, ..."),
        Option("val_dataset",   str,   "test", choices=("test", "val", "heldout", "last", "both"),
            help="split whose R@1 selects best.pth; test: the paper's protocol; val: that of the "
                 "data set; heldout: identities held out of training; last: no selection, the last "
                 "epoch; both: heldout selects best.pth, test selects best_test.pth"),
        Option("heldout",       float, 0.1, gt=0, lt=1,
            help="--val_dataset heldout, both: fraction of each source's training identities to "
                 "hold out"),
        Option("heldout_seed",  int,   0, ge=0,
            help="--val_dataset heldout, both: seed that selects the held-out identities; runs "
                 "with different --seed share them"),
        Option("resume",        str,   "no", choices=("no", "yes", "auto"), const="yes",
            may_differ=True,
            help="resume a run: that of --resume_ckpt_file, or the newest of --name in "
                 "--output_dir; auto: resume if there is one, else start a new run"),
        Option("resume_ckpt_file", str, "", path=True, may_differ=True,
            help="checkpoint to resume from (default: last.pth of the run)"),
        Option("average_last",  int,   0, ge=0,
            help="evaluate the mean of the weights after each of this many last epochs, and write "
                 "it as averaged.pth (0: no)"),
        Option("max_nonfinite", int,   5, ge=0, may_differ=True,
            help="skip up to this many steps in a row if their loss or gradient is NaN or "
                 "infinite; one more stops the run"),
        Option("finetune",      str,   "", path=True, may_differ=True,
            help="checkpoint to start from: weights are loaded where name and shape fit"),
    ],
    "Data": [
        Option("dataset_name", str, "AGDataAttr", help="name of the data set; see docs/data.md"),
        Option("root_dir",     str, "./data", path=True, may_differ=True,
            help="folder that contains the data set"),
        Option("views",        str, "ag", choices=("a", "g", "ag"),
            help="AGSGData only: aerial images (a), ground images (g) or both (ag)"),
        Option("image_cache",  str, "", path=True, may_differ=True,
            help="folder for a cache of resized images, and of dataset.jsonl (default: no cache)"),
        Option("on_bad_image", str, "fail", choices=("fail", "skip"), may_differ=True,
            help="if a training image cannot be read: fail, or skip to the epoch's next sample"),
        Option("noise_rate", float, 0.0, ge=0, lt=1,
            help="noisy correspondence, as in RDE's experiments: fraction of the training samples "
                 "that exchange their captions"),
        Option("noise_seed", int, 0, ge=0,
            help="--noise_rate: seed that selects the samples and captions; runs with different "
                 "--seed share them"),
    ],
    "Batches and augmentation": [
        Option("img_aug",         bool, False,
            help="pad by 10 pixels and crop randomly, erase randomly; flips are always on"),
        Option("img_pool",        int,  0, ge=0, le=20,
            help="augment each image this many times, at random out of TBPS-CLIP's pool "
                 "(TBPS-CLIP: 2), instead of flips and --img_aug; 0: off"),
        Option("sampler",         str,  "random", choices=("random", "identity"),
            help="random: shuffle; identity: --num_instance samples per identity in a batch"),
        Option("num_instance",    int,  4, ge=1,
            help="samples per identity in a batch, for --sampler identity"),
        Option("batch_size",      int,  128, ge=2, help="samples per training step, over all GPUs"),
        Option("test_batch_size", int,  512, ge=1, may_differ=True,
            help="images or captions per evaluation step"),
        Option("MLM",             bool, False,
            help="mask words of the captions that all losses see, as the paper's command does; "
                 "the loss mlm makes its own masked captions even without it"),
        Option("txt_aug",         str,  "auto", choices=("auto", "none", "mask", "rde", "delete"),
            help="augmentation of training captions; mask: mask 15 % of the words; rde: mask, "
                 "replace or remove 20 %, as in RDE; delete: delete 5 %, as in TBPS-CLIP; "
                 "auto: mask with --MLM, else none"),
        Option("masked_token_rate", float, 0.8, ge=0, le=1,
            help="of the tokens selected for masking, fraction that becomes the mask token"),
        Option("masked_token_unchanged_rate", float, 0.1, ge=0, le=1,
            help="of these tokens, fraction that stays unchanged; the rest become random tokens"),
    ],
    "Model": [
        Option("pretrain_choice", str, "ViT-B/16", path=True,
            help="CLIP weights: an OpenAI name (ViT-B/16, RN50, ...), MODEL/TAG of open_clip, a "
                 "file in OpenAI's format (archive, state dict or safetensors), a folder of "
                 "tools/export.py --hub, MODEL@FILE for a file or folder of another open_clip "
                 "model, or scratch: random weights"),
        Option("img_size",    int,   [384, 128], count=2, ge=16, le=4096,
            help="height and width of input images, pixels"),
        Option("stride_size", int,   None, ge=1, le=4096,
            help="stride between patches, pixels (default: the patch size)"),
        Option("text_length", int,   77, ge=3, le=77,
            help="maximum length of a caption, tokens, including start and end"),
        Option("vocab_size",  int,   49408, ge=49408, le=10**6,
            help="vocabulary size of the text encoder; checked against the weights"),
        Option("temperature", float, 0.02, gt=0,
            help="softmax temperature of all similarities"),
        Option("learn_temperature", bool, False,
            help="learn the temperature, from --temperature on; losses with a temperature of their "
                 "own (tal, trl, tse, simclr) keep it; not for these alone"),
        Option("min_temperature", float, 0.01, gt=0,
            help="--learn_temperature: the lowest one; 0.01 is a scale of 100, as in CLIP"),
        Option("cmt_depth",   int,   4, ge=1, le=64,
            help="mlm, fta: layers of the cross-modal transformer"),
    ],
    "LoRA, by peft (requirements-methods.txt)": [
        Option("lora_rank",    int,   0, ge=0, le=2**10,
            help="train updates of this rank and freeze the encoders' own weights; heads of the "
                 "losses train as usual (0: train all weights)"),
        Option("lora_alpha",   float, 16.0, gt=0,
            help="LoRA: the updates are scaled by this / --lora_rank"),
        Option("lora_dropout", float, 0.0, ge=0, lt=1,
            help="LoRA: fraction of the updates' inputs that is dropped at random"),
        Option("lora_targets", str,   "both", choices=("attn", "mlp", "both"),
            help="LoRA: what to update in the blocks of both encoders, attention or MLP"),
    ],
    SCRATCH: [
        Option("embed_dim",         int, 512, ge=1, le=2**14, help="width of the joint embedding"),
        Option("vision_width",      int, 768, ge=64, le=2**14, help="ViT width, a multiple of 64"),
        Option("vision_layers",     int, 12, ge=1, le=256, help="ViT layers"),
        Option("vision_patch_size", int, 16, ge=1, le=4096, help="patch height and width, pixels"),
        Option("text_width",        int, 512, ge=64, le=2**14,
            help="text encoder width, a multiple of 64"),
        Option("text_layers",       int, 12, ge=1, le=256, help="text encoder layers"),
    ],
    "Losses": [
        Option("loss_names",      str,   "sdm+id+mlm",
            help="losses, joined by +; see docs/training.md"),
        Option("slack",           float, 0.15, ge=0,
            help="AEA: extra target weight of same-identity keys of the first block (text-aerial)"),
        Option("queue_batches",   int,   3, ge=1, le=1000, help="AEA: past batches in the queue"),
        Option("negatives",       str,   "next", choices=("next", "random"),
            help="FIRM: class of the negative sentence; next: class + 1, as in the original code; "
                 "random: as in the paper"),
        Option("attributes_file", str,   "configs/attributes.yaml", path=True, may_differ=True,
            help="FIRM: YAML file of attributes and their sentences"),
        Option("firm_attributes", str,   [], count="+",
            help="FIRM: names of the attributes to use (default: all in --attributes_file)"),
        Option("tal_temperature", float, 0.015, gt=0,
            help="tal, trl: softmax temperature of their cosines, instead of --temperature"),
        Option("tal_margin",      float, 0.1, ge=0,
            help="tal, trl: margin between the cosines of positives and negatives"),
        Option("nitc_alpha",      float, 0.5, ge=0, le=1,
            help="nitc: weight of the model's own softmax in the targets; the rest are identities"),
        Option("tse_ratio",       float, 0.3, gt=0, le=1,
            help="tse: fraction of an image's patches, and of the words a caption may have, that "
                 "are selected"),
        Option("tse_dim",         int,   1024, ge=2, le=2**14, help="tse: width of its features"),
        Option("simclr_temperature", float, 0.1, gt=0,
            help="simclr: softmax temperature of its cosines"),
        Option("simclr_loss_weight", float, 0.4, ge=0, help="weight of the loss simclr"),
        Option("fta_queries",     int,   4, ge=1, le=1024,
            help="fta: learned queries, each a summary of tokens"),
        Option("fta_loss_weight", float, 1.0, ge=0, help="weight of the loss fta"),
        Option("citc_loss_weight", float, 0.1, ge=0, help="weight of the loss citc"),
        Option("match_loss_weight", float, 1.0, ge=0, help="weight of the loss match2"),
        Option("id_loss_weight",  float, 1.0, ge=0, help="weight of the loss id"),
        Option("mlm_loss_weight", float, 1.0, ge=0, help="weight of the loss mlm"),
    ],
    "Optimizer": [
        Option("optimizer",      str,   "Adam", choices=("Adam", "AdamW", "SGD"), help="optimizer"),
        Option("lr",             float, 1e-5, gt=0,
            help="base learning rate: backbone, FIRM's head"),
        Option("lr_factor",      float, 5.0, gt=0,
            help="learning rate of new layers (cross*, classifier, mlm_head, head_*), times --lr"),
        Option("bias_lr_factor", float, 2.0, gt=0, help="learning rate of biases, times --lr"),
        Option("layer_decay",    float, 1.0, gt=0, le=1,
            help="learning rate of a layer of the encoders, as a fraction of that of the layer "
                 "above it (1: the same for all)"),
        Option("weight_decay",   float, 4e-5, ge=0, help="weight decay (L2)"),
        Option("weight_decay_bias", float, 0.0, ge=0, help="weight decay (L2) of biases"),
        Option("alpha",          float, 0.9, ge=0, le=1, help="Adam: beta 1"),
        Option("beta",           float, 0.999, ge=0, le=1, help="Adam: beta 2"),
        Option("adam_eps",       float, 1e-3, gt=0,
            help="Adam: epsilon; --precision half needs a large one, such as the original's 1e-3"),
        Option("ema",            float, 0.0, ge=0, lt=1,
            help="keep a moving average of the weights: a step keeps this part of it and adds 1 - "
                 "this of the weights; evaluations and best.pth use the average (0: none)"),
        Option("grad_clip",      float, 0.0, ge=0,
            help="maximum L2 norm of the gradient of all weights (0: no clipping)"),
        Option("momentum",       float, 0.9, ge=0, le=1, help="SGD: momentum"),
    ],
    "Schedule": [
        Option("num_epoch",     int,   60, ge=1, help="number of epochs"),
        Option("lrscheduler",   str,   "cosine",
            choices=("step", "exp", "poly", "cosine", "linear"),
            help="learning rate schedule after warm-up, set once per epoch"),
        Option("milestones",    int,   [20, 50], count="+", ge=1,
            help="step: epochs at which the learning rate is multiplied by --gamma"),
        Option("gamma",         float, 0.1, gt=0, help="step: factor at each milestone"),
        Option("warmup_factor", float, 0.1, gt=0, le=1,
            help="learning rate of the first epoch, as a fraction of the full one"),
        Option("warmup_epochs", int,   5, ge=0, help="epochs of warm-up"),
        Option("warmup_method", str,   "linear", choices=("linear", "constant"),
            help="linear: rise to the full learning rate; constant: stay at --warmup_factor"),
        Option("target_lr",     float, 0.0, ge=0, help="cosine, poly: final learning rate"),
        Option("power",         float, 0.9, gt=0, help="exp, poly: base of the exponential"),
    ],
}
# fmt: on
OPTIONS: dict[str, Option] = {o.name: o for group in GROUPS.values() for o in group}
SCRATCH_ONLY = tuple(o.name for o in GROUPS[SCRATCH])
# Options that may differ between two runs of the same experiment: paths, devices, logging, saving.
MAY_DIFFER = tuple(o.name for o in OPTIONS.values() if o.may_differ)
# Options that change memory or speed; results change only by rounding.
SAME_RESULTS = tuple(o.name for o in OPTIONS.values() if o.same_results)
