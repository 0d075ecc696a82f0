"""A run that is stopped or killed, at any moment, goes on to the same weights, bit for bit."""

import contextlib
import json
import os
import queue
import random
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import load, read_csv, read_json, same_tensors

import baseline

PROGRAM = str(Path(baseline.__file__).resolve())
STARTER = str(Path(__file__).with_name("starter.py"))
# One thread: several cores and threads change the last bits of sums.
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
PARTIAL = ["--partial_freeze", "--freeze_layers", "2"]
FOREVER = ["--epochs", "100000"]
SOON = 20  # seconds that a stopped program may take on a busy machine
START = 120  # seconds that it may take to start


class Forked:
    """A run of the program in a fork of tests/starter.py; stands for a subprocess.Popen."""

    def __init__(self, files):
        self.stdout, self.stderr = (open(file, encoding="utf-8") for file in files[:2])
        self.report, self.status = open(files[2], "rb", buffering=0), None
        self.pid = int(self.report.readline())

    def poll(self):
        """Return the status, None while it runs."""
        if self.status is None and select.select([self.report], [], [], 0)[0]:
            self.status = int(self.report.readline())
        return self.status

    def wait(self, timeout):
        """Wait for the end; returns the status."""
        if self.status is None and not select.select([self.report], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("baseline.py", timeout)
        return self.poll()


class Starter:
    """The process that has imported the program, and starts it in its forks."""

    def __init__(self):
        self.socket, theirs = socket.socketpair()
        self.process = subprocess.Popen([sys.executable, STARTER], stdin=theirs, env=ENVIRONMENT)
        theirs.close()

    def start(self, argv, tamper):
        """Start the program; tamper: see starter.py."""
        pipes = [os.pipe() for _ in range(3)]
        request = json.dumps({"argv": argv, "tamper": tamper}).encode()
        socket.send_fds(self.socket, [request], [write for _, write in pipes])
        assert self.socket.recv(1)
        for _, write in pipes:
            os.close(write)
        return Forked([read for read, _ in pipes])

    def stop(self):
        """End the process; what it started goes on."""
        self.socket.close()
        self.process.wait(SOON)


@pytest.fixture(scope="module")
def starter():
    """The process that starts the program in its forks."""
    process = Starter()
    yield process
    process.stop()


def fresh(argv):
    """Start the program as a user does, in a process of its own."""
    return subprocess.Popen([sys.executable, PROGRAM, *argv], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
                            start_new_session=True)


class Program:
    """A run of the program in a process and a session of its own."""

    def __init__(self, process):
        self.process = process
        self.lines, self.out, self.err = queue.Queue(), [], []
        self.readers = [threading.Thread(target=self.read, args=args, daemon=True) for args in (
            (self.process.stdout, self.out, self.lines), (self.process.stderr, self.err, None))]
        for reader in self.readers:
            reader.start()

    @staticmethod
    def read(stream, lines, arrivals):
        """Collect the lines of a stream, and tell of each."""
        for line in stream:
            lines.append(line)
            if arrivals:
                arrivals.put(line)
        if arrivals:
            arrivals.put(None)

    def wait_for(self, text, timeout=START):
        """Wait for a line on stdout that holds a text."""
        end = time.monotonic() + timeout
        while True:
            try:
                line = self.lines.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no {text!r} in {timeout} s: {self.out[-3:]} {self.err[-3:]}")
            if line is None:
                self.finish()
                pytest.fail(f"ended before {text!r}: {self.out[-3:]} {self.err[-3:]}")
            if text in line:
                return line

    def send(self, number, group=False):
        """Send a signal to the process, or to its whole group as a terminal does."""
        (os.killpg if group else os.kill)(self.process.pid, number)

    def finish(self, timeout=SOON):
        """Wait for the end; returns the status."""
        status = self.process.wait(timeout)
        for reader in self.readers:
            reader.join(timeout)
        return status

    @property
    def said(self):
        """All that was printed so far."""
        return "".join(self.out + self.err)


@pytest.fixture
def start(starter):
    """Start the program, from a fork or afresh; what runs at the end of the test is killed."""
    started = []

    def run(argv, *tamper, afresh=False):
        argv = [str(word) for word in argv]
        started.append(Program(fresh(argv) if afresh else starter.start(argv, tamper)))
        return started[-1]
    yield run
    for program in started:
        with contextlib.suppress(ProcessLookupError):
            program.send(signal.SIGKILL, group=True)
        program.finish()


def resume_command(program):
    """Return the arguments of the one command that a stopped program says to go on with."""
    said = [line for line in program.out if "--resume_from" in line]
    assert len(said) == 1
    words = shlex.split(said[0].split(": ", 1)[1])
    assert words[:2] == ["python", "baseline.py"]
    return words[2:]


def assert_clean(folder):
    """Check that the checkpoints load and that nothing half-written is left."""
    for name in ("baseline_best.pt", "baseline_last.pt"):
        assert load(folder, name)["format"] == baseline.FORMAT
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def without(row, *names):
    """Return a dictionary without some keys."""
    return {key: value for key, value in row.items() if key not in names}


def assert_same_run(a, b):
    """Compare two output folders bit for bit, seconds and places aside."""
    for name in ("baseline_last.pt", "baseline_best.pt"):
        one, two = load(a, name), load(b, name)
        assert same_tensors(one["state"], two["state"]), name
        assert one["progress"]["best_epoch"] == two["progress"]["best_epoch"]
        for left, right in zip(*(c["optimizer"]["state"].values() for c in (one, two))):
            assert same_tensors(left, right), name
    logs = [[without(row, "seconds") for row in read_csv(f / "training_log.csv")] for f in (a, b)]
    assert logs[0] == logs[1] and logs[0]
    results = [without(read_json(f / "result.json"), "seconds", "output_dir") for f in (a, b)]
    assert results[0] == results[1]
    assert (a / "val_predictions.csv").read_bytes() == (b / "val_predictions.csv").read_bytes()


# --- while it trains ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(start, flags, tmp_path, number):
    """Training ends in seconds with the signal's status, a checkpoint and a command that works."""
    program = start(flags(*PARTIAL, *FOREVER))
    program.wait_for("epoch   3 ")
    program.send(number)
    assert program.finish() == 128 + number
    assert "Traceback" not in program.said and "stopping after this step" in program.said
    folder = tmp_path / "out"
    assert_clean(folder)
    last = load(folder)["progress"]
    log = read_csv(folder / "training_log.csv")
    assert last["epoch"] >= 3
    assert [int(row["epoch"]) for row in log] == list(range(1, last["epoch"] + 1))
    assert not (folder / "result.json").exists()
    argv = resume_command(program)
    assert argv == ["--resume_from", str(folder / "baseline_last.pt")]
    again = start(argv)
    again.wait_for(f"epoch {last['epoch'] + 2:3d} ")
    again.send(number)
    assert again.finish() == 128 + number
    after = read_csv(folder / "training_log.csv")
    assert len(after) > len(log)
    assert [without(r, "seconds") for r in after[:len(log)]] == [
        without(r, "seconds") for r in log]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_too(start, flags, tmp_path, number):
    """Ctrl-C reaches the workers that decode images as well, and does no more harm there."""
    program = start(flags(*FOREVER, "--cache", "off", "--num_workers", "2"))
    program.wait_for("epoch   2 ")
    program.send(number, group=True)
    assert program.finish() == 128 + number
    assert "Traceback" not in program.said
    assert_clean(tmp_path / "out")
    assert load(tmp_path / "out")["progress"]["epoch"] >= 2
    assert resume_command(program) == ["--resume_from", str(tmp_path / "out/baseline_last.pt")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_waits_for_the_step(start, flags, tmp_path, number):
    """A step that takes long is finished, saved and only then left."""
    program = start(flags(*PARTIAL, *FOREVER), "slow", "apply_update", 2)
    program.wait_for("here")
    program.send(number)
    assert program.finish() == 128 + number
    assert load(tmp_path / "out")["progress"]["partial"]["update"] == 1
    assert resume_command(program) and "Traceback" not in program.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_stops_at_once(start, flags, tmp_path, number):
    """Who asks twice does not wait for a step that hangs."""
    program = start(flags(*PARTIAL, *FOREVER), "slow", "apply_update", 600)
    program.wait_for("here")
    program.send(number)
    time.sleep(1)
    assert program.process.poll() is None and "once more to stop at once" in program.said
    program.send(number)
    assert program.finish(SOON) == 128 + number
    assert "Traceback" not in program.said and "--resume_from" not in program.said
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.endswith(".tmp")]


# --- before and after -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["load_table", "load_clip"])
def test_a_signal_before_training_ends_it_at_once(start, flags, tmp_path, where, number):
    """While data and model are read there is nothing to save: one signal is enough."""
    program = start(flags(*PARTIAL), "slow", where, 600)
    program.wait_for("here")
    program.send(number)
    assert program.finish() == 128 + number
    assert "Traceback" not in program.said and "--resume_from" not in program.said
    assert not (tmp_path / "out" / "baseline_last.pt").exists()


def test_sigterm_while_it_starts(start, flags):
    """A program that has hardly begun ends as well."""
    program = start(flags(*PARTIAL), afresh=True)
    time.sleep(1)
    program.send(signal.SIGTERM)
    assert program.finish() in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert "epoch" not in program.said


def test_a_signal_after_training_loses_nothing(start, flags, tmp_path):
    """While the result is computed one signal ends it; resuming computes the result again."""
    program = start(flags(*PARTIAL), "slow", "finish", 600)
    program.wait_for("here")
    program.send(signal.SIGTERM)
    assert program.finish() == 143 and "Traceback" not in program.said
    assert not (tmp_path / "out" / "result.json").exists()
    assert start(flags(*PARTIAL, out="whole")).finish(START) == 0
    again = start(["--resume_from", tmp_path / "out" / "baseline_last.pt"])
    assert again.finish(START) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_a_signal_ends_scoring(start, train, data):
    """Scoring has nothing to save either."""
    best = train("--freeze_clip", "--epochs", 1).folder / "baseline_best.pt"
    program = start(["--predict", data.csv, "--checkpoint", best],
                    "slow", "score_images", 600)
    program.wait_for("here")
    program.send(signal.SIGINT)
    assert program.finish() == 130 and "Traceback" not in program.said


# --- the same run in the end ----------------------------------------------------------------

LONG = [*PARTIAL, "--lr", "1e-3", "--dropout", "0.2", "--batch_size", "4", "--epochs", "60"]


@pytest.fixture(scope="module")
def whole(data, clips, tmp_path_factory, starter):
    """Train without a break in a process of its own; returns (output folder, command)."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    command = ["--data_csv_path", data.csv, "--image_base_dir", data.images, "--clip_model",
               f"local-dir:{clips()}", "--num_workers", 0, "--no_plots", *LONG]
    program = Program(starter.start([str(w) for w in [*command, "--output_dir", folder]], ()))
    assert program.finish(300) == 0, program.said[-2000:]
    return folder, command


def test_stopped_twice_and_resumed_equals_uninterrupted(start, whole, tmp_path):
    """SIGTERM, resumed, SIGINT, resumed: the run of the printed commands is the whole one."""
    folder, argv = tmp_path / "out", [*whole[1], "--output_dir", tmp_path / "out"]
    epochs = []
    for number, epoch in ((signal.SIGTERM, 4), (signal.SIGINT, 15)):
        program = start(argv)
        program.wait_for(f"epoch {epoch:3d} ")
        program.send(number)
        assert program.finish() == 128 + number
        epochs.append(load(folder)["progress"]["epoch"])
        argv = resume_command(program)
    assert 4 <= epochs[0] < epochs[1] < 60
    assert start(argv).finish(300) == 0
    assert_same_run(whole[0], folder)


STEP = ["--scheduler", "step", "--step_lr_step_size", 2]
ACCUMULATE = ["--grad_accum_steps", 2]
PATIENT = ["--early_stopping_patience", 5, "--early_stopping_min_delta", 1]  # ends in epoch 5
OFTEN = ["--save_every_steps", 1]
KILLED = {
    "frozen, cosine": (["--freeze_clip"], OFTEN),
    "frozen, step, patient": (["--freeze_clip", *STEP, *PATIENT], []),
    "partial, linear, accumulated": ([*PARTIAL, "--scheduler", "linear", *ACCUMULATE], OFTEN),
    "partial, constant, patient": ([*PARTIAL, "--scheduler", "constant", *PATIENT], OFTEN),
    "full, step, accumulated, patient": ([*STEP, *ACCUMULATE, *PATIENT], OFTEN),
    "full, linear": (["--scheduler", "linear"], ["--save_every_steps", 3]),
}
INSIDE = ["update", "evaluation", "checkpoint", "before rename", "after rename", "log"]


@pytest.mark.parametrize("case", KILLED)
def test_killed_at_random_moments_equals_uninterrupted(start, flags, tmp_path, case):
    """Kill after kill, in whatever it is doing, a run ends as the uninterrupted one, bit for bit.

    In turn: while the cache is written, at four random places inside the training (half a
    checkpoint is written, a file is about to be renamed, ..), at a random time, and at the end.
    """
    number = list(KILLED).index(case)
    rng, last = random.Random(number), tmp_path / "out" / "baseline_last.pt"
    mode, often = KILLED[case]
    command = [*mode, "--lr", 1e-3, "--dropout", 0.2, "--batch_size", 4, "--epochs", 8]
    whole = start(flags(*command, out="whole"))
    inside = [INSIDE[(number + i) % len(INSIDE)] for i in range(4)]
    rng.shuffle(inside)
    places = []
    for place in ["cache", *inside, "time", "result", None]:
        call = 2 if place in ("cache", "result") else rng.randint(1, 4)
        tamper = ("kill", place, call) if place not in ("time", None) else ()
        program = start([*flags(*command, *often),
                         *(["--resume_from", last] if last.exists() else [])], *tamper)
        if place == "time":
            program.wait_for("resumed" if last.exists() else "epoch   0 ")
            time.sleep(rng.uniform(0, 0.1))
            program.send(signal.SIGKILL)
        status = program.finish(START)
        assert status == (0 if place is None else -signal.SIGKILL), (place, call, program.said)
        assert not (tmp_path / "out" / "result.json").exists() or place is None
        if last.exists():
            progress = load(last.parent)["progress"]
            partial = progress.get("partial") or {"update": 0}
            places.append((progress["epoch"], partial["update"]))
    assert places == sorted(places) and places[0] < places[-1]
    assert whole.finish(START) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "out")
    assert places[-1][0] == (5 if "patient" in case else 8)
    assert not [path for path in last.parent.iterdir() if path.name.startswith(".")]


def raise_at(monkeypatch, update, number=signal.SIGTERM):
    """Send this process a signal during one update of the training, counted from 1."""
    real, count = baseline.apply_update, []

    def apply(run, factor):
        count.append(1)
        if len(count) == update:
            signal.raise_signal(number)
        real(run, factor)
    monkeypatch.setattr(baseline, "apply_update", apply)


def stopped(train, monkeypatch, update, *command, number=signal.SIGTERM, **options):
    """Train until a signal in one update stops the run in this process."""
    with monkeypatch.context() as patch:
        raise_at(patch, update, number)
        with pytest.raises(SystemExit) as stop:
            train(*command, **options)
    assert stop.value.code == 128 + number


@pytest.mark.parametrize("more", [[], ["--grad_accum_steps", 2, "--use_explanations"],
                                  ["--save_every_steps", 2]])
@pytest.mark.parametrize("place", ["first", "middle", "end of an epoch", "last"])
def test_every_place_to_stop_is_a_place_to_go_on_from(train, monkeypatch, tmp_path, place, more):
    """Stopped in the first, a middle or the last update of an epoch: the same run in the end."""
    per_epoch = 2 if "--grad_accum_steps" in more else 4
    update = {"first": 1, "middle": per_epoch + 1, "end of an epoch": per_epoch,
              "last": 3 * per_epoch}[place]
    command = [*PARTIAL, *more, "--lr", 1e-3, "--epochs", 3, "--dropout", 0.3]
    done = train(*command, out="whole")
    stopped(train, monkeypatch, update, *command, out="part")
    progress = load(tmp_path / "part")["progress"]
    at = progress["epoch"] * per_epoch + progress.get("partial", {}).get("update", 0)
    assert at == update
    assert not (tmp_path / "part" / "result.json").exists()
    train("--epochs", 3, "--resume_from", tmp_path / "part" / "baseline_last.pt", out="part")
    assert_same_run(done.folder, tmp_path / "part")


def test_the_handlers_of_the_caller_come_back(train, monkeypatch):
    """main() leaves the signal handlers of the process that calls it as they were."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    train("--freeze_clip", "--epochs", 1)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    stopped(train, monkeypatch, 2, "--freeze_clip", out="part")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def said_to_go_on(capsys):
    """Return the arguments of the command that was printed to go on with."""
    line = [line for line in capsys.readouterr().out.splitlines() if "go on with" in line][-1]
    return shlex.split(line.split(": ", 1)[1])[2:]


@pytest.mark.parametrize("out", ["my run", "a $HOME 'b'"])
def test_the_printed_command_can_be_pasted(train, monkeypatch, capsys, tmp_path, out):
    """The command to go on with is quoted where the folder's name needs it."""
    stopped(train, monkeypatch, 3, "--freeze_clip", out=out)
    argv = said_to_go_on(capsys)
    assert argv == ["--resume_from", str(tmp_path / out / "baseline_last.pt")]
    assert baseline.main(argv)["epochs_run"] == 2


def test_the_printed_command_of_repeats_goes_on(train, monkeypatch, capsys, tmp_path):
    """Stopped in its second repeat, a run of several says a command that finishes it."""
    command = ["--freeze_clip", "--repeats", 2, "--epochs", 1]
    stopped(train, monkeypatch, 6, *command)
    assert (tmp_path / "out" / "repeat_43" / "baseline_last.pt").exists()
    argv = said_to_go_on(capsys)
    summary = baseline.main(argv)
    if "--resume_from" in argv:
        assert Path(argv[-1]) == tmp_path / "out" / "repeat_43" / "baseline_last.pt"
    else:
        assert len(summary["repeats"]) == 2


# --- unknown flags --------------------------------------------------------------------------


@pytest.mark.parametrize("words, near", [
    (["--epoch", "3"], "--epochs"), (["--bach_size=3"], "--batch_size"), (["--Lr", "1"], "--lr"),
    (["--freeze-clip"], "--freeze_clip"), (["--dropuot", "0"], "--dropout"),
    (["--explanations"], "--use_explanations")])
def test_an_unknown_flag_suggests_the_nearest(refused, words, near):
    """A mistyped flag is refused with the flag that was meant."""
    said = refused(*words)
    assert words[0].split("=")[0] in said and f"did you mean {near}?" in said


def test_several_unknown_flags_each_get_a_suggestion(refused):
    """All of them are named; what is like no flag gets no suggestion."""
    said = refused("--epoch", "3", "--warmup", "0.1", "--zzzzzz")
    assert "did you mean --epochs?" in said and "--zzzzzz" in said
    assert said.count("did you mean") <= 2


def test_an_unknown_flag_ends_a_process_with_status_2(start):
    """Before anything is read, with the usage and without a traceback."""
    program = start(["--epoch", "3"], afresh=True)
    assert program.finish(START) == 2
    assert "did you mean --epochs?" in program.said and "Traceback" not in program.said
    assert program.out == []
