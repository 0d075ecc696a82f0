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

s0 is cos(f, t) by the CLIP as it was before training.

Axis letters: B batch, N rows of the CSV, U unique texts, D embedding, T tokens, W tower width,
H x W pixels where it is plain.
"""

import argparse
import base64
import contextlib
import copy
import csv
import ctypes
import datetime
import difflib
import errno
import functools
import hashlib
import html
import io
import itertools
import json
import logging
import math
import os
import platform
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import open_clip
import pandas as pd
import scipy.stats
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip import transform as clip_transform
from PIL import Image, ImageOps
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.serialization import config as serialization_config
from tqdm import tqdm

# --- constants ------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
FORMAT, FORMAT_VERSION = "baseline-aigiqa", 3  # of checkpoints
CACHE_VERSION = 2
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOS_SCALES = (1.0, 5.0, 10.0, 100.0)
METRICS = ("srocc", "plcc", "krocc", "rmse")
TARGETS = ("q", "c")
METRIC_NAMES = tuple(f"{metric}_{target}" for metric in METRICS for target in TARGETS)
MOST_SKIPPED = 0.05  # share of the images that --skip_bad_images leaves out at most
MOST_NARROW = 100  # longer side of an image divided by its shorter one

# Lower edges of SROCC and upper edges of the Train-Val Gap, best tier first.
TIERS = {
    "q": (("excellent", 0.90, 0.02), ("good", 0.87, 0.03), ("fair", 0.85, 0.05)),
    "c": (("excellent", 0.88, 0.02), ("good", 0.85, 0.03), ("fair", 0.82, 0.05)),
}

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
            epochs=8, lr=3e-4, head_lr=1e-3, dropout=0.4, batch_size=16, weight_decay=0.05,
            num_workers=0)

# Flags that only do something together with another one.
DEPENDENT_FLAGS = {"freeze_layers": "partial_freeze", "refinement_layers": "use_refinement",
                   "refinement_heads": "use_refinement", "refinement_dim": "use_refinement",
                   "w_exp": "use_explanations", "explanation_column": "use_explanations",
                   "checkpoint": "predict", "prompt": "predict", "predictions_csv": "predict",
                   "min_quality": "predict", "min_consistency": "predict"}


class UserError(Exception):
    """Tell the user the rule, the value that broke it and the remedy; exits with status 2."""


def progress(iterable, what, total):
    """Show a progress bar on a terminal, nothing elsewhere."""
    return tqdm(iterable, desc=what, total=total, leave=False,
                disable=WORLD.rank > 0 or not sys.stderr.isatty())


def autocast(args, device):
    """Return the autocast context of --precision; heads and losses leave it."""
    return torch.autocast(device.type, dtype=PRECISIONS[args.precision],
                          enabled=args.precision != "fp32")


def resolve_precision(args, device):
    """Replace --precision auto by what the device does best."""
    if args.precision == "auto":
        half = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp16"
        args.precision = half if device.type == "cuda" else "fp32"


def pick_device():
    """Return the device to compute on: CUDA where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    keep_freed_memory()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # on the CPU too; see attention
    return torch.device("cpu")


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors instead of giving it back to the system.

    Faulting the pages of large activations in again can take as long as the arithmetic on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


# --- distributed ----------------------------------------------------------------------------

PATIENCE = datetime.timedelta(minutes=30)  # that processes wait for each other, cache included


class World:
    """The processes that torchrun started and what they tell each other; else this one alone.

    rank, size: of all processes; local_rank, local_size: of those on this machine. Only rank 0
    prints and writes. All but gradients goes through gloo, where a process that died is noticed
    at once; `everyone` and `node` are its groups of all processes and of this machine's.
    """

    def __init__(self):
        self.rank, self.size, self.local_rank, self.local_size = 0, 1, 0, 1
        self.everyone = self.node = None
        self.tag = ""  # tells this machine's temporary files from another one's on a shared disk

    def join(self):
        """Enter the process group if torchrun started several processes."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return
        self.rank, self.size, self.local_rank, self.local_size = (
            int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        if self.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        cuda = torch.cuda.is_available()
        if cuda and self.local_rank >= torch.cuda.device_count():
            raise UserError(f"Each process needs a GPU of its own, but this machine has "
                            f"{torch.cuda.device_count()} for {self.local_size} processes: lower "
                            f"--nproc_per_node.")
        if cuda:
            torch.cuda.set_device(self.local_rank)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        self.everyone = dist.new_group(backend="gloo", timeout=PATIENCE)
        machine = os.environ.get("GROUP_RANK", "0")
        machines = self.gather([machine])
        for name in sorted(set(machines)):
            members = [rank for rank, other in enumerate(machines) if other == name]
            group = dist.new_group(members, backend="gloo", timeout=PATIENCE)
            self.node = group if name == machine else self.node
        self.tag = f"{self.gather([os.getpid()], self.node)[0]}.{machine}"

    def leave(self):
        """Wait for all, so that no early end makes torchrun stop one that still writes."""
        if self.everyone is not None:
            self.barrier()
            dist.destroy_process_group()
        self.__init__()

    def barrier(self):
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier(self.everyone)

    def part(self, count, node=False):
        """Return the slice of `count` things that is this process's share, of all or its node's."""
        rank, size = (self.local_rank, self.local_size) if node else (self.rank, self.size)
        return slice(-(-count * rank // size), -(-count * (rank + 1) // size))

    def gather(self, items, group=None):
        """Return the lists of all processes (of a group) joined in the order of ranks."""
        if self.size == 1:
            return items
        group = group or self.everyone
        lists = [None] * dist.get_world_size(group)
        dist.all_gather_object(lists, items, group)
        return list(itertools.chain.from_iterable(lists))

    def from_main(self, function, *args):
        """Return on every process what a function returns on rank 0, which alone calls it."""
        if self.size == 1:
            return function(*args)
        box = [function(*args) if self.rank == 0 else None]
        dist.broadcast_object_list(box, 0, self.everyone)
        return box[0]

    def largest(self, value):
        """Return the largest of the processes' integers."""
        if self.size == 1:
            return value
        value = torch.tensor(value)
        dist.all_reduce(value, dist.ReduceOp.MAX, self.everyone)
        return int(value)

    @contextlib.contextmanager
    def first(self, leads):
        """Let the processes where `leads` is true do something before the others do it."""
        if not leads:
            self.barrier()
        yield
        if leads:
            self.barrier()

    def said_once(self):
        """Return a context in which rank 0 alone writes to stderr."""
        return contextlib.redirect_stderr(sys.stdout if self.rank else sys.stderr)

    def let_main_speak(self):
        """Wait a moment before an error that rank 0 may have as well: then it is said once."""
        if self.rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2)


WORLD = World()


def main_only(function):
    """Make a function do nothing but on rank 0."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) if WORLD.rank == 0 else None
    return wrapper


# --- command line ---------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of every flag that has one, in a help of 96 columns."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=96)

    def _get_help_string(self, action):
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Suggest the nearest flag when one is unknown."""

    def error(self, message):
        """Exit with status 2 after the message."""
        if message.startswith("unrecognized arguments:"):
            known = [flag for action in self._actions for flag in action.option_strings]
            for word in message.split(":", 1)[1].split():
                near = difflib.get_close_matches(word.split("=")[0], known, n=1)
                message += f" (did you mean {near[0]}?)" if near else ""
        super().error(message)


def number(low, high=math.inf, kind=float, open_low=False):
    """Return an argparse type for finite numbers from low (open_low: above it) to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or (open_low and value == low) or value == math.inf:
            edge = "above" if open_low else "at least"
            limit = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"must be {edge} {low:g}{limit}, got {text}")
        return value
    parse.__name__ = kind.__name__
    return parse


def label_scale(text):
    """Parse a label scale: a positive number, or None for 'auto'."""
    return None if text == "auto" else number(0, open_low=True)(text)


label_scale.__name__ = "label scale"
fraction = number(0, 1)
positive = number(0, open_low=True)
positive_int = number(1, kind=int)
whole = number(0, kind=int)


def build_parser():
    """Return the argparse parser, its groups in the reference card's order."""
    parser = Parser(prog="baseline.py", usage="python baseline.py [flags]",
                    formatter_class=HelpFormatter, allow_abbrev=False, add_help=False,
                    description=__doc__.split("\n\n")[0])

    g = parser.add_argument_group("shortcuts")
    g.add_argument("-h", "--help", action="help", help="show this help and exit")
    g.add_argument("--preset", choices=sorted(PRESETS),
                   help="a combination from the reference card; explicit flags win over it")
    g.add_argument("--demo", action="store_true",
                   help="use data/demo (synthetic images, tiny CLIP, its own epochs and lr)")

    g = parser.add_argument_group("data")
    g.add_argument("--data_csv_path", default="data/data.csv",
                   help="CSV with one image per row")
    g.add_argument("--image_base_dir", default="data/images",
                   help="folder that the names in the CSV are relative to")
    g.add_argument("--name_column", default="name", help="CSV column: image file name")
    g.add_argument("--prompt_column", default="prompt", help="CSV column: prompt")
    g.add_argument("--quality_column", default="mos_quality", help="CSV column: quality MOS")
    g.add_argument("--consistency_column", default="mos_align",
                   help="CSV column: consistency MOS")
    g.add_argument("--label_scale_q", type=label_scale, default="auto",
                   help="what the quality MOS is divided by; auto: smallest of 1, 5, 10, 100 "
                        "not below the maximum")
    g.add_argument("--label_scale_c", type=label_scale, default="auto",
                   help="the same for the consistency MOS")
    g.add_argument("--split_by", choices=("prompt", "image"), default="prompt",
                   help="prompt: no prompt on both sides; image: leaks prompts")
    g.add_argument("--val_ratio", type=number(0, 0.9, open_low=True), default=0.2,
                   help="share of images in the validation part")
    g.add_argument("--test_ratio", type=number(0, 0.9), default=0.0,
                   help="share of images in the test part, used once at the end; 0: none")
    g.add_argument("--skip_bad_images", action="store_true",
                   help="go on without images that are missing or unreadable (at most 5 %%) and "
                        "list them in skipped.csv; they are decoded once more, at the start")
    g.add_argument("--resize_mode", choices=("shortest", "squash", "longest"),
                   help="how an image reaches the square input: crop, squash or pad; "
                        "not given: as the model was trained")
    g.add_argument("--augment", choices=("none", "flip", "crop"), default="flip",
                   help="training views; crop: crops of 90-100 %% of the area, and flips")

    g = parser.add_argument_group("CLIP and freezing")
    g.add_argument("--clip_model", default="ViT-L-14",
                   help="open_clip name, local-dir:PATH or hf-hub:ORG/NAME")
    g.add_argument("--pretrained", default="openai",
                   help="open_clip tag, a weights file, or none (random weights); "
                        "local-dir: and hf-hub: models bring their own")
    g.add_argument("--quick_gelu", action="store_true",
                   help="the weights file was trained with QuickGELU (every OpenAI release)")
    g.add_argument("--freeze_clip", action="store_true", help="train the heads only")
    g.add_argument("--partial_freeze", action="store_true",
                   help="freeze the embeddings and the first freeze_layers blocks of each tower")
    g.add_argument("--freeze_layers", type=whole, default=8,
                   help="blocks to freeze per tower with --partial_freeze")

    g = parser.add_argument_group("residual learning and heads")
    g.add_argument("--residual_scale_q", type=positive, default=0.2,
                   help="bound of the learned quality residual, on the [0, 1] scale")
    g.add_argument("--residual_scale_c", type=positive, default=0.2,
                   help="bound of the learned consistency residual, on the [0, 1] scale")
    g.add_argument("--no_residual_learning", action="store_true",
                   help="predict both scores directly")
    g.add_argument("--no_base_calibration", action="store_true",
                   help="do not fit the base to the training part before the first step")
    g.add_argument("--use_two_branch", action="store_true",
                   help="consistency base: mean of a cosine and an MLP branch")
    g.add_argument("--use_refinement", action="store_true",
                   help="correct the consistency with a small transformer encoder")
    g.add_argument("--refinement_layers", type=positive_int, default=4, help="its layers")
    g.add_argument("--refinement_heads", type=positive_int, default=8, help="its heads")
    g.add_argument("--refinement_dim", type=positive_int, default=256, help="its width")
    g.add_argument("--use_explanations", action="store_true",
                   help="pull a linear head to the text embedding of each row's explanation")
    g.add_argument("--explanation_column", default="explanation",
                   help="CSV column: explanation")

    g = parser.add_argument_group("loss weights")
    g.add_argument("--w_q", type=number(0), default=0.5, help="weight of the quality loss")
    g.add_argument("--w_c", type=number(0), default=0.5, help="weight of the consistency loss")
    g.add_argument("--w_exp", type=number(0), default=0.1, help="weight of the explanation loss")

    g = parser.add_argument_group("training")
    g.add_argument("--epochs", type=positive_int, default=20, help="passes over the data")
    g.add_argument("--batch_size", type=positive_int, default=32,
                   help="images per step (of each process)")
    g.add_argument("--grad_accum_steps", type=positive_int, default=1,
                   help="steps per optimiser update")
    g.add_argument("--lr", type=positive, default=3e-5,
                   help="peak learning rate of CLIP (of the heads where CLIP is frozen)")
    g.add_argument("--head_lr", type=positive,
                   help="peak learning rate of the heads; not given: lr where CLIP is frozen, "
                        "otherwise lr but at least 1e-3")
    g.add_argument("--weight_decay", type=number(0), default=1e-4,
                   help="AdamW's; never on norms, biases and scalars")
    g.add_argument("--warmup_ratio", type=fraction, default=0.05,
                   help="share of all updates that warm up")
    g.add_argument("--scheduler", choices=("cosine", "linear", "constant", "step"),
                   default="cosine", help="learning rate after the warm-up")
    g.add_argument("--step_lr_step_size", type=positive_int, default=1,
                   help="epochs per decay of --scheduler step")
    g.add_argument("--step_lr_gamma", type=positive, default=0.1,
                   help="factor per decay of --scheduler step")
    g.add_argument("--seed", type=whole, default=42, help="seed of split, heads and order")
    g.add_argument("--repeats", type=positive_int, default=1,
                   help="runs over as many splits (seeds seed, seed+1, ..)")

    g = parser.add_argument_group("regularisation and selection")
    g.add_argument("--max_grad_norm", type=number(0), default=1.0,
                   help="gradient clipping norm; 0: off")
    g.add_argument("--dropout", type=number(0, 0.99), default=0.1, help="in every head")
    g.add_argument("--early_stopping_patience", type=whole, default=0,
                   help="epochs without improvement before stopping; 0: off")
    g.add_argument("--early_stopping_min_delta", type=number(0), default=0.0005,
                   help="SROCC that counts as an improvement")
    g.add_argument("--select_by", choices=("mean", "quality", "consistency"), default="mean",
                   help="validation SROCC that picks the best epoch")

    g = parser.add_argument_group("speed and memory")
    g.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="of the towers; auto: bf16 or fp16 on CUDA, fp32 on CPU")
    g.add_argument("--no_amp", action="store_true", help="the same as --precision fp32")
    g.add_argument("--num_workers", type=whole, default=4,
                   help="processes that decode images, at most one per core")
    g.add_argument("--pin_memory", action="store_true", default=True,
                   help="page-locked batches for a CUDA device (on unless --no_pin_memory)")
    g.add_argument("--no_pin_memory", dest="pin_memory", action="store_false",
                   help="turn --pin_memory off")
    g.add_argument("--cache", choices=("auto", "off"), default="auto",
                   help="keep what is frozen, or the decoded images, on disk")
    g.add_argument("--cache_dir", help="where; not given: <output_dir>/cache")
    g.add_argument("--cache_max_gb", type=positive, default=20.0, help="size limit of it in GB")
    g.add_argument("--grad_checkpointing", action="store_true",
                   help="recompute activations in the backward pass: less memory, more time")
    g.add_argument("--compile", action="store_true", help="torch.compile what trains")

    g = parser.add_argument_group("output")
    g.add_argument("--output_dir", default="outputs", help="where everything is written")
    g.add_argument("--save_every_steps", type=whole, default=0,
                   help="also save baseline_last.pt every so many updates; 0: each epoch")
    g.add_argument("--log_csv", default="training_log.csv", help="log, inside output_dir")
    g.add_argument("--resume_from", help="baseline_last.pt or baseline_best.pt to go on from")
    g.add_argument("--no_plots", action="store_true", help="write no pictures and no report.html")
    g.add_argument("--tensorboard", action="store_true",
                   help="also write scalars and pictures for TensorBoard")

    g = parser.add_argument_group("scoring")
    g.add_argument("--predict", metavar="TARGET",
                   help="score a CSV (name, prompt), a folder of images or one image, "
                        "instead of training")
    g.add_argument("--checkpoint", default="outputs/baseline_best.pt",
                   help="what --predict scores with")
    g.add_argument("--prompt", help="the prompt of every image of --predict; a folder's images "
                                    "may have their own in a .txt file of the same name")
    g.add_argument("--predictions_csv", default="predictions.csv",
                   help="where --predict writes; - for standard output")
    g.add_argument("--min_quality", type=number(0),
                   help="add a column `keep`: quality on the MOS scale at least this")
    g.add_argument("--min_consistency", type=number(0),
                   help="the same for consistency; with both, both must hold")
    return parser


def explicit_values(parser, argv):
    """Return {dest: value} of the flags that argv really names."""
    saved = [(action, action.default) for action in parser._actions]
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    try:
        return vars(parser.parse_args(argv))
    finally:
        for action, default in saved:
            action.default = default


def parse_args(argv=None):
    """Parse the command line; explicit flags win over --preset, which wins over --demo.

    Returns the namespace of all flags. Contradictions end in parser.error (exit status 2).
    """
    parser = build_parser()
    parser.parse_args(argv)  # --help and errors come from here, with the true defaults
    given = explicit_values(parser, argv)
    defaults = dict(DEMO) if given.get("demo") else {}
    defaults.update(PRESETS.get(given.get("preset"), {}))
    if "freeze_clip" in given or "partial_freeze" in given:
        defaults = {k: v for k, v in defaults.items() if k not in ("freeze_clip", "partial_freeze")}
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.freeze_clip and args.partial_freeze:
        parser.error("--freeze_clip and --partial_freeze exclude each other: drop one of them")
    if args.val_ratio + args.test_ratio >= 1:
        parser.error(f"--val_ratio {args.val_ratio:g} and --test_ratio {args.test_ratio:g} leave "
                     f"no training images: their sum must stay below 1")
    if args.w_q + args.w_c == 0:
        parser.error("--w_q and --w_c are both 0, so nothing would be learned: raise one of them")
    if args.refinement_dim % args.refinement_heads:
        parser.error(f"--refinement_dim {args.refinement_dim} must be a multiple of "
                     f"--refinement_heads {args.refinement_heads}")
    if args.repeats > 1 and args.resume_from:
        parser.error("--repeats continues by itself when the command is restarted: "
                     "drop --resume_from")
    if args.no_amp and given.get("precision", "fp32") != "fp32":
        parser.error(f"--no_amp means --precision fp32, not {args.precision}: drop one of them")
    for flag, needed in DEPENDENT_FLAGS.items():
        if flag in given and not getattr(args, needed):
            print(f"WARNING: --{flag} does nothing without --{needed}", file=sys.stderr)
    if args.no_amp:
        args.precision = "fp32"
    args.explicit = (set(given) | set(defaults)) - {"preset", "demo"}
    args.cache_dir = args.cache_dir or str(Path(args.output_dir) / "cache")
    return args


# --- data -----------------------------------------------------------------------------------


@dataclass
class Table:
    """The validated CSV, sorted by name, so that nothing depends on the order of its rows.

    frame: N rows, the CSV's own columns; its index is the row in the CSV (the header is row 1)
    paths: N image files
    prompts, prompt_id: U unique prompts; (N,) index into them
    explanations, explanation_id: unique non-empty explanations; (N,) index, -1 where empty
    quality, consistency: (N,) float32 human MOS divided by the label scale, NaN where unknown
    scales: {"q": .., "c": ..} label scales
    skipped: what --skip_bad_images left out, as rows of skipped.csv
    """

    frame: pd.DataFrame
    paths: list
    prompts: list
    prompt_id: np.ndarray
    explanations: list
    explanation_id: np.ndarray
    quality: np.ndarray
    consistency: np.ndarray
    scales: dict
    skipped: tuple = ()


def read_csv(path):
    """Read a CSV as text, byte order mark or not; raise UserError where it is none.

    Returns a DataFrame of strings without blank rows, its index the row in the CSV (header: 1).
    """
    if not os.path.isfile(path):
        raise UserError(f"The CSV must exist, but there is no file {path}: give its place with "
                        f"--data_csv_path, or see it work with --demo.")
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig",
                            skip_blank_lines=False).fillna("")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8, but byte {error.start} is not: save it as "
                        f"'CSV UTF-8'.") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        raise UserError(f"{path} is not a readable CSV ({str(error).strip()}): its first line must "
                        f"name the columns, and texts with commas need quotes.") from error
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes what is too much as an index
        raise UserError(f"{path} is not a readable CSV: its rows have more cells than its first "
                        f"line has columns; name every column, and quote texts with commas.")
    frame.index = np.arange(2, len(frame) + 2)
    return frame[(frame != "").any(axis=1)]


def auto_scale(mos):
    """Return the smallest of MOS_SCALES that is not below the largest MOS, or None."""
    largest = mos.max() if len(mos) else 0
    return next((scale for scale in MOS_SCALES if largest <= scale), None)


def inside(base, name):
    """Return whether base / name, links resolved, stays inside the resolved folder base."""
    real = os.path.realpath(os.path.join(base, name))
    return not os.path.isabs(name) and Path(real).is_relative_to(base)


def check_names(frame, args):
    """Return the problems of the name and prompt columns as (what, rows, remedy)."""
    names, prompts = frame[args.name_column], frame[args.prompt_column]
    base = Path(args.image_base_dir).resolve()
    blank = names.str.strip() == ""
    outside = ~blank & ~names.map(lambda name: "\0" not in name and inside(base, name))
    missing = ~blank & ~outside & ~names.map(lambda name: os.path.isfile(base / name))
    missing &= not args.skip_bad_images  # there they count as unreadable
    rows = frame.index.to_series()
    return [
        ("empty image names", rows[blank], "fill them in or remove the rows"),
        ("duplicate image names", rows[names.duplicated(keep=False) & ~blank],
         "keep one row per image"),
        ("empty prompts", rows[prompts.str.strip() == ""], "fill them in or remove the rows"),
        (f"image names that leave {args.image_base_dir}", rows[outside],
         "use names relative to --image_base_dir, without '..' or links that lead out"),
        (f"image files missing in {args.image_base_dir}", rows[missing],
         "check --image_base_dir and the names"),
    ]


def check_mos(frame, column, scale, flag):
    """Return the problems of one MOS column and its label scale, None where it has none.

    frame: the CSV; column: its name; scale: the user's label scale or None for automatic.
    """
    mos = pd.to_numeric(frame[column].str.strip(), errors="coerce").astype(float)
    finite = np.isfinite(mos)
    scale = scale or auto_scale(mos[finite])
    high = finite & (mos > (scale or MOS_SCALES[-1]))
    rows = frame.index.to_series()
    return scale, [
        (f"{column} that is not a finite number", rows[~finite], "correct or remove the rows"),
        (f"{column} below 0", rows[finite & (mos < 0)], "shift the scores to start at 0"),
        (f"{column} above the label scale {scale or MOS_SCALES[-1]:g}", rows[high],
         f"give the top of your scale with --{flag}"),
    ]


def raise_problems(path, problems):
    """Raise one UserError that lists every kind of problem with its count and first rows."""
    lines = []
    for what, rows, remedy in problems:
        if len(rows):
            first = ", ".join(map(str, rows[:5])) + (", .." if len(rows) > 5 else "")
            noun = "row" if len(rows) == 1 else "rows"
            lines.append(f"  - {what}: {len(rows)} {noun} ({first}); {remedy}")
    if lines:
        raise UserError(f"{path} cannot be used, the header being row 1:\n" + "\n".join(lines))


def unique_texts(texts):
    """Return (sorted unique texts, (N,) int64 index of each text in them)."""
    unique, index = np.unique(np.array(texts, dtype=object).astype(str), return_inverse=True)
    return unique.tolist(), index.astype(np.int64)


def load_table(args):
    """Read and validate the whole CSV; raise one UserError that lists all that is wrong."""
    frame = read_csv(args.data_csv_path)
    columns = [args.name_column, args.prompt_column, args.quality_column, args.consistency_column]
    columns += [args.explanation_column] if args.use_explanations else []
    absent = [column for column in columns if column not in frame]
    if absent:
        raise UserError(f"{args.data_csv_path} needs the columns {', '.join(columns)}, but "
                        f"{', '.join(absent)} is missing (it has {', '.join(frame.columns)}): "
                        f"rename it with --name_column, --prompt_column, --quality_column, "
                        f"--consistency_column or --explanation_column.")
    if frame.empty:
        raise UserError(f"{args.data_csv_path} has a header but no rows: add one per image.")
    scale_q, problems_q = check_mos(frame, args.quality_column, args.label_scale_q,
                                    "label_scale_q")
    scale_c, problems_c = check_mos(frame, args.consistency_column, args.label_scale_c,
                                    "label_scale_c")
    raise_problems(args.data_csv_path, check_names(frame, args) + problems_q + problems_c)
    frame, skipped = frame.sort_values(args.name_column), ()
    if args.skip_bad_images:
        frame, skipped = WORLD.from_main(drop_bad_images, frame, args)
    return make_table(frame, args, {"q": scale_q, "c": scale_c}, skipped)


def drop_bad_images(frame, args):
    """Decode every image once; return (the rows that can be read, rows of skipped.csv)."""
    paths = [Path(args.image_base_dir, name) for name in frame[args.name_column]]
    loader = torch.utils.data.DataLoader(ReadErrors(paths), batch_size=None,
                                         num_workers=min(args.num_workers, os.cpu_count() or 1))
    reasons = list(progress(loader, "reading every image", len(paths)))
    skipped = [{"name": name, "row": row, "reason": reason} for name, row, reason in
               zip(frame[args.name_column], frame.index, reasons) if reason]
    if len(skipped) > MOST_SKIPPED * len(frame):
        first = ", ".join(f"{bad['name']} (CSV row {bad['row']}: {bad['reason']})"
                          for bad in skipped[:3])
        raise UserError(f"--skip_bad_images leaves out {MOST_SKIPPED:.0%} of the images at most, "
                        f"but {len(skipped)} of {len(frame)} cannot be read: {first}"
                        f"{', ..' if len(skipped) > 3 else ''}; check --image_base_dir and the "
                        f"files.")
    print(f"{len(skipped)} of {len(frame)} images cannot be read and are left out"
          + (": see skipped.csv" if skipped else ""))
    return frame[[not reason for reason in reasons]], skipped


def make_table(frame, args, scales, skipped=()):
    """Turn a validated CSV into a Table (see there)."""
    prompts, prompt_id = unique_texts(frame[args.prompt_column])
    explanations, explanation_id = [], np.full(len(frame), -1)
    if args.use_explanations:
        texts = frame[args.explanation_column].str.strip()
        filled = (texts != "").to_numpy()
        explanations, explanation_id[filled] = unique_texts(texts[filled])
    mos = {target: (pd.to_numeric(frame[column].str.strip()) / scales[target]).to_numpy(np.float32)
           for target, column in (("q", args.quality_column), ("c", args.consistency_column))}
    paths = [Path(args.image_base_dir, name) for name in frame[args.name_column]]
    return Table(frame, paths, prompts, prompt_id, explanations, explanation_id,
                 mos["q"], mos["c"], scales, skipped)


def split_rows(table, args, seed):
    """Split the rows into {"train", "val", "test"}: sorted arrays of row numbers.

    By prompt, all images of a prompt (case and spacing aside) go to one part. Prompts are drawn
    in a random order that depends on the seed alone; one is taken while that brings the part's
    number of images closer to its ratio.
    """
    if args.split_by == "prompt":
        keys = [" ".join(prompt.casefold().split()) for prompt in table.prompts]
        group = unique_texts(keys)[1][table.prompt_id]
    else:
        group = np.arange(len(table.frame))
    sizes = np.bincount(group)
    part_of = np.zeros(len(sizes), dtype=int)
    order = np.random.default_rng([seed, 0]).permutation(len(sizes))
    for part, ratio in ((2, args.test_ratio), (1, args.val_ratio)):
        room = ratio * len(group)
        for g in order:
            if part_of[g] == 0 and sizes[g] / 2 <= room:
                part_of[g], room = part, room - sizes[g]
    parts = {name: np.flatnonzero(part_of[group] == i)
             for i, name in enumerate(("train", "val", "test"))}
    wanted = ["train", "val"] + (["test"] if args.test_ratio else [])
    small = [name for name in wanted if len(parts[name]) < 2]
    if small:
        raise UserError(f"Each part needs at least 2 images, but {small[0]} has "
                        f"{len(parts[small[0]])} of {len(group)} (in {len(sizes)} groups): add "
                        f"images or prompts, or change --val_ratio, --test_ratio or --split_by.")
    return parts


def split_hash(table, parts, args):
    """Return a short hash of which image name is in which part."""
    names = table.frame[args.name_column].to_numpy()
    text = json.dumps({part: names[rows].tolist() for part, rows in parts.items()})
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class ImageError(ValueError):
    """Say why a file is no readable image."""


def load_image(path):
    """Return the image as RGB, upright as its EXIF says, the first frame where it is animated.

    16-bit greyscale is scaled to 8 bits (Pillow would clip it). Raises ImageError where the file
    is no readable image, or one so large or so narrow that it would fill the memory.
    """
    try:
        with warnings.catch_warnings():
            # Pillow itself refuses a decompression bomb at twice its limit only.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            short, long = sorted(image.size)
            if long > MOST_NARROW * short:  # resizing the short side would blow the long one up
                raise ImageError(f"it has {image.width} x {image.height} pixels, and the longer "
                                 f"side may be {MOST_NARROW} times the shorter at most")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                grey = np.asarray(image, dtype=np.float64) / 257
                image = Image.fromarray(grey.astype(np.uint8))
            return image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # damaged files make decoders fail in every way there is
        raise ImageError(str(error) or type(error).__name__) from error


def unreadable(path, row, reason):
    """Return the UserError about an image of a CSV row that cannot be read."""
    return UserError(f"Every image must be readable, but {path} (CSV row {row}) is not "
                     f"({reason}): replace the file, remove the row, or give --skip_bad_images.")


class ReadErrors(torch.utils.data.Dataset):
    """Say of each of N image files why it cannot be read, "" where it can."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        """Return the reason for one file."""
        try:
            load_image(self.paths[index])
        except ImageError as error:
            return str(error)
        return ""


class ImageBatches(torch.utils.data.Dataset):
    """Decode and preprocess batches of images with open_clip's own transform, up to uint8.

    paths: N files; config: open_clip PreprocessCfg as a dict. An item is asked for by an array of
    B row numbers and is (images, errors): (B, 3, H, W) uint8, black where unreadable, and
    {row number: reason} (an error that a worker raises would reach the user as a traceback).
    """

    def __init__(self, paths, config):
        self.paths = paths
        transform = clip_transform.image_transform_v2(
            clip_transform.PreprocessCfg(**config), is_train=False)
        self.transforms = transform.transforms[:-2]  # to tensor and normalisation come later
        size = config["size"]
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def view(self, index):
        """Return the preprocessed original view of one image as (3, H, W) uint8."""
        image = load_image(self.paths[index])
        for transform in self.transforms:
            image = transform(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def __getitem__(self, indices):
        """Return (images, errors) of some row numbers (see the class)."""
        images, errors = torch.zeros(len(indices), 3, *self.size, dtype=torch.uint8), {}
        for place, index in enumerate(indices):
            try:
                images[place] = self.view(index)
            except ValueError as error:  # ImageError, or a side of 0 pixels after resizing
                errors[int(index)] = str(error)
        return images, errors


def tokenize(tokenizer, texts, what):
    """Return (U, T) token ids, and say once how many texts are longer than the text tower reads."""
    context = tokenizer.context_length
    ids = tokenizer(texts, context_length=8 * context)
    padding = tokenizer([""], context_length=8 * context)[0, -1]
    longer = int((ids[:, context:] != padding).any(dim=1).sum())
    if longer:
        print(f"{longer} of {len(texts)} {what} are longer than {context} tokens: the text tower "
              f"reads their beginning only")
    return tokenizer(texts, context_length=context)


# --- CLIP towers ----------------------------------------------------------------------------


def find_weights(args):
    """Return (weights file or None, open_clip's config of the tag or {}).

    Raises UserError that names the model, the tag and the ways out where there is none to be had.
    """
    schema, identifier = open_clip.factory.parse_model_name(args.clip_model)
    if args.pretrained == "none":
        return None, {}
    if Path(args.pretrained).is_file():
        return args.pretrained, {}
    if schema == "local-dir":
        found = Path(identifier).is_dir() and open_clip.factory._find_checkpoint_in_dir(
            Path(identifier))
        if not found:
            raise UserError(f"--clip_model {args.clip_model} must be a folder with "
                            f"open_clip_config.json and weights, but no weights are in "
                            f"{identifier}: correct the path, or give --pretrained none.")
        return found, {}
    config = {}
    if schema is None:
        config = open_clip.get_pretrained_cfg(args.clip_model, args.pretrained)
        if not config:
            tags = open_clip.list_pretrained_tags_by_model(args.clip_model)
            raise UserError(f"--pretrained must be none, a file, or a tag of {args.clip_model} "
                            f"({', '.join(tags) or 'which has no tags'}), but {args.pretrained} "
                            f"is not.")
    try:
        skip_unreachable_hub()
        if schema == "hf-hub":
            return open_clip.factory.download_pretrained_from_hf(identifier), {}
        return open_clip.download_pretrained(config), config
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise UserError(
            f"The weights '{args.pretrained}' of {args.clip_model} are not on this machine and "
            f"could not be downloaded ({reason}): connect to the network once, or give a local "
            f"file with --pretrained FILE (and --quick_gelu for an OpenAI release), a folder with "
            f"--clip_model local-dir:PATH, or see it work with --demo.") from error


def skip_unreachable_hub():
    """Let the hub's library use its local cache at once where its host cannot be found.

    Without this it retries for most of a minute before it says that there is no network.
    """
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


class SkipRandomInit(torch.overrides.TorchFunctionMode):
    """Leave parameters uninitialised: pretrained weights overwrite them anyway.

    Random initialisation of a ViT-L-14 takes seconds. Only random fills are skipped; constants
    (norm weights, running statistics, masks) are computed as always.
    """

    FILLS = {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_,
             torch.Tensor.trunc_normal_ if hasattr(torch.Tensor, "trunc_normal_") else None}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.FILLS:
            return args[0]
        if function is torch.randn:
            function = torch.empty
        return function(*args, **(kwargs or {}))


def tower_configs(config, weights):
    """Return (vision_cfg, text_cfg) that build fast blocks and load no weights of their own.

    open_clip's `custom` block has the state-dict keys of its default one, but runs attention as
    plain matrix products, which stay fast where the weights are frozen.
    """
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    elif not isinstance(vision.get("layers"), (list, tuple)):
        vision.setdefault("block_type", "custom")
    if text.get("hf_model_name"):
        text["hf_model_pretrained"] = weights is None and text.get("hf_model_pretrained", True)
    else:
        text.setdefault("block_type", "custom")
    return vision, text


def looks_like_openai(path):
    """Return whether a weights file is named like one of OpenAI's releases."""
    name = Path(path).name.lower()
    return "openai" in name or (name.endswith(".pt") and name.startswith(
        ("vit-b-32", "vit-b-16", "vit-l-14", "rn50", "rn101")))


@contextlib.contextmanager
def quiet_library():
    """Silence open_clip's own log lines and warnings: ours say what matters."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def load_weights(model, path):
    """Load a weights file into an open_clip model: tensors only, memory-mapped where it can be."""
    # Files in torch's older formats cannot be mapped.
    mapped = torch.serialization._is_zipfile(open(path, "rb"))
    try:
        with quiet_library(), serialization_config.patch("load.mmap", mapped):
            open_clip.load_checkpoint(model, path)
    except Exception as error:  # a damaged file fails in pickle, zip, safetensors or by its keys
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{path} does not hold the weights of this model ({reason}): give the "
                        f"open_clip state dict of --clip_model, as safetensors or a torch file "
                        f"that loads with weights_only=True.") from error


def file_hash(path):
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def load_clip(args, seed):
    """Build the CLIP, load its weights and return (model, tokenizer, identity).

    identity: what features and checkpoints depend on: model, weights hash, quick_gelu, preprocess.
    seed: of the random weights of --pretrained none. QuickGELU is what the tag was trained with
    (open_clip itself only warns), what --quick_gelu says, or what the model's own config says.
    """
    try:
        if args.clip_model.startswith("hf-hub:"):
            skip_unreachable_hub()
        config = open_clip.get_model_config(args.clip_model)
    except (OSError, ValueError) as error:
        raise UserError(f"--clip_model {args.clip_model} has no readable open_clip_config.json "
                        f"({error}): correct the path or name.") from error
    if config is None:
        near = difflib.get_close_matches(args.clip_model, open_clip.list_models(), 3)
        raise UserError(f"--clip_model must be known to open_clip, but {args.clip_model} is not: "
                        f"try {', '.join(near) or 'local-dir:PATH'}.")
    with WORLD.first(WORLD.local_rank == 0):  # one process of a machine downloads
        weights, tag = find_weights(args)
    quick_gelu = bool(args.quick_gelu or tag.get("quick_gelu") or config.get("quick_gelu"))
    if weights == args.pretrained and looks_like_openai(weights) and not quick_gelu:
        print(f"WARNING: {weights} is named like an OpenAI release, which needs QuickGELU: add "
              f"--quick_gelu unless you know better")
    if weights is None:
        print(f"WARNING: {args.clip_model} starts from RANDOM weights (--pretrained none)")
    vision, text = tower_configs(config, weights)
    overlay = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode")
               if tag.get(key)}
    overlay.update({"resize_mode": args.resize_mode} if args.resize_mode else {})
    torch.manual_seed(seed)
    with quiet_library(), SkipRandomInit() if weights else contextlib.nullcontext():
        model = open_clip.create_model(args.clip_model, load_weights=False,
                                       force_quick_gelu=quick_gelu, vision_cfg=vision,
                                       text_cfg=text, force_preprocess_cfg=overlay)
        tokenizer = open_clip.get_tokenizer(args.clip_model)
    if weights:
        load_weights(model, weights)
    fingerprint = file_hash(weights) if weights else f"random-{seed}-{torch.__version__}"
    return model, tokenizer, {"model": args.clip_model, "pretrained": args.pretrained,
                              "weights": fingerprint, "quick_gelu": quick_gelu,
                              "embed_dim": config["embed_dim"],
                              "preprocess": model.visual.preprocess_cfg}


def pooled_block(block, x, position, mask=None):
    """Run a block for the one token that leaves the tower: exact, at a fraction of the work.

    Only keys and values need all tokens; query, projection and MLP are computed for one.
    x: (B, T, W) tokens; position: (B,) the token to keep; mask: (B, 1, 1, T) bool keys to see.
    Returns (B, 1, W).
    """
    attn, width, rows = block.attn, x.shape[-1], torch.arange(len(x), device=x.device)
    y = block.ln_1(x)
    weight_q, weight_kv = attn.in_proj_weight.split([width, 2 * width])
    bias_q, bias_kv = ((None, None) if attn.in_proj_bias is None
                       else attn.in_proj_bias.split([width, 2 * width]))
    query = F.linear(y[rows, position].unsqueeze(1), weight_q, bias_q)
    key, value = F.linear(y, weight_kv, bias_kv).chunk(2, dim=-1)
    query, key, value = (z.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
                         for z in (query, key, value))
    out = F.scaled_dot_product_attention(attn.ln_q(query), attn.ln_k(key), value, attn_mask=mask)
    out = attn.out_proj(attn.ln_inner(out.transpose(1, 2).flatten(2)))
    x = x[rows, position].unsqueeze(1) + block.ls_1(block.ln_attn(out))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def can_pool_block(block):
    """Return whether pooled_block computes what this block does."""
    return (isinstance(block, open_clip.transformer.CustomResidualAttentionBlock)
            and block.attn.logit_scale is None and block.attn.head_scale is None)


def attention(device):
    """Return a context in which attention has a fast backward pass.

    torch's fused kernel for the CPU is up to four times slower backward, in half precision, than
    matrix products that stay in it; these keep (B, heads, T, T) weights of every block that trains,
    unless it is recomputed (--grad_checkpointing).
    """
    slow = device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext()


class Tower:
    """One CLIP encoder, split at its freeze boundary into a frozen prefix and a trainable suffix.

    module: the encoder; blocks: its transformer blocks or stages, None where they are not found.
    embeddings: modules and parameters before the blocks.
    frozen: None (everything trains), the number of frozen blocks, or "all".
    prefix(x) gives what is cached: tokens at the boundary, (B, 1, W) where only one token goes on,
    or (B, D) unit-norm embeddings where all is frozen; suffix(x) gives (B, D) unit-norm embeddings.
    """

    splits = True
    trims = False
    channels_last = False

    def __init__(self, module, blocks, embeddings):
        self.module, self.blocks, self.embeddings = module, blocks, embeddings
        self.frozen, self.checkpointing = None, False

    @property
    def depth(self):
        """Number of blocks, None where they are not found."""
        return None if self.blocks is None else len(self.blocks)

    def parameters(self):
        """Return all parameters of the encoder."""
        return list(self.module.parameters())

    def freeze(self, frozen):
        """Freeze nothing (None), the embeddings and the first blocks (a number), or "all"."""
        self.frozen = frozen if frozen in (None, "all") else min(frozen, self.depth)
        for part in self.frozen_parts():
            part.requires_grad_(False)

    def frozen_parts(self):
        """Return the frozen modules and parameters."""
        if self.frozen is None:
            return []
        if self.frozen == "all":
            return [self.module]
        return [*self.embeddings, *self.blocks[:self.frozen]]

    def compile(self):
        """Compile what trains, block by block: blocks of one shape share what is compiled."""
        if self.frozen != "all":
            for part in [self.module] if self.blocks is None else self.blocks[self.frozen or 0:]:
                part.compile()

    def run(self, x, start, stop, end):
        """Run blocks start..stop over x; end: (B,) position of a text's end token."""
        for block in self.blocks[start:stop]:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def prefix(self, x, end=None):
        """Run the frozen part without a graph."""
        if self.frozen is None:
            return x
        with torch.no_grad():
            if self.frozen == "all":
                x = self.embed(x)
                return F.normalize(self.finish(x, 0, end).float(), dim=-1)
            return self.run(self.embed(x), 0, self.frozen, end)

    def suffix(self, x, end=None):
        """Run what trains; returns (B, D) unit-norm float32 embeddings."""
        if self.frozen == "all":
            return x.float()
        # A block that is recomputed must find the same kernel then, outside of this context.
        with contextlib.nullcontext() if self.checkpointing else attention(x.device):
            x = self.embed(x) if self.frozen is None else x
            return F.normalize(self.finish(x, self.frozen or 0, end).float(), dim=-1)

    def finish(self, x, start, end):
        """Run the blocks from `start` on, pool and project; returns (B, D)."""
        return self.pool(self.run(x, start, self.depth, end), end)


class ViTTower(Tower):
    """open_clip's own vision transformer."""

    def __init__(self, visual):
        super().__init__(visual, visual.transformer.resblocks,
                         [visual.conv1, visual.class_embedding, visual.positional_embedding,
                          visual.patch_dropout, visual.ln_pre])
        self.one_token = (visual.attn_pool is None and visual.pool_type == "tok"
                          and can_pool_block(self.blocks[-1]))

    def embed(self, x):
        return self.module._embeds(x)

    def run(self, x, start, stop, end):
        if not (self.one_token and stop == self.depth and start < stop):
            return super().run(x, start, stop, end)
        x = super().run(x, start, stop - 1, end)
        return pooled_block(self.blocks[-1], x, torch.zeros(len(x), dtype=torch.long,
                                                            device=x.device))

    def pool(self, x, end):
        pooled = self.module._pool(x)[0]
        return pooled if self.module.proj is None else pooled @ self.module.proj


class TimmViTTower(Tower):
    """timm's vision transformer inside open_clip's adapter."""

    def __init__(self, visual):
        trunk = visual.trunk
        first = [p for name, p in trunk.named_parameters(recurse=False)]
        super().__init__(visual, trunk.blocks, [*first, trunk.patch_embed, trunk.pos_drop,
                                                trunk.patch_drop, trunk.norm_pre])
        self.one_token = trunk.global_pool == "token" and trunk.attn_pool is None

    def embed(self, x):
        trunk = self.module.trunk
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(x))))

    def run(self, x, start, stop, end):
        x = super().run(x, start, stop, end)
        return x[:, :1] if self.one_token and stop == self.depth else x

    def pool(self, x, end):
        trunk = self.module.trunk
        return self.module.head(trunk.forward_head(trunk.norm(x)))


class StagesTower(Tower):
    """A timm convolutional trunk whose forward is its children in order (checked when built)."""

    channels_last = True

    def __init__(self, visual):
        before, blocks, self.after = stages(visual.trunk)
        super().__init__(visual, blocks, before)
        visual.to(memory_format=torch.channels_last)

    def embed(self, x):
        for module in self.embeddings:
            x = module(x)
        return x

    def pool(self, x, end):
        for module in self.after:
            x = module(x)
        return self.module.head(x)

    def run(self, x, start, stop, end):
        return super().run(x.contiguous(memory_format=torch.channels_last), start, stop, end)


def stages(trunk):
    """Return (modules before, stages, modules after) of a timm convolutional trunk, or None."""
    children = dict(trunk.named_children())
    names = next((names for names in (["blocks"], ["stages"], [f"layer{i}" for i in range(1, 5)])
                  if set(names) <= set(children)), None)
    if names is None:
        return None
    order = list(children)
    first, last = order.index(names[0]), order.index(names[-1])
    inner = children[names[0]] if len(names) == 1 else [children[name] for name in names]
    return ([children[n] for n in order[:first]], list(inner),
            [children[n] for n in order[last + 1:]])


class TextTower(Tower):
    """open_clip's text transformer, in a CLIP (whose own attributes it is) or on its own.

    A causal tower that pools at the end token reads nothing behind it, so texts are cut there.
    x of prefix and of an all-trainable suffix: (B, T) token ids; end: (B,) end token positions.
    """

    def __init__(self, module, pool_type, eos_id):
        super().__init__(module, module.transformer.resblocks,
                         [module.token_embedding, module.positional_embedding])
        self.pool_type, self.eos_id = pool_type, eos_id
        self.trims = module.attn_mask is not None and pool_type in ("argmax", "eos")

    def parameters(self):
        parts = [self.module.token_embedding, self.module.transformer, self.module.ln_final]
        own = [self.module.positional_embedding]
        projection = self.module.text_projection
        if isinstance(projection, nn.Module):
            parts.append(projection)
        elif projection is not None:
            own.append(projection)
        return own + [p for part in parts for p in part.parameters()]

    def frozen_parts(self):
        if self.frozen != "all":
            return super().frozen_parts()
        return [self.module.transformer, self.module.ln_final, *self.parameters()]

    def end(self, ids):
        """Return (B,) the position that is pooled; ids: (B, T)."""
        if self.pool_type == "argmax":
            return ids.argmax(dim=-1)
        if self.pool_type == "eos":
            return (ids == self.eos_id).int().argmax(dim=-1)
        return torch.full((len(ids),), ids.shape[1] - 1 if self.pool_type == "last" else 0)

    def embed(self, ids):
        x = self.module.token_embedding(ids)
        return x + self.module.positional_embedding[:ids.shape[1]]

    def run(self, x, start, stop, end):
        length, mask = x.shape[1], self.module.attn_mask
        mask = None if mask is None else mask[:length, :length]
        one_token = stop == self.depth and can_pool_block(self.blocks[-1])
        for block in self.blocks[start:stop - 1 if one_token else stop]:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=mask)
        if one_token and start < stop:
            seen = None
            if mask is not None:
                seen = (torch.arange(length, device=x.device) <= end[:, None])[:, None, None]
            x = pooled_block(self.blocks[-1], x, end, seen)
        return x

    def pool(self, x, end):
        rows = torch.arange(len(x), device=x.device)
        x = self.module.ln_final(x)
        x = x[:, 0] if x.shape[1] == 1 else x[rows, end]
        projection = self.module.text_projection
        if isinstance(projection, nn.Module):
            return projection(x)
        return x if projection is None else x @ projection


class WholeTower(Tower):
    """An encoder that is run as it is: it can be frozen, not split (no boundary to cache)."""

    splits = False

    def __init__(self, module, encode, blocks=None, embeddings=()):
        super().__init__(module, blocks, list(embeddings))
        self.encode = encode

    def prefix(self, x, end=None):
        return super().prefix(x) if self.frozen == "all" else x

    def embed(self, x):
        return x

    def finish(self, x, start, end):
        return self.encode(x)


def runs_in_order(visual):
    """Return whether a timm trunk's forward equals running its children in order."""
    parts = stages(visual.trunk)
    if parts is None:
        return False
    before, blocks, after = parts
    training = visual.training
    visual.eval()
    x = torch.rand(1, 3, *visual.image_size)
    try:
        with torch.no_grad():
            expected, y = visual(x), x
            for module in [*before, *blocks, *after, visual.head]:
                y = module(y)
        return y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5, rtol=1e-4)
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        visual.train(training)


def image_tower(clip):
    """Return the Tower of an open_clip model's image encoder."""
    visual = clip.visual
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return ViTTower(visual)
    trunk = getattr(visual, "trunk", None)
    if type(trunk).__name__ == "VisionTransformer":
        return TimmViTTower(visual)
    if trunk is not None and runs_in_order(visual):
        return StagesTower(visual)
    return WholeTower(visual, clip.encode_image)


def text_tower(clip):
    """Return the Tower of an open_clip model's text encoder."""
    if isinstance(clip, open_clip.CLIP):
        return TextTower(clip, clip.text_pool_type, getattr(clip, "text_eos_id", None))
    text = clip.text
    native = isinstance(text, open_clip.transformer.TextTransformer)
    if native and text.cls_emb is None and not text.use_pad_mask and text.pool_type != "none":
        return TextTower(text, text.pool_type, text.eos_id)
    encoder = getattr(getattr(text, "transformer", None), "encoder", None)
    if isinstance(getattr(encoder, "layer", None), nn.ModuleList):  # BERT and its relatives
        return WholeTower(text, clip.encode_text, encoder.layer, [text.transformer.embeddings])
    return WholeTower(text, clip.encode_text)


def freeze_towers(clip, towers, args):
    """Freeze what --freeze_clip or --partial_freeze names; logit_scale never trains."""
    for name in ("logit_scale", "logit_bias"):
        if getattr(clip, name, None) is not None:
            getattr(clip, name).requires_grad_(False)
    if args.freeze_clip:
        for parameter in clip.parameters():
            parameter.requires_grad_(False)
    for name, tower in towers.items():
        if args.partial_freeze and tower.depth is None:
            raise UserError(f"--partial_freeze needs a tower whose blocks are known, but the "
                            f"{name} tower of {args.clip_model} "
                            f"({type(tower.module).__name__}) is not one: use --freeze_clip, or "
                            f"no freezing.")
        if args.partial_freeze and name == "image" and args.freeze_layers > tower.depth:
            raise UserError(f"--freeze_layers must be at most {tower.depth}, the depth of the "
                            f"image tower of {args.clip_model}, but is {args.freeze_layers}: try "
                            f"--freeze_layers {max(1, tower.depth * 3 // 4)}.")
        tower.freeze("all" if args.freeze_clip else
                     args.freeze_layers if args.partial_freeze else None)


def describe_tower(name, tower):
    """Return one line: how many blocks are frozen and how many parameters train."""
    parameters = tower.parameters()
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    depth = "all as one" if tower.depth is None else tower.depth
    frozen = {None: 0, "all": depth}.get(tower.frozen, tower.frozen)
    return (f"{name} tower: {frozen} of {depth} blocks frozen, {trained / 1e6:.2f} M of "
            f"{total / 1e6:.2f} M parameters train")


# --- heads ----------------------------------------------------------------------------------

HIDDEN = 256  # width of the heads' hidden layer; wider heads did not score better


def mlp(inputs, dropout):
    """Return a one-hidden-layer perceptron to one output whose last layer starts at zero."""
    last = nn.Linear(HIDDEN, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.GELU(), nn.Dropout(dropout), last)


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
        self.drop = nn.Dropout(args.dropout)
        self.scale = 0.0 if args.no_residual_learning else args.residual_scale_q
        self.delta = mlp(dim, args.dropout) if self.scale else None

    def forward(self, f):
        x = f * self.input_scale
        if self.delta is None:
            base = torch.sigmoid(self.base(self.drop(x))).squeeze(-1)
            return base, base, torch.zeros_like(base)
        base = torch.sigmoid(self.base(x)).squeeze(-1)
        delta = torch.tanh(self.delta(x)).squeeze(-1)
        return base + self.scale * delta, base, delta


class ConsistencyHead(nn.Module):
    """Predict consistency from both embeddings; its base is CLIP's own cosine, and the quality.

    base: a * (s0 + 1) / 2 + b' + e * q, or with two branches the mean of
    sigmoid(a * s0 + b' + e * q) and an MLP branch. People call a broken picture inconsistent, too,
    hence q; e starts at 0 unless the base is calibrated. score: base + scale *
    tanh(MLP([f, t, s])), or without residual learning sigmoid(MLP([f, t, s])), or the two-branch
    base.
    f, t: (B, D) unit-norm; s, s0: (B,) their cosine, now and before training; q: (B,) detached
    quality scores. Returns (score, base, delta) as QualityHead.
    """

    def __init__(self, dim, args):
        super().__init__()
        self.residual = not args.no_residual_learning
        self.scale = args.residual_scale_c if self.residual else 0.0
        self.affine = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))  # a, b', e
        self.branch = mlp(2 * dim + 1, args.dropout) if args.use_two_branch else None
        self.delta = (mlp(2 * dim + 1, args.dropout)
                      if self.residual or not args.use_two_branch else None)

    def affine_base(self, s0, q):
        """Return the affine map of both, on the logit scale where there are two branches."""
        a, b, e = self.affine
        if self.branch is None:
            return a * (s0 + 1) / 2 + b + e * q
        return torch.sigmoid(a * s0 + b + e * q)

    def forward(self, f, t, s, s0, q):
        x = pair_features(f, t, s)
        base = self.affine_base(s0, q)
        if self.branch is not None:
            base = (base + torch.sigmoid(self.branch(x)).squeeze(-1)) / 2
        if self.delta is None:
            return base, base, torch.zeros_like(base)
        delta = self.delta(x).squeeze(-1)
        if not self.residual:
            return torch.sigmoid(delta), base, torch.zeros_like(base)
        delta = torch.tanh(delta)
        return base + self.scale * delta, base, delta


class Refinement(nn.Module):
    """Correct a detached coarse consistency by at most `scale`, from a sequence of three tokens.

    A transformer encoder reads image token, text token and coarse-score token.
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
    """Compose CLIP's towers and the heads.

    towers: {"image", "text"}, frozen already; dim: D; preprocess: open_clip's preprocess config.
    before: the towers before training, which only scoring has at hand (see load_scorer).
    """

    def __init__(self, clip, towers, dim, preprocess, args):
        super().__init__()
        self.clip, self.towers, self.before = clip, towers, towers
        for name in ("mean", "std"):
            value = torch.tensor(preprocess[name], dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(f"pixel_{name}", value, persistent=False)
        self.quality = QualityHead(dim, args)
        self.consistency = ConsistencyHead(dim, args)
        self.refinement = Refinement(dim, args) if args.use_refinement else None
        self.explanation = nn.Sequential(nn.Dropout(args.dropout), nn.Linear(
            2 * dim + 1, dim)) if args.use_explanations else None

    def train(self, mode=True):
        """Switch to training mode; what is frozen stays in eval mode (BatchNorm, dropout)."""
        super().train(mode)
        for tower in self.towers.values():
            for part in tower.frozen_parts():
                if isinstance(part, nn.Module):
                    part.eval()
        return self

    def pixels(self, images):
        """Normalise (B, 3, H, W) uint8 images as open_clip does."""
        x = (images.float() / 255 - self.pixel_mean) / self.pixel_std
        channels_last = self.towers["image"].channels_last
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def score(self, f, t, s0=None):
        """Run the heads in float32 on (B, D) unit-norm embeddings; returns a dict of (B,) tensors.

        s0: (B,) cosines of the original views by the CLIP before training, None: those of f, t.
        q, c: scores, not clamped; q_base, c_base: what the base says; q_delta, c_delta: in
        (-1, 1); c_coarse: c before refinement; explanation: (B, D), where asked for.
        """
        s = (f * t).sum(dim=-1)
        q, q_base, q_delta = self.quality(f)
        c, c_base, c_delta = self.consistency(f, t, s, s if s0 is None else s0, q.detach())
        out = {"q": q, "c": c, "q_base": q_base.detach(), "c_base": c_base.detach(),
               "q_delta": q_delta.detach(), "c_delta": c_delta.detach()}
        if self.refinement is not None:
            out["c_coarse"], out["c"] = c, self.refinement(f, t, c)
        if self.explanation is not None:
            out["explanation"] = self.explanation(pair_features(f, t, s))
        return out

    def forward(self, image, text, end, inverse, s0=None):
        """Score a batch from what lies at the freeze boundaries.

        image: (B, ..) image tower input or boundary; text, end: the same for the batch's unique
        prompts; inverse: (B,) index into them; s0: see score.
        """
        f = self.towers["image"].suffix(image)
        t = self.towers["text"].suffix(text, end)[inverse]
        with torch.autocast(f.device.type, enabled=False):
            return self.score(f, t, s0)

    def trained_state(self):
        """Return the state-dict entries that training changes: all but what is frozen."""
        frozen = {id(p) for p in self.parameters() if not p.requires_grad}
        for tower in self.towers.values():
            frozen |= {id(b) for part in tower.frozen_parts() if isinstance(part, nn.Module)
                       for b in part.buffers()}
        return {name: value for name, value in self.state_dict(keep_vars=True).items()
                if id(value) not in frozen}


# --- losses and metrics ---------------------------------------------------------------------


def losses(out, batch, args):
    """Return a dict of summed losses and the batch's total, ready to be divided per window.

    Quality and consistency: squared error on the [0, 1] scale, summed over the batch; a refined
    consistency adds the error of its coarse score. Explanation: 1 - cosine to the teacher's
    embedding, over the rows that have one. batch["weight"]: 1 / images (of the whole window),
    batch["weight_exp"]: 1 / rows with an explanation; both times the number of processes, over
    which the gradients are averaged.
    """
    sums = {"q": F.mse_loss(out["q"], batch["q"], reduction="sum"),
            "c": F.mse_loss(out["c"], batch["c"], reduction="sum")}
    if "c_coarse" in out:
        sums["c"] = sums["c"] + F.mse_loss(out["c_coarse"], batch["c"], reduction="sum")
    total = batch["weight"] * (args.w_q * sums["q"] + args.w_c * sums["c"])
    if "explanation" in out:
        cosine = F.cosine_similarity(out["explanation"], batch["teacher"], dim=-1)
        sums["exp"] = ((1 - cosine) * batch["has_teacher"]).sum()
        total = total + batch["weight_exp"] * args.w_exp * sums["exp"]
    return sums, total


def correlation(function, pred, mos):
    """Return a correlation over a whole split, NaN where either side is constant or not finite."""
    pred, mos = np.asarray(pred, dtype=np.float64), np.asarray(mos, dtype=np.float64)
    if len(pred) < 2 or not np.isfinite(pred).all() or np.ptp(pred) == 0 or np.ptp(mos) == 0:
        return math.nan
    return float(function(pred, mos)[0])


def srocc(pred, mos):
    """Return Spearman's rank correlation, ties given their mean rank."""
    return correlation(scipy.stats.spearmanr, pred, mos)


def plcc(pred, mos):
    """Return Pearson's correlation of the raw scores (no logistic fit)."""
    return correlation(scipy.stats.pearsonr, pred, mos)


def krocc(pred, mos):
    """Return Kendall's tau-b."""
    return correlation(scipy.stats.kendalltau, pred, mos)


def rmse(pred, mos):
    """Return the root mean squared error on the [0, 1] scale."""
    difference = np.asarray(pred, dtype=np.float64) - np.asarray(mos, dtype=np.float64)
    return float(np.sqrt(np.mean(difference ** 2)))


def metrics(pred, mos):
    """Return {"srocc_q", "srocc_c", ..}; pred, mos: {"q", "c"} of (N,) arrays on [0, 1]."""
    functions = {"srocc": srocc, "plcc": plcc, "krocc": krocc, "rmse": rmse}
    return {f"{name}_{target}": functions[name](pred[target], mos[target])
            for name in METRICS for target in TARGETS}


def nan_reason(pred, mos):
    """Return why a correlation is undefined, or an empty string."""
    for what, values in (("predictions", pred), ("human scores", mos)):
        if not np.isfinite(values).all():
            return f"{what} are not finite"
        if np.ptp(values) == 0:
            return f"all {what} are {values[0]:.4g}"
    return ""


def selection_score(values, select_by):
    """Return the SROCC that picks the best epoch, -inf where it is undefined."""
    chosen = {"quality": [values["srocc_q"]], "consistency": [values["srocc_c"]],
              "mean": [values["srocc_q"], values["srocc_c"]]}[select_by]
    return -math.inf if any(map(math.isnan, chosen)) else sum(chosen) / len(chosen)


def tier(target, value, gap):
    """Return the card's tier of a target from its validation SROCC and Train-Val Gap."""
    return next((name for name, low, high in TIERS[target] if value > low and gap < high),
                "needs work")


def bootstrap_interval(pred, mos, groups, draws=1000):
    """Return the 95 % interval [low, high] of SROCC by bootstrap over prompts.

    Images of one prompt are not independent, so prompts are drawn, not images (cluster
    bootstrap: Davison and Hinkley, 1997). pred, mos, groups: (N,).
    """
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    values = []
    for _ in range(draws):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        values.append(correlation(pearson_of_ranks, pred[rows], mos[rows]))
    values = np.array(values)[np.isfinite(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else [math.nan, math.nan]


def pearson_of_ranks(pred, mos):
    """Return (Spearman's correlation,) without the p-value that spearmanr computes."""
    ranks = scipy.stats.rankdata(np.stack([pred, mos]), axis=1)
    return (np.corrcoef(ranks)[0, 1],)


# --- floors and calibration -----------------------------------------------------------------

RIDGE_STRENGTHS = tuple(10.0 ** k for k in range(-3, 5))


def ridge(x, y, strengths):
    """Return [(weights (K,), intercept)] of ridge regression for each strength.

    x: (n, K), y: (n,), both float64; the intercept is not penalised.
    """
    mean_x, mean_y = x.mean(0), y.mean()
    gram, target = (x - mean_x).T @ (x - mean_x), (x - mean_x).T @ (y - mean_y)
    fits = []
    for strength in strengths:
        factor = torch.linalg.cholesky(gram + strength * torch.eye(len(gram), dtype=x.dtype))
        weights = torch.cholesky_solve(target[:, None], factor).squeeze(1)
        fits.append((weights, mean_y - mean_x @ weights))
    return fits


def fit_ridge(x, y, groups, folds=5):
    """Fit a ridge whose strength is chosen by cross-validation over groups, (n,) int; see ridge.

    Returns ((weights, intercept), (n,) predictions of each row by a fit that did not see it).
    """
    fold = np.random.default_rng(0).permutation(groups.max() + 1)[groups] % folds
    unseen = y.mean().repeat(len(RIDGE_STRENGTHS), len(y))
    for held_out in (torch.from_numpy(fold == i) for i in range(folds)):
        if 0 < held_out.sum() < len(y):
            fits = ridge(x[~held_out], y[~held_out], RIDGE_STRENGTHS)
            unseen[:, held_out] = torch.stack([x[held_out] @ w + b for w, b in fits])
    best = int(((unseen - y) ** 2).sum(dim=1).argmin())
    return ridge(x, y, [RIDGE_STRENGTHS[best]])[0], unseen[best]


def logit(p):
    """Return the logit of scaled MOS, kept 0.01 away from 0 and 1."""
    return torch.logit(p.clamp(0.01, 0.99))


@dataclass
class Floors:
    """What is reached without training, and the base that starts there.

    pred: {"zero_shot", "linear_probe"[, "prompt_mean"]} of {"q", "c"} (N,) predictions for all rows
    quality_base: (weights (D,), intercept) of the quality probe on the logit of the scaled MOS
    quality_unseen: (n,) quality of the training rows by probes that were fitted without them
    """

    pred: dict
    quality_base: tuple
    quality_unseen: torch.Tensor


def fit_floors(f, t, antonyms, table, train, args):
    """Fit all floors on the training rows.

    f, t: (N, D) unit-norm embeddings of each row's image and prompt, by the pretrained towers;
    antonyms: (2, D) text embeddings of "Good photo." and "Bad photo.", for the zero-shot quality
    (CLIP-IQA, Wang et al., AAAI 2023). The linear probe is a ridge on f for quality, on
    [f, t, f * t, s] for consistency.
    """
    f, t, antonyms = f.double(), t.double(), antonyms.double()
    s = (f * t).sum(-1)
    q, c = (torch.from_numpy(mos).double() for mos in (table.quality, table.consistency))
    groups = np.unique(table.prompt_id[train], return_inverse=True)[1]
    (weights, intercept), unseen = fit_ridge(f[train], logit(q[train]), groups)
    pairs = torch.cat([f, t, f * t, s[:, None]], dim=1)
    (weights_c, intercept_c), _ = fit_ridge(pairs[train], c[train], groups)
    pred = {"zero_shot": {"q": torch.softmax(100 * f @ antonyms.T, dim=-1)[:, 0], "c": s},
            "linear_probe": {"q": torch.sigmoid(f @ weights + intercept),
                             "c": pairs @ weights_c + intercept_c}}
    if args.split_by == "image":
        pred["prompt_mean"] = {"q": prompt_mean(table, q, train),
                               "c": prompt_mean(table, c, train)}
    return Floors({name: {k: v.numpy() for k, v in p.items()} for name, p in pred.items()},
                  (weights, intercept), torch.sigmoid(unseen))


def prompt_mean(table, mos, train):
    """Predict each row's MOS by the training mean of its prompt: it sees no pixels."""
    values = pd.Series(mos[train].numpy()).groupby(table.prompt_id[train]).mean()
    predicted = pd.Series(table.prompt_id).map(values).fillna(float(mos[train].mean()))
    return torch.from_numpy(predicted.to_numpy(copy=True))


@torch.no_grad()
def calibrate(scorer, floors, mos, train):
    """Start the base where CLIP already is (linear probing first: Kumar et al., ICLR 2022).

    Quality: the linear probe. Consistency: least squares on the cosine and the quality that probes
    give to rows they did not see (stacking: Wolpert, 1992), so that a probe that knows its training
    rows by heart is not trusted too much; of two branches, on the logit of the MOS.
    mos: (N,) consistency; train: training rows.
    """
    weights, intercept = floors.quality_base
    base, head = scorer.quality.base, scorer.consistency
    base.weight.copy_((weights / scorer.quality.input_scale)[None])
    base.bias.fill_(intercept.item())
    s0 = torch.from_numpy(floors.pred["zero_shot"]["c"][train])
    target = torch.from_numpy(mos[train]).double()
    x, y = ((s0 + 1) / 2, target) if head.branch is None else (s0, logit(target))
    (a, e), b = ridge(torch.stack([x, floors.quality_unseen], dim=1), y, [1e-9])[0]
    head.affine.copy_(torch.stack([a, b, e]))


# --- feature cache --------------------------------------------------------------------------


def content_key(**content):
    """Return a hash of everything that cached content depends on."""
    text = json.dumps({"version": CACHE_VERSION, **content}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def file_stamps(table):
    """Return [name, size, mtime] of each image: a changed one is never taken from the cache."""
    stamps = []
    for path, row in zip(table.paths, table.frame.index):
        try:
            stat = os.stat(path)
        except OSError as error:
            raise unreadable(path, row, error) from error
        stamps.append([str(path), stat.st_size, stat.st_mtime_ns])
    return stamps


def checksum(handle, size):
    """Return the CRC-32 of the first `size` bytes of a file, as 4 bytes."""
    handle.seek(0)
    crc = 0
    while size > 0 and (block := handle.read(min(size, 2 ** 24))):
        crc, size = zlib.crc32(block, crc), size - len(block)
    return crc.to_bytes(4, "little")


def read_cache(path, count):
    """Return the memory-mapped array of a cache file, None where it is not what was written.

    A cache file is a .npy of plain numbers and, behind it, its checksum: reading it once through
    costs less than a wrong feature would.
    """
    try:
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size - 4
            intact = checksum(handle, size) == handle.read()
        array = np.load(path, mmap_mode="r", allow_pickle=False) if intact else None
    except (OSError, ValueError, EOFError):  # as damaged as one with a wrong checksum
        array = None
    if array is None or array.shape[:1] != (count,):
        print(f"cache: {path} is damaged, so it is computed again")
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the most recently used
    return array


def make_room(folder, size, limit):
    """Delete the least recently used cache files until `size` bytes fit; return whether they do.

    What killed runs left half-written goes first, an hour after its last byte.
    """
    for half in Path(folder).glob(".*.npy.*"):
        with contextlib.suppress(OSError):  # another run may have finished or deleted it
            if time.time() - half.stat().st_mtime > 3600:
                half.unlink()
    if size > limit or size > shutil.disk_usage(folder).free:
        return False
    files = sorted(Path(folder).glob("*.npy"), key=lambda file: file.stat().st_mtime)
    used = sum(file.stat().st_size for file in files)
    for file in files:
        if used + size <= limit:
            break
        used -= file.stat().st_size
        file.unlink(missing_ok=True)
        print(f"cache: removed {file.name}, the least recently used, to stay within "
              f"--cache_max_gb")
    return True


def cached_array(args, kind, key, count, chunks, first=0):
    """Return a memory-mapped (count, ..) array from the cache, computing and writing it if new.

    chunks: function that yields torch tensors whose rows, in order, are the content; of several
    processes on a machine each yields its share, which begins at row `first`. Written to a
    temporary name and renamed when complete. Returns None where it does not fit the limit or the
    disk, after saying so; raises UserError where a value is not finite.
    """
    path = Path(args.cache_dir, f"{kind}-{key}.npy")
    array = read_cache(path, count) if path.exists() else None
    if all(WORLD.gather([array is not None], WORLD.node)):
        return array
    temporary = path.with_name(f".{path.name}.{WORLD.tag or os.getpid()}")
    leads = WORLD.local_rank == 0
    try:
        parts = numpy_rows(kind, chunks())
        head = list(itertools.islice(parts, 1))
        done = (attempt(kind, leads, begin_cache, temporary, args, head, count)
                and attempt(kind, True, fill_cache, temporary, head, parts, first)
                and attempt(kind, leads, finish_cache, temporary, path))
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r") if done else None


def attempt(kind, takes_part, step, *args):
    """Take a step of writing the cache; return whether it went well on all of this machine.

    step: function that returns why it did not, or None; takes_part: whether this process runs it.
    """
    try:
        reason = step(*args) if takes_part else None
    except OSError as error:
        reason = f"it cannot be written ({error})"
    reasons = [reason for reason in WORLD.gather([reason], WORLD.node) if reason]
    if reasons:
        print(f"cache: going on without the {kind} cache, {reasons[0]}")
    return not reasons


def numpy_rows(kind, chunks):
    """Yield each tensor as numpy, bfloat16 as int16; raise UserError where one is not finite."""
    for chunk in chunks:
        if chunk.is_floating_point() and not torch.isfinite(chunk).all():
            raise UserError(f"The {kind} features are not finite in {chunk.dtype}: use "
                            f"--precision bf16 or fp32.")
        yield (chunk.view(torch.int16) if chunk.dtype == torch.bfloat16 else chunk).numpy()


def begin_cache(path, args, head, count):
    """Write the .npy header if the array will fit; return why it does not, or None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (count, *head[0].shape[1:])
    size = head[0].dtype.itemsize * math.prod(shape)
    if not make_room(args.cache_dir, size, args.cache_max_gb * 1e9):
        return (f"its {size / 1e9:.2f} GB exceed --cache_max_gb {args.cache_max_gb:g} or the free "
                f"disk space")
    header = {"descr": np.lib.format.dtype_to_descr(head[0].dtype), "fortran_order": False,
              "shape": shape}
    with open(path, "wb") as handle:
        np.lib.format.write_array_header_1_0(handle, header)
    return None


def fill_cache(path, head, parts, first):
    """Write this process's rows to their place behind the header."""
    with open(path, "r+b") as handle:
        np.lib.format.read_magic(handle)
        np.lib.format.read_array_header_1_0(handle)
        for number, rows in enumerate(itertools.chain(head, parts)):
            if number == 0:
                handle.seek(first * rows[0].nbytes, os.SEEK_CUR)
            handle.write(rows.tobytes())
        handle.flush()
        os.fsync(handle.fileno())


def finish_cache(temporary, path):
    """Put the checksum behind the array, then give the file its name."""
    with open(temporary, "r+b") as handle:
        handle.write(checksum(handle, os.fstat(handle.fileno()).st_size))
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def prefetch(function, items, depth=2):
    """Yield function(item) in order, computed up to `depth` ahead in a thread."""
    with ThreadPoolExecutor(1) as pool:
        pending = []
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


class CachedRows:
    """Rows of a memory-mapped cache, copied to a GPU if small; a CPU reads them where they lie.

    array: (N, ..) as cached_array returns it.
    """

    RESIDENT = 2 ** 28  # bytes: embeddings of 80,000 images with D 768 and fp32 stay resident

    def __init__(self, array, device):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that a read-only array may be written to
            rows = torch.from_numpy(array)
        rows = rows.view(torch.bfloat16) if rows.dtype == torch.int16 else rows
        self.rows = rows.to(device) if array.nbytes <= self.RESIDENT else rows

    def fetch(self, *index):
        """Return the rows at an index of numpy arrays, on the CPU or the device."""
        return self.rows[tuple(torch.from_numpy(np.asarray(i)).to(self.rows.device)
                               for i in index)]


def leave_signals_to_main(_worker):
    """Let a worker outlive Ctrl-C and SIGTERM: the main process still needs it for its step.

    Should the main process end without closing it, SIGTERM takes it a minute later all the same.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


class LiveImages:
    """Decode images in worker processes that stay alive between epochs."""

    def __init__(self, dataset, args, device):
        # The sampler is a plain list: with `self` in a cycle workers would outlive their loader.
        self.batches = []
        workers = min(args.num_workers, max(1, (os.cpu_count() or 1) // WORLD.local_size))
        self.loader = torch.utils.data.DataLoader(
            dataset, batch_size=None, sampler=self.batches, num_workers=workers,
            persistent_workers=workers > 0, prefetch_factor=2 if workers else None,
            pin_memory=args.pin_memory and device.type == "cuda",
            worker_init_fn=leave_signals_to_main)

    def stream(self, batches):
        """Yield (images, errors) of ImageBatches for each array of row numbers."""
        self.batches[:] = batches
        yield from self.loader

    def strict(self, batches, csv_rows):
        """Yield the images alone; raise UserError at an unreadable one, csv_rows: its CSV row."""
        for images, errors in self.stream(batches):
            for index, reason in errors.items():
                raise unreadable(self.loader.dataset.paths[index], csv_rows[index], reason)
            yield images


def flipped(images, flip):
    """Mirror the images where flip, (B,) bool, says so."""
    return torch.where(flip.to(images.device).view(-1, 1, 1, 1), images.flip(-1), images)


def cropped(images, boxes):
    """Crop (B, 3, H, W) images to boxes, (B, 4) top, left, height, width in 0..1, and resize."""
    height, width = images.shape[-2:]
    out = []
    for image, (top, left, h, w) in zip(images, boxes):
        y, x = round(top * height), round(left * width)
        part = image[None, :, y:y + max(1, round(h * height)), x:x + max(1, round(w * width))]
        out.append(F.interpolate(part.float(), (height, width), mode="bicubic", antialias=True))
    return torch.cat(out).clamp(0, 255)


@dataclass
class View:
    """Which view of which rows a batch shows.

    rows: (B,) row numbers; flip: (B,) bool; boxes: (B, 4), see cropped, or None.
    """

    rows: np.ndarray
    flip: np.ndarray
    boxes: np.ndarray | None = None

    def part(self, where):
        """Return a slice of the batch."""
        return View(self.rows[where], self.flip[where],
                    None if self.boxes is None else self.boxes[where])


def plain_views(rows, batch_size):
    """Return the original views of rows in batches."""
    return [View(rows[i:i + batch_size], np.zeros(len(rows[i:i + batch_size]), dtype=bool))
            for i in range(0, len(rows), batch_size)]


def node_share(count, batch_size):
    """Return (this process's share of all rows in batches, its first row) among its machine's.

    The batches are those of a single process, so that the cache is the same, bit for bit.
    """
    views = plain_views(np.arange(count), batch_size)
    own = views[WORLD.part(len(views), node=True)]
    return own, int(own[0].rows[0]) if own else 0


def epoch_views(rows, args, seed, epoch):
    """Return an epoch's batches, of all processes: they depend on seed and epoch alone.

    Crops keep 90 to 100 % of the area at the original aspect ratio.
    """
    rng = np.random.default_rng([seed, 1, epoch])
    order = rng.permutation(rows)
    flip = rng.random(len(rows)) < 0.5
    boxes = None
    if args.augment == "crop":
        side = np.sqrt(rng.uniform(0.9, 1.0, len(rows)))
        corner = rng.random((len(rows), 2)) * (1 - side[:, None])
        boxes = np.column_stack([corner, side, side])
    flip &= args.augment != "none"
    whole, size = View(order, flip, boxes), args.batch_size * WORLD.size
    return [whole.part(slice(i, i + size)) for i in range(0, len(rows), size)]


def own_share(view):
    """Return (this process's part of a batch, what it runs).

    Where no row is left for it, it runs one all the same, whose outputs are then dropped: every
    process has to take part in the reduction of the gradients.
    """
    if WORLD.size == 1:
        return view, view
    own = view.part(WORLD.part(len(view.rows)))
    return own, own if len(own.rows) else view.part(slice(1))


class ImageInputs:
    """Bring image batches to the image tower: from features, cached pixels, or decoded live.

    stream(views) yields tensors on the device that lie at the tower's freeze boundary.
    """

    def __init__(self, scorer, table, identity, args, device):
        self.scorer, self.args, self.device = scorer, args, device
        self.tower = scorer.towers["image"]
        self.csv_rows = table.frame.index.to_numpy()
        self.live = LiveImages(ImageBatches(table.paths, identity["preprocess"]), args, device)
        self.count = len(table.paths)
        self.features = self.cached_pixels = None
        if args.cache == "off":
            return
        key = {"identity": identity, "files": file_stamps(table)}
        frozen = self.tower.frozen
        cacheable = frozen == "all" or (frozen is not None and self.tower.splits)
        if cacheable and args.augment != "crop":
            self.features = self.cache_features(key)
        elif frozen is not None and not self.tower.splits:
            print(f"cache: no feature cache for {type(self.tower.module).__name__} towers; "
                  f"decoded images are kept instead")
        if self.features is None:
            self.cached_pixels = self.cache_pixels(key)

    def cache_features(self, key):
        """Return CachedRows (N, views, ..) of the tower's boundary, or None if it does not fit."""
        views = 2 if self.args.augment == "flip" else 1
        key = content_key(kind="image", boundary=self.tower.frozen, views=views,
                          precision=self.args.precision, **key)

        share, first = node_share(self.count, 32)

        def chunks():
            for images in self.all_images(share, "image features"):
                yield torch.stack([self.boundary(view).cpu() for view in
                                   (images, images.flip(-1))[:views]], dim=1)

        array = cached_array(self.args, "image", key, self.count, chunks, first)
        return None if array is None else CachedRows(array, self.device)

    def cache_pixels(self, key):
        """Return CachedRows (N, 3, H, W) of decoded uint8 images, or None if they do not fit."""
        key = content_key(kind="pixels", preprocess=key["identity"]["preprocess"],
                          files=key["files"])
        share, first = node_share(self.count, 32)
        array = cached_array(self.args, "pixels", key, self.count,
                             lambda: self.all_images(share, "decoded images", to_device=False),
                             first)
        return None if array is None else CachedRows(array, torch.device("cpu"))

    def all_images(self, views, what, to_device=True):
        """Yield the decoded uint8 images of some views in order, with a progress bar."""
        batches = [view.rows for view in views]
        for images in progress(self.live.strict(batches, self.csv_rows), what,
                               len(batches)):
            yield images.to(self.device, non_blocking=True) if to_device else images

    def boundary(self, images):
        """Run the frozen prefix on uint8 or float images that lie on the device."""
        with autocast(self.args, self.device):
            x = self.scorer.pixels(images)
            x = self.tower.prefix(x)
        return x

    def stream(self, views):
        """Yield the tower's input for each View, on the device, at the freeze boundary."""
        if self.features is not None:
            for x in self.read(self.features, [(v.rows, v.flip.astype(np.int64)) for v in views]):
                yield x.to(self.device, non_blocking=True)
            return
        if self.cached_pixels is not None:
            raw = self.read(self.cached_pixels, [(v.rows,) for v in views])
        else:
            raw = self.live.strict([view.rows for view in views], self.csv_rows)
        for view, images in zip(views, raw):
            images = flipped(images.to(self.device, non_blocking=True),
                             torch.from_numpy(view.flip))
            if view.boxes is not None:
                images = cropped(images, view.boxes)
            yield self.boundary(images)

    def read(self, cached, batches):
        """Return an iterator over a cache's rows; what has yet to go to a GPU is read ahead.

        Beside the arithmetic of a CPU the thread that reads ahead would cost more than it saves
        (10 to 40 % of an epoch).
        """
        if cached.rows.device.type == self.device.type:
            return (cached.fetch(*index) for index in batches)

        def pinned(index):
            rows = cached.fetch(*index)
            return rows.pin_memory() if self.args.pin_memory else rows

        return prefetch(pinned, batches)


class TextInputs:
    """Bring the unique prompts of a batch to the text tower, cut at their longest end token."""

    def __init__(self, scorer, ids, identity, args, device):
        self.tower, self.device, self.args = scorer.towers["text"], device, args
        self.ids = ids
        native = isinstance(self.tower, TextTower)
        self.end = self.tower.end(ids) if native else torch.zeros(len(ids), dtype=torch.long)
        self.features = None
        frozen = self.tower.frozen
        if args.cache != "off" and (frozen == "all" or (frozen is not None and self.tower.splits)):
            self.features = self.cache_features(identity)

    def cut(self, rows):
        """Return the number of tokens that rows, a (U,) tensor, need."""
        return int(self.end[rows].max()) + 1 if self.tower.trims else self.ids.shape[1]

    def boundary(self, rows):
        """Run the frozen prefix for some rows; returns (tower input, end positions)."""
        ids, end = self.ids[rows, :self.cut(rows)].to(self.device), self.end[rows].to(self.device)
        with autocast(self.args, self.device):
            return self.tower.prefix(ids, end), end

    def cache_features(self, identity):
        """Return CachedRows (U, ..) of the tower's boundary, or None if it does not fit."""
        key = content_key(kind="text", boundary=self.tower.frozen, precision=self.args.precision,
                          identity=identity, ids=hashlib.sha256(self.ids.numpy()).hexdigest())
        share, first = node_share(len(self.ids), 64)
        self.end_all = int(self.end.max()) + 1 if self.tower.trims else self.ids.shape[1]

        def chunks():
            for view in progress(share, "text features", len(share)):
                x = self.boundary(torch.from_numpy(view.rows))[0].cpu()
                grow = self.end_all - x.shape[1] if x.ndim == 3 and x.shape[1] > 1 else 0
                yield F.pad(x, (0, 0, 0, grow)) if grow else x

        array = cached_array(self.args, "text", key, len(self.ids), chunks, first)
        return None if array is None else CachedRows(array, self.device)

    def fetch(self, prompt_id):
        """Return (tower input, end, inverse) for a batch; prompt_id: (B,) numpy."""
        unique, inverse = np.unique(prompt_id, return_inverse=True)
        rows = torch.from_numpy(unique)
        if self.features is None:
            x, end = self.boundary(rows)
        else:
            x, end = self.features.fetch(unique).to(self.device), self.end[rows].to(self.device)
            if x.ndim == 3 and x.shape[1] > 1:
                x = x[:, :self.cut(rows)]
        return x, end, torch.from_numpy(inverse).to(self.device)


@torch.no_grad()
def text_embeddings(scorer, tokenizer, texts, what, identity, args, device):
    """Return (U, D) unit-norm embeddings of texts by the text tower as it is now.

    Cached as the all-frozen text features are, so it must be called before training.
    """
    tower = scorer.towers["text"]
    frozen, tower.frozen = tower.frozen, "all"
    scorer.eval()
    try:
        inputs = TextInputs(scorer, tokenize(tokenizer, texts, what), identity, args, device)
        rows = np.arange(len(texts))
        return torch.cat([inputs.fetch(rows[i:i + 256])[0] for i in range(0, len(rows), 256)])
    finally:
        tower.frozen = frozen


# --- optimisation ---------------------------------------------------------------------------

HEAD_LR = 1e-3  # next to a CLIP that trains: its own rate would leave heads where they began


def head_lr(args):
    """Return the heads' peak learning rate: --head_lr, or the documented automatic choice."""
    return args.head_lr or (args.lr if args.freeze_clip else max(args.lr, HEAD_LR))


def make_optimizer(scorer, args, device):
    """Return AdamW over four groups: CLIP and heads, each with and without weight decay.

    Norms, biases and scalars (at most one axis) are not decayed.
    """
    clip = {id(p) for p in scorer.clip.parameters()}
    groups = {}
    for parameter in scorer.parameters():
        if parameter.requires_grad:
            key = (id(parameter) in clip, parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "base_lr": args.lr if of_clip else head_lr(args),
          "weight_decay": args.weight_decay if decays else 0.0}
         for (of_clip, decays), parameters in sorted(groups.items(), reverse=True)],
        lr=args.lr, fused=device.type in ("cpu", "cuda"))


def lr_factor(update, updates_per_epoch, args):
    """Return the learning rate's factor for an optimiser update, counted from 0."""
    total = updates_per_epoch * args.epochs
    warmup = round(args.warmup_ratio * total)
    if update < warmup:
        return (update + 1) / warmup
    if args.scheduler == "constant":
        return 1.0
    if args.scheduler == "step":
        return args.step_lr_gamma ** (update // updates_per_epoch // args.step_lr_step_size)
    done = (update - warmup) / max(1, total - warmup)
    return 1 - done if args.scheduler == "linear" else (1 + math.cos(math.pi * done)) / 2


# --- train and evaluate ---------------------------------------------------------------------

PREDICTIONS = ("q", "c", "q_base", "c_base", "q_delta", "c_delta")
FINITE_CHECK = 50  # updates between checks of the loss; each check waits for the device
OVERFLOWS = 2  # batches in a row whose loss may overflow in fp16: its scaler skips their updates


class Interrupted(Exception):
    """A signal ended the training after a checkpoint was saved; args: its number, the folder."""


class Stop:
    """Remember the first SIGINT or SIGTERM, so that training ends at a good place.

    The second one stops at once.
    """

    def __init__(self):
        self.signal, self.waits = None, False

    def handle(self, number, frame):
        """Note a signal (see signal.signal); while nothing trains, there is nothing to wait for."""
        again, self.signal = self.signal is not None, number
        if again or not self.waits:
            raise KeyboardInterrupt
        if WORLD.rank == 0:
            print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    def install(self):
        """Catch both signals from now on, where this thread may."""
        self.signal, self.waits = None, False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.handle)

    def asked(self):
        """Return the signal that any process has noted, the same on all of them, or 0."""
        return WORLD.largest(self.signal or 0)

    def leave(self, run):
        """Raise Interrupted if a signal was noted; the caller has just saved a checkpoint."""
        number = self.asked()
        if number:
            write_log(run)
            raise Interrupted(number, run.args.output_dir)


STOP = Stop()


@dataclass
class Run:
    """Everything that one training run needs; see set_up.

    targets: {"q", "c"} of (N,) scaled MOS on the device; cosines: (N,) of the original views by the
    CLIP before training (s0), there too; teacher: (U, D) text embeddings of the
    explanations, or None; model: the scorer as it is trained, which is in torch's
    DistributedDataParallel where there are several processes; state: epoch, best epoch and
    score, epochs waited, log rows.
    """

    args: SimpleNamespace
    seed: int
    device: torch.device
    table: Table
    parts: dict
    identity: dict
    scorer: CLIPScorer
    model: nn.Module
    images: ImageInputs
    texts: TextInputs
    targets: dict
    cosines: torch.Tensor
    teacher: torch.Tensor | None
    floors: Floors
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    state: dict


def distributed(scorer, table, images, texts, args):
    """Return the scorer, in DistributedDataParallel where there are several processes.

    Parameters that have no part in the loss (a text decoder, say) are found by one image.
    """
    if WORLD.size == 1:
        return scorer
    view = plain_views(np.arange(1), 1)[0]
    with autocast(args, images.device):
        out = scorer(next(images.stream([view])), *texts.fetch(table.prompt_id[view.rows]))
    total = sum(value.sum() for value in out.values())
    trained = [p for p in scorer.parameters() if p.requires_grad]
    unused = any(g is None for g in torch.autograd.grad(total, trained, allow_unused=True))
    torch._dynamo.config.optimize_ddp = False  # it cannot split recomputed blocks
    return nn.parallel.DistributedDataParallel(scorer, find_unused_parameters=unused)


def forward(run, view, x, model=None):
    """Return the outputs of the scorer, or of run.model, for a View and its image input."""
    text, end, inverse = run.texts.fetch(run.table.prompt_id[view.rows])
    s0 = run.cosines[torch.from_numpy(view.rows).to(run.device)]
    with autocast(run.args, run.device):
        return (model or run.scorer)(x, text, end, inverse, s0)


def add_targets(run, view, window):
    """Return a batch's targets and weights; window: rows of its whole accumulation window."""
    rows = torch.from_numpy(view.rows).to(run.device)
    batch = {target: run.targets[target][rows] for target in TARGETS}
    batch["weight"] = WORLD.size / len(window)
    if run.teacher is not None:
        ids = run.table.explanation_id
        batch["weight_exp"] = WORLD.size / max(1, int((ids[window] >= 0).sum()))
        own = torch.from_numpy(ids[view.rows]).to(run.device)
        batch["has_teacher"] = own >= 0
        batch["teacher"] = run.teacher[own.clamp(min=0)]
    return batch


def check_finite(run, seen):
    """Stop at a loss that is not finite, or in fp16 stays so, naming the images of its batch.

    seen: list of (View, scalar loss tensor) since the last check; emptied.
    """
    if not seen:
        return
    finite = torch.isfinite(torch.stack([loss for _, loss in seen])).tolist()
    state, allowed = run.state, OVERFLOWS if run.scaler.is_enabled() else 0
    for (view, _), good in zip(seen, finite):
        state["overflows"] = 0 if good else state.get("overflows", 0) + 1
        if state["overflows"] > allowed:
            names = run.table.frame[run.args.name_column].iloc[view.rows[:8]].tolist()
            raise UserError(f"The loss must be finite, but it is not for a batch with "
                            f"{', '.join(names)}{', ..' if len(view.rows) > 8 else ''}: lower --lr "
                            f"or use --precision bf16 or fp32; the last good checkpoint is in "
                            f"{run.args.output_dir}.")
    WORLD.barrier()  # nobody goes on, and saves, past a loss that another process refuses
    seen.clear()


def train_one_epoch(run, epoch):
    """Train for one epoch; returns {"train_loss", "train_loss_q", .., running "train_srocc_q", ..}.

    Accumulation weights each image by 1 / (images of its window), so that a window gives exactly
    the gradient of one big batch, also where the last window is shorter. An epoch that was
    interrupted goes on after its last update (run.state["partial"]). Of several processes each
    runs its share of every batch; `sums` and `outputs` hold that until they are pooled.
    """
    args, accumulate = run.args, run.args.grad_accum_steps
    views = epoch_views(run.parts["train"], args, run.seed, epoch)
    updates = updates_per_epoch(run)
    partial = run.state.pop("partial", None) or {"update": 0, "sums": {}, "outputs": []}
    done, (sums, outputs) = partial["update"], unpooled(partial)
    seen = []
    run.scorer.train()
    run.optimizer.zero_grad(set_to_none=True)
    rest = [(step, *own_share(view)) for step, view in enumerate(views)][done * accumulate:]
    stream = zip(rest, run.images.stream([fed for _, _, fed in rest]))
    for (step, view, fed), x in progress(stream, f"epoch {epoch}", len(rest)):
        # Dropout depends on seed, step and process alone: a resumed run draws what the first
        # would have.
        torch.manual_seed((((run.seed * 100_003 + epoch) * 1_000_003 + step)
                           + WORLD.rank * 2 ** 40) % 2 ** 63)
        first = step - step % accumulate
        window = np.concatenate([v.rows for v in views[first:first + accumulate]])
        updates_now = (step + 1) % accumulate == 0 or step + 1 == len(views)
        with contextlib.nullcontext() if updates_now or WORLD.size == 1 else run.model.no_sync():
            out = forward(run, fed, x, run.model)
            if fed is not view:
                out = {name: value[:0] for name, value in out.items()}
            parts, total = losses(out, add_targets(run, view, window), args)
            run.scaler.scale(total).backward()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.detach()
        outputs.append(torch.stack([out["q"], out["c"]]).detach())
        seen.append((view, total.detach()))
        if not updates_now:
            continue
        apply_update(run, lr_factor((epoch - 1) * updates + done, updates, args))
        done += 1
        if done % FINITE_CHECK == 0 or done == updates:
            check_finite(run, seen)
        keep = args.save_every_steps and done % args.save_every_steps == 0
        if (keep or STOP.asked()) and done < updates:
            check_finite(run, seen)
            average_buffers(run)
            run.state["partial"] = {"update": done, **pooled(sums, outputs)}
            save_checkpoint(run, "baseline_last.pt")
            STOP.leave(run)
    run.state.pop("partial", None)
    average_buffers(run)
    whole = pooled(sums, outputs)
    return epoch_summary(run, views, whole["sums"], torch.cat(whole["outputs"], dim=1))


def pooled(sums, outputs):
    """Return an epoch's sums and outputs over all processes, the outputs in the order of views."""
    if WORLD.size > 1:
        own = {name: value.cpu() for name, value in sums.items()}, [x.cpu() for x in outputs]
        all_sums, all_outputs = zip(*WORLD.gather([own]))
        sums = {name: sum(each[name] for each in all_sums) for name in sums}
        outputs = [torch.cat(step, dim=1) for step in zip(*all_outputs)]
    return {"sums": sums, "outputs": outputs}


def unpooled(partial):
    """Return (sums, outputs) to go on from, such that pooling gives those of `partial` again."""
    if WORLD.rank == 0:
        return partial["sums"], partial["outputs"]
    return {}, [x[:, :0] for x in partial["outputs"]]


def average_buffers(run):
    """Take the mean of running statistics (BatchNorm's) that training has moved over processes."""
    if WORLD.size == 1:
        return
    for value in run.scorer.trained_state().values():
        if not isinstance(value, nn.Parameter) and value.is_floating_point():
            dist.all_reduce(value)
            value /= WORLD.size


def apply_update(run, factor):
    """Clip the gradient, step the optimiser at factor times its peak learning rates.

    The fused AdamW divides by grad_scale as it reads a gradient: no pass of its own for clipping.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    if run.args.max_grad_norm:
        run.scaler.unscale_(run.optimizer)
        norm = nn.utils.get_total_norm([p.grad for group in run.optimizer.param_groups
                                        for p in group["params"] if p.grad is not None])
        run.optimizer.grad_scale = (norm / run.args.max_grad_norm).clamp(min=1)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    vars(run.optimizer).pop("grad_scale", None)
    run.optimizer.zero_grad(set_to_none=True)


def epoch_summary(run, views, sums, outputs):
    """Return an epoch's mean losses and running metrics; outputs: (2, n) scores in view order."""
    args, rows = run.args, np.concatenate([view.rows for view in views])
    count = len(rows)
    with_teacher = int((run.table.explanation_id[rows] >= 0).sum())
    loss_q, loss_c = (float(sums[name]) / count for name in TARGETS)
    loss_exp = float(sums.get("exp", 0)) / max(1, with_teacher)
    total = args.w_q * loss_q + args.w_c * loss_c
    total += args.w_exp * loss_exp if run.teacher is not None else 0
    pred = dict(zip(TARGETS, outputs.float().cpu().numpy()))
    running = metrics(pred, human(run.table, rows))
    return {"skipped": skipped_updates(run, run.state["epoch"] + 1),
            "train_loss": total, "train_loss_q": loss_q, "train_loss_c": loss_c,
            "train_loss_exp": loss_exp, **{f"train_{k}": v for k, v in running.items()}}


def updates_per_epoch(run):
    """Return the number of optimiser updates of an epoch."""
    steps = -(-len(run.parts["train"]) // (run.args.batch_size * WORLD.size))
    return -(-steps // run.args.grad_accum_steps)


def skipped_updates(run, epochs):
    """Return how many updates of the first epochs fp16's scaler skipped: the optimiser knows.

    Asking the scaler instead would wait for the device at every update.
    """
    taken = next((state["step"] for state in run.optimizer.state.values()), 0)
    return epochs * updates_per_epoch(run) - int(taken)


def human(table, rows):
    """Return {"q", "c"}: the scaled human scores of some rows."""
    return {"q": table.quality[rows], "c": table.consistency[rows]}


def evaluate(run, rows):
    """Predict the original views of rows in eval mode.

    Returns {"q", "c", "q_base", "c_base", "q_delta", "c_delta"} of (n,) float32 numpy arrays.
    """
    run.scorer.eval()
    views = plain_views(rows[WORLD.part(len(rows))], run.args.batch_size)
    outputs = [torch.zeros(len(PREDICTIONS), 0, device=run.device)]
    # Training steps are compiled; evaluation has shapes of its own, and scores as --predict does.
    plain = (torch.compiler.set_stance("force_eager") if run.args.compile
             else contextlib.nullcontext())
    with torch.inference_mode(), plain:
        for view, x in progress(zip(views, run.images.stream(views)), "evaluate", len(views)):
            out = forward(run, view, x)
            outputs.append(torch.stack([out[k] for k in PREDICTIONS]).float())
    outputs = WORLD.gather([torch.cat(outputs, dim=1).cpu()])
    return dict(zip(PREDICTIONS, torch.cat(outputs, dim=1).numpy()))


def evaluate_part(run, part):
    """Return (predictions, metrics with "loss") of one part of the split."""
    rows = run.parts[part]
    pred, mos = evaluate(run, rows), human(run.table, rows)
    values = metrics(pred, mos)
    loss = run.args.w_q * values["rmse_q"] ** 2 + run.args.w_c * values["rmse_c"] ** 2
    return pred, {**values, "loss": loss}


def fit(run):
    """Train from run.state's epoch to the last one, keeping the best and the last checkpoint."""
    args, state = run.args, run.state
    if "start" not in state:
        start_state(run)
    while state["epoch"] < args.epochs and not stopped_early(args, state):
        began = time.perf_counter()
        epoch = state["epoch"] + 1
        row = {"epoch": epoch, **train_one_epoch(run, epoch)}
        trained = time.perf_counter() - began
        pred, values = evaluate_part(run, "val")
        row.update({f"val_{name}": value for name, value in values.items()})
        score = WORLD.from_main(selection_score, values, args.select_by)  # one decision for all
        better = note_score(args, state, epoch, score)
        state["epoch"] = epoch
        group = run.optimizer.param_groups[0]
        row.update(best=state["best_score"], lr=group["lr"])
        row["seconds"] = time.perf_counter() - began
        state["log"].append({name: row[name] for name in LOG_COLUMNS})
        print_epoch(row, len(run.parts["train"]) / trained, better)
        for target, name in (("q", "SROCC_Q"), ("c", "SROCC_C")):
            reason = nan_reason(pred[target], human(run.table, run.parts["val"])[target])
            if reason:
                print(f"  {name} is undefined: {reason}")
        if better:
            save_checkpoint(run, "baseline_best.pt")
        save_checkpoint(run, "baseline_last.pt")
        write_log(run)
        STOP.leave(run)
    if stopped_early(args, state):
        print(f"early stopping: no gain of {args.early_stopping_min_delta:g} in "
              f"{state['waited']} epochs")


def start_state(run):
    """Evaluate epoch 0, which counts as a candidate for the best epoch."""
    values = evaluate_part(run, "val")[1]
    run.state["start"] = values
    score = WORLD.from_main(selection_score, values, run.args.select_by)
    run.state.update(best_score=score, best_epoch=0)
    print(f"epoch   0  before training: val SROCC_Q {values['srocc_q']:.4f}  SROCC_C "
          f"{values['srocc_c']:.4f}   floors: " + "; ".join(
              f"{name} {m['srocc_q']:.4f} / {m['srocc_c']:.4f}"
              for name, m in floor_metrics(run, "val").items()))
    save_checkpoint(run, "baseline_best.pt")
    save_checkpoint(run, "baseline_last.pt")


def note_score(args, state, epoch, score):
    """Update best epoch and patience; returns whether this epoch is the new best."""
    if score > state["best_score"] + args.early_stopping_min_delta:
        state["waited"] = 0
    else:
        state["waited"] += 1
    better = score > state["best_score"]
    if better:
        state.update(best_score=score, best_epoch=epoch)
    return better


def stopped_early(args, state):
    """Return whether patience has run out."""
    return 0 < args.early_stopping_patience <= state["waited"]


def print_epoch(row, rate, better):
    """Print one line per epoch."""
    print(f"epoch {row['epoch']:3d}  loss {row['train_loss']:.4f} / {row['val_loss']:.4f}  "
          f"SROCC_Q {row['train_srocc_q']:.4f} / {row['val_srocc_q']:.4f}  "
          f"SROCC_C {row['train_srocc_c']:.4f} / {row['val_srocc_c']:.4f}  "
          f"lr {row['lr']:.1e}  {rate:.0f} images/s{'  best' if better else ''}"
          + (f"  fp16 skipped {row['skipped']} updates so far" if row["skipped"] else ""),
          flush=True)


def floor_metrics(run, part):
    """Return {floor: metrics} on one part of the split."""
    rows = run.parts[part]
    return {name: metrics({k: v[rows] for k, v in pred.items()}, human(run.table, rows))
            for name, pred in run.floors.pred.items()}


# --- checkpoints and logs -------------------------------------------------------------------

LOG_COLUMNS = (["epoch", "train_loss", "train_loss_q", "train_loss_c", "train_loss_exp", "val_loss"]
               + [f"{part}_{name}" for part in ("train", "val") for name in METRIC_NAMES]
               + ["best", "lr", "seconds"])

# Flags that may differ from a checkpoint's when a run is resumed: they do not change the result.
FREE_FLAGS = {"output_dir", "log_csv", "resume_from", "num_workers", "pin_memory", "cache",
              "cache_dir", "cache_max_gb", "preset", "demo", "data_csv_path", "image_base_dir",
              "no_amp", "repeats", "compile", "save_every_steps", "no_plots", "tensorboard",
              "predict", "checkpoint", "prompt", "predictions_csv", "min_quality",
              "min_consistency"}


@contextlib.contextmanager
def writing(path):
    """Make the folder of `path`; raise UserError where the block cannot write there."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"{path} must be writable, but is not ({error}): free some space or give "
                        f"another --output_dir; what was there before is untouched.") from error


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path that replaces `path` when the block ends well, and is gone if not."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # what a killed run left is written over
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def without_log(state):
    """Return a run's state without its log, which is saved as text."""
    return {key: value for key, value in state.items() if key not in ("log", "log_lines")}


def log_text(state):
    """Return the log as the text of a CSV.

    Each row becomes text once: an epoch costs as much after thousands of others as after one.
    """
    lines = state.setdefault("log_lines", [])
    lines += [csv_text([[row[name] for name in LOG_COLUMNS]], LOG_COLUMNS, header=False)
              for row in state["log"][len(lines):]]
    return csv_text([], LOG_COLUMNS) + "".join(lines)


def read_log(text):
    """Return the rows of log_text."""
    return [{name: int(value) if name == "epoch" else float(value) for name, value in row.items()}
            for row in csv.DictReader(io.StringIO(text))]


@main_only
def save_checkpoint(run, name):
    """Write what was trained, and all that an exact resume needs, to output_dir / name."""
    plain = {key: value for key, value in vars(run.args).items() if key != "explicit"}
    content = {"format": FORMAT, "version": FORMAT_VERSION, "args": plain, "seed": run.seed,
               "identity": run.identity, "scales": run.table.scales,
               "split": split_hash(run.table, run.parts, run.args),
               "state": {k: v.detach() for k, v in run.scorer.trained_state().items()},
               "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(),
               "progress": {**without_log(run.state), "log": log_text(run.state)},
               "processes": WORLD.size}
    with atomic_path(Path(run.args.output_dir, name)) as temporary:
        with open(temporary, "wb") as handle:
            try:
                torch.save(content, handle)
            except RuntimeError as error:  # torch's zip writer hides a full disk behind its own
                raise OSError(str(error.__context__ or error).splitlines()[0]) from error
            handle.flush()
            os.fsync(handle.fileno())


# What a checkpoint holds besides its format and version.
CHECKPOINT_PARTS = {"args": dict, "seed": int, "identity": dict, "scales": dict, "split": str,
                    "state": dict, "optimizer": dict, "scaler": dict, "progress": dict}


def load_checkpoint(path):
    """Load a checkpoint of this program (tensors and plain values only); raise UserError if not."""
    if not Path(path).is_file():
        raise UserError(f"A checkpoint must exist, but there is no file {path}: give the path of a "
                        f"baseline_last.pt or baseline_best.pt.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself does not look at the checksums
        if damaged:
            raise ValueError(f"the checksum of {damaged} in it is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and tensor errors all mean the same to a user
        reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else repr(error)
        raise UserError(f"{path} is damaged or not a checkpoint of this program ({reason}): "
                        f"{other_checkpoint(path)}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} must be a checkpoint of baseline.py, but is another program's "
                        f"file: give a baseline_last.pt or baseline_best.pt.")
    if content.get("version") != FORMAT_VERSION:
        raise UserError(f"{path} has checkpoint version {content.get('version')}, but this "
                        f"baseline.py reads version {FORMAT_VERSION}: use the baseline.py that "
                        f"wrote it.")
    wrong = [part for part, kind in CHECKPOINT_PARTS.items()
             if not isinstance(content.get(part), kind)]
    if wrong:
        raise UserError(f"{path} is damaged, it has no {', '.join(wrong)}: "
                        f"{other_checkpoint(path)}.")
    return content


def other_checkpoint(path):
    """Return what to use instead of a damaged checkpoint: the one beside it, where there is one."""
    beside = [Path(path).with_name(name) for name in ("baseline_last.pt", "baseline_best.pt")]
    found = [str(other) for other in beside if other != Path(path) and other.is_file()]
    return f"use {' or '.join(found)}" if found else "there is no other one beside it, train again"


def adopt_checkpoint_args(args, content, path):
    """Take every flag that the command line does not name from the checkpoint.

    A named flag that contradicts the checkpoint and would change the result is an error.
    """
    saved = content["args"]
    resolve_precision(args, pick_device())
    share_window(args, content, path)
    clash = [f"--{key} {getattr(args, key)} (checkpoint: {saved[key]})"
             for key in sorted(args.explicit - FREE_FLAGS)
             if key in saved and getattr(args, key) != saved[key]]
    if clash:
        raise UserError(f"A resumed run must keep the settings of {path}, but the command line "
                        f"has {', '.join(clash)}: drop these flags, or start a new run.")
    for key, value in saved.items():
        if key not in args.explicit | {"resume_from", "cache_dir"}:
            setattr(args, key, value)
    args.repeats = 1  # one run of several goes on by itself
    if "output_dir" not in args.explicit:
        args.output_dir = str(Path(path).parent)
    if "cache_dir" not in args.explicit:
        args.cache_dir = str(Path(args.output_dir) / "cache")


def share_window(args, content, path):
    """Keep the images of an update where a run goes on with another number of processes.

    What the command line does not name is adapted: steps per update if that is enough, which
    needs no more memory, else the batch size. The checkpoint's arguments are changed.
    """
    if content.get("processes", 1) == WORLD.size:
        return
    saved, flags = content["args"], ("batch_size", "grad_accum_steps")
    batch, steps = (getattr(args, f) if f in args.explicit else saved[f] for f in flags)
    window = content.get("processes", 1) * saved["batch_size"] * saved["grad_accum_steps"]
    if "grad_accum_steps" not in args.explicit and window % (batch * WORLD.size) == 0:
        steps = window // (batch * WORLD.size)
    elif "batch_size" not in args.explicit and window % (steps * WORLD.size) == 0:
        batch = window // (steps * WORLD.size)
    if WORLD.size * batch * steps != window:
        raise UserError(f"A resumed run must keep the {window} images per update of {path}, but "
                        f"{WORLD.size} processes x --batch_size {batch} x --grad_accum_steps "
                        f"{steps} do not: use a number of processes that divides {window}, and "
                        f"drop these flags.")
    saved.update(zip(flags, (batch, steps)))


def load_trained_state(scorer, state, path):
    """Load what was trained into a freshly built scorer; raise UserError where it does not fit."""
    own = scorer.trained_state()
    wrong = sorted(set(own) ^ set(state)) or [
        name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise UserError(f"{path} must hold the trained weights of this model, but {wrong[0]} "
                        f"(and {len(wrong) - 1} more) differ: it is from another model.")
    scorer.load_state_dict(state, strict=False)


def resume(run, content, path):
    """Bring a set-up run to where the checkpoint was."""
    if content["identity"]["weights"] != run.identity["weights"]:
        raise UserError(f"{path} was trained from other CLIP weights than "
                        f"{run.identity['model']} has now: give the same --clip_model and "
                        f"--pretrained.")
    if content["split"] != split_hash(run.table, run.parts, run.args):
        raise UserError(f"{path} was trained on another split of the data: resume with the same "
                        f"CSV, --seed, --split_by and ratios.")
    load_trained_state(run.scorer, content["state"], path)
    run.optimizer.load_state_dict(content["optimizer"])
    run.scaler.load_state_dict(content["scaler"])
    progress = content["progress"]
    run.state.update(without_log(progress), log=read_log(progress["log"]), log_lines=[])
    partial = run.state.get("partial")
    if partial:
        partial["outputs"] = [part.to(run.device) for part in partial["outputs"]]
    print(f"resumed {path} after epoch {run.state['epoch']}")


def safe_cell(value):
    """Return a CSV cell that no spreadsheet takes for a formula: such texts get an apostrophe.

    Numbers, and texts that are numbers, stay as they are (OWASP, CSV Injection).
    """
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def csv_text(rows, columns, header=True):
    """Return rows of cells as the text of a CSV; every CSV that is written comes from here."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(map(safe_cell, columns))
    writer.writerows(map(safe_cell, row) for row in rows)
    return text.getvalue()


@main_only
def write_table(path, rows, columns):
    """Write dictionaries as a CSV, atomically."""
    cells = [[row[column] for column in columns] for row in rows]
    with atomic_path(path) as temporary:
        temporary.write_text(csv_text(cells, columns), encoding="utf-8", newline="")


@main_only
def write_log(run):
    """Write the log: one row per epoch, from the state that the checkpoint also holds."""
    with atomic_path(Path(run.args.output_dir, run.args.log_csv)) as temporary:
        temporary.write_text(log_text(run.state), encoding="utf-8", newline="")


@main_only
def write_json(path, content):
    """Write JSON atomically; NaN becomes null."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(finite_json(content), indent=1) + "\n", encoding="utf-8")


def finite_json(value):
    """Return the value with NaN and infinities as None: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def git_commit():
    """Return the commit of this file's repository, or None."""
    result = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True,
                            text=True, check=False) if shutil.which("git") else None
    return result.stdout.strip() if result and result.returncode == 0 else None


def write_config(run):
    """Write config.json: arguments, versions, split, label scales, commit."""
    versions = {name: sys.modules[name].__version__ for name in ("torch", "open_clip", "pandas",
                                                                 "numpy", "scipy")}
    arguments = {k: v for k, v in vars(run.args).items() if k != "explicit"}
    write_json(Path(run.args.output_dir, "config.json"), {
        "arguments": arguments, "seed": run.seed, "identity": run.identity,
        "label_scales": run.table.scales, "split": split_hash(run.table, run.parts, run.args),
        "images": {part: len(rows) for part, rows in run.parts.items()},
        "versions": {"python": platform.python_version(), **versions}, "commit": git_commit()})


def write_predictions(run, part, pred):
    """Write <part>_predictions.csv, scores for people: clamped and on the MOS scale."""
    args, table, rows = run.args, run.table, run.parts[part]
    frame = table.frame.iloc[rows]
    columns = {"name": frame[args.name_column], "prompt": frame[args.prompt_column],
               "mos_quality": frame[args.quality_column],
               "mos_align": frame[args.consistency_column]}
    for name, key in (("quality", "q"), ("consistency", "c"), ("quality_base", "q_base"),
                      ("consistency_base", "c_base")):
        columns[name] = (np.clip(pred[key], 0, 1) * table.scales[key[0]]).round(4)
    records = pd.DataFrame(columns).to_dict("records")
    write_table(Path(args.output_dir, f"{part}_predictions.csv"), records, list(columns))


# --- report ---------------------------------------------------------------------------------


def judge(run, part):
    """Return (predictions, {metrics, "interval_q", "interval_c", "gain_q", ..}) of one part.

    interval: 95 % of SROCC by bootstrap over prompts; gain: SROCC minus the linear probe's.
    """
    pred, values = evaluate_part(run, part)
    values.pop("loss")
    rows = run.parts[part]
    mos, groups = human(run.table, rows), run.table.prompt_id[rows]
    for target in TARGETS:
        values[f"interval_{target}"] = bootstrap_interval(pred[target], mos[target], groups)
    return pred, values


def finish(run, seconds):
    """Evaluate the best checkpoint on every part and write predictions.

    Returns (predictions of the judged part, summary).
    """
    args = run.args
    best = Path(args.output_dir, "baseline_best.pt")
    state = WORLD.from_main(lambda: load_checkpoint(best)["state"])
    load_trained_state(run.scorer, state, "baseline_best.pt")
    summary = {"best_epoch": run.state["best_epoch"], "epochs_run": run.state["epoch"],
               "start": {k: v for k, v in run.state["start"].items() if k != "loss"}}
    judged = [part for part in ("val", "test") if len(run.parts[part])]
    for part in judged:
        pred, summary[part] = judge(run, part)
        write_predictions(run, part, pred)
    for target in TARGETS:
        size = np.abs(pred[f"{target}_delta"])
        if not args.no_residual_learning:
            summary[f"saturated_{target}"] = float((size > SATURATED).mean())
            summary[f"largest_delta_{target}"] = float(size.max())
    summary["train"] = evaluate_part(run, "train")[1]
    summary["train"].pop("loss")
    summary["floors"] = floor_metrics(run, "val")
    if "test" in judged:
        summary["floors_test"] = floor_metrics(run, "test")
    for target in TARGETS:
        gap = summary["train"][f"srocc_{target}"] - summary["val"][f"srocc_{target}"]
        summary[f"gap_{target}"] = gap
        summary[f"tier_{target}"] = tier(target, summary["val"][f"srocc_{target}"], gap)
    if run.scaler.is_enabled():
        summary["skipped_updates"] = skipped_updates(run, run.state["epoch"])
    summary.update(seed=run.seed, split=split_hash(run.table, run.parts, args),
                   seconds=seconds, output_dir=args.output_dir)
    return pred, summary


def conclude(run, seconds):
    """Finish a run: table, advice, pictures, result.json; returns the summary."""
    pred, summary = finish(run, seconds)
    print_summary(summary)
    depth, count = run.scorer.towers["image"].depth, len(run.parts["train"])
    found = training_advice(run.args, run.state["log"], summary, depth)
    print_advice(run.args, found)
    if not run.args.no_plots:
        write_report(run, pred, summary,
                     found + settings_advice(run.args, count, depth))
    if run.args.tensorboard:
        write_tensorboard(run, summary)
    write_json(Path(run.args.output_dir, "result.json"), summary)
    return summary


ROW_TITLES = {"zero_shot": "zero-shot", "linear_probe": "linear probe",
              "prompt_mean": "prompt mean (no pixels)"}


def print_summary(summary):
    """Print the final table of one run: floors and this run, then gap and tier."""
    part = judged_part(summary)
    floors = summary["floors_test" if part == "test" else "floors"]
    print(f"\n{part}, best epoch {summary['best_epoch']:<8} {'SROCC_Q':>9}{'PLCC_Q':>9}"
          f"{'SROCC_C':>9}{'PLCC_C':>9}   95 % interval of SROCC")
    for name, values in [*floors.items(), ("this run", summary[part])]:
        cells = "".join(f"{values[m]:9.4f}" for m in ("srocc_q", "plcc_q", "srocc_c", "plcc_c"))
        interval = "".join(f"   {t.upper()} {values[f'interval_{t}'][0]:.3f}.."
                           f"{values[f'interval_{t}'][1]:.3f}" for t in TARGETS
                           if f"interval_{t}" in values)
        print(f"{ROW_TITLES.get(name, name):24}{cells}{interval}")
    if part == "test":
        print("validation SROCC (it picked the epoch): "
              f"Q {summary['val']['srocc_q']:.4f}, C {summary['val']['srocc_c']:.4f}")
    for target, title in (("q", "quality"), ("c", "consistency")):
        print(f"{title}: Train-Val Gap {summary[f'gap_{target}']:+.4f}, "
              f"tier {summary[f'tier_{target}']}")
    if summary.get("skipped_updates"):
        print(f"fp16: {summary['skipped_updates']} updates overflowed and were skipped")


def run_files(args):
    """Return the names of what one run writes into its output_dir."""
    return ["baseline_best.pt", "baseline_last.pt", "config.json", "result.json",
            "val_predictions.csv", "test_predictions.csv", "skipped.csv", "curves.png",
            "scatter.png", "worst.png", "report.html", "tensorboard", "repeats.json",
            Path(args.log_csv).name]


@main_only
def archive_old_run(args):
    """Move an earlier run's files to archive/<time>/ instead of overwriting them."""
    folder = Path(args.output_dir)
    old = [folder / name for name in run_files(args) if (folder / name).exists()]
    old += sorted(folder.glob("repeat_*"))
    if not old:
        return
    target = folder / "archive" / time.strftime("%Y%m%d-%H%M%S")
    while target.exists():
        target = target.with_name(target.name + "x")
    try:
        target.mkdir(parents=True)
        for path in old:
            path.rename(target / path.name)
    except OSError as error:
        raise UserError(f"--output_dir {folder} must be writable to keep the earlier run, but is "
                        f"not ({error}): give another --output_dir.") from error
    print(f"the earlier run in {folder} is kept in {target}")


def changed_flags(args):
    """Return the command-line flags by which a run differs from the defaults, quoted."""
    defaults = {**vars(build_parser().parse_args([])), **(DEMO if args.demo else {})}
    skip = {"explicit", "cache_dir", "preset", "resume_from", "no_pin_memory"}
    words = []
    if "precision" not in args.explicit:
        skip.add("precision")
    for key, value in sorted(vars(args).items()):
        if key in skip or value == defaults.get(key) or value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no_{key}")
        else:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            exact = text if isinstance(value, str) or float(text) == value else repr(value)
            words.append(f"--{key} {shlex.quote(exact)}")
    return " ".join(words)


RUN_COLUMNS = (["time", "arguments", "seed", "split", "best_epoch"]
               + [f"{part}_{name}" for part in ("val", "test") for name in METRIC_NAMES]
               + [f"{floor}_srocc_{t}" for floor in ("zero_shot", "linear_probe")
                  for t in TARGETS] + ["gap_q", "gap_c", "seconds", "checkpoint"])


@main_only
def append_run(args, summary):
    """Append one row to <output_dir>/runs.csv in a single write; the file is never rewritten.

    What a full disk let through of the row is taken back.
    """
    row = {"time": time.strftime("%Y-%m-%d %H:%M:%S"),
           "arguments": f"python baseline.py {changed_flags(args)}",
           "checkpoint": str(Path(summary["output_dir"], "baseline_best.pt"))}
    row.update({k: summary[k] for k in ("seed", "split", "best_epoch", "gap_q", "gap_c")})
    row["seconds"] = round(summary["seconds"], 1)
    for part in ("val", "test"):
        row.update({f"{part}_{name}": summary.get(part, {}).get(name, "")
                    for name in METRIC_NAMES})
    for floor in ("zero_shot", "linear_probe"):
        row.update({f"{floor}_srocc_{t}": summary["floors"][floor][f"srocc_{t}"]
                    for t in TARGETS})
    path = Path(args.output_dir, "runs.csv")
    with writing(path), open(path, "ab", buffering=0) as handle:
        size = handle.seek(0, os.SEEK_END)
        cells = [row[column] for column in RUN_COLUMNS]
        line = csv_text([cells], RUN_COLUMNS, header=size == 0).encode()
        if handle.write(line) < len(line):
            handle.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- advice ---------------------------------------------------------------------------------

# The card's rules of thumb: learning rate by freezing, residual scale by number of images.
LR_RANGES = {"frozen": (1e-3, 5e-3), "partial": (3e-5, 1e-4), "full": (1e-5, 3e-5)}
SCALE_BY_IMAGES = ((500, 0.1, 0.1), (3000, 0.2, 0.2), (10_000, 0.3, 0.3), (math.inf, 0.4, 0.5))
SATURATED, UNUSED = 0.95, 0.05  # |tanh(delta)| above / below this: at its bound / not needed


@dataclass
class Advice:
    """One finding. what: the diagnosis; evidence: its numbers; changes: {flag: new value}."""

    what: str
    evidence: str
    changes: dict


def freezing(args):
    """Return "frozen", "partial" or "full"."""
    return "frozen" if args.freeze_clip else "partial" if args.partial_freeze else "full"


def settings_advice(args, train_images, depth):
    """Apply the rules that need no training. depth: of the image tower, None if unknown.

    The demo's tiny CLIP and few images are outside these rules, so it gets none.
    """
    found, mode = [], freezing(args)
    if args.demo:
        return found
    low, high = LR_RANGES[mode]
    if not low * 0.999 <= args.lr <= high * 1.001:
        found.append(Advice("learning rate outside the usual range", f"lr {args.lr:g}, but a "
                            f"{mode} CLIP usually wants {low:g} to {high:g}",
                            {"lr": min(max(args.lr, low), high)}))
    low, high = next((a, b) for limit, a, b in SCALE_BY_IMAGES if train_images < limit)
    scales = (args.residual_scale_q, args.residual_scale_c)
    if not args.no_residual_learning and not low / 2 <= min(scales) <= max(scales) <= 2 * high:
        found.append(Advice("residual scale unusual for this many images",
                            f"scales {scales[0]:g} and {scales[1]:g}, but {train_images} training "
                            f"images usually want {low:g}",
                            {"residual_scale_q": low, "residual_scale_c": low}))
    # The rule is about transformers: the few stages of a convolutional trunk are outside it.
    transformer = mode == "partial" and (depth or 0) >= 12
    if transformer and not depth / 2 <= args.freeze_layers <= depth * 11 / 12:
        found.append(Advice("freeze_layers unusual for this tower", f"{args.freeze_layers} of "
                            f"{depth} blocks are frozen; two thirds to five sixths are usual",
                            {"freeze_layers": round(depth * 3 / 4)}))
    return found


def less_capacity(args, depth):
    """Return the card's changes against overfitting, for this run's freezing."""
    changes = {"dropout": max(0.2, args.dropout), "weight_decay": max(5e-4, args.weight_decay)}
    if not args.no_residual_learning:
        changes.update(residual_scale_q=min(0.15, args.residual_scale_q),
                       residual_scale_c=min(0.15, args.residual_scale_c))
    if args.freeze_clip:
        changes["epochs"] = max(1, args.epochs // 2)
    elif depth:
        changes.update(lr=min(1e-5, args.lr) if not args.demo else float(f"{args.lr / 3:.2g}"),
                       partial_freeze=True, freeze_layers=max(1, round(depth * 20 / 24)))
    return changes


def more_capacity(args, depth):
    """Return the card's changes against underfitting, for this run's freezing."""
    changes = {"dropout": 0.05, "weight_decay": 1e-5,
               "lr": max(5e-5, args.lr) if not args.freeze_clip else min(5e-3, args.lr * 2)}
    if not args.no_residual_learning:
        changes.update(residual_scale_q=0.3, residual_scale_c=0.3)
    if args.partial_freeze and depth:
        changes["freeze_layers"] = round(depth * 16 / 24)
    return changes


def training_advice(args, log, summary, depth):
    """Diagnose a finished run from its log rows and summary; returns a list of Advice."""
    found = []
    gaps = {t: summary[f"gap_{t}"] for t in TARGETS}
    needs_work = {t: summary[f"tier_{t}"] == "needs work" for t in TARGETS}
    best, last = summary["best_epoch"], log[-1]
    fitted = max(last[f"train_srocc_{t}"] - last[f"val_srocc_{t}"] for t in TARGETS)
    if max(gaps.values()) > 0.05 or (fitted > 0.1 and best < last["epoch"] / 2):
        found.append(Advice("overfitting", f"Train-Val Gap Q {gaps['q']:+.3f}, C {gaps['c']:+.3f} "
                            f"(above 0.05 needs work); best epoch {best} of {last['epoch']}, "
                            f"in the last one training SROCC is {fitted:+.3f} from validation",
                            less_capacity(args, depth)))
    elif all(needs_work.values()) and max(gaps.values()) < 0.02 and best == last["epoch"]:
        found.append(Advice("underfitting", f"validation SROCC Q {last['val_srocc_q']:.3f}, C "
                            f"{last['val_srocc_c']:.3f} still rise in the last epoch, Train-Val "
                            f"Gap at most {max(gaps.values()):+.3f}", more_capacity(args, depth)))
    rises = [(b["epoch"], b["train_loss"] / a["train_loss"]) for a, b in zip(log, log[1:])
             if b["train_loss"] > 1.2 * a["train_loss"]]
    if rises:
        epoch, factor = max(rises, key=lambda rise: rise[1])
        found.append(Advice("unstable loss", f"training loss rose {factor:.1f}-fold in epoch "
                            f"{epoch}", {"warmup_ratio": 0.1, "max_grad_norm": 0.5,
                                         "lr": float(f"{args.lr / 3:.2g}"), "batch_size": 16}))
    for t, other, name, changes in (
            ("c", "q", "SROCC_C", {"w_q": 0.3, "w_c": 0.7, "residual_scale_c": 0.3}),
            ("q", "c", "SROCC_Q", {"w_q": 0.7, "w_c": 0.3, "residual_scale_q": 0.3})):
        low = summary["val"][f"srocc_{t}"] <= TIERS[t][-1][1]  # the gap alone is no low score
        if low and not needs_work[other]:
            found.append(Advice(f"low {name} only", f"validation SROCC Q "
                                f"{summary['val']['srocc_q']:.3f} ({summary['tier_q']}), C "
                                f"{summary['val']['srocc_c']:.3f} ({summary['tier_c']})", changes))
    return found + residual_advice(args, summary)


def residual_advice(args, summary):
    """Say where a residual sits at its bound or does nothing."""
    found = []
    for t, name in (("q", "quality"), ("c", "consistency")):
        share = summary.get(f"saturated_{t}", 0.0)
        scale = getattr(args, f"residual_scale_{t}")
        if share > 0.05:
            found.append(Advice(f"{name} residual saturated", f"{share:.0%} of |delta| are above "
                                f"{SATURATED:g} of its bound {scale:g}",
                                {f"residual_scale_{t}": round(min(0.5, scale * 1.5), 3)}))
        if summary["best_epoch"] and summary.get(f"largest_delta_{t}", 1.0) < UNUSED:
            found.append(Advice(f"{name} residual unused", f"the largest |delta| is "
                                f"{summary[f'largest_delta_{t}']:.3f} of its bound",
                                {"head_lr": float(f"{head_lr(args) * 3:.2g}")}))
    return found


def next_command(args, advice):
    """Return the complete command that differs from this run in the advised flags only."""
    changed = argparse.Namespace(**{**vars(args), **advice.changes})
    if "partial_freeze" in advice.changes:
        changed.freeze_clip = False
    return f"python baseline.py {changed_flags(changed)}".rstrip()


def print_advice(args, found):
    """Print each finding with its evidence and the next command; nothing if there is none."""
    for advice in found:
        print(f"\n{advice.what}: {advice.evidence}; try\n  {next_command(args, advice)}")


# --- pictures and report --------------------------------------------------------------------

COLOURS = {"q": "#0072B2", "c": "#D55E00", "grey": "#666666"}  # Okabe and Ito: colour-blind-safe
TITLES = {"q": "quality", "c": "consistency"}


def pyplot():
    """Return matplotlib.pyplot, without a display; Chinese shows if any CJK font is installed."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot as plt
    installed = {font.name for font in font_manager.fontManager.ttflist}
    cjk = [name for name in ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC",
                             "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "SimHei",
                             "Microsoft YaHei", "PingFang SC") if name in installed]
    plt.rcParams["font.family"] = ["DejaVu Sans", *cjk]
    for message in ("Glyph .* missing from", "Matplotlib currently does not support"):
        warnings.filterwarnings("ignore", message=message)
    return plt


def save_figure(figure, path):
    """Write a figure as PNG, atomically, and close it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot().close(figure)


def draw_curves(log, summary, path):
    """Draw losses and both SROCCs per epoch, with the best epoch and the floors."""
    epochs = [row["epoch"] for row in log]
    figure, axes = pyplot().subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for part, style in (("train", "--"), ("val", "-")):
        axes[0].plot(epochs, [row[f"{part}_loss"] for row in log], style, marker=".",
                     color=COLOURS["grey"], label="validation" if part == "val" else "train")
    axes[0].set(title="loss", xlabel="epoch", ylabel="weighted squared error on [0, 1] scale")
    for axis, target in zip(axes[1:], TARGETS):
        for part, style in (("train", "--"), ("val", "-")):
            axis.plot(epochs, [row[f"{part}_srocc_{target}"] for row in log], style, marker=".",
                      color=COLOURS[target],
                      label="validation" if part == "val" else "train (running)")
        for floor, line in (("linear_probe", ":"), ("zero_shot", "-.")):
            value = summary["floors"][floor][f"srocc_{target}"]
            if target == "c" or floor == "linear_probe":
                axis.axhline(value, linestyle=line, color=COLOURS["grey"],
                             label=f"{ROW_TITLES[floor]} {value:.3f}")
        axis.set(title=f"SROCC, {TITLES[target]}", xlabel="epoch", ylabel="SROCC")
    for axis in axes:
        axis.axvline(summary["best_epoch"], color="black", linewidth=0.8, alpha=0.5,
                     label=f"best epoch {summary['best_epoch']}")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    save_figure(figure, path)


def draw_scatter(pred, mos, scales, values, part, path):
    """Draw predicted against human MOS of both targets, on the MOS scale."""
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    for axis, target in zip(axes, TARGETS):
        scale = scales[target]
        axis.scatter(mos[target] * scale, np.clip(pred[target], 0, 1) * scale, s=12, alpha=0.5,
                     color=COLOURS[target], edgecolors="none")
        axis.plot([0, scale], [0, scale], color="black", linewidth=0.8, label="identity")
        axis.set(title=f"{TITLES[target]} ({part}): SROCC {values[f'srocc_{target}']:.3f}, "
                       f"PLCC {values[f'plcc_{target}']:.3f}",
                 xlabel=f"human MOS (0 to {scale:g})", ylabel=f"predicted MOS (0 to {scale:g})",
                 xlim=(0, scale), ylim=(0, scale), aspect="equal")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, loc="upper left")
    save_figure(figure, path)


def draw_worst(run, pred, rows, path, count=6):
    """Draw a contact sheet of the images that each target gets most wrong."""
    table, mos = run.table, human(run.table, rows)
    count = min(count, len(rows))
    figure, axes = pyplot().subplots(2, count, figsize=(2.5 * count, 6.8), squeeze=False,
                                     layout="constrained")
    for line, target in zip(axes, TARGETS):
        error = pred[target] - mos[target]
        scale = table.scales[target]
        for axis, i in zip(line, np.argsort(-np.abs(error))[:count]):
            try:
                image = load_image(table.paths[rows[i]])
            except ImageError:  # gone since it was cached: no reason to lose the report
                image = Image.new("RGB", (8, 8), "grey")
            image.thumbnail((256, 256))
            axis.imshow(image)
            prompt = "\n".join(textwrap.wrap(table.prompts[table.prompt_id[rows[i]]], 26,
                                             max_lines=3, placeholder=" .."))
            axis.set_title(f"{TITLES[target]}: human {mos[target][i] * scale:.2f}, predicted "
                           f"{np.clip(pred[target][i], 0, 1) * scale:.2f}", fontsize=7)
            axis.set_xlabel(prompt.replace("$", r"\$"), fontsize=8)
            axis.set(xticks=[], yticks=[])
    save_figure(figure, path)


@main_only
def write_report(run, pred, summary, found):
    """Write curves.png, scatter.png, worst.png and the self-contained report.html."""
    folder, part = Path(run.args.output_dir), judged_part(summary)
    rows = run.parts[part]
    mos = human(run.table, rows)
    draw_curves(run.state["log"], summary, folder / "curves.png")
    draw_scatter(pred, mos, run.table.scales, summary[part], part, folder / "scatter.png")
    draw_worst(run, pred, rows, folder / "worst.png")
    write_html(run, summary, found, folder / "report.html")


def judged_part(summary):
    """Return the part that a run is judged on: test where there is one, else validation."""
    return "test" if "test" in summary else "val"


def write_html(run, summary, found, path):
    """Write one HTML page with settings, table, verdict and the pictures inside it."""
    part, escape = judged_part(summary), html.escape
    floors = summary["floors_test" if part == "test" else "floors"]
    columns = ("srocc_q", "plcc_q", "srocc_c", "plcc_c")
    lines = "".join(
        f"<tr><th>{escape(ROW_TITLES.get(name, name))}</th>"
        + "".join(f"<td>{values[m]:.4f}</td>" for m in columns) + "</tr>"
        for name, values in [*floors.items(), ("this run", summary[part])])
    verdict = "".join(f"<li>{TITLES[t]}: {summary[f'tier_{t}']}, Train-Val Gap "
                      f"{summary[f'gap_{t}']:+.4f}, 95 % interval of SROCC "
                      f"{summary[part][f'interval_{t}'][0]:.3f} to "
                      f"{summary[part][f'interval_{t}'][1]:.3f}</li>" for t in TARGETS)
    advice = "".join(f"<li><b>{escape(a.what)}</b>: {escape(a.evidence)}<pre>"
                     f"{escape(next_command(run.args, a))}</pre></li>" for a in found)
    pictures = "".join(
        f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,'
        f'{base64.b64encode((path.parent / name).read_bytes()).decode()}">'
        for name, title in (("curves.png", "Training"), ("scatter.png", "Predicted and human MOS"),
                            ("worst.png", "Most wrong")))
    command = f"python baseline.py {changed_flags(run.args)}"
    page = (f"<!doctype html><html lang='en'><meta charset='utf-8'><title>baseline.py report"
            f"</title><style>{REPORT_STYLE}</style><h1>Quality and consistency on "
            f"{len(run.parts[part])} {part} images</h1><pre>{escape(command)}</pre>"
            f"<table><tr><th></th>{''.join(f'<th>{m.upper()}</th>' for m in columns)}</tr>{lines}"
            f"</table><p>Best epoch {summary['best_epoch']} of {summary['epochs_run']}, split by "
            f"{run.args.split_by}, seed {run.seed}.</p><h2>Verdict</h2><ul>{verdict}{advice}</ul>"
            f"{pictures}</html>\n")
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


REPORT_STYLE = ("body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
                "img{max-width:100%}table{border-collapse:collapse}td,th{padding:.25em .8em;"
                "text-align:right;border-bottom:1px solid #ccc}pre{white-space:pre-wrap;"
                "background:#f4f4f4;padding:.6em}")


@main_only
def write_tensorboard(run, summary):
    """Write the log's scalars and the pictures for TensorBoard, if it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("--tensorboard needs the package tensorboard: pip install tensorboard")
        return
    folder = Path(run.args.output_dir, "tensorboard")
    with writing(folder), SummaryWriter(str(folder)) as writer:
        for row in run.state["log"]:
            for name, value in row.items():
                writer.add_scalar(name, value, row["epoch"])
        for name in ("curves", "scatter", "worst"):
            picture = Path(run.args.output_dir, f"{name}.png")
            if picture.exists():
                pixels = np.asarray(Image.open(picture).convert("RGB"))
                writer.add_image(name, pixels, summary["epochs_run"], dataformats="HWC")


# --- repeats --------------------------------------------------------------------------------


def mean_sd(values):
    """Return (mean, sample standard deviation) of a list, sd NaN for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def paired_interval(differences):
    """Return {"mean", "low", "high"}: the 95 % t interval of paired differences."""
    mean, sd = mean_sd(differences)
    half = scipy.stats.t.ppf(0.975, len(differences) - 1) * sd / math.sqrt(len(differences))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summarise_repeats(summaries):
    """Return mean and sd of every metric per part and floor, and paired gains over the floors."""
    table = {"repeats": summaries, "mean": {}, "sd": {}, "gain": {}}
    judged = "test" if "test" in summaries[0] else "val"
    floors = "floors_test" if judged == "test" else "floors"

    def collect(name, pick):
        cells = {m: mean_sd([pick(s)[m] for s in summaries]) for m in METRIC_NAMES}
        table["mean"][name] = {m: cell[0] for m, cell in cells.items()}
        table["sd"][name] = {m: cell[1] for m, cell in cells.items()}

    for part in ("train", "val", "test"):
        if part in summaries[0]:
            collect(part, lambda s, part=part: s[part])
    for floor in summaries[0][floors]:
        collect(floor, lambda s, floor=floor: s[floors][floor])
        table["gain"][floor] = {
            f"srocc_{t}": paired_interval([s[judged][f"srocc_{t}"] - s[floors][floor][f"srocc_{t}"]
                                           for s in summaries]) for t in TARGETS}
    table["part"] = judged
    return table


def print_repeats(table):
    """Print the final table of repeated runs: mean +- SD, then the gains over the floors."""
    part, count = table["part"], len(table["repeats"])
    print(f"\n{part} of {count} splits, mean +- SD      "
          + "".join(f"{m:<19}" for m in ("SROCC_Q", "PLCC_Q", "SROCC_C", "PLCC_C")))
    for name in [*table["gain"], part]:
        cells = "".join(f"{table['mean'][name][m]:.4f} +- {table['sd'][name][m]:.4f}   "
                        for m in ("srocc_q", "plcc_q", "srocc_c", "plcc_c"))
        title = "this run" if name == part else ROW_TITLES[name]
        print(f"{title:30}{cells}".rstrip())
    for floor, gain in table["gain"].items():
        print(f"gain over {ROW_TITLES[floor]}, paired, 95 %: " + ", ".join(
            f"{t.upper()} {g['mean']:+.4f} ({g['low']:+.4f}..{g['high']:+.4f})"
            for t, g in zip(TARGETS, gain.values())))


def repeat_fingerprint(args, table):
    """Return a hash of what the repeats depend on: flags that matter, and the data."""
    flags = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS | {"explicit"}}
    flags["batch_size"] *= WORLD.size
    data = pd.util.hash_pandas_object(table.frame.astype(str), index=False).to_numpy().tobytes()
    return content_key(flags=flags, data=hashlib.sha256(data).hexdigest())


def train_repeats(args, table):
    """Train on several splits; a repeat that was finished before is not run again."""
    folder, fingerprint = Path(args.output_dir), repeat_fingerprint(args, table)
    record = folder / "repeats.json"
    if not (record.exists() and read_json(record).get("fingerprint") == fingerprint):
        archive_old_run(args)
        write_json(record, {"fingerprint": fingerprint})
    summaries = []
    for seed in range(args.seed, args.seed + args.repeats):
        own = argparse.Namespace(**{**vars(args), "output_dir": str(folder / f"repeat_{seed}")})
        done = Path(own.output_dir, "result.json")
        if WORLD.from_main(done.exists):
            print(f"\nrepeat with seed {seed}: finished before, kept")
            summaries.append(nan_json(WORLD.from_main(read_json, done)))
            continue
        print(f"\nrepeat with seed {seed}")
        last = Path(own.output_dir, "baseline_last.pt")
        known = WORLD.from_main(last.exists)
        summaries.append(train_one_run(own, table, seed, last if known else None))
        append_run(args, summaries[-1])
    result = {**summarise_repeats(summaries), "fingerprint": fingerprint,
              "output_dir": args.output_dir}
    write_json(record, result)
    print_repeats(result)
    return result


def read_json(path):
    """Read a JSON file of an earlier run."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} of an earlier run is damaged ({error}): remove it, or give "
                        f"another --output_dir.") from error


def nan_json(value):
    """Undo finite_json: None becomes NaN."""
    if isinstance(value, dict):
        return {key: nan_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nan_json(item) for item in value]
    return math.nan if value is None else value


# --- scoring --------------------------------------------------------------------------------

SCORE_COLUMNS = ("quality", "consistency", "quality_base", "consistency_base", "error")


def scoring_frame(args, saved):
    """Return (DataFrame with the input columns, image paths, prompts) of --predict's target.

    saved: the checkpoint's arguments, which name the columns. Prompts are "" where there is none.
    Links that lead out of a folder are not followed, neither to images nor to their prompts.
    """
    target = Path(args.predict)
    if target.suffix.lower() == ".csv":
        frame = read_csv(target).reset_index(drop=True)
        if frame.empty:
            raise UserError(f"{target} has no rows to score: add one per image.")
        name, prompt = (getattr(args if f"{k}_column" in args.explicit else saved, f"{k}_column")
                        for k in ("name", "prompt"))
        if name not in frame:
            raise UserError(f"{target} needs the column {name}, but has "
                            f"{', '.join(frame.columns)}: rename it with --name_column.")
        prompts = frame[prompt].tolist() if prompt in frame else [args.prompt or ""] * len(frame)
        base = scoring_base(args, saved, target, frame[name])
        bad = [n for n in frame[name] if "\0" in n or not inside(base.resolve(), n)]
        if bad:
            raise UserError(f"Names must stay inside {base}, but {bad[0]!r} does not: use names "
                            f"relative to --image_base_dir.")
        return frame, [base / n for n in frame[name]], prompts
    if target.is_dir():
        known = Image.registered_extensions()
        found = sorted(p for p in target.rglob("*") if p.suffix.lower() in known and p.is_file())
        paths = [p for p in found if inside(target.resolve(), p.relative_to(target))]
        names = [p.relative_to(target).as_posix() for p in paths]
        if len(paths) < len(found):
            print(f"{len(found) - len(paths)} links that lead out of {target} are not followed")
    elif target.is_file():
        paths, names = [target], [target.name]
        target = target.parent
    else:
        raise UserError(f"--predict needs a CSV, a folder or an image, but there is no {target}: "
                        f"correct the path.")
    if not paths:
        raise UserError(f"{target} holds no images: give a folder with pictures in it.")
    prompts = [side_prompt(path, target.resolve()) or args.prompt or "" for path in paths]
    return pd.DataFrame({"name": names, "prompt": prompts}), paths, prompts


def scoring_base(args, saved, target, names):
    """Return the folder that a CSV's names are relative to.

    --image_base_dir if given, else the first of the CSV's folder, its images/ and the training
    folder that has the first image.
    """
    if "image_base_dir" in args.explicit:
        return Path(args.image_base_dir)
    places = [target.parent, target.parent / "images", Path(saved.image_base_dir)]
    return next((place for place in places if os.path.isfile(place / names.iloc[0])), places[-1])


def side_prompt(path, base):
    """Return the text of the .txt file beside an image, "" if there is none inside base."""
    text = path.with_suffix(".txt")
    try:
        own = text.is_file() and text.resolve().is_relative_to(base)
        return text.read_text(encoding="utf-8-sig").strip() if own else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{text} must be UTF-8, but byte {error.start} is not: save it as "
                        f"UTF-8.") from error


def load_scorer(args):
    """Return (scorer, tokenizer, identity, saved arguments, label scales) of --checkpoint.

    scorer.before are the towers before training, which the base's cosine needs, with the frozen
    parameters shared.
    """
    content = WORLD.from_main(load_checkpoint, args.checkpoint)
    saved = argparse.Namespace(**content["args"])
    clip, tokenizer, identity = load_clip(saved, saved.seed)
    if identity["weights"] != content["identity"]["weights"]:
        raise UserError(f"{args.checkpoint} was trained from other weights than "
                        f"{saved.clip_model} ({saved.pretrained}) has now: restore them.")
    towers = {"image": image_tower(clip), "text": text_tower(clip)}
    freeze_towers(clip, towers, saved)
    scorer = CLIPScorer(clip, towers, identity["embed_dim"], identity["preprocess"], saved)
    if not saved.freeze_clip:
        shared = {id(p): p for p in clip.parameters() if not p.requires_grad}
        clip_before = copy.deepcopy(clip, shared)
        scorer.before = {"image": image_tower(clip_before), "text": text_tower(clip_before)}
        freeze_towers(clip_before, scorer.before, saved)
    load_trained_state(scorer, content["state"], args.checkpoint)
    if not saved.freeze_clip:
        scorer.clip_before = clip_before  # a module of it from now on, which to() and eval() reach
    return scorer.eval(), tokenizer, identity, saved, content["scales"]


@torch.inference_mode()
def score_images(scorer, tokenizer, identity, paths, prompts, args, device):
    """Score images with their prompts; returns ({"q", "c", "q_base", "c_base"} of (N,), errors).

    errors: {row: reason}; those rows, and the consistency of rows without a prompt, are NaN.
    """
    unique, index = unique_texts(prompts)
    texts = TextInputs(scorer, tokenize(tokenizer, unique, "prompts"), identity,
                       argparse.Namespace(**{**vars(args), "cache": "off"}), device)
    states = [scorer.towers]
    if scorer.before is not scorer.towers and any(prompt.strip() for prompt in prompts):
        states.append(scorer.before)
    with autocast(args, device):
        boundaries = map(texts.boundary, torch.arange(len(unique)).split(64))
        parts = [[towers["text"].suffix(*x) for towers in states] for x in boundaries]
    t = [torch.cat(state) for state in zip(*parts)]
    live = LiveImages(ImageBatches(paths, identity["preprocess"]), args, device)
    batches = np.array_split(np.arange(len(paths)), -(-len(paths) // args.batch_size))
    batches = batches[WORLD.part(len(batches))]
    keys, out, errors = PREDICTIONS[:4], [], {}
    for rows, (images, bad) in progress(zip(batches, live.stream(batches)), "score", len(batches)):
        with autocast(args, device):
            image = scorer.towers["image"].prefix(scorer.pixels(images.to(device)))
            f = [towers["image"].suffix(image) for towers in states]
        own = torch.from_numpy(index[rows]).to(device)
        scores = scorer.score(f[0], t[0][own], (f[-1] * t[-1][own]).sum(-1))
        out.append(torch.stack([scores[key] for key in keys]).float().cpu())
        errors.update(bad)
    scores = dict(zip(keys, torch.cat(WORLD.gather(out), dim=1).numpy()))
    errors = dict(WORLD.gather(list(errors.items())))
    without = np.array([not prompt.strip() for prompt in prompts])
    for key in keys:
        scores[key][list(errors)] = np.nan
        scores[key][without & (key[0] == "c")] = np.nan
    return scores, errors


def predict(args):
    """Score --predict's target with --checkpoint and write --predictions_csv; returns the status.

    0, or 1 where an image could not be read (the others are scored all the same).
    """
    out = sys.stderr if args.predictions_csv == "-" and WORLD.rank == 0 else sys.stdout
    with contextlib.redirect_stdout(out):
        scorer, tokenizer, identity, saved, scales = load_scorer(args)
        frame, paths, prompts = scoring_frame(args, saved)
        device = pick_device()
        for name in ("precision", "no_amp"):
            if name not in args.explicit:
                setattr(args, name, getattr(saved, name))
        resolve_precision(args, device)
        scores, errors = score_images(scorer.to(device), tokenizer, identity, paths, prompts, args,
                                      device)
        print_metrics(frame, scores, scales, saved)
        frame = rename_taken(frame)
        add_scores(frame, scores, errors, scales, args)
        print_scoring(frame)
    if WORLD.rank:
        return 0
    text = frame_csv(frame)
    if args.predictions_csv == "-":
        sys.stdout.write(text)
    else:
        with atomic_path(args.predictions_csv) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
        print(f"{len(frame)} rows written to {args.predictions_csv}")
    return 1 if errors else 0


def rename_taken(frame):
    """Rename the input's columns that are called as ours: none of it is ever overwritten."""
    names = list(frame.columns)
    for name in (*SCORE_COLUMNS, "keep"):
        other = f"{name}_input"
        while other in names:
            other += "_input"
        names = [other if old == name else old for old in names]
    return frame.set_axis(names, axis=1)


def frame_csv(frame):
    """Return a DataFrame as the text of a CSV, empty where a number is NaN."""
    return csv_text(frame.astype(object).where(frame.notna(), "").to_numpy(), frame.columns)


def add_scores(frame, scores, errors, scales, args):
    """Add the score columns for people (clamped, on the MOS scale), `error` and `keep`."""
    for name, key in zip(SCORE_COLUMNS, ("q", "c", "q_base", "c_base")):
        frame[name] = (np.clip(scores[key].astype(float), 0, 1) * scales[key[0]]).round(4)
    frame["error"] = [errors.get(i, "") for i in range(len(frame))]
    limits = {"quality": args.min_quality, "consistency": args.min_consistency}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    if limits:
        frame["keep"] = np.logical_and.reduce([frame[n] >= limit for n, limit in limits.items()])


def print_scoring(frame):
    """Print how many images could not be read, and how many pass."""
    failed = int((frame["error"] != "").sum())
    if failed:
        print(f"{failed} of {len(frame)} images could not be read: see the column error")
    if "keep" in frame:
        print(f"{int(frame['keep'].sum())} of {len(frame)} images pass")


def print_metrics(frame, scores, scales, saved):
    """Print the metrics of the targets whose human scores the input has."""
    for target, column in (("q", saved.quality_column), ("c", saved.consistency_column)):
        if column in frame:
            mos = pd.to_numeric(frame[column], errors="coerce").to_numpy() / scales[target]
            good = np.isfinite(mos) & np.isfinite(scores[target])
            if good.any():
                pred, mos = scores[target][good], mos[good]
                print(f"{TITLES[target]}: SROCC {srocc(pred, mos):.4f}, PLCC "
                      f"{plcc(pred, mos):.4f}, KROCC {krocc(pred, mos):.4f}, RMSE "
                      f"{rmse(pred, mos):.4f} on {len(mos)} images")


# --- main -----------------------------------------------------------------------------------


def set_up(args, table, seed):
    """Build everything that one training run needs and print what will happen.

    seed: of split, heads, order; the CLIP's random weights (if any) follow args.seed, so that
    repeats share one CLIP and its cache.
    """
    device = pick_device()
    resolve_precision(args, device)
    parts = split_rows(table, args, seed)
    clip, tokenizer, identity = load_clip(args, args.seed)
    if WORLD.size > 1 and device.type == "cuda":  # statistics of the whole batch
        clip = timm.layers.convert_sync_batchnorm(clip)
    towers = {"image": image_tower(clip), "text": text_tower(clip)}
    freeze_towers(clip, towers, args)
    torch.manual_seed(seed)
    scorer = CLIPScorer(clip, towers, identity["embed_dim"], identity["preprocess"], args)
    scorer.to(device)
    print_setup(args, table, parts, towers, device, scorer)
    identity_key = {**identity, "precision": args.precision, "device": device.type}
    scorer.eval()
    teacher = None
    if args.use_explanations:
        teacher = text_embeddings(scorer, tokenizer, table.explanations, "explanations",
                                  identity_key, args, device)
    antonyms = text_embeddings(scorer, tokenizer, ["Good photo.", "Bad photo."], "antonyms",
                               identity_key, args, device)
    images = ImageInputs(scorer, table, identity_key, args, device)
    texts = TextInputs(scorer, tokenize(tokenizer, table.prompts, "prompts"), identity_key, args,
                       device)
    f, t = frozen_embeddings(images, texts, table, identity_key, args)
    floors = fit_floors(f, t, antonyms.cpu(), table, parts["train"], args)
    if not args.no_base_calibration:
        calibrate(scorer, floors, table.consistency, parts["train"])
    model = distributed(scorer, table, images, texts, args)
    for tower in towers.values():
        tower.checkpointing = args.grad_checkpointing
        if args.compile:
            tower.compile()
    targets = {target: torch.from_numpy(mos).to(device)
               for target, mos in human(table, np.arange(len(table.paths))).items()}
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    state = {"epoch": 0, "best_score": -math.inf, "best_epoch": 0, "waited": 0, "log": []}
    return Run(args, seed, device, table, parts, identity, scorer, model, images, texts, targets,
               (f * t).sum(-1).to(device), teacher, floors, make_optimizer(scorer, args, device),
               scaler, state)


def print_setup(args, table, parts, towers, device, scorer):
    """Print what the run is about to do."""
    counts = ", ".join(f"{len(rows)} {part}" for part, rows in parts.items() if len(rows))
    print(f"data: {len(table.paths)} images, {len(table.prompts)} prompts, split by "
          f"{args.split_by}: {counts}; label scales Q {table.scales['q']:g}, "
          f"C {table.scales['c']:g}")
    if args.split_by == "image":
        print("WARNING: --split_by image leaks: the same prompts are in training and validation; "
              "compare with the prompt-mean floor, which sees no pixels")
    for name, tower in towers.items():
        print(describe_tower(name, tower))
    heads = sum(p.numel() for n, p in scorer.named_parameters() if not n.startswith("clip."))
    print(f"heads: {heads / 1e6:.2f} M parameters; device {device}, {args.precision}, lr "
          f"{args.lr:g} (heads {head_lr(args):g})")
    if WORLD.size > 1:
        print(f"{WORLD.size} processes, {WORLD.size * args.batch_size} images per step")
    print_advice(args, settings_advice(args, len(parts["train"]), towers["image"].depth))
    if (args.use_two_branch or args.use_refinement) and not args.no_residual_learning:
        print("WARNING: --use_two_branch and --use_refinement together with residual learning are "
              "not recommended by the reference card; they work")


@torch.no_grad()
def frozen_embeddings(images, texts, table, identity, args):
    """Return (N, D) image and prompt embeddings of every row by the pretrained towers, on the CPU.

    Cached on disk where the images' own features are not the embeddings already.
    """
    images.scorer.eval()
    views, first = node_share(len(table.paths), 64)

    def chunks():
        for x in progress(images.stream(views), "embeddings", len(views)):
            with autocast(args, images.device):
                yield images.tower.suffix(x).float().cpu()

    key = content_key(kind="embedding", identity=identity, files=file_stamps(table))
    cached = None
    if images.tower.frozen != "all" and args.cache != "off":
        cached = cached_array(args, "embedding", key, len(table.paths), chunks, first)
    f = (torch.from_numpy(np.array(cached)) if cached is not None
         else torch.cat(WORLD.gather(list(chunks()), WORLD.node)))
    t = []
    for rows in np.array_split(np.arange(len(table.prompts)), -(-len(table.prompts) // 64)):
        x, end, _ = texts.fetch(rows)
        with autocast(args, images.device):
            t.append(texts.tower.suffix(x, end).float().cpu())
    t = torch.cat(t)[table.prompt_id]
    if not (torch.isfinite(f).all() and torch.isfinite(t).all()):
        raise UserError(f"The embeddings of {args.clip_model} must be finite, but are not in "
                        f"{args.precision}: use --precision fp32, or other weights.")
    return f, t


def train_one_run(args, table, seed, checkpoint=None):
    """Train one split, from a checkpoint if given; returns the summary (see finish)."""
    began = time.perf_counter()
    run = set_up(args, table, seed)
    write_config(run)
    if args.skip_bad_images:
        write_table(Path(args.output_dir, "skipped.csv"), table.skipped, ("name", "row", "reason"))
    if checkpoint is not None:
        resume(run, WORLD.from_main(load_checkpoint, checkpoint), checkpoint)
    STOP.waits = True
    try:
        fit(run)
    finally:
        STOP.waits = False
    return conclude(run, time.perf_counter() - began)


@main_only
def move_in(args):
    """Prepare an output_dir that is not the checkpoint's own: archive it, copy the best epoch."""
    source, target = Path(args.resume_from).parent, Path(args.output_dir)
    if source.resolve() == target.resolve():
        return
    archive_old_run(args)
    best = source / "baseline_best.pt"
    with atomic_path(target / "baseline_best.pt") as temporary:
        shutil.copyfile(best if best.exists() else args.resume_from, temporary)


def train(args):
    """Train as the arguments say; returns the summary that is also printed as JSON."""
    if args.resume_from:
        content = WORLD.from_main(checkpoint_settings, args.resume_from)
        adopt_checkpoint_args(args, content, args.resume_from)
    table = load_table(args)
    if WORLD.size > 1 and len(set(WORLD.gather([repeat_fingerprint(args, table)]))) > 1:
        raise UserError("All processes must see the same data with the same flags, but they do "
                        "not: copy the CSV to every machine and give the same command on each.")
    if args.repeats > 1:
        return train_repeats(args, table)
    if args.resume_from:
        move_in(args)
        summary = train_one_run(args, table, content["seed"], args.resume_from)
    else:
        archive_old_run(args)
        summary = train_one_run(args, table, args.seed)
    append_run(args, summary)
    return summary


def checkpoint_settings(path):
    """Return a checkpoint's settings, without its tensors."""
    content = load_checkpoint(path)
    return {key: content[key] for key in ("args", "seed")} | {
        "processes": content.get("processes", 1)}


def main(argv=None):
    """Run the command line; returns the summary.

    Errors of the user end with status 2; SIGINT and SIGTERM with 130 and 143, after saving.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    STOP.install()
    try:
        WORLD.join()
        with WORLD.first(WORLD.rank == 0), WORLD.said_once():
            args = parse_args(argv)
        status, summary = (predict(args), None) if args.predict else (0, train(args))
        WORLD.leave()
        if status:
            raise SystemExit(status)
    except UserError as error:
        WORLD.let_main_speak()
        sys.stdout.flush()
        print(f"baseline.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except RuntimeError as error:
        if WORLD.size == 1 or "by peer" not in str(error):
            raise
        WORLD.let_main_speak()
        print("baseline.py: error: another process of this run has ended", file=sys.stderr)
        raise SystemExit(1) from error
    except Interrupted as stopped:
        number, folder = stopped.args
        again = (f"--resume_from {shlex.quote(str(Path(folder, 'baseline_last.pt')))}"
                 if args.repeats == 1 else changed_flags(args))
        print(f"stopped; go on with: python baseline.py {again}")
        WORLD.leave()
        raise SystemExit(128 + number) from stopped
    except KeyboardInterrupt as stopped:
        raise SystemExit(128 + (STOP.signal or signal.SIGINT)) from stopped
    finally:
        for number, handler in handlers.items():
            if threading.current_thread() is threading.main_thread():
                signal.signal(number, handler)
    if summary is not None:
        print(json.dumps(finite_json(summary)))
    return summary


if __name__ == "__main__":
    main()
