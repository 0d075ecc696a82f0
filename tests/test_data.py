"""The CSV, the split and the pictures: what is accepted, what is refused, what is computed."""

import random
import shutil
from types import SimpleNamespace

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from conftest import COLUMNS, decoded, draw, read_csv, read_json, write_csv
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
    odd = ["a \"quoted\", comma", "两只狗，在海边", "rocket 🚀👩‍🚀", "línea\nnueva"]
    data = changed({i: {"prompt": odd[i // 4]} for i in range(16)}, encoding="utf-8-sig",
                   lineterminator="\r\n")
    assert data.csv.read_bytes().startswith(b"\xef\xbb\xbf") and b"\r\n" in data.csv.read_bytes()
    run = train("--freeze_clip", "--epochs", 1, "--split_by", "image", "--val_ratio", 0.9,
                data=data)
    prompts = {row["name"]: row["prompt"] for row in data.rows}
    got = {row["name"]: row["prompt"] for row in read_csv(run.folder / "val_predictions.csv")}
    assert all(prompts[name] == prompt for name, prompt in got.items())
    assert set(odd) <= set(got.values())


def test_every_row_keeps_what_is_its_own(table, changed, data):
    """Prompt, scores, path and CSV row belong to their image, whatever the order in the CSV."""
    rows = data.rows[::-1]
    result = table(changed(rows=rows))
    assert result.frame["name"].tolist() == [row["name"] for row in data.rows]
    for csv_row, row in enumerate(rows, 2):
        own = result.frame.loc[csv_row]
        assert own["name"] == own["path"].name == row["name"]
        assert own["prompt"] == result.prompts[own["prompt_id"]] == row["prompt"]
        assert own["q"] == np.float32(row["mos_quality"] / 5)
        assert own["c"] == np.float32(row["mos_align"] / 5)


@pytest.mark.parametrize("extra", ["model", "row", "index", "Unnamed: 0", "quality", "q", "path"])
def test_extra_columns_are_ignored(table, changed, data, extra):
    """A column that the program does not know changes nothing, whatever its name."""
    plain, rows = table(changed()), [{**row, extra: "77"} for row in data.rows]
    other = table(changed(rows=rows, columns=[extra, *COLUMNS]))
    assert plain.prompts == other.prompts and plain.frame.equals(other.frame)


def test_renamed_columns(table, changed, data):
    """Each column is found under the name that its flag gives."""
    names = dict(zip(COLUMNS, ["file", "text", "how good", "how close", "why"]))
    rows = [{names[k]: v for k, v in row.items()} for row in data.rows]
    other = changed(rows=rows, columns=list(names.values()))
    result = table(other, "--name_column", "file", "--prompt_column", "text", "--quality_column",
                   "how good", "--consistency_column", "how close", "--use_explanations",
                   "--explanation_column", "why")
    plain = table(changed(), "--use_explanations")
    assert plain.prompts == result.prompts and plain.explanations == result.explanations
    assert plain.frame.equals(result.frame) and len(plain.explanations) == 7


@pytest.mark.parametrize("largest, scale", [(0.5, 1), (1, 1), (1.001, 5), (5, 5), (5.01, 10),
                                            (10, 10), (10.5, 100), (100, 100)])
def test_automatic_label_scale(table, changed, data, largest, scale):
    """The automatic scale is the smallest of 1, 5, 10, 100 that is not below the maximum."""
    rows = [{**row, "mos_quality": largest * i / (len(data.rows) - 1)}
            for i, row in enumerate(data.rows)]
    result = table(changed(rows=rows))
    assert result.targets == {"q": (0, scale), "c": (0, 5)}
    assert result.frame["q"].max() == np.float32(largest / scale)


def test_explicit_label_scales(table, changed, data, refused):
    """An explicit scale is used as it is, for its own target only; no MOS may be above it."""
    result = table(changed(), "--label_scale_q", 7, "--label_scale_c", 5.5)
    assert result.targets == {"q": (0, 7), "c": (0, 5.5)}
    first, own = data.rows[0], result.frame.iloc[0]
    assert own["q"] == np.float32(first["mos_quality"] / 7)
    assert own["c"] == np.float32(first["mos_align"] / 5.5)
    said = refused("--label_scale_c", 5, data=changed({5: {"mos_align": 5.5}}))
    assert "mos_align outside of the label scale 0 to 5: 1 row (7)" in said
    assert "--label_scale_c" in said


def test_short_rows_have_no_explanation(table, changed, tmp_path):
    """A row that ends before its explanation has none; it is not the word 'nan'."""
    data = changed()
    lines = data.csv.read_text().splitlines()
    lines[2] = lines[2].rsplit(",", 1)[0]
    data.csv.write_text("\n".join(lines) + "\n")
    result = table(data, "--use_explanations")
    assert result.frame["explanation_id"].iloc[1] == -1
    assert "nan" not in result.explanations


# --- errors ---------------------------------------------------------------------------------

BAD_CELLS = [
    ({3: {"mos_quality": "good"}}, ["mos_quality", "not a finite number", "1 row", "(5)"]),
    ({3: {"mos_quality": "", "mos_align": " "}}, ["neither quality nor consistency: 1 row (5)"]),
    ({3: {"mos_align": "NaN"}}, ["mos_align", "not a finite number", "(5)"]),
    ({3: {"mos_align": "inf"}}, ["mos_align", "not a finite number", "(5)"]),
    ({4: {"mos_quality": "-100.1"}}, ["outside of the label scale -100 to 100: 1 row (6)",
                                       "--label_scale_q"]),
    ({5: {"mos_quality": "101"}}, ["mos_quality outside of the label scale 0 to 100: 1 row (7)",
                                   "--label_scale_q"]),
    ({0: {"prompt": ""}}, ["empty prompts", "1 row", "(2)"]),
    ({0: {"prompt": "  "}}, ["empty prompts", "(2)"]),
    ({0: {"name": ""}}, ["empty image names", "(2)"]),
    ({9: {"name": "img_000.png"}}, ["duplicate image names", "2 rows", "(2, 11)"]),
    ({1: {"name": "nothing.png"}}, ["missing", "1 row", "(3)", "--image_base_dir"]),
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
    said = refused(data=changed({i: {"mos_quality": "bad"} for i in range(7)} | {
        8: {"mos_align": "x"}, 9: {"prompt": ""}, 10: {"name": "gone.png"}}))
    assert "mos_quality that is not a finite number: 7 rows (2, 3, 4, 5, 6, ..)" in said
    assert "mos_align that is not a finite number: 1 row (10)" in said
    assert "empty prompts: 1 row (11)" in said
    assert "1 row (12)" in said
    problems = [line for line in said.splitlines() if line.startswith("  - ")]
    assert len(problems) == 4
    assert all("; " in line and len(line.split("; ", 1)[1]) > 10 for line in problems)


@pytest.mark.parametrize("name, more", [
    ("prompt", []), ("mos_align", ["--consistency_column", "mos_align"]),
    ("mos_quality", ["--quality_column", "mos_quality"]), ("explanation", ["--use_explanations"])])
def test_missing_column_names_what_is_there(refused, changed, no_model, name, more):
    """A missing column is refused with its name, the columns that exist and its flag."""
    said = refused(*more, data=changed(columns=[c for c in COLUMNS if c != name]))
    assert f"{name} is missing" in said
    assert "name, " in said.split("it has")[1]
    flag = {"mos_quality": "quality", "mos_align": "consistency"}.get(name, name)
    assert f"--{flag}_column" in said


HEAD = b"name,prompt,mos_quality,mos_align\n"


@pytest.mark.parametrize("content, word", [
    (None, "--data_csv_path"), (b"", "readable CSV"), (HEAD, "no rows"),
    (HEAD + "á.png,é,1,1\n".encode("latin-1"), "UTF-8"),
    (HEAD + b"1,2,3,4\n1,2,3,4,5,6\n", "readable CSV"),
    (HEAD + b"1,2,3,4,5\n1,2,3,4,5\n", "more cells")])
def test_files_that_are_no_table(refused, data, tmp_path, no_model, content, word):
    """A missing, empty, headless, mis-encoded or ragged file is refused in one sentence."""
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_bytes(content)
    said = refused(data=SimpleNamespace(csv=path, images=data.images))
    assert word in said and "bad.csv" in said


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
    frame = pd.DataFrame({"name": [f"{i:04d}" for i in range(len(prompt_id))],
                          "prompt_id": prompt_id, "group_id": prompt_id, "q": 0.5, "c": 0.5})
    prompts = [f"prompt {i:03d}" for i in range(len(sizes))]
    return baseline.Table(frame, prompts, [], {"q": (0, 1), "c": (0, 1)}, None)


def split(table, seed=0, **values):
    """Split a table with the given ratios."""
    args = SimpleNamespace(**{"split_by": "prompt", "val_ratio": 0.2, "test_ratio": 0.0, **values})
    return baseline.split_rows(table, args, seed)


@pytest.mark.parametrize("test_ratio", [0.0, 0.15])
def test_split_by_prompt_is_disjoint_complete_and_of_the_right_size(test_ratio):
    """No prompt is on two sides, no image is lost, shares are within two points."""
    table = fake_table([5] * 60)
    for seed in range(5):
        parts = split(table, seed, test_ratio=test_ratio)
        rows = np.concatenate(list(parts.values()))
        assert sorted(rows) == list(range(300))
        prompts = [set(table.frame["prompt_id"].iloc[part]) for part in parts.values()]
        assert sum(map(len, prompts)) == 60
        assert abs(len(parts["val"]) / 300 - 0.2) <= 0.02
        assert abs(len(parts["test"]) / 300 - test_ratio) <= 0.02


def test_split_is_a_function_of_the_seed_alone():
    """Global generators do not change it, nor the validation share the test part."""
    table, splits = fake_table([4] * 30), []
    for state, seed, ratio in ((1, 1, 0.2), (2, 1, 0.2), (2, 2, 0.2), (2, 1, 0.4)):
        np.random.seed(state), random.seed(state)
        splits.append(split(table, seed, test_ratio=0.2, val_ratio=ratio))
    assert all(np.array_equal(splits[0][part], rows) for part, rows in splits[1].items())
    assert set(splits[0]["val"]) != set(splits[2]["val"])
    assert np.array_equal(splits[0]["test"], splits[3]["test"])


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


def test_prompts_that_differ_in_case_and_spacing_are_one(table, changed, data):
    """Trivially different spellings are one group, for split, cross-validation and intervals."""
    odd = table(changed({i: {"prompt": f"  {row['prompt'].upper()}  ".replace(" ", "  ")}
                         for i, row in enumerate(data.rows) if i % 2}))
    assert odd.frame["prompt_id"].nunique() > 9 == odd.frame["group_id"].nunique()
    assert (odd.frame["group_id"].to_numpy().reshape(9, 4).std(axis=1) == 0).all()


def test_split_by_image_mixes_prompts():
    """The image split has the right share and puts prompts on both sides."""
    table = fake_table([5] * 60)
    parts = split(table, split_by="image")
    assert len(parts["val"]) == 60 and set(parts) == {"train", "val", "test"}
    assert np.intersect1d(*(table.frame["prompt_id"].iloc[parts[p]] for p in ("train", "val"))).size


def test_a_part_that_would_be_empty_is_refused(refused, changed, data, no_model):
    """One prompt cannot be split by prompt."""
    rows = [{**row, "prompt": "the same"} for row in data.rows]
    said = refused(data=changed(rows=rows))
    assert "--split_by" in said and "at least 2 images" in said


# --- texts and pictures ---------------------------------------------------------------------


def test_truncated_prompts_are_counted_and_said_once(build, changed, data, capsys):
    """Two of the prompts are longer than the text tower reads; exactly 77 tokens still fit."""
    for texts, want in (["dog " * 75], []), (["dog " * 75, "dog " * 76, "dog " * 76,
                                              "dog " * 76 + "cat"], ["2 of 11"]):
        capsys.readouterr()
        build("--freeze_clip", "--split_by", "image", data=changed(
            {i: {"prompt": text.strip()} for i, text in enumerate(texts)}))
        said = [line for line in capsys.readouterr().out.splitlines() if "77 tokens" in line]
        assert [line.split(" prompts are longer than")[0] for line in said] == want


def test_pixels_equal_open_clips_own_preprocess(build, clips):
    """Pixels equal open_clip's transform bit for bit; its own resize mode unless told otherwise."""
    pixels = {}
    for mode in (None, "shortest", "squash", "longest"):
        run = build("--freeze_clip", "--cache", "off", *(["--resize_mode", mode] if mode else []))
        _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clips()}",
                                                                image_resize_mode=mode)
        pixels[mode] = run.scorer.pixels(decoded(run, np.arange(6)))
        assert torch.equal(pixels[mode], torch.stack([transform(Image.open(path).convert("RGB"))
                                                      for path in run.table.frame["path"][:6]]))
    assert torch.equal(pixels[None], pixels["shortest"])
    assert not torch.equal(pixels["shortest"], pixels["squash"])
    assert not torch.equal(pixels["squash"], pixels["longest"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_damaged_picture_is_named_with_its_row(refused, data, tmp_path, workers, cache):
    """A truncated JPEG ends the run with its path and CSV row, also from a thread."""
    folder = shutil.copytree(data.images, tmp_path / "damaged")
    bad = folder / "img_005.jpg"
    bad.write_bytes(bad.read_bytes()[:400])
    said = refused("--freeze_clip", "--num_workers", workers, "--cache", cache,
                   data=SimpleNamespace(csv=data.csv, images=folder))
    assert str(bad) in said and "CSV row 7" in said


def test_every_kind_of_file_loads_as_the_rgb_that_it_stands_for(tmp_path):
    """Sideways by EXIF, 16-bit grey, RGBA, palette and CMYK files give the same upright RGB."""
    upright, exif = draw(np.random.default_rng(0), 40, 24), Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / "side.png", exif=exif)
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    flat = Image.new("RGB", (20, 12), (200, 30, 90))
    flat.paste((10, 160, 60), (0, 0, 10, 12))
    flat.convert("RGBA").save(tmp_path / "a.png")
    flat.quantize(4).save(tmp_path / "p.png")
    flat.convert("CMYK").save(tmp_path / "c.tif")
    for name, want, within in (("side.png", upright, 0), ("deep.png", grey.convert("RGB"), 0),
                               ("a.png", flat, 0), ("p.png", flat, 2), ("c.tif", flat, 2)):
        got = baseline.load_image(tmp_path / name)
        assert got.mode == "RGB"
        assert np.abs(np.asarray(got, float) - np.asarray(want, float)).max() <= within, name


# --- views ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_evaluation_shows_original_views(build, cache):
    """Predictions of a part do not depend on the training views."""
    got = {}
    for augment in ("none", "flip", "crop"):
        run = build("--partial_freeze", "--freeze_layers", 2, "--augment", augment, "--cache",
                    cache, out=augment)
        got[augment] = baseline.evaluate(run, "train")[0]["q"]
    assert np.ptp(got["none"]) > 1e-3
    assert np.allclose(got["none"], got["flip"], atol=1e-6)
    assert np.allclose(got["none"], got["crop"], atol=1e-6)


def test_training_views_flip_half_and_crop_a_little():
    """Each row has one view, half of them mirrored; crops keep 90 to 100 % of the area."""
    rows = np.arange(4000)
    views = baseline.plan_views(rows, baseline.parse_args(["--augment", "crop"]), 1, 1)
    area = views.box[:, 2] * views.box[:, 3]
    assert 0.45 < np.mean(views.flip) < 0.55
    assert 0.9 <= area.min() < 0.905 and 0.995 < area.max() <= 1
    assert (views.box[:, :2] >= 0).all() and (views.box[:, :2] + views.box[:, 2:] <= 1 + 1e-9).all()
    assert np.allclose(views.box[:, 2], views.box[:, 3])
    assert sorted(views.row) == rows.tolist() and views.row.tolist() != rows.tolist()


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_view_is_the_mirrored_part_of_its_picture(build, cache):
    """A flipped view is the mirror image; a crop is what Pillow cuts out and resizes."""
    run = build("--augment", "crop", "--cache", cache)
    views = baseline.plan_views(np.arange(12), run.args, 1, 1)
    views.box[:4] = 0, 0, 1, 1  # not cropped
    got = next(run.images.stream([views[:4]])), next(run.images.stream([views[4:]]))
    whole = decoded(run, views.row).permute(0, 2, 3, 1).numpy()
    want = []
    for pixels, view in zip(whole, views):
        image = Image.fromarray(pixels[:, ::-1] if view.flip else pixels)
        top, left, height, width = (round(32 * side) for side in view.box)
        image = image.resize((32, 32), Image.Resampling.BICUBIC,
                             (left, top, left + width, top + height))
        want.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    want = run.scorer.pixels(torch.stack(want))
    assert 0 < views.flip[:4].sum() < 4 and 0 < views.flip[4:].sum() < 8
    assert torch.equal(got[0], want[:4])
    assert (got[1] - want[4:]).abs().max() < 0.05  # grey levels, over a deviation of 0.26
    assert (run.scorer.pixels(decoded(run, views.row))[4:] - want[4:]).abs().max() > 0.5


def test_config_records_split_and_scales(train):
    """config.json says what the labels were divided by and which split it was."""
    run = train("--freeze_clip", "--epochs", 1, "--test_ratio", 0.2)
    config = read_json(run.folder / "config.json")
    assert config["targets"] == {"q": [0, 5], "c": [0, 5]}
    assert config["split"] == run.row["split"] and sum(config["images"].values()) == 36
