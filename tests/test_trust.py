"""The numbers can be trusted: floors, calibration, intervals, repeats."""

import json
import math
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import scipy.stats
import torch
from conftest import load, read_csv, read_json, write_csv
from PIL import Image
from starter import DRAWS

import baseline

MODES = {"frozen": ["--freeze_clip"], "full": [],
         "partial": ["--partial_freeze", "--freeze_layers", 2]}
STRENGTHS = 10.0 ** np.arange(-3, 5)  # of the ridge

# --- floors ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def reference(clips, data):
    """Embed the rows, and a good and a bad photo's text, with open_clip's own code."""
    name = f"local-dir:{clips()}"
    clip, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    images = torch.stack([transform(Image.open(data.images / row["name"]).convert("RGB"))
                          for row in data.rows])
    with torch.no_grad():
        f = clip.eval().encode_image(images, normalize=True).double().numpy()
        t, two = (clip.encode_text(tokenizer(texts), normalize=True).double().numpy() for texts in (
            [row["prompt"] for row in data.rows], ["Good photo.", "Bad photo."]))
    return SimpleNamespace(f=f, t=t, good=two[0], bad=two[1], s=(f * t).sum(1))


def logit(mos):
    """Return the logit of scaled scores, which stay away from 0 and 1."""
    mos = np.clip(np.asarray(mos, np.float64), 0.01, 0.99)
    return np.log(mos / (1 - mos))


def closed_form(x, free, y, strength):
    """Return ridge weights and those of columns without a penalty, by the normal equations."""
    both = np.column_stack([x, free])
    penalty = strength * np.diag([1.0] * x.shape[1] + [0.0] * free.shape[1])
    return np.split(np.linalg.solve(both.T @ both + penalty, both.T @ y), [x.shape[1]])


def test_the_image_split_warns_and_shows_what_leaks(train, capsys, data):
    """With --split_by image there are the prompt-mean floor and a warning; else neither."""
    row = train("--freeze_clip", "--epochs", 1, out="by_prompt").row
    assert "WARNING" not in capsys.readouterr().out and "prompt_mean_srocc_c" not in row
    run = train("--freeze_clip", "--epochs", 1, "--split_by", "image")
    out = capsys.readouterr().out
    assert "WARNING" in out and "leak" in out and "prompt mean" in out
    val = {row["name"] for row in read_csv(run.folder / "val_predictions.csv")}
    seen = [row for row in data.rows if row["name"] not in val]
    pairs = [(np.mean([other["mos_align"] for other in seen if other["prompt"] == row["prompt"]]
                      or [other["mos_align"] for other in seen]), row["mos_align"])
             for row in data.rows if row["name"] in val]
    assert run.row["prompt_mean_srocc_c"] == pytest.approx(scipy.stats.spearmanr(*zip(*pairs))[0])


@pytest.mark.parametrize("mode", MODES)
def test_floors_are_clips_own_scores_and_a_ridge_on_its_features(build, reference, mode):
    """Zero-shot: cosine, softmax over two texts; probe: a ridge at one strength; the start."""
    run, r = build(*MODES[mode]), reference
    floor, train = run.floors["zero_shot"], run.table.frame.iloc[run.parts["train"]]
    assert np.allclose(floor["c"], r.s, atol=1e-5) and np.ptp(r.s) > 0.01
    good = 1 / (1 + np.exp(100 * r.f @ (r.bad - r.good)))
    assert np.allclose(floor["q"], good, atol=1e-3) and np.ptp(good) > 0.01
    ones = np.ones(36)
    pairs = np.concatenate([r.f, r.t, r.f * r.t * r.f.shape[1] ** 0.5], axis=1)
    for target, x, free in (("q", r.f, ones[:, None]), ("c", pairs, np.stack([ones, r.s], 1))):
        errors = []
        for strength in STRENGTHS:
            weights, others = closed_form(x[run.parts["train"]], free[run.parts["train"]],
                                          train[target].to_numpy(float), strength)
            pred = x @ weights + free @ others
            errors.append(np.abs(pred - run.floors["linear_probe"][target]).max())
        assert min(errors) < 5e-3 and sorted(errors)[1] > 2 * min(errors), errors
        start = baseline.evaluate(run, "val")[0][target]
        assert np.allclose(start, run.floors["start"][target][run.parts["val"]], atol=1e-5)
    probe, start = (run.floors[name]["q"] for name in ("linear_probe", "start"))
    assert (np.argsort(probe) == np.argsort(start)).mean() > 0.9  # a sigmoid of it, up to float32
    assert np.abs(probe - start)[np.abs(probe - train["q"].mean()) < 0.05].max() < 5e-3


def test_floors_do_not_see_validation_scores(build, data, tmp_path):
    """Other human scores in the validation part change no floor and no base."""
    one = build("--freeze_clip")
    val = set(one.table.frame["name"].iloc[one.parts["val"]])
    rows = [row | {"mos_quality": 1, "mos_align": 4} if row["name"] in val else row
            for row in data.rows]
    other = SimpleNamespace(csv=write_csv(tmp_path / "x.csv", rows), images=data.images)
    two = build("--freeze_clip", data=other, out="second")
    assert not np.array_equal(one.table.frame["q"], two.table.frame["q"])
    assert all(np.array_equal(one.floors[name][t], two.floors[name][t])
               for name in one.floors for t in "qc")
    assert torch.equal(one.scorer.quality.base.weight, two.scorer.quality.base.weight)
    assert torch.equal(one.scorer.consistency.affine, two.scorer.consistency.affine)


def fit(x, y, groups):
    """Return (length of the ridge's weights, fitted, unseen predictions) of rows in groups."""
    weights, constant, unseen = baseline.fit_ridge(
        torch.tensor(x), torch.ones(len(x), 1).double(), np.arange(len(x)), torch.tensor(y), groups)
    return float(weights.norm()), x @ weights.numpy() + float(constant), unseen.numpy()


@pytest.mark.parametrize("columns", [6, 60])
def test_the_ridge_equals_closed_forms_with_and_without_each_fold(columns):
    """So do its weights, free ones, and what it predicts for groups that it leaves out."""
    rng = np.random.default_rng(columns)
    x, free = rng.normal(2, 1, (50, columns)), np.stack([np.ones(50), rng.normal(size=50)], 1)
    y, groups = x[:, 0] + 9 * free[:, 1] + rng.normal(3, 1, 50), np.repeat(np.arange(10), 5)
    rows = np.sort(rng.permutation(50)[:40])
    weights, others, unseen = baseline.fit_ridge(
        torch.tensor(x), torch.tensor(free), rows, torch.tensor(y[rows]), groups[rows])
    x, free, y, groups = x[rows], free[rows], y[rows], groups[rows]
    strength = min(STRENGTHS, key=lambda strength: np.abs(
        closed_form(x, free, y, strength)[0] - weights.numpy()).max())
    assert all(map(np.allclose, (weights, others), closed_form(x, free, y, strength)))
    without = {}  # that many groups were left out together: (what of it a refit predicts)
    for group in np.unique(groups):
        for other in {*groups} | {None}:
            held = (groups == group) | (groups == other)
            w, o = closed_form(x[~held], free[~held], y[~held], strength)
            without[group, other] = (x @ w + free @ o)[groups == group]
    for group in np.unique(groups):
        assert any(np.allclose(unseen[groups == group], without[group, other])
                   for other in {*groups} | {None})


def test_the_ridge_is_fitted_to_what_generalises_over_groups():
    """Weak for signal, strong for noise and for what only tells groups apart; unseen is unseen."""
    rng = np.random.default_rng(1)
    x, groups = rng.normal(size=(120, 60)), np.repeat(np.arange(30), 4)
    signal, noise = x @ rng.normal(size=60), rng.normal(size=120)
    code, of_group = rng.normal(size=(30, 20))[groups], rng.normal(size=30)[groups]
    for inputs, y, folds, weak in (
            (x, signal, groups, True), (x, noise, groups, False),
            (code, of_group, np.arange(120), True), (code, of_group, groups, False)):
        length, fitted, unseen = fit(inputs, y, folds)
        share = length / np.linalg.norm(closed_form(inputs, np.ones((120, 1)), y, 1e-9)[0])
        known, by_heart = (np.corrcoef(pred, y)[0, 1] for pred in (unseen, fitted))
        assert by_heart > 0.5 and (share > 0.9, known > 0.7, share < 0.1, known < 0.2) == (
            weak, weak, not weak, not weak)


# --- calibration ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_base_starts_at_a_least_squares_plane_and_keeps_its_cosine(build, reference, mode):
    """Consistency starts on the cosine, which stays, and on unseen quality."""
    run = build(*MODES[mode], "--lr", 1e-3)
    train, val, frame = run.parts["train"], run.parts["val"], run.table.frame
    groups = np.unique(frame["group_id"].iloc[train], return_inverse=True)[1]
    mos = frame["q"].iloc[train].to_numpy(np.float64)
    unseen, mean = fit(reference.f[train], mos, groups)[2], mos.mean()
    unseen = logit(mean) + (unseen - mean) / (mean * (1 - mean))
    cosine, ones, start = (reference.s + 1) / 2, np.ones(36), run.floors["start"]["q"]
    x = np.column_stack([cosine[train], 1 / (1 + np.exp(-unseen)), ones[train]])
    plane = np.linalg.lstsq(x, frame["c"].iloc[train], rcond=None)[0]
    assert run.scorer.consistency.affine.tolist() == pytest.approx(plane[[0, 2, 1]], rel=1e-2)
    pred = baseline.evaluate(run, "val")[0]
    assert np.allclose(pred["c"], (np.column_stack([cosine, start, ones]) @ plane)[val], atol=1e-3)
    baseline.train_one_epoch(run, 1)
    pred = baseline.evaluate(run, "val")[0]
    a, b, e = run.scorer.consistency.affine.tolist()
    assert np.allclose(pred["c_base"], a * cosine[val] + b + e * pred["q"], atol=1e-4)
    with torch.no_grad():
        x = next(run.images.stream([baseline.plan_views(val)]))
        moved = run.scorer.towers["image"].suffix(x).numpy() - reference.f[val]
    assert (np.abs(moved).max() > 1e-3) == (mode != "frozen")


def test_without_calibration_the_base_is_not_fitted(build):
    """--no_base_calibration starts elsewhere: a = 1, b' = e = 0 and a random quality base."""
    runs = build("--freeze_clip"), build("--freeze_clip", "--no_base_calibration", out="b")
    assert runs[1].scorer.consistency.affine.tolist() == [1, 0, 0]
    good, bad = (baseline.evaluate(run, "train")[1] for run in runs)
    assert good["rmse_c"] < bad["rmse_c"] and good["srocc_q"] > bad["srocc_q"] + 0.05


# --- intervals ------------------------------------------------------------------------------


def ends(draws):
    """Return both ends of a 95 % interval."""
    return np.nanpercentile(draws, [2.5, 97.5])


def test_floors_and_intervals_of_the_judged_part(train, reference, monkeypatch):
    """They are those of the test part; a gain's interval is of differences under the same draws."""
    seen, real = {}, baseline.evaluate

    def note(run, part):
        seen["run"], (seen[part], found) = run, real(run, part)
        return seen[part], found
    monkeypatch.setattr(baseline, "evaluate", note)
    row = train("--freeze_clip", "--lr", 1e-2, "--val_ratio", 0.3, "--test_ratio", 0.4).row
    run, rows = seen["run"], seen["run"].parts["test"]
    frame = run.table.frame.iloc[rows]
    assert row["part"] == "test" and row["zero_shot_krocc_c"] == pytest.approx(
        scipy.stats.kendalltau(reference.s[rows], frame["c"])[0])
    for t in "qc":
        draws = baseline.bootstrap({"run": seen["test"][t], **{
            name: floor[t][rows] for name, floor in run.floors.items()}}, frame[t],
            frame["group_id"].to_numpy())
        low, high = row[f"interval_{t}_low"], row[f"interval_{t}_high"]
        assert (low, high) == pytest.approx(ends(draws["run"]))
        assert -1 <= low < row[f"test_srocc_{t}"] < high <= 1
        for name in ("start", "zero_shot", "linear_probe"):
            floor = scipy.stats.spearmanr(run.floors[name][t][rows], frame[t])[0]
            assert row[f"{name}_srocc_{t}"] == pytest.approx(floor)
            gain, low, high = (row[f"gain_{name}_{t}{end}"] for end in ("", "_low", "_high"))
            assert gain == pytest.approx(row[f"test_srocc_{t}"] - floor)
            assert (low, high) == pytest.approx(ends(draws["run"] - draws[name]))
            assert low <= gain <= high


def test_the_bootstrap_draws_prompts_and_the_same_for_all():
    """Fisher's interval for pairs; copies of a prompt's images add nothing; draws are shared."""
    rng, width = np.random.default_rng(1), {}
    mos, noise = rng.normal(size=(2, 60))
    for name, copies, groups in (("single", 1, np.arange(60)), ("images", 8, np.arange(480)),
                                 ("clusters", 8, np.repeat(np.arange(60), 8))):
        pred, m = np.repeat([0.7 * mos + noise, mos], copies, axis=1)
        draws = baseline.bootstrap({"a": pred, "same order": 2 * pred + 1}, m, groups, DRAWS)
        assert len(draws) == 1000 and np.allclose(draws["a"], draws["same order"])
        srocc, (low, high) = scipy.stats.spearmanr(pred, m)[0], ends(draws["a"])
        assert low < srocc < high
        width[name] = high - low
    z, half = math.atanh(srocc), 1.96 * math.sqrt(1.06 / 57)
    assert width["single"] == pytest.approx(math.tanh(z + half) - math.tanh(z - half), rel=0.15)
    assert width["clusters"] == pytest.approx(width["single"], rel=0.1)
    assert width["images"] < 0.5 * width["clusters"]
    assert baseline.bootstrap({"a": noise}, mos, np.zeros(60)).isna().all(axis=None)  # no spread


def test_the_fitted_plcc_straightens_a_logistic_and_is_told_beside_the_raw_one(train):
    """Scores that are a logistic of the MOS fit it exactly, falling ones as well; a few do not."""
    mos = np.linspace(0.05, 0.95, 50)
    for sign in (1, -1):
        pred = 0.3 + 0.02 * sign * np.log(mos / (1 - mos))  # the MOS is a logistic of these
        assert abs(np.corrcoef(pred, mos)[0, 1]) < 0.99
        assert baseline.plcc_fit(pred, mos) == pytest.approx(1, abs=1e-4)
    assert math.isnan(baseline.plcc_fit(mos[:3], mos[:3]))
    assert math.isnan(baseline.plcc_fit(np.full(50, 0.5), mos))
    row = train("--freeze_clip", "--val_ratio", 0.4, "--lr", 1e-2).row
    assert -1 <= row["plcc_fit_q"] <= 1 and row["plcc_fit_q"] >= row["val_plcc_q"] - 0.02


def test_a_table_without_a_test_part_says_that_it_is_optimistic(train, capsys):
    """One with a test part does not; each target's own best epoch stands beside it."""
    run = train("--freeze_clip", "--lr", 1e-2, "--epochs", 3)
    assert "optimistic" in capsys.readouterr().out
    log = read_csv(run.folder / "training_log.csv")
    for t in "qc":
        best = max([(float(row[f"val_srocc_{t}"]), -int(row["epoch"])) for row in log])
        start = run.row[f"start_srocc_{t}"]  # of the validation part, which is the judged one
        assert run.row[f"best_epoch_{t}"] == (0 if start >= best[0] else -best[1])
    train("--freeze_clip", "--epochs", 1, "--test_ratio", 0.25, out="tested")
    assert "optimistic" not in capsys.readouterr().out


# --- repeats --------------------------------------------------------------------------------

REPEATS = ["--freeze_clip", "--lr", 1e-2, "--repeats", 2, "--epochs", 2]


@pytest.mark.parametrize("more, part", [([], "val"), (["--test_ratio", 0.25], "test")])
def test_repeats_report_mean_spread_and_gain(train, capsys, more, part):
    """Means, sample SDs and paired 95 % gains are those of the single results, on their part."""
    run = train(*REPEATS, *more)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == read_json(run.folder / "result.json") == json.loads(baseline.json_text(run.row))
    one, two = result["repeats"]
    assert result["part"] == part
    for name in [f"{p}_{m}_{t}" for p in ("train", "val", part) for m in baseline.METRICS
                 for t in "qc"] + ["gap_q", "linear_probe_srocc_c"]:
        assert result["mean"][name] == pytest.approx((one[name] + two[name]) / 2)
        assert result["sd"][name] == pytest.approx(abs(one[name] - two[name]) / math.sqrt(2))
    for floor, t in (("zero_shot", "q"), ("start", "q"), ("linear_probe", "c")):
        gains = [row[f"{part}_srocc_{t}"] - row[f"{floor}_srocc_{t}"] for row in (one, two)]
        ratio = one[f"images_{part}"] / one["images_train"]
        assert 0.2 < ratio < 0.7  # the splits overlap: Nadeau and Bengio, 2003
        half = 12.7062 * np.std(gains, ddof=1) * math.sqrt(1 / 2 + ratio)
        mean = np.mean(gains)
        assert [result[f"gain_{floor}_{t}{end}"] for end in ("_low", "", "_high")] == pytest.approx(
            [mean - half, mean, mean + half], rel=1e-4)


def test_repeats_find_once_what_trains(train, monkeypatch):
    """Once for each tower, and the second run trains what the first one trains."""
    found, halves = [], baseline.Tower.halves
    monkeypatch.setattr(baseline.Tower, "halves",
                        lambda tower: found.append(tower.frozen) or halves(tower))
    run = train("--partial_freeze", "--freeze_layers", 2, *REPEATS[3:])
    one, two = (load(run.folder / f"repeat_{seed}")["state"] for seed in (42, 43))
    assert found == [2, 2] and one.keys() == two.keys()
    assert {name.split(".")[1] for name in one if name.startswith("clip.")} == {"visual", "text"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", ["vit", "conv"])
def test_runs_of_one_command_share_the_memory_of_frozen_weights_alone(build, clip, mode):
    """What one run trains, BatchNorm's statistics too, is new to the next."""
    one = build(*MODES[mode], "--lr", 1e-2, "--head_lr", 1e-2, clip=clip)
    before = {name: value.clone() for name, value in one.scorer.clip.state_dict().items()}
    baseline.train_one_epoch(one, 1)
    two = baseline.set_up(one.args, one.table, 43)
    after = two.scorer.clip.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for (name, a), b in zip(one.scorer.clip.named_parameters(), two.scorer.clip.parameters()):
        shared = a.data_ptr() == b.data_ptr()
        assert not (shared and a.requires_grad), name
        assert shared or a.requires_grad or (clip == "conv" and a.ndim == 4), name  # channels last
    moved = [name for name, value in one.scorer.clip.state_dict().items()
             if not torch.equal(value, before[name])]
    assert bool(moved) == (mode != "frozen")


def test_validation_is_evaluated_once_an_epoch(train, data, monkeypatch):
    """The best epoch's predictions are kept; they are those of baseline_best.pt."""
    seen, real = [], baseline.evaluate
    monkeypatch.setattr(baseline, "evaluate",
                        lambda run, part: seen.append(part) or real(run, part))
    scores = iter([0.1, 0.2, 0.4, 0.3])  # of epochs 0 to 3
    monkeypatch.setattr(baseline, "selection_score", lambda values, args: next(scores))
    run = train(*MODES["partial"], "--lr", 1e-3, "--epochs", 3)
    assert run.row["best_epoch"] == 2 and sorted(seen) == ["train", "val", "val", "val"]
    kept = read_csv(run.folder / "val_predictions.csv")
    again = baseline.load(run.folder / "baseline_best.pt").score(
        [data.images / row["name"] for row in kept], [row["prompt"] for row in kept])
    for title in ("quality", "consistency"):
        assert np.allclose(again[title], [float(row[title]) for row in kept], atol=1e-4)


def test_repeats_share_the_cache_and_are_kept_when_finished(train, monkeypatch):
    """Own splits, images decoded once; the command again, or one resumed, trains nothing anew."""
    opened, load = [], baseline.load_image
    monkeypatch.setattr(baseline, "load_image", lambda path: opened.append(path) or load(path))
    first = train(*REPEATS)
    one, two = first.row["repeats"]
    assert (one["seed"], two["seed"]) == (42, 43) and one["split"] != two["split"]
    assert len(opened) == len(set(opened)) == 36
    records = (first.folder / "runs.csv").read_bytes()
    assert [(row["seed"], row["split"]) for row in read_csv(first.folder / "runs.csv")] == [
        ("42", one["split"]), ("43", two["split"])]
    trained, real = set(), baseline.train_one_epoch
    monkeypatch.setattr(baseline, "train_one_epoch",
                        lambda run, epoch: trained.add(run.seed) or real(run, epoch))
    assert train(*REPEATS).row == first.row and not trained
    assert (first.folder / "runs.csv").read_bytes() == records
    assert train(*REPEATS, "--repeats", 3).row["repeats"][:2] == [one, two] and trained == {44}
    folder = first.folder / "repeat_43"
    row = baseline.main(["--resume_from", str(folder / "baseline_last.pt")])
    assert row["seed"] == 43 and row["val_srocc_q"] == two["val_srocc_q"] and trained == {44}
    assert (folder / "baseline_last.pt").exists() and not list(folder.glob("repeat_*"))


def test_an_interrupted_repeat_goes_on(train, monkeypatch):
    """Killed and restarted: nothing is trained twice, and the result is the same."""
    whole = train(*REPEATS, "--epochs", 3, out="whole").row
    epochs, real = [], baseline.train_one_epoch

    def die(run, epoch):
        epochs.append((run.seed, epoch))
        if epochs == [(42, 1), (42, 2), (42, 3), (43, 1), (43, 2), (43, 3)]:
            raise MemoryError
        return real(run, epoch)
    monkeypatch.setattr(baseline, "train_one_epoch", die)
    with pytest.raises(MemoryError):
        train(*REPEATS, "--epochs", 3)
    row = train(*REPEATS, "--epochs", 3).row
    assert epochs[6:] == [(43, 3)]
    assert all(row[name] == whole[name] for name in ("mean", "sd", "gain_linear_probe_q_low"))


@pytest.mark.parametrize("other", [[*REPEATS, "--epochs", 1, "--lr", 1e-3],
                                   ["--freeze_clip", "--epochs", 1]], ids=["repeats", "single"])
def test_another_run_in_the_folder_replaces_nothing(train, other):
    """Other flags, or a single run, start anew; what the repeats left is kept whole."""
    first = train(*REPEATS, "--epochs", 1)
    old = {name: (first.folder / name).read_bytes() for name in (
        "result.json", "repeat_42/result.json", "repeat_43/baseline_best.pt")}
    second = train(*other)
    (archive,) = first.folder.glob("archive/*")
    assert {name: (archive / name).read_bytes() for name in old} == old
    assert read_json(first.folder / "result.json")["command"] == second.row["command"]
    assert len(list(first.folder.glob("repeat_*"))) == (2 if "--repeats" in other else 0)
