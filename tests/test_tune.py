"""--tune runs the card's five stages: what it tries, keeps, tests, shares and resumes."""

import json
import shlex

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import read_csv, read_json, write_csv

import baseline

FROZEN = ["--tune", "--freeze_clip", "--lr", 1e-2, "--test_ratio", 0.25, "--val_ratio", 0.3]
PARTIAL = ["--tune", "--partial_freeze", "--freeze_layers", 2, "--lr", 1e-3, "--epochs", 1]


def fake_splits(monkeypatch, score, splits=3):
    """Let candidates have the validation SROCCs score(args, split) without any training."""
    asked = []

    def train_splits(args, table, brief):
        assert brief  # what the training part gives is asked of the winner alone
        asked.append(args)
        return [{"val_srocc_q": score(args, k), "val_srocc_c": 0.5, "images_val": 20, "blocks": 24,
                 "images_train": 80, "output_dir": args.output_dir, "seed": args.seed + k,
                 "checkpoint": __file__, "gap_q": 0.1} for k in range(splits)]
    monkeypatch.setattr(baseline, "train_splits", train_splits)
    monkeypatch.setattr(baseline, "training_advice", lambda args, log, row: [
        ("overfitting", "", "--dropout 0.4 --lr 1e-5")])
    monkeypatch.setattr(baseline, "tested_row", lambda best, first, table: {
        "part": "test", "test_srocc_q": 0.5, "flags": best.flags})
    monkeypatch.setattr(pd, "read_csv", lambda *_, **__: pd.DataFrame())
    return asked


def test_winners_are_carried_on_and_noise_keeps_the_value_before(train, monkeypatch):
    """A third and 5/3 of the rate; 16, 18, 20 of 24 blocks; two scales; the diagnosis' remedies."""
    def score(args, split):
        noise = 0.04 * split * (args.residual_scale_q == 0.25)  # its mean gain is within this
        return (0.5 + 0.1 * (args.lr < 4e-5) + 0.05 * (args.freeze_layers == 20) + noise
                + 0.001 * split)
    asked = fake_splits(monkeypatch, score)
    run = train("--tune", "--partial_freeze", "--freeze_layers", 18, "--lr", 1e-4, "--repeats", 3)
    tried = [(args.lr, args.freeze_layers, args.residual_scale_q, args.dropout) for args in asked]
    assert tried == [
        (1e-4, 18, 0.2, 0.1), (3.3e-5, 18, 0.2, 0.1), (1.7e-4, 18, 0.2, 0.1),
        (3.3e-5, 16, 0.2, 0.1), (3.3e-5, 20, 0.2, 0.1),
        (3.3e-5, 20, 0.15, 0.1), (3.3e-5, 20, 0.25, 0.1), (1e-5, 20, 0.2, 0.4)]
    rows = read_csv(run.folder / "tuning.csv")
    assert list(rows[0]) == ["stage", "flags", "val_srocc_q", "val_srocc_c", "spread", "kept"]
    assert [row["kept"] for row in rows] == [
        "", "yes", "", "", "yes", "", "no: within the noise", "no"]
    assert rows[-1]["flags"] == "--lr 3.3e-05 --freeze_layers 20 --dropout 0.4 --lr 1e-5"
    assert run.row["flags"] == "--lr 3.3e-05 --freeze_layers 20"
    gains = np.array([0.5 * 0.04 * split for split in range(3)])  # of the mean of both targets
    half = scipy.stats.t.ppf(0.975, 2) * np.std(gains, ddof=1) * np.sqrt(1 / 3 + 20 / 80)
    assert float(rows[6]["spread"]) == pytest.approx(half, abs=1e-4) and half > gains.mean()


@pytest.mark.parametrize("more, stages", [
    (["--freeze_clip"], ["learning rate", "residual scale", "remedies"]),
    (["--no_residual_learning"], ["learning rate", "remedies"])])
def test_a_stage_that_does_not_apply_is_left_out_and_said(train, monkeypatch, capsys, more, stages):
    """Without frozen blocks there is no depth, without residuals no scale."""
    fake_splits(monkeypatch, lambda args, split: 0.5)
    rows = read_csv(train("--tune", *more, "--repeats", 3).folder / "tuning.csv")
    said = capsys.readouterr().out
    assert list(dict.fromkeys(row["stage"] for row in rows)) == ["baseline", *stages]
    assert all(f"{stage}: does not apply" in said for stage in baseline.STAGES
               if stage not in stages)
    assert "--tune sets a test part aside, as by --test_ratio 0.2" in said


def test_the_test_part_is_touched_by_winner_and_baseline_alone(train, monkeypatch, capsys):
    """Drawn once: repeats split the rest; gains are of paired draws over the mean of splits."""
    seen, real = [], baseline.evaluate

    def evaluate(run, part):
        pred, found = real(run, part)
        seen.append((part, run.seed, pred))
        return pred, found
    monkeypatch.setattr(baseline, "evaluate", evaluate)
    monkeypatch.setattr(baseline, "gain_margin", lambda *_: -1.0)  # something new wins
    run = train(*FROZEN, "--repeats", 2, "--epochs", 1)
    tests = [(place, seed, pred) for place, (part, seed, pred) in enumerate(seen) if part == "test"]
    others = [place for place, (part, *_) in enumerate(seen) if part == "val"]
    assert [seed for _, seed, _ in tests] == [42, 43, 42, 43]
    assert min(place for place, *_ in tests) > sorted(others)[-5]
    rows = {tuple(pred.index) for _, _, pred in tests}
    assert len(rows) == 1 and len({*next(iter(rows))}) == run.row["images_test"] == 8
    for part, _, pred in seen:
        assert part == "test" or not {*pred.index} & {*next(iter(rows))}
    val = {tuple(pred.index) for part, _, pred in seen if part == "val"}
    assert len(val) == 2  # of two seeds, the same with and without the test part
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == run.row == read_json(run.folder / "result.json")
    assert last["epochs_run"] == 1 >= last["best_epoch"]
    for t in "qc":
        assert last[f"gain_baseline_{t}_low"] <= last[f"gain_baseline_{t}"] <= (
            last[f"gain_baseline_{t}_high"])
    assert (run.folder / "tuning.csv").exists() and not (run.folder / "tuning.png").exists()


def test_the_training_part_is_evaluated_for_diagnosis_and_test(train, monkeypatch):
    """Once before the last stage, and once for the winner; no candidate pays for it."""
    seen, real = [], baseline.evaluate
    monkeypatch.setattr(baseline, "evaluate",
                        lambda run, part: seen.append(part) or real(run, part))
    asked, advise = [], baseline.training_advice
    monkeypatch.setattr(baseline, "training_advice", lambda args, log, row: (
        asked.append(row) or advise(args, log, row)))
    run = train(*FROZEN, "--epochs", 1)
    assert seen.count("train") == 2 and len(asked) == 1
    for t in "qc":
        gap = asked[0][f"train_srocc_{t}"] - asked[0][f"val_srocc_{t}"]
        assert asked[0][f"gap_{t}"] == gap and f"tier_{t}" in asked[0]
    kept = read_json(f"{asked[0]['output_dir']}/result.json")  # for the command given again
    assert kept == json.loads(baseline.json_text(asked[0]))
    assert {f"gap_{t}" for t in "qc"} <= {*run.row}
    rows = map(read_json, run.folder.glob("tuning/*/repeat_42/result.json"))
    assert [row["output_dir"] for row in rows if "gap_q" in row] == [asked[0]["output_dir"]]


def test_a_stopped_flow_goes_on_and_a_finished_one_trains_nothing(train, monkeypatch):
    """Killed three times: the same table, winner and checkpoint as without; nothing twice."""
    whole = train(*PARTIAL, out="whole")
    real, epochs, left = baseline.train_one_epoch, [], [2, 2, 3]

    def die(run, epoch):
        epochs.append(run.args.output_dir)
        if left and len(epochs) == left[0]:
            epochs.clear()
            del left[0]
            raise MemoryError
        return real(run, epoch)
    monkeypatch.setattr(baseline, "train_one_epoch", die)
    while left:
        with pytest.raises(MemoryError):
            train(*PARTIAL)
    half = whole.folder.parent / "out/tuning/baseline_0/repeat_42/.baseline_last.pt.1.half"
    half.write_text("of a killed run")
    run = train(*PARTIAL)
    assert len({*epochs}) == len(epochs) and not half.exists()
    one, two = ((folder / "tuning.csv").read_text() for folder in (whole.folder, run.folder))
    assert one == two and len(one.splitlines()) > 5
    same = [name for name in whole.row if name.startswith(("test_", "gain_", "val_"))]
    assert len(same) > 20
    assert [whole.row[name] for name in same] == pytest.approx([run.row[name] for name in same],
                                                               abs=0, nan_ok=True)
    epochs.clear()
    monkeypatch.setattr(baseline, "set_up", None)
    assert str(train(*PARTIAL).row) == str(run.row) and not epochs


def test_the_winners_command_and_checkpoint(train, capsys):
    """The command is complete and without --tune; the checkpoint is of a run with its flags."""
    run = train(*PARTIAL, "--no_residual_learning")
    command = [line for line in capsys.readouterr().out.splitlines()
               if line.startswith("python baseline.py")][-1]
    best = baseline.load_checkpoint(run.folder / "baseline_best.pt")
    words = shlex.split(command)[2:]
    assert "--tune" not in words and best["args"]["lr"] == baseline.parse_args(words).lr
    assert run.row["command"] == shlex.join(words)


@pytest.mark.parametrize("part, empty", [("val", False), ("test", True)])
def test_tune_wants_a_test_part_of_a_split_column(refused, data, tmp_path, part, empty):
    """A paper's split without one, or without its scores, is refused."""
    columns = ["name", "prompt", "mos_quality", "mos_align", "split"]
    rows = [row | {"split": "train" if i % 3 else part} for i, row in enumerate(data.rows)]
    for row in rows if empty else ():
        row |= {"mos_quality": "", "mos_align": ""} if row["split"] == "test" else {}
    csv = write_csv(tmp_path / "split.csv", rows, columns)
    said = refused("--tune", "--freeze_clip", "--split_column", "split", "--data_csv_path", csv)
    assert "--split_column split has 0 such rows" in said


def test_the_test_part_of_a_split_column_is_the_one_that_is_tested(train, data, tmp_path):
    """Its rows are in no candidate; those of train and val stay where the column says."""
    parts = ["train", "train", "val", "test"]
    rows = [row | {"split": parts[i // 4 % 4]} for i, row in enumerate(data.rows)]
    csv = write_csv(tmp_path / "split.csv", rows, ["name", "prompt", "mos_quality", "mos_align",
                                                   "split"])
    run = train("--tune", "--freeze_clip", "--lr", 1e-2, "--epochs", 1, "--split_column", "split",
                "--data_csv_path", csv)
    counts = [sum(row["split"] == part for row in rows) for part in ("train", "val", "test")]
    assert [run.row[f"images_{part}"] for part in ("train", "val", "test")] == counts
    first = read_json(run.folder / "tuning/baseline_0/repeat_42/result.json")
    assert [first[f"images_{part}"] for part in ("train", "val", "test")] == [*counts[:2], 0]


def test_the_picture_shows_every_candidate(train, monkeypatch):
    """tuning.png is drawn unless --no_plots is given."""
    fake_splits(monkeypatch, lambda args, split: 0.5)
    drawn, real = [], baseline.draw_tuning
    monkeypatch.setattr(baseline, "draw_tuning",
                        lambda frame, path: drawn.append((len(frame), path)) or real(frame, path))
    args = baseline.parse_args
    monkeypatch.setattr(baseline, "parse_args", lambda argv=None: args(
        [word for word in argv if word != "--no_plots"] if argv else argv))
    run = train("--tune", "--freeze_clip", "--repeats", 3)
    assert drawn == [(6, run.folder / "tuning.png")]
    assert (run.folder / "tuning.png").read_bytes()[:4] == b"\x89PNG"
