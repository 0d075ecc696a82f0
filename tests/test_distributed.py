"""Two processes train what one does: the same numbers, one set of files, and no hanging."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import load, read_csv, read_json

import baseline

PROGRAM = str(Path(baseline.__file__).resolve())
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
            "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
# CLIP's keys have a bias without a gradient, whose rounding AdamW blows up to lr per update.
COMMON = "--lr 3e-6 --head_lr 1e-4 --dropout 0 --max_grad_norm 0 --warmup_ratio 0".split()
ODD = ["--split_by", "image", "--val_ratio", 0.3]  # 25 training images
CASES = {  # name: (flags, images per step of one process, of each of two)
    "frozen": (["--freeze_clip", "--test_ratio", 0.2], 8, 4),
    "partial": (["--partial_freeze", "--freeze_layers", 2, *ODD, "--grad_accum_steps", 2,
                 "--use_explanations", "--use_refinement"], 6, 3),
    "full": (["--no_residual_learning", "--augment", "crop", *ODD], 8, 4)}
MOMENTS = "exp_avg", "exp_avg_sq"
LONG = ["--partial_freeze", "--freeze_layers", 2, "--epochs", 2]

# Run {name: argv} in one start of two processes; write each one's status and evaluated rows. to_1
# is stopped in its second epoch; in `others` rank 1 is told another seed.
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[2])
import baseline
forward, train_one_epoch, seen = baseline.forward, baseline.train_one_epoch, []
def note(run, model, rows, *x):
    seen.extend([] if run.scorer.training else rows.tolist())
    return forward(run, model, rows, *x)
def train(run, epoch):
    if (name, epoch) == ("to_1", 2):
        raise KeyboardInterrupt
    return train_one_epoch(run, epoch)
baseline.forward, baseline.train_one_epoch = note, train
with baseline.processes():
    for name, argv in json.load(open(sys.argv[1])).items():
        print("command", name, flush=True)
        status = seen.clear() or 0
        try:
            baseline.main(argv + ["--seed=7"] * (name == "others") * baseline.RANK)
        except SystemExit as end:
            status = int(end.code)
        with open(f"{sys.argv[1]}.{name}.{baseline.RANK}", "w") as file:
            json.dump([status, seen], file)
"""


def launch(*command):
    """Run a command under torchrun; returns what subprocess.run does."""
    command = [*TORCHRUN, *map(str, command)]
    return subprocess.run(command, timeout=120, capture_output=True, text=True)


@pytest.fixture(scope="module")
def broken(data, tmp_path_factory):
    """A folder of the images, the last of which cannot be read: rank 1 is to read it."""
    folder = tmp_path_factory.mktemp("broken") / "images"
    shutil.copytree(data.images, folder)
    (folder / data.rows[-1]["name"]).write_bytes(b"junk")
    return folder


@pytest.fixture(scope="module")
def runs(data, broken, clips, tmp_path_factory):
    """Do all with one process and with two, <case>_1 and <case>_2; returns the outputs' folder.

    to_2, to_1: stopped after an epoch and gone on with as many processes; whole: not stopped.
    """
    folder, real = tmp_path_factory.mktemp("distributed"), baseline.train_one_epoch

    def flags(name, batch, *more):
        return ["--data_csv_path", data.csv, "--image_base_dir", data.images, "--clip_model",
                f"local-dir:{clips()}", "--output_dir", folder / name, "--batch_size", batch,
                "--num_workers", 0, "--no_plots", "--epochs", 1, *COMMON, *more]

    for name, (more, batch, _) in CASES.items():
        baseline.main(flags(f"{name}_1", batch, *more))
    baseline.main(flags("whole", 8, *LONG))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(baseline, "train_one_epoch", lambda run, epoch: (
            real(run, epoch) if epoch == 1 else signal.raise_signal(signal.SIGTERM)))
        baseline.main(flags("to_2", 8, *LONG))
    predict = ["--predict", data.csv, "--image_base_dir", broken, "--batch_size", 7, "--checkpoint",
               folder / "frozen_1" / "baseline_best.pt", "--predictions_csv"]
    with pytest.raises(SystemExit):
        baseline.main([*predict, folder / "predictions_1.csv"])
    go_on = {n: ["--resume_from", folder / f"to_{n}" / "baseline_last.pt"] for n in (1, 2)}
    commands = {name: flags(f"{name}_2", batch, *more) for name, (more, _, batch) in CASES.items()}
    commands |= {
        "to_2": go_on[2], "to_1": flags("to_1", 4, *LONG), "others": flags("others", 8),
        "predict": [*predict, folder / "predictions_2.csv"],
        "skip": flags("skip", 8, "--freeze_clip", "--skip_bad_images", "--image_base_dir", broken),
        "repeats": flags("repeats", 8, "--freeze_clip", "--freeze_layers", 3, "--repeats", 2)}
    (folder / "script.py").write_text(SCRIPT)
    (folder / "commands").write_text(json.dumps(commands, default=str))
    done = launch(folder / "script.py", folder / "commands", Path(PROGRAM).parent)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    assert [load(folder / f"to_{n}")["progress"]["epoch"] for n in (1, 2)] == [1, 2]
    baseline.main(go_on[1])
    return folder


def status_of(runs, name):
    """Return the status of both processes after a command."""
    return [read_json(runs / f"commands.{name}.{rank}")[0] for rank in (0, 1)]


def assert_same_scores(a, b):
    """Compare two files of predictions; scores are rounded to 4 decimals."""
    one, two = pd.read_csv(a), pd.read_csv(b)
    pd.testing.assert_frame_equal(one, two, atol=2e-4, rtol=0)
    assert (one.filter(regex="^(quality|consistency)").std() > 0).all()


def assert_same_training(a, b):
    """Compare weights, gradient moments, log and result of two runs."""
    one, two = load(a), load(b)
    # AdamW makes a step of its rate of any gradient, so a tiny one's rounding shows: 1 % of a step.
    torch.testing.assert_close(one["state"], two["state"], atol=5e-6, rtol=0)
    # AdamW hardly depends on the gradient's scale: its moments do.
    one, two = one["optimizer"]["state"], two["optimizer"]["state"]
    assert set(one) == set(two)
    for x, y in [(one[key][name], two[key][name]) for key in one for name in MOMENTS]:
        assert float((x - y).abs().max()) <= 1e-4 * float(x.abs().max()) + 1e-8
    assert max(float(moment["exp_avg"].abs().max()) for moment in one.values()) > 1e-3
    logs = [pd.read_csv(folder / "training_log.csv").drop(columns="seconds") for folder in (a, b)]
    unlike = [name for name in logs[0] if "krocc" in name]  # a tie that is none weighs 1e-2
    pd.testing.assert_frame_equal(*(log.drop(columns=unlike) for log in logs), atol=1e-5, rtol=1e-6)
    one, two = (read_json(folder / "result.json") for folder in (a, b))
    for name in ("train_rmse_q", "train_rmse_c", "val_rmse_q", "val_rmse_c", "split"):
        assert one[name] == pytest.approx(two[name], abs=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(runs, case):
    """Same weights and cache, also where the last batch leaves one process nothing."""
    assert status_of(runs, case) == [0, 0]
    assert_same_training(runs / f"{case}_1", runs / f"{case}_2")
    one, two = ({path.name: path.read_bytes() for path in (runs / f"{case}_{n}/cache").iterdir()}
                for n in (1, 2))
    assert one == two and len(one) >= 2


@pytest.mark.parametrize("case", CASES)
def test_every_image_is_evaluated_once(runs, case):
    """The processes share the rows, in equal shares; all predict what one process does."""
    seen = [read_json(runs / f"commands.{case}.{rank}")[1] for rank in (0, 1)]
    counts, batch = read_json(runs / f"{case}_2" / "config.json")["images"], 2 * CASES[case][2]
    shares = {part: n // batch * batch // 2 + (n % batch + 1) // 2 for part, n in counts.items()}
    best = read_json(runs / f"{case}_2" / "result.json")["best_epoch"]  # it keeps epoch 1's val
    times = sum(shares.values()) + (best == 0) * shares["val"]
    assert [*map(len, seen)] == [times] * 2
    assert len({*seen[0], *seen[1]}) == sum(counts.values())
    assert_same_scores(*(runs / f"{case}_{n}" / "val_predictions.csv" for n in (1, 2)))


@pytest.mark.parametrize("number, status", [(1, 130), (2, 0)])
def test_a_run_goes_on_with_another_number_of_processes(runs, number, status):
    """Stopped after an epoch, it ends as the whole run, with as many images per update."""
    assert status_of(runs, f"to_{number}") == [status] * 2
    assert_same_training(runs / "whole", runs / f"to_{number}")
    assert load(runs / f"to_{number}")["processes"] == number


def test_two_processes_score_what_one_does(runs, data):
    """--predict shares the images; the file holds all of them in order, and why one is unread."""
    assert status_of(runs, "predict") == [1, 0]  # torchrun ends all by one
    assert_same_scores(runs / "predictions_1.csv", runs / "predictions_2.csv")
    rows = read_csv(runs / "predictions_2.csv")
    assert [row["name"] for row in rows] == [row["name"] for row in data.rows]
    assert [bool(row["error"]) for row in rows] == [False] * (len(rows) - 1) + [True]


def test_bad_images_and_other_flags_are_everyones(runs, data):
    """What one process cannot read both skip; where one has other flags nothing is trained."""
    assert status_of(runs, "skip") == [0, 0] and status_of(runs, "others") == [2, 2]
    assert [row["name"] for row in read_csv(runs / "skip/skipped.csv")] == [data.rows[-1]["name"]]
    assert sum(read_json(runs / "skip" / "config.json")["images"].values()) == len(data.rows) - 1
    assert "All processes must see the same data" in (runs / "stderr").read_text()
    assert not (runs / "others").exists()


def test_one_voice_and_one_set_of_files(runs):
    """--repeats: each line is said once, the last one is JSON, nothing half-written is left."""
    lines = (runs / "stdout").read_text().split("command repeats\n")[1].splitlines()
    assert [line.startswith("{") for line in lines] == [False] * (len(lines) - 1) + [True]
    assert len(json.loads(lines[-1])["repeats"]) == 2
    said = ("epoch   1 ", "2 processes, 16 images per step", "repeat with", "val of 2 splits")
    assert [sum(text in line for line in lines) for text in said] == [2, 2, 2, 1]
    errors = (runs / "stderr").read_text()
    assert errors.count("--freeze_layers does nothing") == 1 and "Traceback" not in errors
    assert "FutureWarning" not in errors
    assert len(read_csv(runs / "repeats" / "runs.csv")) == 2
    for folder in (runs / "repeats" / "repeat_42", runs / "repeats" / "repeat_43"):
        assert {*os.listdir(folder)} == {"baseline_best.pt", "baseline_last.pt", "config.json",
                                         "result.json", "training_log.csv", "val_predictions.csv"}
    assert not list(runs.rglob(".*")) and not list(runs.rglob("archive"))


def test_a_process_that_refuses_an_image_ends_all(flags, data, broken, tmp_path):
    """An unreadable image in the share of the second process is named, and no one waits."""
    began = time.monotonic()
    done, bad = launch(PROGRAM, *flags("--image_base_dir", broken)), data.rows[-1]["name"]
    assert done.returncode != 0 and time.monotonic() - began < 60
    assert done.stderr.count(f"error: Every image must be readable, but {broken / bad}") == 1
    assert PROGRAM not in done.stderr.replace(f"{PROGRAM} FAILED", "")  # no traceback of ours
    assert not [*(tmp_path / "out").rglob("*.pt"), *(tmp_path / "out").rglob(".*")]
    assert "epoch" not in done.stdout


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_killed_process_ends_the_others(flags, tmp_path):
    """After a SIGKILL of one process the command ends in seconds; its checkpoints are whole."""
    command = [*TORCHRUN, PROGRAM, *flags("--freeze_clip", "--epochs", 100_000)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not process.stdout.readline().startswith("epoch   2"):
            assert process.poll() is None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGKILL)
        assert process.communicate(timeout=60) and process.returncode != 0
    finally:
        process.kill()
    assert load(tmp_path / "out")["progress"]["epoch"] >= 1
    assert not [number for number in children if Path(f"/proc/{number}").exists()]
