"""Nothing lost, nothing let in: the damage is really done, and a clear error is all that follows."""

import json
import math
import os
import pickle
import resource
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load, read_csv, same_tensors, write_clip, write_csv

import baseline

PARTIAL = ["--partial_freeze", "--freeze_layers", 2]


def content(folder):
    """Return {path: bytes} of all files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def own(data, tmp_path):
    """A copy of the data that a test may damage."""
    images = shutil.copytree(data.images, tmp_path / "images")
    return SimpleNamespace(csv=shutil.copy(data.csv, tmp_path / "own.csv"), images=images,
                           rows=data.rows)


# --- no room, no right ----------------------------------------------------------------------


@pytest.fixture
def no_room():
    """Return a function that limits every file to some bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return limit


@pytest.mark.parametrize("size", [10, 5000, 20000])
@pytest.mark.parametrize("mode", ["frozen", "partial"])
def test_no_room_for_a_checkpoint(train, refused, no_room, monkeypatch, tmp_path, mode, size):
    """A checkpoint that does not fit is an error; the checkpoints and the log before it stay."""
    real, kept = baseline.save_checkpoint, {}

    def save(run, name):
        if run.state["epoch"] == 2:
            kept.update(content(tmp_path / "out"))
            no_room(size)
        real(run, name)
    monkeypatch.setattr(baseline, "save_checkpoint", save)
    said = refused(*(PARTIAL if mode == "partial" else ["--freeze_clip"]), "--epochs", 3)
    assert "must be writable" in said and "baseline_" in said and "File too large" in said
    assert content(tmp_path / "out") == kept and "training_log.csv" in kept
    assert load(tmp_path / "out")["progress"]["epoch"] == 1


@pytest.mark.parametrize("name", ["config.json", "training_log.csv", "result.json", "runs.csv",
                                  "val_predictions.csv", "curves.png", "report.html",
                                  "baseline_best.pt", "baseline_last.pt"])
def test_each_file_that_cannot_be_written_is_named(flags, capsys, monkeypatch, tmp_path, name):
    """A folder stands where the file belongs: the error names it, and nothing else is lost."""
    argv = [word for word in flags("--freeze_clip", "--epochs", 1) if word != "--no_plots"]
    archive = baseline.archive_old_run

    def block(args):
        archive(args)
        (tmp_path / "out" / name / "in the way").mkdir(parents=True)
    monkeypatch.setattr(baseline, "archive_old_run", block)
    with pytest.raises(SystemExit) as stop:
        baseline.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    assert f"{name} must be writable" in said
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_an_output_folder_below_a_file(refused, tmp_path):
    """An output folder that cannot be made is named."""
    (tmp_path / "file").write_text("in the way")
    said = refused("--freeze_clip", out="file/out")
    assert "must be writable" in said and str(tmp_path / "file" / "out") in said
    assert (tmp_path / "file").read_text() == "in the way"


def test_runs_csv_keeps_no_half_row(train, refused, no_room, monkeypatch):
    """A row for which there is no room is taken back whole; the next run appends its own."""
    path = train("--freeze_clip", "--epochs", 1).folder / "runs.csv"
    before, append = path.read_bytes(), baseline.append_run

    def full(args, summary):
        no_room(len(before) + 40)
        append(args, summary)
    with monkeypatch.context() as patch:
        patch.setattr(baseline, "append_run", full)
        assert "runs.csv must be writable" in refused("--freeze_clip", "--epochs", 1)
    assert path.read_bytes() == before
    assert (path.parent / "result.json").exists()
    no_room(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    train("--freeze_clip", "--epochs", 1)
    assert path.read_bytes().startswith(before) and len(read_csv(path)) == 2


def test_no_room_for_the_cache(train, no_room, monkeypatch, capsys):
    """A cache for which there is no room is said, and changes nothing else."""
    whole = train("--epochs", 1, out="whole")
    cached = baseline.cached_array

    def full(*args):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        no_room(1000)
        try:
            return cached(*args)
        finally:
            no_room(before)
    monkeypatch.setattr(baseline, "cached_array", full)
    capsys.readouterr()
    run = train("--epochs", 1, out="limited")
    said = capsys.readouterr().out
    assert "going on without the pixels cache" in said and "File too large" in said
    assert not any("pixels" in path.name for path in (run.folder / "cache").iterdir())
    assert same_tensors(load(run.folder)["state"], load(whole.folder)["state"])


# --- images that go away or are none --------------------------------------------------------


def vanishing(monkeypatch, path, when):
    """Delete an image just before one of the program's functions runs."""
    real = getattr(baseline, when)

    def vanish(*args, **kwargs):
        path.unlink(missing_ok=True)
        return real(*args, **kwargs)
    monkeypatch.setattr(baseline, when, vanish)


@pytest.mark.parametrize("cache, when", [("auto", "load_clip"), ("off", "load_clip"),
                                         ("off", "start_state")])
def test_an_image_that_vanishes_is_named(refused, monkeypatch, own, cache, when):
    """Deleted after the CSV was checked, or while it trains: its path and its CSV row."""
    vanishing(monkeypatch, own.images / "img_005.jpg", when)
    vanishing(monkeypatch, own.images / "img_006.png", when)  # one of each part, or both in one
    said = refused("--freeze_clip", "--cache", cache, data=own)
    assert any(f"{own.images / name} (CSV row {row})" in said
               for name, row in (("img_005.jpg", 7), ("img_006.png", 8)))


def test_an_image_in_the_cache_may_vanish(flags, monkeypatch, own, tmp_path):
    """What is in the cache is not read again; the report shows a grey square in its place."""
    for name in os.listdir(own.images):
        vanishing(monkeypatch, own.images / name, "start_state")
    baseline.main([w for w in flags("--freeze_clip", data=own) if w != "--no_plots"])
    assert (tmp_path / "out" / "report.html").exists() and not os.listdir(own.images)


def png(width, height, body=b""):
    """Return a PNG whose header claims a size, whatever it holds."""
    def chunk(kind, text):
        return (struct.pack(">I", len(text)) + kind + text
                + struct.pack(">I", zlib.crc32(kind + text)))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


BAD_IMAGES = {
    "bomb": (png(11_000, 11_000), "decompression bomb"),  # above Pillow's limit, below twice it
    "big bomb": (png(60_000, 60_000), "decompression bomb"),
    "wide": (png(100_000, 1), "100000 x 1 pixels"), "high": (png(1, 60_000), "1 x 60000 pixels"),
    "no data": (png(50, 50), ""), "empty": (b"", "cannot identify"),
    "text": (b"this is no picture", "cannot identify"), "zeros": (bytes(4000), "cannot identify"),
    "page": (b"<html><script>alert(1)</script>", "cannot identify"),
    "jpeg head": (b"\xff\xd8\xff\xe0" + bytes(30), ""), "gif head": (b"GIF89a", ""),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_what_is_no_picture_is_named_in_training(refused, own, kind):
    """A bomb, an absurd size or no picture at all: the file, its row and the reason."""
    path = own.images / "img_010.png"
    path.write_bytes(BAD_IMAGES[kind][0])
    said = refused("--freeze_clip", data=own)
    assert f"{path} (CSV row 12)" in said and BAD_IMAGES[kind][1] in said


def test_what_is_no_picture_is_a_row_with_an_error_in_scoring(train, tmp_path, data, recwarn):
    """Each bad picture of a folder has its reason; the good one is scored."""
    best = train("--freeze_clip", "--epochs", 1).folder / "baseline_best.pt"
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(data.images / "img_001.jpg", folder / "good.jpg")
    (folder / "cut.jpg").write_bytes((data.images / "img_001.jpg").read_bytes()[:400])
    for kind, (image, _) in BAD_IMAGES.items():
        (folder / f"{kind}.png").write_bytes(image)
    with pytest.raises(SystemExit) as stop:
        baseline.main(["--predict", str(folder), "--checkpoint", str(best), "--predictions_csv",
                       str(tmp_path / "scores.csv"), "--num_workers", "0"])
    rows = {row["name"]: row for row in read_csv(tmp_path / "scores.csv")}
    assert stop.value.code == 1 and len(rows) == len(BAD_IMAGES) + 2
    assert rows["good.jpg"]["quality"] and not rows["good.jpg"]["error"]
    for kind, (_, reason) in BAD_IMAGES.items():
        assert rows[f"{kind}.png"]["error"] and reason in rows[f"{kind}.png"]["error"]
        assert rows[f"{kind}.png"]["quality"] == ""
    assert rows["cut.jpg"]["error"]
    assert not [w for w in recwarn if "bomb" in str(w.message)]


# --- --skip_bad_images ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_and_listed(train, own, tmp_path, workers):
    """One missing or damaged image of 36 is left out, listed, and in no part of the split."""
    (own.images / "img_007.jpg").write_bytes(b"no picture")
    run = train("--freeze_clip", "--skip_bad_images", "--num_workers", workers, data=own)
    (row,) = read_csv(run.folder / "skipped.csv")
    assert (row["name"], row["row"]) == ("img_007.jpg", "9") and "identify" in row["reason"]
    config = json.loads((run.folder / "config.json").read_text())
    assert sum(config["images"].values()) == 35
    assert "img_007.jpg" not in (run.folder / "val_predictions.csv").read_text()
    rest = [r for r in own.rows if r["name"] != "img_007.jpg"]
    without = train("--freeze_clip", out="without", data=SimpleNamespace(
        csv=write_csv(tmp_path / "rest.csv", rest), images=own.images))
    assert without.summary["split"] == run.summary["split"]
    assert same_tensors(load(run.folder)["state"], load(without.folder)["state"])
    (own.images / "img_007.jpg").unlink()
    gone = train("--freeze_clip", "--skip_bad_images", out="gone", data=own)
    (row,) = read_csv(gone.folder / "skipped.csv")
    assert row["name"] == "img_007.jpg" and "No such file" in row["reason"]


def test_more_than_one_in_twenty_is_an_error_all_the_same(refused, own, tmp_path):
    """Two bad images of 36 are too many, of which the names and rows are said."""
    (own.images / "img_007.jpg").write_bytes(b"no picture")
    (own.images / "img_011.jpg").unlink()
    said = refused("--freeze_clip", "--skip_bad_images", data=own)
    assert "2 of 36" in said and "5%" in said
    assert "img_007.jpg (CSV row 9:" in said and "img_011.jpg (CSV row 13:" in said
    assert not (tmp_path / "out" / "baseline_best.pt").exists()


def test_without_the_flag_nothing_is_skipped(refused, train, own, tmp_path):
    """A bad image is an error that names the flag; with nothing bad the list is empty."""
    run = train("--freeze_clip", "--skip_bad_images", "--epochs", 1, out="good")
    assert (run.folder / "skipped.csv").read_text() == "name,row,reason\n"
    (own.images / "img_007.jpg").write_bytes(b"no picture")
    said = refused("--freeze_clip", data=own)
    assert "img_007.jpg (CSV row 9)" in said and "--skip_bad_images" in said
    assert not (tmp_path / "out" / "skipped.csv").exists()


def test_a_run_that_skipped_is_resumed_on_the_same_images(train, refused, own):
    """The flag comes from the checkpoint; an image more that is bad is another split."""
    (own.images / "img_007.jpg").write_bytes(b"no picture")
    run = train("--freeze_clip", "--skip_bad_images", data=own)
    last = run.folder / "baseline_last.pt"
    again = train("--resume_from", last, data=own)
    assert again.summary["split"] == run.summary["split"]
    shutil.copy(own.images / "img_009.jpg", own.images / "img_007.jpg")
    assert "another split" in refused("--resume_from", last, data=own)


# --- checkpoints that are damaged or foreign ------------------------------------------------


def cut(path):
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip(path):
    """Flip one bit in the middle of a file: in a tensor."""
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def empty(path):
    """Leave nothing of a file."""
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
@pytest.mark.parametrize("name, other", [("baseline_last.pt", "baseline_best.pt"),
                                         ("baseline_best.pt", "baseline_last.pt")])
def test_a_damaged_checkpoint_is_named_and_the_other_offered(train, refused, data, damage, name,
                                                             other):
    """The error has the path of the damaged one and of the one beside it, which works."""
    folder = train("--freeze_clip", "--lr", 1e-3).folder
    damage(folder / name)
    for use in (["--resume_from", folder / name],
                ["--predict", folder, "--checkpoint", folder / name]):
        said = refused(*use)
        assert f"{folder / name} is damaged" in said and f"use {folder / other}" in said
    baseline.main(["--predict", str(data.images), "--checkpoint", str(folder / other),
                   "--predictions_csv", str(folder / "scores.csv"), "--num_workers", "0"])
    assert len(read_csv(folder / "scores.csv")) == 36
    (folder / other).unlink()
    said = refused("--resume_from", folder / name)
    assert other not in said and "train again" in said


def test_a_checkpoint_without_its_parts_is_damaged(train, refused, tmp_path):
    """A file with our name on it but without what a checkpoint holds ends in no traceback."""
    whole = load(train("--freeze_clip", "--epochs", 1).folder)
    for part in baseline.CHECKPOINT_PARTS:
        for value in (None, {part: 1}, "text", [1]):
            if not isinstance(value, baseline.CHECKPOINT_PARTS[part]):
                torch.save({**whole, part: value}, tmp_path / "odd.pt")
                said = refused("--resume_from", tmp_path / "odd.pt")
                assert "odd.pt" in said and part in said


def test_a_checkpoint_of_another_model_says_so(train, refused, tmp_path, clips):
    """Other heads, another CLIP, another version, another program: each is named."""
    whole = load(train("--freeze_clip").folder)
    state = {k: v for k, v in whole["state"].items() if "base" not in k}
    wider = {k: torch.zeros(3, *v.shape) for k, v in whole["state"].items()}
    for changed, words in (({"state": state}, "another model"), ({"state": wider}, "another model"),
                           ({"version": 7}, "version 7"), ({"version": None}, "version None"),
                           ({"format": "timm"}, "another program"),
                           ({"identity": {**whole["identity"], "weights": "0" * 64}},
                            "other CLIP weights")):
        torch.save({**whole, **changed}, tmp_path / "other.pt")
        assert words in refused("--resume_from", tmp_path / "other.pt")


# --- code that would run --------------------------------------------------------------------


class Bomb:
    """A pickle of this makes a file when it is loaded carelessly."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("how", ["pickle", "torch", "legacy torch"])
@pytest.mark.parametrize("where", ["--resume_from", "--checkpoint", "--pretrained", "local-dir",
                                   "local-dir .pth"])
def test_code_in_a_file_is_refused_and_does_not_run(train, refused, tmp_path, data, where, how):
    """A pickle that would run code is refused wherever a file is given, by its path."""
    target = tmp_path / "exploded"
    path, more, clip = tmp_path / "evil.pt", [where, tmp_path / "evil.pt"], "vit"
    if where == "--checkpoint":
        more += ["--predict", data.csv]
    elif where == "--pretrained":
        more += ["--clip_model", "ViT-S-32-alt"]  # a model that open_clip itself knows
    elif where.startswith("local-dir"):
        clip, more = write_clip(tmp_path / "clip", pretrained=False), []
        path = clip / ("model.pth" if "pth" in where else "open_clip_pytorch_model.bin")
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb(target)))
    else:
        torch.save({"state_dict": Bomb(target)}, path,
                   _use_new_zipfile_serialization=how == "torch")
    assert str(path) in refused("--freeze_clip", *more, clip=clip)
    assert not target.exists()
    if how == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert target.exists()  # the bomb was live


def object_array(path, target):
    """Write an array of pickled objects."""
    np.save(path, np.array([Bomb(target)] * 36, dtype=object), allow_pickle=True)


def sealed_object_array(path, target):
    """Write one that even has the right checksum."""
    object_array(path, target)
    path.write_bytes(path.read_bytes() + zlib.crc32(path.read_bytes()).to_bytes(4, "little"))


def other_numbers(path, target):
    """Write other numbers of the right shape."""
    array = np.load(path)
    np.save(path, np.ones_like(array))


def fewer_rows(path, target):
    """Write an array of too few rows, with its checksum."""
    array = np.load(path)
    np.save(path, array[:-1])
    path.write_bytes(path.read_bytes() + zlib.crc32(path.read_bytes()).to_bytes(4, "little"))


def harm(function):
    """Return a damage of a file as one of a cache file."""
    def damage(path, target):
        function(path)
    damage.__name__ = function.__name__
    return damage


@pytest.mark.parametrize("damage", [object_array, sealed_object_array, other_numbers, fewer_rows,
                                    harm(cut), harm(flip), harm(empty)],
                         ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("mode", ["frozen", "partial", "full"])
def test_a_damaged_cache_is_computed_again(train, capsys, tmp_path, damage, mode):
    """A planted, cut or changed cache file is never used: it is named, and computed again."""
    mode = {"frozen": ["--freeze_clip"], "partial": PARTIAL, "full": []}[mode]
    command = [*mode, "--epochs", 1, "--cache_dir", tmp_path / "cache"]
    whole, files = train(*command, out="whole"), content(tmp_path / "cache")
    for name in files:
        damage(tmp_path / "cache" / name, tmp_path / "exploded")
    assert all(content(tmp_path / "cache")[name] != files[name] for name in files)
    capsys.readouterr()
    again = train(*command, out="again")
    said = capsys.readouterr().out
    assert all(f"{tmp_path / 'cache' / name} is damaged" in said for name in files)
    assert same_tensors(load(whole.folder)["state"], load(again.folder)["state"])
    assert content(tmp_path / "cache") == files and not (tmp_path / "exploded").exists()


def test_rows_with_more_cells_than_columns_are_refused(refused, own):
    """Pandas would take the first cells as an index, and every value for its neighbour's."""
    head, *lines = Path(own.csv).read_text(encoding="utf-8").splitlines()
    Path(own.csv).write_text("\n".join([head, *(f"{line},more" for line in lines)]))
    assert "more cells" in refused(data=own)


# --- folders, links, formulas ---------------------------------------------------------------


def test_links_of_a_scored_folder_do_not_lead_out(train, tmp_path, data, capsys):
    """A folder's links to pictures and prompts outside it are not followed, and counted."""
    best = train("--freeze_clip", "--epochs", 1).folder / "baseline_best.pt"
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("the secret prompt")
    shutil.copy(data.images / "img_000.png", folder / "good.png")
    (folder / "good.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "link.png").symlink_to(data.images / "img_002.png")
    (folder / "linked").symlink_to(data.images, target_is_directory=True)
    (folder / "within.png").symlink_to(folder / "good.png")
    capsys.readouterr()
    baseline.main(["--predict", str(folder), "--checkpoint", str(best), "--predictions_csv",
                   str(tmp_path / "scores.csv"), "--num_workers", "0"])
    rows = read_csv(tmp_path / "scores.csv")
    assert [row["name"] for row in rows] == ["good.png", "within.png"]
    assert "secret" not in (tmp_path / "scores.csv").read_text()
    assert "1 links that lead out of" in capsys.readouterr().out


FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("x")']
HARMLESS = ["a red house", "-1.5", "+3", "1e5", "a=b", "", "'quoted", "-inf", "猫", " =1"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_gets_an_apostrophe(text):
    """A text that a spreadsheet would run does not begin as one."""
    assert baseline.safe_cell(text) == "'" + text


@pytest.mark.parametrize("value", [*HARMLESS, 1, -1.5, math.nan, True, None])
def test_everything_else_stays_as_it_is(value):
    """Numbers, and texts that are none of a formula's, are written as they are."""
    assert baseline.safe_cell(value) is value


def test_no_csv_holds_a_formula(train, own, tmp_path, capsys):
    """Prompts, names and columns that are formulas reach no CSV as such; the prompts' text does."""
    (own.images / "img_000.png").rename(own.images / "=1+1.png")
    (own.images / "img_001.jpg").rename(own.images / "@bad.jpg")
    rows = [{**row, "prompt": "=2+2 " + row["prompt"], "=note": "+3+3"} for row in own.rows]
    rows[0]["name"], rows[1]["name"] = "=1+1.png", "@bad.jpg"
    (own.images / "@bad.jpg").write_bytes(b"")
    write_csv(own.csv, rows, [*rows[0]])
    folder = train("--freeze_clip", "--epochs", 1, "--skip_bad_images", data=own).folder
    command = ["--predict", str(own.csv), "--checkpoint", str(folder / "baseline_best.pt"),
               "--image_base_dir", str(own.images), "--num_workers", "0", "--predictions_csv"]
    for target in (str(folder / "scores.csv"), "-"):
        capsys.readouterr()
        with pytest.raises(SystemExit):  # one image cannot be read
            baseline.main([*command, target])
    (folder / "stdout.csv").write_text(capsys.readouterr().out)
    assert (folder / "skipped.csv").read_text().splitlines()[1].startswith("'@bad.jpg,3,")
    seen = 0
    for path in folder.glob("*.csv"):
        for row in read_csv(path):
            for cell in [*row, *row.values()]:
                assert not cell.startswith(("=", "+", "@")), (path, cell)
                seen += cell.startswith("'=2+2 ")
    assert seen >= 36 and "'=note" in (folder / "scores.csv").read_text().splitlines()[0]


# --- fp16 -----------------------------------------------------------------------------------


@pytest.fixture
def half(monkeypatch):
    """Return a function that poisons the losses of some batches (from 1), with fp16's scaler on."""
    def make(batches, value=math.inf):
        real, calls = baseline.losses, []

        def overflow(out, batch, args):
            sums, total = real(out, batch, args)
            calls.append(1)
            return sums, total * value if len(calls) in batches else total
        monkeypatch.setattr(baseline, "losses", overflow)
    return make


def test_one_overflow_in_fp16_is_skipped_and_counted(train, half, capsys):
    """A single overflow changes no weight, is shown per epoch and at the end, and does not stop."""
    half({3})
    capsys.readouterr()
    run = train(*PARTIAL, "--precision", "fp16", "--lr", 1e-4, "--epochs", 3)
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("epoch")]
    assert ["fp16 skipped 1 updates so far" in line for line in lines] == [False, True, True, True]
    assert "fp16: 1 updates overflowed and were skipped" in said
    assert run.summary["skipped_updates"] == 1
    last = load(run.folder)
    assert all(torch.isfinite(value).all() for value in last["state"].values())
    assert {int(s["step"]) for s in last["optimizer"]["state"].values()} == {11}  # of 12


def test_gradients_that_overflow_are_counted_too(train, monkeypatch, capsys):
    """The loss is finite, its scaled gradient is not: the update is skipped and counted."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: real(
        device, enabled=enabled, init_scale=2.0 ** 127 * 1.9))
    run = train(*PARTIAL, "--precision", "fp16", "--lr", 1e-4, "--max_grad_norm", 0)
    assert run.summary["skipped_updates"] >= 1
    assert f"skipped {run.summary['skipped_updates']} updates" in capsys.readouterr().out


def test_fp32_skips_nothing(train, capsys):
    """Without the scaler nothing is said of it."""
    run = train("--freeze_clip", "--precision", "fp32")
    assert "skipped_updates" not in run.summary and "skipped" not in capsys.readouterr().out


@pytest.mark.parametrize("often", [[], ["--save_every_steps", 1]])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_stays_non_finite_stops_fp16_too(refused, half, tmp_path, value, often):
    """From the second epoch on every loss overflows: the run ends, its checkpoints are good."""
    half(set(range(5, 1000)), value)
    said = refused(*PARTIAL, "--precision", "fp16", "--lr", 1e-4, "--epochs", 9, *often)
    assert "finite" in said and "img_" in said and "last good checkpoint" in said
    for name in ("baseline_last.pt", "baseline_best.pt"):
        content = load(tmp_path / "out", name)
        assert content["progress"]["epoch"] <= 1
        assert all(torch.isfinite(v).all() for v in content["state"].values())
