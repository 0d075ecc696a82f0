"""Fine-tune a CLIP to score AI-generated images: quality, and consistency with the prompt.

    python baseline.py --demo                                   see it work, no download
    python baseline.py --partial_freeze --freeze_layers 18      train on data/data.csv
    python baseline.py --preset A                               heads only, minutes
    python baseline.py --repeats 5 --test_ratio 0.2 --preset A  numbers with a spread
    python baseline.py --resume_from outputs/baseline_last.pt   go on after a kill

CLIP's own score is kept as the base, and a small bounded residual is learned on top:

    q = q_base + scale_q * tanh(delta_q)        q_base = sigmoid(w . f + b)
    c = c_base + scale_c * tanh(delta_c)        c_base = a * (cos(f, t) + 1) / 2 + b'

Axis letters: B batch, N rows of the CSV, U unique texts, D embedding, T tokens, W tower width,
H x W pixels where it is plain.
"""

import argparse
import contextlib
import csv
import difflib
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pandas as pd
import scipy.stats
import torch
import torch.nn.functional as F
from open_clip import transform as clip_transform
from PIL import Image, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# --- constants ------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
FORMAT, FORMAT_VERSION = "baseline-aigiqa", 1
MOS_SCALES = (1.0, 5.0, 10.0, 100.0)
METRICS = ("srocc", "plcc", "krocc", "rmse")
TARGETS = ("q", "c")
METRIC_NAMES = tuple(f"{metric}_{target}" for metric in METRICS for target in TARGETS)

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
            epochs=8, lr=3e-4, num_workers=0)


class UserError(Exception):
    """Tell the user the rule, the value that broke it and the remedy; exits with status 2."""


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
        if message.startswith("unrecognized arguments:"):
            known = [flag for action in self._actions for flag in action.option_strings]
            for word in message.split(":", 1)[1].split():
                near = difflib.get_close_matches(word.split("=")[0], known, n=1)
                message += f" (did you mean {near[0]}?)" if near else ""
        super().error(message)


def number(low, high=math.inf, kind=float, open_low=False):
    """Return an argparse type that accepts a finite number in [low, high] ((low, .. if open_low)."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or (open_low and value == low) or not math.isfinite(value):
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
    g.add_argument("--batch_size", type=positive_int, default=32, help="images per step")
    g.add_argument("--grad_accum_steps", type=positive_int, default=1,
                   help="steps per optimiser update")
    g.add_argument("--lr", type=positive, default=3e-5,
                   help="peak learning rate of CLIP (of the heads where CLIP is frozen)")
    g.add_argument("--head_lr", type=positive,
                   help="peak learning rate of the heads; not given: lr where CLIP is frozen, "
                        "otherwise 10 * lr and at least 1e-3")
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
    g.add_argument("--num_workers", type=whole, default=4, help="processes that decode images")
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
    g.add_argument("--log_csv", default="training_log.csv", help="log, inside output_dir")
    g.add_argument("--resume_from", help="baseline_last.pt or baseline_best.pt to go on from")
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
    if args.no_amp:
        args.precision = "fp32"
    args.cache_dir = args.cache_dir or str(Path(args.output_dir) / "cache")
    return args
