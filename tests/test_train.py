"""Training does what its flags say, its files hold what happened, and a killed run goes on."""

import json
import math
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import load, read_csv, read_json, same_tensors, write_csv

import baseline

PARTIAL = ["--partial_freeze", "--freeze_layers", 2]
MODES = {"frozen": ["--freeze_clip"], "partial": PARTIAL, "full": []}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def largest_difference(a, b):
    """Return the largest difference between two dictionaries of the same tensors.

    A key's bias has no gradient (softmax does not see it), and Adam blows its rounding noise up.
    """
    assert a.keys() == b.keys()
    a, b = ({k: v.view(3, -1)[[0, 2]] if k.endswith("in_proj_bias") else v
             for k, v in state.items()} for state in (a, b))
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


@pytest.mark.parametrize("big, small, steps", [(8, 4, 2), (28, 8, 4), (12, 3, 4)])
def test_accumulation_equals_the_big_batch(train, monkeypatch, big, small, steps):
    """A window of small batches is one big batch, also where the last window is shorter."""
    common = [*PARTIAL, "--dropout", 0, "--epochs", 1, "--use_explanations", "--w_exp", 1,
              "--lr", 1e-4, "--warmup_ratio", 0, "--seed", 43]  # no gradient of it is nearly 0,
    # where AdamW, which divides by its size, would make a step of the rounding
    monkeypatch.setattr(baseline, "selection_score", lambda values, by: 0.0)  # epoch 0 is best
    one = train(*common, "--batch_size", big, out="big").folder
    two = train(*common, "--batch_size", small, "--grad_accum_steps", steps, out="small").folder
    a, b = load(one)["state"], load(two)["state"]
    assert largest_difference(a, b) <= 1e-6
    assert largest_difference(a, load(one, "baseline_best.pt")["state"]) > 1e-4
    rows = [read_csv(folder / "training_log.csv")[0] for folder in (one, two)]
    for name in ("train_loss", "train_loss_q", "train_loss_c", "train_loss_exp"):
        assert float(rows[0][name]) == pytest.approx(float(rows[1][name]), abs=1e-5)


# --- optimiser and schedule -----------------------------------------------------------------


def factor(scheduler, update, per_epoch=2, epochs=3, warmup=1):
    """Return the documented factor of the learning rate at an update, counted from 0."""
    if update < warmup:
        return (update + 1) / warmup
    done = (update - warmup) / (per_epoch * epochs - warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1,
            "step": 0.5 ** ((update - warmup) // per_epoch // 2)}[scheduler]


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant", "step"])
def test_schedules_follow_their_formulas(train, monkeypatch, scheduler):
    """A ramp, then the curve; both groups' learning rates are their peaks times that."""
    args = SimpleNamespace(epochs=6, warmup_ratio=0.1, scheduler=scheduler, step_lr_step_size=2,
                           step_lr_gamma=0.5)
    assert [baseline.lr_factor(u, 10, args) for u in range(60)] == pytest.approx(
        [factor(scheduler, u, 10, 6, 6) for u in range(60)])
    seen, step = [], torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        seen.append([(g["base_lr"], g["lr"]) for g in self.param_groups])
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    run = train(*PARTIAL, "--scheduler", scheduler, "--epochs", 3, "--warmup_ratio", 0.2,
                "--lr", 2e-5, "--head_lr", 1e-3, "--grad_accum_steps", 2,
                "--step_lr_step_size", 2, "--step_lr_gamma", 0.5)
    assert len(seen) == 6  # 28 images: 4 batches, 2 updates per epoch
    for update, groups in enumerate(seen):
        assert {base for base, _ in groups} == {2e-5, 1e-3}
        assert all(lr == pytest.approx(base * factor(scheduler, update)) for base, lr in groups)
    log = [float(row["lr"]) for row in read_csv(run.folder / "training_log.csv")]
    assert log == pytest.approx([2e-5 * factor(scheduler, update) for update in (1, 3, 5)])


@modes
def test_groups_hold_every_trained_parameter_once(build, mode):
    """CLIP gets lr, heads get head_lr; matrices decay, norms, biases and scalars do not."""
    run = build(*mode, "--lr", 2e-5, "--head_lr", 5e-3, "--weight_decay", 0.3, "--use_refinement")
    names = {id(p): n for n, p in run.scorer.named_parameters() if p.requires_grad}
    found = []
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            found.append(names[id(parameter)])
            assert group["base_lr"] == (2e-5 if found[-1].startswith("clip.") else 5e-3), found[-1]
            assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0), found[-1]
    assert sorted(found) == sorted(names.values())


@pytest.mark.parametrize("more, want", [
    (["--freeze_clip"], 3e-5), (["--freeze_clip", "--lr", 1e-3], 1e-3), ([], 1e-3),
    (["--lr", 2e-3], 2e-3), ([*PARTIAL, "--lr", 1e-4], 1e-3), (["--head_lr", 7e-5], 7e-5),
    (["--freeze_clip", "--head_lr", 7e-5], 7e-5)])
def test_automatic_head_lr(flags, more, want):
    """Heads learn at lr where CLIP is frozen, otherwise at lr but at least 1e-3."""
    assert baseline.head_lr(baseline.parse_args(flags(*more))) == want


@pytest.mark.parametrize("limit, norm", [(0.5, 0.5), (1e9, 30.0), (0, 30.0)])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_gradient_clipping(build, limit, norm, scale):
    """The whole gradient is scaled to max_grad_norm where it is longer; 0 leaves it alone.

    scale: what fp16's scaler has multiplied the gradient by, None: it is off.
    """
    run = build("--freeze_clip", "--max_grad_norm", limit)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    run.scaler.scale(torch.ones(()))
    parameters = [p for p in run.scorer.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, (scale or 1.0) * 30 / count ** 0.5)
    baseline.update(run, 1.0)
    moments = [run.optimizer.state[p]["exp_avg"] for p in parameters]
    taken = sum((m ** 2).sum() for m in moments) ** 0.5 / (1 - run.optimizer.defaults["betas"][0])
    assert taken.item() == pytest.approx(norm, rel=1e-3)
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("more", [
    ["--freeze_clip"], ["--freeze_clip", "--no_residual_learning"], [*PARTIAL, "--use_two_branch"],
    ["--freeze_clip", "--use_refinement", "--refinement_layers", 1],
    [*PARTIAL, "--use_explanations"]])
def test_every_head_learns(train, more):
    """With every choice of heads the training loss falls and all numbers are finite."""
    run = train(*more, "--epochs", 6, "--lr", 1e-3, "--dropout", 0, "--augment", "none",
                "--no_base_calibration")
    log = read_csv(run.folder / "training_log.csv")
    assert float(log[-1]["train_loss"]) < 0.9 * float(log[0]["train_loss"])
    assert all(math.isfinite(float(value)) for row in log for value in row.values())


# --- selection and early stopping -----------------------------------------------------------


@pytest.mark.parametrize("scores, more, ran, best", [
    ([0.1, 0.2, 0.5, 0.3, 0.4, 0.45, 0.9], ["--early_stopping_patience", 3], 5, 2),
    ([0.1, 0.21, 0.25, 0.28, 0.5, 0.6, 0.7], ["--early_stopping_patience", 2,
                                              "--early_stopping_min_delta", 0.1], 3, 3),
    ([0.1, 0.15, 0.25, 0.3, 0.4, 0.45, 0.55], ["--early_stopping_patience", 2,
                                               "--early_stopping_min_delta", 0.1], 6, 6),
    ([0.1, 0.12, 0.14, 0.16, 0.5, 0.6, 0.7], ["--early_stopping_patience", 2,
                                              "--early_stopping_min_delta", 0.1], 2, 2),
    ([0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [], 6, 0)])
def test_early_stopping_waits_and_keeps_the_best(train, monkeypatch, scores, more, ran, best):
    """Training stops `patience` epochs after the last gain of min_delta; the best epoch counts."""
    script = iter(scores)
    monkeypatch.setattr(baseline, "selection_score", lambda values, by: next(script))
    run = train("--freeze_clip", "--lr", 1e-2, "--epochs", 6, "--log_csv", "mine.csv", *more)
    assert (run.row["epochs_run"], run.row["best_epoch"]) == (ran, best)
    assert load(run.folder, "baseline_best.pt")["progress"]["epoch"] == best
    log = read_csv(run.folder / "mine.csv")
    assert list(log[0]) == list(baseline.LOG_COLUMNS)
    assert [int(row["epoch"]) for row in log] == list(range(1, ran + 1))
    assert [float(row["best"]) for row in log] == [max(scores[:i + 2]) for i in range(ran)]
    if best:
        assert float(log[best - 1]["val_srocc_q"]) == run.row["val_srocc_q"]


@pytest.mark.parametrize("by", ["mean", "quality", "consistency"])
def test_select_by_picks_its_own_best_epoch(train, build, by):
    """The best epoch is the first one with the largest chosen SROCC, epoch 0 included."""
    command = [*PARTIAL, "--lr", 1e-2, "--epochs", 8, "--select_by", by]
    _, start = baseline.evaluate(build(*command, out="start"), "val")
    run = train(*command)
    log = read_csv(run.folder / "training_log.csv")
    q, c = ([start[f"srocc_{t}"]] + [float(row[f"val_srocc_{t}"]) for row in log] for t in "qc")
    score = {"quality": q, "consistency": c, "mean": [(a + b) / 2 for a, b in zip(q, c)]}[by]
    assert run.row["best_epoch"] == int(np.argmax(score)) and len(set(score)) > 2
    assert float(log[-1]["best"]) == pytest.approx(max(score))
    assert run.row["val_srocc_q"] == pytest.approx(q[run.row["best_epoch"]])


# --- metrics --------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_equal_their_definitions(ties):
    """SROCC, PLCC, KROCC and RMSE equal reference computations, also with ties."""
    rng = np.random.default_rng(0)
    pred, mos = ({t: rng.random(60).round(1 if ties else 9) for t in "qc"} for _ in range(2))
    found = baseline.metrics(pred, mos)
    assert len(found) == 8
    for t in "qc":
        ranks = [scipy.stats.rankdata(side[t]) for side in (pred, mos)]
        x, y = (np.sign(np.subtract.outer(side[t], side[t])) for side in (pred, mos))
        tau_b = (x * y).sum() / math.sqrt((x ** 2).sum() * (y ** 2).sum())  # over all pairs
        assert found[f"srocc_{t}"] == pytest.approx(np.corrcoef(ranks)[0, 1])
        assert found[f"plcc_{t}"] == pytest.approx(np.corrcoef(pred[t], mos[t])[0, 1])
        assert found[f"krocc_{t}"] == pytest.approx(tau_b)
        assert found[f"rmse_{t}"] == pytest.approx(math.sqrt(((pred[t] - mos[t]) ** 2).mean()))


def test_correlations_that_are_undefined_are_nan_and_never_the_best():
    """A constant side, or a prediction that is not finite, is never the best; it stops no other."""
    def score(by, **weights):
        return baseline.selection_score(found, SimpleNamespace(
            **{"w_q": 0.5, "w_c": 0.5} | weights, select_by=by))
    x, one, bad = np.arange(5.0), np.ones(5), np.array([1, 2, math.nan, 4, 5])
    for pred, mos in ((one, x), (x, one), (bad, x)):
        found = baseline.metrics({"q": pred, "c": x}, {"q": mos, "c": x})
        assert all(math.isnan(found[f"{name}_q"]) for name in ("srocc", "plcc", "krocc"))
        assert found["srocc_c"] == pytest.approx(1)
        assert score("mean") == pytest.approx(0)
        assert score("mean", w_c=0) == score("quality") == -math.inf
        assert score("consistency") == score("mean", w_q=0) == pytest.approx(1)


def test_undefined_metrics_are_null_in_json(train, data, tmp_path, capsys):
    """Where all human scores are equal, SROCC is null in JSON, said, and never the best."""
    rows = [{**row, "mos_align": 2.5} for row in data.rows]
    same = SimpleNamespace(csv=write_csv(tmp_path / "same.csv", rows), images=data.images)
    run = train("--freeze_clip", "--lr", 1e-2, data=same)
    lines = capsys.readouterr().out.splitlines()
    assert any("SROCC_C is undefined" in line for line in lines) and "NaN" not in lines[-1]
    result = read_json(run.folder / "result.json")
    assert json.loads(lines[-1]) == result
    assert result["val_srocc_c"] is None and result["gap_c"] is None
    assert isinstance(result["val_srocc_q"], float) and result["tier_c"] == "needs work"
    assert run.row["best_epoch"] == 0 and math.isnan(run.row["val_srocc_c"])


# --- log and predictions --------------------------------------------------------------------


def predicted(folder, part="val"):
    """Return a part's predictions and human scores as written, as arrays."""
    rows = read_csv(folder / f"{part}_predictions.csv")
    return {k: np.array([float(row[k]) for row in rows]) for k in rows[0]
            if k not in ("name", "prompt")}


def test_training_losses_equal_recomputed_ones(build):
    """With a standing model, the epoch's mean losses are those of all training images."""
    run = build("--freeze_clip", "--lr", 1e-30, "--dropout", 0, "--augment", "none", "--epochs", 1,
                "--use_explanations", "--w_q", 0.3, "--w_c", 0.6, "--w_exp", 0.2)
    pred, found = baseline.evaluate(run, "train")
    views = baseline.plan_views(pred.index.to_numpy())
    with torch.no_grad():
        out = baseline.forward(run, run.scorer, *next(baseline.inputs(run, [views])))
    ids = run.table.frame["explanation_id"].to_numpy()[views.row]
    cosine = torch.cosine_similarity(out["explanation"][ids >= 0], run.teacher[views.row[ids >= 0]])
    want = {f"loss_{t}": found[f"rmse_{t}"] ** 2 for t in "qc"}
    want["loss_exp"] = float((1 - cosine).mean())
    want["loss"] = 0.3 * want["loss_q"] + 0.6 * want["loss_c"] + 0.2 * want["loss_exp"]
    got = baseline.train_one_epoch(run, 1)
    assert got == pytest.approx({**found, **want}, rel=1e-5)


def test_predictions_are_clamped_and_the_result_follows_from_them(train, data, monkeypatch):
    """Scores for people lie in 0..scale, each target on its own; metrics are those of the file."""
    evaluate = baseline.evaluate

    def wide(run, part):
        pred, found = evaluate(run, part)
        return pred.assign(q_base=np.linspace(-0.5, 1.5, len(pred)), c_base=-0.25), found
    monkeypatch.setattr(baseline, "evaluate", wide)
    run = train(*PARTIAL, "--lr", 1e-3, "--epochs", 1, "--label_scale_q", 10, "--label_scale_c", 6,
                "--w_q", 0.7, "--w_c", 0.2)
    rows, table = read_csv(run.folder / "val_predictions.csv"), predicted(run.folder)
    base = np.linspace(-0.5, 1.5, len(rows))
    assert table["quality_base"] == pytest.approx(base.clip(0, 1) * 10, abs=1e-4)
    assert (table["consistency_base"] == 0).all()
    given = {row["name"]: row for row in data.rows}
    for row in rows:
        assert all(row[k] == str(given[row["name"]][k]) for k in ("prompt", "mos_quality",
                                                                  "mos_align"))
    for t, score, mos in (("q", table["quality"] / 10, table["mos_quality"] / 10),
                          ("c", table["consistency"] / 6, table["mos_align"] / 6)):
        assert run.row[f"val_srocc_{t}"] == pytest.approx(scipy.stats.spearmanr(score, mos)[0])
        assert run.row[f"val_rmse_{t}"] == pytest.approx(
            math.sqrt(((score - mos) ** 2).mean()), abs=1e-4)
    row, = read_csv(run.folder / "training_log.csv")
    loss = 0.7 * float(row["val_rmse_q"]) ** 2 + 0.2 * float(row["val_rmse_c"]) ** 2
    assert float(row["val_loss"]) == pytest.approx(loss, rel=1e-6)


# --- checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_the_best_and_the_last_checkpoint_are_one_file(train, monkeypatch, links):
    """An epoch that is the best is written once, as two names, or copied where there are none."""
    def refuse(*args, **kwargs):
        raise OSError("no such thing here")
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for scores, best in (([0.1, 0.2, 0.3], True), ([0.1, 0.3, 0.2], False)):
        script = iter(scores)
        monkeypatch.setattr(baseline, "selection_score", lambda values, by: next(script))
        folder = train("--freeze_clip", "--lr", 1e-2, out=str(best)).folder
        top, last = folder / "baseline_best.pt", folder / "baseline_last.pt"
        assert (top.read_bytes() == last.read_bytes()) is best
        assert top.samefile(last) is (best and links)
        assert load(folder)["progress"]["epoch"] == 2


# --- resuming -------------------------------------------------------------------------------


class Killed(BaseException):
    """Stand for a kill: nothing of the program may catch it."""


@pytest.fixture
def killed_run(train, monkeypatch, tmp_path):
    """Train and be killed in the third epoch; returns the output folder."""
    def make(*more, out="killed", **options):
        epoch = baseline.train_one_epoch

        def die(run, number):
            found = epoch(run, number)
            if number == 3:  # the epoch changed weights, but was not finished
                raise Killed
            return found
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(baseline, "train_one_epoch", die)
            train(*more, out=out, **options)
        return tmp_path / out
    return make


def without(row, *names):
    """Return a dictionary without what may differ: times, places and the keys named."""
    return {k: v for k, v in row.items() if k not in ("seconds", "time", "output_dir", "checkpoint",
                                                      "command", *names)}


def assert_same_run(a, b):
    """Compare two output folders bit for bit, times and places aside."""
    for name in ("baseline_last.pt", "baseline_best.pt"):
        assert same_tensors(*(load(folder, name)["state"] for folder in (a, b)))
    logs = [[without(row) for row in read_csv(f / "training_log.csv")] for f in (a, b)]
    assert logs[0] == logs[1]
    assert without(read_json(a / "result.json")) == without(read_json(b / "result.json"))
    assert (a / "val_predictions.csv").read_bytes() == (b / "val_predictions.csv").read_bytes()


def test_a_checkpoint_is_written_while_the_next_epoch_trains(train, monkeypatch):
    """A slow disk holds up no epoch, and the weights that it gets are those of the epoch's end."""
    command = [*PARTIAL, "--lr", 1e-3, "--epochs", 3]
    whole, going_on = train(*command, out="whole"), threading.Event()
    save, update, waited = torch.save, baseline.update, []

    def slow(*args):
        epoch = args[0]["progress"]["epoch"]
        going_on.clear()
        waited.append((epoch, epoch == 3 or going_on.wait(20)))
        save(*args)
    monkeypatch.setattr(torch, "save", slow)
    monkeypatch.setattr(baseline, "update", lambda *args: (update(*args), going_on.set()))
    slowed = train(*command, out="slow")
    assert waited == [(epoch, True) for epoch in range(4)]
    assert_same_run(whole.folder, slowed.folder)


@pytest.mark.parametrize("command, name, again", [
    (MODES["frozen"], "last", None), (MODES["full"], "last", None), (PARTIAL, "last", None),
    ([*PARTIAL, "--augment", "crop", "--grad_accum_steps", 2, "--use_explanations",
      "--use_refinement", "--refinement_layers", 1, "--refinement_dim", 32], "last", None),
    *(([*PARTIAL, "--precision", "auto", "--label_scale_q", "auto"], *case) for case in (
        ("best", []), ("last", ["--cache", "auto", "--num_workers", 1, "--no_pin_memory"])))])
def test_a_resumed_run_equals_an_uninterrupted_one(train, killed_run, command, name, again):
    """Killed in epoch 3 of 4 and resumed: the same weights, log and result, bit for bit.

    again: flags that cannot change the result, after the whole command, None: no flag at all.
    """
    command = [*command, "--lr", 1e-3, "--epochs", 4, "--dropout", 0.2]
    whole, folder = train(*command, out="whole"), killed_run(*command)
    assert len(read_csv(folder / "training_log.csv")) == 2
    resume = ["--resume_from", folder / f"baseline_{name}.pt"]
    row = (baseline.main(resume) if again is None else
           train(*command, *again, *resume, out="killed").row)
    assert row["output_dir"] == str(folder) and row["epochs_run"] == 4
    assert read_json(folder / "result.json")["command"].startswith("--data_csv_path")
    assert_same_run(whole.folder, folder)


def test_resuming_into_another_folder(train, killed_run, tmp_path):
    """The run goes on there; what it came from stays, what was there is kept in the archive."""
    command = ["--freeze_clip", "--lr", 1e-12, "--epochs", 4]  # epoch 0 stays the best
    old = train("--freeze_clip", "--lr", 1e-2, "--epochs", 1, out="elsewhere")
    kept = (old.folder / "baseline_best.pt").read_bytes()
    whole, folder = train(*command, out="whole"), killed_run(*command)
    before = (folder / "baseline_last.pt").read_bytes()
    train(*command, "--resume_from", folder / "baseline_last.pt", out="elsewhere")
    assert_same_run(whole.folder, tmp_path / "elsewhere")
    assert (folder / "baseline_last.pt").read_bytes() == before
    assert kept in [p.read_bytes() for p in old.folder.glob("archive/*/baseline_best.pt")]


def test_resuming_a_finished_run_changes_nothing_and_contradictions_are_named(train, refused):
    """The same result and log; a flag that would change the result is refused by name."""
    first = train("--freeze_clip", "--lr", 1e-3)
    log = (first.folder / "training_log.csv").read_bytes()
    again = train("--resume_from", first.folder / "baseline_last.pt")
    assert (first.folder / "training_log.csv").read_bytes() == log
    assert without(first.row) == without(again.row)
    for flag, value in (("--lr", 1e-2), ("--batch_size", 4), ("--epochs", 9), ("--seed", 1),
                        ("--dropout", 0.5), ("--augment", "none"), ("--select_by", "quality"),
                        ("--val_ratio", 0.3)):
        said = refused("--resume_from", first.folder / "baseline_last.pt", flag, value)
        assert f"{flag} {value}" in said and "checkpoint:" in said


# --- numbers that go wrong ------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_image(refused, monkeypatch, data, tmp_path):
    """The error names the bad image, and the epoch before is kept."""
    losses, bad, calls = baseline.losses, data.rows[14], []

    def poison(out, batch):  # called once per epoch, as the batch is large
        found, hit = losses(out, batch), batch["c"] == np.float32(bad["mos_align"] / 5)
        calls.append(hit.any())
        return {**found, "c": found["c"].where(~hit, math.nan)} if len(calls) == 2 else found
    monkeypatch.setattr(baseline, "losses", poison)
    said = refused("--freeze_clip", "--epochs", 3, "--batch_size", 64, "--val_ratio", 0.1,
                   "--split_by", "image", "--seed", 1)
    assert [row["name"] for row in data.rows if row["name"] in said] == [bad["name"]] and calls[1]
    content = load(tmp_path / "out")
    assert content["progress"]["epoch"] == 1
    assert all(value.isfinite().all() for value in content["state"].values())
    assert len(read_csv(tmp_path / "out" / "training_log.csv")) == 1


@pytest.mark.parametrize("names, said", [
    (["compile", "grad_checkpointing"], [("compile", "grad_checkpointing")]),
    (["compile", "freeze_clip"], [("compile", "freeze_clip")]),
    (["grad_checkpointing", "freeze_clip"], [("grad_checkpointing", "freeze_clip")]),
    (["compile"], []), (["grad_checkpointing"], [])])
def test_flags_that_do_nothing_beside_others_are_said(train, capsys, names, said):
    """And they train all the same: nothing is compiled, nothing fails."""
    if said:
        train(*[f"--{flag}" for flag in names], "--epochs", 1)
    capsys.readouterr()
    baseline.parse_args([f"--{flag}" for flag in names])
    warned = [line for line in capsys.readouterr().err.splitlines() if "does nothing" in line]
    assert warned == [f"WARNING: --{flag} does nothing with --{other}" for flag, other in said]


# --- precision and repeatability ------------------------------------------------------------


@modes
def test_bf16_is_close_to_fp32(train, mode):
    """With bf16 towers the predictions are near those of fp32, but not the same."""
    runs = [train(*mode, "--lr", 1e-4, "--precision", p, "--epochs", 1, out=p)
            for p in ("fp32", "bf16")]
    one, two = (predicted(run.folder) for run in runs)
    for name in ("quality", "consistency"):
        assert np.abs(one[name] - two[name]).max() < 0.15
    logs = [read_csv(run.folder / "training_log.csv")[0]["train_loss"] for run in runs]
    assert logs[0] != logs[1]
    assert float(logs[0]) == pytest.approx(float(logs[1]), rel=0.05)


@pytest.mark.parametrize("clip, mode", [("vit", MODES["partial"]), ("modified_resnet", [])])
def test_compiled_training_equals_plain(train, monkeypatch, clip, mode):
    """--compile changes the speed alone, and torch compiles every graph that it asks for."""
    flags = [*mode, "--lr", 1e-3, "--dropout", 0, "--batch_size", 16, "--epochs", 1]
    plain = train(*flags, out="plain", clip=clip)
    compile_module, graphs = torch.nn.Module.compile, []

    def backend(graph, inputs):  # graphs are found but not turned into C++, which takes a compiler
        graphs.append(graph)
        return graph
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compile_module(m, backend=backend))
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = train(*flags, "--compile", out="compiled", clip=clip)
    assert len(graphs) >= 2
    a, b = (read_csv(run.folder / "training_log.csv")[0] for run in (plain, compiled))
    for name in ("train_loss", "val_loss"):
        assert float(b[name]) == pytest.approx(float(a[name]), abs=1e-5)


@modes
def test_one_seed_gives_the_same_bits_with_any_number_of_threads(train, mode):
    """The same command twice, with threads that decode or without; another seed differs."""
    command = [*mode, "--lr", 1e-3, "--dropout", 0.3, "--use_explanations", "--cache", "off",
               "--epochs", 1]
    one, two, threads = (train(*command, "--num_workers", n, out=out).folder
                         for n, out in ((0, "one"), (0, "two"), (2, "threads")))
    assert_same_run(one, two)
    assert_same_run(one, threads)
    other = train(*command, "--seed", 2 ** 40, out="other")  # as large as a time stamp, or larger
    assert other.row["seed"] == 2 ** 40
    assert not same_tensors(load(one)["state"], load(other.folder)["state"])


# --- presets --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(baseline.PRESETS))
def test_a_preset_sets_its_flags_and_explicit_ones_win(name):
    """A preset's values hold, except those that the command line names, even at their default."""
    default, plain = (vars(baseline.parse_args(words)) for words in ([], ["--preset", name]))
    names = {"preset", "explicit", "command"}
    assert plain == default | baseline.PRESETS[name] | {key: plain[key] for key in names}
    named = vars(baseline.parse_args(["--preset", name, "--epochs", str(default["epochs"]),
                                      "--dropout", str(default["dropout"])]))
    assert named == {**plain, **{key: named[key] for key in ("explicit", "command")},
                     "epochs": default["epochs"], "dropout": default["dropout"]}
    for flag, other in (("partial_freeze", "freeze_clip"), ("freeze_clip", "partial_freeze")):
        args = vars(baseline.parse_args(["--preset", name, f"--{flag}"]))
        assert args[flag] and not args[other]  # another way of freezing replaces the preset's


# --- results --------------------------------------------------------------------------------


@pytest.mark.parametrize("more, parts", [([], ["train", "val"]),
                                         (["--test_ratio", 0.2], ["train", "val", "test"])])
def test_the_last_line_is_the_result(train, monkeypatch, capsys, more, parts):
    """The last line on stdout is JSON with all that a script wants; result.json is the same."""
    assert baseline.TIERS == {
        "q": (("excellent", 0.90, 0.02), ("good", 0.87, 0.03), ("fair", 0.85, 0.05)),
        "c": (("excellent", 0.88, 0.02), ("good", 0.85, 0.03), ("fair", 0.82, 0.05))}
    monkeypatch.setattr(baseline, "TIERS", {  # a tier needs both its SROCC and its gap
        "q": (("excellent", 2, 9), ("good", -2, -9), ("fair", -2, 9)),
        "c": (("excellent", -2, -9), ("good", 2, 9))})
    capsys.readouterr()
    run = train("--freeze_clip", "--lr", 1e-3, *more)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == read_json(run.folder / "result.json") == run.row
    names = {f"{m}_{t}" for m in ("srocc", "plcc", "krocc", "rmse") for t in "qc"}
    for part in ("train", "val", "test"):
        assert {k for k in result if k.startswith(f"{part}_")} == (
            {f"{part}_{name}" for name in names} if part in parts else set())
    for t in "qc":
        gap = result[f"train_srocc_{t}"] - result[f"val_srocc_{t}"]
        assert result[f"gap_{t}"] == pytest.approx(gap)
    assert (result["tier_q"], result["tier_c"]) == ("fair", "needs work")
    assert result["part"] == parts[-1] and result["best_epoch"] in (0, 1, 2)
    assert result["output_dir"] == str(run.folder) and result["seconds"] > 0
    assert result["checkpoint"] == str(run.folder / "baseline_best.pt")


def test_train_metrics_are_in_eval_mode_on_original_views(train, build, monkeypatch):
    """The Train-Val Gap compares like with like: no dropout, no flips, the best weights."""
    monkeypatch.setattr(baseline, "selection_score", lambda values, by: -values["rmse_q"])
    command = ["--freeze_clip", "--lr", 1e-3, "--dropout", 0.5, "--augment", "flip"]
    done = train(*command)
    run = build(*command, out="again")
    run.scorer.load_state_dict(load(done.folder, "baseline_best.pt")["state"], strict=False)
    pred, _ = baseline.evaluate(run, "train")
    want = baseline.metrics(pred, run.table.frame.iloc[run.parts["train"]])
    assert done.row["best_epoch"] > 0
    assert {name: done.row[f"train_{name}"] for name in want} == pytest.approx(want)


def test_the_test_part_is_seen_only_at_the_end(train, monkeypatch):
    """No test image is predicted before training is over, and none is trained on."""
    calls, evaluate, epoch = [], baseline.evaluate, baseline.train_one_epoch

    def note_evaluate(run, part):
        pred, found = evaluate(run, part)
        calls.append(bool(set(pred.index) & set(run.parts["test"])))
        return pred, found

    def note_epoch(run, number):
        calls.append("epoch")
        views = baseline.plan_views(run.parts["train"], run.args, run.seed, number)
        assert set(views.row).isdisjoint(run.parts["test"]) and len(views) == len(set(views.row))
        return epoch(run, number)
    monkeypatch.setattr(baseline, "evaluate", note_evaluate)
    monkeypatch.setattr(baseline, "train_one_epoch", note_epoch)
    train("--freeze_clip", "--test_ratio", 0.2, "--epochs", 3)
    last = len(calls) - 1 - calls[::-1].index("epoch")
    assert True not in calls[:last + 1] and calls.count(True) == 1


def test_an_old_run_is_archived_whole_but_not_by_a_refused_command(train, refused, data, tmp_path):
    """A second run in the same folder keeps the first one's files, byte for byte."""
    folder = train("--freeze_clip", "--lr", 1e-3, "--test_ratio", 0.2).folder
    names = ["baseline_best.pt", "baseline_last.pt", "config.json", "result.json",
             "training_log.csv", "val_predictions.csv", "test_predictions.csv"]
    old = {name: (folder / name).read_bytes() for name in names}
    refused("--freeze_clip", data=SimpleNamespace(csv=tmp_path / "none.csv", images=data.images))
    assert (folder / "result.json").exists() and not (folder / "archive").exists()
    train("--freeze_clip", "--lr", 1e-2)
    kept, = (folder / "archive").iterdir()
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == old
    assert (folder / "result.json").read_bytes() != old["result.json"]
    assert not (folder / "test_predictions.csv").exists()
    train("--freeze_clip", "--lr", 1e-2)
    assert len(list((folder / "archive").iterdir())) == 2


def test_runs_csv_keeps_the_columns_and_texts_of_every_run(train):
    """Runs with and without a test part share the file; what stood there stays as it was."""
    runs = [train("--freeze_clip", "--epochs", 1)]
    path = runs[0].folder / "runs.csv"
    first, = read_csv(path)
    first |= {"note": "007", "by": 'NA, "1e3"', "seed": "42.0"}  # a column of the user's, too
    write_csv(path, [first], list(first))
    for more in (["--test_ratio", 0.2], ["--no_residual_learning"], []):
        runs.append(train("--freeze_clip", "--epochs", 1, "--lr", 1e-2, *more))
    rows = read_csv(path)
    assert len(rows) == 4 and {k: v for k, v in rows[0].items() if v or k in first} == first
    for row, run in zip(rows, runs):
        for name, value in run.row.items():
            if name not in ("advice", "seed"):
                assert row[name] == str(value) or float(row[name] or "nan") == value or (
                    row[name] == "" and math.isnan(value))  # a fit that too few images allow
        assert {k for k, v in row.items() if v} <= set(run.row) | {"note", "by"}
    assert rows[2]["largest_delta_q"] == rows[0]["test_srocc_q"] == rows[1]["note"] == ""
    assert "--lr 0.01" in rows[1]["command"] and "--freeze_clip" in rows[1]["command"]
