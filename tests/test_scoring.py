"""--predict scores any picture as training did, keeps every column, and says what it could not."""

import contextlib
import io
import itertools
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import COLUMNS, draw, load, read_csv, write_csv, write_data
from PIL import Image

import baseline

SCORES = ["quality", "consistency", "quality_base", "consistency_base"]
REFINED = ["--use_refinement", "--refinement_layers", "1", "--refinement_dim", "32"]
HEADS = {
    "frozen": ["--freeze_clip"],
    "partial": ["--partial_freeze", "--freeze_layers", "2"],
    "full": [],
    "explanations": ["--freeze_clip", "--use_explanations"],
    "refinement": ["--freeze_clip", *REFINED],
    "two-branch": ["--freeze_clip", "--use_two_branch"],
    "direct": ["--freeze_clip", "--no_residual_learning"],
}
WITHIN = 1.5e-4  # 1e-5 on the MOS scale, after rounding to 4 decimals


def train_once(data, clip, folder, *more):
    """Train two epochs, the last of which counts as the best; returns its folder."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        scores = itertools.count()
        patch.setattr(baseline, "selection_score", lambda values, by: float(next(scores)))
        baseline.main(["--data_csv_path", str(data.csv), "--image_base_dir", str(data.images),
                       "--clip_model", f"local-dir:{clip}", "--output_dir", str(folder),
                       "--num_workers", "0", "--epochs", "2", "--batch_size", "8", "--no_plots",
                       "--lr", "3e-3", *more])
    return folder


@pytest.fixture(scope="module")
def trained(data, clips, tmp_path_factory):
    """Return the output folder of a run with some heads, trained on first use."""
    root, made = tmp_path_factory.mktemp("trained"), {}

    def get(heads="frozen"):
        if heads not in made:
            made[heads] = train_once(data, clips(), root / heads, *HEADS[heads])
        return made[heads]
    return get


@pytest.fixture
def score(trained, tmp_path, capfd):
    """Score a target; returns rows (None: nothing written), file, stdout, stderr and status."""
    def run(target, *more, heads="frozen", checkpoint=None, out="scores.csv"):
        path = tmp_path / out
        path.unlink(missing_ok=True)
        checkpoint = checkpoint or trained(heads) / "baseline_best.pt"
        capfd.readouterr()
        try:
            baseline.main(["--predict", str(target), "--checkpoint", str(checkpoint),
                           "--predictions_csv", str(path), "--num_workers", "0",
                           *map(str, more)])
            status = 0
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        return SimpleNamespace(rows=read_csv(path) if path.exists() else None, path=path, out=out,
                               err=err, status=status)
    return run


def by_name(rows, *columns):
    """Return {name: array of the numbers in some columns}, NaN where a cell is empty."""
    return {row["name"]: np.array([float(row[c] or "nan") for c in columns or SCORES])
            for row in rows}


def assert_same_scores(got, want, within=WITHIN):
    """Compare two results of by_name for the same images."""
    assert got.keys() == want.keys() and got
    for name, values in got.items():
        np.testing.assert_allclose(values, want[name], rtol=0, atol=within, err_msg=name)


def assert_refused(result, *words):
    """Check that a command ended with status 2, said some words and wrote nothing."""
    assert result.status == 2 and result.rows is None
    assert "Traceback" not in result.err and "error:" in result.err
    for word in words:
        assert word in result.err


# --- scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS)
def test_a_checkpoint_alone_scores_as_training_did(score, trained, data, heads, tmp_path,
                                                   monkeypatch):
    """Without any training flag, from any folder, the scores are those of the run itself."""
    folder = trained(heads)
    monkeypatch.chdir(tmp_path)
    result = score(data.csv, heads=heads)
    assert result.status == 0 and len(result.rows) == len(data.rows)
    want = by_name(read_csv(folder / "val_predictions.csv"))
    got = by_name(result.rows)
    assert_same_scores({name: got[name] for name in want}, want, within=1e-3)
    table = np.array(list(got.values()))
    assert table.std(axis=0).min() > 0.01  # the images do differ
    if heads != "direct":
        assert np.abs(table[:, :2] - table[:, 2:]).max() > 0.01  # and training did something


@pytest.mark.parametrize("heads", ["partial", "full"])
def test_trained_clip_weights_count(score, trained, data, heads, tmp_path):
    """Where CLIP was trained, a checkpoint with other CLIP weights scores differently."""
    content = load(trained(heads), "baseline_best.pt")
    name = "clip.visual.proj"
    content["state"][name] = content["state"][name].flip(0)
    torch.save(content, tmp_path / "other.pt")
    one = by_name(score(data.csv, heads=heads).rows)
    two = by_name(score(data.csv, checkpoint=tmp_path / "other.pt").rows)
    assert max(np.abs(one[name] - two[name]).max() for name in one) > 0.05


def test_every_input_column_is_kept(score, data, tmp_path):
    """The CSV's columns, texts and order stay; the five columns of scores come after them."""
    rows = [{**row, "note": f'a "{i}", 猫', "id": f"{i:05d}", "mos_quality": f"{i % 5}.50"}
            for i, row in enumerate(data.rows)][::-1]
    columns = ["id", *COLUMNS, "note"]
    shuffled = write_csv(tmp_path / "in.csv", rows, columns, encoding="utf-8-sig")
    result = score(shuffled, "--image_base_dir", data.images)
    assert list(result.rows[0]) == columns + SCORES + ["error"]
    assert [{c: row[c] for c in columns} for row in result.rows] == [
        {c: str(row[c]) for c in columns} for row in rows]
    assert all(row["error"] == "" for row in result.rows)
    assert all(re.fullmatch(r"\d(\.\d{1,4})?", row[c]) for row in result.rows for c in SCORES)
    assert f"{len(rows)} rows written to {result.path}" in result.out


def test_scores_are_clamped_and_on_the_mos_scale():
    """Each target has its own label scale; nothing leaves 0..scale."""
    frame = pd.DataFrame({"name": ["a", "b", "c"]})
    scores = {"q": np.array([-0.5, 0.5, 1.5]), "c": np.array([0.1, np.nan, 2.0]),
              "q_base": np.full(3, 0.25), "c_base": np.full(3, -1.0)}
    args = SimpleNamespace(min_quality=None, min_consistency=None)
    baseline.add_scores(frame, scores, {1: "broken"}, {"q": 10, "c": 5}, args)
    assert frame["quality"].tolist() == [0, 5, 10]
    assert frame["consistency"].fillna(-1).tolist() == [0.5, -1, 5]
    assert frame["quality_base"].tolist() == [2.5] * 3
    assert frame["consistency_base"].tolist() == [0] * 3
    assert frame["error"].tolist() == ["", "broken", ""] and "keep" not in frame


@pytest.mark.parametrize("more", [["--batch_size", 1], ["--batch_size", 5], ["--batch_size", 64],
                                  ["--num_workers", 2], ["--num_workers", 2, "--batch_size", 3]])
@pytest.mark.parametrize("heads", ["frozen", "full"])
def test_batches_and_workers_do_not_change_scores(score, data, heads, more):
    """The same scores come out whatever the batch size and the number of workers."""
    want = by_name(score(data.csv, heads=heads).rows)
    assert_same_scores(by_name(score(data.csv, *more, heads=heads).rows), want)


def test_the_order_of_files_does_not_change_scores(score, data, tmp_path):
    """A row's scores are its own, wherever it stands and whatever stands beside it."""
    want = by_name(score(data.csv).rows)
    order = np.random.default_rng(3).permutation(len(data.rows))
    mixed = write_csv(tmp_path / "mixed.csv", [data.rows[i] for i in order])
    result = score(mixed, "--image_base_dir", data.images, "--batch_size", 7)
    assert [row["name"] for row in result.rows] == [data.rows[i]["name"] for i in order]
    assert_same_scores(by_name(result.rows), want)
    few = write_csv(tmp_path / "few.csv", [data.rows[i] for i in order[:3]])
    got = by_name(score(few, "--image_base_dir", data.images).rows)
    assert_same_scores(got, {name: want[name] for name in got})


# --- targets --------------------------------------------------------------------------------


@pytest.fixture
def folder(data, tmp_path):
    """Copy five pictures to a folder, one of them deeper, beside files that are no pictures."""
    target = tmp_path / "my pictures"
    (target / "deep").mkdir(parents=True)
    for row in data.rows[:4]:
        shutil.copy(data.images / row["name"], target / row["name"])
    shutil.copy(data.images / data.rows[4]["name"], target / "deep" / "五.png")
    (target / "notes.csv").write_text("name\n")
    (target / "read me.txt").write_text("not a prompt")
    return target


def test_a_folder_is_scored_without_prompts(score, folder, data):
    """Every picture below a folder gets a quality; without a prompt there is no consistency."""
    result = score(folder)
    names = [row["name"] for row in data.rows[:4]]
    assert sorted(row["name"] for row in result.rows) == sorted([*names, "deep/五.png"])
    want = by_name(score(data.csv).rows)
    want["deep/五.png"] = want[data.rows[4]["name"]]
    for row in result.rows:
        assert row["consistency"] == row["consistency_base"] == row["prompt"] == row["error"] == ""
    q = ("quality", "quality_base")
    got = by_name(result.rows, *q)
    assert_same_scores(got, {name: want[name][[0, 2]] for name in got})
    assert result.status == 0


def test_prompts_of_a_folder(score, folder, data):
    """--prompt is every picture's prompt, unless a .txt file of the same name has its own."""
    rows = data.rows[:4]
    own = folder / rows[1]["name"]
    own.with_suffix(".txt").write_text("﻿" + rows[1]["prompt"] + "\n", encoding="utf-8")
    (folder / "deep" / "五.txt").write_text("一只猫在睡觉\n", encoding="utf-8")
    alone = {row["name"]: row for row in score(folder).rows}
    assert alone[own.name]["prompt"] == rows[1]["prompt"]
    assert alone["deep/五.png"]["prompt"] == "一只猫在睡觉"
    assert [name for name, row in alone.items() if row["consistency"]] == [
        name for name in alone if name in (own.name, "deep/五.png")]
    given = {row["name"]: row for row in score(folder, "--prompt", rows[0]["prompt"]).rows}
    assert given["deep/五.png"]["prompt"] == "一只猫在睡觉"
    assert all(row["consistency"] and row["consistency_base"] for row in given.values())
    got, want = by_name(given.values()), by_name(score(data.csv).rows)
    assert rows[0]["prompt"] == rows[1]["prompt"] == rows[2]["prompt"] == rows[3]["prompt"]
    assert_same_scores({r["name"]: got[r["name"]] for r in rows},
                       {r["name"]: want[r["name"]] for r in rows})
    other = by_name(score(folder, "--prompt", "green hills").rows)
    assert other[rows[0]["name"]][1] != pytest.approx(got[rows[0]["name"]][1], abs=1e-3)


def test_one_image(score, data):
    """A single picture is one row with its name."""
    row = data.rows[6]
    result = score(data.images / row["name"], "--prompt", row["prompt"])
    assert [(r["name"], r["prompt"]) for r in result.rows] == [(row["name"], row["prompt"])]
    want = by_name(score(data.csv).rows)[row["name"]]
    assert_same_scores(by_name(result.rows), {row["name"]: want})
    bare = score(data.images / row["name"]).rows[0]
    assert bare["consistency"] == "" and float(bare["quality"]) == pytest.approx(want[0], abs=1e-3)


@pytest.mark.parametrize("place", ["beside", "images", "given", "training"])
def test_where_a_csv_finds_its_images(score, data, tmp_path, place):
    """Names are relative to --image_base_dir, else to the CSV, its images/ or the training's."""
    where = {"beside": tmp_path / "job", "images": tmp_path / "job" / "images",
             "given": tmp_path / "elsewhere", "training": tmp_path / "unused"}[place]
    (tmp_path / "job").mkdir()
    where.mkdir(exist_ok=True)
    row = data.rows[3]
    if place != "training":  # another picture under the name that the training folder has too
        draw(np.random.default_rng(77)).save(where / row["name"])
    path = write_csv(tmp_path / "job" / "list.csv", [row])
    result = score(path, *(["--image_base_dir", where] if place == "given" else []))
    want = by_name(score(data.csv).rows)[row["name"]]
    same = np.abs(by_name(result.rows)[row["name"]] - want).max() < 1e-3
    assert result.status == 0 and same == (place == "training")


def test_a_csv_without_prompts(score, data, tmp_path):
    """A CSV of names alone gets qualities; --prompt gives all rows a prompt."""
    rows = data.rows[:5]
    path = write_csv(tmp_path / "names.csv", rows, ["name"])
    plain = score(path)
    assert list(plain.rows[0]) == ["name", *SCORES, "error"] and plain.status == 0
    assert all(row["quality"] and not row["consistency"] for row in plain.rows)
    given = score(path, "--prompt", rows[0]["prompt"])
    want = by_name(score(data.csv).rows)
    got = by_name(given.rows)
    assert_same_scores({r["name"]: got[r["name"]] for r in rows[:4]},
                       {r["name"]: want[r["name"]] for r in rows[:4]})


def test_empty_prompts_have_no_consistency(score, data, tmp_path):
    """A row whose prompt is blank gets no consistency, the others do."""
    rows = [{**row, "prompt": " " if i == 2 else row["prompt"]}
            for i, row in enumerate(data.rows[:4])]
    result = score(write_csv(tmp_path / "some.csv", rows))
    assert [bool(row["consistency"]) for row in result.rows] == [True, True, False, True]
    assert all(row["quality"] for row in result.rows)


def test_columns_with_other_names(score, data, clips, tmp_path):
    """A checkpoint remembers the names of its columns; the command line wins over it."""
    names = {"name": "file", "prompt": "text"}
    rows = [{**row, **{new: row[old] for old, new in names.items()}} for row in data.rows]
    columns = ["file", "text", *COLUMNS[2:]]
    renamed = SimpleNamespace(csv=write_csv(tmp_path / "renamed.csv", rows, columns),
                              images=data.images)
    out = train_once(renamed, clips(), tmp_path / "out", "--freeze_clip", "--name_column", "file",
                     "--prompt_column", "text")
    checkpoint = out / "baseline_best.pt"
    own = score(renamed.csv, checkpoint=checkpoint)
    assert list(own.rows[0]) == columns + SCORES + ["error"]
    other = score(data.csv, "--name_column", "name", "--prompt_column", "prompt",
                  checkpoint=checkpoint)
    want = {row["file"]: np.array([float(row[c]) for c in SCORES]) for row in own.rows}
    assert_same_scores(by_name(other.rows), want)
    assert_refused(score(data.csv, checkpoint=checkpoint), "file", "--name_column", "prompt")


def test_human_scores_named_like_ours_are_not_lost(score, data, clips, tmp_path):
    """MOS columns called quality and consistency are neither overwritten nor judged by us."""
    rows = [{**row, "quality": row["mos_quality"], "consistency": row["mos_align"]}
            for row in data.rows]
    named = SimpleNamespace(images=data.images, csv=write_csv(
        tmp_path / "named.csv", rows, ["name", "prompt", "quality", "consistency"]))
    out = train_once(named, clips(), tmp_path / "out", "--freeze_clip", "--quality_column",
                     "quality", "--consistency_column", "consistency")
    result = score(named.csv, checkpoint=out / "baseline_best.pt")
    assert "SROCC 1.0000" not in result.out + result.err
    if result.status == 2:
        assert_refused(result, "quality")
    else:
        kept = list(zip(*(row.values() for row in result.rows)))
        for column in ("quality", "consistency"):
            assert tuple(str(row[column]) for row in rows) in kept


# --- metrics and limits ---------------------------------------------------------------------

METRICS = re.compile(r"^(quality|consistency): SROCC (\S+), PLCC (\S+), KROCC (\S+), RMSE (\S+) "
                     r"on (\d+) images$", re.MULTILINE)


def printed_metrics(text):
    """Return {target: [SROCC, PLCC, KROCC, RMSE, images]} of what was printed."""
    return {found[0]: [float(v) for v in found[1:]] for found in METRICS.findall(text)}


def test_metrics_are_printed_where_there_are_human_scores(score, data):
    """With MOS columns, the metrics of both targets follow from the written scores."""
    result = score(data.csv)
    got = printed_metrics(result.out)
    assert set(got) == {"quality", "consistency"}
    for target, column in (("quality", "mos_quality"), ("consistency", "mos_align")):
        pred = np.array([float(row[target]) for row in result.rows]) / 5
        mos = np.array([float(row[column]) for row in result.rows]) / 5
        want = [scipy.stats.spearmanr(pred, mos)[0], scipy.stats.pearsonr(pred, mos)[0],
                scipy.stats.kendalltau(pred, mos)[0], np.sqrt(((pred - mos) ** 2).mean()), 36]
        assert got[target] == pytest.approx(want, abs=2e-3)


def test_metrics_on_the_validation_part_are_the_runs_own(score, trained, data, tmp_path):
    """Scoring the validation images prints the SROCC that training reported for them."""
    rows = read_csv(trained() / "val_predictions.csv")
    val = write_csv(tmp_path / "val.csv", rows)
    got = printed_metrics(score(val, "--image_base_dir", data.images).out)
    want = baseline.read_json(trained() / "result.json")["val"]
    for target in ("quality", "consistency"):
        assert got[target][:4] == pytest.approx(
            [want[f"{m}_{target[0]}"] for m in ("srocc", "plcc", "krocc", "rmse")], abs=1e-4)
        assert got[target][4] == len(rows)


def test_metrics_skip_rows_without_a_human_score(score, data, tmp_path):
    """Only rows with a MOS are judged; without the column nothing is."""
    rows = [{**row, "mos_quality": "" if i < 10 else row["mos_quality"]}
            for i, row in enumerate(data.rows)]
    path = write_csv(tmp_path / "part.csv", rows, ["name", "prompt", "mos_quality"])
    got = printed_metrics(score(path).out)
    assert set(got) == {"quality"} and got["quality"][4] == 26
    bare = write_csv(tmp_path / "bare.csv", rows, ["name", "prompt"])
    assert "SROCC" not in score(bare).out


@pytest.mark.parametrize("mos, count", [([], 1), ([2.5], 1), (["", "", ""], 3)])
def test_too_few_human_scores_are_no_error(score, data, tmp_path, mos, count):
    """Where no correlation exists, the scores are written all the same."""
    rows = [{**row, "mos_quality": m} for row, m in zip(data.rows, mos or [1])]
    result = score(write_csv(tmp_path / "few.csv", rows, ["name", "prompt", "mos_quality"]))
    assert result.status == 0 and len(result.rows) == count
    assert all(row["quality"] for row in result.rows)


@pytest.mark.parametrize("use", [["quality"], ["consistency"], ["quality", "consistency"]])
def test_limits_add_a_column_and_are_counted(score, data, use):
    """`keep` says whether every given limit holds; the number that passes is printed."""
    plain = score(data.csv)
    assert "keep" not in plain.rows[0] and "pass" not in plain.out
    # A limit that is one of the scores: at least means that it passes.
    limits = {name: sorted(float(row[name]) for row in plain.rows)[18] for name in use}
    flags = [part for name, limit in limits.items() for part in (f"--min_{name}", limit)]
    result = score(data.csv, *flags)
    want = [all(float(row[name]) >= limit for name, limit in limits.items())
            for row in result.rows]
    assert [row["keep"] for row in result.rows] == [str(good) for good in want]
    assert 0 < sum(want) < len(want) and (len(use) == 2 or sum(want) == 18)
    assert f"{sum(want)} of {len(want)} images pass" in result.out


def test_what_has_no_score_does_not_pass(score, folder):
    """Without a prompt there is no consistency to pass a limit with, even a limit of 0."""
    result = score(folder, "--min_consistency", 0)
    assert {row["keep"] for row in result.rows} == {"False"} and "0 of 5 images pass" in result.out
    assert {row["keep"] for row in score(folder, "--min_quality", 0).rows} == {"True"}


# --- standard output ------------------------------------------------------------------------


def test_standard_output_is_a_clean_csv(score, data, tmp_path):
    """With - stdout is the CSV and nothing else, whatever there is to say on stderr."""
    rows = [*data.rows[:6], {**data.rows[0], "name": "gone.png"},
            {**data.rows[7], "prompt": "long " * 200}]
    path = write_csv(tmp_path / "in.csv", rows)
    options = ["--image_base_dir", data.images, "--min_quality", 1]
    to_file = score(path, *options)
    written = to_file.path.read_text(encoding="utf-8")
    result = score(path, *options, "--predictions_csv", "-")
    assert result.out == written and result.status == to_file.status == 1
    assert result.rows is None and not (tmp_path / "-").exists()
    for said in ("images pass", "could not be read", "SROCC", "tokens"):
        assert said in result.err and said not in result.out
    assert len(list(pd.read_csv(io.StringIO(result.out))["quality"])) == 8


# --- unreadable images ----------------------------------------------------------------------


def break_images(folder, data):
    """Write files that are no readable pictures; returns their names."""
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    whole = (data.images / data.rows[1]["name"]).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[:len(whole) * 2 // 3])
    png = (data.images / data.rows[0]["name"]).read_bytes()
    (folder / "damaged.png").write_bytes(png[:60] + bytes(40) + png[100:])
    (folder / "cut.gif").write_bytes(b"GIF89a")
    (folder / "wrong.webp").write_bytes(b"RIFF\x10\x00\x00\x00WEBPVP8 " + bytes(8))
    return ["empty.png", "text.jpg", "cut.jpg", "damaged.png", "cut.gif", "wrong.webp"]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_the_others_scored(score, folder, data, workers):
    """A damaged file gets a reason instead of scores; the rest is as it was; the status is 1."""
    want = by_name(score(folder, "--prompt", "green hills").rows)
    bad = break_images(folder, data)
    result = score(folder, "--prompt", "green hills", "--num_workers", workers, "--batch_size", 3)
    assert result.status == 1 and "Traceback" not in result.err
    broken = {row["name"]: row for row in result.rows if row["error"]}
    assert set(broken) == set(bad)
    assert all(row[name] == "" for row in broken.values() for name in SCORES)
    got = by_name([row for row in result.rows if not row["error"]])
    assert_same_scores(got, want)
    assert f"{len(bad)} of {len(bad) + 5} images could not be read" in result.out


def test_missing_files_of_a_csv_are_errors_of_their_rows(score, data, tmp_path):
    """A name without a file, or no name at all, does not stop the others."""
    rows = [*data.rows[:3], {**data.rows[3], "name": "gone.png"}, {**data.rows[4], "name": ""}]
    result = score(write_csv(tmp_path / "in.csv", rows), "--image_base_dir", data.images,
                   "--min_quality", 0)
    assert result.status == 1 and [bool(row["error"]) for row in result.rows] == [0, 0, 0, 1, 1]
    assert [row["keep"] for row in result.rows] == ["True"] * 3 + ["False"] * 2
    assert printed_metrics(result.out)["quality"][4] == 3


def test_no_image_readable(score, data, tmp_path):
    """Where nothing can be read, every row has its reason and the status is 1."""
    rows = [{**row, "name": f"gone_{i}.png"} for i, row in enumerate(data.rows[:3])]
    result = score(write_csv(tmp_path / "in.csv", rows))
    assert result.status == 1 and all(row["error"] for row in result.rows)
    assert "3 of 3" in result.out and "Traceback" not in result.err


# --- kinds of pictures ----------------------------------------------------------------------


def picture(seed=5):
    """Return a picture with no symmetry and strong colours."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((56, 40), Image.Resampling.BILINEAR)


def write_kinds(folder):
    """Write pictures of many kinds, each with an RGB twin; returns the names of both."""
    rgb = picture()
    wide = np.asarray(rgb.convert("L"), dtype=np.uint16) * 257
    frames = [picture(s).quantize(32) for s in (5, 6)]
    kinds = {"rgba.png": rgb.convert("RGBA"), "cmyk.tiff": rgb.convert("CMYK"),
             "palette.png": rgb.quantize(16), "grey.png": rgb.convert("L"),
             "grey_alpha.png": rgb.convert("LA"), "two.png": rgb.convert("1"),
             "wide.png": Image.fromarray(wide)}
    for name, image in kinds.items():
        image.save(folder / name)
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    rgb.save(folder / "lossless.webp", lossless=True)
    rgb.save(folder / "bitmap.bmp")
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:], duration=100)
    twins = {name: image.convert("RGB") for name, image in kinds.items()}
    twins |= {"wide.png": rgb.convert("L").convert("RGB"), "moving.gif": frames[0].convert("RGB"),
              "lossless.webp": rgb, "bitmap.bmp": rgb,
              "cmyk.jpg": Image.open(folder / "cmyk.jpg").convert("RGB")}
    for name, twin in twins.items():
        twin.save(folder / f"twin_{name}.png")
    return list(twins)


def test_every_kind_of_picture_scores_like_its_rgb_twin(score, tmp_path):
    """Alpha, CMYK, palettes, 16 bits and animations (their first frame) score like plain RGB."""
    folder = tmp_path / "kinds"
    folder.mkdir()
    names = write_kinds(folder)
    assert Image.open(folder / "moving.gif").n_frames == 2
    assert Image.open(folder / "wide.png").mode.startswith("I")
    result = score(folder, "--prompt", "a red house")
    assert result.status == 0 and len(result.rows) == 2 * len(names)
    got = by_name(result.rows)
    twins = {name: got[f"twin_{name}.png"] for name in names}
    assert_same_scores({name: got[name] for name in names}, twins)
    assert len({tuple(values) for values in twins.values()}) >= 5
    for row in result.rows:
        assert all(0 <= float(row[c]) <= 5 for c in SCORES)


TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_rotated_files_score_like_their_upright_twins(score, tmp_path, suffix):
    """The EXIF orientation is applied, all eight of it."""
    folder = tmp_path / "turned"
    folder.mkdir()
    for number, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = number
        picture().save(folder / f"{number}.{suffix}", exif=exif)
        stored = Image.open(folder / f"{number}.{suffix}")
        stored.convert("RGB").save(folder / f"{number}_as_stored.png")
        stored.convert("RGB").transpose(turn).save(folder / f"{number}_upright.png")
    got = by_name(score(folder, "--prompt", "a red house").rows)
    turned = {n: got[f"{n}.{suffix}"] for n in TURNS}
    assert_same_scores(turned, {n: got[f"{n}_upright.png"] for n in TURNS})
    for n in TURNS:
        assert np.abs(turned[n] - got[f"{n}_as_stored.png"]).max() > 5 * WITHIN


# --- what is refused ------------------------------------------------------------------------


def test_a_missing_or_foreign_checkpoint_is_refused(score, data, tmp_path):
    """A checkpoint must exist and be one of this program's."""
    assert_refused(score(data.csv, checkpoint=tmp_path / "none.pt"), "none.pt", "no file")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert_refused(score(data.csv, checkpoint=tmp_path / "text.pt"), "text.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    assert_refused(score(data.csv, checkpoint=tmp_path / "foreign.pt"), "foreign.pt")


@pytest.mark.parametrize("name", ["nothing.csv", "nothing", "nothing.png"])
def test_a_missing_target_is_refused(score, tmp_path, name):
    """A target that is not there is named."""
    assert_refused(score(tmp_path / name), name)


def test_targets_without_images_are_refused(score, tmp_path):
    """An empty folder and a CSV without rows say that there is nothing to score."""
    (tmp_path / "empty").mkdir()
    assert_refused(score(tmp_path / "empty"), "empty", "no images")
    (tmp_path / "header.csv").write_text("name,prompt\n")
    assert_refused(score(tmp_path / "header.csv"), "header.csv", "row")


def test_a_csv_without_the_name_column_is_refused(score, data, tmp_path):
    """The missing column, those there are, and the flag are named."""
    path = write_csv(tmp_path / "in.csv", [{"picture": r["name"], **r} for r in data.rows],
                     ["picture", "prompt"])
    assert_refused(score(path), "name", "picture, prompt", "--name_column")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "deep/../../secret.png",
                                  "link.png", "linked/secret.png", "secret.png\0.png"])
def test_names_that_leave_the_folder_are_refused(score, tmp_path, name):
    """No name, link or absolute path leads out of the folder of images."""
    outside, base = tmp_path / "outside", tmp_path / "outside" / "base"
    (base / "deep").mkdir(parents=True)
    picture().save(outside / "secret.png")
    picture().save(base / "good.png")
    (base / "link.png").symlink_to(outside / "secret.png")
    (base / "linked").symlink_to(outside, target_is_directory=True)
    path = write_csv(tmp_path / "in.csv", [{"name": n, "prompt": "x"} for n in ("good.png", name)],
                     ["name", "prompt"])
    result = score(path, "--image_base_dir", base)
    assert_refused(result, str(base), name.split("\0")[0])


def test_a_csv_that_is_none_is_refused(score, tmp_path):
    """A CSV in another encoding is named with its remedy."""
    (tmp_path / "gbk.csv").write_bytes("name,prompt\na.png,狗\n".encode("gbk"))
    assert_refused(score(tmp_path / "gbk.csv"), "gbk.csv", "UTF-8")


def test_a_side_prompt_in_another_encoding_is_named(score, folder, data):
    """A .txt file that is not UTF-8 ends in a message that names it, not in a traceback."""
    path = (folder / data.rows[0]["name"]).with_suffix(".txt")
    path.write_bytes("狗".encode("gbk"))
    assert_refused(score(folder), path.name, "UTF-8")


def test_changed_clip_weights_are_refused(score, data, clips, tmp_path):
    """A checkpoint that holds no CLIP weights is of use with the same CLIP only."""
    clip = shutil.copytree(clips(), tmp_path / "clip")
    checkpoint = train_once(data, clip, tmp_path / "out", "--freeze_clip") / "baseline_best.pt"
    assert score(data.csv, checkpoint=checkpoint).status == 0
    weights = clip / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"abcd")
    result = score(data.csv, checkpoint=checkpoint)
    assert_refused(result, "weights", str(checkpoint))
    weights.unlink()
    assert_refused(score(data.csv, checkpoint=checkpoint), "weights", str(clip))
    weights.write_bytes(whole)
    assert score(data.csv, checkpoint=checkpoint).status == 0


def test_an_output_that_cannot_be_written_is_refused(score, data, tmp_path):
    """A path below a file is no place for the predictions."""
    (tmp_path / "file").write_text("")
    result = score(data.csv, "--predictions_csv", tmp_path / "file" / "out.csv")
    assert_refused(result, "out.csv", "writable")


def test_other_pictures_than_those_of_training(score, tmp_path):
    """Pictures of any size that training never saw get scores that follow what was learned."""
    other = write_data(tmp_path / "other", seed=9)
    result = score(other.csv)
    got = [float(row["quality"]) for row in result.rows]
    mos = [float(row["mos_quality"]) for row in result.rows]
    assert result.status == 0 and scipy.stats.spearmanr(got, mos)[0] > 0.5
