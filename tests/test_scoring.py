"""--predict scores any picture as training did, keeps every column, and says what it could not."""

import contextlib
import io
import itertools
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import COLUMNS, draw, load, read_csv, read_json, write_csv
from PIL import Image
from test_faults import BAD_IMAGES

import baseline

SCORES = ["quality", "consistency", "quality_base", "consistency_base"]
ADDED = [*SCORES, "error", "rank_in_prompt"]
HEADS = {
    "frozen": ["--freeze_clip"],
    "quick": ["--freeze_clip", "--quick_gelu"],
    "partial": ["--partial_freeze", "--freeze_layers", "2"],
    "full": [],
    "explanations": ["--freeze_clip", "--use_explanations"],
    "refinement": ["--freeze_clip", "--use_refinement", "--refinement_layers", "1",
                   "--refinement_dim", "32"],
    "two-branch": ["--freeze_clip", "--use_two_branch"],
    "direct": ["--freeze_clip", "--no_residual_learning"],
}
WITHIN = 5e-5 + 1e-6  # 1e-5 of the largest label scale, after rounding to 6 decimals


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


def assert_same_scores(got, want):
    """Compare two results of by_name for the same images."""
    assert got.keys() == want.keys() and got
    for name, values in got.items():
        np.testing.assert_allclose(values, want[name], rtol=0, atol=WITHIN, err_msg=name)


def assert_refused(result, *words):
    """Check that a command ended with status 2, said some words and wrote nothing."""
    assert result.status == 2 and result.rows is None
    assert "Traceback" not in result.err and "error:" in result.err
    for word in words:
        assert word in result.err


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
    assert_same_scores({name: got[name] for name in want}, want)
    table = np.array(list(got.values()))
    assert table.std(axis=0).min() > 0.01  # the images do differ
    for content in (read_json(folder / "config.json"), load(folder)):
        assert content["identity"]["quick_gelu"] is (heads == "quick")
    if heads != "direct":
        assert np.abs(table[:, :2] - table[:, 2:]).max() > 0.01  # and training did something


@pytest.mark.parametrize("heads", ["frozen", "partial", "full"])
def test_both_states_of_the_towers_share_what_is_frozen(score, trained, data, monkeypatch, heads):
    """The towers before and after training differ in what was trained, and only that is twice."""
    state = load(trained(heads), "baseline_best.pt")["state"]
    made, make_towers = [], baseline.make_towers
    monkeypatch.setattr(baseline, "make_towers", lambda *args: made.append(make_towers(*args))
                        or made[-1])
    assert score(data.csv, heads=heads).status == 0
    assert len(made) == 1 if heads == "frozen" else len(made) == 2
    for name in ("image", "text"):
        after, before = (dict(towers[name].encoder.named_parameters()) for towers in
                         (made[0], made[-1]))
        encoder = {"image": "clip.visual.", "text": "clip.text."}[name]
        trains = {key for key in after if encoder + key in state}
        assert not any(value.requires_grad for value in after.values())
        assert {key for key in after if after[key].data_ptr() != before[key].data_ptr()} == trains
        assert all((after[key] != before[key]).any() for key in trains if after[key].ndim > 1)
        assert (len(trains) == 0) == (heads == "frozen")
        assert (len(trains) == len(after)) == (heads == "full")


CELLS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", '=HYPERLINK("x")', " 1.50 ", "007", "NA",
         "", "nan", "1e5", "True", "a, \"b\", 猫", "two\nlines", "'quoted", "\ttab", "-0"]


def test_every_cell_of_the_input_is_kept(score, data, tmp_path):
    """Columns, cells and order stay, whatever the texts; the columns of scores come after them."""
    rows = [{**row, "=note": CELLS[i % len(CELLS)], "id": f"{i:05d}", "mos_quality": f"{i % 5}.50"}
            for i, row in enumerate(data.rows)][::-1]
    columns = ["id", *COLUMNS, "=note"]
    shuffled = write_csv(tmp_path / "in.csv", rows, columns, encoding="utf-8-sig")
    result = score(shuffled, "--image_base_dir", data.images)
    assert list(result.rows[0]) == columns + ADDED
    assert [{c: row[c] for c in columns} for row in result.rows] == [
        {c: str(row[c]) for c in columns} for row in rows]
    assert all(row["error"] == "" for row in result.rows)
    assert all(re.fullmatch(r"\d(\.\d{1,6})?", row[c]) for row in result.rows for c in SCORES)
    assert f"{len(rows)} rows written to {result.path}" in result.out


@pytest.mark.parametrize("bias, want", [(9.0, [10, 100]), (-9.0, [0, 0])])
def test_scores_are_clamped_and_on_the_mos_scale(score, trained, data, tmp_path, bias, want):
    """Each target has its own label scale; nothing leaves 0..scale."""
    content = load(trained(), "baseline_best.pt")
    content["scales"] = {"q": 10.0, "c": 100.0}
    state = content["state"]
    state["quality.base.bias"] += bias  # the base comes close to 0 or 1, with the residual beyond
    state["quality.delta.3.bias"] += bias
    state["consistency.affine"][1] += bias
    torch.save(content, tmp_path / "far.pt")
    got = np.array(list(by_name(score(data.csv, checkpoint=tmp_path / "far.pt").rows).values()))
    assert (got[:, [0, 1, 3]] == [*want, want[1]]).all()
    assert np.abs(got[:, 2] - want[0]).max() < 0.1
    plain = score(data.csv).rows
    assert all(0 < float(row["quality"]) < 5 for row in plain)


@pytest.mark.parametrize("more", [["--batch_size", 1], ["--batch_size", 64],
                                  ["--num_workers", 2, "--batch_size", 3]])
@pytest.mark.parametrize("heads", ["frozen", "full"])
def test_batches_threads_and_order_do_not_change_scores(score, data, tmp_path, heads, more):
    """A row's scores are its own, whatever stands beside it and however it is read."""
    want = by_name(score(data.csv, heads=heads).rows)
    order = np.random.default_rng(3).permutation(len(data.rows))[:-3]
    mixed = write_csv(tmp_path / "mixed.csv", [data.rows[i] for i in order])
    result = score(mixed, "--image_base_dir", data.images, *more, heads=heads)
    assert [row["name"] for row in result.rows] == [data.rows[i]["name"] for i in order]
    got = by_name(result.rows)
    assert_same_scores(got, {name: want[name] for name in got})


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


def test_a_folder_or_one_picture_and_its_prompt(score, folder, data):
    """--prompt is every picture's prompt, unless a .txt file of the same name has its own.

    Without a prompt there is no consistency to pass a limit with, even a limit of 0.
    """
    rows, cat, everything = data.rows[:4], data.rows[4], by_name(score(data.csv).rows)
    want = {row["name"]: everything[row["name"]] for row in rows}
    plain = score(folder, "--min_consistency", 0)
    assert "0 of 5 images pass" in plain.out and {row["keep"] for row in plain.rows} == {"False"}
    assert plain.status == 0 and {row["name"] for row in plain.rows} == {*want, "deep/五.png"}
    for row in plain.rows:
        assert row["consistency"] == row["consistency_base"] == row["prompt"] == row["error"] == ""
    assert_same_scores(by_name(plain.rows, "quality", "quality_base"), {
        name: values[[0, 2]] for name, values in {
            **want, "deep/五.png": everything[cat["name"]]}.items()})
    (folder / "deep" / "五.txt").write_text("﻿" + cat["prompt"] + "\n", encoding="utf-8")
    want["deep/五.png"] = everything[cat["name"]]
    alone = {row["name"]: row for row in score(folder, "--min_quality", 0).rows}
    assert {row["keep"] for row in alone.values()} == {"True"}
    assert [name for name, row in alone.items() if row["consistency"]] == ["deep/五.png"]
    given = score(folder, "--prompt", rows[0]["prompt"]).rows
    assert {row["prompt"] for row in given} == {cat["prompt"], *(r["prompt"] for r in rows)}
    assert cat["prompt"] != rows[0]["prompt"]
    assert_same_scores(by_name(given), want)
    (one,) = score(data.images / cat["name"], "--prompt", cat["prompt"]).rows
    assert (one["name"], one["prompt"]) == (cat["name"], cat["prompt"])
    assert_same_scores(by_name([one]), {cat["name"]: everything[cat["name"]]})


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
    """Rows without a prompt get a quality only; --prompt fills them, and a CSV of names alone."""
    rows = [{**row, "prompt": " " if i == 2 else row["prompt"]}
            for i, row in enumerate(data.rows[:4])]
    some = score(write_csv(tmp_path / "some.csv", rows))
    assert [bool(row["consistency"]) for row in some.rows] == [True, True, False, True]
    filled = score(tmp_path / "some.csv", "--prompt", rows[0]["prompt"]).rows
    assert [row["prompt"] for row in filled] == [
        row["prompt"] if row["prompt"].strip() else rows[0]["prompt"] for row in rows]
    filled = by_name(filled)
    assert not np.isnan(np.array(list(filled.values()))).any()
    path = write_csv(tmp_path / "names.csv", rows, ["name"])
    plain = score(path)
    assert list(plain.rows[0]) == ["name", *ADDED] and plain.status == 0
    assert all(row["quality"] and not row["consistency"] for row in some.rows[2:3] + plain.rows)
    given, want = score(path, "--prompt", rows[0]["prompt"]), by_name(score(data.csv).rows)
    assert_same_scores(by_name(given.rows), {row["name"]: want[row["name"]] for row in rows})


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
    assert list(own.rows[0]) == columns + ADDED
    other = score(data.csv, "--name_column", "name", "--prompt_column", "prompt",
                  checkpoint=checkpoint)
    want = {row["file"]: np.array([float(row[c]) for c in SCORES]) for row in own.rows}
    assert_same_scores(by_name(other.rows), want)
    assert_refused(score(data.csv, checkpoint=checkpoint), "file", "--name_column", "prompt")


def test_columns_named_like_ours_are_not_lost(score, data, clips, tmp_path):
    """The input's columns of our names stay under others, are judged, and score again and again."""
    rows = [{**row, "quality": row["mos_quality"], "consistency": row["mos_align"], "error": "none",
             "keep": "yes"} for row in data.rows]
    columns = ["name", "prompt", "quality", "consistency", "error", "keep", "quality_input"]
    named = SimpleNamespace(images=data.images,
                            csv=write_csv(tmp_path / "named.csv", rows, columns, restval="?"))
    out = train_once(named, clips(), tmp_path / "out", "--freeze_clip", "--quality_column",
                     "quality", "--consistency_column", "consistency")
    first = score(named.csv, "--min_quality", 0, checkpoint=out / "baseline_best.pt")
    assert "SROCC 1.0000" not in first.out and set(printed_metrics(first.out)) == {*SCORES[:2]}
    kept = ["name", "prompt", "quality_input_input", "consistency_input", "error_input",
            "keep_input", "quality_input"]
    assert list(first.rows[0]) == [*kept, *ADDED, "keep"]
    assert [[row[c] for c in kept] for row in first.rows] == [
        [str(row.get(c, "?")) for c in columns] for row in rows]
    again = score(shutil.copy(first.path, tmp_path / "again.csv"))
    assert again.status == 0 and len(again.rows[0]) == len(kept) + 1 + 2 * len(ADDED)
    assert_same_scores(by_name(again.rows), by_name(score(data.csv).rows))


METRICS = re.compile(r"^(quality|consistency): SROCC (\S+), PLCC (\S+), KROCC (\S+), RMSE (\S+) "
                     r"on (\d+) images$", re.MULTILINE)


def printed_metrics(text):
    """Return {target: [SROCC, PLCC, KROCC, RMSE, images]} of what was printed."""
    return {found[0]: [float(v) for v in found[1:]] for found in METRICS.findall(text)}


def test_metrics_on_the_validation_part_are_the_runs_own(score, trained, data, tmp_path):
    """Scoring the validation images prints the SROCC that training reported for them."""
    rows = read_csv(trained() / "val_predictions.csv")
    val = write_csv(tmp_path / "val.csv", rows)
    got = printed_metrics(score(val, "--image_base_dir", data.images).out)
    want = read_json(trained() / "result.json")
    for target in ("quality", "consistency"):
        assert got[target][:4] == pytest.approx(
            [want[f"val_{m}_{target[0]}"] for m in baseline.METRICS], abs=1e-4)
        assert got[target][4] == len(rows)


@pytest.mark.parametrize("mos, count", [([None] * 3, 0), ([2.5], 1), (["", "", ""], 0),
                                        (["x", 2, "-", 3, "", 5], 3)])
def test_metrics_skip_rows_without_a_human_score(score, data, tmp_path, recwarn, mos, count):
    """Only rows with a MOS are judged; too few, or no such column, is no error and no warning."""
    rows = [{**row, "mos_quality": m} for row, m in zip(data.rows, mos)]
    columns = ["name", "prompt", "mos_quality"][:2 + (mos[0] is not None)]
    result = score(write_csv(tmp_path / "few.csv", rows, columns))
    assert result.status == 0 and all(row["quality"] for row in result.rows)
    assert len(result.rows) == len(mos) and "nan" not in result.path.read_text()
    got = printed_metrics(result.out)
    assert got.keys() == ({"quality"} if count else set())
    assert not count or got["quality"][4] == count
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


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


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_the_others_scored(score, folder, recwarn, workers):
    """A damaged file gets a reason instead of scores; the rest is as it was; the status is 1."""
    want = by_name(score(folder, "--prompt", "green hills").rows)
    for kind, (content, _) in BAD_IMAGES.items():
        (folder / f"{kind}.png").write_bytes(content)
    result = score(folder, "--prompt", "green hills", "--num_workers", workers, "--batch_size", 3)
    assert result.status == 1 and "Traceback" not in result.err
    broken = {row["name"][:-4]: row for row in result.rows if row["error"]}
    assert broken.keys() == BAD_IMAGES.keys()
    assert f"{len(broken)} of {len(result.rows)} images could not be read" in result.out
    assert all(BAD_IMAGES[kind][1] in row["error"] for kind, row in broken.items())
    assert all(row[name] == "" for row in broken.values() for name in SCORES)
    assert_same_scores(by_name([row for row in result.rows if not row["error"]]), want)
    assert not [w for w in recwarn if "bomb" in str(w.message)]


def test_missing_files_of_a_csv_are_errors_of_their_rows(score, data, tmp_path):
    """A name without a file, or no name at all, does not stop the others, if there are any."""
    rows = [*data.rows[:3], {**data.rows[3], "name": "gone.png"}, {**data.rows[4], "name": ""}]
    result = score(write_csv(tmp_path / "in.csv", rows), "--image_base_dir", data.images,
                   "--min_quality", 0)
    assert result.status == 1 and [bool(row["error"]) for row in result.rows] == [0, 0, 0, 1, 1]
    assert [row["keep"] for row in result.rows] == ["True"] * 3 + ["False"] * 2
    assert printed_metrics(result.out)["quality"][4] == 3
    result = score(write_csv(tmp_path / "in.csv", rows[3:]), "--image_base_dir", data.images)
    assert result.status == 1 and "2 of 2" in result.out and "Traceback" not in result.err
    assert all(row["error"] and not row["quality"] for row in result.rows)


TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


def test_every_kind_of_picture_scores_like_its_upright_rgb_twin(score, tmp_path):
    """Alpha, CMYK, palettes, 16 bits, first frames and all eight EXIF orientations are as RGB."""
    folder, rgb, other = tmp_path / "kinds", *(draw(np.random.default_rng(i), 56) for i in (5, 6))
    folder.mkdir()
    grey = rgb.convert("L")
    kinds = {"rgba.png": rgb.convert("RGBA"), "cmyk.tiff": rgb.convert("CMYK"),
             "palette.png": rgb.quantize(16), "grey.png": grey, "two.png": rgb.convert("1"),
             "grey_alpha.png": rgb.convert("LA"), "lossless.webp": rgb, "bitmap.bmp": rgb,
             "wide.png": Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257),
             "cmyk.jpg": rgb.convert("CMYK"), "moving.gif": rgb.quantize(32)}
    turned = {f"{n}.{suffix}": turn for n, turn in TURNS.items() for suffix in ("png", "jpg")}
    more = {"moving.gif": {"save_all": True, "append_images": [other.quantize(32)]},
            "lossless.webp": {"lossless": True}}
    for name, image in {**kinds, **dict.fromkeys(turned, rgb)}.items():
        exif = Image.Exif()
        if name in turned:
            exif[0x0112] = int(name[0])
            more[name] = {"exif": exif}
        image.save(folder / name, **more.get(name, {}))
        image = Image.open(folder / name) if name.endswith("jpg") else image
        image = (grey if name == "wide.png" else image).convert("RGB")
        image.save(folder / f"stored_{name}.png")
        if name in turned:
            image.transpose(turned[name]).save(folder / f"upright_{name}.png")
    assert Image.open(folder / "moving.gif").n_frames == 2
    assert Image.open(folder / "wide.png").mode.startswith("I")
    result = score(folder, "--prompt", "a red house")
    assert result.status == 0 and len(result.rows) == 2 * len(kinds) + 3 * len(turned)
    got = by_name(result.rows)
    twins = {name: got[f"stored_{name}.png"] for name in kinds}
    twins |= {name: got[f"upright_{name}.png"] for name in turned}
    assert_same_scores({name: got[name] for name in twins}, twins)
    assert len({tuple(twins[name]) for name in kinds}) >= 5
    for name in turned:
        assert np.abs(got[name] - got[f"stored_{name}.png"]).max() > 5 * WITHIN


@pytest.mark.parametrize("name, content, words", [
    ("nothing.csv", None, ["nothing.csv"]), ("nothing", None, ["nothing"]),
    ("nothing.png", None, ["nothing.png"]), ("header.csv", b"name,prompt\n", ["row"]),
    ("other.csv", b"picture,prompt\na.png,dog\n", ["name", "picture, prompt", "--name_column"]),
    ("gbk.csv", "name,prompt\na.png,狗\n".encode("gbk"), ["gbk.csv", "UTF-8"]),
    ("folder/notes.md", b"", ["folder", "no images"])])
def test_what_cannot_be_scored_is_refused(score, tmp_path, name, content, words):
    """A target that is missing, empty or in another encoding is named with its remedy."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    assert_refused(score(path.parent if path.parent != tmp_path else path), *words)


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


def test_a_folder_of_links_hidden_and_other_files(score, data, folder, tmp_path, monkeypatch):
    """Linked folders are entered once, links to files are rows, and what is left out is said."""
    outside, one = tmp_path / "outside", data.images / data.rows[5]["name"]
    outside.mkdir()
    shutil.copy(one, outside / "far.png")
    Image.init()
    for suffix in (".heic", ".jxl"):  # as where no plugin is installed
        monkeypatch.delitem(Image.EXTENSION, suffix, raising=False)
    for link, target in (("deep/up", folder), ("linked", outside), ("again", outside),
                         ("deep/out", outside), ("twin.png", one), ("gone.png", "nowhere")):
        (folder / link).symlink_to(target)
    (folder / ".hidden").mkdir()
    for name in (".hidden/a.png", "._b.png", "bare", "odd.jpeg_large", "=1.png", "-2.png"):
        shutil.copy(one, folder / name)
    os.mkfifo(folder / "pipe.png")
    for name in ("a.pdf", "b.h5", "c.mpg", "d.heic", "e", "f.jxl"):
        (folder / name).write_bytes(b"\0" * 99)
    (folder / "bare.txt").write_bytes("狗".encode("gbk"))
    shutil.copy(one, os.fsencode(folder) + b"/caf\xe9.png")
    result = score(folder, "--prompt", "a dog")
    rows = {row["name"]: row for row in result.rows}
    assert rows.keys() == {*(row["name"] for row in data.rows[:4]), "deep/五.png", "twin.png",
                           "deep/out/far.png", "gone.png", "bare", "odd.jpeg_large", "=1.png",
                           "-2.png", "caf\\xe9.png"}
    assert {name for name, row in rows.items() if not row["quality"]} == {"gone.png"}
    assert "bare.txt" in rows["bare"]["error"] and not rows["bare"]["consistency"]
    assert result.status == 1 and "1 of 13 images" in result.out and "1 of 13 prompts" in result.out
    for words in ("2 x hidden", "1 x .pdf (no picture", "1 x .h5", "1 x .mpg", "1 x .png",
                  "1 x .heic (Pillow opens it after: pip install pillow-heif)",
                  "1 x .jxl (Pillow opens it after: pip install pillow-jxl-plugin)",
                  "1 x file without a suffix", "3 x link to a folder"):
        assert words in result.out


def test_scores_get_a_name_and_replace_nothing(score, trained, data, tmp_path, monkeypatch, capfd):
    """The file is called like what is scored; an existing one is kept, unless by --overwrite."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data.images, tmp_path / "in" / "my.images")
    words = ["--checkpoint", str(trained() / "baseline_best.pt"), "--num_workers", "0", "--predict"]
    for target, name in (("in/my.images", "my.images_scores.csv"), (data.csv, "data_scores.csv")):
        baseline.main([*words, str(target)])
        with pytest.raises(SystemExit, match="2"):
            baseline.main([*words, str(target)])
        said = capfd.readouterr().err
        assert f"{name} does: give another --predictions_csv, or --overwrite" in said
        before = Path(name).read_bytes()
        baseline.main([*words, str(target), "--overwrite", "--excel"])
        assert Path(name).read_bytes() == b"\xef\xbb\xbf" + before
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
        patch.setattr(baseline, "Scorer", None)  # refused before
        baseline.main([*words, str(data.csv), "--predictions_csv", str(data.csv / "x.csv")])
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("tail", ["", "[0.5, 0.1", "[0.5]"])
def test_a_stopped_run_goes_on(score, trained, data, tmp_path, monkeypatch, capfd, tail):
    """Stopped twice, the scores are those of one run, bit for bit; a half line is dropped."""
    whole = score(data.csv, "--batch_size", 5).path.read_bytes()
    partial = tmp_path / ".s.csv.partial"
    real, words = baseline.Scorer.scored, [
        "--predict", str(data.csv), "--checkpoint", str(trained() / "baseline_best.pt"),
        "--predictions_csv", str(tmp_path / "s.csv"), "--num_workers", "0", "--batch_size", "5"]
    for stops, want in ((2, 10), (3, 25)):
        def stopped(*args, stops=stops):
            yield from itertools.islice(real(*args), stops)
            raise KeyboardInterrupt
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
            patch.setattr(baseline.Scorer, "scored", stopped)
            baseline.main(words)
        assert f"{want} of 36 rows are kept in {partial}" in capfd.readouterr().err
        with open(partial, "a") as file:
            file.write(tail)
    changed = score(data.csv, "--batch_size", 5, "--prompt", "x", out="other.csv")
    assert changed.status == 0 and not (tmp_path / "s.csv").exists()
    shutil.copy(partial, tmp_path / ".t.csv.partial")  # of other images: not used
    other = write_csv(tmp_path / "few.csv", data.rows[:30])
    assert "going on" not in score(other, "--image_base_dir", data.images, out="t.csv").out
    baseline.main(words)
    assert "going on after 25 of 36 rows" in capfd.readouterr().out
    assert (tmp_path / "s.csv").read_bytes() == whole and not partial.exists()


def test_ranks_and_the_best_of_each_prompt(score, data):
    """Ranks are by the mean of both scores within a prompt, equals by row; --keep_top counts."""
    rows = score(data.csv, "--keep_top", 2, "--min_quality", 0).rows
    for prompt in {row["prompt"] for row in rows}:
        mine = [row for row in rows if row["prompt"] == prompt]
        mean = [float(row["quality"]) + float(row["consistency"]) for row in mine]
        ranks = [int(row["rank_in_prompt"]) for row in mine]
        assert sorted(ranks) == [*range(1, len(mine) + 1)]
        assert [mean[i] for i in np.argsort(ranks)] == pytest.approx(sorted(mean)[::-1], abs=2e-4)
        assert [row["keep"] for row in mine] == [str(rank <= 2) for rank in ranks]
    twins = [row["rank_in_prompt"] for row in score(data.images, "--keep_top", 1).rows]
    assert sorted(map(int, twins)) == [*range(1, len(data.rows) + 1)]


@pytest.mark.parametrize("bias, words", [(99.0, "nearly the same"), (np.nan, "no number for 36")])
def test_scores_that_tell_nothing_are_warned_of(score, trained, data, tmp_path, bias, words):
    """Constant scores and those that are no numbers do not pass for results."""
    content = load(trained(), "baseline_best.pt")
    content["state"]["quality.base.bias"] += bias
    torch.save(content, tmp_path / "odd.pt")
    result = score(data.csv, checkpoint=tmp_path / "odd.pt")
    assert f"WARNING: quality is {words}" in result.out and result.status == 0
    assert "WARNING" not in score(data.csv).out


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii"])
def test_a_terminal_that_cannot_show_it(start, trained, data, tmp_path, encoding):
    """What stdout cannot show is escaped; the CSV there is UTF-8 all the same."""
    folder = tmp_path / "猫 é 🎨"
    folder.mkdir()
    shutil.copy(data.images / data.rows[0]["name"], os.fsencode(folder) + b"/\xe9\xff.png")
    argv = ["--predict", folder, "--prompt", "猫 é 🎨", "--checkpoint",
            trained() / "baseline_best.pt", "--num_workers", "0", "--predictions_csv"]
    for name in (folder / "🎨.csv", "-"):
        program = start([*argv, name], "script", {"PYTHONIOENCODING": encoding})
        assert program.finish() == 0
        out, err = (file.read_bytes() for file in program.files)
        csv = out if name == "-" else name.read_bytes()
        assert b"\\xe9\\xff.png" in csv and "猫 é 🎨" in csv.decode("utf-8")
        assert name == "-" or err == b""


def test_a_line_a_minute_without_a_terminal(monkeypatch, capsys):
    """It says what is done, how fast, and how long it takes still."""
    clock = itertools.count(0, 25)
    monkeypatch.setattr(baseline.time, "monotonic", lambda: next(clock))
    assert [*baseline.progress_bar(range(10), "score", 10)] == [*range(10)]
    assert capsys.readouterr().out.splitlines() == [
        f"score: {n} of 10, 0.04 a second, {left} left"
        for n, left in ((3, "02:55"), (6, "01:40"), (9, "00:25"))]
