"""Every diagnosis fires on what it names, alone, and its next command is the advised run."""

import random
import re
import shlex

import pandas as pd
import pytest

import baseline

DEPTH = 24
FALLING = [0.05 * 0.9 ** i for i in range(12)]
FREEZING = {"frozen": ["--freeze_clip"], "partial": ["--partial_freeze", "--freeze_layers", "18"],
            "full": []}
LOW = {"q": 0.70, "c": 0.65, "gap_q": 0.0, "gap_c": 0.0}
DIAGNOSES = {  # how a run shows it, and which way its remedies go
    "overfitting": ({"q": 0.80, "c": 0.75, "gap_q": 0.12, "gap_c": 0.15}, "+dropout "
                    "-residual_scale_q -residual_scale_c -lr +frozen -epochs"),
    "underfitting": ({**LOW, "best_epoch": 12}, "-dropout +lr +residual_scale_q "
                     "+residual_scale_c -frozen"),
    "unstable loss": ({"losses": [*FALLING[:5], 0.09, *FALLING[6:]]},
                      "-lr +warmup_ratio -max_grad_norm -batch_size"),
    "low SROCC_C only": ({"c": 0.70}, "+w_c -w_q +residual_scale_c"),
    "low SROCC_Q only": ({"q": 0.70}, "+w_q -w_c +residual_scale_q"),
    "quality residual saturated": ({"saturated_q": 0.2}, "+residual_scale_q"),
    "consistency residual saturated": ({"saturated_c": 0.2}, "+residual_scale_c"),
    "quality residual unused": ({"largest_delta_q": 0.01}, "+head_lr"),
    "consistency residual unused": ({"largest_delta_c": 0.01}, "+head_lr")}
CASES = {what: shown for what, (shown, _) in DIAGNOSES.items()}


def found(argv=(), losses=FALLING, log=None, depth=DEPTH, **row):
    """Return what training_advice finds in a run that is healthy unless changed."""
    last = {"train_srocc_q": 0.90, "train_srocc_c": 0.88, "val_srocc_q": 0.89,
            "val_srocc_c": 0.87, **(log or {})}
    rows = [{"epoch": i, "train_loss": loss, **last} for i, loss in enumerate(losses, 1)]
    row = {"best_epoch": 10, "q": 0.89, "c": 0.87, "gap_q": 0.01, "gap_c": 0.01} | row
    for t, tiers in baseline.TIERS.items():
        row[f"val_srocc_{t}"] = row.pop(t)
        row[f"tier_{t}"] = next((name for name, low, high in tiers if row[f"val_srocc_{t}"] > low
                                 and row[f"gap_{t}"] < high), "needs work")
    args = baseline.parse_args(argv)
    if not args.no_residual_learning:
        row = dict.fromkeys(("saturated_q", "saturated_c"), 0.0) | dict.fromkeys(
            ("largest_delta_q", "largest_delta_c"), 0.6) | row
    return baseline.training_advice(args, rows, row | {"blocks": depth})


def names(advice):
    """Return the diagnoses."""
    return [what for what, _, _ in advice]


# --- the diagnoses --------------------------------------------------------------------------


@pytest.mark.parametrize("freezing", FREEZING)
@pytest.mark.parametrize("what", [None, *CASES])
def test_a_diagnosis_fires_alone(what, freezing):
    """A log that shows one trouble gets that diagnosis and no other; a healthy one gets none."""
    advice = found(FREEZING[freezing], **CASES.get(what, {}))
    assert names(advice) == ([what] if what else [])
    assert all(re.search(r"\d", evidence) and flags for _, evidence, flags in advice)


APART = {"train_srocc_q": 0.99, "val_srocc_q": 0.85}


@pytest.mark.parametrize("run, want, said", [
    ({"best_epoch": 4}, [], ""), ({"losses": [0.05]}, [], ""),
    ({"gap_q": 0.049, "q": 0.92}, [], ""), ({"gap_c": 0.049, "c": 0.90}, [], ""),
    ({"gap_q": 0.051, "q": 0.92}, ["overfitting"], "+0.051"),  # the gap is no low score
    ({"gap_c": 0.3, "c": 0.90}, ["overfitting"], "+0.300"),
    ({"best_epoch": 3, "log": APART}, ["overfitting"], "best epoch 3 of 12"),
    ({"best_epoch": 7, "log": APART}, [], ""),
    ({"best_epoch": 3, "log": {**APART, "train_srocc_q": 0.94}}, [], ""),
    ({**LOW, "best_epoch": 9}, [], ""), ({**LOW, "best_epoch": 12, "gap_q": 0.03}, [], ""),
    ({**LOW, "best_epoch": 12, "q": 0.88}, ["low SROCC_C only"], "0.650 (needs work)"),
    ({"losses": [0.1, 0.05, 0.0595, 0.05]}, [], ""),
    ({"losses": [0.1, 0.05, 0.065, 0.09, 0.05]}, ["unstable loss"], "1.4-fold in epoch 4"),
    ({"saturated_c": 0.04}, [], ""),
    ({"saturated_c": 0.06}, ["consistency residual saturated"], "6% of |delta|"),
    ({"best_epoch": 0, "largest_delta_q": 0.0, "largest_delta_c": 0.0}, [], ""),  # never trained
    ({"saturated_q": 0.5, **CASES["overfitting"], **CASES["unstable loss"]},
     ["overfitting", "unstable loss", "quality residual saturated"], "")])
def test_edges_of_the_diagnoses(run, want, said):
    """Each begins where the card says, names its numbers and hides no other."""
    advice = found(**run)
    assert names(advice) == want and all(said in evidence for _, evidence, _ in advice)


# --- settings -------------------------------------------------------------------------------


def settings(words, said, images=2000, depth=DEPTH):
    """Return [(what, flags)] of settings_advice, which follow from `said` and settle it."""
    advice = baseline.settings_advice(baseline.parse_args(words.split()), images, depth)
    again = baseline.parse_args(" ".join([words, *(flags for *_, flags in advice)]).split())
    assert baseline.settings_advice(again, images, depth) == []
    assert all(said in evidence for _, evidence, _ in advice)
    return [(what, flags) for what, _, flags in advice]


@pytest.mark.parametrize("mode, low, high", [("frozen", 1e-3, 5e-3), ("partial", 3e-5, 1e-4),
                                             ("full", 1e-5, 3e-5)])
def test_learning_rate_outside_the_range_of_its_freezing(mode, low, high):
    """The usual range depends on what is frozen; the advice is its nearest edge."""
    for lr, edge in ((low, 0), ((low * high) ** 0.5, 0), (high, 0), (low / 2, low),
                     (low * 0.9, low), (high * 1.1, high), (high * 10, high)):
        advice = settings(" ".join([*FREEZING[mode], f"--lr {lr}"]), f"{lr:g}, but a {mode} CLIP")
        assert advice == [("learning rate outside the usual range", f"--lr {edge:g}")] * (edge > 0)


@pytest.mark.parametrize("images, good, bad, want", [
    (100, 0.1, 0.3, 0.1), (499, 0.05, 0.04, 0.1), (500, 0.2, 0.05, 0.2), (2999, 0.4, 0.45, 0.2),
    (3000, 0.6, 0.1, 0.3), (9999, 0.3, 0.7, 0.3), (50_000, 0.5, 0.1, 0.4)])
def test_residual_scale_by_number_of_images(images, good, bad, want):
    """A scale far from what so many images usually want is named with what they want."""
    for q, c in ((good, good), (bad, bad), (good, bad), (bad, good)):
        words = f"--residual_scale_q {q} --residual_scale_c {c}"
        assert settings(words, f"{images} training images", images) == [
            ("residual scale unusual for this many images",
             f"--residual_scale_q {want} --residual_scale_c {want}")] * (bad in (q, c))
        assert settings(words + " --no_residual_learning", "", images) == []


@pytest.mark.parametrize("words, said, want", [
    ("--scheduler step", "90% of the learning rates' sum is in the first 1 of 20", 7),
    ("--scheduler step --step_lr_gamma 0.5 --step_lr_step_size 2 --epochs 50", "50%", 17),
    ("--scheduler step --step_lr_step_size 7", "", 0), ("--scheduler step --epochs 2", "", 0),
    ("--scheduler cosine", "", 0)])
def test_steps_that_end_the_learning_early(words, said, want):
    """A rate that falls below a hundredth of its peak has learned nearly all before it decays."""
    advice = settings(f"{words} --lr 3e-5", said)
    assert advice == [("steps that end the learning early",
                       f"--step_lr_step_size {want}")] * (want > 0)


@pytest.mark.parametrize("depth, low, high", [(24, 12, 22), (12, 6, 11), (5, 1, 9), (0, 1, 9)])
def test_freeze_layers_unusual(depth, low, high):
    """Few or all blocks frozen is unusual, except of a trunk's few stages and without freezing."""
    for layers in range(1, max(depth, 9) + 1):
        words, said = f"--freeze_layers {layers}", f"{layers} of {depth} blocks"
        assert settings(f"--partial_freeze {words}", said, depth=depth) == [
            ("freeze_layers unusual for this tower", f"--freeze_layers {depth * 3 // 4}")
        ] * (not low <= layers <= high)
        assert settings(words, said, depth=depth) == []


# --- the next command -----------------------------------------------------------------------

RUNS = {**{f"preset {name}": ["--preset", name] for name in baseline.PRESETS}, **FREEZING,
        "shallow": ["--partial_freeze", "--freeze_layers", "1"], "demo": ["--demo"],
        "demo not frozen": ["--demo", "--partial_freeze"],
        "preset not frozen": ["--preset", "A", "--partial_freeze", "--freeze_layers", "3"],
        "direct": ["--no_residual_learning", "--use_two_branch"],
        "refined": ["--use_refinement", "--no_residual_learning"],
        "odd words": ["--data_csv_path", "my data/a 'b' $c.csv", "--lr", "1.26e-06", "--no_amp",
                      "--output_dir", "out & <x>", "--repeats", "3", "--test_ratio", "0.15"]}
@pytest.mark.parametrize("run", RUNS)
def test_the_program_takes_its_own_advice(run, capsys):
    """The user's words and the flags are accepted, fit the tower, and change what they name."""
    argv, args = RUNS[run], baseline.parse_args(RUNS[run])
    least = args.freeze_layers * args.partial_freeze  # blocks of a tower
    rows = [(depth, *row) for depth in {max(0, least), max(1, least), max(12, least), 24}
            for row in [*baseline.settings_advice(args, 10, depth), *(
                row for case in CASES.values() for row in found(argv, depth=depth, **case))]]
    assert len(rows) >= 10 and shlex.split(args.command) == argv
    for depth, what, _, flags in rows:
        before, after = vars(args), vars(baseline.parse_args([*argv, *flags.split()]))
        named = {word[2:] for word in flags.split() if word.startswith("--")}
        assert {k for k in after if after[k] != before[k]} <= named | {"command", "explicit"}
        assert not after["partial_freeze"] or 1 <= after["freeze_layers"] <= depth
        if what in ("overfitting", "underfitting") and args.no_residual_learning:
            assert not any("residual" in name for name in named)
    assert "WARNING" not in capsys.readouterr().err


def drawn(seed):
    """Return the words of a run of any settings."""
    rng = random.Random(seed)
    values = {"lr": 10 ** rng.uniform(-7, -1), "dropout": rng.choice([0, 0.1, 0.5]),
              "weight_decay": rng.choice([0, 1e-6, 1e-4, 0.1]), "epochs": rng.randint(1, 50),
              "batch_size": rng.choice([4, 16, 64]), "warmup_ratio": rng.choice([0, 0.05, 0.3]),
              "max_grad_norm": rng.choice([0, 0.1, 1]), "w_q": rng.random(), "w_c": rng.random(),
              "residual_scale_q": rng.uniform(0.01, 1), "residual_scale_c": rng.uniform(0.01, 1)}
    values |= {"freeze_layers": rng.randint(1, DEPTH)} if seed % 3 == 0 else {}
    return [*(["--partial_freeze"], ["--freeze_clip"], [])[seed % 3],
            *(str(word) for name, value in values.items() for word in (f"--{name}", value))]


def sizes(argv):
    """Return the flags of a command, what is frozen, what clips and what the heads have."""
    args = baseline.parse_args(argv)
    return vars(args) | {"frozen": args.freeze_layers * args.partial_freeze,
                         "max_grad_norm": args.max_grad_norm or float("inf"),
                         "head_lr": args.head_lr or 0}


@pytest.mark.parametrize("what", DIAGNOSES)
def test_no_remedy_goes_the_wrong_way(what):
    """Whatever a run had, what a remedy raises is not lowered, and the other way round."""
    moved, named, towards = set(), set(), DIAGNOSES[what][1].split()
    for argv in map(drawn, range(60)):
        flags = found(argv, **CASES[what])[0][2].split()
        before, after = sizes(argv), sizes([*argv, *flags])
        named |= {word[2:] for word in flags if word.startswith("--")}
        for sign, name in ((word[0], word[1:]) for word in towards):
            low, high = (before[name], after[name])[::1 if sign == "+" else -1]
            assert high >= low * (1 - 1e-5), (name, argv, flags)
            moved |= {name} if high > low else set()
    assert moved == {word[1:] for word in towards}
    assert named - {"partial_freeze", "freeze_layers"} == moved - {"frozen"}


def test_a_run_ends_with_its_own_advice(train, capsys):
    """What a run prints follows from its log and row; resumed, it still names the first command."""
    own = ["--freeze_clip", "--lr", "3e-2", "--epochs", "6", "--dropout", "0",
           "--residual_scale_q", "0.02"]
    run = train(*own)
    args = baseline.parse_args(shlex.split(run.row["command"]))
    log = pd.read_csv(run.folder / "training_log.csv").to_dict("records")
    want = [*baseline.settings_advice(args, 28, 4),
            *baseline.training_advice(args, log, run.row)]
    lines = [line for what, why, flags in want for line in (
        f"{what}: {why}; try", f"  python baseline.py {run.row['command']} {flags}")]
    baseline.main(["--resume_from", str(run.folder / "baseline_last.pt")])
    said = capsys.readouterr().out.splitlines()
    assert len(want) > 2 and names(want) == run.row["advice"]
    assert [line for line in said if line in lines] == lines * 2
    assert len([line for line in said if line.endswith("; try")]) == len(lines)
