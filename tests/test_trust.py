"""The numbers can be trusted: floors, calibration, intervals, repeats."""

import json
import math
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import scipy.stats
import torch
from conftest import read_csv, read_json, write_csv
from PIL import Image

import baseline

MODES = {"frozen": ["--freeze_clip"], "partial": ["--partial_freeze", "--freeze_layers", 2],
         "full": []}

# --- floors ---------------------------------------------------------------------------------


@pytest.fixture
def reference(clips, data):
    """Return a function that embeds a table's rows with open_clip's own code."""
    def embed(table, texts=None):
        name = f"local-dir:{clips()}"
        clip, _, transform = open_clip.create_model_and_transforms(name)
        tokenizer = open_clip.get_tokenizer(name)
        prompts = [table.prompts[i] for i in table.prompt_id] if texts is None else texts
        images = torch.stack([transform(Image.open(p).convert("RGB")) for p in table.paths])
        with torch.no_grad():
            return (clip.eval().encode_image(images, normalize=True).numpy(),
                    clip.encode_text(tokenizer(prompts), normalize=True).numpy())
    return embed


def test_floors_are_in_the_result(train):
    """The result holds the zero-shot and linear-probe floors of validation and test part."""
    result = read_json(train("--freeze_clip", "--epochs", 1, "--test_ratio", 0.2).folder
                       / "result.json")
    for part in ("floors", "floors_test"):
        assert set(result[part]) == {"zero_shot", "linear_probe"}
        for floor in result[part].values():
            assert set(floor) == set(baseline.METRIC_NAMES)
            assert all(-1 <= floor[f"srocc_{t}"] <= 1 for t in "qc")


def test_the_image_split_warns_and_shows_what_leaks(train, capsys, data):
    """With --split_by image there are the prompt-mean floor and a warning."""
    capsys.readouterr()
    run = train("--freeze_clip", "--epochs", 1, "--split_by", "image")
    out = capsys.readouterr().out
    assert "WARNING" in out and "leak" in out and "prompt mean" in out
    val = {row["name"] for row in read_csv(run.folder / "val_predictions.csv")}
    rows = [row for row in data.rows if row["name"] not in val]
    overall = np.mean([row["mos_align"] for row in rows])
    means = {row["prompt"]: [r["mos_align"] for r in rows if r["prompt"] == row["prompt"]]
             for row in data.rows}
    pred = {p: np.mean(v) if v else overall for p, v in means.items()}
    pairs = [(pred[row["prompt"]], row["mos_align"]) for row in data.rows if row["name"] in val]
    assert run.summary["floors"]["prompt_mean"]["srocc_c"] == pytest.approx(
        scipy.stats.spearmanr(*zip(*pairs))[0])


def test_the_prompt_split_does_not_warn(train, capsys):
    """The prompt split has no prompt-mean floor and no warning."""
    capsys.readouterr()
    run = train("--freeze_clip", "--epochs", 1)
    assert "WARNING" not in capsys.readouterr().out
    assert set(run.summary["floors"]) == {"zero_shot", "linear_probe"}


@pytest.mark.parametrize("mode", MODES)
def test_zero_shot_floors_are_clips_own_scores(build, reference, mode):
    """Consistency is the cosine; quality is the softmax between a good and a bad photo."""
    run = build(*MODES[mode])
    f, t = reference(run.table)
    _, (good, bad) = reference(run.table, ["Good photo.", "Bad photo."])
    got = run.floors.pred["zero_shot"]
    assert np.allclose(got["c"], (f * t).sum(1), atol=1e-5)
    assert np.allclose(got["q"], 1 / (1 + np.exp(100 * (f @ bad - f @ good))), atol=1e-3)
    assert np.ptp(got["q"]) > 0.01 and np.ptp(got["c"]) > 0.01


def test_the_linear_probe_is_a_ridge_on_frozen_features(build, reference):
    """The probe equals a closed-form ridge, of the documented features, at one of its strengths."""
    run = build("--freeze_clip")
    f, t = (x.astype(np.float64) for x in reference(run.table))
    train = run.parts["train"]
    q = np.clip(run.table.quality[train].astype(np.float64), 0.01, 0.99)
    pairs = np.concatenate([f, t, f * t, (f * t).sum(1, keepdims=True)], axis=1)
    for target, x, y in (("q", f, np.log(q / (1 - q))),
                         ("c", pairs, run.table.consistency[train].astype(np.float64))):
        errors = []
        for strength in baseline.RIDGE_STRENGTHS:
            weights, intercept = closed_form(x[train], y, strength)
            pred = x @ weights + intercept
            pred = 1 / (1 + np.exp(-pred)) if target == "q" else pred
            errors.append(np.abs(pred - run.floors.pred["linear_probe"][target]).max())
        assert min(errors) < 1e-3 and sorted(errors)[1] > min(errors)


def test_floors_do_not_see_validation_scores(build, data, tmp_path):
    """Other human scores in the validation part change no floor and no base."""
    first = build("--freeze_clip")
    val = set(first.table.frame["name"].iloc[first.parts["val"]])
    rows = [{**row, "mos_quality": 5 - row["mos_quality"], "mos_align": 5 - row["mos_align"]}
            if row["name"] in val else row for row in data.rows]
    other = SimpleNamespace(csv=write_csv(tmp_path / "x.csv", rows), images=data.images)
    second = build("--freeze_clip", data=other, out="second")
    assert not np.array_equal(first.table.quality, second.table.quality)
    for floor in first.floors.pred:
        for target in "qc":
            assert np.array_equal(first.floors.pred[floor][target],
                                  second.floors.pred[floor][target])
    assert torch.equal(first.scorer.quality.base.weight, second.scorer.quality.base.weight)
    assert torch.equal(first.scorer.consistency.affine, second.scorer.consistency.affine)


def closed_form(x, y, strength):
    """Return ridge weights and intercept by the normal equations, intercept not penalised."""
    x1 = np.column_stack([x, np.ones(len(x))])
    penalty = strength * np.eye(x1.shape[1])
    penalty[-1, -1] = 0
    solution = np.linalg.solve(x1.T @ x1 + penalty, x1.T @ y)
    return solution[:-1], solution[-1]


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e4])
def test_ridge_equals_the_closed_form(strength):
    """Weights and intercept are those of the normal equations."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(2, 1, (40, 6)), rng.normal(3, 1, 40)
    (weights, intercept), = baseline.ridge(torch.tensor(x), torch.tensor(y), [strength])
    want = closed_form(x, y, strength)
    assert np.allclose(weights.numpy(), want[0]) and float(intercept) == pytest.approx(want[1])


def test_the_ridge_strength_fits_the_noise():
    """Cross-validation takes a weak ridge for clean data and a strong one for noise."""
    rng, norms = np.random.default_rng(0), []
    x, groups = rng.normal(size=(200, 20)), np.repeat(np.arange(50), 4)
    w = rng.normal(size=20)
    for y in (x @ w, rng.normal(size=200) * np.linalg.norm(w)):
        (weights, _), _ = baseline.fit_ridge(torch.tensor(x), torch.tensor(y), groups)
        plain = closed_form(x, y, 0)[0]
        norms.append(float(weights.norm()) / np.linalg.norm(plain))
    assert norms[0] > 0.999 and norms[1] < 0.7


def test_the_ridge_strength_is_chosen_over_groups():
    """Rows of one group are never in two folds: what only identifies the group is not trusted."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 10)
    x = np.eye(20)[groups] + rng.normal(0, 0.01, (200, 20))
    y = rng.normal(size=20)[groups]
    (weights, _), _ = baseline.fit_ridge(torch.tensor(x), torch.tensor(y), groups)
    assert float(weights.norm()) < 0.2 * np.linalg.norm(closed_form(x, y, 1e-3)[0])


def test_unseen_predictions_know_nothing_of_their_own_rows():
    """Noise is fitted by heart, but not predicted by the fits that left its rows out."""
    rng = np.random.default_rng(0)
    x, y, groups = rng.normal(size=(120, 60)), rng.normal(size=120), np.repeat(np.arange(30), 4)
    (weights, _), unseen = baseline.fit_ridge(torch.tensor(x), torch.tensor(y), groups)
    assert baseline.plcc(x @ weights.numpy(), y) > 0.5
    assert abs(baseline.plcc(unseen.numpy(), y)) < 0.2
    signal = x @ rng.normal(size=60)
    _, unseen = baseline.fit_ridge(torch.tensor(x), torch.tensor(signal), groups)
    assert baseline.plcc(unseen.numpy(), signal) > 0.99


# --- calibration ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_epoch_zero_is_the_linear_probe(train, mode):
    """Before the first step, quality is where the linear probe is."""
    run = train(*MODES[mode], "--epochs", 1)
    start, floors = run.summary["start"], run.summary["floors"]
    assert start["srocc_q"] == pytest.approx(floors["linear_probe"]["srocc_q"], abs=0.002)


@pytest.mark.parametrize("mode", MODES)
def test_the_consistency_base_is_the_least_squares_plane(build, reference, mode):
    """Epoch 0 predicts the least-squares fit of (s + 1) / 2 and of unseen quality to the MOS."""
    run = build(*MODES[mode])
    f, t = reference(run.table)
    train, rows = run.parts["train"], run.parts["val"]
    cosine, ones = ((f * t).sum(1) + 1) / 2, np.ones(len(f))
    x = np.column_stack([cosine[train], run.floors.quality_unseen, ones[train]])
    plane = np.linalg.lstsq(x, run.table.consistency[train], rcond=None)[0]
    assert run.scorer.consistency.affine.tolist() == pytest.approx(plane[[0, 2, 1]], rel=1e-2)
    x = np.column_stack([cosine, run.floors.pred["linear_probe"]["q"], ones])
    assert baseline.evaluate(run, rows)["c"] == pytest.approx((x @ plane)[rows], abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_the_base_keeps_the_cosine_from_before_training(build, reference, mode):
    """However the towers move, consistency's base reads the cosine of the pretrained ones."""
    run = build(*MODES[mode], "--lr", 1e-3)
    rows = run.parts["val"]
    f, t = (torch.from_numpy(x[rows]) for x in reference(run.table))
    baseline.train_one_epoch(run, 1)
    out = baseline.evaluate(run, rows)
    a, b, e = run.scorer.consistency.affine.tolist()
    base = a * ((f * t).sum(1).numpy() + 1) / 2 + b + e * out["q"]
    assert out["c_base"] == pytest.approx(base, abs=1e-4)
    with torch.no_grad():
        now = next(run.images.stream(baseline.plain_views(rows, len(rows))))
        moved = (run.scorer.towers["image"].suffix(now) - f).abs().max()
    assert (moved > 1e-3) == (mode != "frozen")


def test_without_calibration_the_base_is_not_fitted(build):
    """--no_base_calibration starts elsewhere: a = 1, b' = e = 0 and a random quality base."""
    fitted, plain = build("--freeze_clip"), build("--freeze_clip", "--no_base_calibration", out="b")
    assert plain.scorer.consistency.affine.tolist() == [1, 0, 0]
    assert fitted.scorer.consistency.affine.tolist() != [1, 0, 0]
    rows, mos = fitted.parts["train"], baseline.human(fitted.table, fitted.parts["train"])
    good, bad = (baseline.metrics(baseline.evaluate(r, rows), mos) for r in (fitted, plain))
    assert good["rmse_q"] < bad["rmse_q"] and good["rmse_c"] < bad["rmse_c"]
    assert good["srocc_q"] > bad["srocc_q"] + 0.05


# --- intervals ------------------------------------------------------------------------------


def test_intervals_hold_the_point_estimate(train):
    """The result's 95 % intervals are ordered and contain the SROCC."""
    val = train("--freeze_clip", "--epochs", 1, "--val_ratio", 0.5).summary["val"]
    for t in "qc":
        low, high = val[f"interval_{t}"]
        assert -1 <= low < val[f"srocc_{t}"] < high <= 1


def test_the_bootstrap_draws_prompts_not_images():
    """Copies of the images of a prompt add no certainty; as many prompts do."""
    rng = np.random.default_rng(1)
    mos = rng.random(30)
    pred = mos + rng.normal(0, 0.3, 30)
    copies = [np.repeat(v, 8) for v in (pred, mos)]
    width = {}
    for name, (p, m), groups in (("single", (pred, mos), np.arange(30)),
                                 ("clusters", copies, np.repeat(np.arange(30), 8)),
                                 ("images", copies, np.arange(240))):
        low, high = baseline.bootstrap_interval(p, m, groups)
        assert low < baseline.srocc(p, m) < high
        width[name] = high - low
    assert width["clusters"] == pytest.approx(width["single"], rel=0.1)
    assert width["images"] < 0.5 * width["clusters"]


def test_the_bootstrap_is_near_the_textbook_interval():
    """For independent pairs the interval is about Fisher's."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=400)
    y = 0.7 * x + rng.normal(size=400)
    low, high = baseline.bootstrap_interval(x, y, np.arange(400))
    z = math.atanh(baseline.srocc(x, y))
    half = 1.96 * math.sqrt(1.06 / 397)
    assert low == pytest.approx(math.tanh(z - half), abs=0.03)
    assert high == pytest.approx(math.tanh(z + half), abs=0.03)


# --- repeats --------------------------------------------------------------------------------

REPEATS = ["--freeze_clip", "--lr", 1e-2, "--repeats", 2, "--epochs", 2]


def test_repeats_report_mean_spread_and_gain(train, capsys):
    """Means, sample SDs and paired 95 % gains are those of the single results."""
    capsys.readouterr()
    run = train(*REPEATS)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == read_json(run.folder / "repeats.json")
    one, two = result["repeats"]
    for name in baseline.METRIC_NAMES:
        a, b = one["val"][name], two["val"][name]
        assert result["mean"]["val"][name] == pytest.approx((a + b) / 2)
        assert result["sd"]["val"][name] == pytest.approx(abs(a - b) / math.sqrt(2))
    for floor in ("zero_shot", "linear_probe"):
        for t in "qc":
            key = f"srocc_{t}"
            diff = [r["val"][key] - r["floors"][floor][key] for r in (one, two)]
            half = 12.7062 * np.std(diff, ddof=1) / math.sqrt(2)
            gain = result["gain"][floor][key]
            assert gain["mean"] == pytest.approx(np.mean(diff))
            assert gain["high"] - gain["mean"] == pytest.approx(half, rel=1e-4)
            assert gain["mean"] - gain["low"] == pytest.approx(half, rel=1e-4)


def test_repeats_differ_in_split_and_share_the_cache(train, monkeypatch):
    """Each repeat has its own seed and split; an image is decoded once for all of them."""
    decoded, view = [], baseline.ImageBatches.view

    def count(self, index):
        decoded.append(index)
        return view(self, index)
    monkeypatch.setattr(baseline.ImageBatches, "view", count)
    run = train(*REPEATS)
    one, two = run.summary["repeats"]
    assert (one["seed"], two["seed"]) == (42, 43) and one["split"] != two["split"]
    assert sorted(decoded) == list(range(36))
    rows = read_csv(run.folder / "runs.csv")
    assert [row["seed"] for row in rows] == ["42", "43"]
    assert [row["split"] for row in rows] == [one["split"], two["split"]]


def test_with_a_test_part_the_gain_is_on_it(train):
    """Floors and gains of repeats are those of the test part where there is one."""
    run = train(*REPEATS, "--epochs", 1, "--test_ratio", 0.25)
    summary = run.summary
    diff = [r["test"]["srocc_q"] - r["floors_test"]["linear_probe"]["srocc_q"]
            for r in summary["repeats"]]
    assert summary["part"] == "test"
    assert summary["gain"]["linear_probe"]["srocc_q"]["mean"] == pytest.approx(np.mean(diff))
    assert {"val", "test", "train"} <= set(summary["mean"])


def test_finished_repeats_are_not_run_again(train, monkeypatch):
    """The same command again gives the same result without training; one more adds one."""
    first = train(*REPEATS)
    before = (first.folder / "runs.csv").read_bytes()
    trained, real = [], baseline.train_one_run

    def note(args, table, seed, checkpoint=None):
        trained.append(seed)
        return real(args, table, seed, checkpoint)
    monkeypatch.setattr(baseline, "train_one_run", note)
    again = train(*REPEATS)
    assert trained == [] and again.summary["mean"] == first.summary["mean"]
    assert (first.folder / "runs.csv").read_bytes() == before
    more = train(*REPEATS, "--repeats", 3)
    assert trained == [44] and more.summary["repeats"][:2] == first.summary["repeats"]


def test_an_interrupted_repeat_goes_on(train, monkeypatch):
    """Killed and restarted: nothing is trained twice, and the result is the same."""
    class Killed(BaseException):
        pass

    whole = train(*REPEATS, "--epochs", 3, out="whole").summary
    epochs, real = [], baseline.train_one_epoch

    def die(run, number):
        epochs.append((run.seed, number))
        if epochs[-1] == (43, 3) and epochs.count((43, 3)) == 1:
            raise Killed
        return real(run, number)
    monkeypatch.setattr(baseline, "train_one_epoch", die)
    with pytest.raises(Killed):
        train(*REPEATS, "--epochs", 3)
    epochs.clear()
    epochs.append((43, 3))
    summary = train(*REPEATS, "--epochs", 3).summary
    assert epochs[1:] == [(43, 3)]
    for name in ("mean", "sd", "gain"):
        assert summary[name] == whole[name]


def test_other_repeats_replace_nothing(train):
    """Repeats with other flags start anew; the old ones are kept whole, their summary included."""
    first = train(*REPEATS, "--epochs", 1)
    old = (first.folder / "repeats.json").read_bytes()
    result = (first.folder / "repeat_42" / "result.json").read_bytes()
    second = train(*REPEATS, "--epochs", 1, "--lr", 1e-3)
    assert second.summary["mean"] != first.summary["mean"]
    archive = first.folder / "archive"
    assert [p.read_bytes() for p in archive.glob("*/repeat_42/result.json")] == [result]
    assert old in [p.read_bytes() for p in archive.glob("*/repeats.json")]


def test_a_single_run_after_repeats_keeps_them(train):
    """A single run in the folder of repeats archives them."""
    first = train(*REPEATS, "--epochs", 1)
    old = (first.folder / "repeats.json").read_bytes()
    train("--freeze_clip", "--epochs", 1)
    assert [p.read_bytes() for p in first.folder.glob("archive/*/repeats.json")] == [old]
    assert not list(first.folder.glob("repeat_*"))


def test_one_repeat_can_be_resumed_by_itself(train):
    """--resume_from a repeat's checkpoint goes on with that run alone and destroys nothing."""
    first = train(*REPEATS)
    folder = first.folder / "repeat_43"
    before = read_json(folder / "result.json")
    summary = baseline.main(["--resume_from", str(folder / "baseline_last.pt")])
    assert summary["seed"] == 43 and summary["val"]["srocc_q"] == before["val"]["srocc_q"]
    assert (folder / "baseline_last.pt").exists() and not list(folder.glob("repeat_*"))
