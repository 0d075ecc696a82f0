"""A run that is stopped or killed, at any moment, goes on to the same weights, bit for bit."""

import os
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import SOON, load, read_csv, read_json, same_tensors

import baseline

PROGRAM = str(Path(baseline.__file__).resolve())
PARTIAL = ["--partial_freeze", "--freeze_layers", 2]
BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


def to_go_on(out):
    """Return the arguments of the one command that a stopped program says to go on with."""
    assert out.count("stopped; go on with: ") == 1
    words = shlex.split(out.split("go on with: ")[1].splitlines()[0])
    assert words[:2] == ["python", "baseline.py"]
    return words[2:]


def without(row, *names):
    """Return a dictionary without seconds, time, places, and some other keys."""
    names += ("seconds", "time", "output_dir", "checkpoint", "command")
    return {key: value for key, value in row.items() if key not in names}


def assert_same_run(a, b, argv):
    """Compare two output folders bit for bit; argv: what was typed for the second at first."""
    for name in ("baseline_last.pt", "baseline_best.pt"):
        one, two = load(a, name), load(b, name)
        assert same_tensors(one["state"], two["state"]) and one["scaler"] == two["scaler"], name
        states = one["optimizer"].pop("state"), two["optimizer"].pop("state")
        assert one["optimizer"] == two["optimizer"] and set(states[0]) == set(states[1])
        assert all(same_tensors(states[0][key], states[1][key]) for key in states[0]), name
        logs = [[str(without(row)) for row in c["progress"].pop("log")] for c in (one, two)]
        assert logs[0] == logs[1] and one["progress"] == two["progress"], name
    logs = [[without(row) for row in read_csv(folder / "training_log.csv")] for folder in (a, b)]
    assert logs[0] == logs[1] and logs[0]
    one, two = (read_json(folder / "result.json") for folder in (a, b))
    assert without(one) == without(two) and two["command"] == shlex.join(map(str, argv))
    assert (a / "val_predictions.csv").read_bytes() == (b / "val_predictions.csv").read_bytes()
    assert len(read_csv(b / "runs.csv")) == 1
    assert not list(b.glob(".*"))  # nothing half-written


# --- stopped by a signal --------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_stops_and_says_how_to_go_on(start, flags, tmp_path, number, group):
    """Training ends with the signal's status and whole checkpoints, also while threads decode."""
    decoding = ["--cache", "off", "--num_workers", 2] if group else []
    program, folder = start(flags("--epochs", 100_000, *PARTIAL, *decoding)), tmp_path / "out"
    assert program.stop_at("epoch   3 ", number, group) == 128 + number, program.said
    assert "Traceback" not in program.said[1]
    assert to_go_on(program.said[0]) == ["--resume_from", str(folder / "baseline_last.pt")]
    last = load(folder)["progress"]["epoch"]
    assert last >= 2 and load(folder, "baseline_best.pt")["progress"]["epoch"] <= last
    assert len(read_csv(folder / "training_log.csv")) in (last, last - 1)
    assert not [p for p in folder.rglob("*") if p.name.startswith(".") or p.name == "result.json"]


@BOTH
@pytest.mark.parametrize("where", [("load_table",), ("load_clip",), ("evaluate", 1), ("update", 1),
                                   ("evaluate", 3), ("load_image", 5)], ids=str)
def test_one_signal_stops_what_hangs(start, flags, data, train, tmp_path, where, number):
    """At once, wherever it is; what has begun to train says how to go on, and that works."""
    argv, trains = flags(*PARTIAL), where[0] in ("evaluate", "update")
    if where[0] == "load_image":
        best = train("--freeze_clip", "--epochs", 1, out="best").folder / "baseline_best.pt"
        argv = ["--predict", data.images, "--checkpoint", best, "--num_workers", 0]
    program = start(argv, "hang", *where)
    assert program.stop_at("here", number) == 128 + number and "Traceback" not in program.said[1]
    assert not (tmp_path / "out" / "result.json").exists()
    assert ("go on with" in program.said[0]) == trains
    if trains:
        assert start(to_go_on(program.said[0])).finish() == 0
        assert read_json(tmp_path / "out" / "result.json")["epochs_run"] == 2


@BOTH
def test_a_signal_while_the_libraries_are_loaded(flags, number):
    """A program that has hardly begun ends as well, without a traceback."""
    with subprocess.Popen([sys.executable, "-X", "importtime", PROGRAM, *flags()], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not process.stderr.readline().split()[-1].startswith("torch."):
            pass
        process.send_signal(number)
        out, errors = process.communicate(timeout=SOON)
    assert process.returncode in (-number, 128 + number)
    assert out == "" and "Traceback" not in errors


def stopped(argv, number, call, capsys):
    """Run a command in this process until a signal comes in an update; return how to go on."""
    real, calls = baseline.update, []

    def update(*args):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        real(*args)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(baseline, "update", update)
        baseline.main(argv)
    assert stop.value.code == 128 + number
    return to_go_on(capsys.readouterr().out)


@pytest.mark.parametrize("updates, more", [
    ((3, 5), []), ((1, 1), ["--grad_accum_steps", 2, "--use_explanations"])])
def test_stopped_twice_equals_uninterrupted(capsys, flags, train, tmp_path, updates, more):
    """Stopped by SIGTERM and by SIGINT, the commands that are said, quoted, end as one run.

    The signal handlers of the process that calls main() are left as they were.
    """
    command = [*PARTIAL, *more, "--lr", 1e-3, "--epochs", 4, "--dropout", 0.3]
    argv = first = flags(*command, out="a $HOME 'b'")
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    for number, update in zip((signal.SIGTERM, signal.SIGINT), updates):
        argv = stopped(argv, number, update, capsys)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    baseline.main(argv)
    assert_same_run(train(*command, out="whole").folder, tmp_path / "a $HOME 'b'", first)


def test_repeats_go_on_by_the_same_command(start, flags, capsys, tmp_path):
    """Killed after the first result and stopped in the second run, all ends as if it never was."""
    command = ["--freeze_clip", "--lr", 1e-3, "--repeats", 2]
    argv = flags(*command)
    killed = start(argv, "strike", signal.SIGKILL, "after rename", 1, "result.json")
    assert killed.finish() == -signal.SIGKILL
    assert stopped(argv, signal.SIGTERM, 6, capsys) == argv
    assert (tmp_path / "out" / "repeat_43" / "baseline_last.pt").exists()
    one, two = baseline.main(argv), baseline.main(flags(*command, out="whole"))
    assert [*map(without, one["repeats"])] == [*map(without, two["repeats"])]
    assert without(one, "repeats") == without(two, "repeats") and len(one["repeats"]) == 2
    assert [row["seed"] for row in read_csv(tmp_path / "out" / "runs.csv")] == ["42", "43"]


# --- killed ---------------------------------------------------------------------------------

BEST, LAST, LOG = "baseline_best.pt", "baseline_last.pt", "training_log.csv"
EARLY = [("before rename", 1, ".npy"), ("after rename", 2, ".npy"), ("update",),
         ("half checkpoint",), ("before rename", 1, BEST), ("after rename", 1, BEST)]
INSIDE = [("update", ""), ("evaluation", ""), ("half checkpoint", ""), ("half written", LOG),
          ("before rename", LAST), ("before rename", LOG), ("after rename", LAST)]
LATE = [("half written", 1, "val_predictions.csv"), ("half written", 1, "result.json"),
        ("before rename", 1, "result.json"), ("after rename", 1, "result.json")]
PATIENT = ["--early_stopping_patience", 9, "--early_stopping_min_delta", 2]  # ends in epoch 9
KILLED = {"frozen, patient": ["--freeze_clip", "--scheduler", "step", *PATIENT],
          "partial": [*PARTIAL, "--scheduler", "linear", "--grad_accum_steps", 2],
          "full": ["--grad_accum_steps", 2, "--augment", "crop"]}


def moments(number):
    """Return what a run of many goes through: functions of starter.py, signals, arguments.

    Killed three times early, four times while it trains, twice late; stopped twice in between.
    """
    rng, kill = random.Random(number), signal.SIGKILL
    found = [("strike", how, place, rng.randint(1, 2), name) for how, (place, name) in zip(
        (kill, kill, kill, signal.SIGTERM, signal.SIGINT), rng.sample(INSIDE, 5))]
    found.append(("strike_later", kill, rng.uniform(0, 0.1)))
    rng.shuffle(found)
    early, late = EARLY[number % 3::3], rng.sample(LATE, 2)
    return [("strike_cache", kill, 2), *(("strike", kill, *where) for where in early), *found,
            *(("strike", kill, *where) for where in late)]


@pytest.mark.parametrize("case", KILLED)
def test_killed_at_random_moments_equals_uninterrupted(start, flags, tmp_path, case):
    """Kill after kill it ends as the uninterrupted run; at most one epoch is trained again."""
    command = [*KILLED[case], "--no_base_calibration", "--lr", 1e-3, "--dropout", 0.2,
               "--batch_size", 4, "--epochs", 12]
    whole, argv = start(flags(*command, out="whole")), flags(*command)
    last, done = tmp_path / "out" / LAST, 0
    for moment in moments(list(KILLED).index(case)):
        program = start(["--resume_from", last] if last.exists() else argv, *moment)
        expected = -signal.SIGKILL if moment[1] == signal.SIGKILL else 128 + moment[1]
        assert program.finish() == expected, (moment, program.said)
        trained = [*map(int, re.findall("^epoch +([0-9]+)  loss", program.said[0], re.MULTILINE))]
        assert trained == list(range(done + 1, done + 1 + len(trained))), moment
        done = load(last.parent)["progress"]["epoch"] if last.exists() else 0
        assert done >= max(trained, default=0) - 1, moment
    assert done == (9 if "patient" in case else 12)
    assert start(["--resume_from", last]).finish() == whole.finish() == 0
    assert_same_run(tmp_path / "whole", tmp_path / "out", argv)


def test_killed_between_the_best_and_the_last(start, flags, tmp_path):
    """With a new best and not yet a new last one, the epoch is repeated, and is best again."""
    command = [*PARTIAL, "--no_base_calibration", "--lr", 1e-3, "--epochs", 4]
    assert start(flags(*command, out="whole")).finish() == 0
    last, argv = tmp_path / "out" / LAST, flags(*command)
    for where in (("after rename", 2, BEST), ("before rename", 1, LAST)):
        assert start(argv, "strike", signal.SIGKILL, *where).finish() == -signal.SIGKILL
        best, epoch = (load(last.parent, name)["progress"]["epoch"] for name in (BEST, LAST))
        assert best == epoch + 1
        argv = ["--resume_from", last]
    assert start(argv).finish() == 0
    assert_same_run(tmp_path / "whole", tmp_path / "out", flags(*command))


# --- before anything is computed ------------------------------------------------------------


@pytest.mark.parametrize("word, near", [
    ("--epoch", "--epochs"), ("--bach_size=3", "--batch_size"), ("--Lr", "--lr"),
    ("--freeze-clip", "--freeze_clip"), ("--explanations", "--use_explanations")])
def test_an_unknown_flag_suggests_the_nearest(refused, word, near):
    """A mistyped flag is refused with the flag that was meant; what is like none, without."""
    said = refused(word, "--zzzzzz")
    assert word in said and f"did you mean {near}?" in said
    assert "--zzzzzz" in said and said.count("did you mean") == 1


@pytest.mark.parametrize("words, status, where, text", [
    (["--help"], 0, 0, "--freeze_layers"), (["--epoch", "3"], 2, 1, "did you mean --epochs?")])
def test_help_and_a_wrong_flag_answer_at_once(words, status, where, text):
    """In less than half a second, because no library is loaded for it."""
    options, times = {"capture_output": True, "text": True}, []
    while len(times) < 3 or (min(times) >= 0.5 and len(times) < 20):
        began = time.monotonic()
        done = subprocess.run([sys.executable, PROGRAM, *words], **options)
        times.append(time.monotonic() - began)
        said = [done.stdout, done.stderr]
        assert done.returncode == status and text in said[where] and said[1 - where] == ""
    assert min(times) < 0.5 and "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, "-X", "importtime", PROGRAM, *words], **options)
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in loaded and not loaded & {"torch", "pandas", "numpy", "open_clip", "PIL"}


def test_importing_runs_nothing(monkeypatch, tmp_path, capsys):
    """Executed as a module it reads no command line, writes nothing and leaves signals alone."""
    def state():
        return ([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], dict(os.environ),
                threading.active_count(), torch.initial_seed())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["other.py", "--no_such_flag"])
    before = state()
    assert "main" in runpy.run_path(PROGRAM, run_name="imported")
    assert state() == before and capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())
