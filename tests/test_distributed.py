"""Two processes train what one does: the same numbers, one set of files, and no hanging."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, read_csv, read_json

import baseline

PROGRAM = str(Path(baseline.__file__).resolve())
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
            "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
# CLIP's keys have a bias without a gradient, whose rounding AdamW blows up to lr per update.
COMMON = ["--lr", 3e-6, "--head_lr", 1e-4, "--dropout", 0, "--max_grad_norm", 0,
          "--warmup_ratio", 0, "--epochs", 1]
ODD = ["--split_by", "image", "--val_ratio", 0.3]  # 25 training images
CASES = {  # name: (flags, images per step of one process, of each of two)
    "frozen": (["--freeze_clip", "--test_ratio", 0.2], 8, 4),
    "partial": (["--partial_freeze", "--freeze_layers", 2, *ODD, "--grad_accum_steps", 2,
                 "--use_explanations", "--use_refinement"], 6, 3),
    "full": (["--no_residual_learning", "--augment", "crop", *ODD], 8, 4)}
LONG = ["--partial_freeze", "--freeze_layers", 2, "--epochs", 2]
STOP_AT = 6  # of 8 updates, 4 in an epoch

# Run several commands in one start of two processes. Each is {argv, stop}: rank 1 gets a SIGTERM
# in that update. Writes each rank's evaluated rows and status.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import baseline
world, forward, update = baseline.WORLD, baseline.forward, baseline.apply_update
join, leave, rank = world.join, world.leave, int(os.environ["RANK"])
world.join = lambda: world.size > 1 or join()  # the first command joins, the last one leaves
commands = json.loads(Path(sys.argv[1]).read_text())
seen, count = [], []
def note(run, view, x, model=None):
    if not run.scorer.training:
        seen.extend(view.rows.tolist())
    return forward(run, view, x, model)
def apply(run, factor):
    count.append(1)
    if len(count) == stop and rank == 1:
        signal.raise_signal(signal.SIGTERM)
    update(run, factor)
baseline.forward, baseline.apply_update = note, apply
for number, (argv, stop) in enumerate(commands):
    print("command", number, flush=True)
    world.leave = leave if number == len(commands) - 1 else world.barrier
    seen.clear(), count.clear()
    status = 0
    try:
        baseline.main(argv)
    except SystemExit as end:
        status = end.code
    Path(f"{{sys.argv[1]}}.{{number}}.{{rank}}").write_text(json.dumps([status, seen]))
"""


def environment():
    """Return the environment of a start: no GPU, one thread per process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def launch(command, timeout=120):
    """Run a command under torchrun; returns (status, stdout, stderr)."""
    process = subprocess.run([*TORCHRUN, *map(str, command)], env=environment(), timeout=timeout,
                             capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr


def stopped_alone(argv, update):
    """Train in this process until a signal in one update stops it."""
    real, count = baseline.apply_update, []

    def apply(run, factor):
        count.append(1)
        if len(count) == update:
            signal.raise_signal(signal.SIGTERM)
        real(run, factor)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(baseline, "apply_update", apply)
        baseline.main(argv)
    assert stop.value.code == 143


@pytest.fixture(scope="module")
def runs(data, clips, tmp_path_factory):
    """Do everything once with one process and once with two; returns the folder of all outputs.

    <case>_1, <case>_2: one and two processes; whole: not interrupted; to_2, to_1: interrupted and
    gone on with as many processes; predictions_1.csv, _2.csv: scores by the checkpoint of frozen_1;
    repeats: two repeats by two processes; stdout, stderr: what two processes said.
    """
    folder = tmp_path_factory.mktemp("distributed")

    def flags(name, batch, *more):
        return ["--data_csv_path", str(data.csv), "--image_base_dir", str(data.images),
                "--clip_model", f"local-dir:{clips()}", "--num_workers", "0", "--no_plots",
                "--output_dir", str(folder / name), "--batch_size", str(batch),
                *map(str, [*COMMON, *more])]

    def go_on(name):
        return ["--resume_from", str(folder / name / "baseline_last.pt")]

    def predict(name):
        return ["--predict", str(data.csv), "--checkpoint",
                str(folder / "frozen_1" / "baseline_best.pt"), "--num_workers", "0", "--image_base_dir", str(data.images), "--batch_size", "7",
                "--predictions_csv", str(folder / name)]

    for name, (more, batch, _) in CASES.items():
        baseline.main(flags(f"{name}_1", batch, *more))
    baseline.main(flags("whole", 8, *LONG))
    stopped_alone(flags("to_2", 8, *LONG), STOP_AT)
    baseline.main(predict("predictions_1.csv"))
    commands = [(flags(f"{name}_2", batch, *more), 0) for name, (more, _, batch) in CASES.items()]
    commands += [(go_on("to_2"), 0), (flags("to_1", 4, *LONG), STOP_AT),
                 (predict("predictions_2.csv"), 0),
                 (flags("repeats", 8, "--freeze_clip", "--repeats", 2, "--freeze_layers", 3), 0)]
    (folder / "script.py").write_text(SCRIPT.format(folder=str(Path(PROGRAM).parent)))
    (folder / "commands").write_text(json.dumps(commands))
    status, out, errors = launch([folder / "script.py", folder / "commands"])
    assert status == 0, errors[-3000:]
    (folder / "stdout").write_text(out)
    (folder / "stderr").write_text(errors)
    ends = [read_json(folder / f"commands.{i}.{rank}")[0] for i in range(len(commands))
            for rank in (0, 1)]
    assert ends == [0] * 8 + [143] * 2 + [0] * 4  # both stopped, though one got the signal
    shot = load(folder / "to_1")["progress"]
    assert shot["epoch"] == 1 and shot["partial"]["update"] == STOP_AT - 4
    baseline.main(go_on("to_1"))
    return folder


def largest_difference(a, b):
    """Return the largest difference of two dictionaries of tensors."""
    assert set(a) == set(b)
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def assert_same_training(a, b):
    """Compare weights, gradient moments, log and result of two runs."""
    one, two = load(a), load(b)
    assert largest_difference(one["state"], two["state"]) <= 1e-6
    first = torch.load(a / "baseline_best.pt", weights_only=True)["state"]
    if load(a, "baseline_best.pt")["progress"]["best_epoch"] == 0:
        assert largest_difference(one["state"], first) > 1e-5
    # AdamW hardly depends on the gradient's scale: its moments do.
    moments = [content["optimizer"]["state"] for content in (one, two)]
    assert set(moments[0]) == set(moments[1])
    for key, moment in moments[0].items():
        for name in ("exp_avg", "exp_avg_sq"):
            x, y = moment[name], moments[1][key][name]
            assert float((x - y).abs().max()) <= 1e-4 * float(x.abs().max()) + 1e-8, name
    rows = [read_csv(folder / "training_log.csv") for folder in (a, b)]
    assert len(rows[0]) == len(rows[1])
    for left, right in zip(*rows):
        for name in left:
            if name != "seconds" and "krocc" not in name:
                assert float(left[name]) == pytest.approx(float(right[name]), abs=1e-5,
                                                          nan_ok=True), name
    results = [read_json(folder / "result.json") for folder in (a, b)]
    for part in ("train", "val"):
        assert results[0][part]["rmse_q"] == pytest.approx(results[1][part]["rmse_q"], abs=1e-6)
    assert results[0]["split"] == results[1]["split"]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(runs, case):
    """Same global batch, same weights; also with a last batch that leaves one process nothing."""
    assert_same_training(runs / f"{case}_1", runs / f"{case}_2")


@pytest.mark.parametrize("case", CASES)
def test_every_image_is_evaluated_once(runs, case, data):
    """The processes share the rows; the predictions of all are those of one process."""
    folder = runs / f"{case}_2"
    seen = [Counter(read_json(runs / f"commands.{list(CASES).index(case)}.{rank}")[1])
            for rank in (0, 1)]
    counts = read_json(folder / "config.json")["images"]
    times = Counter((seen[0] + seen[1]).values())
    expected = Counter()
    for part, passes in (("train", 1), ("val", 3), ("test", 1)):
        expected[passes] += counts[part]
    assert times == expected and all(seen)
    one, two = (read_csv(runs / f"{case}_{n}" / "val_predictions.csv") for n in (1, 2))
    assert [row["name"] for row in one] == [row["name"] for row in two]
    for name in ("quality", "consistency", "quality_base", "consistency_base"):
        a, b = ([float(row[name]) for row in rows] for rows in (one, two))
        assert np.allclose(a, b, atol=2e-4) and np.ptp(a) > 0


@pytest.mark.parametrize("case", CASES)
def test_the_cache_is_the_same_file(runs, case):
    """Computed in two shares, the cache has the names and the bytes that one process writes."""
    one, two = ({path.name: path.read_bytes() for path in (runs / f"{case}_{n}/cache").iterdir()}
                for n in (1, 2))
    assert one == two and len(one) >= 2


@pytest.mark.parametrize("name", ["to_1", "to_2"])
def test_a_run_goes_on_with_another_number_of_processes(runs, name):
    """Stopped in the middle of an epoch by a signal to one process, it ends as the whole run."""
    assert_same_training(runs / "whole", runs / name)
    assert load(runs / name)["processes"] == int(name[-1])


def test_two_processes_score_what_one_does(runs, data):
    """--predict shares the images; the file holds all of them, in order."""
    one, two = (read_csv(runs / f"predictions_{n}.csv") for n in (1, 2))
    assert [row["name"] for row in two] == [row["name"] for row in data.rows]
    for a, b in zip(one, two):
        assert a["name"] == b["name"] and not b["error"]
        for name in ("quality", "consistency"):
            assert float(a[name]) == pytest.approx(float(b[name]), abs=2e-4)


def test_one_voice_and_one_set_of_files(runs):
    """--repeats: each line is said once, the last one is JSON, nothing half-written is left."""
    lines = (runs / "stdout").read_text().split("command 6\n")[1].splitlines()
    assert [line.startswith("{") for line in lines] == [False] * (len(lines) - 1) + [True]
    assert len(json.loads(lines[-1])["repeats"]) == 2
    for text, times in (("epoch   1 ", 2), ("2 processes, 16 images per step", 2),
                        ("repeat with seed", 2), ("val of 2 splits", 1)):
        assert sum(text in line for line in lines) == times, text
    errors = (runs / "stderr").read_text()
    assert errors.count("--freeze_layers does nothing") == 1 and "Traceback" not in errors
    assert len(read_csv(runs / "repeats" / "runs.csv")) == 2
    for seed in (42, 43):
        assert sorted(p.name for p in (runs / "repeats" / f"repeat_{seed}").iterdir()) == [
            "baseline_best.pt", "baseline_last.pt", "config.json", "result.json",
            "training_log.csv", "val_predictions.csv"]
    assert not list(runs.rglob(".*")) and not list(runs.rglob("archive"))


# --- when one of them fails -----------------------------------------------------------------


def test_a_process_that_refuses_an_image_ends_all(flags, data, tmp_path):
    """An unreadable image in the share of the second process is named, and no one waits."""
    broken = tmp_path / "images"
    broken.mkdir()
    for row in data.rows:
        (broken / row["name"]).write_bytes((data.images / row["name"]).read_bytes())
    (broken / data.rows[-1]["name"]).write_bytes(b"junk")
    began = time.monotonic()
    status, out, errors = launch([PROGRAM, *flags(), "--image_base_dir", broken])
    assert status != 0 and time.monotonic() - began < 60
    assert errors.count(f"baseline.py: error: Every image must be readable, but "
                        f"{broken / data.rows[-1]['name']}") == 1
    assert PROGRAM not in errors.replace(f"{PROGRAM} FAILED", "")  # no traceback of ours
    assert not list((tmp_path / "out").rglob("*.pt")) and "epoch" not in out
    assert not list((tmp_path / "out").rglob(".*"))


def children(number):
    """Return the ids of a process's children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == number:
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_process_ends_the_others(flags, tmp_path):
    """After a SIGKILL of one process the command ends in seconds; its checkpoints are whole."""
    process = subprocess.Popen(
        [*TORCHRUN, PROGRAM, *flags("--freeze_clip", "--epochs", 100_000)], env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        for line in process.stdout:
            if line.startswith("epoch   2"):
                break
        workers = children(process.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        process.stdout.read()
        assert process.wait(30) != 0
    finally:
        process.kill()
    assert load(tmp_path / "out")["progress"]["epoch"] >= 1
    assert not [number for number in workers if Path(f"/proc/{number}").exists()]
