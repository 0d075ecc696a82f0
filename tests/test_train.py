"""Training does what its flags say, its files hold what happened, and a killed run goes on."""

import errno
import itertools
import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import COLUMNS, load, read_csv, read_json, same_tensors, write_csv

import baseline

PARTIAL = ["--partial_freeze", "--freeze_layers", 2]
MODES = {"frozen": ["--freeze_clip"], "partial": PARTIAL, "full": []}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def largest_difference(a, b):
    """Return the largest difference between two dictionaries of the same tensors.

    A key's bias has no gradient (softmax does not see it), and Adam blows its rounding noise up.
    """
    assert a.keys() == b.keys()

    def values(name, state):
        value = state[name].float()
        return value[[0, 2]] if name.endswith("in_proj_bias") else value
    a, b = ({k: v.view(3, -1) if k.endswith("in_proj_bias") else v for k, v in state.items()}
            for state in (a, b))
    return max(float((values(k, a) - values(k, b)).abs().max()) for k in a)


# --- accumulation ---------------------------------------------------------------------------


@pytest.mark.parametrize("big, small, steps", [(8, 4, 2), (28, 8, 4), (12, 3, 4)])
def test_accumulation_equals_the_big_batch(train, monkeypatch, big, small, steps):
    """A window of small batches is one big batch, also where the last window is shorter."""
    common = [*PARTIAL, "--dropout", 0, "--epochs", 1, "--use_explanations", "--w_exp", 1,
              "--lr", 1e-4, "--warmup_ratio", 0]
    monkeypatch.setattr(baseline, "selection_score", lambda values, by: 0.0)  # epoch 0 is best
    one = train(*common, "--batch_size", big, out="big")
    start_file = one.folder / "baseline_best.pt"
    two = train(*common, "--batch_size", small, "--grad_accum_steps", steps, out="small")
    a, b = load(one.folder)["state"], load(two.folder)["state"]
    start = torch.load(start_file, weights_only=True)["state"]
    assert largest_difference(a, b) <= 1e-6 and largest_difference(a, start) > 1e-4
    rows = [read_csv(run.folder / "training_log.csv")[0] for run in (one, two)]
    for name in ("train_loss", "train_loss_q", "train_loss_c", "train_loss_exp"):
        assert float(rows[0][name]) == pytest.approx(float(rows[1][name]), abs=1e-5)


# --- optimiser and schedule -----------------------------------------------------------------


def expected_factor(scheduler, update, per_epoch, epochs, warmup_ratio, size=1, gamma=0.1):
    """Return the documented factor of the learning rate at an update, counted from 0."""
    total = per_epoch * epochs
    warmup = round(warmup_ratio * total)
    if update < warmup:
        return (update + 1) / warmup
    done = (update - warmup) / (total - warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1,
            "step": gamma ** (update // per_epoch // size)}[scheduler]


@pytest.mark.parametrize("warmup", [0, 0.1, 0.25])
@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant", "step"])
def test_schedules_follow_their_formulas(scheduler, warmup):
    """Every update's factor is that of the formula: a ramp, then the curve."""
    args = SimpleNamespace(epochs=6, warmup_ratio=warmup, scheduler=scheduler,
                           step_lr_step_size=2, step_lr_gamma=0.5)
    got = [baseline.lr_factor(u, 10, args) for u in range(60)]
    want = [expected_factor(scheduler, u, 10, 6, warmup, 2, 0.5) for u in range(60)]
    assert got == pytest.approx(want)
    assert max(got) == 1 and min(got) > 0


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant", "step"])
def test_the_schedule_is_what_the_optimiser_gets(train, monkeypatch, scheduler):
    """Both groups' learning rates are their peaks times the formula, at every update."""
    seen, step = [], torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        seen.append([(g["base_lr"], g["lr"]) for g in self.param_groups])
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    run = train(*PARTIAL, "--scheduler", scheduler, "--epochs", 3, "--warmup_ratio", 0.2,
                "--lr", 2e-5, "--head_lr", 1e-3, "--grad_accum_steps", 2)
    assert len(seen) == 6  # 28 images: 4 batches, 2 updates per epoch
    for update, groups in enumerate(seen):
        factor = expected_factor(scheduler, update, 2, 3, 0.2)
        assert {base for base, _ in groups} == {2e-5, 1e-3}
        assert all(lr == pytest.approx(base * factor) for base, lr in groups)
    log = [float(row["lr"]) for row in read_csv(run.folder / "training_log.csv")]
    want = [2e-5 * expected_factor(scheduler, u, 2, 3, 0.2) for u in (1, 3, 5)]
    assert log == pytest.approx(want)


@modes
def test_groups_hold_every_trained_parameter_once(build, mode):
    """CLIP gets lr, heads get head_lr; matrices decay, norms, biases and scalars do not."""
    run = build(*mode, "--lr", 2e-5, "--head_lr", 5e-3, "--weight_decay", 0.3, "--use_refinement")
    names = {id(p): n for n, p in run.scorer.named_parameters() if p.requires_grad}
    found = []
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            found.append(name)
            assert group["base_lr"] == (2e-5 if name.startswith("clip.") else 5e-3), name
            assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0), name
    assert sorted(found) == sorted(names.values())
    assert not any("logit_scale" in name for name in found)
    assert any(name.startswith("clip.") for name in found) == (mode != ["--freeze_clip"])


def test_decay_shrinks_matrices_only(build):
    """With zero gradients, an update multiplies matrices by 1 - lr * decay and nothing else."""
    run = build("--lr", 0.01, "--head_lr", 0.01, "--weight_decay", 0.5, "--max_grad_norm", 0)
    before = {n: p.detach().clone() for n, p in run.scorer.named_parameters()}
    for parameter in run.scorer.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    baseline.apply_update(run, 0.5)
    for name, parameter in run.scorer.named_parameters():
        shrink = 1 - 0.005 * 0.5 if parameter.ndim > 1 and parameter.requires_grad else 1
        assert torch.allclose(parameter, before[name] * shrink, rtol=1e-6, atol=0), name


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
    baseline.apply_update(run, 1.0)
    moments = [run.optimizer.state[p]["exp_avg"] for p in parameters]
    taken = sum((m ** 2).sum() for m in moments) ** 0.5 / (1 - run.optimizer.defaults["betas"][0])
    assert taken.item() == pytest.approx(norm, rel=1e-3)
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("more", [[], ["--no_residual_learning"], ["--use_two_branch"],
                                  ["--use_refinement", "--refinement_layers", 1],
                                  ["--use_two_branch", "--no_residual_learning"],
                                  ["--use_explanations"], ["--grad_checkpointing"]])
@pytest.mark.parametrize("mode", ["frozen", "partial"])
def test_every_head_learns(train, mode, more):
    """With every choice of heads the training loss falls and all numbers are finite."""
    run = train(*MODES[mode], *more, "--epochs", 6, "--lr", 1e-3, "--dropout", 0, "--augment",
                "none", "--no_base_calibration")
    log = read_csv(run.folder / "training_log.csv")
    assert float(log[-1]["train_loss"]) < 0.9 * float(log[0]["train_loss"])
    assert all(math.isfinite(float(value)) for row in log for value in row.values())


# --- selection and early stopping -----------------------------------------------------------


def script_scores(monkeypatch, scores):
    """Make the scores that pick the best epoch a given sequence, epoch 0 first."""
    scores = iter(scores)
    monkeypatch.setattr(baseline, "selection_score", lambda values, by: next(scores))


def test_early_stopping_waits_and_keeps_the_best(train, monkeypatch):
    """Training stops after `patience` epochs without a gain; the best epoch's weights count."""
    script_scores(monkeypatch, [0.1, 0.2, 0.5, 0.3, 0.4, 0.45, 0.9, 0.9])
    run = train("--freeze_clip", "--lr", 1e-2, "--epochs", 8, "--early_stopping_patience", 3)
    assert run.summary["epochs_run"] == 5 and run.summary["best_epoch"] == 2
    assert load(run.folder, "baseline_best.pt")["progress"]["epoch"] == 2
    log = read_csv(run.folder / "training_log.csv")
    assert len(log) == 5
    assert float(log[1]["val_srocc_q"]) == run.summary["val"]["srocc_q"]
    assert [float(row["best"]) for row in log] == [0.2, 0.5, 0.5, 0.5, 0.5]


def test_gains_below_min_delta_do_not_count(train, monkeypatch):
    """A gain that is too small does not reset the patience."""
    script_scores(monkeypatch, [0.1, 0.21, 0.25, 0.28, 0.5, 0.6])
    run = train("--freeze_clip", "--epochs", 5, "--early_stopping_patience", 2,
                "--early_stopping_min_delta", 0.1)
    assert run.summary["epochs_run"] == 3


def test_no_patience_no_early_stopping(train, monkeypatch):
    """With patience 0 all epochs run."""
    script_scores(monkeypatch, [0.9, 0.1, 0.1, 0.1, 0.1])
    run = train("--freeze_clip", "--epochs", 4)
    assert run.summary["epochs_run"] == 4 and run.summary["best_epoch"] == 0


@pytest.mark.parametrize("by", ["mean", "quality", "consistency"])
def test_select_by_picks_its_own_best_epoch(train, by):
    """The best epoch is the first one with the largest chosen SROCC, epoch 0 included."""
    run = train(*PARTIAL, "--lr", 1e-2, "--epochs", 8, "--select_by", by)
    log = read_csv(run.folder / "training_log.csv")
    start = run.summary["start"]
    q = [start["srocc_q"]] + [float(row["val_srocc_q"]) for row in log]
    c = [start["srocc_c"]] + [float(row["val_srocc_c"]) for row in log]
    score = {"quality": q, "consistency": c, "mean": [(a + b) / 2 for a, b in zip(q, c)]}[by]
    assert run.summary["best_epoch"] == int(np.argmax(score))
    assert len(set(score)) > 2
    assert float(log[-1]["best"]) == pytest.approx(max(score))
    assert run.summary["val"]["srocc_q"] == pytest.approx(q[run.summary["best_epoch"]])


def test_undefined_scores_are_never_the_best():
    """A NaN SROCC scores minus infinity where it is asked for, and only there."""
    values = {"srocc_q": 0.5, "srocc_c": math.nan}
    assert baseline.selection_score(values, "mean") == -math.inf
    assert baseline.selection_score(values, "consistency") == -math.inf
    assert baseline.selection_score(values, "quality") == 0.5
    assert baseline.selection_score({"srocc_q": 0.5, "srocc_c": 0.1}, "mean") == 0.3


# --- metrics --------------------------------------------------------------------------------


def tau_b(x, y):
    """Return Kendall's tau-b by its definition."""
    pairs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j]))
             for i, j in itertools.combinations(range(len(x)), 2)]
    both = sum(a * b for a, b in pairs)
    return both / math.sqrt(sum(a != 0 for a, _ in pairs) * sum(b != 0 for _, b in pairs))


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_equal_their_definitions(ties):
    """SROCC, PLCC, KROCC and RMSE equal reference computations, also with ties."""
    rng = np.random.default_rng(0)
    pred, mos = rng.random(60), rng.random(60)
    if ties:
        pred, mos = pred.round(1), mos.round(1)
    ranks = [scipy.stats.rankdata(v) for v in (pred, mos)]
    assert baseline.srocc(pred, mos) == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert baseline.srocc(pred, mos) == pytest.approx(scipy.stats.spearmanr(pred, mos)[0])
    assert baseline.plcc(pred, mos) == pytest.approx(np.corrcoef(pred, mos)[0, 1])
    assert baseline.krocc(pred, mos) == pytest.approx(tau_b(pred, mos))
    assert baseline.rmse(pred, mos) == pytest.approx(math.sqrt(((pred - mos) ** 2).mean()))


@pytest.mark.parametrize("name", ["srocc", "plcc", "krocc"])
def test_correlations_of_constants_are_nan(name):
    """A constant side, or a prediction that is not finite, has no correlation."""
    function, x = getattr(baseline, name), np.arange(5.0)
    assert math.isnan(function(np.ones(5), x)) and math.isnan(function(x, np.ones(5)))
    assert math.isnan(function(np.array([1, 2, math.nan, 4, 5]), x))


def test_undefined_metrics_are_null_in_json(train, data, tmp_path, capsys):
    """Where all human scores are equal, SROCC is null in JSON, said, and never the best."""
    rows = [{**row, "mos_align": 2.5} for row in data.rows]
    same = SimpleNamespace(csv=write_csv(tmp_path / "same.csv", rows), images=data.images)
    run = train("--freeze_clip", "--lr", 1e-2, data=same)
    lines = capsys.readouterr().out.splitlines()
    assert any("SROCC_C is undefined" in line and "2.5" not in line.split("undefined")[0]
               for line in lines)
    def refuse(constant):
        raise ValueError(constant)
    printed = json.loads(lines[-1], parse_constant=refuse)
    result = read_json(run.folder / "result.json")
    for content in (printed, result):
        assert content["val"]["srocc_c"] is None and content["gap_c"] is None
        assert isinstance(content["val"]["srocc_q"], float)
        assert content["tier_c"] == "needs work"
    assert run.summary["best_epoch"] == 0


def test_tiers_follow_the_card():
    """A tier needs both its SROCC and its gap."""
    tier = baseline.tier
    assert [tier("q", v, 0.01) for v in (0.91, 0.88, 0.86, 0.5)] == [
        "excellent", "good", "fair", "needs work"]
    assert [tier("c", v, 0.01) for v in (0.89, 0.86, 0.83, 0.5)] == [
        "excellent", "good", "fair", "needs work"]
    assert [tier("q", 0.95, gap) for gap in (0.01, 0.025, 0.04, 0.06)] == [
        "excellent", "good", "fair", "needs work"]
    assert tier("q", math.nan, math.nan) == "needs work"


# --- log and predictions --------------------------------------------------------------------


def test_log_has_one_row_per_epoch_and_exactly_its_columns(train):
    """The log's header is LOG_COLUMNS; its rows are the epochs in order."""
    run = train("--freeze_clip", "--epochs", 3, "--log_csv", "mine.csv")
    lines = (run.folder / "mine.csv").read_text().splitlines()
    assert lines[0].split(",") == list(baseline.LOG_COLUMNS)
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3"]
    assert not (run.folder / "training_log.csv").exists()


def predicted(folder, part="val"):
    """Return a part's predictions and human scores as written, as arrays."""
    rows = read_csv(folder / f"{part}_predictions.csv")
    return {k: np.array([float(row[k]) for row in rows]) for k in rows[0]
            if k not in ("name", "prompt")}


def test_metrics_and_losses_follow_from_the_predictions(train):
    """Validation metrics and loss in the result equal those recomputed from the CSV."""
    run = train(*PARTIAL, "--lr", 1e-3, "--epochs", 3, "--w_q", 0.7, "--w_c", 0.2,
                "--label_scale_c", 8)
    table, val = predicted(run.folder), run.summary["val"]
    sides = {"q": (table["quality"] / 5, table["mos_quality"] / 5),
             "c": (table["consistency"] / 8, table["mos_align"] / 8)}
    for target, (pred, mos) in sides.items():
        assert val[f"srocc_{target}"] == pytest.approx(scipy.stats.spearmanr(pred, mos)[0])
        assert val[f"plcc_{target}"] == pytest.approx(np.corrcoef(pred, mos)[0, 1], abs=1e-3)
        assert val[f"rmse_{target}"] == pytest.approx(
            math.sqrt(((pred - mos) ** 2).mean()), abs=1e-4)
    log = read_csv(run.folder / "training_log.csv")
    best = run.summary["best_epoch"]
    if best:
        loss = 0.7 * val["rmse_q"] ** 2 + 0.2 * val["rmse_c"] ** 2
        assert float(log[best - 1]["val_loss"]) == pytest.approx(loss, rel=1e-5)
    for row in log:
        loss = 0.7 * float(row["val_rmse_q"]) ** 2 + 0.2 * float(row["val_rmse_c"]) ** 2
        assert float(row["val_loss"]) == pytest.approx(loss, rel=1e-6)


def test_training_losses_equal_recomputed_ones(build):
    """With a standing model, the epoch's mean losses are those of all training images."""
    run = build("--freeze_clip", "--lr", 1e-30, "--dropout", 0, "--augment", "none", "--epochs", 1,
                "--use_explanations", "--w_q", 0.3, "--w_c", 0.6, "--w_exp", 0.2)
    rows = run.parts["train"]
    pred, mos = baseline.evaluate(run, rows), baseline.human(run.table, rows)
    with torch.no_grad():
        view = baseline.plain_views(rows, len(rows))[0]
        out = baseline.forward(run, view, next(run.images.stream([view])))
    ids = run.table.explanation_id[rows]
    has = ids >= 0
    cosine = torch.cosine_similarity(out["explanation"][has], run.teacher[ids[has]])
    want = {"q": np.mean((pred["q"] - mos["q"]) ** 2), "c": np.mean((pred["c"] - mos["c"]) ** 2),
            "exp": float((1 - cosine).mean())}
    got = baseline.train_one_epoch(run, 1)
    for name, value in want.items():
        assert got[f"train_loss_{name}"] == pytest.approx(value, rel=1e-5)
    assert got["train_loss"] == pytest.approx(
        0.3 * want["q"] + 0.6 * want["c"] + 0.2 * want["exp"], rel=1e-5)
    assert got["train_srocc_q"] == pytest.approx(baseline.srocc(pred["q"], mos["q"]))
    assert got["train_rmse_c"] == pytest.approx(baseline.rmse(pred["c"], mos["c"]), rel=1e-5)


def test_predictions_are_clamped_and_on_the_mos_scale(build, tmp_path):
    """Scores for people lie in 0..scale, each target on its own scale."""
    run = build("--freeze_clip", "--label_scale_q", 10, "--label_scale_c", 6)
    count = len(run.parts["val"])
    pred = {"q": np.linspace(-0.5, 1.5, count), "c": np.linspace(1.2, 0.2, count),
            "q_base": np.full(count, 0.25), "c_base": np.full(count, -0.25)}
    (tmp_path / "out").mkdir(exist_ok=True)
    baseline.write_predictions(run, "val", pred)
    rows, table = read_csv(tmp_path / "out" / "val_predictions.csv"), predicted(tmp_path / "out")
    assert table["quality"] == pytest.approx(np.clip(pred["q"], 0, 1) * 10, abs=1e-4)
    assert table["consistency"] == pytest.approx(np.clip(pred["c"], 0, 1) * 6, abs=1e-4)
    assert (table["quality_base"] == 2.5).all() and (table["consistency_base"] == 0).all()
    frame = run.table.frame.iloc[run.parts["val"]]
    assert [row["name"] for row in rows] == frame["name"].tolist()
    assert [row["mos_align"] for row in rows] == frame["mos_align"].tolist()


# --- checkpoints ----------------------------------------------------------------------------


def test_checkpoints_hold_only_what_trains(train):
    """A frozen run's checkpoint is small and holds no CLIP weight; a partial one no frozen one."""
    folder = train("--freeze_clip", "--epochs", 1, out="a").folder
    assert not any(name.startswith("clip.") for name in load(folder)["state"])
    assert (folder / "baseline_last.pt").stat().st_size < 1e6
    state = load(train(*PARTIAL, "--epochs", 1, out="b").folder)["state"]
    names = {name for name in state if name.startswith("clip.")}
    assert {n.split("resblocks.")[1][0] for n in names if "resblocks" in n} == {"2", "3"}
    assert not any("embedding" in n or "conv1" in n or "logit_scale" in n for n in names)
    assert {"clip.visual.proj", "clip.text_projection", "clip.ln_final.weight"} <= names


@pytest.mark.parametrize("broken", [OSError(errno.ENOSPC, "No space left on device")])
def test_a_full_disk_leaves_the_last_checkpoint_whole(train, refused, monkeypatch, tmp_path,
                                                      broken):
    """A checkpoint is replaced whole or not at all."""
    save, epochs = torch.save, []

    def fail(content, handle):
        epochs.append(content["progress"]["epoch"])
        if epochs[-1] == 2:
            handle.write(b"half")
            raise broken
        save(content, handle)
    monkeypatch.setattr(torch, "save", fail)
    said = refused("--freeze_clip", "--epochs", 3)
    assert "No space left" in said and epochs[-1] == 2
    assert load(tmp_path / "out")["progress"]["epoch"] == 1
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


class Bomb:
    """A pickle of this runs code when it is loaded carelessly."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("how", ["pickle", "torch", "inside a checkpoint"])
def test_a_malicious_checkpoint_is_refused_and_does_not_run(refused, train, tmp_path, how):
    """A checkpoint that holds code is refused before the code runs."""
    bomb, path = Bomb(tmp_path / "exploded"), tmp_path / "evil.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif how == "torch":
        torch.save(bomb, path)
    else:
        content = load(train("--freeze_clip", "--epochs", 1).folder)
        torch.save({**content, "extra": bomb}, path)
    assert "evil.pt" in refused("--resume_from", path, out="other")
    assert not (tmp_path / "exploded").exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert (tmp_path / "exploded").exists()  # the bomb was live


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {"format": "other"}])
def test_another_programs_checkpoint_is_refused(refused, tmp_path, content):
    """A file of another program is refused by path."""
    torch.save(content, tmp_path / "foreign.pt")
    said = refused("--resume_from", tmp_path / "foreign.pt")
    assert "foreign.pt" in said and "baseline_last.pt" in said


def test_damaged_missing_and_newer_checkpoints_are_refused(refused, train, tmp_path):
    """A cut file, a missing one and one of another version each say what they are."""
    path = train("--freeze_clip", "--epochs", 1).folder / "baseline_last.pt"
    content, cut = load(path.parent), tmp_path / "cut.pt"
    cut.write_bytes(path.read_bytes()[:3000])
    assert "damaged" in refused("--resume_from", cut)
    assert "no file" in refused("--resume_from", tmp_path / "gone.pt")
    torch.save({**content, "version": 99}, tmp_path / "new.pt")
    assert "version 99" in refused("--resume_from", tmp_path / "new.pt")


# --- resuming -------------------------------------------------------------------------------


class Killed(BaseException):
    """Stand for a kill: nothing of the program may catch it."""


@pytest.fixture
def killed_run(train, monkeypatch, tmp_path):
    """Train and be killed in the middle of an epoch; returns the output folder."""
    def make(*more, epoch=3, out="killed", **options):
        stream = baseline.train_one_epoch

        def die(run, number):
            if number == epoch:
                stream(run, number)  # the epoch changed weights, but was not finished
                raise Killed
            return stream(run, number)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(baseline, "train_one_epoch", die)
            train(*more, out=out, **options)
        return tmp_path / out
    return make


def without(row, *names):
    """Return a dictionary without some keys."""
    return {key: value for key, value in row.items() if key not in names}


def assert_same_run(a, b):
    """Compare two output folders bit for bit, seconds and places aside."""
    for name in ("baseline_last.pt", "baseline_best.pt"):
        one, two = load(a, name), load(b, name)
        assert same_tensors(one["state"], two["state"])
        assert one["progress"]["best_epoch"] == two["progress"]["best_epoch"]
    logs = [[without(row, "seconds") for row in read_csv(f / "training_log.csv")] for f in (a, b)]
    assert logs[0] == logs[1]
    results = [without(read_json(f / "result.json"), "seconds", "output_dir") for f in (a, b)]
    assert results[0] == results[1]
    assert (a / "val_predictions.csv").read_bytes() == (b / "val_predictions.csv").read_bytes()


@pytest.mark.parametrize("more", [[], ["--augment", "crop", "--grad_accum_steps", 2,
                                       "--use_explanations", "--use_refinement",
                                       "--refinement_layers", 1, "--refinement_dim", 32]])
@modes
def test_a_resumed_run_equals_an_uninterrupted_one(train, killed_run, mode, more):
    """Killed in epoch 3 of 4 and resumed: the same weights, log and result, bit for bit."""
    command = [*mode, *more, "--lr", 1e-3, "--epochs", 4, "--dropout", 0.2]
    whole = train(*command, out="whole")
    folder = killed_run(*command)
    assert len(read_csv(folder / "training_log.csv")) == 2
    train("--epochs", 4, "--resume_from", folder / "baseline_last.pt", out="killed")
    assert_same_run(whole.folder, folder)


def test_resuming_from_the_best_checkpoint_equals_too(train, killed_run):
    """baseline_best.pt is as good a place to go on from as baseline_last.pt."""
    command = [*PARTIAL, "--lr", 1e-3, "--epochs", 4]
    whole, folder = train(*command, out="whole"), killed_run(*command)
    train("--epochs", 4, "--resume_from", folder / "baseline_best.pt", out="killed")
    assert_same_run(whole.folder, folder)


def test_resuming_into_another_folder(train, killed_run, tmp_path):
    """With another --output_dir the run goes on there, and what it came from stays as it is."""
    command = ["--freeze_clip", "--lr", 1e-12, "--epochs", 4]  # epoch 0 stays the best
    whole, folder = train(*command, out="whole"), killed_run(*command)
    before = (folder / "baseline_last.pt").read_bytes()
    train(*command, "--resume_from", folder / "baseline_last.pt", out="elsewhere")
    assert_same_run(whole.folder, tmp_path / "elsewhere")
    assert (folder / "baseline_last.pt").read_bytes() == before


def test_resuming_into_another_folder_archives_what_is_there(train, killed_run, tmp_path):
    """An earlier run in the folder that a resumed run is sent to is kept, not overwritten."""
    old = train("--freeze_clip", "--lr", 1e-2, "--epochs", 1, out="taken")
    kept = (old.folder / "baseline_best.pt").read_bytes()
    folder = killed_run("--freeze_clip", "--epochs", 4)
    train("--epochs", 4, "--resume_from", folder / "baseline_last.pt", out="taken")
    assert kept in [p.read_bytes() for p in old.folder.glob("archive/*/baseline_best.pt")]


def test_resume_needs_no_other_flag(killed_run, data):
    """--resume_from alone goes on with the checkpoint's settings, in the checkpoint's folder."""
    folder = killed_run("--freeze_clip", "--lr", 1e-3, "--epochs", 4)
    summary = baseline.main(["--resume_from", str(folder / "baseline_last.pt")])
    assert summary["output_dir"] == str(folder) and summary["epochs_run"] == 4
    assert [row["epoch"] for row in read_csv(folder / "training_log.csv")] == ["1", "2", "3", "4"]


def test_the_same_command_with_resume_from_goes_on(train, killed_run):
    """Repeating the whole command line, sentinels included, contradicts nothing."""
    command = ["--freeze_clip", "--epochs", 4, "--precision", "auto", "--label_scale_q", "auto",
               "--num_workers", 0, "--seed", 5]
    folder = killed_run(*command)
    run = train(*command, "--resume_from", folder / "baseline_last.pt", out="killed")
    assert run.summary["epochs_run"] == 4


def test_resuming_a_finished_run_changes_nothing(train):
    """There is nothing left to train, so the same result comes out and the log stays."""
    first = train("--freeze_clip", "--lr", 1e-3)
    log = (first.folder / "training_log.csv").read_bytes()
    again = train("--resume_from", first.folder / "baseline_last.pt")
    assert (first.folder / "training_log.csv").read_bytes() == log
    assert without(first.summary, "seconds") == without(again.summary, "seconds")


@pytest.mark.parametrize("flag, value", [("--lr", 1e-2), ("--batch_size", 4), ("--epochs", 9),
                                         ("--seed", 1), ("--dropout", 0.5), ("--augment", "none"),
                                         ("--select_by", "quality"), ("--val_ratio", 0.3)])
def test_contradicting_flags_are_named(refused, train, flag, value):
    """A flag that differs from the checkpoint's and changes the result is refused by name."""
    folder = train("--freeze_clip").folder
    said = refused("--resume_from", folder / "baseline_last.pt", flag, value)
    assert f"{flag} {value}" in said and "checkpoint:" in said


def test_free_flags_may_differ(train, killed_run):
    """Flags that cannot change the result may differ, and it does not change."""
    command = ["--freeze_clip", "--lr", 1e-3, "--epochs", 4]
    whole, folder = train(*command, out="whole"), killed_run(*command)
    train(*command, "--cache", "auto", "--num_workers", 1, "--no_pin_memory", "--resume_from",
          folder / "baseline_last.pt", out="killed")
    assert_same_run(whole.folder, folder)


def test_other_data_or_weights_are_refused_on_resume(refused, train, data, clips, tmp_path):
    """A resumed run must find the same images and the same CLIP."""
    path = train("--freeze_clip").folder / "baseline_last.pt"
    fewer = SimpleNamespace(csv=write_csv(tmp_path / "fewer.csv", data.rows[:-4]),
                            images=data.images)
    assert "split" in refused("--resume_from", path, data=fewer)
    weights = tmp_path / "other.safetensors"
    weights.write_bytes((clips("avg") / "open_clip_model.safetensors").read_bytes()[:-4] + b"abcd")
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in clips().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "open_clip_model.safetensors").write_bytes(weights.read_bytes())
    content = load(path.parent)
    content["args"]["clip_model"] = f"local-dir:{folder}"
    torch.save(content, path)
    assert "CLIP weights" in refused("--resume_from", path, clip=folder)


# --- numbers that go wrong ------------------------------------------------------------------


def all_finite(state):
    """Return whether every tensor of a state is finite."""
    return all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("batch_size", [8, 64])
@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_a_learning_rate_that_explodes_keeps_good_checkpoints(refused, tmp_path, mode, batch_size):
    """Exploding training stops, names images and a remedy, and leaves usable checkpoints."""
    said = refused(*MODES[mode], "--lr", 1e30, "--epochs", 4, "--batch_size", batch_size)
    assert "--lr" in said and "img_" in said and "finite" in said
    files = list((tmp_path / "out").glob("baseline_*.pt"))
    assert files and all(all_finite(load(p.parent, p.name)["state"]) for p in files)
    assert load(tmp_path / "out", "baseline_best.pt")["progress"]["best_score"] > -1


def test_a_loss_that_is_not_finite_names_its_images(refused, monkeypatch, data, tmp_path):
    """The error names the batch that held the bad image, and the epoch before is kept."""
    losses, epoch, bad = baseline.losses, baseline.train_one_epoch, data.rows[14]
    state = {"epoch": 0}

    def note(run, number):
        state["epoch"] = number
        return epoch(run, number)

    def poison(out, batch, args):
        sums, total = losses(out, batch, args)
        hit = (batch["c"] == np.float32(bad["mos_align"] / 5)).any()
        return sums, total * math.nan if hit and state["epoch"] == 2 else total
    monkeypatch.setattr(baseline, "train_one_epoch", note)
    monkeypatch.setattr(baseline, "losses", poison)
    said = refused("--freeze_clip", "--epochs", 3, "--batch_size", 4, "--val_ratio", 0.1,
                   "--split_by", "image", "--seed", 1)
    assert bad["name"] in said
    assert sum(row["name"] in said for row in data.rows) <= 4
    content = load(tmp_path / "out")
    assert content["progress"]["epoch"] == 1 and all_finite(content["state"])
    assert len(read_csv(tmp_path / "out" / "training_log.csv")) == 1


# --- precision and repeatability ------------------------------------------------------------


@pytest.mark.parametrize("cache", ["auto", "off"])
@modes
def test_bf16_is_close_to_fp32(train, mode, cache):
    """With bf16 towers the predictions are near those of fp32, but not the same."""
    runs = [train(*mode, "--lr", 1e-4, "--precision", p, "--cache", cache, out=p)
            for p in ("fp32", "bf16")]
    one, two = (predicted(run.folder) for run in runs)
    for name in ("quality", "consistency"):
        assert np.abs(one[name] - two[name]).max() < 0.15
    logs = [read_csv(run.folder / "training_log.csv")[0]["train_loss"] for run in runs]
    assert logs[0] != logs[1]
    assert float(logs[0]) == pytest.approx(float(logs[1]), rel=0.05)


@pytest.mark.parametrize("clip, mode", [("vit", MODES["partial"]), ("modified_resnet", [])])
def test_compiled_training_equals_plain(train, monkeypatch, clip, mode):
    """--compile changes the speed alone, and stays within the number of graphs torch allows."""
    flags = [*mode, "--lr", 1e-3, "--dropout", 0, "--batch_size", 16, "--epochs", 1]
    plain = train(*flags, out="plain", clip=clip)
    compile_module, graphs = torch.nn.Module.compile, []

    def trace(module):  # the graphs are found but not turned into C++, which takes a compiler
        def backend(graph, inputs):
            graphs.append(graph)
            return graph
        compile_module(module, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    torch.compiler.reset()
    compiled = train(*flags, "--compile", out="compiled", clip=clip)
    assert 2 <= len(graphs) <= 8
    a, b = (read_csv(run.folder / "training_log.csv")[0] for run in (plain, compiled))
    for name in ("train_loss", "val_loss"):
        assert float(b[name]) == pytest.approx(float(a[name]), abs=1e-5)


@modes
def test_two_runs_with_one_seed_are_bit_identical(train, mode):
    """The same command twice gives the same bits; another seed gives others."""
    command = [*mode, "--lr", 1e-3, "--dropout", 0.3, "--use_explanations"]
    one, two = (train(*command, out=out).folder for out in ("one", "two"))
    assert_same_run(one, two)
    other = train(*command, "--seed", 7, out="three").folder
    assert not same_tensors(load(one)["state"], load(other)["state"])


def test_workers_do_not_change_the_result(train):
    """Decoding in worker processes gives the same bits."""
    command = [*PARTIAL, "--lr", 1e-3, "--cache", "off", "--epochs", 1]
    one = train(*command, out="one").folder
    assert_same_run(one, train(*command, "--num_workers", 2, out="two").folder)


@pytest.mark.parametrize("seed", [0, 1_700_000_000, 2 ** 40])
def test_any_seed_works(train, seed):
    """A seed may be as large as a time stamp, or larger."""
    assert train("--freeze_clip", "--epochs", 1, "--seed", seed).summary["seed"] == seed


# --- presets --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(baseline.PRESETS))
def test_a_preset_sets_its_flags_and_explicit_ones_win(name):
    """A preset's values hold, except those that the command line names, even at their default."""
    default = baseline.parse_args([])
    plain = baseline.parse_args(["--preset", name])
    for key, value in baseline.PRESETS[name].items():
        assert getattr(plain, key) == value
    named = baseline.parse_args(["--preset", name, "--epochs", str(default.epochs), "--dropout",
                                 str(default.dropout)])
    assert (named.epochs, named.dropout) == (default.epochs, default.dropout)
    others = set(baseline.PRESETS[name]) - {"epochs", "dropout"}
    assert all(getattr(named, key) == baseline.PRESETS[name][key] for key in others)
    untouched = set(vars(default)) - set(baseline.PRESETS[name]) - {"preset", "explicit"}
    assert all(getattr(plain, key) == getattr(default, key) for key in untouched)


def test_explicit_freezing_replaces_a_presets():
    """Another way of freezing on the command line wins over the preset's."""
    args = baseline.parse_args(["--preset", "A", "--partial_freeze"])
    assert args.partial_freeze and not args.freeze_clip
    args = baseline.parse_args(["--preset", "B", "--freeze_clip"])
    assert args.freeze_clip and not args.partial_freeze


def test_a_preset_reaches_the_run(train):
    """config.json holds the preset's values and the explicit ones."""
    run = train("--preset", "C")  # the fixture names 2 epochs and batches of 8
    args = read_json(run.folder / "config.json")["arguments"]
    assert (args["epochs"], args["batch_size"]) == (2, 8)
    assert (args["freeze_clip"], args["dropout"], args["weight_decay"]) == (True, 0.2, 5e-4)
    assert args["residual_scale_q"] == 0.1


# --- results --------------------------------------------------------------------------------


@pytest.mark.parametrize("more, parts", [([], ["val", "train"]),
                                         (["--test_ratio", 0.2], ["val", "train", "test"])])
def test_the_last_line_is_the_result(train, capsys, more, parts):
    """The last line on stdout is JSON with all that a script wants; result.json is the same."""
    capsys.readouterr()
    run = train("--freeze_clip", "--lr", 1e-3, *more)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == read_json(run.folder / "result.json")
    for part in parts:
        assert set(baseline.METRIC_NAMES) <= set(result[part])
    assert ("test" in result) == ("test" in parts)
    for t in "qc":
        gap = result["train"][f"srocc_{t}"] - result["val"][f"srocc_{t}"]
        assert result[f"gap_{t}"] == pytest.approx(gap)
        assert result[f"tier_{t}"] == baseline.tier(t, result["val"][f"srocc_{t}"], gap)
    assert result["output_dir"] == str(run.folder) and result["seconds"] > 0
    assert result["best_epoch"] in (0, 1, 2)
    assert len(baseline.METRIC_NAMES) == 8


def test_train_metrics_are_in_eval_mode_on_original_views(train, build):
    """The Train-Val Gap compares like with like: no dropout, no flips, the best weights."""
    command = ["--freeze_clip", "--lr", 1e-2, "--dropout", 0.5, "--augment", "flip"]
    done = train(*command)
    run = build(*command, out="again")
    baseline.load_trained_state(run.scorer, load(done.folder, "baseline_best.pt")["state"], "")
    rows = run.parts["train"]
    want = baseline.metrics(baseline.evaluate(run, rows), baseline.human(run.table, rows))
    assert done.summary["train"] == pytest.approx(want)


def test_the_test_part_is_seen_only_at_the_end(train, monkeypatch):
    """No test image is predicted before training is over, and none is trained on."""
    calls, evaluate, epoch = [], baseline.evaluate, baseline.train_one_epoch

    def note_evaluate(run, rows):
        calls.append(bool(set(rows) & set(run.parts["test"])))
        return evaluate(run, rows)

    def note_epoch(run, number):
        calls.append("epoch")
        for view in baseline.epoch_views(run.parts["train"], run.args, run.seed, number):
            assert not set(view.rows) & set(run.parts["test"])
        return epoch(run, number)
    monkeypatch.setattr(baseline, "evaluate", note_evaluate)
    monkeypatch.setattr(baseline, "train_one_epoch", note_epoch)
    train("--freeze_clip", "--test_ratio", 0.2, "--epochs", 3)
    last = len(calls) - 1 - calls[::-1].index("epoch")
    assert True not in calls[:last + 1] and calls.count(True) == 1


def test_an_old_run_is_archived_whole(train):
    """A second run in the same folder keeps the first one's files, byte for byte."""
    first = train("--freeze_clip", "--lr", 1e-3, "--test_ratio", 0.2)
    names = ["baseline_best.pt", "baseline_last.pt", "config.json", "result.json",
             "training_log.csv", "val_predictions.csv", "test_predictions.csv"]
    old = {name: (first.folder / name).read_bytes() for name in names}
    train("--freeze_clip", "--lr", 1e-2)
    folders = list((first.folder / "archive").iterdir())
    assert len(folders) == 1
    assert {p.name: p.read_bytes() for p in folders[0].iterdir()} == old
    assert (first.folder / "result.json").read_bytes() != old["result.json"]
    assert not (first.folder / "test_predictions.csv").exists()
    train("--freeze_clip", "--lr", 1e-2)
    assert len(list((first.folder / "archive").iterdir())) == 2


def test_a_refused_command_archives_nothing(train, refused, data, tmp_path):
    """A command that is wrong leaves the earlier run where it is."""
    first = train("--freeze_clip")
    bad = SimpleNamespace(csv=tmp_path / "none.csv", images=data.images)
    refused("--freeze_clip", data=bad)
    assert (first.folder / "result.json").exists() and not (first.folder / "archive").exists()


def test_runs_csv_grows_by_one_row_and_never_changes(train):
    """Every run appends its flags and results; earlier bytes stay."""
    first = train("--freeze_clip", "--lr", 1e-3)
    path = first.folder / "runs.csv"
    before = path.read_bytes()
    second = train("--freeze_clip", "--lr", 1e-2, "--test_ratio", 0.2)
    assert path.read_bytes().startswith(before)
    rows = read_csv(path)
    assert len(rows) == 2 and list(rows[0]) == list(baseline.RUN_COLUMNS)
    for row, run in zip(rows, (first, second)):
        assert float(row["val_srocc_q"]) == pytest.approx(run.summary["val"]["srocc_q"])
        assert row["split"] == run.summary["split"]
        assert int(row["best_epoch"]) == run.summary["best_epoch"]
    assert "--lr 0.001" in rows[0]["arguments"] and "--freeze_clip" in rows[0]["arguments"]
    assert rows[0]["test_srocc_q"] == ""
    assert float(rows[1]["test_srocc_c"]) == pytest.approx(second.summary["test"]["srocc_c"])


def test_the_columns_of_the_data_are_those_of_the_tests():
    """The tests' CSV has the program's default columns."""
    args = baseline.parse_args([])
    assert COLUMNS == [args.name_column, args.prompt_column, args.quality_column,
                       args.consistency_column, args.explanation_column]
