"""One score alone, rows that lack one, scores below 0; splits and groups that the data bring."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import COLUMNS, load, read_csv, read_json, same_tensors, write_csv

import baseline

NAMES = {"q": ("mos_quality", "quality"), "c": ("mos_align", "consistency")}
HEADS = ["--freeze_clip", "--lr", 1e-3]


@pytest.fixture
def changed(data, tmp_path):
    """Return the data changed: changed(function of (index, row) that returns new cells)."""
    def make(change=lambda i, row: {}, without=(), extra=()):
        rows = [{**row, **change(i, row)} for i, row in enumerate(data.rows)]
        columns = [name for name in (*COLUMNS, *extra) if name not in without]
        return SimpleNamespace(csv=write_csv(tmp_path / "changed.csv", rows, columns),
                               images=data.images, rows=rows)
    return make


# --- one score ------------------------------------------------------------------------------


@pytest.mark.parametrize("only, other", ["qc", "cq"])
@pytest.mark.parametrize("more, empty", [
    ([], False), (["--use_refinement", "--use_two_branch"], True),
    (["--no_residual_learning", "--use_explanations"], False), (["--no_base_calibration"], True)])
def test_one_score_alone(train, changed, capsys, only, other, more, empty):
    """The other target is in no line, number, column or picture, and no weight becomes NaN."""
    column, title = NAMES[other]
    data = changed(lambda i, row: {column: ""}, without=() if empty else (column,))
    run = train(*HEADS, "--test_ratio", 0.3, "--head_lr", 0.1, *more, data=data)
    said = capsys.readouterr().out
    line, rest = said.split("\n", 1)
    assert line == f"only {NAMES[only][1]} is trained: there are no scores of {title}"
    assert f"_{other.upper()}" not in rest and f" {other.upper()} " not in rest
    assert title not in rest.replace("w_" + title, "").split('{"time"')[0]
    assert not [key for key in run.row if key.endswith(f"_{other}")]
    assert np.isfinite([run.row[f"test_{m}_{only}"] for m in baseline.METRICS]).all()
    log = read_csv(run.folder / "training_log.csv")
    assert all((value == "") == (f"_{other}" in key) for key, value in log[0].items())
    for part in ("val", "test"):
        assert not [key for key in read_csv(run.folder / f"{part}_predictions.csv")[0]
                    if title in key and not (empty and key == column)]
    content = load(run.folder)
    assert [*content["targets"]] == [only]
    assert all(value.isfinite().all() for value in content["state"].values())


def test_a_missing_score_changes_nothing_of_the_other(build, changed):
    """Quality's probe, base and losses are the same whether consistency is there or not."""
    both, one = (build(*HEADS, "--dropout", 0, data=changed(without=without), out=out)
                 for without, out in (((), "both"), (("mos_align",), "one")))
    assert np.array_equal(both.floors["linear_probe"]["q"], one.floors["linear_probe"]["q"])
    got = [baseline.train_one_epoch(run, 1) for run in (both, one)]
    assert got[0]["loss_q"] == pytest.approx(got[1]["loss_q"], rel=1e-6)
    assert got[1]["loss"] == pytest.approx(got[1]["loss_q"] / 2)


def test_without_quality_consistency_starts_at_its_cosine(build, changed):
    """Its base is the least-squares line on the cosine, and the quality head is 0.5 for all."""
    run = build(*HEADS, data=changed(without=["mos_quality"]))
    rows, c, s0 = run.parts["train"], run.table.frame["c"].to_numpy(), run.s0.numpy()
    slope, intercept = np.polyfit((s0[rows] + 1) / 2, c[rows], 1)
    a, b, e = run.scorer.consistency.affine.tolist()
    assert (a, b, e) == pytest.approx((slope, intercept, 0), rel=1e-2, abs=1e-6)
    baseline.train_one_epoch(run, 1)
    assert (baseline.evaluate(run, "train")[0]["q"] == 0.5).all()


def lacking(i, row):
    """Let a third of the rows lack quality, another third consistency."""
    return [{}, {"mos_quality": ""}, {"mos_align": " "}][i % 3]


def test_rows_that_lack_a_score_train_the_other(build, changed):
    """A loss is the mean over rows that have it; another row's gradient is exactly none."""
    run = build(*HEADS, "--dropout", 0, "--augment", "none", data=changed(lacking))
    rows, frame = run.parts["train"], run.table.frame
    pred = baseline.evaluate(run, "train")[0]
    run.optimizer.param_groups[0]["base_lr"] = run.optimizer.param_groups[-1]["base_lr"] = 1e-30
    got = baseline.train_one_epoch(run, 1)
    views = baseline.plan_views(rows)
    for t in "qc":
        errors = (pred[t] - frame[t].iloc[rows].to_numpy()) ** 2
        assert 0 < errors.isna().sum() < len(rows)
        assert got[f"loss_{t}"] == pytest.approx(errors.mean(), rel=1e-4)
        weights = baseline.loss_weights(run, views)[t]
        assert ((weights == 0) == errors.isna().to_numpy()).all()
    out = {t: torch.full((len(rows),), 0.5, requires_grad=True) for t in "qc"}
    sum((loss * torch.from_numpy(baseline.loss_weights(run, views)[t])).sum() for t, loss in
        baseline.losses(out, baseline.targets_of(run, torch.from_numpy(rows))).items()).backward()
    for t in "qc":
        assert ((out[t].grad == 0).numpy() == frame[t].iloc[rows].isna().to_numpy()).all()


def test_metrics_and_predictions_of_rows_that_have_the_score(train, changed):
    """Numbers are those of the rows with a score; every row is predicted, cells stay as given."""
    run = train(*HEADS, "--val_ratio", 0.4, data=changed(lacking))
    rows = read_csv(run.folder / "val_predictions.csv")
    for t, (column, title) in NAMES.items():
        pairs = [(float(row[title]), float(row[column])) for row in rows if row[column].strip()]
        assert 0 < len(pairs) < len(rows)
        assert run.row[f"val_srocc_{t}"] == pytest.approx(scipy.stats.spearmanr(*zip(*pairs))[0])


def test_resuming_one_score_ends_with_the_same_weights(train, changed, tmp_path, monkeypatch):
    """A run of one score resumes exactly; its images are scored without the other."""
    data, real = changed(without=["mos_align"]), baseline.train_one_epoch
    whole = train(*HEADS, data=data)

    def die(run, epoch):
        if epoch > 1:
            raise MemoryError
        return real(run, epoch)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(baseline, "train_one_epoch", die)
        train(*HEADS, data=data, out="half")
    half = tmp_path / "half"
    assert load(half)["progress"]["epoch"] == 1
    baseline.main(["--resume_from", half / "baseline_last.pt"])
    assert same_tensors(load(half)["state"], load(whole.folder)["state"])
    scores = tmp_path / "scores.csv"
    baseline.main(["--predict", data.images, "--checkpoint", whole.folder / "baseline_best.pt",
                   "--predictions_csv", scores, "--num_workers", 0])
    assert list(read_csv(scores)[0]) == ["name", "prompt", "quality", "quality_base", "error",
                                         "rank_in_prompt"]


def test_scores_without_any_prompt(train, changed, capsys):
    """Quality needs no prompt column; each image is a group of its own then."""
    run = train(*HEADS, data=changed(without=["mos_align", "prompt", "explanation"]))
    assert "nearly every prompt is unique (0 prompts, 36 images)" in capsys.readouterr().out
    assert len(read_csv(run.folder / "val_predictions.csv")) == 7


@pytest.mark.parametrize("without, more, words", [
    (["mos_quality", "mos_align"], [], ["mos_quality, mos_align is missing"]),
    (["mos_align"], ["--consistency_column", "close"], ["close is missing"]),
    (["mos_align"], ["--select_by", "consistency"], ["--select_by is consistency", "drop"]),
    (["mos_quality"], ["--w_c", 0], ["--w_c 0", "drop"]),
    (["prompt"], [], ["prompt is missing"])])
def test_one_score_is_refused_where_the_other_is_asked_for(refused, changed, without, more, words):
    """Named columns must be there, and flags may not need scores that are not."""
    said = refused(*more, data=changed(without=without))
    assert all(word in said for word in words), said


# --- scores below 0 -------------------------------------------------------------------------


def test_scores_below_0(train, changed, capsys, tmp_path, data):
    """z-scores are read from -N to N, and people see them on that scale, also by --predict."""
    z = changed(lambda i, row: {"mos_quality": round(row["mos_quality"] - 2.5, 3)})
    run = train(*HEADS, "--val_ratio", 0.4, data=z)
    said = capsys.readouterr().out
    assert "mos_quality is below 0 in" in said and "from -1 to 1" in said
    content = load(run.folder, "baseline_best.pt")
    assert content["targets"] == {"q": (-1, 1), "c": (0, 5)}
    rows = read_csv(run.folder / "val_predictions.csv")
    assert min(float(row["quality"]) for row in rows) < 0
    error = [(float(row["quality"]) - float(row["mos_quality"])) / 2 for row in rows]
    assert run.row["val_rmse_q"] == pytest.approx(np.sqrt(np.mean(np.square(error))), abs=1e-3)
    baseline.main(["--predict", z.csv, "--image_base_dir", data.images, "--checkpoint",
                   run.folder / "baseline_best.pt", "--predictions_csv", tmp_path / "s.csv",
                   "--num_workers", 0, "--min_quality", -0.5])
    scores = {row["name"]: row for row in read_csv(tmp_path / "s.csv")}
    for row in rows:
        got = float(scores[row["name"]]["quality"])
        assert got == pytest.approx(float(row["quality"]), abs=1e-3)
        assert (scores[row["name"]]["keep"] == "True") == (got >= -0.5)


def test_turned_scores_are_said_to_be_dmos(train, changed, reference_order, capsys):
    """Consistency that falls with the cosine gets one line; one that rises gets none."""
    for sign, said in ((-1, 1), (1, 0)):
        order = reference_order
        train(*HEADS, "--val_ratio", 0.6, "--epochs", 1, data=changed(
            lambda i, row: {"mos_align": 2.5 + sign * order[row["name"]] / 20}), out=f"o{sign}")
        text = capsys.readouterr().out
        assert text.count("consistency: the SROCC of a floor is clearly below 0") == said


@pytest.fixture
def reference_order(build):
    """Return {image name: rank of its cosine}."""
    run = build("--freeze_clip", out="order")
    return dict(zip(run.table.frame["name"], scipy.stats.rankdata(run.s0.numpy())))


# --- the split that the data bring ----------------------------------------------------------


def by_prompt(words):
    """Return a change that gives the images of prompt k the part words[k % len(words)]."""
    return lambda i, row: {"part": words[(i // 4) % len(words)]}


def parts_of(folder):
    """Return {part: names} of a finished run's predictions."""
    return {path.name.split("_")[0]: {row["name"] for row in read_csv(path)}
            for path in folder.glob("*_predictions.csv")}


@pytest.mark.parametrize("words", [("train", "val", "test"), ("Training ", "VALIDATION", "testing"),
                                   ("train_set", " dev", "Test-Set"), ("训练集", "验证集", "测试")])
def test_the_split_of_the_data_is_kept(train, changed, words):
    """Each usual name of a part is understood, whatever its case; the test part is judged."""
    data = changed(by_prompt(words), extra=["part"])
    run = train(*HEADS, "--epochs", 1, "--split_column", "part", data=data)
    assert run.row["part"] == "test" and parts_of(run.folder) == {
        name: {row["name"] for row in data.rows if row["part"] == word}
        for name, word in zip(("val", "test"), words[1:])}


def test_val_is_drawn_from_train_by_prompt(build, changed):
    """Without val a share of train becomes it, by the seed; test stays what it is."""
    data = changed(by_prompt(["train", "train", "test"]), extra=["part"])
    runs = [build(*HEADS, "--split_column", "part", "--val_ratio", 0.3, "--seed", seed, data=data,
                  out=f"seed{seed}") for seed in range(3)]
    for run in runs:
        groups = run.table.frame["group_id"].to_numpy()
        assert len(run.parts["val"]) == 8 and len(run.parts["test"]) == 12
        assert not set(groups[run.parts["val"]]) & set(groups[run.parts["train"]])
        assert set(run.table.frame["part"].iloc[run.parts["test"]]) == {"test"}
    assert len({tuple(run.parts["val"]) for run in runs}) > 1


def test_unlabelled_test_rows_are_predicted_and_val_is_judged(train, changed):
    """Test rows need no score, elsewhere each row needs one."""
    words = ["train", "val", "test"]
    data = changed(lambda i, row: by_prompt(words)(i, row) | (
        {"mos_quality": "", "mos_align": ""} if i // 4 % 3 == 2 else {}), extra=["part"])
    run = train(*HEADS, "--split_column", "part", data=data)
    assert run.row["part"] == "val" and not [key for key in run.row if key.startswith("test_")]
    rows = read_csv(run.folder / "test_predictions.csv")
    assert len(rows) == 12 and all(0 < float(row["quality"]) < 5 for row in rows)


@pytest.mark.parametrize("words, more, wanted", [
    (["train", "eval"], [], ["no part ('eval'): 16 rows", "train, val or test"]),
    (["train", "", "0"], [], ["no part ('', '0')"]), (["test"], [], ["train has 0"]),
    (["train", "test"], ["--test_ratio", "0.2"], ["drop --test_ratio"])])
def test_splits_that_are_refused(refused, changed, words, more, wanted):
    """Unknown parts are named with their rows; nothing may contradict the column."""
    data = changed(by_prompt(words), extra=["part"])
    said = refused("--split_column", "part", *more, data=data) if not more else None
    if more:
        with pytest.raises(SystemExit) as stop:
            baseline.parse_args(["--split_column", "part", *more])
        assert stop.value.code == 2
    else:
        assert all(word in said for word in wanted), said


def test_repeats_on_a_split_of_the_data_vary_the_seed_alone(train, changed, capsys):
    """They have a mean and a spread, but no interval over splits."""
    data = changed(by_prompt(["train", "train", "val"]), extra=["part"])
    run = train(*HEADS, "--epochs", 1, "--repeats", 2, "--split_column", "part", data=data)
    result = read_json(run.folder / "result.json")
    assert len({row["split"] for row in result["repeats"]}) == 1
    assert not [key for key in result if key.endswith(("_low", "_high"))]
    said = capsys.readouterr().out.split("mean +- SD", 1)
    assert "val of 2 seeds" in said[0] and "paired, mean +- SD: Q" in said[1]


def test_a_leaking_and_an_ignored_split_are_said(train, changed, capsys):
    """Prompts on both sides of a given split are counted; a split that is not used is named."""
    data = changed(lambda i, row: {"fold": ["train", "Test"][i % 2]}, extra=["fold"])
    train(*HEADS, "--epochs", 1, data=data)
    said = capsys.readouterr().out
    assert "the column fold is ignored: --split_column fold" in said and "leaks" not in said
    train(*HEADS, "--epochs", 1, "--split_column", "fold", data=data, out="two")
    assert "leaks: 14 of 18 test images have a prompt" in capsys.readouterr().out


def test_a_group_stays_on_one_side(build, changed, refused):
    """Groups replace prompts in the split, the cross-validation and the intervals."""
    data = changed(lambda i, row: {"model": ["SD 1", "sd  1 ", "mj", "dalle", "kd"][i % 5]},
                   extra=["model"])
    run = build(*HEADS, "--group_column", "model", "--val_ratio", 0.3, data=data)
    groups, frame = run.table.frame["group_id"], run.table.frame
    assert groups.nunique() == 4
    assert not set(groups.iloc[run.parts["val"]]) & set(groups.iloc[run.parts["train"]])
    assert set(frame["prompt"].iloc[run.parts["val"]]) & set(frame["prompt"].iloc[
        run.parts["train"]])
    empty = changed(lambda i, row: {"model": "" if i == 3 else "a"}, extra=["model"])
    assert "empty model: 1 row (5)" in refused("--group_column", "model", data=empty)
