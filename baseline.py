"""Fine-tune a CLIP to score AI-generated images: quality, and consistency with the prompt.

    python baseline.py --demo                                   see it work, no download
    python baseline.py --partial_freeze --freeze_layers 18      train on data/data.csv
    python baseline.py --preset A                               heads only, minutes
    python baseline.py --repeats 5 --test_ratio 0.2 --preset A  numbers with a spread
    python baseline.py --resume_from outputs/baseline_last.pt   go on after a kill
    python baseline.py --predict my_images --prompt "a cat"     score your own images
    torchrun --nproc_per_node=4 baseline.py --preset B          the same on 4 GPUs

CLIP's own score is kept as the base, and a small bounded residual is learned on top:

    q = q_base + scale_q * tanh(delta_q)        q_base = sigmoid(w . f + b)
    c = c_base + scale_c * tanh(delta_c)        c_base = a * (s0 + 1) / 2 + b' + e * q

s0 is cos(f, t) by the CLIP as it was before training. One image's way: CSV row -> Table -> part of
the split -> view of an epoch -> decode -> Tower.prefix (frozen, cached) -> Tower.suffix (trains) ->
heads -> losses -> update; in eval mode -> metrics -> row of results -> table, page, runs.csv.
The rooms (marked `# --- NAME ---`) down to "what the towers read" are the whole idea; those behind
it may be skipped.

Axis letters: B batch, N rows of the CSV, U unique texts, D embedding, T tokens, W tower width,
V views, H x W pixels where it is plain.
"""

import argparse
import difflib
import gc
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

if (python := sys.version_info[:3]) < (3, 11):  # baseline.py requires Python >= 3.11
    print(f"baseline.py: error: requires Python >= 3.11, but this is {'%d.%d.%d' % python}",
          file=sys.stderr)
    sys.exit(2)

HERE = Path(__file__).resolve().parent
TARGETS = ("q", "c")
TORCHRUN = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"
try:  # one process alone is no special case
    RANK, WORLD, LOCAL_RANK, LOCAL_WORLD, _ = (int(os.environ[name]) for name in TORCHRUN)
except (KeyError, ValueError):  # of another launcher, which sets some of them
    RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = 0, 1, 0, 1

# --- command line ---------------------------------------------------------------------------
# On the standard library alone, so that --help and a wrong flag answer at once.

PRECISIONS = ("fp32", "bf16", "fp16")
PRESETS = {
    "A": dict(freeze_clip=True, epochs=10, batch_size=64, lr=1e-3),
    "B": dict(partial_freeze=True, freeze_layers=18, residual_scale_q=0.2, residual_scale_c=0.2,
              epochs=20, batch_size=32, lr=3e-5, w_q=0.5, w_c=0.5, dropout=0.1,
              max_grad_norm=1.0),
    "C": dict(freeze_clip=True, residual_scale_q=0.1, residual_scale_c=0.1, epochs=30,
              batch_size=16, lr=1e-3, weight_decay=5e-4, dropout=0.2),
    "D": dict(residual_scale_q=0.3, residual_scale_c=0.3, epochs=15, batch_size=64, lr=3e-5,
              dropout=0.05),
    "E": dict(partial_freeze=True, freeze_layers=20, residual_scale_q=0.15,
              residual_scale_c=0.15, dropout=0.2, weight_decay=5e-4, max_grad_norm=0.5),
    "F": dict(partial_freeze=True, freeze_layers=18, residual_scale_q=0.25,
              residual_scale_c=0.25, epochs=50, batch_size=16, lr=2e-5, w_q=0.4, w_c=0.6,
              warmup_ratio=0.1),
}

DEMO = dict(data_csv_path=str(HERE / "data/demo/data.csv"),
            image_base_dir=str(HERE / "data/demo/images"),
            clip_model=f"local-dir:{HERE / 'data/demo/clip'}",
            freeze_clip=True, residual_scale_q=0.3, residual_scale_c=0.3, epochs=40, batch_size=64,
            lr=5e-3, weight_decay=3.0, dropout=0.5, val_ratio=0.25, num_workers=0)

# Flags that only do something together with one of others: {others: flags}.
DEPENDENT_FLAGS = {
    ("partial_freeze",): ("freeze_layers",),
    ("use_refinement",): ("refinement_layers", "refinement_heads", "refinement_dim"),
    ("use_explanations",): ("w_exp", "explanation_column"),
    ("predict", "export"): ("checkpoint",),
    ("predict",): ("prompt", "predictions_csv", "overwrite", "excel", "min_quality",
                   "min_consistency", "keep_top")}


class UserError(Exception):
    """Tell the user the rule, the value that broke it and the remedy; exits with status 2."""


class Parser(argparse.ArgumentParser):
    """Suggest the nearest flag when one is unknown."""

    def error(self, message):
        """Exit with status 2 after the message."""
        if message.startswith("unrecognized arguments:"):
            for word in message.split(":", 1)[1].split():
                near = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, 1)
                message += f" (did you mean {near[0]}?)" if near else ""
        let_rank_0_speak()
        super().error(message)


def let_rank_0_speak():
    """Let rank 0 say an error first that it may have as well: torchrun then ends the others."""
    if RANK:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)


def number(low, high=math.inf, kind=float, open_low=False, auto=False):
    """Return an argparse type of finite numbers from low to high; auto: that word gives None."""
    def parse(text):
        if auto and text == "auto":
            return None
        value = kind(text)
        if not low <= value <= high or (open_low and value == low) or value == math.inf:
            edge = "above" if open_low else "at least"
            limit = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"must be {edge} {low:g}{limit}, got {text}")
        return value
    parse.__name__ = kind.__name__
    return parse


label_scale = number(0, open_low=True, auto=True)
positive = number(0, open_low=True)
positive_int = number(1, kind=int)
whole = number(0, kind=int)


def build_parser():
    """Return the argparse parser, its groups in the reference card's order."""
    parser = Parser(prog="baseline.py", usage="python baseline.py [flags]", allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter, add_help=False,
                    description=__doc__.split("\n\n")[0])
    on = {"action": "store_true"}

    add = parser.add_argument_group("shortcuts").add_argument
    add("-h", "--help", action="help", help="show this help and exit")
    add("--preset", choices=sorted(PRESETS), help="of the reference card; other flags win over it")
    add("--demo", **on, help="use data/demo: synthetic images, a tiny frozen CLIP, own settings")

    add = parser.add_argument_group("data").add_argument
    add("--data_csv_path", default="data/data.csv", help="table of images: .csv, .jsonl, .xlsx ..")
    add("--image_base_dir", default="data/images", help="folder of the names in the CSV")
    add("--name_column", default="name", help="column of image files; {a}/{b}: of two columns")
    add("--prompt_column", default="prompt", help="CSV column: prompt")
    add("--quality_column", default="mos_quality", help="CSV column: quality MOS")
    add("--consistency_column", default="mos_align", help="CSV column: consistency MOS")
    add("--label_scale_q", type=label_scale, default="auto",
        help="top of the quality MOS; auto: least of 1, 5, 10, 100 not below its maximum")
    add("--label_scale_c", type=label_scale, default="auto", help="the same for consistency")
    add("--split_by", choices=("prompt", "image"), default="prompt",
        help="prompt: no prompt on both sides; image: leaks prompts")
    add("--group_column", help="CSV column: what must not be on both sides, instead of the prompt")
    add("--split_column", help="CSV column: train, val or test; without val it is drawn from train")
    add("--val_ratio", type=number(0, 0.9, open_low=True), default=0.2, help="share for validation")
    add("--test_ratio", type=number(0, 0.9), default=0.0,
        help="share of images in the test part, used once at the end; 0: none")
    add("--skip_bad_images", **on,
        help="leave out missing and unreadable images (at most 5 %%, listed in skipped.csv)")
    add("--resize_mode", choices=("shortest", "squash", "longest"),
        help="crop, squash or pad images to a square; not given: as the model was trained")
    add("--augment", choices=("none", "flip", "crop"), default="flip",
        help="training views; crop: crops of 90-100 %% of the area, and flips")

    add = parser.add_argument_group("CLIP and freezing").add_argument
    add("--clip_model", default="ViT-L-14",
        help="open_clip name, local-dir:PATH, hf-hub:ORG/NAME; with a checkpoint: its CLIP's place")
    add("--pretrained", default="openai",
        help="open_clip tag, weights file, or none (random weights); local-dir: has its own")
    add("--image_size", type=positive_int, help="pixels a side; not given: the model's own")
    add("--quick_gelu", **on, help="the weights file is of QuickGELU (every OpenAI release)")
    add("--init_from", help="checkpoint of another run whose towers and heads to start from")
    add("--freeze_clip", **on, help="train the heads only")
    add("--partial_freeze", **on, help="freeze embeddings and first blocks of each tower")
    add("--freeze_layers", type=positive_int, default=8, help="blocks per tower, --partial_freeze")

    add = parser.add_argument_group("residual learning and heads").add_argument
    add("--residual_scale_q", type=positive, default=0.2, help="bound of the residual on [0, 1]")
    add("--residual_scale_c", type=positive, default=0.2, help="the same for consistency")
    add("--no_residual_learning", **on, help="predict both scores directly")
    add("--no_base_calibration", **on, help="do not fit the base to the training part at first")
    add("--use_two_branch", **on, help="consistency base: mean of a cosine and an MLP branch")
    add("--use_refinement", **on, help="correct the consistency with a small transformer encoder")
    add("--refinement_layers", type=positive_int, default=4, help="its layers")
    add("--refinement_heads", type=positive_int, default=8, help="its heads")
    add("--refinement_dim", type=positive_int, default=256, help="its width")
    add("--use_explanations", **on, help="pull a linear head to the text embedding of explanations")
    add("--explanation_column", default="explanation", help="CSV column: explanation")

    add = parser.add_argument_group("loss weights").add_argument
    add("--w_q", type=number(0), default=0.5, help="weight of the quality loss")
    add("--w_c", type=number(0), default=0.5, help="weight of the consistency loss")
    add("--w_exp", type=number(0), default=0.1, help="weight of the explanation loss")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive_int, default=20, help="passes over the data")
    add("--batch_size", type=positive_int, default=32, help="images per step (of each process)")
    add("--grad_accum_steps", type=positive_int, default=1, help="steps per optimiser update")
    add("--lr", type=positive, default=3e-5, help="peak rate of CLIP, or of heads on a frozen one")
    add("--head_lr", type=positive,
        help="peak rate of the heads; not given: lr where CLIP is frozen, else at least 1e-3")
    add("--weight_decay", type=number(0), default=1e-4, help="AdamW's; of matrices only")
    add("--warmup_ratio", type=number(0, 1), default=0.05, help="share of all updates that warm up")
    add("--scheduler", choices=("cosine", "linear", "constant", "step"), default="cosine",
        help="learning rate after the warm-up")
    add("--step_lr_step_size", type=positive_int, default=1, help="epochs per decay of step")
    add("--step_lr_gamma", type=positive, default=0.1, help="factor per decay of step")
    add("--seed", type=whole, default=42, help="seed of split, heads and order")
    add("--repeats", type=positive_int, default=1, help="runs on splits seed, seed+1, ..")
    add("--tune", **on, help="run the card's five stages of tuning, and test the winner once")

    add = parser.add_argument_group("regularisation and selection").add_argument
    add("--max_grad_norm", type=number(0), default=1.0, help="gradient clipping norm; 0: off")
    add("--dropout", type=number(0, 0.99), default=0.1, help="in every head")
    add("--early_stopping_patience", type=whole, default=0, help="epochs without gain; 0: off")
    add("--early_stopping_min_delta", type=number(0), default=0.0005, help="SROCC of a gain")
    add("--select_by", choices=("mean", "quality", "consistency"), default="mean",
        help="validation SROCC that picks the best epoch")

    group = parser.add_argument_group("speed and memory")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--precision", choices=("auto", *PRECISIONS), default="auto",
           help="of the towers; auto: bf16 or fp16 on CUDA, fp32 on CPU")
    either("--no_amp", dest="precision", action="store_const", const="fp32",
           help="the same as --precision fp32")
    add("--num_workers", type=whole, default=4, help="threads that decode, at most one per core")
    add("--pin_memory", **on, default=True, help="page-locked batches for CUDA")
    add("--no_pin_memory", dest="pin_memory", action="store_false", help="turn --pin_memory off")
    add("--cache", choices=("auto", "off"), default="auto", help="features or pixels on disk")
    add("--cache_dir", help="where; not given: <output_dir>/cache")
    add("--cache_max_gb", type=positive, default=20.0, help="size limit of it in GB")
    add("--grad_checkpointing", **on, help="recompute activations: less memory, more time")
    add("--compile", **on, help="torch.compile what trains")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="outputs", help="where everything is written")
    add("--log_csv", default="training_log.csv", help="log, inside output_dir")
    add("--resume_from", help="baseline_last.pt or baseline_best.pt to go on from")
    add("--no_plots", **on, help="write no pictures and no report.html")
    add("--tensorboard", **on, help="also write scalars and pictures for TensorBoard")

    add = parser.add_argument_group("scoring").add_argument
    add("--predict", metavar="TARGET", help="score a CSV, a folder of images or one image")
    add("--checkpoint", default="outputs/baseline_best.pt",
        help="what --predict scores with: a file, a folder of --export or hf-hub:ORG/NAME")
    add("--export", metavar="DIR", help="write --checkpoint as a folder that needs no other file")
    add("--prompt", help="of every image of --predict; a .txt file beside a folder's image wins")
    add("--predictions_csv", help="where the scores go, - for standard output; not given: "
        "<what is scored>_scores.csv in the current folder")
    add("--overwrite", **on, help="replace --predictions_csv where it exists")
    add("--excel", **on, help="write it with a byte order mark, by which Excel knows UTF-8")
    add("--min_quality", type=number(-1000), help="add a column `keep`: quality at least this MOS")
    add("--min_consistency", type=number(-1000), help="the same for consistency; all must hold")
    add("--keep_top", type=positive_int, help="the same for the best images of each prompt")
    return parser


def parse_args(argv=None):
    """Parse a command line; explicit flags win over --preset, which wins over --demo.

    Returns the namespace of all flags, and of `command`, the words that were typed, and `explicit`,
    the names of the flags that they, the preset or the demo set. Contradictions exit with 2.
    """
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    parser = build_parser()
    defaults, unset = vars(parser.parse_args([])), object()
    given = vars(parser.parse_args(words, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in given.items() if value is not unset}
    combined = (DEMO if given.get("demo") else {}) | PRESETS.get(given.get("preset"), {})
    if "freeze_clip" in given or "partial_freeze" in given:  # they replace a preset's freezing
        combined = {k: v for k, v in combined.items() if k not in ("freeze_clip", "partial_freeze")}
    args = argparse.Namespace(**defaults | combined | given, command=shlex.join(words),
                              explicit=(set(combined) | set(given)) - {"preset", "demo"})
    pairs = {"--freeze_clip and --partial_freeze": args.freeze_clip and args.partial_freeze,
             "--split_column and --test_ratio": args.split_column and args.test_ratio,
             "--group_column and --split_by image": args.group_column and args.split_by == "image",
             "--repeats and --resume_from": args.repeats > 1 and args.resume_from,
             "--predict and --export": args.predict and args.export}
    for pair in [pair for pair, both in pairs.items() if both]:
        parser.error(f"{pair} exclude each other: drop one of them")
    for wrong, message in (
            (args.val_ratio + args.test_ratio >= 1,
             f"--val_ratio {args.val_ratio:g} and --test_ratio {args.test_ratio:g} leave no "
             f"training images: their sum must stay below 1"),
            (args.w_q + args.w_c == 0,
             "--w_q and --w_c are both 0, so nothing would be learned: raise one of them"),
            (args.refinement_dim % args.refinement_heads,
             f"--refinement_dim {args.refinement_dim} must be a multiple of --refinement_heads "
             f"{args.refinement_heads}"),
            (Path(args.log_csv).name != args.log_csv,
             f"--log_csv {args.log_csv} must be a file name: it lies in --output_dir")):
        if wrong:
            parser.error(message)
    if RANK == 0:
        warn_of_idle_flags(args, given)
    args.cache_dir = args.cache_dir or str(Path(args.output_dir) / "cache")
    return args


def warn_of_idle_flags(args, given):
    """Say which of the given flags do nothing without another one."""
    for others, flags in DEPENDENT_FLAGS.items():
        idle = not any(getattr(args, other) for other in others)
        for flag in [flag for flag in flags if flag in given and idle]:
            print(f"WARNING: --{flag} does nothing without --{' or --'.join(others)}",
                  file=sys.stderr)
    for flag, other in (("compile", "freeze_clip"), ("compile", "grad_checkpointing"),
                        ("grad_checkpointing", "freeze_clip")):
        if getattr(args, flag) and getattr(args, other):
            print(f"WARNING: --{flag} does nothing with --{other}", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the libraries are loaded
    for stream in filter(None, (sys.stdout, sys.stderr)):  # what it cannot show is escaped
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    ARGS = parse_args()
    gc.disable()  # imports leave no garbage, and searching it takes a second
    if ARGS.predictions_csv == "-":  # a file, whatever the terminal shows
        sys.stdout.reconfigure(encoding="utf-8")

import base64
import contextlib
import copy
import csv
import ctypes
import functools
import hashlib
import html
import importlib
import io
import itertools
import json
import logging
import re
import shutil
import socket
import subprocess
import textwrap
import threading
import urllib.request
import warnings
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import filelock
import huggingface_hub
import numpy as np
import open_clip
import pandas as pd
import safetensors.torch
import scipy.optimize
import scipy.special
import scipy.stats
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from open_clip import transform as clip_transform
from open_clip.utils import to_2tuple
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# --- data -----------------------------------------------------------------------------------

MOS_SCALES = (1.0, 5.0, 10.0, 100.0)
PART_OF = {name: part for part, names in {
    "train": "train training trn 训练", "test": "test testing tst 测试",
    "val": "val valid validation dev development 验证"}.items() for name in names.split()}
COLUMNS = {"name": "name_column", "prompt": "prompt_column", "mos_quality": "quality_column",
           "mos_align": "consistency_column", "explanation": "explanation_column",
           "group": "group_column", "part": "split_column"}  # and the flags that name them
MOST_NARROW = 100  # longer side of an image divided by its shorter one


@dataclass(eq=False)
class Table:
    """The checked CSV; its columns are called as by default.

    frame: N rows sorted by name, so that nothing depends on the order of the CSV; its index is the
    row in the CSV (the header is row 1). name, prompt, mos_quality, mos_align: as they stand there;
    path: of the image; stamp: its size and time; prompt_id, explanation_id (-1: none): index into
    the unique texts; group_id: of what must not be on both sides of a split; part: by
    --split_column; q, c: float32 human MOS on [0, 1] (see to_mos), NaN where there is none.
    """

    frame: pd.DataFrame
    prompts: list  # U unique texts
    explanations: list
    targets: dict  # {"q": (low, high) MOS, ..}; one without scores is in no loss and no output
    skipped: pd.DataFrame  # rows of skipped.csv


IMAGES = tuple(Image.registered_extensions())


def read_table(path):
    """Read a table as text, its kind by its suffix (any other: CSV); UserError where it is none.

    Returns a DataFrame of strings without blank rows, its index the row in the file (header: 1).
    """
    suffix = Path(path).suffix.lower()
    try:
        frame = pd.DataFrame(READERS.get(suffix, csv_rows)(path), dtype=object)
        frame = frame.fillna("").map(str).astype(str).rename(columns=str)
        frame.index = np.arange(1, len(frame) + 1)
        if suffix not in (".parquet", ".json", ".jsonl"):  # pandas would rename twins
            frame = frame.iloc[1:].set_axis([*next(frame.itertuples(index=False))], axis=1)
        if any(name.lower().endswith(IMAGES) for name in frame):
            raise ValueError("row 1 is no header but an image: add a row above it that names every "
                             "column, such as name, prompt, mos_quality, mos_align")
    except Exception as error:  # pandas, zip, json, csv: each in its own ways
        raise UserError(f"{path} is not a readable {suffix[1:].upper() or 'CSV'} "
                        f"({str(error).strip() or 'it is empty'}): its first line must name every "
                        f"column, and texts with commas or quotes need quotes around them, their "
                        f"own twice. Correct it, or --data_csv_path (or --predict), or try --demo."
                        ) from error
    return frame[(frame != "").any(axis=1)]


def read_text(path):
    """Return the text of a file in UTF-8, or in UTF-16 with the mark that Excel gives it."""
    data = Path(path).read_bytes()
    if data.startswith(b"MATLAB"):
        raise ValueError("it is a MATLAB file: docs/DATASETS.md makes a CSV of one")
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        gbk = (" but looks like GBK" if re.search(rb"[\xb0-\xf7][\xa1-\xfe]", data)
               and "\ufffd" not in data.decode("gb18030", "replace") else "")
        raise ValueError(f"byte {error.start} is not UTF-8{gbk}: save it as 'CSV UTF-8'") from error


def csv_rows(path):
    """Return a CSV's rows as lists of cells, between the separator that its first line has most."""
    text, rows = read_text(path), []
    separator = max("\t;,", key=re.match("[^\r\n]*", text)[0].count)
    csv.field_size_limit(2 ** 31 - 1)
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True):
            if rows and len(row) > len(rows[0]):
                raise csv.Error("it has more cells than the first line has columns")
            if "\n" in "".join(row) and row_inside(row, separator):
                raise csv.Error("inside of a text another row seems to begin: close its quotes")
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"row {len(rows) + 1}: {error}") from error
    return rows


READERS = {  # of tables; any other suffix is that of a CSV
    ".parquet": lambda path: pd.read_parquet(path, "pyarrow", dtype_backend="numpy_nullable"),
    ".xlsx": lambda path: pd.read_excel(path, header=None, dtype=object, na_filter=False),
    ".json": lambda path: json.loads(read_text(path)),
    ".jsonl": lambda path: [json.loads(line.strip() or "{}")
                            for line in read_text(path).split("\n")],
}
TABLES = (".csv", ".tsv", ".txt", ".mat", *READERS)


def row_inside(row, separator):
    """Return whether in a cell a row ends and one begins as this one does: its quotes are open."""
    text, number = f"[^{separator}\n]*", r" *[-+.,\de]+ *"
    like = [number if re.fullmatch(number, cell) else
            text + r"\.\w{3,4}" * cell.lower().endswith(IMAGES) for cell in row]
    return any({*like[:i], *like[i + 1:]} - {text} and re.search(separator.join(
        ["", *like[i + 1:]]) + r"\r?\n" + separator.join([*like[:i], ""]), cell)
        for i, cell in enumerate(row))


def cells_of(frame, column):
    """Return the cells of a column (case and blanks aside) or of "{a}/{b}"; None without one."""
    fold = str if column in frame else lambda name: name.strip().casefold()
    fits = [i for i, name in enumerate(frame.columns) if fold(name) == fold(column)]
    joined, *parts = re.split(r"\{([^{}]+)\}", column)
    if fits or not parts:
        return frame.iloc[:, fits[0]] if len(fits) == 1 else None
    for name, text in zip(parts[::2], parts[1::2]):
        cells = cells_of(frame, name)
        joined = None if joined is None or cells is None else joined + cells.str.strip() + text
    return joined


def numbers_of(cells):
    """Return cells as float64, NaN where they are none; a comma is a decimal point."""
    return pd.to_numeric(cells.str.strip().str.replace(",", "."), errors="coerce").astype(float)


def image_names(cells):
    """Return the names of images without blanks around them, and with / for Windows' slashes."""
    return cells.str.strip().str.replace("\\", "/")


def find_columns(raw, args):
    """Return {column as by default: its cells}; UserError where one is missing.

    One of the scores may be absent, and the prompt with consistency, unless a flag names it.
    """
    named = {name: getattr(args, flag) for name, flag in COLUMNS.items()
             if getattr(args, flag) and (name != "explanation" or args.use_explanations)}
    found = {name: cells for name, column in named.items()
             if (cells := cells_of(raw, column)) is not None}
    spare = (["mos_quality"] if "mos_align" in found else
             ["mos_align", "prompt"] if "mos_quality" in found else [])
    if missing := [name for name in named if name not in found
                   and (name not in spare or COLUMNS[name] in args.explicit)]:
        raise UserError(f"{args.data_csv_path} must have the columns that are read, but "
                        f"{', '.join(map(named.get, missing))} is missing (it has "
                        f"{', '.join(raw.columns)}): choose it with --"
                        f"{', --'.join(map(COLUMNS.get, missing))}, or add a header line.")
    return found


def load_table(args):
    """Read and check the whole CSV; raise one UserError that lists all that is wrong with it."""
    path = args.data_csv_path
    raw = read_table(path)
    frame = pd.DataFrame({"prompt": ""} | find_columns(raw, args), raw.index)
    if frame.empty:
        raise UserError(f"{path} has a header but no rows: add one per image.")
    blank = frame.apply(lambda cells: cells.str.strip() == "")
    fill = "fill them in or remove the rows"
    frame["path"] = [Path(args.image_base_dir, name) for name in image_names(frame["name"])]
    frame["stamp"] = [f"{(stat := os.stat(path)).st_size}-{stat.st_mtime_ns}"
                      if os.path.isfile(path) else "" for path in frame["path"]]
    wrong_parts = read_parts(frame, raw, args)
    targets, wrong_scores = read_scores(frame, args)
    refuse_rows(path, frame, [  # what, bad rows, remedy, column to show
        ("empty image names", blank["name"], fill, "name"),
        ("duplicate image names", frame["path"].duplicated(keep=False) & ~blank["name"],
         "keep one row per image", "name"),
        ("empty prompts", blank["prompt"] & frame["c"].notna(), fill, "prompt"),
        (f"empty {args.group_column}", blank.get("group", []), fill, "name"),
        (f"image files missing in {args.image_base_dir}", ~blank["name"] & (frame["stamp"] == "")
         & (not args.skip_bad_images), "check --image_base_dir and the names", "path"),
        *wrong_parts, *wrong_scores])
    check_targets(targets, args)
    frame, skipped = drop_bad_images(frame.sort_values("name"), args)
    frame["prompt_id"], prompts = pd.factorize(frame["prompt"], sort=True)
    groups = folded(frame["group" if args.group_column else "prompt"])
    frame["group_id"], _ = pd.factorize(  # a row without one is its own group
        groups.where(groups != "", "\0" + frame["name"]), sort=True)
    texts = frame.get("explanation", pd.Series("", frame.index)).str.strip()
    frame["explanation_id"], explanations = pd.factorize(texts.where(texts != ""), sort=True)
    if args.use_explanations and not len(explanations):
        raise UserError(f"{path} has no text in its column {args.explanation_column}: fill it in, "
                        f"or drop --use_explanations.")
    return Table(frame, list(prompts), list(explanations), targets, skipped)


def refuse_rows(table, frame, problems):
    """Raise one UserError of all bad rows; problems: what, rows, remedy, column to show."""
    lines = ""
    for what, bad, remedy, column in problems:
        rows = frame.index[bad]
        for cell in frame.loc[rows[:1], column] if len(rows) else ():
            if column == "path":
                near = [file.name for file in sorted(cell.parent.glob("*")) if cell.stem.casefold()
                        in (file.stem.casefold(), file.name.casefold())]
                remedy = f"near it lies {', '.join(near) or 'nothing'}; {remedy}"
            lines += (f"\n  - {what}: {len(rows)} row{'s' * (len(rows) > 1)} "
                      f"({', '.join(map(str, rows[:5]))}{', ..' * (len(rows) > 5)}), "
                      f'"{str(cell)[:500]}" in row {rows[0]}; {remedy}')
    if lines:
        raise UserError(f"{table} cannot be used (a header is row 1):{lines}")


def folded(texts):
    """Return a Series of texts in which case and spacing make no difference."""
    return texts.map(lambda text: " ".join(text.casefold().split()))


def named_parts(texts):
    """Return "train", "val" or "test" for each usual name of it, NaN for other texts."""
    return folded(texts).str.replace(r"[\W_]*(set|split|集)$", "", regex=True).map(PART_OF)


def read_parts(frame, raw, args):
    """Make of a split column train, val, test; returns problems as refuse_rows has them.

    Without --split_column, those of the raw file that look like one are named.
    """
    if args.split_column:
        cells, frame["part"] = frame["part"], named_parts(frame["part"])
        unknown = frame["part"].isna()
        values = ", ".join(map(repr, cells[unknown].unique()[:5]))
        return [(f"{args.split_column} that is no part ({values})", unknown,
                 "call it train, val or test", "name")]
    for column, cells in raw.items():
        parts = named_parts(cells.drop_duplicates())
        if column.strip().casefold() == "split" or (parts.nunique() > 1 and parts.notna().all()):
            print(f"the column {column} is ignored: --split_column {column} splits by it")
    return []


def read_scores(frame, args):
    """Add the columns q and c; returns (Table.targets, problems as refuse_rows has them).

    Scores that go below 0 (z-scores) are read as symmetrical around it.
    """
    targets, problems = {}, []
    for target, name in (("q", "mos_quality"), ("c", "mos_align")):
        text = frame.get(name, pd.Series("", frame.index)).str.strip()
        mos, column, flag = numbers_of(text), getattr(args, COLUMNS[name]), f"label_scale_{target}"
        finite = np.isfinite(mos)
        high = getattr(args, flag) or next(
            (scale for scale in MOS_SCALES if mos[finite].abs().max() <= scale), MOS_SCALES[-1])
        below = finite & (mos < 0)
        low = -high if below.any() else 0.0
        frame[target] = ((mos - low) / (high - low)).astype(np.float32)
        if finite.any():
            targets[target] = low, high
        if low:
            print(f"{column} is below 0 in {below.sum()} of {len(mos)} rows (lowest "
                  f"{mos.min():g}): it is read as scores from {low:g} to {high:g}")
        problems += [(f"{column} that is not a finite number", ~finite & (text != ""),
                      "correct them; an empty cell is no score", name),
                     (f"{column} outside of the label scale {low:g} to {high:g}",
                      finite & (mos.abs() > high), f"give its top with --{flag}", name)]
    scoreless = frame[["q", "c"]].isna().all(axis=1) & (frame.get("part") != "test")
    return targets, [*problems, ("neither quality nor consistency", scoreless,
                                 "give one of them or remove the rows", "name")]


def to_mos(score, ends):
    """Return scores on [0, 1], an array or tensor, on the MOS scale of these ends."""
    low, high = ends
    return low + (high - low) * score


def check_targets(targets, args):
    """Say where one target alone has scores; raise UserError where flags want the other one."""
    if len(targets) != 1:
        return
    (only,), (other,) = targets, set(TARGETS) - {*targets}
    print(f"only {TITLES[only]} is trained: there are no scores of {TITLES[other]}")
    weight = getattr(args, f"w_{only}")
    if args.select_by == TITLES[other] or not weight:
        raise UserError(f"Only what has scores can be trained and select, which is {TITLES[only]} "
                        f"here, but --select_by is {args.select_by} and --w_{only} {weight:g}: "
                        f"drop these flags.")


def split_rows(table, args, seed):
    """Split the rows into {"train", "val", "test"}: sorted arrays of row numbers.

    By prompt, all images of a prompt or group go to one part. They are drawn in a random order that
    depends on the seed alone; one is taken while that brings the part's number of images closer to
    its ratio. What the table says about the parts stays; of it, only a missing val is drawn.
    """
    frame, by_prompt = table.frame, args.split_by == "prompt"
    group = frame["group_id"].to_numpy() if by_prompt else np.arange(len(frame))
    part = frame.get("part", pd.Series("train", frame.index)).to_numpy(object)
    order = np.random.default_rng([seed, 0]).permutation(group.max() + 1)
    whole = (part == "train").sum()
    for name, ratio in (("test", args.test_ratio), ("val", args.val_ratio)):
        free, taken = part == "train", np.zeros(len(order), dtype=bool)
        sizes, room = np.bincount(group[free], minlength=len(order)), ratio * whole
        for g in order if name not in part else ():
            if 0 < sizes[g] / 2 <= room:
                taken[g], room = True, room - sizes[g]
        part = np.where(free & taken[group], name, part)
    parts = {name: np.flatnonzero(part == name) for name in ("train", "val", "test")}
    for (name, rows), target in itertools.product(parts.items(), table.targets):
        scored = frame[target].iloc[rows].count()
        if scored < 2 and (name != "test" or args.test_ratio):
            raise UserError(f"Each part needs at least 2 images with a score of {TITLES[target]}, "
                            f"but {name} has {scored} of {len(group)} (in {len(order)} groups): "
                            f"add some, or change ratios, --split_by, --split_column or --seed.")
    return parts


class ImageError(ValueError):
    """Say why a file is no readable image."""


PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28  # Pillow: 2 ** 20


def load_image(image):
    """Return the image as as_rgb does, the first frame where it is animated.

    image: the path of a file, or an open PIL image or array. Raises ImageError where it is no
    readable image, or one so large or so narrow that it would fill the memory.
    """
    data = b""
    try:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        elif not isinstance(image, Image.Image):
            data = Path(image).read_bytes()
            image = Image.open(io.BytesIO(data))
        size = f"{image.width} x {image.height} pixels"
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow: at twice that only
            raise ImageError(f"its {size} could be a decompression bomb")
        if max(image.size) > MOST_NARROW * min(image.size):  # its resized long side blows up
            raise ImageError(f"it has {size}, and the longer side may be {MOST_NARROW} times the "
                             f"shorter at most")
        if data and image.format in ("JPEG", "MPO") and b"\xff\xd9" not in data[image.fp.tell():]:
            image = without_end(data)
        return as_rgb(image)
    except UnidentifiedImageError as error:
        lfs = " of a Git LFS pointer: fetch the image with git lfs pull" * (b"git-lfs" in data[:40])
        raise ImageError(f"cannot identify it: it begins with {data[:40]}{lfs}") from error
    except Exception as error:  # damaged files make decoders fail in every way there is
        raise ImageError(str(error) or type(error).__name__) from error


def without_end(data):
    """Return the image of a JPEG that lacks its end marker alone; OSError where it lacks more.

    Its scans bring every coefficient to its last bit, and no bits behind them change a pixel.
    """
    data = re.sub(rb"\0{2,}\Z", b"", data).removesuffix(b"\xff")  # zeros: of a broken download
    image, complete = Image.open(io.BytesIO(data)), set()
    for scan in data[data.rfind(b"\xff\xda", 0, image.fp.tell()):].split(b"\xff\xda")[1:]:
        scan += 12 * b"\1"  # one that ends in its head completes nothing
        first, last, bits = scan[3 + 2 * scan[2]:][:3]  # behind the components and their tables
        if bits % 16 == 0:
            complete |= {*itertools.product(scan[3:3 + 2 * scan[2]:2], range(first, last + 1))}
    behind = [b""]
    for restart in range(0xd0, 0xd8):  # markers, one of which would be the next
        bits = np.random.default_rng(restart).bytes(256).replace(b"\xff", b"")
        behind.append(bits + bytes([0xff, restart]) + bits)
    images = [Image.open(io.BytesIO(data + bits + b"\xff\xd9")) for bits in behind]
    if len(complete) < 64 * image.layers or len({each.tobytes() for each in images}) > 1:
        raise OSError("image file is truncated")
    return images[0]


def as_rgb(image):
    """Return a Pillow image as RGB, upright as its EXIF says, on white where it is transparent.

    Deep grey, one number a pixel: white is the least of 1, 255 and 65535 that no pixel exceeds.
    """
    with contextlib.suppress(Exception):  # damaged EXIF turns nothing
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        values = np.asarray(image, float)
        white = min((top for top in (1, 255, 65535) if values.max() <= top), default=math.nan)
        if not 0 <= values.min() <= white:
            raise ImageError(f"its values run from {values.min():g} to {values.max():g}, and may "
                             f"from 0 to 65535: save it with 8 bits")
        values = np.where(values == image.info.get("transparency"), white, values)
        image = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# --- CLIP and its towers --------------------------------------------------------------------

OPENAI_NAME = re.compile(r"openai[^/]*$|(vit-[bl]-|rn50|rn101)[^/]*\.pt$", re.IGNORECASE)

# Where open_clip's encoders and timm's trunks keep their blocks; the first that is there counts.
BLOCKS = ("transformer.resblocks", "transformer.encoder.layer", "transformer.encoder.block",
          "trunk.blocks", "trunk.stages", "trunk.layers", "layer1 layer2 layer3 layer4",
          "trunk.layer1 trunk.layer2 trunk.layer3 trunk.layer4")

# NumPy's numbers, which may lie beside the weights; NumPy 1 gives their maker another name.
NUMBERS = [np._core.multiarray.scalar, (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
           np.dtype, *{type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"}]


def load_clip(args, seed, content=None):
    """Build the CLIP with its weights; return (model in eval mode, tokenizer, identity).

    identity: what features and checkpoints depend on: model, hash of its weights, quick_gelu,
    preprocess. seed: of --pretrained none. QuickGELU is what the tag was trained with (open_clip
    only warns), what --quick_gelu or the model's config says. content: of the checkpoint that needs
    this CLIP: its weights must be the same; an exported one has them as well.
    """
    name, pretrained = args.clip_model, args.pretrained
    known, own = (content or {}).get("identity", {}), (content or {}).get("clip")
    from_file, random = os.path.isfile(pretrained) and not own, pretrained == "none" and not own
    torch.default_generator.manual_seed(seed)  # a CLIP is built on the CPU
    try:
        with quiet_library(), torch.serialization.safe_globals(NUMBERS):
            if not (from_file or random or name.startswith("local-dir:")):
                skip_unreachable_hub()
            config = open_clip.get_model_config(name)
            if config is None:
                near = difflib.get_close_matches(name, open_clip.list_models(), 3)
                raise ValueError(f"no such model; near names: {', '.join(near) or 'none'}")
            if args.image_size:
                config["vision_cfg"]["image_size"] = args.image_size
            tokenizer = open_clip.get_tokenizer(name)  # first: it may lack a package
            tag = known or open_clip.get_pretrained_cfg(name, pretrained) or {}
            quick_gelu = bool(args.quick_gelu or config.get("quick_gelu") or tag.get("quick_gelu"))
            place = not (from_file or random or own)  # which has the weights
            model = open_clip.create_model(
                name, pretrained if place else None, pretrained_text=random, load_weights=place,
                force_quick_gelu=quick_gelu, require_pretrained=place, force_custom_text=True,
                force_preprocess_cfg={"resize_mode": args.resize_mode} if args.resize_mode else {},
                **plain_attention(config))
            if own:
                model.load_state_dict(own)
            elif from_file:
                open_clip.load_checkpoint(model, pretrained)
    except Exception as error:  # open_clip, hub, pickle, zip, safetensors: each in its own ways
        raise clip_error(args, error, content) from error
    if random:
        print(f"WARNING: {name} starts from RANDOM weights (--pretrained none)")
    if from_file and not (known or quick_gelu) and OPENAI_NAME.search(pretrained):
        print(f"WARNING: {pretrained} is named like an OpenAI release, which needs QuickGELU: add "
              f"--quick_gelu unless you know better")
    weights = weights_hash(model.state_dict())
    if known and (known["weights"], known["quick_gelu"]) != (weights, quick_gelu):
        raise UserError(f"{content['path']} was trained from other weights than {name} "
                        f"({pretrained}) has now: say where they are with --clip_model.")
    return model.eval(), tokenizer, known or {
        "model": name, "pretrained": pretrained, "weights": weights,
        "quick_gelu": quick_gelu, "embed_dim": config["embed_dim"],
        "preprocess": model.visual.preprocess_cfg}


def weights_hash(state):
    """Return the SHA-256 of a state dict's names and values, in its order."""
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(key.encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def clip_error(args, error, content):
    """Return the UserError of a CLIP that cannot be loaded; content: see load_clip."""
    name, reason = args.clip_model, (str(error).strip() or repr(error)).splitlines()[0][:200]
    if isinstance(error, ImportError):
        reason += f": pip install {error.name}"
    if "TorchScript" in reason:
        reason = "it is TorchScript, as OpenAI's files are: give --pretrained openai"
    moved = (f" {content['path']} was trained from it: give its new place with --clip_model."
             if content else "")
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "it has none"
    return UserError(f"--clip_model {name} --pretrained {args.pretrained} cannot be loaded "
                     f"({reason}).{moved} The model is a name that open_clip knows, or "
                     f"local-dir:PATH with open_clip_config.json and weights; --pretrained is "
                     f"none, a file of its state dict (and --quick_gelu for an OpenAI release), "
                     f"or a tag ({tags}), which is downloaded once; or try --demo.")


def plain_attention(config):
    """Return what lets open_clip build its own transformers' attention of plain matrix products.

    They stay fast where they are frozen, and the keys of the state dict are the same.
    """
    vision, text, block = config["vision_cfg"], config["text_cfg"], {"block_type": "custom"}
    native = "timm_model_name" not in vision and isinstance(vision.get("layers", 12), int)
    return {"vision_cfg": block | vision if native else vision} | (
        {} if text.get("hf_model_name") else {"text_cfg": block | text})


def find_blocks(encoder):
    """Return an encoder's blocks or stages in the order in which they run, [] if unknown."""
    for names in BLOCKS:
        with contextlib.suppress(AttributeError):
            modules = [encoder.get_submodule(name) for name in names.split()]
            return list(modules[0]) if len(modules) == 1 else modules
    return []


class Reached(Exception):
    """The frozen prefix has run; args: what it gives to the blocks that train."""


class Tower:
    """One encoder, run as a frozen prefix whose output can be cached and a suffix that trains.

    Both are the encoder's own forward. The last frozen block ends the prefix with its output, and
    starts the suffix by returning what the prefix gave; the frozen blocks before it pass through
    then, so that one blank image (or the token ids) is enough to walk the embeddings. See walk.
    frozen: None (all trains), a number of blocks, or "all" (the boundary is the embedding then).
    The boundary is what prefix returns: (B, T, W) tokens, (B, 1, W) where only the pooled one goes
    on, (B, ..) of a convolution's stage, or (B, D) embeddings.
    """

    def __init__(self, encoder, example, frozen):
        """example: one image or text as the encoder takes it; its content does not matter."""
        self.encoder, self.blocks = encoder, find_blocks(encoder)
        encoder.register_buffer("example", example, persistent=False)  # so that it moves along
        self.frozen = min(frozen, len(self.blocks)) if isinstance(frozen, int) else frozen
        self.boundary, self.begin, self.end, self.pooled_at = None, 0, None, 0
        last = self.blocks[-1] if self.blocks else encoder
        # A causal text tower that pools at the end token reads nothing behind it.
        self.trims = (getattr(encoder, "attn_mask", None) is not None and encoder.cls_emb is None
                      and not encoder.use_pad_mask and encoder.pool_type in ("argmax", "eos"))
        if self.trims:  # open_clip does not cut the mask to the length of the texts
            encoder.transformer.register_forward_pre_hook(lambda _, args, kwargs: (args, {
                "attn_mask": kwargs["attn_mask"][:args[0].shape[1], :args[0].shape[1]]}),
                with_kwargs=True)
        first_token = (getattr(encoder, "pool_type", "") == "tok"
                       and getattr(encoder, "attn_pool", None) is None)
        self.pools_early = (self.trims or first_token) and isinstance(
            last, open_clip.transformer.CustomResidualAttentionBlock) and (
            last.attn.logit_scale is None and last.attn.head_scale is None)
        if self.pools_early:
            last.forward = functools.partial(self.pooled_forward, last)
        convolves = any(isinstance(module, nn.Conv2d) for module in last.modules())
        self.layout = torch.channels_last if convolves else torch.contiguous_format
        encoder.to(memory_format=self.layout)
        for i, block in enumerate(self.blocks[:self.frozen or 0] if self.frozen != "all" else ()):
            block.forward = functools.partial(self.gate, block.forward, i)

    def halves(self):
        """Return which parameters the suffix alone depends on, and what its activations take.

        A list of bool, by backward passes; the bytes that one of a single image or text needs, in
        float32. Raises UserError where the two halves are not the whole.
        """
        if self.frozen == "all":
            return [False for _ in self.encoder.parameters()], 0
        x = ids = self.encoder.example
        if x.is_floating_point():  # two pictures unlike the blank one that the suffix walks with
            x, ids = torch.rand(2, *x.shape[1:], generator=torch.Generator().manual_seed(0)), None
        parameters = [p for p in self.encoder.parameters() if p.requires_grad]
        with torch.no_grad():
            whole = self.encode(x)
        saved = {}

        def save(t):
            saved[t.untyped_storage()._cdata] = t
            return t
        with torch.enable_grad():
            boundary = self.prefix(x)
            with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
                out = self.suffix(boundary.detach(), ids)
        for weight in parameters:
            saved.pop(weight.untyped_storage()._cdata, None)
        before, after = (depends_on(y, parameters) for y in (boundary, out))
        if not torch.allclose(out, whole, atol=1e-4, equal_nan=True):
            raise UserError(f"--partial_freeze cannot split a {type(self.encoder).__name__} like "
                            f"this after block {self.frozen}: use --freeze_clip, or no freezing.")
        return ([parameter in after and parameter not in before
                 for parameter in self.encoder.parameters()],
                sum(t.untyped_storage().nbytes() for t in saved.values()) / len(x))

    def gate(self, run, i, x, *args, **kwargs):
        """Be the forward of the frozen block i (see the class); run: its own."""
        pooled = self.pools_early and i == len(self.blocks) - 1
        if i >= self.begin:
            x = run(x, *args, **kwargs)
        elif i == self.begin - 1:
            x = self.boundary.expand(-1, x.shape[1], -1) if pooled else self.boundary
        if i + 1 == self.end:
            raise Reached(x[:, :1] if pooled else x)
        return x

    def encode(self, x):
        """Return (B, D) unit-norm float32 embeddings by the encoder's own forward."""
        self.pooled_at = self.ends(x) if self.trims else 0
        out = self.encoder(x)
        return F.normalize((out[0] if isinstance(out, tuple) else out).float(), dim=-1)

    def walk(self, x, begin, end, ids=None):
        """Run the encoder from behind `begin` blocks, whose output x is, until behind `end`."""
        self.boundary = x = x.contiguous(memory_format=self.layout)
        self.begin, self.end = begin, end
        try:
            return self.encode(x if not begin else self.encoder.example if ids is None else ids)
        except Reached as reached:
            return reached.args[0]
        finally:
            self.boundary, self.begin, self.end = None, 0, None

    def prefix(self, x, begin=0):
        """Run what is frozen: returns the boundary; x itself where nothing is frozen.

        begin: how many blocks x is the output of, of an image tower.
        """
        return x if self.frozen is None else self.walk(x, begin, self.frozen)

    def suffix(self, boundary, ids=None):
        """Run what trains; returns (B, D) unit-norm embeddings. ids: (B, T) of a text tower."""
        if self.frozen == "all":
            return boundary
        return self.walk(boundary, self.frozen or 0, None, ids)

    def ends(self, ids):
        """Return (U,) the last place of each text that the tower reads; ids: (U, T)."""
        if not self.trims:
            return torch.full((len(ids),), ids.shape[1] - 1)
        eos = self.encoder.pool_type == "eos"
        return ((ids == self.encoder.eos_id).int() if eos else ids).argmax(dim=-1)

    def pooled_forward(self, block, x, attn_mask=None):
        """Be the forward of a last block that computes only the token that is pooled.

        Exact: keys and values need all tokens; query, projection and MLP one.
        """
        attn, width = block.attn, x.shape[-1]
        rows, at = torch.arange(len(x), device=x.device), self.pooled_at
        y = block.ln_1(x)
        weights, biases = (p.split([width, 2 * width])
                           for p in (attn.in_proj_weight, attn.in_proj_bias))
        query = F.linear(y[rows, at, None], weights[0], biases[0])
        key, value = F.linear(y, weights[1], biases[1]).chunk(2, dim=-1)
        query, key, value = (z.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
                             for z in (query, key, value))
        mask = None if attn_mask is None else attn_mask[at][:, None, None].to(query.dtype)
        out = F.scaled_dot_product_attention(attn.ln_q(query), attn.ln_k(key), value, mask)
        out = attn.out_proj(attn.ln_inner(out.transpose(1, 2).flatten(2)))
        one = x[rows, at, None] + block.ls_1(block.ln_attn(out))
        one = one + block.ls_2(block.mlp(block.ln_2(one)))
        return one.expand(-1, x.shape[1], -1)  # whichever token is pooled, it is this one

    def tune(self, args):
        """Recompute activations (--grad_checkpointing) or compile, block by block, what trains."""
        blocks = self.blocks or [self.encoder]
        for block in blocks[self.frozen or 0:] if self.frozen != "all" else []:
            if args.grad_checkpointing:  # torch compiles none of it
                block.forward = recomputed(block)
            elif args.compile:
                block.compile()

    def leave(self):
        """Free the GPU of what is frozen, whose outputs are cached: nothing runs it any more."""
        for module in [self.encoder] if self.frozen == "all" else self.blocks[:self.frozen]:
            module.cpu()


def depends_on(y, parameters):
    """Return the set of parameters that y depends on."""
    if not y.requires_grad:
        return set()
    grads = torch.autograd.grad(y.sum(), parameters, allow_unused=True)
    return {p for p, grad in zip(parameters, grads) if grad is not None}


def recomputed(block):
    """Return a block's forward whose activations are computed again in the backward pass."""
    norms = [m for m in block.modules() if getattr(m, "track_running_stats", False)]

    @contextlib.contextmanager
    def without_statistics():  # BatchNorm has counted this batch already
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:  # torch leaves by an exception where nothing more is needed
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)

    return functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=lambda: (
        contextlib.nullcontext(), without_statistics()))


def make_towers(clip, tokenizer, args, known):
    """Return {"image", "text"}: the Towers of a CLIP in eval mode, frozen as the flags say.

    known: {(tower, frozen): Tower.halves} of an equal CLIP, which grows.
    """
    frozen = "all" if args.freeze_clip else args.freeze_layers if args.partial_freeze else None
    towers, trained, pixels = {}, set(), torch.zeros(1, 3, *to_2tuple(clip.visual.image_size))
    for name, encoder, example in (("image", clip.visual, pixels),
                                   ("text", clip.text, tokenizer(["a"]))):
        depth = len(find_blocks(encoder))
        if args.partial_freeze and not depth:
            raise UserError(f"--partial_freeze needs to know a tower's blocks, but not those of "
                            f"the {name} tower of {args.clip_model} ({type(encoder).__name__}): "
                            f"use --freeze_clip, or no freezing.")
        if args.partial_freeze and name == "image" and frozen > depth:
            raise UserError(f"--freeze_layers must be at most {depth}, the depth of the image "
                            f"tower of {args.clip_model}, but is {frozen}: try "
                            f"--freeze_layers {max(1, depth * 3 // 4)}.")
        towers[name] = tower = Tower(encoder, example, frozen)
        if (name, frozen) not in known:
            known[name, frozen] = tower.halves()
        trains, tower.activations = known[name, frozen]
        trained.update(itertools.compress(encoder.parameters(), trains))
    for parameter in clip.parameters():  # logit_scale, CoCa's decoder: no part of a score
        parameter.requires_grad_(parameter in trained)
    return towers


# --- heads ----------------------------------------------------------------------------------

HIDDEN = 256  # width of the heads' hidden layer; wider heads did not score better


def mlp(inputs, dropout):
    """Return a one-hidden-layer perceptron to (B,) whose last layer starts at zero."""
    last = nn.Linear(HIDDEN, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.GELU(), nn.Dropout(dropout), last,
                         nn.Flatten(0))


def pair_features(f, t, s):
    """Return [f, t, s] as (B, 2 D + 1), f and t scaled to unit variance per entry."""
    scale = f.shape[-1] ** 0.5
    return torch.cat([f * scale, t * scale, s[:, None]], dim=-1)


class QualityHead(nn.Module):
    """Predict quality from the image alone: sigmoid(w . f + b), plus the residual if asked for.

    f: (B, D) unit-norm image embeddings. Returns (score, base, delta), each (B,) on the [0, 1]
    scale, delta in (-1, 1) before its scale; scores are not clamped.
    """

    def __init__(self, dim, args):
        super().__init__()
        self.input_scale = dim ** 0.5  # unit-norm entries are tiny; this makes them about 1
        self.base = nn.Linear(dim, 1)
        self.drop = nn.Dropout(args.dropout if args.no_residual_learning else 0.0)
        self.scale = 0.0 if args.no_residual_learning else args.residual_scale_q
        self.delta = mlp(dim, args.dropout) if self.scale else None

    def forward(self, f):
        x = f * self.input_scale
        base = torch.sigmoid(self.base(self.drop(x))).squeeze(-1)
        delta = torch.tanh(self.delta(x)) if self.scale else torch.zeros_like(base)
        return base + self.scale * delta, base, delta


class ConsistencyHead(nn.Module):
    """Predict consistency from both embeddings; its base is CLIP's own cosine, and the quality.

    base: a * (s0 + 1) / 2 + b' + e * q, or with two branches the mean of sigmoid(a * s0 + b' +
    e * q) and an MLP branch. People call a broken picture inconsistent, too, hence q; e starts at 0
    unless the base is calibrated. score: base + scale * tanh(MLP([f, t, s])), or without residual
    learning sigmoid(MLP([f, t, s])), or the two-branch base.
    f, t: (B, D) unit-norm; s, s0: (B,) their cosine, now and before training; q: (B,) detached
    quality scores. Returns (score, base, delta) as QualityHead.
    """

    def __init__(self, dim, args):
        super().__init__()
        self.scale = 0.0 if args.no_residual_learning else args.residual_scale_c
        self.affine = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))  # a, b', e
        self.branch = mlp(2 * dim + 1, args.dropout) if args.use_two_branch else None
        self.delta = mlp(2 * dim + 1, args.dropout) if self.scale or self.branch is None else None

    def forward(self, f, t, s, s0, q):
        x, (a, b, e) = pair_features(f, t, s), self.affine
        base = a * (s0 + 1) / 2 + b + e * q
        if self.branch is not None:
            base = (torch.sigmoid(a * s0 + b + e * q) + torch.sigmoid(self.branch(x))) / 2
        if self.scale:
            delta = torch.tanh(self.delta(x))
            return base + self.scale * delta, base, delta
        score = base if self.delta is None else torch.sigmoid(self.delta(x))
        return score, base, torch.zeros_like(base)


class Refinement(nn.Module):
    """Correct a detached coarse consistency by at most `scale`: a transformer over three tokens.

    f, t: (B, D) unit-norm; coarse: (B,). Returns (B,) refined scores.
    """

    def __init__(self, dim, args):
        super().__init__()
        width = args.refinement_dim
        self.input_scale, self.scale = dim ** 0.5, args.residual_scale_c
        self.image, self.text = nn.Linear(dim, width), nn.Linear(dim, width)
        self.score = nn.Linear(1, width)
        layer = nn.TransformerEncoderLayer(width, args.refinement_heads, 2 * width, args.dropout,
                                           activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, args.refinement_layers,
                                             enable_nested_tensor=False)
        self.correction = nn.Linear(width, 1)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def forward(self, f, t, coarse):
        coarse = coarse.detach()
        tokens = torch.stack([self.image(f * self.input_scale), self.text(t * self.input_scale),
                              self.score(coarse[:, None])], dim=1)
        last = self.encoder(tokens)[:, -1]
        return coarse + self.scale * torch.tanh(self.correction(last)).squeeze(-1)


class CLIPScorer(nn.Module):
    """CLIP's towers, frozen already, and the heads on top; identity: see load_clip."""

    def __init__(self, clip, towers, identity, args):
        super().__init__()
        self.clip, self.towers, self.identity = clip, towers, identity
        dim = identity["embed_dim"]
        for name in ("mean", "std"):
            value = torch.tensor(identity["preprocess"][name]).view(1, -1, 1, 1)
            self.register_buffer(f"pixel_{name}", value, persistent=False)
        self.quality, self.consistency = QualityHead(dim, args), ConsistencyHead(dim, args)
        self.refinement = Refinement(dim, args) if args.use_refinement else None
        self.explanation = nn.Sequential(nn.Dropout(args.dropout), nn.Linear(
            2 * dim + 1, dim)) if args.use_explanations else None

    def train(self, mode=True):
        """Switch to training mode; what is frozen stays in eval mode (BatchNorm, dropout)."""
        super().train(mode)
        for module in frozen_modules(self.clip):
            module.eval()
        return self

    def pixels(self, images):
        """Normalise (B, 3, H, W) uint8 images as open_clip does."""
        return (images.float() / 255 - self.pixel_mean) / self.pixel_std

    def score(self, f, t, s0=None):
        """Run the heads in float32 on (B, D) unit-norm embeddings; returns a dict of (B,) tensors.

        s0: (B,) cosines of the original views by the CLIP before training, None: those of f, t.
        q, c: scores, not clamped; q_base, c_base: what the base says; q_delta, c_delta: in
        (-1, 1); c_coarse: c before refinement; explanation: (B, D), where asked for.
        """
        s = (f * t).sum(dim=-1)
        out = dict(zip(("q", "q_base", "q_delta"), self.quality(f)))
        c = self.consistency(f, t, s, s if s0 is None else s0, out["q"].detach())
        out |= dict(zip(("c", "c_base", "c_delta"), c))
        if self.refinement is not None:
            out |= {"c_coarse": out["c"], "c": self.refinement(f, t, out["c"])}
        if self.explanation is not None:
            out["explanation"] = self.explanation(pair_features(f, t, s))
        return out

    def forward(self, image, text, ids, inverse, s0=None):
        """Score a batch from what lies at the freeze boundaries.

        image: (B, ..) of the image tower; text, ids: boundary and token ids of the batch's unique
        prompts; inverse: (B,) index into them; s0: see score.
        """
        f = self.towers["image"].suffix(image)
        t = self.towers["text"].suffix(text, ids)[inverse]
        with torch.autocast(f.device.type, enabled=False):
            return self.score(f, t, s0)

    def trained_state(self):
        """Return the state-dict entries that training changes: all but what is frozen."""
        frozen = {id(b) for module in frozen_modules(self.clip) for b in module.buffers()}
        frozen |= {id(p) for p in self.parameters() if not p.requires_grad}
        return {name: value for name, value in self.state_dict(keep_vars=True).items()
                if id(value) not in frozen}


def frozen_modules(module):
    """Yield the largest modules inside in which nothing trains.

    One without parameters (dropout, say) trains only where all of the module that it is in does.
    """
    for child in module.children():
        trains = [p.requires_grad for p in child.parameters()]
        if not any(trains):
            yield child
        elif not all(trains):
            yield from frozen_modules(child)


# --- losses and metrics ---------------------------------------------------------------------

METRICS = ("srocc", "plcc", "krocc", "rmse")
PREDICTIONS = ("q", "c", "q_base", "c_base", "q_delta", "c_delta")


def losses(out, batch):
    """Return {name: (B,) loss of each image}. A new one is a line here and its flag, --w_<name>.

    q, c: squared error on the [0, 1] scale; a refined consistency adds that of its coarse score.
    exp: 1 - cosine to the teacher's embedding of the row's explanation (see has_loss).
    """
    loss = {target: (out[target] - batch[target]) ** 2 for target in TARGETS}
    if "c_coarse" in out:
        loss["c"] = loss["c"] + (out["c_coarse"] - batch["c"]) ** 2
    if "explanation" in out:
        loss["exp"] = 1 - F.cosine_similarity(out["explanation"], batch["teacher"], dim=-1)
    return loss


def correlation(function, pred, mos):
    """Return a correlation over a whole split, NaN where either side is constant or not finite."""
    defined = len(pred) > 1 and np.isfinite(pred).all() and np.ptp(pred) > 0 and np.ptp(mos) > 0
    with warnings.catch_warnings(action="ignore"):  # of nearly constant predictions
        return float(function(pred, mos)[0]) if defined else math.nan


def metrics(pred, mos, targets=TARGETS):
    """Return {"srocc_q", "plcc_q", "krocc_q", "rmse_q", "srocc_c", ..}.

    Spearman, Pearson (raw, no logistic fit), Kendall's tau-b, and the root mean squared error on
    the [0, 1] scale. pred, mos: "q" and "c", each (n,). Rows whose MOS is NaN do not count; a
    target without any other is left out.
    """
    measured = {}
    for target in targets:
        x, y = (np.asarray(side[target], dtype=np.float64) for side in (pred, mos))
        x, y = x[~np.isnan(y)], y[~np.isnan(y)]
        if len(y):
            measured |= {f"srocc_{target}": correlation(scipy.stats.spearmanr, x, y),
                         f"plcc_{target}": correlation(scipy.stats.pearsonr, x, y),
                         f"krocc_{target}": correlation(scipy.stats.kendalltau, x, y),
                         f"rmse_{target}": float(np.sqrt(np.mean((x - y) ** 2)))}
    return measured


def plcc_fit(pred, mos):
    """Return the Pearson correlation after the field's 4-parameter logistic of the predictions.

    As VQEG's final report (2000) fits it: to these very scores, so it is at least the raw one where
    the fit succeeds; NaN where it does not. pred, mos: (n,).
    """
    def logistic(x, top, bottom, middle, width):
        return bottom + (top - bottom) * scipy.special.expit((x - middle) / width)
    first = mos.max(), mos.min(), pred.mean(), pred.std() + 1e-9
    try:
        with warnings.catch_warnings(action="ignore"):
            best = scipy.optimize.curve_fit(logistic, pred, mos, first, maxfev=10_000)[0]
    except (RuntimeError, TypeError, ValueError):  # no fit, too few images, or NaN
        return math.nan
    # The fit ends within 1e-8 of its best: the digits behind are not the same in every process.
    return round(correlation(scipy.stats.pearsonr, logistic(pred, *best), mos), 6)


def selected(args, targets):
    """Return those of some targets whose SROCC picks the best epoch: all that have a weight."""
    return [t for t in targets if args.select_by == TITLES[t]
            or (args.select_by == "mean" and getattr(args, f"w_{t}"))]


def selection_score(values, args, part=""):
    """Return the SROCC that picks the best epoch; the mean is over the targets with a weight.

    An undefined one counts as -1, the worst, beside another one; -inf if all are undefined.
    """
    sroccs = np.array([values[f"{part}srocc_{t}"] for t in selected(args, TARGETS)
                       if f"{part}srocc_{t}" in values], float)
    return -math.inf if np.isnan(sroccs).all() else float(np.nan_to_num(sroccs, nan=-1).mean())


# --- training -------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything that one training run needs; see set_up."""

    args: argparse.Namespace
    seed: int
    device: torch.device
    table: Table
    parts: dict  # {"train", "val", "test"} of row numbers
    identity: dict  # of the CLIP, see load_clip
    scorer: CLIPScorer
    model: nn.Module  # the scorer, in DistributedDataParallel where there are several processes
    images: "ImageInputs"
    texts: "TextInputs"
    mos: dict  # {"q", "c"} of (N,) scaled human MOS on the device, 0 where there is none
    s0: torch.Tensor  # (N,) cosines by the CLIP before training
    teacher: torch.Tensor | None  # (N, D) embeddings of the explanations, any where there is none
    floors: dict  # {name: {"q", "c"} of (N,) predictions}
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: dict  # of a checkpoint: epoch, best_epoch, best_score, log rows, epochs waited since
    # the score last beat the reference by --early_stopping_min_delta
    best: tuple | None = None  # what evaluate gave for val in the best epoch, if it was in this run


def head_lr(args):
    """Return the heads' peak learning rate; that of a CLIP would leave them where they began."""
    return args.head_lr or (args.lr if args.freeze_clip else max(args.lr, 1e-3))


def make_optimizer(scorer, args):
    """Return AdamW over CLIP and heads, which have rates of their own; only matrices decay."""
    groups = {}
    for name, parameter in scorer.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("clip."), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "base_lr": args.lr if of_clip else head_lr(args),
          "weight_decay": args.weight_decay if decays else 0.0}
         for (of_clip, decays), parameters in sorted(groups.items(), reverse=True)],
        lr=args.lr, fused=True)


def lr_factor(update, per_epoch, args):
    """Return the learning rate's factor for an optimiser update, counted from 0."""
    total = per_epoch * args.epochs
    warmup = round(args.warmup_ratio * total)
    if update < warmup:
        return (update + 1) / warmup
    done = (update - warmup) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2,
            "step": args.step_lr_gamma ** ((update - warmup) // per_epoch // args.step_lr_step_size)
            }[args.scheduler]


def inputs(run, batches):
    """Yield (rows, x, texts) of each batch of views, on the device, which waits for no copy.

    rows: (B,); x: what the image tower's suffix takes; texts: see TextInputs.stream.
    """
    rows = [views.row for views in batches]
    prompts = run.table.frame["prompt_id"].to_numpy()
    return zip(staged(rows, run.device), run.images.stream(batches),
               run.texts.stream([prompts[index] for index in rows]))


def forward(run, model, rows, x, texts):
    """Return the outputs of a model for what inputs yields."""
    with autocast(run.args, run.device):
        return model(x, *texts, run.s0[rows])


def targets_of(run, rows):
    """Return {"q", "c"[, "teacher"]} that the losses compare with; add your own column here."""
    batch = {target: run.mos[target][rows] for target in TARGETS}
    return batch if run.teacher is None else batch | {"teacher": run.teacher[rows]}


def has_loss(run, name, rows):
    """Return (n,) bool: which rows have what a loss needs."""
    frame = run.table.frame
    has = frame["explanation_id"] >= 0 if name == "exp" else frame[name].notna()
    return has.to_numpy()[rows]


def loss_weights(run, views):
    """Return {loss: (n,) weight of each view}: --w_<loss> / images of its update that have it.

    So a window of accumulated batches gives exactly the gradient of one big batch, also where the
    last window is shorter. DistributedDataParallel averages over processes, hence WORLD.
    """
    args, weights = run.args, {}
    window = np.arange(len(views)) // (args.batch_size * WORLD * args.grad_accum_steps)
    for name in [flag[2:] for flag in vars(args) if flag.startswith("w_")]:
        has = has_loss(run, name, views.row)
        images = np.maximum(1, np.bincount(window, has))[window]
        weights[name] = (getattr(args, f"w_{name}") * WORLD * has / images).astype(np.float32)
    return weights


def train_one_epoch(run, epoch):
    """Train for one epoch; returns its mean losses and running metrics (see epoch_summary)."""
    args, accumulate = run.args, run.args.grad_accum_steps
    views = plan_views(run.parts["train"], args, run.seed, epoch)
    steps = list(deal(np.arange(len(views)), args.batch_size))
    weights = {name: staged([weight[dealt] * kept for dealt, kept in steps], run.device)
               for name, weight in loss_weights(run, views).items()}
    updates, outputs = -(-len(steps) // accumulate), []
    on = torch.cuda if run.device.type == "cuda" else torch.default_generator
    run.scorer.train()
    run.optimizer.zero_grad(set_to_none=True)
    stream = zip(steps, inputs(run, [views[dealt] for dealt, _ in steps]))
    for i, ((dealt, kept), (rows, *x)) in enumerate(
            progress_bar(stream, f"epoch {epoch}", len(steps))):
        seed = ((run.seed * 100_003 + epoch) * 1_000_003 + i) + RANK * 2 ** 40
        on.manual_seed(seed % 2 ** 63)  # of dropout: a resumed run draws the same
        last = (i + 1) % accumulate == 0 or i + 1 == len(steps)
        run.model.require_backward_grad_sync = last  # of DistributedDataParallel
        targets = targets_of(run, rows)
        out = forward(run, run.model, rows, *x)
        loss = losses(out, targets)
        total = sum((value * weights[name][i]).sum() for name, value in loss.items())
        run.scaler.scale(total).backward()
        values = torch.stack([out["q"], out["c"], *loss.values()]).detach()
        outputs.append((dealt[kept > 0], values[:, :int(kept.sum())]))
        if last:
            update(run, lr_factor((epoch - 1) * updates + i // accumulate, updates, args))
    for value in run.scorer.trained_state().values() if WORLD > 1 else ():
        if not isinstance(value, nn.Parameter) and value.is_floating_point():
            dist.all_reduce(value)  # running statistics: their mean over processes
            value /= WORLD
    ends_well = any(gather(any(v.numel() and v.isfinite().all() for _, v in outputs[-3:])))
    return epoch_summary(run, views, everywhere(outputs), list(loss), ends_well)


def update(run, factor):
    """Clip the gradient and step the optimiser at factor times its peak learning rates."""
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    if run.args.max_grad_norm:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(parameters, run.args.max_grad_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)


def epoch_summary(run, views, outputs, names, ends_well):
    """Return {"loss", "loss_q", .., "srocc_q", ..} of an epoch's own outputs.

    outputs: places in views (n,); q, c and the losses `names` there, (2 + losses, n). Raises
    UserError where a loss is not finite; fp16's scaler skips an update that overflows, so there
    only an epoch that does not end well has failed.
    """
    args, frame, (places, values) = run.args, run.table.frame, outputs
    rows = views.row[places]
    bad = ~np.isfinite(values).all(axis=0)
    if bad.any() and not (run.scaler.is_enabled() and ends_well):
        images = frame["name"].iloc[rows[bad]]
        raise UserError(f"The loss must be finite, but it is not for {', '.join(images[:8])}"
                        f"{', ..' * (len(images) > 8)}: lower --lr or use --precision bf16 or "
                        f"fp32; the last good checkpoint is in {args.output_dir}.")
    means = {"exp": 0.0}
    for name, value in zip(names, values[2:]):
        if (has := has_loss(run, name, rows)).any():
            means[name] = float(value[has].mean())
    return {"loss": sum(getattr(args, f"w_{name}") * mean for name, mean in means.items()),
            **{f"loss_{name}": mean for name, mean in means.items()},
            **metrics(dict(zip(TARGETS, values)), frame.iloc[rows])}


def evaluate(run, part):
    """Predict a part's original views in eval mode; returns (predictions, metrics with "loss").

    predictions: a DataFrame of PREDICTIONS on the [0, 1] scale, its index the row numbers.
    """
    run.scorer.eval()
    rows, outputs = run.parts[part], []
    shares = list(deal(plan_views(rows), run.args.batch_size))
    stream = zip(shares, inputs(run, [views for views, _ in shares]))
    # Training steps are compiled; evaluation has shapes of its own, and scores as --predict does.
    with torch.inference_mode(), (torch.compiler.set_stance("force_eager") if run.args.compile
                                  else contextlib.nullcontext()):
        for (views, kept), x in progress_bar(stream, "evaluate", len(shares)):
            out = forward(run, run.scorer, *x)
            values = torch.stack([out[name] for name in PREDICTIONS])
            outputs.append((views.row[kept > 0], values[:, :int(kept.sum())]))
    places, values = everywhere(outputs)
    pred = pd.DataFrame(values.T, places, PREDICTIONS).loc[rows]
    blank = run.table.frame["prompt"].iloc[rows].str.strip() == ""
    pred.loc[blank.to_numpy(), ["c", "c_base"]] = np.nan
    measured = metrics(pred, run.table.frame.iloc[rows])
    loss = sum(getattr(run.args, f"w_{t}") * measured.get(f"rmse_{t}", 0.0) ** 2 for t in TARGETS)
    return pred, measured | {"loss": loss}


def fit(run):
    """Train from run.progress's epoch to the last one, keeping the best and the last checkpoint."""
    args, progress = run.args, run.progress
    patience = args.early_stopping_patience or math.inf
    with ThreadPoolExecutor(1) as disk:
        saved = disk.submit(int)  # nothing yet
        if "best_epoch" not in progress:  # epoch 0 is a candidate for the best
            floors = floor_metrics(run, "val")
            score = selection_score(floors["start"], args)
            progress |= {"best_epoch": 0, "best_score": score, "reference": score}
            saved = save(run, True, disk, saved)
            print_start(floors)
        while progress["epoch"] < args.epochs and progress["waited"] < patience:
            began, epoch = time.perf_counter(), progress["epoch"] + 1
            row = {f"train_{name}": value for name, value in train_one_epoch(run, epoch).items()}
            rate = len(run.parts["train"]) / (time.perf_counter() - began)
            pred, values = evaluate(run, "val")
            score = selection_score(values, args)
            better = score > progress["best_score"]
            if better:
                run.best = pred, values
            progress |= {"epoch": epoch, "waited": progress["waited"] + 1}
            if score > progress["reference"] + args.early_stopping_min_delta:  # small gains add up
                progress |= {"reference": score, "waited": 0}
            progress |= {"best_epoch": epoch, "best_score": score} if better else {}
            row |= {f"val_{name}": value for name, value in values.items()}
            row |= {"epoch": epoch, "best": progress["best_score"],
                    "lr": run.optimizer.param_groups[0]["lr"],  # of CLIP, or of the heads alone
                    "seconds": time.perf_counter() - began}
            progress["log"].append({name: row[name] for name in LOG_COLUMNS if name in row})
            saved = save(run, better, disk, saved)
            print_epoch(row, rate, better)
        saved.result()
    if progress["waited"] >= patience:
        print(f"early stopping: no gain of {args.early_stopping_min_delta:g} in "
              f"{progress['waited']} epochs")


# --- main flow ------------------------------------------------------------------------------


SHELF = {}  # what the runs of one command share: {(what, key): value}


def shared(what, keep, make, **key):
    """Return make(), or what it made for an equal key: repeats and tuning build nothing twice.

    keep: how many of this kind stay.
    """
    key = what, content_key(**key)
    if key not in SHELF:
        while len(alike := [old for old in SHELF if old[0] == what]) >= keep:
            del SHELF[alike[0]]  # before the new one needs the memory
        SHELF[key] = make()
    return SHELF[key]


def set_up(args, table, seed, content=None):
    """Build everything that one training run needs and print what will happen.

    seed: of split, heads, order; the CLIP's random weights (if any) follow args.seed, so that
    repeats share one CLIP and its cache. content: of the checkpoint that goes on, if any.
    """
    settle_precision(args)
    device = pick_device(args)
    parts = split_rows(table, args, seed)
    clip, tokenizer, identity, known = shared(
        "clip", 1, lambda: (*load_clip(args, args.seed, content), {}), seed=args.seed,
        content=content and (content["identity"], content["path"]),
        flags=[args.clip_model, args.pretrained, args.image_size, args.resize_mode,
               args.quick_gelu])
    clip = copy.deepcopy(clip, {
        id(p): nn.Parameter(p, p.requires_grad) for p in clip.parameters()})
    if WORLD > 1 and device.type == "cuda":  # statistics of the whole batch
        clip = timm.layers.convert_sync_batchnorm(clip)
    towers = make_towers(clip, tokenizer, args, known)
    for parameter in clip.parameters():  # what never changes is the shared one's memory
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
    torch.backends.cudnn.benchmark = towers["image"].layout == torch.channels_last  # fixed shapes
    torch.manual_seed(seed)
    scorer = CLIPScorer(clip, towers, identity, args).to(device).eval()
    print_setup(args, table, parts, scorer, device)
    key = {**identity, "precision": args.precision, "device": device.type}

    texts_of = functools.partial(TextInputs, towers["text"], tokenizer, key, args, device)
    teacher = None
    if args.use_explanations:
        rows = table.frame["explanation_id"].to_numpy(copy=True)  # -1, of none, is the last one's
        teacher = texts_of("explanations", table.explanations).embed()[rows].to(device)
    antonyms = texts_of("antonyms", ["Good photo.", "Bad photo."]).embed()
    images = ImageInputs(scorer, table, key, args, device)
    texts = texts_of("prompts", table.prompts, keep=True)
    floors, s0 = start(scorer, images, texts, antonyms, table, parts, args)
    for tower in towers.values():
        tower.tune(args)
    model = scorer if WORLD == 1 else nn.parallel.DistributedDataParallel(
        scorer, broadcast_buffers=False, find_unused_parameters=args.no_residual_learning)
    for source in (images, texts):  # not before: DistributedDataParallel wants one device
        if source.features is not None:
            source.tower.leave()
    mos = {target: torch.from_numpy(table.frame[target].fillna(0).to_numpy(copy=True)).to(device)
           for target in TARGETS}
    return Run(args, seed, device, table, parts, identity, scorer, model, images, texts, mos,
               s0, teacher, floors, make_optimizer(scorer, args),
               torch.amp.GradScaler(device.type, enabled=args.precision == "fp16"),
               {"epoch": 0, "waited": 0, "log": []})


def train_one_run(args, table, seed, content=None, brief=False):
    """Train one split, from a checkpoint's content if given; returns its row of results."""
    began = time.perf_counter()
    run = set_up(args, table, seed, content)
    write_config(run)
    if content is not None:
        resume(run, content)
    fit(run)
    preds, row = results(run, brief)
    row["seconds"] = round(time.perf_counter() - began, 1)
    keep_records(run, preds, row)
    return row


def train(args):
    """Train as the arguments say; returns the row of results that is also printed as JSON."""
    SHELF.clear()
    content = load_checkpoint(args.resume_from) if args.resume_from else None
    if content:
        take_over_settings(args, content)
    settle_precision(args)
    table = load_table(args)
    if len(set(gather(fingerprint(args, table)))) > 1:
        raise UserError("All processes must see the same data with the same flags, but they do "
                        "not: copy the CSV to every machine and give the same command on each.")
    several, last = args.tune or args.repeats > 1, Path(args.output_dir, "baseline_last.pt")
    with locked(args.output_dir):
        try:
            if several:
                return (tune if args.tune else train_repeats)(args, table)
            if not (content and os.path.samefile(Path(args.resume_from).parent, args.output_dir)):
                archive_old_run(args)
            row = train_one_run(args, table, content["seed"] if content else args.seed, content)
            append_run(args, row)
        except KeyboardInterrupt:
            if several or last.with_name("config.json").exists():  # it has begun to train
                again = not several and last.exists()
                print("\nstopped; go on with: python baseline.py",
                      f"--resume_from {shlex.quote(str(last))}" if again else args.command)
            raise
    return row


def main(argv=None, args=None):
    """Train or score as argv or parsed args say; returns the row of results, None after scoring.

    Errors of the user end with status 2; SIGINT and SIGTERM at once, with 130 and 143.
    """
    def stop(number, _frame):
        raise KeyboardInterrupt(number)

    args = args or parse_args(argv)
    caught = ((signal.SIGINT, signal.SIGTERM)
              if threading.current_thread() is threading.main_thread() else ())
    handlers = {number: signal.signal(number, stop) for number in caught}
    warnings.filterwarnings("ignore", module="PIL")  # load_image refuses what it must
    warnings.filterwarnings("ignore", "`broadcast_buffers`")  # torch < 2.14 has no other name
    try:
        with processes():
            row = (predict if args.predict else export if args.export else train)(args)
            if row is not None:
                print(json_text(row, indent=None))
    except UserError as error:
        let_rank_0_speak()
        sys.stdout.flush()
        print(f"baseline.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as stopped:
        raise SystemExit(128 + int((stopped.args or [signal.SIGINT])[0])) from stopped
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return row


# --- what the towers read -------------------------------------------------------------------

CACHE_VERSION = 3
MOST_SKIPPED = 0.05  # share of the images that --skip_bad_images leaves out at most


def plan_views(rows, args=None, seed=0, epoch=0):
    """Return a record for each view: row, flip, crop box (top, left, height, width in 0..1).

    Without args the original views in order; else an epoch's, in an order that depends on seed and
    epoch alone. Crops keep 90 to 100 % of the area at the original aspect ratio.
    """
    views = np.zeros(len(rows), dtype=[("row", int), ("flip", int), ("box", float, 4)])
    views["row"], views["box"][:, 2:] = rows, 1
    if args is not None:
        rng = np.random.default_rng([seed, 1, epoch])
        views["row"], flip = rng.permutation(rows), rng.random(len(rows)) < 0.5
        views["flip"] = flip & (args.augment != "none")
        if args.augment == "crop":
            side = np.sqrt(rng.uniform(0.9, 1.0, len(rows)))
            corner = rng.random((len(rows), 2)) * (1 - side[:, None])
            views["box"] = np.column_stack([corner, side, side])
    return views.view(np.recarray)


def deal(things, size):
    """Yield this process's share of each batch of `size` per process, and the share's weights.

    Shares are of equal length, so that all processes take the same steps: the first thing of the
    batch fills up, with weight 0.
    """
    for start in range(0, len(things), size * WORLD):
        batch = things[start:start + size * WORLD]
        share = np.arange(RANK, -(-len(batch) // WORLD) * WORLD, WORLD)
        yield batch[np.where(share < len(batch), share, 0)], (share < len(batch)).astype(np.float32)


def staged(arrays, device):
    """Return numpy arrays as tensors on a device, to which they go in one copy."""
    return torch.from_numpy(np.concatenate(arrays)).to(device).split([len(a) for a in arrays])


def augmented(images, views, flip):
    """Flip and crop (B, 3, H, W) images as their views say; crops are resized to the whole.

    flip: (B,) bool, that of the views on the device of the images.
    """
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    if (views.box[:, 2:] == 1).all():
        return images
    size, out = images.shape[-2:], []
    for image, box in zip(images, views.box):
        top, left, height, width = (round(part * side) for part, side in zip(box, (*size, *size)))
        part = image[None, :, top:top + max(1, height), left:left + max(1, width)].float()
        out.append(F.interpolate(part, size, mode="bicubic", antialias=True))
    return torch.cat(out).clamp(0, 255)


class Decoder:
    """Decode and preprocess images with open_clip's own transform, up to uint8.

    paths: N files; preprocess: open_clip's PreprocessCfg as a dict; pin: into page-locked memory. A
    call with B row numbers returns (B, 3, H, W) uint8, black where unreadable, and {row number:
    reason}.
    """

    def __init__(self, paths, preprocess, pin=False):
        transform = clip_transform.image_transform_v2(
            clip_transform.PreprocessCfg(**preprocess), is_train=False)
        self.steps = transform.transforms[:-2]  # to tensor and normalisation come later
        self.paths, self.size, self.pin = list(paths), to_2tuple(preprocess["size"]), pin

    def __call__(self, rows):
        shape, errors = (len(rows), 3, *self.size), {}
        images = torch.zeros(shape, dtype=torch.uint8, pin_memory=self.pin)
        for place, row in enumerate(rows):
            try:
                image = load_image(self.paths[row])
                for step in self.steps:
                    image = step(image)
                images[place] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            except ValueError as error:  # ImageError, or a side of 0 pixels after resizing
                errors[int(row)] = str(error)
        return images, errors

    def resize(self, images):
        """Resize and crop (B, 3, H, W) images in [0, 1] by the same steps, differentiably."""
        for step in self.steps:
            if isinstance(step, clip_transform.ResizeKeepRatio):  # it asks a picture for its size
                picture = argparse.Namespace(size=images.shape[:1:-1])
                size = step.get_params(picture, step.size, step.longest)
                step = torchvision.transforms.Resize(size, step.interpolation)
            images = step(images)
        return images.clamp(0, 1)


def tokenize(tokenizer, texts, what):
    """Return (U, T) token ids, and say once how many texts are longer than the text tower reads."""
    context = tokenizer.context_length
    ids = tokenizer([*texts, ""], context_length=8 * context)  # the last one ends in padding
    if longer := int((ids[:, context:] != ids[-1, -1]).any(dim=1).sum()):
        print(f"{longer} of {len(texts)} {what} are longer than {context} tokens: the text tower "
              f"reads their beginning only")
    return tokenizer(texts, context_length=context)


def ahead(function, items, threads, turns=False):
    """Yield function(item) in order; threads work ahead, by one item more than there are of them.

    At most one thread per core; Pillow and copies let the others run meanwhile. turns: they rest
    while the caller computes on the same cores, whose threads would have to wait for each other.
    """
    threads = min(threads, max(1, (os.cpu_count() or 1) // LOCAL_WORLD))
    if not threads:
        yield from map(function, items)
        return
    pool, pending = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == threads and turns:
                yield from [pending.popleft().result() for _ in range(threads)]
            elif len(pending) > threads + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def progress_bar(iterable, what, total):
    """Show a progress bar on a terminal, elsewhere a line a minute; rank 0 alone."""
    bar = tqdm(iterable, what, total, leave=False, disable=RANK > 0 or None)
    began = said = time.monotonic()
    for done, item in enumerate(bar, 1):
        yield item
        if bar.disable and (now := time.monotonic()) - said >= 60:
            said, rate = now, done / (now - began)
            print(f"{what}: {done} of {total}, {rate:.3g} a second, "
                  f"{tqdm.format_interval((total - done) / rate)} left", flush=True)


def autocast(args, device):
    """Return the autocast context of --precision; heads and losses leave it."""
    dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, args.precision != "fp32")


def content_key(**content):
    """Return a hash of everything that something depends on."""
    text = json.dumps({"version": CACHE_VERSION, **content}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def batches_of(count, size):
    """Return the row numbers of `count` rows in batches."""
    return np.split(np.arange(count), np.arange(size, count, size))


def cached(args, kind, key, batches, compute):
    """Return the memory-mapped (N, ..) array of a cache file, computing it where it is new.

    key: dict of everything that it depends on; batches: arrays of row numbers, in order; compute:
    function that yields a tensor for each of some of them. The processes of a machine share the
    work and the file, which gets its name when it is complete. Returns None with --cache off, or
    where the array does not fit --cache_max_gb or the disk, after saying so; raises UserError where
    the file cannot be written or a value is not finite.
    """
    if args.cache == "off":
        return None
    path, count = cache_path(args, kind, key), int(batches[-1][-1]) + 1
    array = open_cached(path, count)
    if all(gather(array is not None)):
        return array
    half = path.with_name(f".{path.name}.{gather(os.urandom(8).hex())[RANK - LOCAL_RANK]}")
    mine = batches[LOCAL_RANK::LOCAL_WORLD] or batches[:1]  # two may write the same
    computed = zip(mine, map(as_numpy, compute(mine)))
    with contextlib.ExitStack() as at_the_end:
        at_the_end.enter_context(must_write(path.parent, "another --cache_dir, or --cache off"))
        at_the_end.callback(half.unlink, missing_ok=True)
        rows, values = next(computed)
        fits = LOCAL_RANK > 0 or make_room(path, kind, count * values[0].nbytes, args)
        if LOCAL_RANK == 0 and fits:
            np.lib.format.open_memmap(half, "w+", values.dtype, (count, *values.shape[1:]))
        if not all(gather(fits)):
            return None
        begin = np.load(half, mmap_mode="r").offset
        with open(half, "r+b") as file:  # not by a memory map: a full disk would be a SIGBUS
            for rows, values in itertools.chain([(rows, values)], computed):
                file.seek(begin + rows[0] * values[0].nbytes)
                file.write(values)
        gather(None)
        if LOCAL_RANK == 0:
            half.replace(path)
        gather(None)
    return open_cached(path, count)


def cache_path(args, kind, key):
    """Return the cache file of what `key` says."""
    return Path(args.cache_dir, f"{kind}-{content_key(**key)}.npy")


def open_cached(path, count):
    """Return the memory-mapped array of a cache file, None where there is none of `count` rows."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    with contextlib.suppress(OSError):  # a cache that may only be read
        os.utime(path)  # the most recently used
    return array if array.shape[:1] == (count,) else None


def make_room(path, kind, size, args):
    """Delete the least recently used cache files until `size` bytes fit; return whether they do."""
    folder, limit = path.parent, args.cache_max_gb * 1e9
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for file in (*folder.glob("*.npy"), *folder.glob(".*.npy.*")):
        with contextlib.suppress(OSError):  # another run may have renamed or deleted it
            stat = file.stat()
            if file.suffix == ".npy" or time.time() - stat.st_mtime > 3600:  # of a killed run
                files.append((stat.st_mtime, stat.st_size, file))
    files.sort()
    while files and size <= limit < size + sum(used for _, used, _ in files):
        file = files.pop(0)[2]
        print(f"cache: removed {file.name}, the least recently used: see --cache_max_gb")
        with contextlib.suppress(OSError):
            file.unlink()
    fits = size <= min(limit, shutil.disk_usage(folder).free)
    if not fits:
        print(f"cache: going on without the {kind} cache, its {size / 1e9:.2f} GB exceed "
              f"--cache_max_gb {args.cache_max_gb:g} or the free disk space")
    return fits


def as_numpy(tensor):
    """Return a tensor as numpy, bfloat16 as int16; raise UserError where it is not finite."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise UserError(f"What is cached must be finite, but is not in {tensor.dtype}: use "
                        f"--precision bf16 or fp32, or other weights.")
    tensor = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return tensor.cpu().contiguous().numpy()


class Rows:
    """Rows of a cache: on the GPU where they fit into half of its free memory, else where they lie.

    Those that have yet to go to a GPU are read ahead by a thread, into page-locked memory. Beside
    the arithmetic of a CPU such a thread would cost more than it saves.
    """

    def __init__(self, array, device, args):
        with warnings.catch_warnings(action="ignore"):  # a read-only array may not be written to
            rows = torch.from_numpy(array)
        if rows.dtype == torch.int16:
            rows = rows.view(torch.bfloat16)
        if device.type == "cuda" and rows.nbytes <= torch.cuda.mem_get_info(device)[0] / 2:
            rows = rows.to(device)
        self.rows, self.device = rows, device
        self.behind = rows.device.type != device.type
        self.pin = self.behind and args.pin_memory

    def read(self, index):
        """Return the rows at (B,) positions, on the device that they lie on."""
        if not self.pin:
            return self.rows[index]
        out = torch.empty(len(index), *self.rows.shape[1:], dtype=self.rows.dtype, pin_memory=True)
        return torch.index_select(self.rows, 0, index, out=out)

    def stream(self, indices):
        """Yield the rows at each of several positions, on the device that computes."""
        indices = staged(indices, self.rows.device)
        for rows in ahead(self.read, indices, int(self.behind)):
            yield rows.to(self.device, non_blocking=True)


class ImageInputs:
    """What the image tower reads, at its freeze boundary.

    features: Rows (N * V, ..) of the boundary of each image's views; pixels: Rows (N, 3, H, W) of
    decoded uint8 images; both None: images are decoded anew.
    """

    def __init__(self, scorer, table, key, args, device):
        self.scorer, self.args, self.device = scorer, args, device
        self.tower, self.csv_rows = scorer.towers["image"], table.frame.index.to_numpy()
        self.decode = Decoder(table.frame["path"], key["preprocess"],
                              device.type == "cuda" and args.pin_memory)
        self.features = self.pixels = None
        self.flips = (False, True)[:1 + (args.augment == "flip")]
        self.key = {"identity": key, "files": table.frame[["path", "stamp"]].values.tolist()}
        batches = batches_of(len(self.csv_rows), 32)
        if self.tower.frozen is not None and args.augment != "crop":
            array = cached(args, "image", self.boundary_key(self.tower.frozen), batches,
                           self.boundaries)
            if array is not None:
                self.features = Rows(array.reshape(-1, *array.shape[2:]), device, args)
        if self.features is None:
            array = cached(args, "pixels", self.key | {"identity": key["preprocess"]}, batches,
                           lambda mine: progress_bar(self.images(mine), "decode", len(mine)))
            self.pixels = None if array is None else Rows(array, device, args)

    def images(self, batches):
        """Yield the decoded uint8 images of arrays of row numbers, on the CPU."""
        for images, errors in ahead(self.decode, batches, self.args.num_workers,
                                    self.device.type == "cpu"):
            for row, reason in errors.items():
                raise UserError(f"Every image must be readable, but {self.decode.paths[row]} (CSV "
                                f"row {self.csv_rows[row]}) is not ({reason}): replace the file, "
                                f"remove the row, or give --skip_bad_images.")
            yield images

    def boundary_key(self, depth):
        """Return what the cached boundaries behind `depth` frozen blocks depend on."""
        return self.key | {"boundary": depth, "views": len(self.flips)}

    def boundaries(self, batches):
        """Yield (B, V, ..) boundaries of all views of arrays of row numbers.

        They are computed from the deepest that are cached, those of another --freeze_layers.
        """
        depths = range(self.tower.frozen - 1, 0, -1) if self.tower.frozen != "all" else ()
        found = ((depth, open_cached(cache_path(self.args, "image", self.boundary_key(depth)),
                                     len(self.csv_rows))) for depth in depths)
        begin, known = next((each for each in found if each[1] is not None), (0, None))
        read = (Rows(known, self.device, self.args).stream(batches) if begin
                else self.images(batches))
        for x in progress_bar(read, "image features", len(batches)):
            x = x.to(self.device)
            views = x.unbind(1) if begin else [
                self.scorer.pixels(x.flip(-1) if flip else x) for flip in self.flips]
            yield torch.stack([boundary(self, view, begin) for view in views], dim=1)

    def stream(self, batches):
        """Yield the tower's input for each batch of views (see plan_views), on the device."""
        if self.features is not None:
            count = len(self.flips)
            yield from self.features.stream([v.row * count + v.flip * (count > 1) for v in batches])
            return
        rows = [views.row for views in batches]
        raw = self.images(rows) if self.pixels is None else self.pixels.stream(rows)
        flips = staged([views.flip > 0 for views in batches], self.device)
        for views, flip, images in zip(batches, flips, raw):
            images = augmented(images.to(self.device, non_blocking=True), views, flip)
            yield boundary(self, self.scorer.pixels(images))

    def embed(self):
        """Return (N, D) embeddings of all original views by the CLIP before training."""
        return embeddings(self, "image", len(self.csv_rows), lambda batches: (
            (x, None) for x in self.stream([plan_views(rows) for rows in batches])))


class TextInputs:
    """What the text tower reads for U unique texts, cut where no text goes on.

    what: the texts are, for messages; keep: whether the boundary is cached, as Rows in `features`.
    """

    def __init__(self, tower, tokenizer, key, args, device, what, texts, keep=False):
        self.tower, self.args, self.device = tower, args, device
        ids = tokenize(tokenizer, texts, what)
        self.ends = tower.ends(ids).numpy()
        self.ids, self.features = ids[:, :int(self.ends.max()) + 1].to(device), None
        self.key = {"identity": key, "ids": hashlib.sha256(ids.numpy()).hexdigest()}
        if keep and tower.frozen is not None:
            array = cached(args, "text", self.key | {"boundary": tower.frozen},
                           batches_of(len(ids), 64), lambda batches: (
                               boundary(self, self.ids[rows])
                               for rows in progress_bar(batches, what, len(batches))))
            self.features = None if array is None else Rows(array, device, args)

    def stream(self, indices):
        """Yield (boundary, ids, inverse) of the unique texts of each batch; indices: (B,) each."""
        unique, inverse = zip(*(np.unique(index, return_inverse=True) for index in indices))
        lengths = [int(self.ends[texts].max()) + 1 for texts in unique]
        read = itertools.repeat(None) if self.features is None else self.features.stream(unique)
        for texts, inverse, length, x in zip(staged(unique, self.device),
                                             staged(inverse, self.device), lengths, read):
            ids = self.ids[texts, :length]
            x = boundary(self, ids) if x is None else x
            if self.tower.trims and x.ndim == 3 and x.shape[1] > 1:  # all tokens, not the pooled
                x = x[:, :length]
            yield x, ids, inverse

    def embed(self):
        """Return (U, D) embeddings of all texts by the CLIP before training."""
        return embeddings(self, "text", len(self.ids), lambda batches: (
            texts[:2] for texts in self.stream(batches)))


@torch.no_grad()
def boundary(inputs, x, begin=0):
    """Run the frozen prefix on normalised images or token ids on the device; see Tower.prefix."""
    with autocast(inputs.args, inputs.device):
        return inputs.tower.prefix(x, begin)


def embeddings(inputs, what, count, read):
    """Return (count, D) embeddings by a tower as it is now, which is before training, on the CPU.

    inputs: ImageInputs or TextInputs; read: function that yields (boundary, ids or None) for each
    of several arrays of row numbers. They are cached, unless the features are (nearly) the same.
    """
    @torch.no_grad()
    def compute(batches):
        for x, ids in progress_bar(read(batches), f"{what} embeddings", len(batches)):
            with autocast(inputs.args, inputs.device):
                yield inputs.tower.suffix(x, ids).cpu()

    batches, array = batches_of(count, 64), None
    if inputs.features is None or (inputs.tower.frozen != "all" and what == "image"):
        array = cached(inputs.args, f"{what}-embedding", inputs.key, batches, compute)
    return torch.cat(list(compute(batches))) if array is None else torch.from_numpy(array.copy())


def drop_bad_images(frame, args):
    """Return (the rows that can be read, rows of skipped.csv): see --skip_bad_images."""
    mine = np.arange(len(frame))[RANK::WORLD] if args.skip_bad_images else ()
    decode = Decoder(frame["path"], vars(clip_transform.PreprocessCfg()))
    reading = ahead(lambda row: decode([row])[1], mine, args.num_workers)
    errors = gather([*progress_bar(reading, "reading every image", len(mine))])
    errors = sorted(error for each in itertools.chain(*errors) for error in each.items())
    bad = pd.DataFrame([(frame["name"].iloc[row], frame.index[row], why) for row, why in errors],
                       columns=["name", "row", "reason"])
    if len(bad) > MOST_SKIPPED * len(frame):
        first = ", ".join(f"{name} (CSV row {row}: {why})" for name, row, why in bad.values[:3])
        raise UserError(f"--skip_bad_images leaves out {MOST_SKIPPED:.0%} of the images at most, "
                        f"but {len(bad)} of {len(frame)} cannot be read: {first}"
                        f"{', ..' * (len(bad) > 3)}; check --image_base_dir and the files.")
    if args.skip_bad_images:
        print(f"{len(bad)} of {len(frame)} images cannot be read and are left out: skipped.csv")
    return frame.drop(index=bad["row"]), bad


# --- floors and calibration -----------------------------------------------------------------

RIDGE_STRENGTHS = tuple(10.0 ** k for k in range(-3, 5))
SHAPES = ("image_size", "freeze_clip", "partial_freeze", "freeze_layers",
          "no_residual_learning", "use_two_branch", "use_refinement", "refinement_layers",
          "refinement_heads", "refinement_dim", "use_explanations")  # flags that shape the model


def fit_ridge(x, free, rows, y, groups, folds=5):
    """Fit a ridge to some rows, its strength chosen by cross-validation over groups.

    x: (N, K), penalised; free: (N, F), not penalised; rows: (n,); y: (n,); groups: (n,) int.
    Returns (weights (K,), of free (F,), (n,) predictions of each row by a fit that did not see it).
    One eigendecomposition serves it all: a linear smoother H that does not see some rows errs there
    by (I - H)^-1 times its error with them, each restricted to these rows (as Hastie et al., The
    Elements of Statistical Learning, 2009, 7.10, for one row).
    """
    x, free, groups = x[rows], free[rows], np.unique(groups, return_inverse=True)[1]
    u, sizes, _ = torch.linalg.svd(free, full_matrices=False)
    u = u[:, sizes > 1e-9 * sizes[0]]
    inner, outer = x - u @ (u.T @ x), y - u @ (u.T @ y)
    wide = x.shape[0] < x.shape[1]
    values, vectors = torch.linalg.eigh(inner @ inner.T if wide else inner.T @ inner)
    z = vectors * values.clamp(min=0).sqrt() if wide else inner @ vectors
    fold = np.random.default_rng(0).permutation(groups.max() + 1)[groups] % folds
    held_out = [part for i in range(folds) if 0 < len(part := np.flatnonzero(fold == i)) < len(y)]
    best = math.inf, None
    for strength in RIDGE_STRENGTHS:
        shrunk = z / (values.clamp(min=0) + strength)  # H = u u^T + shrunk z^T
        error, unseen = outer - shrunk @ (z.T @ outer), y.mean().repeat(len(y))
        for part in held_out:
            h = u[part] @ u[part].T + shrunk[part] @ z[part].T
            unseen[part] = y[part] - torch.linalg.solve(torch.eye(len(h)).to(h) - h, error[part])
        if (loss := float(((unseen - y) ** 2).sum())) < best[0]:
            best = loss, (inner.T @ error / strength, unseen)
    weights, unseen = best[1]
    return weights, torch.linalg.pinv(free) @ (y - x @ weights), unseen


def training_scores(frame, target, train, like):
    """Return (row numbers of the training rows with a score, their MOS on [0, 1], their groups)."""
    rows = train[frame[target].iloc[train].notna()]
    mos = torch.from_numpy(frame[target].to_numpy(np.float64)[rows]).to(like.device)
    return rows, mos, frame["group_id"].to_numpy()[rows]


def fit_floors(f, t, antonyms, table, train, args):
    """Return {floor: {target: (N,) predictions}} of what is reached without training.

    f, t: (N, D) unit-norm embeddings of each row's image and prompt, by the pretrained towers;
    antonyms: (2, D) of "Good photo." and "Bad photo.", for the zero-shot quality (CLIP-IQA, Wang et
    al., AAAI 2023). The linear probe is a ridge on f for quality, on [f, t, f * t] for consistency,
    whose cosine is not penalised. A target is fitted to the training rows that have it.
    """
    frame, f, t, antonyms = table.frame, f.double(), t.double(), antonyms.double()
    s, probe = (f * t).sum(-1), {}
    constant = torch.ones_like(s)
    inputs = {"q": (f, constant[:, None]),
              "c": (torch.cat([f, t, f * t * f.shape[1] ** 0.5], 1), torch.stack([constant, s], 1))}
    for target in table.targets:
        x, free = inputs[target]
        weights, others, _ = fit_ridge(x, free, *training_scores(frame, target, train, f))
        probe[target] = x @ weights + free @ others
    zero_shot = {"q": torch.softmax(100 * f @ antonyms.T, dim=-1)[:, 0], "c": s}
    floors = {name: {target: pred[target].cpu().numpy() for target in table.targets}
              for name, pred in (("linear_probe", probe), ("zero_shot", zero_shot))}
    if args.split_by == "image":  # the training mean of the prompt: it sees no pixels
        mos = frame.iloc[train]
        means = mos.groupby("prompt_id")[list(table.targets)].mean().reindex(frame["prompt_id"])
        means = means.fillna(mos[list(table.targets)].mean())
        floors["prompt_mean"] = {target: means[target].to_numpy() for target in table.targets}
    return floors


def calibrate(scorer, f, t, s0, table, train):
    """Start the base where CLIP already is (linear probing first: Kumar et al., ICLR 2022).

    Quality: the sigmoid that has value and slope of a ridge on f where that gives the mean MOS, so
    that both rank alike. Consistency: least squares on the cosine and the quality of rows that the
    ridge did not see (stacking: Wolpert, 1992), so that one that knows its training rows by heart
    is not trusted too much; of two branches, on the logit that brings their mean to the MOS.
    Residuals that have learned already (--init_from) leave less MOS to fit.
    f, t: (N, D) embeddings; s0: (N,) cosines. A target without scores leaves its base as it is.
    """
    out, head, s = scorer.score(f, t, s0), scorer.consistency, (f * t).sum(-1)
    x, quality = f.double(), torch.zeros_like(s0, dtype=torch.float64)
    if "q" in table.targets:
        rows, mos, groups = training_scores(table.frame, "q", train, x)
        left = mos - (out["q"] - out["q_base"])[rows]
        weights, bias, unseen = fit_ridge(x, torch.ones_like(x[:, :1]), rows, left, groups)
        mean = left.mean().clamp(0.05, 0.95)
        slope, bias = 1 / (mean * (1 - mean)), bias - mean
        scorer.quality.base.weight.copy_((slope * weights / scorer.quality.input_scale)[None])
        scorer.quality.base.bias.copy_(torch.logit(mean) + slope * bias)
        quality = x @ weights + bias
        quality[rows] = unseen - mean
        quality = torch.sigmoid(torch.logit(mean) + slope * quality)
    if "c" in table.targets:
        rows, mos, _ = training_scores(table.frame, "c", train, x)
        left, cosine = mos - (out["c"] - out["c_base"])[rows], (s0 + 1) / 2
        if head.branch is not None:
            branch = torch.sigmoid(head.branch(pair_features(f, t, s)))[rows]
            left, cosine = torch.logit(2 * left - branch, 0.01), s0
        x = torch.stack([cosine.double(), torch.ones_like(quality), quality], dim=1)[rows]
        head.affine.copy_(torch.linalg.pinv(x) @ left)


@torch.no_grad()
def start(scorer, images, texts, antonyms, table, parts, args):
    """Bring the scorer to where training starts; returns (floors, (N,) cosines before training).

    See fit_floors; the start itself is one of them.
    """
    def embed():
        ids = table.frame["prompt_id"].to_numpy(copy=True)
        return images.embed().to(images.device), texts.embed()[ids].to(images.device)

    def untrained():
        f, t = embed()
        if not (f.isfinite().all() and t.isfinite().all()):
            raise UserError(f"The embeddings of {args.clip_model} must be finite, but are not in "
                            f"{args.precision}: use --precision fp32, or other weights.")
        return f, t, fit_floors(f, t, antonyms.to(images.device), table, parts["train"], args)

    f, t, floors = shared("untrained", 10, untrained, images=images.key, texts=texts.key,
                          by=args.split_by, data=data_hash(table), train=parts["train"].tolist())
    s0 = (f * t).sum(-1)
    if args.init_from:
        begin_from(scorer, load_checkpoint(args.init_from), (images, texts), table, parts, args)
        f, t = embed()
    if not args.no_base_calibration:
        calibrate(scorer, f, t, s0, table, parts["train"])
    if "q" not in table.targets:  # it stays 0.5, so that consistency takes no noise from it
        nn.init.zeros_(scorer.quality.base.weight)
        nn.init.zeros_(scorer.quality.base.bias)
    scores = scorer.score(f, t, s0)
    return {"start": {t: scores[t].cpu().numpy() for t in table.targets}} | floors, s0


def begin_from(scorer, source, inputs, table, parts, args):
    """Load the towers and heads that another run has trained, of the same CLIP and the same parts.

    source: of load_checkpoint; inputs: ImageInputs, TextInputs, whose embeddings become others.
    """
    differ = [f"--{key} {getattr(args, key)} (there {source['args'][key]})" for key in SHAPES
              if getattr(args, key) != source["args"][key]]
    there, here = ([identity[key] for key in ("weights", "quick_gelu")]
                   for identity in (source["identity"], scorer.identity))
    if differ or there != here:
        raise UserError(f"--init_from {args.init_from} needs the model that was trained there, but "
                        f"{', '.join(differ) or 'the weights of the CLIP'} differ: give the same.")
    load_trained_state(scorer, source["state"], args.init_from)
    trained = weights_hash(source["state"])
    for each in inputs:
        each.key = each.key | {"init_from": trained}
    for part in ("val", "test"):
        known = {*prompt_hashes(table, parts[part])} & {*source["prompts"]}
        if known:
            print(f"WARNING: --init_from leaks: {args.init_from} was trained on {len(known)} of "
                  f"the prompts in {part}; hold them out of that run as well (--split_column)")


# --- several processes ----------------------------------------------------------------------


@contextlib.contextmanager
def processes():
    """Be in torchrun's process group inside the block, where there is one; only rank 0 prints."""
    if WORLD == 1 or dist.is_initialized():
        if os.environ.get("WORLD_SIZE") not in (None, "", str(WORLD)):
            print(f"WARNING: going on alone: WORLD_SIZE counts beside {', '.join(TORCHRUN)} only")
        yield
        return
    if gpus := torch.cuda.device_count():
        if LOCAL_RANK >= gpus:
            raise UserError(f"Each process needs a GPU of its own, but there are {gpus} for "
                            f"{LOCAL_WORLD} processes: lower --nproc_per_node.")
        torch.cuda.set_device(LOCAL_RANK)
    nccl = gpus and dist.is_nccl_available()  # not on Windows
    torch._dynamo.config.optimize_ddp = False  # it cannot split recomputed blocks
    with contextlib.redirect_stdout(open(os.devnull, "w") if RANK else sys.stdout):
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
            yield
            gather(None)  # no early end makes torchrun stop one that still writes
        except (RuntimeError, ValueError) as error:
            if dist.is_initialized() and "by peer" not in str(error):
                raise
            raise UserError(f"Another process of this run has ended, or was not started by "
                            f"torchrun: see what it said ({str(error)[:99]}).") from error
    dist.destroy_process_group()


def gather(thing):
    """Return the list of what each process gives; waits for all of them."""
    things = [thing] * WORLD
    if WORLD > 1:
        dist.all_gather_object(things, thing)
    return things


def everywhere(outputs):
    """Return (rows (n,), values (M, n)) of all processes' steps, as numpy."""
    mine = [(rows, values.float().cpu().numpy()) for rows, values in outputs]
    rows, values = zip(*itertools.chain(*gather(mine)))
    return np.concatenate(rows), np.concatenate(values, axis=1)


def settle_precision(args, device=None):
    """Replace --precision auto by what the device does best; a checkpoint keeps what was asked."""
    args.asked_precision = getattr(args, "asked_precision", args.precision)
    if args.precision == "auto":
        cuda = device.type == "cuda" if device else torch.cuda.is_available()
        real = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if real else "fp16" if cuda else "fp32"


def pick_device(args):
    """Return the device to compute on, CUDA where there is one; a CPU is made fast."""
    if torch.cuda.is_available():  # fp32 is TF32 where the GPU has it; the probes are float64
        tf32 = args.precision == "fp32" and torch.cuda.is_tf32_supported()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        return torch.device("cuda")
    if other := torch.accelerator.current_accelerator(check_available=True):
        print(f"running on the CPU: on a GPU of type {other.type} the scores were never checked")
    # Backward, torch's fused kernel is up to four times slower in half precision than matrix
    # products that stay in it. These two are the CPU's as well.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    torch.backends.cuda.enable_flash_sdp(args.precision == "fp32")
    # Freed memory is kept, where the C library is glibc: new pages can take as long as arithmetic.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
    return torch.device("cpu")


# --- checkpoints and resume -----------------------------------------------------------------

FORMAT, FORMAT_VERSION = "baseline-aigiqa", 4
LOG_COLUMNS = ["epoch", "train_loss", "train_loss_q", "train_loss_c", "train_loss_exp", "val_loss",
               *(f"{part}_{metric}_{target}" for part in ("train", "val") for metric in METRICS
                 for target in TARGETS), "best", "lr", "seconds"]

# Flags that may differ from a checkpoint's when a run is resumed: they do not change the result.
FREE_FLAGS = {*DEPENDENT_FLAGS["predict",], "predict", "export", "checkpoint", "output_dir",
              "log_csv", "no_plots", "tensorboard", "resume_from", "repeats", "preset", "demo",
              "data_csv_path", "image_base_dir", "num_workers", "pin_memory", "compile", "no_amp",
              "cache", "cache_dir", "cache_max_gb", "command", "explicit", "asked_precision"}


@contextlib.contextmanager
def must_write(path, remedy="another folder"):
    """Turn a failure to write in the block into a UserError about path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} must be writable, but is not ({error}): free some space or give "
                        f"{remedy}; what was there before is untouched.") from error


@contextlib.contextmanager
def locked(folder):
    """Keep other runs out of a folder; the operating system ends the lock with its process."""
    folder, lock = Path(folder), filelock.FileLock(Path(folder, ".lock"))
    try:
        if RANK == 0:
            with must_write(folder):
                folder.mkdir(parents=True, exist_ok=True)
                Path(lock.lock_file).touch()
            lock.acquire(timeout=0)
            for place in ("", "repeat_*/", "tuning/", "tuning/*/repeat_*/"):
                for half in folder.glob(f"{place}.*.half"):
                    half.unlink()  # of killed runs
    except filelock.Timeout as error:
        raise UserError(f"Another run is writing to {folder}: wait for its end, or give another "
                        f"--output_dir.") from error
    except (OSError, NotImplementedError) as error:  # of a disk in the network, mostly
        print(f"WARNING: no lock keeps a second run out of {folder}: {error}")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes it by itself
            if lock.is_locked:
                os.unlink(lock.lock_file)
        lock.release()


@contextlib.contextmanager
def writing(path):
    """Yield a temporary path that replaces `path` when the block ends well, and is gone if not."""
    path = Path(path)
    half = path.with_name(f".{path.name}.{os.getpid()}.half")
    try:
        with must_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield half
            os.replace(half, path)
    finally:
        with contextlib.suppress(OSError):
            (shutil.rmtree if half.is_dir() else os.unlink)(half)


def description(run):
    """Return what a run is, which its checkpoints and config.json hold."""
    args, table = run.args, run.table
    flags = {name: value for name, value in vars(args).items() if name != "explicit"}
    return {"seed": run.seed, "args": flags | {"precision": args.asked_precision},
            "identity": run.identity, "split": split_hash(run), "targets": table.targets}


def on_the_cpu(value):
    """Return a copy of nested dicts and lists, their tensors on the CPU."""
    if isinstance(value, dict):
        return {key: on_the_cpu(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_the_cpu, value))
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def snapshot(run):
    """Return the content of a checkpoint: what was trained, and all that an exact resume needs."""
    return on_the_cpu(description(run) | {
        "format": FORMAT, "version": FORMAT_VERSION, "data": data_hash(run.table),
        "prompts": prompt_hashes(run.table, run.parts["train"]),
        "state": run.scorer.trained_state(), "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(), "progress": run.progress, "processes": WORLD})


def save(run, best, disk, before):
    """Let a thread, `disk`, write a snapshot; returns its future.

    before: that of the snapshot before, which is waited for: a kill costs one epoch at most.
    """
    before.result()  # raises what writing it has raised
    return disk.submit(write_checkpoint, run.args, snapshot(run), best) if RANK == 0 else before


def write_checkpoint(args, content, best):
    """Write a snapshot to baseline_last.pt, and then its log.

    best: whether it is baseline_best.pt as well, which is then the same file on disk. That one gets
    its name first: killed in between, the run repeats the epoch, and finds the same again.
    """
    last, top = (Path(args.output_dir, f"baseline_{name}.pt") for name in ("last", "best"))
    with writing(top if best else last) as half:
        try:
            torch.save(content, half)
        except RuntimeError as error:  # torch does not say why it cannot write: the disk does
            with open(half, "ab") as file:
                file.write(bytes(2 ** 20))
            raise OSError(str(error).splitlines()[0]) from error
        with open(half, "r+b") as file:
            os.fsync(file.fileno())
    if best:
        with writing(last) as half:
            try:
                os.link(top, half)
            except OSError:  # a disk that knows no second names
                shutil.copyfile(top, half)
    if content["progress"]["log"]:
        write_log(args, content["progress"]["log"])


def save_text(path, text):
    """Write a text file, by rank 0 alone."""
    if RANK == 0:
        with writing(path) as half:
            half.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def write_log(args, rows):
    """Write the log: one row per epoch, the rows that the checkpoint also holds."""
    log = pd.DataFrame(rows, columns=LOG_COLUMNS)
    save_text(Path(args.output_dir, args.log_csv), log.to_csv(index=False))


def split_hash(run):
    """Return a short hash of which image name is in which part."""
    names = run.table.frame["name"].to_numpy()
    return content_key(parts={part: names[rows].tolist() for part, rows in run.parts.items()})[:12]


def prompt_hashes(table, rows):
    """Return a short hash of each prompt of some rows; case and spacing make no difference."""
    return [content_key(prompt=text)[:12] for text in folded(table.frame["prompt"].iloc[rows])
            .unique()]


@functools.cache  # every checkpoint asks
def data_hash(table):
    """Return a hash of images' names, prompts, explanations and scaled MOS."""
    data = table.frame.drop(columns=["path", "stamp", "group_id"]).to_csv()
    return hashlib.sha256(data.encode()).hexdigest()


def read_export(folder):
    """Return what export wrote as a checkpoint's content, and "clip": the CLIP before training."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = (folder / "model.safetensors").read_bytes()
    if content.get("sha256") != hashlib.sha256(weights).hexdigest():
        raise ValueError("the checksum of its model.safetensors is not that of its config.json")
    content["args"]["clip_model"] = f"local-dir:{folder}"
    tensors = sorted(safetensors.torch.load(weights).items())  # they come in any order
    return content | {part: {key.removeprefix(f"{part}."): value for key, value in tensors
                             if key.startswith(f"{part}.")} for part in ("clip", "state")}


def load_checkpoint(path):
    """Return a checkpoint's content, tensors and plain values; raise UserError if it is none.

    path: a file of a run, a folder of --export, or hf-hub:ORG/NAME where one has been uploaded.
    """
    name, path = str(path), Path(path)
    try:
        if name.startswith("hf-hub:"):
            skip_unreachable_hub()
            path = Path(huggingface_hub.snapshot_download(name.removeprefix("hf-hub:")))
        if path.is_dir():
            content = read_export(path)
        else:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch itself does not look at the checksums
                    raise ValueError(f"it is damaged: the checksum of {damaged} in it is wrong")
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("it is a file of another program")
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"it has version {content['version']}, this baseline.py reads "
                             f"{FORMAT_VERSION}: use the one that wrote it, whose commit is in its "
                             f"config.json, or train again")
        if "scales" in content:  # of an older run: high - low, and perhaps low apart
            lows = {t: content.get("offsets", {}).get(t, 0.0) for t in TARGETS}
            content["targets"] = {t: (lows[t], lows[t] + content["scales"][t])
                                  for t in content.get("targets", TARGETS)}
        content["args"].setdefault("image_size", None)
        content.setdefault("prompts", [])
        return content | {"path": name}
    except Exception as error:  # zip, pickle and tensor errors all mean the same to a user
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        beside = [other for other in path.parent.glob("baseline_*.pt")
                  if not path.is_file() or not other.samefile(path)]
        raise UserError(f"{name} cannot be used as a checkpoint of baseline.py ({reason}): give a "
                        f"baseline_last.pt, a baseline_best.pt or a folder of --export"
                        + (f", like {beside[0]}" if beside else "")) from error


def take_over_settings(args, content):
    """Take every flag that the command line does not name from the checkpoint.

    A named flag that would change the result is an error; --clip_model and --pretrained may say
    where the same weights lie now. The images per update stay with any number of processes, in the
    largest batches not above the checkpoint's.
    """
    saved, path = content["args"], args.resume_from
    if "optimizer" not in content:
        raise UserError(f"{path} has no optimiser to go on with: give a baseline_last.pt.")
    window = content["processes"] * saved["batch_size"] * saved["grad_accum_steps"]
    sizes = [size for size in range(1, saved["batch_size"] + 1) if window % (size * WORLD) == 0]
    if not sizes:
        raise UserError(f"A resumed run must keep the {window} images per update of {path}: use a "
                        f"number of processes that divides them.")
    saved |= {"batch_size": sizes[-1], "grad_accum_steps": window // (sizes[-1] * WORLD)}
    clash = [f"--{key} {getattr(args, key)} (checkpoint: {saved[key]})"
             for key in sorted(args.explicit - FREE_FLAGS - {"clip_model", "pretrained"})
             if key in saved and getattr(args, key) != saved[key]]
    if clash:
        raise UserError(f"A resumed run must keep the settings of {path}, but the command line "
                        f"has {', '.join(clash)}: drop these flags, or start a new run.")
    folder = args.output_dir if "output_dir" in args.explicit else str(Path(path).parent)
    saved |= {"output_dir": folder, "cache_dir": str(Path(folder, "cache")), "repeats": 1}
    vars(args).update({key: value for key, value in saved.items() if key not in args.explicit})


def load_trained_state(scorer, state, path):
    """Load what was trained into a freshly built scorer; raise UserError where it does not fit."""
    wanted, given = ({(name, *value.shape) for name, value in tensors.items()}
                     for tensors in (scorer.trained_state(), state))
    if wrong := {name for name, *_ in wanted ^ given}:
        raise UserError(f"{path} must hold the trained weights of this model, but {min(wrong)} "
                        f"(and {len(wrong) - 1} more) differ: it is from another model.")
    scorer.load_state_dict(state, strict=False)


def resume(run, content):
    """Bring a set-up run to where the checkpoint was; its tensors leave the content."""
    path = run.args.resume_from
    if (content["split"], content["data"]) != (split_hash(run), data_hash(run.table)):
        raise UserError(f"{path} was trained on another split of the data, or other scores or "
                        f"prompts: resume with the same CSV.")
    load_trained_state(run.scorer, content.pop("state"), path)
    run.optimizer.load_state_dict(content.pop("optimizer"))
    if content["scaler"]:  # else it was trained in another precision
        run.scaler.load_state_dict(content["scaler"])
    run.progress.update({"reference": content["progress"]["best_score"]} | content["progress"])
    best, kept = (Path(folder, "baseline_best.pt") for folder in (
        Path(path).parent, run.args.output_dir))
    if not best.exists() and run.progress["epoch"] != run.progress["best_epoch"]:
        raise UserError(f"{path} needs {best} beside it, which holds the best epoch so far: put it "
                        f"back, or train again.")
    best = best if best.exists() else Path(path)
    if RANK == 0 and not (kept.exists() and kept.samefile(best)):
        with writing(kept) as half:
            shutil.copyfile(best, half)
    write_log(run.args, run.progress["log"])
    print(f"resumed {path} after epoch {run.progress['epoch']}")


def skip_unreachable_hub():
    """Let the hub's library use its cache at once where HF_ENDPOINT cannot be reached."""
    hub = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    if not urllib.request.getproxies():
        try:
            socket.create_connection((hub.hostname, hub.port or hub.scheme), timeout=10).close()
        except OSError:
            huggingface_hub.constants.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def quiet_library():
    """Silence open_clip's own log lines and warnings in the block: ours say what matters."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


# --- results and records --------------------------------------------------------------------

TITLES = {"q": "quality", "c": "consistency"}
FLOORS = {"baseline": "the flow's baseline", "start": "start", "linear_probe": "linear probe",
          "zero_shot": "zero-shot", "prompt_mean": "prompt mean (no pixels)"}
SHOWN = ("srocc_q", "plcc_q", "srocc_c", "plcc_c")
SATURATED = 0.95  # |tanh(delta)| above this is at its bound

# Lower edges of SROCC and upper edges of the Train-Val Gap, best tier first.
TIERS = {
    "q": (("excellent", 0.90, 0.02), ("good", 0.87, 0.03), ("fair", 0.85, 0.05)),
    "c": (("excellent", 0.88, 0.02), ("good", 0.85, 0.03), ("fair", 0.82, 0.05)),
}


def split_name(args):
    """Return what the split is by."""
    return args.split_column or args.group_column or args.split_by


def step_memory(scorer, args):
    """Return the bytes of weights, gradients, AdamW's two moments and activations of a step.

    Half precision takes 0.7 of float32's activations: its normalisation stays in float32.
    """
    weights = sum(p.nbytes for p in scorer.parameters())
    trained = sum(p.nbytes for p in scorer.parameters() if p.requires_grad)
    activations = args.batch_size * sum(tower.activations for tower in scorer.towers.values())
    return weights + 3 * trained + activations * (1 if args.precision == "fp32" else 0.7)


def print_setup(args, table, parts, scorer, device):
    """Print what the run is about to do."""
    by, groups, prompts = split_name(args), table.frame["group_id"], sum(map(bool, table.prompts))
    counts = ", ".join(f"{len(rows)} {part}" for part, rows in parts.items() if len(rows))
    print(f"data: {len(groups)} images, {prompts} prompts, split by {by}: {counts}; label scales "
          + ", ".join(f"{t.upper()} {ends[1]:g} (largest MOS "
                      f"{to_mos(float(table.frame[t].max()), ends):.4g})"
                      for t, ends in table.targets.items()))
    if by == "prompt" and groups.max() >= 0.9 * len(groups):
        print(f"nearly every prompt is unique ({prompts} prompts, {len(groups)} images), so this "
              f"is nearly a split by image: --group_column names what else must stay together")
    for part in ("val", "test"):
        if leaks := groups.iloc[parts[part]].isin(groups.iloc[parts["train"]]).sum():
            print(f"WARNING: the split by {by} leaks: {leaks} of {len(parts[part])} {part} images "
                  f"have a {args.group_column or 'prompt'} that training images have")
    for name, tower in scorer.towers.items():
        sizes, trains = np.array([(p.numel(), p.requires_grad)
                                  for p in tower.encoder.parameters()]).T
        depth = len(tower.blocks) or "all as one"
        frozen = {None: 0, "all": depth}.get(tower.frozen, tower.frozen)
        print(f"{name} tower: {frozen} of {depth} blocks frozen, {sizes @ trains / 1e6:.2f} M of "
              f"{sizes.sum() / 1e6:.2f} M parameters train")
    heads = sum(p.numel() for n, p in scorer.named_parameters() if not n.startswith("clip."))
    tf32 = " as TF32" * (device.type == "cuda" and torch.get_float32_matmul_precision() == "high")
    several = f"; {WORLD} processes, {WORLD * args.batch_size} images per step" * (WORLD > 1)
    print(f"heads: {heads / 1e6:.2f} M parameters; device {device}, {args.precision}{tf32}, lr "
          f"{args.lr:g} (heads {head_lr(args):g}){several}")
    if device.type == "cuda":
        print(f"GPU memory of a step: about {step_memory(scorer, args) / 1e6:.0f} MB, and what is "
              f"cached where it fits")
    depth = len(scorer.towers["image"].blocks)
    print_advice(args, settings_advice(args, len(parts["train"]), depth, table.targets))
    if (args.use_two_branch or args.use_refinement) and not args.no_residual_learning:
        print("WARNING: --use_two_branch and --use_refinement together with residual learning are "
              "not recommended by the reference card; they work")


def print_start(floors):
    """Print validation's SROCC before training and of its other floors; see floor_metrics."""
    targets = [t for t in TARGETS if f"srocc_{t}" in floors["start"]]
    print(f"epoch   0  val SROCC {' / '.join(map(str.upper, targets))}:", "; ".join(
        f"{FLOORS[name]} " + " / ".join(f"{of[f'srocc_{t}']:.4f}" for t in targets)
        for name, of in floors.items()))


def print_epoch(row, rate, better):
    """Print one line per epoch, training / validation; rate: images per second of training."""
    targets = [t for t in TARGETS if f"val_srocc_{t}" in row]
    sroccs = "".join(f"SROCC_{t.upper()} {row[f'train_srocc_{t}']:.4f} / "
                     f"{row[f'val_srocc_{t}']:.4f}  " for t in targets)
    print(f"epoch {row['epoch']:3d}  loss {row['train_loss']:.4f} / {row['val_loss']:.4f}  "
          f"{sroccs}lr {row['lr']:.1e}  {rate:.0f} images/s{'  best' * better}", flush=True)
    for t in targets:
        if math.isnan(row[f"val_srocc_{t}"]):
            print(f"  SROCC_{t.upper()} is undefined: all predictions or human scores are equal "
                  f"(--select_by can leave it out)")


def floor_metrics(run, part):
    """Return {floor: metrics} on one part of the split."""
    rows = run.parts[part]
    return {name: metrics(pd.DataFrame(floor).iloc[rows], run.table.frame.iloc[rows],
                          run.table.targets) for name, floor in run.floors.items()}


def weighted_srocc(x, y, times):
    """Return the (draws,) SROCC of x and y, (n,), in samples that have row i times[:, i] times."""
    def ranks(values):  # equal ones share theirs; minus the sample's mean
        _, value, sizes = np.unique(values, return_inverse=True, return_counts=True)
        rows = times[:, np.argsort(value, kind="stable")]
        alike = np.add.reduceat(rows, np.cumsum(sizes) - sizes, axis=1)
        rank = (np.cumsum(alike, axis=1) - alike / 2)[:, value]
        return rank - (times * rank).sum(axis=1, keepdims=True) / times.sum(axis=1, keepdims=True)

    a, b = ranks(x), ranks(y)
    with np.errstate(invalid="ignore"):
        return (times * a * b).sum(axis=1) / np.sqrt((times * a * a).sum(axis=1)
                                                     * (times * b * b).sum(axis=1))


def bootstrap(preds, mos, groups, draws=1000):
    """Return a DataFrame (draws, names) of SROCC of several predictions, by bootstrap over prompts.

    Images of one prompt are not independent, so prompts are drawn, not images (cluster bootstrap:
    Davison and Hinkley, 1997). preds: {name: (n,)}; mos, groups: (n,). A constant draw has none,
    and a single prompt has no spread: all NaN.
    """
    rng, groups = np.random.default_rng(0), np.unique(groups, return_inverse=True)[1]
    count, sroccs = groups.max() + 1, pd.DataFrame(math.nan, range(draws), list(preds))
    drawn = np.array([np.bincount(rng.integers(count, size=count), minlength=count)
                      for _ in range(draws)], float)
    blocks = np.array_split(drawn, math.ceil(draws * len(groups) / 1e6))  # 8 MB each
    for name, x in preds.items() if count > 1 else ():
        if np.isfinite(x).all():
            sroccs[name] = np.concatenate([weighted_srocc(x, mos, block[:, groups])
                                           for block in blocks])
    return sroccs


def results(run, brief=False):
    """Evaluate the best epoch on every part; returns ({part: predictions}, the row of results).

    brief: not on the training part, so that there is no Train-Val Gap, tier or diagnosis.
    The row is flat: {"val_srocc_q", ..}; floors, intervals and gains are of the judged part, test
    where there is one. It is what result.json, runs.csv, the table and the repeats have.
    """
    args, frame, best = run.args, run.table.frame, Path(run.args.output_dir, "baseline_best.pt")
    if RANK == 0:
        load_trained_state(run.scorer, load_checkpoint(best)["state"], best)
    for value in run.scorer.trained_state().values() if WORLD > 1 else ():
        dist.broadcast(value.detach(), 0)
    tested = frame[list(run.table.targets)].iloc[run.parts["test"]].count()
    judged, preds = "test" if tested.min() > 1 else "val", {}
    row = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "command": args.command, "seed": run.seed,
           "split": split_hash(run), "part": judged, "best_epoch": run.progress["best_epoch"],
           "epochs_run": run.progress["epoch"], "output_dir": args.output_dir,
           "blocks": len(run.scorer.towers["image"].blocks),
           "checkpoint": str(best)}
    measured, start = floor_metrics(run, judged), floor_metrics(run, "val")["start"]
    for part, rows in run.parts.items():
        row[f"images_{part}"] = len(rows)
        if len(rows) and not (brief and part == "train"):
            preds[part], measured[part] = (part == "val" and run.best) or evaluate(run, part)
    row |= {f"{name}_{metric}": value for name, values in measured.items()
            for metric, value in values.items() if metric != "loss"}
    for t in run.table.targets:
        pred = preds[judged][frame[t].iloc[run.parts[judged]].notna().to_numpy()]
        srocc, rows = row[f"val_srocc_{t}"], pred.index.to_numpy()
        epochs = [start[f"srocc_{t}"], *(epoch[f"val_srocc_{t}"] for epoch in run.progress["log"])]
        row |= {f"best_epoch_{t}": int(np.argmax(np.nan_to_num(epochs, nan=-2))),
                f"plcc_fit_{t}": plcc_fit(pred[t].to_numpy(), frame[t].to_numpy()[rows])}
        if "train" in preds:
            row[f"gap_{t}"] = gap = row[f"train_srocc_{t}"] - srocc
            row[f"tier_{t}"] = next((name for name, low, high in TIERS[t]
                                     if srocc > low and gap < high), "needs work")
        if not args.no_residual_learning:
            size = pred[f"{t}_delta"].abs()
            row |= {f"saturated_{t}": float((size > SATURATED).mean()),
                    f"largest_delta_{t}": float(size.max())}
        drawn = bootstrap({"run": pred[t]} | {name: of[t][rows] for name, of in run.floors.items()},
                          *frame[[t, "group_id"]].to_numpy()[rows].T)
        if (drawn.drop(columns="run").quantile(0.975) < 0).any():
            print(f"{TITLES[t]}: the SROCC of a floor is clearly below 0: higher scores must be "
                  f"better; turn DMOS round (its maximum minus each)")
        row |= intervals(drawn, t) | {
            f"gain_{name}_{t}": row[f"{judged}_srocc_{t}"] - row[f"{name}_srocc_{t}"]
            for name in run.floors}
    return preds, row


def intervals(drawn, t):
    """Return {"interval_<t>_low", .., "gain_<floor>_<t>_high"}, 95 % each, of bootstrap's draws.

    drawn: of "run" and of each floor, which are paired.
    """
    gains = drawn.drop(columns="run").rsub(drawn["run"], axis=0).add_prefix("gain_")
    ends = gains.assign(interval=drawn["run"]).quantile([0.025, 0.975])
    return {f"{name}_{t}_{end}": value for name in ends
            for end, value in zip(("low", "high"), ends[name])}


def score_table(rows):
    """Return the table of floors and runs as a DataFrame of text, mean +- SD of several rows."""
    frame, cells = pd.DataFrame(rows), {}
    names = FLOORS | {frame["part"][0]: "this run"}
    for metric, (name, title) in itertools.product(SHOWN, names.items()):
        if (key := f"{name}_{metric}") in frame:
            values = pd.to_numeric(frame[key])
            spread = f" +- {values.std():.4f}" * (len(values) > 1)
            cells.setdefault(metric.upper(), {})[title] = f"{values.mean():.4f}{spread}"
    return pd.DataFrame(cells)


def verdict(row):
    """Return the lines below the table: gains over the floors, and of one run gap and tier."""
    def interval(key, form):
        low, high = row[f"{key}_low"], row[f"{key}_high"]
        return "no interval" if math.isnan(low) else f"{low:{form}}..{high:{form}}"

    def gain(key):
        return f"{row[key]:+.4f} " + (f"({interval(key, '+.4f')})" if f"{key}_low" in row
                                      else f"+- {row['sd'][key]:.4f}")  # over seeds

    how, lines = "95 %" if any(key.endswith("_low") for key in row) else "mean +- SD", []
    for name, title in FLOORS.items():
        gains = [f"{t.upper()} {gain(key)}" for t in TARGETS if (key := f"gain_{name}_{t}") in row]
        lines += [f"gain over {title}, paired, {how}: {', '.join(gains)}"] if gains else []
    if row["part"] == "val":
        lines += ["optimistic: validation picked the epoch as well; --test_ratio 0.2 sets aside a "
                  "part that it does not see"]
    return lines + [
        f"{TITLES[t]}: 95 % interval of SROCC {interval(f'interval_{t}', '.3f')}, validation SROCC "
        f"{row[f'val_srocc_{t}']:.4f}, best epoch of its own {row[f'best_epoch_{t}']}"
        + (f", Train-Val Gap {row[f'gap_{t}']:+.4f}, tier {row[key]}"
           if (key := f"tier_{t}") in row else "") for t in TARGETS if f"best_epoch_{t}" in row]


def keep_records(run, preds, row):
    """Print and write what a finished run leaves; row["advice"] gets the names of what fired."""
    args, folder, table = run.args, Path(run.args.output_dir), run.table
    before = settings_advice(args, len(run.parts["train"]), row["blocks"], table.targets)
    findings = training_advice(args, run.progress["log"], row) if "train" in preds else []
    row["advice"] = [what for what, *_ in before + findings]
    print(f"\n{row['part']}, best epoch {row['best_epoch']}")
    print(score_table([row]).to_string(), *verdict(row), sep="\n")
    print_advice(args, findings)
    if RANK:
        return
    for part in preds.keys() - {"train"}:
        given = table.frame.filter(["name", "prompt", "mos_quality", "mos_align"])
        scores = add_scores(given.iloc[run.parts[part]], preds[part], table.targets)
        save_text(folder / f"{part}_predictions.csv", scores.to_csv(index=False))
    if not args.no_plots:
        write_report(run, preds[row["part"]], row, before + findings)
    if args.tensorboard:
        write_tensorboard(run)
    save_text(folder / "result.json", json_text(row))


def add_scores(table, pred, targets):
    """Return the table with the columns of scores for people: clamped, on the MOS scale."""
    return table.assign(**{
        name: to_mos(pred[key].to_numpy(float).clip(0, 1), targets[key[0]]).round(6)
        for name, key in SCORES.items() if key[0] in targets})


def json_text(value, indent=1):
    """Return JSON; NaN and infinities, which it does not have, become null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(plain, indent=indent)


def read_row(path):
    """Return a row of results from its JSON, in which NaN is null."""
    row = json.loads(Path(path).read_text(encoding="utf-8"))
    return {name: math.nan if value is None else value for name, value in row.items()}


def append_run(args, row):
    """Add a row to <output_dir>/runs.csv, once; columns and texts of other runs stay."""
    path, line = Path(args.output_dir, "runs.csv"), row | {"advice": "; ".join(row["advice"])}
    before = read_table(path) if path.exists() else pd.DataFrame()
    key = ["time", "seconds", "command", "checkpoint"]
    if not before.reindex(columns=key).eq([str(row[name]) for name in key]).all(axis=1).any():
        save_text(path, pd.concat([before, pd.DataFrame([line])]).to_csv(index=False))


def write_config(run):
    """Write config.json: what the run is, versions and commit; and skipped.csv."""
    args, folder = run.args, Path(run.args.output_dir)
    commit = subprocess.run("git rev-parse HEAD", shell=True, cwd=HERE, capture_output=True,
                            text=True, check=False).stdout.strip()
    save_text(folder / "config.json", json_text(description(run) | {
        "fingerprint": fingerprint(args, run.table), "precision": args.precision,
        "images": {part: len(rows) for part, rows in run.parts.items()},
        "versions": {"python": sys.version.split()[0]} | {
            module.__name__: module.__version__ for module in (torch, open_clip, pd, np, scipy)},
        "commit": commit or None}))
    if args.skip_bad_images:
        save_text(folder / "skipped.csv", run.table.skipped.to_csv(index=False))


def fingerprint(args, table):
    """Return a hash of what a run depends on: flags that matter, and the data."""
    flags = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
    flags["batch_size"] *= WORLD
    return content_key(flags=flags, data=data_hash(table))


def archive_old_run(args):
    """Move an earlier run's files to archive/<time>/ instead of overwriting them."""
    folder = Path(args.output_dir)
    names = ["baseline_best.pt", "baseline_last.pt", "config.json", "result.json", "curves.png",
             "scatter.png", "worst.png", "report.html", "tensorboard", "skipped.csv",
             "val_predictions.csv", "test_predictions.csv", args.log_csv]
    old = [*filter(Path.exists, map(folder.joinpath, names)), *folder.glob("repeat_*"),
           *folder.glob("tuning*")]
    if RANK == 0 and old:
        target = folder / "archive" / time.strftime("%Y%m%d-%H%M%S")
        while target.exists():
            target = target.with_name(target.name + "x")
        with must_write(folder):
            target.mkdir(parents=True)
            for path in old:
                path.rename(target / path.name)
        print(f"the earlier run in {folder} is kept in {target}")
    gather(None)


def split_margin(sd, splits, ratio):
    """Return half the width of the 95 % interval of a mean over random splits.

    The splits share images, so that their spread alone is too small: corrected resampled t (Nadeau
    and Bengio, 2003). sd: over the splits; ratio: judged images / training images.
    """
    return scipy.stats.t.ppf(0.975, splits - 1) * math.sqrt(1 / splits + ratio) * sd


def train_splits(args, table, brief=False):
    """Train on --repeats splits; one that was finished before is kept, one that began goes on.

    Returns their rows of results; each has its folder in the output_dir. brief: see results.
    """
    rows, known = [], {json.loads(path.read_text())["fingerprint"]
                       for path in Path(args.output_dir).glob("repeat_*/config.json")}
    if gather(known)[0] != {fingerprint(args, table)}:
        archive_old_run(args)
    for seed in range(args.seed, args.seed + args.repeats):
        folder = Path(args.output_dir, f"repeat_{seed}")
        done, last = folder / "result.json", folder / "baseline_last.pt"
        print(f"\nrepeat with seed {seed}{': finished before, kept' * done.exists()}")
        finished, begun = gather((done.exists(), last.exists()))[0]
        if not finished:
            options = argparse.Namespace(**vars(args) | {
                "output_dir": str(folder), "resume_from": str(last) if begun else None})
            train_one_run(options, table, seed, load_checkpoint(last) if begun else None, brief)
        rows += gather(read_row(done) if RANK == 0 else None)[:1]
        append_run(args, rows[-1])  # where a kill came before it
    return rows


def train_repeats(args, table):
    """Train on several splits, see train_splits, and say what they have in common.

    Returns {"repeats": rows, "mean", "sd": by the rows' keys, "gain_<floor>_<target>": mean of the
    paired differences over splits, .._low, .._high: its 95 % interval, see split_margin}. With a
    split column the seeds alone differ: then there is no interval.
    """
    rows = train_splits(args, table)
    frame, part = pd.DataFrame(rows), rows[0]["part"]
    numbers = frame.filter(regex="^(?!tier).*_[qc]$").astype(float)
    mean, sd, gains = numbers.mean(), numbers.std(), numbers.filter(regex="^gain_").columns
    result = {"repeats": rows, "part": part, "mean": mean.to_dict(), "sd": sd.to_dict(),
              "output_dir": args.output_dir, "command": args.command} | mean[gains].to_dict()
    if not args.split_column:
        ratio = frame[f"images_{part}"].mean() / frame["images_train"].mean()
        margin = split_margin(sd, len(rows), ratio)[gains]
        result |= (mean[gains] - margin).add_suffix("_low").to_dict()
        result |= (mean[gains] + margin).add_suffix("_high").to_dict()
    print(f"\n{part} of {len(rows)} {'seeds' if args.split_column else 'splits'}, mean +- SD")
    print(score_table(rows).to_string(), *verdict(result), sep="\n")
    save_text(Path(args.output_dir, "result.json"), json_text(result))
    return result


# --- tuning flow ----------------------------------------------------------------------------

STAGES = ("learning rate", "freeze depth", "residual scale", "remedies")  # behind the baseline


@dataclass
class Candidate:
    """One setting of the tuning flow: flags behind the user's command, and what came of them."""

    stage: str
    flags: str
    args: argparse.Namespace
    rows: list  # of results, one for each split
    spread: float = math.nan  # half the 95 % interval of its gain over the best one before
    kept: str = ""

    def scores(self):
        """Return what picks the best epoch, of the validation part of each split."""
        return np.array([selection_score(row, self.args, "val_") for row in self.rows])


def stage_flags(stage, best, table):
    """Return the flags that a stage of the card tries on the best candidate; [] has none."""
    args, row = best.args, best.rows[0]
    if stage == "learning rate":
        return [f"--lr {args.lr * factor:.2g}" for factor in (1 / 3, 5 / 3)]
    if stage == "freeze depth":
        depths = {round(row["blocks"] * blocks / 24) for blocks in (16, 18, 20)}
        return [f"--freeze_layers {depth}" for depth in sorted(depths - {0, args.freeze_layers})
                if args.partial_freeze]
    if stage == "residual scale":
        return [f"--residual_scale_q {scale} --residual_scale_c {scale}" for scale in (0.15, 0.25)
                if not args.no_residual_learning
                and (scale, scale) != (args.residual_scale_q, args.residual_scale_c)]
    if not {"gap_q", "gap_c"} & row.keys():  # a diagnosis needs the training part as well
        print("\nthe diagnosis of the best so far:")
        row = results_on(table, args, row)[1] | row
        save_text(Path(row["output_dir"], "result.json"), json_text(row))
    log = pd.read_csv(Path(row["output_dir"], args.log_csv)).to_dict("records")
    return [flags for _, _, flags in training_advice(args, log, row) if flags.strip()]


def paired_gains(new, old, table):
    """Return a DataFrame (draws, targets): how far new's SROCC is above old's, by bootstrap.

    new, old: predictions of the same rows, one DataFrame for each split, whose mean it is.
    """
    gains = dict.fromkeys(table.targets, 0)
    for (a, b), t in itertools.product(zip(new, old), table.targets):
        rows = a.index[table.frame[t].iloc[a.index].notna()]
        draws = bootstrap({"new": a[t][rows], "old": b[t][rows]},
                          *table.frame[[t, "group_id"]].to_numpy()[rows].T)
        gains[t] += (draws["new"] - draws["old"]) / len(new)
    return pd.DataFrame(gains)


def gain_margin(new, old, table):
    """Return half the 95 % interval of the gain in validation scores of one Candidate over another.

    Over several splits see split_margin; else by bootstrap over prompts.
    """
    if len(new.rows) > 1 and not new.args.split_column:
        ratio = new.rows[0]["images_val"] / new.rows[0]["images_train"]
        return split_margin((new.scores() - old.scores()).std(ddof=1), len(new.rows), ratio)
    preds = ([pd.read_csv(Path(row["output_dir"], "val_predictions.csv")).rename(columns=SCORES)
              .set_axis(split_rows(table, each.args, row["seed"])["val"]) for row in each.rows]
             for each in (new, old))
    gains = paired_gains(*preds, table)[selected(new.args, table.targets)].mean(axis=1)
    return float(np.ptp(gains.quantile([0.025, 0.975]))) / 2


def set_test_aside(args, table):
    """Return (the table without the test part's rows in any part, the table with that part).

    It is drawn once, from --seed, or the one of --split_column.
    """
    if not (args.split_column or args.test_ratio):
        print("--tune sets a test part aside, as by --test_ratio 0.2")
        args.test_ratio = 0.2
    test = split_rows(table, args, args.seed)["test"]
    scored = table.frame.iloc[test][list(table.targets)].count().min()
    if scored < 2:
        raise UserError(f"--tune needs a test part with scores, but --split_column "
                        f"{args.split_column} has {scored} such rows: name some rows test.")
    tested, given = np.isin(np.arange(len(table.frame)), test), table.frame.get("part", "train")
    return [replace(table, frame=table.frame.assign(part=np.where(tested, part, given)))
            for part in ("none", "test")]


def try_flags(args, table, stage, number, flags):
    """Train the user's command with more flags behind it, or find it finished."""
    words = [word for word in shlex.split(args.command) if word != "--tune"]
    options = parse_args([*words, *shlex.split(flags)])
    settle_precision(options)
    place = Path(args.output_dir, "tuning", f"{stage}_{number}".replace(" ", "_"))
    vars(options).update(output_dir=str(place), cache_dir=args.cache_dir, no_plots=True,
                         test_ratio=0.0)
    print(f"\n=== {stage}: {flags.strip() or 'as given'}")
    return Candidate(stage, flags.strip(), options, train_splits(options, table, brief=True))


def tune(args, table):
    """Run the card's stages on validation, each from the best before, and test the winner once.

    Returns the winner's row of results with its gains over the first stage, and writes tuning.csv
    and tuning.png. A stopped flow goes on with the candidate that it was at.
    """
    folder, key = Path(args.output_dir), fingerprint(args, table)
    note, done = folder / "tuning/config.json", folder / "result.json"
    if gather(note.exists() and json.loads(note.read_text())["fingerprint"])[0] != key:
        archive_old_run(args)
        save_text(note, json_text({"fingerprint": key}))
    table, tested = set_test_aside(args, table)
    first = best = try_flags(args, table, "baseline", 0, "")
    candidates = [first]
    for stage in STAGES:
        tried = [try_flags(args, table, stage, number, f"{best.flags} {flags}")
                 for number, flags in enumerate(stage_flags(stage, best, table))]
        if not tried:
            print(f"\n=== {stage}: does not apply")
            continue
        for new in tried:
            new.spread = gather(gain_margin(new, best, table) if RANK == 0 else None)[0]
        top = max(tried, key=lambda new: new.scores().mean())
        gain = (top.scores() - best.scores()).mean()
        top.kept = "yes" if gain > top.spread else "no: within the noise" if gain > 0 else "no"
        candidates += tried
        best = top if top.kept == "yes" else best
    frame = pd.DataFrame([
        {"stage": new.stage, "flags": new.flags}
        | pd.DataFrame(new.rows).filter(like="val_srocc_").mean(skipna=False).to_dict()
        | {"spread": new.spread, "kept": new.kept} for new in candidates]).round(4)
    print(f"\n{frame.to_string(index=False)}")
    save_text(folder / "tuning.csv", frame.to_csv(index=False))
    if not args.no_plots and RANK == 0:
        draw_tuning(frame, folder / "tuning.png")
    if not gather(done.exists())[0]:
        row = tested_row(best, first, tested)
        if RANK == 0:
            with writing(folder / "baseline_best.pt") as half:
                shutil.copyfile(best.rows[0]["checkpoint"], half)
        save_text(done, json_text(row))
    row = gather(read_row(done) if RANK == 0 else None)[0]
    print("\nthe winner on the test part", score_table([row]).to_string(), *verdict(row), sep="\n")
    print(f"python baseline.py {best.args.command}")
    return row


def results_on(table, args, row, brief=False):
    """Return the results of a finished run, whose row this is, on the parts of a table."""
    run = set_up(argparse.Namespace(**vars(args) | {"output_dir": row["output_dir"]}), table,
                 row["seed"])
    run.progress = load_checkpoint(Path(row["output_dir"], "baseline_last.pt"))["progress"]
    return results(run, brief)


def tested_row(best, first, table):
    """Return the row of best's first split on the test part, with best's mean gain over first."""
    new = [results_on(table, best.args, row) for row in best.rows]
    old = new if best is first else [results_on(table, first.args, row, brief=True)
                                     for row in first.rows]
    drawn = paired_gains(*([preds["test"] for preds, _ in found] for found in (new, old)), table)
    row = new[0][1]
    for t in table.targets:
        gains = [a[f"test_srocc_{t}"] - b[f"test_srocc_{t}"] for (_, a), (_, b) in zip(new, old)]
        low, high = drawn[t].quantile([0.025, 0.975])
        row |= {f"gain_baseline_{t}": float(np.mean(gains)),
                f"gain_baseline_{t}_low": low, f"gain_baseline_{t}_high": high}
    return row | {"flags": best.flags}


# --- advice ---------------------------------------------------------------------------------

# The card's rules of thumb: learning rate by freezing, residual scale by number of images.
LR_RANGES = {"frozen": (1e-3, 5e-3), "partial": (3e-5, 1e-4), "full": (1e-5, 3e-5)}
SCALE_BY_IMAGES = ((500, 0.1, 0.1), (3000, 0.2, 0.2), (10_000, 0.3, 0.3), (math.inf, 0.4, 0.5))


def settings_advice(args, images, depth, targets=TARGETS):
    """Return rows of (what, evidence, flags) by the card's rules that need no training."""
    mode = "frozen" if args.freeze_clip else "partial" if args.partial_freeze else "full"
    low, high = LR_RANGES[mode]
    small, large = next((a, b) for limit, a, b in SCALE_BY_IMAGES if images < limit)
    scales = {f"residual_scale_{t}": getattr(args, f"residual_scale_{t}") for t in targets}
    rates = [args.step_lr_gamma ** (k // args.step_lr_step_size) for k in range(args.epochs)]
    rows = [
        ("learning rate outside the usual range", not low * 0.999 <= args.lr <= high * 1.001,
         f"lr {args.lr:g}, but a {mode} CLIP usually wants {low:g} to {high:g}",
         f"--lr {min(max(args.lr, low), high):g}"),
        ("residual scale unusual for this many images", not args.no_residual_learning
         and not small / 2 <= min(scales.values()) <= max(scales.values()) <= 2 * large,
         f"scales {' and '.join(f'{scale:g}' for scale in scales.values())}, but {images} training "
         f"images usually want {small:g}", " ".join(f"--{name} {small:g}" for name in scales)),
        ("steps that end the learning early", args.scheduler == "step" and rates[-1] < 0.01,
         f"{sum(rates[:args.step_lr_step_size]) / sum(rates):.0%} of the learning rates' sum is in "
         f"the first {args.step_lr_step_size} of {args.epochs} epochs, before the first decay",
         f"--step_lr_step_size {-(-args.epochs // 3)}"),
        ("freeze_layers unusual for this tower",
         mode == "partial" and depth >= 12  # a convolutional trunk has fewer stages
         and not depth / 2 <= args.freeze_layers <= depth * 11 / 12,
         f"{args.freeze_layers} of {depth} blocks are frozen; two thirds to five sixths are usual",
         f"--freeze_layers {round(depth * 3 / 4)}")]
    return [(what, why, flags) for what, fires, why, flags in rows if fires]


def remedy(args, up, down):
    """Return the flags that raise settings to at least, and lower others to at most, some values.

    up, down: {flag: value}. What the run has already is left out, and residuals that it lacks.
    """
    now = vars(args) | {"max_grad_norm": args.max_grad_norm or math.inf, "head_lr": head_lr(args),
                        "freeze_layers": args.freeze_layers * args.partial_freeze}
    new = {name: max(now[name], value) for name, value in up.items()}
    new |= {name: min(now[name], value) for name, value in down.items()}
    return " ".join(f"--{name} {value:g}" for name, value in new.items() if value != now[name]
                    and not (args.no_residual_learning and name.startswith("residual")))


def training_advice(args, log, row):
    """Return rows of (what, evidence, flags): the card's diagnoses of a finished run."""
    depth = row["blocks"]  # of the image tower, 0 if unknown
    last, best, targets = log[-1], row["best_epoch"], [t for t in TARGETS if f"gap_{t}" in row]
    widest = max(row[f"gap_{t}"] for t in targets)
    weak = all(row[f"tier_{t}"] == "needs work" for t in targets)
    fitted = max(last[f"train_srocc_{t}"] - last[f"val_srocc_{t}"] for t in targets)
    rise, epoch = max(((b["train_loss"] / a["train_loss"], b["epoch"])
                       for a, b in zip(log, log[1:])), default=(0, 0))
    over = widest > 0.05 or (fitted > 0.1 and best < last["epoch"] / 2)
    gap = "Train-Val Gap " + ", ".join(f"{t.upper()} {row[f'gap_{t}']:+.3f}" for t in targets)
    scores = ", ".join(f"{t.upper()} {row[f'val_srocc_{t}']:.3f} ({row[f'tier_{t}']})"
                       for t in targets)
    small, large = ({f"residual_scale_{t}": scale for t in targets} for scale in (0.15, 0.3))
    third, frozen, partial = float(f"{args.lr / 3:.2g}"), args.freeze_clip, args.partial_freeze
    less = {"epochs": max(1, args.epochs // 2)} if frozen else {"lr": 1e-5}
    blocks = {"freeze_layers": max(1, round(depth * 20 / 24))} if depth and not frozen else {}
    rows = [
        ("overfitting", over, f"{gap} (above 0.05 needs work); best epoch {best} of "
         f"{last['epoch']}, in the last one training SROCC is {fitted:+.3f} from validation",
         remedy(args, {"dropout": 0.2} | blocks, small | less)
         + " --partial_freeze" * bool(blocks and not partial)),
        ("underfitting", not over and weak and widest < 0.02 and best == last["epoch"],
         f"validation SROCC {scores} still rise in the last epoch, {gap}",
         remedy(args, large | {"lr": min(5e-3, args.lr * 2) if frozen else 5e-5},
                {"dropout": 0.05, "freeze_layers": max(1, round(depth * 16 / 24))})),  # if partial
        ("unstable loss", rise > 1.2, f"training loss rose {rise:.1f}-fold in epoch {epoch}",
         remedy(args, {"warmup_ratio": 0.1},
                {"max_grad_norm": 0.5, "lr": third, "batch_size": 16}))]
    for t, other in zip(targets, targets[::-1]):  # of one target that is low its own tier is too
        low = row[f"val_srocc_{t}"] <= TIERS[t][-1][1]  # the gap alone is no low score
        rows += [(f"low SROCC_{t.upper()} only", low and row[f"tier_{other}"] != "needs work",
                  f"validation SROCC {scores}", remedy(
                      args, {f"w_{t}": 0.7, f"residual_scale_{t}": 0.3}, {f"w_{other}": 0.3}))]
    for t in targets if not args.no_residual_learning else ():
        scale, largest = getattr(args, f"residual_scale_{t}"), row[f"largest_delta_{t}"]
        rows += [
            (f"{TITLES[t]} residual saturated", row[f"saturated_{t}"] > 0.05,
             f"{row[f'saturated_{t}']:.0%} of |delta| are above {SATURATED:g} of its bound "
             f"{scale:g}", remedy(args, {f"residual_scale_{t}": min(0.5, scale * 1.5)}, {})),
            (f"{TITLES[t]} residual unused", best > 0 and largest < 0.05,
             f"the largest |delta| is {largest:.3f} of its bound",
             remedy(args, {"head_lr": head_lr(args) * 3}, {}))]
    return [(what, why, flags) for what, fires, why, flags in rows if fires]


def print_advice(args, findings):
    """Print each finding, its evidence, and the user's own command: the last of two flags wins."""
    for what, why, flags in findings:
        print(f"\n{what}: {why}; try\n  python baseline.py {args.command} {flags}")


# --- pictures and page ----------------------------------------------------------------------

COLOURS = {"q": "#0072B2", "c": "#D55E00"}  # Okabe and Ito: colour-blind-safe
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC",
         "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "SimHei", "Microsoft YaHei", "PingFang SC"]


@contextlib.contextmanager
def picture(path, rows, columns, size):
    """Yield (rows, columns) axes of a figure that is then written to `path` as PNG."""
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure
    here = sorted({*FONTS} & {*font_manager.get_font_names()}, key=FONTS.index)  # others take time
    style = {"font.family": here, "axes.grid": True, "grid.alpha": 0.25}
    with rc_context(style), warnings.catch_warnings(action="ignore"):
        figure = Figure(figsize=size, layout="constrained")
        yield figure.subplots(rows, columns, squeeze=False)
        with writing(path) as half:
            figure.savefig(half, format="png", dpi=110,
                           pil_kwargs={"compress_level": 1})  # a sixth larger, a third faster


def draw_curves(log, best_epoch, floors, path):
    """Draw losses and both SROCCs per epoch, with the best epoch and validation's floors."""
    log = pd.DataFrame(log)
    names = ["loss", *(name for name in ("srocc_q", "srocc_c") if f"val_{name}" in log)]
    with picture(path, 1, len(names), (14 * len(names) / 3, 4.2)) as axes:
        for axis, name in zip(axes[0], names):
            for part, style in (("train", ".--"), ("val", ".-")):
                axis.plot(log["epoch"], log[f"{part}_{name}"], style, label=f"{part}_{name}",
                          color=COLOURS.get(name[-1], "#666666"))
            axis.set(title=name.upper(), xlabel="epoch")
            for (floor, measured), line in zip(floors.items(), ("-", "-.", ":", "--")):
                far = (floor, name) == ("zero_shot", "srocc_q")  # it would flatten the curves
                if np.isfinite(measured.get(name, np.nan)) and not far:
                    axis.axhline(measured[name], linestyle=line, color="#666666",
                                 label=f"{FLOORS[floor]} {measured[name]:.3f}")
            axis.axvline(best_epoch, color="black", linewidth=0.8, alpha=0.5,
                         label=f"best epoch {best_epoch}")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend(fontsize=8)


def draw_scatter(sides, table, row, path):
    """Draw predicted against human MOS; sides: {target: (human, predicted)} on the MOS scale."""
    part = row["part"]
    with picture(path, 1, len(sides), (5 * len(sides), 4.8)) as axes:
        for axis, (t, (human, ours)) in zip(axes[0], sides.items()):
            ends = table.targets[t]
            axis.scatter(human, ours, s=12, alpha=0.5, color=COLOURS[t], edgecolors="none")
            axis.plot(ends, ends, color="black", linewidth=0.8)
            axis.set(title=f"{TITLES[t]} ({part}): SROCC {row[f'{part}_srocc_{t}']:.3f}, "
                           f"PLCC {row[f'{part}_plcc_{t}']:.3f}", aspect="equal",
                     xlabel="human MOS ({:g} to {:g})".format(*ends), xlim=ends,
                     ylabel="predicted MOS ({:g} to {:g})".format(*ends), ylim=ends)


def draw_worst(sides, frame, path):
    """Draw a contact sheet of the six images that each target gets most wrong."""
    count = min(6, *(np.isfinite(human).sum() for human, _ in sides.values()))
    worst = [(t, row) for t, (human, ours) in sides.items()
             for row in np.argsort(-np.abs(ours - human))[:count]]
    with picture(path, len(sides), count, (2.5 * count, 3.4 * len(sides))) as axes:
        for axis, (t, row) in zip(axes.flat, worst):
            try:
                image = load_image(frame["path"].iloc[row])
            except ImageError:  # gone since it was cached: no reason to lose the report
                image = Image.new("RGB", (8, 8), "grey")
            image.thumbnail((256, 256))
            axis.imshow(image)
            axis.set_title("{}: human {:.2f}, predicted {:.2f}".format(
                TITLES[t], *(side[row] for side in sides[t])), fontsize=7)
            prompt = textwrap.wrap(frame["prompt"].iloc[row], 26, max_lines=3, placeholder=" ..")
            axis.set_xlabel("\n".join(prompt).replace("$", r"\$"), fontsize=8)
            axis.set(xticks=[], yticks=[])


def draw_tuning(frame, path):
    """Draw the validation SROCC of each candidate of the tuning flow; those kept have a ring."""
    names, kept = [name for name in frame if name.startswith("val_")], frame["kept"] == "yes"
    labels = ["\n".join([stage, *textwrap.wrap(flags, 40)])
              for stage, flags in zip(frame["stage"], frame["flags"])]
    with picture(path, 1, len(names), (3 + 4 * len(names), 1 + 0.6 * len(frame))) as axes:
        for axis, name in zip(axes[0], names):
            axis.errorbar(frame[name], -frame.index, xerr=frame["spread"].fillna(0), fmt="o",
                          color=COLOURS[name[-1]], ecolor="#999999")
            axis.plot(frame[name][kept], -frame.index[kept], "o", markersize=13, mfc="none",
                      color="black")
            axis.set_yticks(-frame.index, labels if name == names[0] else [""] * len(frame),
                            fontsize=7)
            axis.set(title=name.upper(), xlabel="+- half the interval of the gain")


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>baseline.py report</title>
<style>body{{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}}
img{{max-width:100%}}table{{border-collapse:collapse}}td,th{{padding:.25em .8em;text-align:right;
border-bottom:1px solid #ccc}}pre{{white-space:pre-wrap;background:#f4f4f4;padding:.6em}}</style>
<h1>{what} on {count} {part} images</h1><pre>{command}</pre>{table}
<p>Best epoch {best_epoch} of {epochs_run}, split by {split_by}, seed {seed}.</p>
<h2>Verdict</h2><ul>{lines}</ul>{pictures}</html>
"""


def write_report(run, pred, row, findings):
    """Write curves.png, scatter.png, worst.png and report.html, which holds them all."""
    args, folder, table, pictures = run.args, Path(run.args.output_dir), run.table, ""
    frame = table.frame.iloc[run.parts[row["part"]]]
    sides = {t: [to_mos(side[t].to_numpy().clip(0, 1), table.targets[t])
                 for side in (frame, pred)] for t in table.targets}
    draw_curves(run.progress["log"], row["best_epoch"], floor_metrics(run, "val"),
                folder / "curves.png")
    draw_scatter(sides, table, row, folder / "scatter.png")
    draw_worst(sides, frame, folder / "worst.png")
    for name, title in (("curves", "Training"), ("scatter", "Predicted and human MOS"),
                        ("worst", "Most wrong")):
        content = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        pictures += f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{content}">'
    typed = html.escape(f"python baseline.py {args.command}")
    lines = [html.escape(line) for line in verdict(row)] + [
        f"<b>{html.escape(what)}</b>: {html.escape(why)}<pre>{typed} {html.escape(flags)}</pre>"
        for what, why, flags in findings]
    save_text(folder / "report.html", PAGE.format(**row | {
        "command": typed, "count": len(frame), "split_by": split_name(args), "pictures": pictures,
        "what": " and ".join(TITLES[t] for t in table.targets).capitalize(),
        "lines": "<li>".join(["", *lines]), "table": score_table([row]).to_html(border=0)}))


def write_tensorboard(run):
    """Write the log's scalars and the pictures for TensorBoard, if it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("--tensorboard needs the package tensorboard: pip install tensorboard")
        return
    folder, log = Path(run.args.output_dir), run.progress["log"]
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for row in log:
            for name, value in row.items():
                writer.add_scalar(name, value, row["epoch"])
        for path in sorted(folder.glob("*.png")):
            pixels = np.asarray(Image.open(path).convert("RGB"))
            writer.add_image(path.stem, pixels, len(log), dataformats="HWC")


# --- scoring --------------------------------------------------------------------------------

SCORES = {"quality": "q", "consistency": "c", "quality_base": "q_base",
          "consistency_base": "c_base"}
NEARLY_CONSTANT = 0.002  # standard deviation on [0, 1]
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # Pillow knows their names
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
for plugin in ("pillow_heif.HeifImagePlugin", "pillow_jxl"):  # where installed, Pillow opens them
    with contextlib.suppress(ImportError):
        importlib.import_module(plugin)


def folder_images(folder):
    """Return the sorted paths of the pictures below a folder; print what is left out and why.

    Links are followed, into each folder once. Where a suffix does not tell a picture, the first
    bytes do; a name that promises one is taken, whatever the file holds.
    """
    formats = [kind for kind in Image.OPEN if kind not in NO_PICTURES]
    suffixes = {suffix for suffix, kind in Image.EXTENSION.items() if kind in formats}
    telling = [kind for kind in formats if Image.OPEN[kind][1]]  # known by their first bytes
    paths, seen, left_out = [], set(), Counter()
    for place, names, files in os.walk(folder, followlinks=True, onerror=lambda error:
                                       left_out.update([f"folder that cannot be read: {error}"])):
        if (real := os.path.realpath(place)) in seen:
            left_out["link to a folder that is scored already"] += 1
            names[:] = files = []
        seen.add(real)
        hidden = {name for name in (*names, *files) if name.startswith(".")}
        left_out["hidden file or folder"] += len(hidden)
        names[:] = sorted({*names} - hidden, key=lambda name: (  # what is really there comes first
            os.path.islink(os.path.join(place, name)), name))
        for path in (Path(place, name) for name in {*files} - hidden):
            if (suffix := path.suffix.lower()) == ".txt":  # prompts
                continue
            try:
                if path.exists() and not path.is_file():
                    raise OSError("neither a file nor a folder")
                if suffix not in suffixes:
                    Image.open(path, formats=telling).close()
                paths.append(path)
            except Exception:  # Pillow's readers fail in every way there is
                why = (f"Pillow opens it after: pip install {PLUGINS[suffix]}" if suffix in PLUGINS
                       else "no picture that Pillow opens")
                left_out[f"{suffix or 'file without a suffix'} ({why})"] += 1
    for what, count in sorted((+left_out).items()):
        print(f"left out of {folder}: {count} x {what}")
    return sorted(paths)


def scoring_frame(args, saved):
    """Return (DataFrame with the input columns, image paths, prompts, {row: why it has no prompt}).

    A CSV's names are relative to --image_base_dir if given, else to that of the CSV's folder, its
    images/ and the training folder that has the most of them. saved: the checkpoint's arguments,
    which name the columns. Prompts are "" where there is none.
    """
    target, given, unread, prompts = Path(args.predict), args.prompt or "", {}, []
    if target.suffix.lower() in TABLES:
        frame = read_table(target).reset_index(drop=True)
        names, texts = (cells_of(frame, c) for c in (saved.name_column, saved.prompt_column))
        if names is None or frame.empty:
            raise UserError(f"{target} needs rows to score and the column {saved.name_column}, but "
                            f"has {len(frame)} rows of {', '.join(frame.columns)}: add one per "
                            f"image and a header line, or choose the column with --name_column.")
        names = image_names(names)
        places = ([Path(args.image_base_dir)] if "image_base_dir" in args.explicit else
                  [target.parent, target.parent / "images", Path(saved.image_base_dir)])
        base = max(places, key=lambda place: sum(os.path.isfile(place / n) for n in names))
        if texts is None:
            texts = pd.Series("", frame.index, name=saved.prompt_column)
        prompts = texts.where(texts.str.strip() != "", given).tolist()
        if given:
            frame[texts.name] = prompts
        return frame, [base / name for name in names], prompts, unread
    base, paths = ((target.parent, [target]) if target.is_file() else
                   (target, folder_images(target)))
    if not paths:
        raise UserError(f"--predict needs a CSV, an image or a folder of images, but there are no "
                        f"images in {target}: correct the path.")
    for row, text in enumerate(path.with_suffix(".txt") for path in paths):
        try:
            beside = text.read_text(encoding="utf-8-sig").strip() if os.path.isfile(text) else ""
            prompts.append(beside or given)
        except (OSError, UnicodeDecodeError) as error:
            unread[row] = f"{text.name} must be UTF-8 text that can be read: {error}"
            prompts.append("")
    names = [os.fsencode(path.relative_to(base).as_posix()).decode("utf-8", "backslashreplace")
             for path in paths]
    return pd.DataFrame({"name": names, "prompt": prompts}), paths, prompts, unread


class Scorer(nn.Module):
    """Score images as a checkpoint has learned to: files by `score`, tensors by a call.

    content: of scoring_checkpoint; args: of the command line. The base's cosine needs the CLIP
    before training as well, which shares what is frozen with the one after it: the last and the
    first of `towers`, one where all is.
    """

    def __init__(self, content, args, device):
        super().__init__()
        saved = argparse.Namespace(**content["args"])
        clip, self.tokenizer, self.identity = load_clip(saved, saved.seed, content)
        shared = {id(value): value for name, value in clip.named_parameters()
                  if f"clip.{name}" not in content["state"]}
        self.clips = nn.ModuleList([clip] if saved.freeze_clip else
                                   [clip, copy.deepcopy(clip, shared)])
        known = {}
        self.towers = [make_towers(each, self.tokenizer, saved, known) for each in self.clips]
        self.model = CLIPScorer(clip, self.towers[0], self.identity, saved)
        load_trained_state(self.model, content["state"], content["path"])
        self.args, self.targets = args, content["targets"]
        self.requires_grad_(False).to(device).eval()

    def train(self, mode=True):
        """Stay in eval mode, whatever a model that it is part of does."""
        return super().train(False)

    def embed(self, name, x, ids=None):
        """Return (B, 2, D) embeddings, after and before training, of what a tower's prefix gave."""
        with autocast(self.args, x.device):
            both = [towers[name].suffix(x, ids) for towers in self.towers]
        return torch.stack([both[0], both[-1]], dim=1)

    def texts(self, prompts, count):
        """Return (count,) index into U unique prompts, and (U, 2, D) embeddings; blank: NaN.

        prompts: one for all, one each, or None, which may also stand for one of them.
        """
        one = prompts is None or isinstance(prompts, str)
        prompts = [prompts] * count if one else list(prompts)
        if len(prompts) != count:
            raise UserError(f"Prompts must be one, None, or one for each of the {count} images, "
                            f"but there are {len(prompts)}: correct their number.")
        prompts = ["" if pd.isna(text) else str(text) for text in prompts]
        index, unique = pd.factorize(np.array(prompts, dtype=object))
        texts = TextInputs(self.towers[0]["text"], self.tokenizer, self.identity, self.args,
                           self.model.pixel_mean.device, "prompts", list(unique))
        batches = batches_of(len(unique), 64)
        both = torch.cat([self.embed("text", *text[:2]) for text in progress_bar(
            texts.stream(batches), "prompts", len(batches))])
        both[[not text.strip() for text in unique]] = math.nan
        return torch.from_numpy(index).to(both.device), both

    def outputs(self, images, texts):
        """Return CLIPScorer.score of (B, 3, H, W) images, 0 to 255, and (B, 2, D) of `texts`."""
        with autocast(self.args, images.device):
            x = self.towers[0]["image"].prefix(self.model.pixels(images))
        (f, f0), (t, t0) = (both.unbind(1) for both in (self.embed("image", x), texts))
        with torch.autocast(images.device.type, enabled=False):
            return self.model.score(f, t, (f0 * t0).sum(-1))

    def forward(self, pixels, prompts=None):
        """Return {"quality", "consistency", "quality_base", ..} of (B,) tensors on the MOS scale.

        pixels: (B, 3, H, W) in [0, 1], of any size; the scores are not clamped and differentiable.
        prompts: see texts. Consistency is NaN where there is none.
        """
        low, high = (float(edge) for edge in pixels.detach().aminmax())
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not -0.01 <= low <= high <= 1.01:
            raise UserError(f"A Scorer reads pixels (B, 3, H, W) from 0 to 1, but got "
                            f"{tuple(pixels.shape)} from {low:g} to {high:g}: see its method score "
                            f"for files, pictures and arrays.")
        index, texts = self.texts(prompts, len(pixels))
        images = Decoder([], self.identity["preprocess"]).resize(pixels.to(texts)) * 255
        out = self.outputs(images, texts[index])
        return {name: to_mos(out[key], self.targets[key[0]])
                for name, key in SCORES.items() if key[0] in self.targets}

    @torch.no_grad()
    def scored(self, images, prompts, steps):
        """Yield a DataFrame for each of several arrays of rows: PREDICTIONS, and error.

        On the [0, 1] scale; NaN where the image is unreadable, consistency without a prompt. All
        prompts are embedded, so that a row has the same bits whatever the other steps are.
        """
        index, texts = self.texts(prompts, len(images))
        files = all(isinstance(image, (str, os.PathLike)) for image in images)
        stream = ahead(Decoder(images, self.identity["preprocess"]), steps,
                       self.args.num_workers * files,  # threads must not share an open picture
                       texts.device.type == "cpu")
        for rows, (pixels, errors) in progress_bar(zip(steps, stream), "score", len(steps)):
            out = self.outputs(pixels.to(texts.device), texts[index[rows]])
            pred = pd.DataFrame({name: out[name].cpu() for name in PREDICTIONS}, rows)
            pred.loc[list(errors)] = np.nan
            yield pred.assign(error=[errors.get(row, "") for row in rows])

    def score(self, images, prompts=None):
        """Return a DataFrame of SCORES, as --predict has them, and error, a row per image.

        images: paths, PIL images or uint8 arrays (H, W, 3), or one of these; prompts: see texts.
        """
        one = isinstance(images, (str, os.PathLike, Image.Image)) or (
            isinstance(images, np.ndarray) and images.ndim in (2, 3))
        images = [images] if one else list(images)
        if not images:
            return pd.DataFrame(columns=[*SCORES, "error"])
        steps = batches_of(len(images), self.args.batch_size)
        pred = pd.concat(self.scored(images, prompts, steps))
        return add_scores(pred[[]], pred, self.targets).assign(error=pred["error"])


def scoring_checkpoint(args, device=None):
    """Return the content of --checkpoint, its columns and its CLIP's place as named by the flags.

    args.precision becomes the checkpoint's, unless it is named, and fits the device.
    """
    content = load_checkpoint(args.checkpoint)
    places = ("clip_model", "pretrained") if "clip" not in content else ()
    content["args"] |= {name: getattr(args, name) for name in args.explicit
                        if name.endswith("_column") or name in ("precision", *places)}
    args.precision = content["args"]["precision"]
    settle_precision(args, device)
    for t in set(TARGETS) - set(content["targets"]):
        if getattr(args, f"min_{TITLES[t]}") is not None:
            raise UserError(f"{args.checkpoint} gives no {TITLES[t]}, for it had no such scores to "
                            f"train on: drop --min_{TITLES[t]}.")
    return content


def load(path, device=None, **flags):
    """Return the Scorer of a checkpoint, a folder of --export or hf-hub:ORG/NAME.

    device: CUDA where there is one, unless named. flags: those of the command line that scoring
    heeds: batch_size, num_workers, precision, clip_model, pretrained.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args = parse_args([f"--{k}={v}" for k, v in flags.items()])
    args.checkpoint = path
    with torch.random.fork_rng([]):
        return Scorer(scoring_checkpoint(args, device), args, device)


CARD = """---
license: other  # fill in; that of the CLIP and that of the data count as well
---
# {name}

Scores AI-generated images: `python baseline.py --predict IMAGES --checkpoint FOLDER`, or
`baseline.load(FOLDER).score(images, prompts)`. Licence: FILL IN.

- CLIP: {model} ({pretrained})
- data: {csv}, label scales {targets}; split {split}, seed {seed}
- trained by `python baseline.py {command}`

{scores}
"""


def export(args):
    """Write --checkpoint as a folder that needs no other file (see read_export), or nothing."""
    if RANK:
        return
    target, content = Path(args.export), scoring_checkpoint(args)
    saved = argparse.Namespace(**content["args"])
    clip, tokenizer, identity = load_clip(saved, saved.seed, content)
    tensors = {"clip": clip.state_dict(), "state": content["state"]}
    weights = safetensors.torch.save({
        f"{part}.{key}": value.clone(memory_format=torch.contiguous_format)
        for part in tensors for key, value in tensors[part].items()})
    plain = content.keys() - {*tensors, "optimizer", "scaler", "path"}
    model = open_clip.get_model_config(saved.clip_model) | {"quick_gelu": identity["quick_gelu"]}
    files = {"README.md": model_card(target.name, content, Path(args.checkpoint).parent),
             "config.json": json_text({key: content[key] for key in sorted(plain)} | {
                 "sha256": hashlib.sha256(weights).hexdigest()}),
             "open_clip_config.json": json_text({
                 "model_cfg": model, "preprocess_cfg": identity["preprocess"]})}
    with writing(target) as half:
        half.mkdir()
        (half / "model.safetensors").write_bytes(weights)
        for name, text in files.items():
            (half / name).write_text(text, encoding="utf-8")
        if hasattr(tokenizer, "save_pretrained"):  # open_clip's own needs no files
            tokenizer.save_pretrained(half)
    print(f"{target} holds all that scoring needs: give it as --checkpoint or to baseline.load")


def model_card(name, content, folder):
    """Return an exported folder's README.md; folder: where the run's result is, if it is known."""
    path, epoch = folder / "result.json", content["progress"]["epoch"]
    row = read_row(path) if path.is_file() else {}
    scores = "No scores of this split and epoch lay beside the checkpoint."
    if (row.get("split"), row.get("best_epoch")) == (content["split"], epoch):
        images = ", ".join(f"{row[f'images_{part}']} {part}" for part in ("train", "val", "test"))
        scores = "\n".join(["```", f"images: {images}; scores of the {row['part']} part",
                            score_table([row]).to_string(), *verdict(row), "```"])
    return CARD.format(**content | content["args"] | content["identity"] | {
        "name": name, "scores": scores, "csv": Path(content["args"]["data_csv_path"]).name})


def scores_path(args):
    """Return where the scores go, None for standard output; what lies there stays."""
    if args.predictions_csv == "-":
        return None
    scored = Path(os.path.abspath(args.predict))
    name = scored.name if scored.is_dir() else scored.stem
    path = Path(args.predictions_csv or f"{name}_scores.csv")
    if RANK == 0 and os.path.exists(path) and not (args.overwrite and path.is_file()):
        raise UserError(f"The scores need a file that does not exist yet, but {path} does: give "
                        f"another --predictions_csv, or --overwrite if it is a file of no use.")
    return path


def score_rows(args, content, partial, paths, prompts):
    """Return a DataFrame of all images: PREDICTIONS and error.

    partial: the file that keeps a stopped run's rows, so that the same command goes on with the
    rest: the key of what they depend on, then a line for each batch; None in all processes but one.
    """
    files = [(str(path), os.path.isfile(path) and os.stat(path).st_mtime_ns) for path in paths]
    key = content_key(identity=content["identity"], state=weights_hash(content["state"]),
                      precision=args.precision, prompts=prompts, files=files)
    lines = partial.read_text().split("\n") if partial and partial.is_file() else [key, ""]
    batches = lines[1:-1] if lines[0] == key else []  # the last one has no end
    if partial:
        save_text(partial, "".join(line + "\n" for line in (key, *batches)))
    done = gather([row for line in batches for row in json.loads(line)])[0]
    if done:
        print(f"going on after {len(done)} of {len(paths)} rows in {partial}")
    try:
        scorer = Scorer(content, args, pick_device(args))
        steps = list(deal(np.arange(len(done), len(paths)), args.batch_size))
        scored = scorer.scored(paths, prompts, [rows for rows, _ in steps])
        for (_, kept), pred in zip(steps, scored):
            pred = pd.concat(gather(pred[kept > 0])).sort_index()
            new = pred.astype(object).to_numpy().tolist()
            done += new
            if partial:
                with must_write(partial), open(partial, "a", encoding="utf-8") as file:
                    file.write(json.dumps(new) + "\n")
    except BaseException:
        if partial and done:
            print(f"{len(done)} of {len(paths)} rows are kept in {partial}: the same command goes "
                  f"on with the rest", file=sys.stderr)
        elif partial:
            partial.unlink()
        raise
    return pd.DataFrame(done, columns=[*PREDICTIONS, "error"])


def judge(frame, pred, prompts, content):
    """Print metrics where there are human scores, and warn where the scores tell nothing."""
    expected = {"q": pred["error"] == ""}
    expected["c"] = expected["q"] & (pd.Series(prompts).str.strip() != "")
    for t, (low, high) in content["targets"].items():
        cells = cells_of(frame, content["args"][f"{TITLES[t]}_column"])
        if cells is not None:
            mos = (numbers_of(cells) - low) / (high - low)
            mos = mos.where(np.isfinite(mos - pred[t]))
            if measured := metrics(pred, {t: mos}, [t]):
                print(f"{TITLES[t]}: " + ", ".join(
                    f"{name.upper()} {measured[f'{name}_{t}']:.4f}" for name in METRICS)
                    + f" on {mos.count()} images")
        values = pred[t][expected[t]]
        if lost := int((~np.isfinite(values)).sum()):
            print(f"WARNING: {TITLES[t]} is no number for {lost} of {len(values)} images: try "
                  f"--precision fp32, or another checkpoint")
        elif len(values) > 2 and values.clip(0, 1).std() < NEARLY_CONSTANT:
            print(f"WARNING: {TITLES[t]} is nearly the same for all {len(values)} images: it "
                  f"cannot tell them apart")


def add_columns(args, frame, pred, prompts, content):
    """Return the table to write: input, scores, error, rank_in_prompt, and keep if asked for.

    Ranks are by the mean of the scores on [0, 1], of quality alone where there is no prompt;
    equals rank in the order of their rows.
    """
    for name in {*SCORES, "error", "rank_in_prompt", "keep"} & {*frame}:  # none of it is lost
        free = name
        while free in frame:
            free += "_input"
        frame = frame.rename(columns={name: free})
    frame = add_scores(frame, pred, content["targets"])
    mean = pred[list(content["targets"])].clip(0, 1).mean(axis=1).round(6)
    rank = mean.groupby(np.array(prompts, dtype=object)).rank(method="first", ascending=False)
    frame["error"], frame["rank_in_prompt"] = pred["error"], rank.astype("Int64")
    limits = ((args.min_quality, frame.get("quality")),
              (args.min_consistency, frame.get("consistency")),
              (args.keep_top and -args.keep_top, -rank))
    passes = [values >= limit for limit, values in limits if limit is not None]
    if passes:
        frame["keep"] = np.all(passes, axis=0)
        print(f"{frame['keep'].sum()} of {len(frame)} images pass")
    return frame


def predict(args):
    """Score --predict's target with --checkpoint and write --predictions_csv.

    Exits with status 1 where an image could not be read; the others are scored all the same.
    """
    target = scores_path(args)
    partial = target.with_name(f".{target.name}.partial") if target and RANK == 0 else None
    with contextlib.redirect_stdout(sys.stdout if RANK or target else sys.stderr):
        content = scoring_checkpoint(args)
        frame, paths, prompts, unread = scoring_frame(args, argparse.Namespace(**content["args"]))
        pred = score_rows(args, content, partial, paths, prompts)
        judge(frame, pred, prompts, content)
        bad = pred["error"] != ""
        for count, what in ((bad.sum(), "images"), (len(unread), "prompts")):
            if count:
                print(f"{count} of {len(frame)} {what} could not be read: see the column error")
        pred.loc[~bad, "error"] = pd.Series(unread).reindex(pred.index[~bad], fill_value="")
        table = add_columns(args, frame, pred, prompts, content)
        text = "\ufeff" * args.excel + table.to_csv(index=False, lineterminator="\n")
        if target:
            save_text(target, text)
            print(f"{len(frame)} rows written to {target}")
        if partial:
            partial.unlink()
    if not target:
        print(text, end="")
    gather(None)
    if bad.any():
        raise SystemExit(1 if RANK == 0 else 0)  # one is enough: torchrun ends the others by it


if __name__ == "__main__":
    gc.freeze()  # what they made is not searched again, least of all at the exit
    gc.enable()
    main(args=ARGS)
