"""The CSV, the split and the pictures: what is accepted, what is refused, what is computed."""

import json
import random
from types import SimpleNamespace

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from conftest import COLUMNS, decoded, draw, read_csv, write_csv
from PIL import Image

import baseline

# --- reading the CSV ------------------------------------------------------------------------


@pytest.fixture
def table(flags):
    """Read a CSV of given rows as the program does: table(rows, *flags)."""
    def load(data, *more):
        return baseline.load_table(baseline.parse_args(flags(*more, data=data)))
    return load


@pytest.fixture
def changed(data, tmp_path):
    """Return the data with some cells changed: changed({row index: {column: value}})."""
    def make(cells=None, columns=COLUMNS, rows=None, **options):
        rows = [dict(row) for row in (rows or data.rows)]
        for index, values in (cells or {}).items():
            rows[index].update(values)
        path = write_csv(tmp_path / "changed.csv", rows, columns, **options)
        return SimpleNamespace(csv=path, images=data.images, rows=rows)
    return make


@pytest.fixture
def no_model(monkeypatch):
    """Fail the test where a model is loaded although the data are already known to be wrong."""
    monkeypatch.setattr(baseline, "load_clip", lambda *a, **k: pytest.fail("a model was loaded"))


def test_bom_crlf_quotes_commas_and_any_script_survive(train, changed):
    """What stands in the CSV stands in the predictions, letter by letter."""
    odd = {0: "a \"quoted\", comma", 1: "两只狗，在海边", 2: "rocket 🚀👩‍🚀", 3: "línea\nnueva"}
    data = changed({i: {"prompt": odd[i // 4]} for i in range(16)}, encoding="utf-8-sig",
                   lineterminator="\r\n")
    assert data.csv.read_bytes().startswith(b"\xef\xbb\xbf") and b"\r\n" in data.csv.read_bytes()
    run = train("--freeze_clip", "--epochs", 1, "--split_by", "image", "--val_ratio", 0.9,
                data=data)
    prompts = {row["name"]: row["prompt"] for row in data.rows}
    got = {row["name"]: row["prompt"] for row in read_csv(run.folder / "val_predictions.csv")}
    assert all(prompts[name] == prompt for name, prompt in got.items())
    assert set(odd.values()) <= set(got.values())


def test_labels_belong_to_their_images(table, changed, data):
    """Every row keeps its own prompt and scores, whatever the order in the CSV."""
    rows = data.rows[::-1]
    result = table(changed(rows=rows))
    for row in rows:
        i = result.frame["name"].tolist().index(row["name"])
        assert result.prompts[result.prompt_id[i]] == row["prompt"]
        assert result.quality[i] == np.float32(row["mos_quality"] / 5)
        assert result.consistency[i] == np.float32(row["mos_align"] / 5)
        assert result.paths[i].name == row["name"]


@pytest.mark.parametrize("extra", ["model", "row", "index", "Unnamed: 0", "quality"])
def test_extra_columns_are_ignored(table, changed, data, extra):
    """A column that the program does not know changes nothing, whatever its name."""
    plain, rows = table(changed()), [{**row, extra: "77"} for row in data.rows]
    other = table(changed(rows=rows, columns=[extra, *COLUMNS]))
    assert np.array_equal(plain.quality, other.quality)
    assert plain.prompts == other.prompts
    assert other.frame["name"].tolist() == plain.frame["name"].tolist()


def test_renamed_columns(table, changed, data):
    """Each column is found under the name that its flag gives."""
    names = dict(zip(COLUMNS, ["file", "text", "how good", "how close", "why"]))
    rows = [{names[k]: v for k, v in row.items()} for row in data.rows]
    other = changed(rows=rows, columns=list(names.values()))
    result = table(other, "--name_column", "file", "--prompt_column", "text", "--quality_column",
                   "how good", "--consistency_column", "how close", "--use_explanations",
                   "--explanation_column", "why")
    plain = table(changed(), "--use_explanations")
    assert np.array_equal(plain.quality, result.quality)
    assert np.array_equal(plain.consistency, result.consistency)
    assert plain.prompts == result.prompts and plain.explanations == result.explanations


@pytest.mark.parametrize("largest, scale", [(0.5, 1), (1, 1), (1.001, 5), (5, 5), (5.01, 10),
                                            (10, 10), (10.5, 100), (100, 100)])
def test_automatic_label_scale(table, changed, data, largest, scale):
    """The automatic scale is the smallest of 1, 5, 10, 100 that is not below the maximum."""
    rows = [{**row, "mos_quality": largest * i / (len(data.rows) - 1)}
            for i, row in enumerate(data.rows)]
    result = table(changed(rows=rows))
    assert result.scales == {"q": scale, "c": 5}
    assert result.quality.max() == np.float32(largest / scale)


def test_explicit_label_scales(table, changed, data):
    """An explicit scale is used as it is, for its own target only."""
    result = table(changed(), "--label_scale_q", 7, "--label_scale_c", 5.5)
    assert result.scales == {"q": 7, "c": 5.5}
    first = data.rows[0]
    assert result.quality[0] == np.float32(first["mos_quality"] / 7)
    assert result.consistency[0] == np.float32(first["mos_align"] / 5.5)


def test_short_rows_have_no_explanation(table, changed, tmp_path):
    """A row that ends before its explanation has none; it is not the word 'nan'."""
    data = changed()
    lines = data.csv.read_text().splitlines()
    lines[2] = lines[2].rsplit(",", 1)[0]
    data.csv.write_text("\n".join(lines) + "\n")
    result = table(data, "--use_explanations")
    assert result.explanation_id[1] == -1
    assert "nan" not in result.explanations


# --- errors ---------------------------------------------------------------------------------


BAD_CELLS = [
    ({3: {"mos_quality": "good"}}, ["mos_quality", "not a finite number", "1 row", "(5)"]),
    ({3: {"mos_quality": ""}}, ["mos_quality", "not a finite number", "(5)"]),
    ({3: {"mos_align": "NaN"}}, ["mos_align", "not a finite number", "(5)"]),
    ({3: {"mos_align": "inf"}}, ["mos_align", "not a finite number", "(5)"]),
    ({4: {"mos_quality": "-0.1"}}, ["mos_quality", "below 0", "(6)"]),
    ({0: {"prompt": ""}}, ["empty prompts", "1 row", "(2)"]),
    ({0: {"prompt": "  "}}, ["empty prompts", "(2)"]),
    ({0: {"name": ""}}, ["empty image names", "(2)"]),
    ({9: {"name": "img_000.png"}}, ["duplicate image names", "2 rows", "(2, 11)"]),
    ({1: {"name": "nothing.png"}}, ["missing", "1 row", "(3)", "--image_base_dir"]),
    ({1: {"name": "../data.csv"}}, ["leave", "1 row", "(3)"]),
    ({1: {"name": "/etc/hostname"}}, ["leave", "1 row", "(3)"]),
    ({1: {"name": "x" * 300 + ".png"}}, ["missing", "(3)"]),
]


@pytest.mark.parametrize("cells, words", BAD_CELLS)
def test_bad_cells_are_named_by_kind_and_row(refused, changed, no_model, cells, words):
    """Each kind of bad cell is refused, with count, CSV row and column, before a model loads."""
    said = refused(data=changed(cells))
    assert "changed.csv" in said
    for word in words:
        assert word in said


def test_all_kinds_come_in_one_error_with_their_first_rows(refused, changed, no_model):
    """One error lists all kinds, each with its count, five rows at most and a remedy."""
    cells = {i: {"mos_quality": "bad"} for i in range(7)}
    cells[8] = {"mos_align": "-1"}
    cells[9] = {"prompt": ""}
    cells[10] = {"name": "gone.png"}
    said = refused(data=changed(cells))
    assert "mos_quality that is not a finite number: 7 rows (2, 3, 4, 5, 6, ..)" in said
    assert "mos_align below 0: 1 row (10)" in said
    assert "empty prompts: 1 row (11)" in said
    assert "1 row (12)" in said
    problems = [line for line in said.splitlines() if line.startswith("  - ")]
    assert len(problems) == 4
    assert all("; " in line and len(line.split("; ", 1)[1]) > 10 for line in problems)


def test_mos_above_an_explicit_scale_names_rows_and_flag(refused, changed, no_model):
    """A MOS above the label scale is refused by row, and the flag that sets the scale is named."""
    said = refused("--label_scale_c", 5, data=changed({5: {"mos_align": 5.5}}))
    assert "mos_align above the label scale 5: 1 row (7)" in said
    assert "--label_scale_c" in said


def test_mos_above_every_automatic_scale(refused, changed, no_model):
    """A MOS above 100 has no automatic scale."""
    said = refused(data=changed({5: {"mos_quality": 101}}))
    assert "mos_quality above the label scale 100: 1 row (7)" in said
    assert "--label_scale_q" in said


def test_symlinks_may_not_lead_out(refused, changed, data, no_model, tmp_path):
    """A link inside the folder to a picture outside it is refused."""
    folder = tmp_path / "linked"
    folder.mkdir()
    for row in data.rows:
        (folder / row["name"]).write_bytes((data.images / row["name"]).read_bytes())
    (folder / "img_003.jpg").unlink()
    (folder / "img_003.jpg").symlink_to(data.images / "img_003.jpg")
    good = SimpleNamespace(csv=data.csv, images=folder)
    said = refused(data=good)
    assert "leave" in said and "1 row (5)" in said


@pytest.mark.parametrize("name", ["prompt", "mos_align"])
def test_missing_column_names_what_is_there(refused, changed, no_model, name):
    """A missing column is refused with its name, the columns that exist and the flags."""
    said = refused(data=changed(columns=[c for c in COLUMNS if c != name]))
    assert f"{name} is missing" in said
    assert "mos_quality" in said.split("it has")[1]
    assert "--prompt_column" in said


def test_explanations_need_their_column(refused, changed, no_model, train):
    """The explanation column is needed with --use_explanations only."""
    data = changed(columns=COLUMNS[:-1])
    assert "explanation is missing" in refused("--use_explanations", data=data)


@pytest.mark.parametrize("content, word", [
    (b"", "readable CSV"), (b"name,prompt,mos_quality,mos_align\n", "no rows"),
    ("name,prompt,mos_quality,mos_align\ná.png,é,1,1\n".encode("latin-1"), "UTF-8"),
    (b"name,prompt,mos_quality,mos_align\n1,2,3,4\n1,2,3,4,5,6\n", "readable CSV")])
def test_files_that_are_no_table(refused, data, tmp_path, no_model, content, word):
    """An empty, headless, mis-encoded or ragged file is refused in one sentence."""
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    said = refused(data=SimpleNamespace(csv=path, images=data.images))
    assert word in said and "bad.csv" in said


def test_missing_csv(refused, data, tmp_path, no_model):
    """A CSV that does not exist is named together with its flag."""
    said = refused(data=SimpleNamespace(csv=tmp_path / "none.csv", images=data.images))
    assert "none.csv" in said and "--data_csv_path" in said


def test_rows_are_counted_as_a_spreadsheet_counts_them(refused, changed, no_model):
    """Blank lines count, so that the row in an error is the row in the file."""
    data = changed({3: {"mos_quality": "bad"}})
    lines = data.csv.read_text().splitlines()
    data.csv.write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    assert "1 row (6)" in refused(data=data)


# --- split ----------------------------------------------------------------------------------


def fake_table(sizes):
    """Return a Table of as many prompts as sizes, without files."""
    prompt_id = np.repeat(np.arange(len(sizes)), sizes)
    frame = pd.DataFrame({"name": [f"{i:04d}" for i in range(len(prompt_id))]})
    prompts = [f"prompt {i:03d}" for i in range(len(sizes))]
    mos = np.zeros(len(frame), np.float32)
    return baseline.Table(frame, list(frame["name"]), prompts, prompt_id, [],
                          np.full(len(frame), -1), mos, mos, {"q": 1, "c": 1})


def split(table, seed=0, **values):
    """Split a table with the given ratios."""
    args = SimpleNamespace(**{"split_by": "prompt", "val_ratio": 0.2, "test_ratio": 0.0,
                              "name_column": "name", **values})
    return baseline.split_rows(table, args, seed)


@pytest.mark.parametrize("test_ratio", [0.0, 0.15])
def test_split_by_prompt_is_disjoint_complete_and_of_the_right_size(test_ratio):
    """No prompt is on two sides, no image is lost, shares are within two points."""
    table = fake_table([5] * 60)
    for seed in range(5):
        parts = split(table, seed, test_ratio=test_ratio)
        rows = np.concatenate(list(parts.values()))
        assert sorted(rows) == list(range(300))
        prompts = [set(table.prompt_id[part]) for part in parts.values()]
        assert sum(map(len, prompts)) == 60
        assert abs(len(parts["val"]) / 300 - 0.2) <= 0.02
        assert abs(len(parts["test"]) / 300 - test_ratio) <= 0.02


def test_split_is_a_function_of_the_seed():
    """The same seed gives the same split, another seed another one."""
    table = fake_table([4] * 30)
    first, again, other = split(table, 1), split(table, 1), split(table, 2)
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert set(first["val"]) != set(other["val"])


def test_split_depends_on_no_global_randomness():
    """Neither numpy's nor Python's global generator changes the split."""
    table = fake_table([4] * 30)
    np.random.seed(1), random.seed(1)
    first = split(table)
    np.random.seed(2), random.seed(2)
    assert np.array_equal(first["val"], split(table)["val"])


def test_split_does_not_depend_on_the_order_of_rows(flags, changed, data):
    """A shuffled CSV gives the same images in each part."""
    names = []
    for rows in (data.rows, random.Random(0).sample(data.rows, len(data.rows))):
        args = baseline.parse_args(flags("--test_ratio", 0.2, data=changed(rows=rows)))
        table = baseline.load_table(args)
        parts = baseline.split_rows(table, args, 3)
        names.append({k: set(table.frame["name"].iloc[v]) for k, v in parts.items()})
        assert all(names[-1].values())
    assert names[0] == names[1]


def test_prompts_that_differ_in_case_and_spacing_stay_together():
    """Trivially different spellings of a prompt are not torn apart."""
    table = fake_table([2] * 40)
    table.prompts = [("A  Red House " if i % 2 else "a red house") + f" {i // 2}"
                     for i in range(40)]
    for seed in range(4):
        parts = split(table, seed)
        groups = [set(table.prompt_id[part] // 2) for part in parts.values()]
        assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 20


def test_test_part_does_not_change_with_the_validation_share():
    """The test part depends on its own ratio and the seed alone."""
    table = fake_table([3] * 50)
    parts = [split(table, 4, test_ratio=0.2, val_ratio=ratio)["test"] for ratio in (0.1, 0.3)]
    assert np.array_equal(*parts)


def test_split_by_image_mixes_prompts():
    """The image split has the right share and puts prompts on both sides."""
    table = fake_table([5] * 60)
    parts = split(table, split_by="image")
    assert len(parts["val"]) == 60
    assert set(table.prompt_id[parts["val"]]) & set(table.prompt_id[parts["train"]])


def test_a_part_that_would_be_empty_is_refused(refused, changed, data, no_model):
    """One prompt cannot be split by prompt."""
    rows = [{**row, "prompt": "the same"} for row in data.rows]
    said = refused(data=changed(rows=rows))
    assert "--split_by" in said and "at least 2 images" in said


# --- texts ----------------------------------------------------------------------------------


def test_truncated_prompts_are_counted_and_said_once(build, changed, data, capsys):
    """Two of the prompts are longer than the text tower reads; exactly 77 tokens still fit."""
    fits, long = "dog " * 75, "dog " * 76
    cells = {i: {"prompt": text.strip()} for i, text in
             [(0, fits), (1, long), (2, long), (3, long + "cat")]}
    capsys.readouterr()
    build("--freeze_clip", "--split_by", "image", data=changed(cells))
    said = [line for line in capsys.readouterr().out.splitlines() if "77 tokens" in line]
    assert len(said) == 1
    assert said[0].startswith("2 of 11 prompts are longer than 77 tokens")


def test_prompts_that_fit_are_not_mentioned(build, capsys):
    """Nothing is said where every prompt fits."""
    build("--freeze_clip")
    assert "longer than" not in capsys.readouterr().out


# --- pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "shortest", "squash", "longest"])
def test_pixels_equal_open_clips_own_preprocess(build, clips, data, mode):
    """Decoded, resized and normalised images equal open_clip's transform, bit for bit."""
    more = ["--resize_mode", mode] if mode else []
    run = build("--freeze_clip", "--cache", "off", *more)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clips()}",
                                                            image_resize_mode=mode)
    indices = np.arange(6)
    got = run.scorer.pixels(decoded(run, indices))
    want = torch.stack([transform(Image.open(run.table.paths[i]).convert("RGB"))
                        for i in indices])
    assert torch.equal(got, want)


def test_resize_modes_differ_and_the_default_is_the_models_own(build):
    """Crop, squash and pad give different pixels; without the flag the model's own mode holds."""
    pixels = {}
    for mode in (None, "shortest", "squash", "longest"):
        run = build("--freeze_clip", *(["--resize_mode", mode] if mode else []))
        pixels[mode] = decoded(run, [0, 1])
    assert torch.equal(pixels[None], pixels["shortest"])
    assert not torch.equal(pixels["shortest"], pixels["squash"])
    assert not torch.equal(pixels["squash"], pixels["longest"])
    assert (pixels["longest"][:, :, 0] == 0).all()  # the padding of a landscape picture


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_damaged_picture_is_named_with_its_row(refused, changed, data, tmp_path, workers,
                                                 cache):
    """A truncated JPEG ends the run with its path and CSV row, also from a worker process."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for row in data.rows:
        (folder / row["name"]).write_bytes((data.images / row["name"]).read_bytes())
    bad = folder / "img_005.jpg"
    bad.write_bytes(bad.read_bytes()[:400])
    said = refused("--freeze_clip", "--num_workers", workers, "--cache", cache,
                   data=SimpleNamespace(csv=data.csv, images=folder))
    assert str(bad) in said and "CSV row 7" in said


def test_exif_orientation_is_applied(tmp_path):
    """A picture stored on its side is turned upright."""
    upright = draw(np.random.default_rng(0), 40, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / "side.png", exif=exif)
    assert np.array_equal(np.asarray(baseline.load_image(tmp_path / "side.png")),
                          np.asarray(upright))


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    """16-bit greyscale is scaled to 8 bits, not clipped."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    got = np.asarray(baseline.load_image(tmp_path / "deep.png"))
    assert np.array_equal(got, np.repeat(grey[:, :, None], 3, axis=2))


def test_colour_modes_load_as_the_same_rgb(tmp_path):
    """RGBA, palette and CMYK files give the RGB that they stand for."""
    rgb = Image.new("RGB", (20, 12), (200, 30, 90))
    rgb.paste((10, 160, 60), (0, 0, 10, 12))
    rgb.convert("RGBA").save(tmp_path / "a.png")
    rgb.quantize(4).save(tmp_path / "p.png")
    rgb.convert("CMYK").save(tmp_path / "c.tif")
    for name in ("a.png", "p.png", "c.tif"):
        got = baseline.load_image(tmp_path / name)
        assert got.mode == "RGB"
        assert np.abs(np.asarray(got, float) - np.asarray(rgb, float)).max() <= 2


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_evaluation_shows_original_views(build, cache):
    """Predictions of a part do not depend on the training views."""
    got = {}
    for augment in ("none", "flip", "crop"):
        run = build("--partial_freeze", "--freeze_layers", 2, "--augment", augment, "--cache",
                    cache, out=augment)
        got[augment] = baseline.evaluate(run, run.parts["train"])["q"]
    assert np.ptp(got["none"]) > 1e-3
    assert np.allclose(got["none"], got["flip"], atol=1e-6)
    assert np.allclose(got["none"], got["crop"], atol=1e-6)


def test_training_views_flip_half_and_crop_a_little(build):
    """Half of the training views are mirrored; crops keep 90 to 100 % of the area."""
    run = build("--freeze_clip", "--augment", "crop", "--cache", "off")
    rows = np.arange(4000)
    views = baseline.epoch_views(rows, run.args, 1, 1)
    boxes = np.concatenate([view.boxes for view in views])
    area = boxes[:, 2] * boxes[:, 3]
    assert 0.45 < np.mean(np.concatenate([view.flip for view in views])) < 0.55
    assert 0.9 <= area.min() < 0.905 and 0.995 < area.max() <= 1
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-9).all()
    assert np.allclose(boxes[:, 2], boxes[:, 3])
    assert sorted(np.concatenate([view.rows for view in views])) == rows.tolist()


def test_a_flip_is_a_mirror_image():
    """A flipped view is the picture mirrored left to right, the others are untouched."""
    images = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    got = baseline.flipped(images, torch.tensor([False, True]))
    assert torch.equal(got[0], images[0]) and torch.equal(got[1], images[1, :, :, [4, 3, 2, 1, 0]])


def test_config_records_split_and_scales(train):
    """config.json says what the labels were divided by and which split it was."""
    run = train("--freeze_clip", "--epochs", 1, "--test_ratio", 0.2)
    config = json.loads((run.folder / "config.json").read_text())
    assert config["label_scales"] == {"q": 5, "c": 5}
    assert config["split"] == run.summary["split"] and sum(config["images"].values()) == 36
