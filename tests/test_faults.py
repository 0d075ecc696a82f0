"""Nothing lost, nothing let in: the damage is really done, a clear error is all that follows."""

import contextlib
import functools
import io
import itertools
import math
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import VISION, draw, load, read_csv, read_json, same_tensors, write_clip, write_csv
from PIL import PngImagePlugin

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


@pytest.fixture(scope="module")
def once(data, clips, tmp_path_factory):
    """Return the folder of a run with these flags, trained on first use."""
    root = tmp_path_factory.mktemp("once")

    @functools.cache
    def run(*more):
        folder = root / str(len(list(root.iterdir())))
        words = ["--data_csv_path", data.csv, "--image_base_dir", data.images, "--clip_model",
                 f"local-dir:{clips()}", "--output_dir", folder, "--num_workers", 0,
                 "--epochs", 2, "--batch_size", 8, "--no_plots", *more]
        baseline.main([*map(str, words)])
        return folder
    return run


@pytest.fixture
def trained(once, tmp_path):
    """Copy the folder of a run with these flags, trained once, to `out`."""
    return lambda *more: shutil.copytree(once(*more), tmp_path / "out")


@pytest.fixture
def no_room(monkeypatch):
    """Limit the size of files, as a full disk would, once one of a name is to be written."""
    def make(name, size):
        real, (_, hard) = baseline.writing, resource.getrlimit(resource.RLIMIT_FSIZE)

        def writing(path):
            if Path(path).name == name:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # conftest lifts it
            return real(path)
        monkeypatch.setattr(baseline, "writing", writing)
    return make


@pytest.mark.parametrize("name, size", [
    *((name, 10) for name in ("config.json", "skipped.csv", "baseline_best.pt", "baseline_last.pt",
                              "training_log.csv", "val_predictions.csv", "test_predictions.csv",
                              "curves.png", "scatter.png", "worst.png", "report.html",
                              "result.json", "runs.csv")),
    ("baseline_best.pt", 5000), ("baseline_last.pt", 20_000)])
def test_no_room_for_a_file(trained, flags, capsys, monkeypatch, no_room, tmp_path, name, size):
    """Each file that does not fit is named; nothing of it stays, and nothing else is lost."""
    before = content(trained("--freeze_clip"))
    words = flags("--freeze_clip", "--skip_bad_images", "--test_ratio", 0.2)
    if name.endswith(("png", "html")):
        words.remove("--no_plots")
    scores = itertools.count(0, -1)  # no epoch is better than the start
    monkeypatch.setattr(baseline, "selection_score", lambda values, by: float(next(scores)))
    no_room(name, size)
    with pytest.raises(SystemExit) as stop:
        baseline.main(words)
    said, after = capsys.readouterr().err, content(tmp_path / "out")
    assert stop.value.code == 2 and f"{name} must be writable" in said and "Traceback" not in said
    assert "File too large" in said and not [p for p in after if Path(p).name.startswith(".")]
    assert set(before.values()) <= set(after.values()) and after["runs.csv"] == before["runs.csv"]
    if name == "baseline_last.pt":  # that of the start, which is the best
        assert load(tmp_path / "out")["progress"]["epoch"] == 0
    elif name != "runs.csv":
        assert name not in after


def test_no_room_for_scores(once, refused, no_room, tmp_path, data):
    """Scores that do not fit leave those before them; a folder that cannot be made is named."""
    best = once("--freeze_clip") / "baseline_best.pt"
    scores = tmp_path / "scores.csv"
    scores.write_text("before")
    words = ["--predict", data.csv, "--checkpoint", best, "--predictions_csv"]
    assert f"{scores / '.a.csv.partial'} must be writable" in refused(*words, scores / "a.csv")
    assert "must be writable" in refused("--freeze_clip", out="scores.csv/out")
    no_room("scores.csv", 10)
    assert "--overwrite" in refused(*words, scores)
    assert f"{scores} must be writable" in refused(*words, scores, "--overwrite")
    key, *batches = (tmp_path / ".scores.csv.partial").read_text().splitlines()
    assert key and sum(len(baseline.json.loads(batch)) for batch in batches) == 36
    (tmp_path / ".scores.csv.partial").unlink()
    assert scores.read_text() == "before" and not list(tmp_path.glob(".*"))


def test_a_shared_memory_of_1_mb_is_enough(flags, data, tmp_path):
    """Training and scoring with --num_workers 2 need no /dev/shm, as in a container; no warning."""
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m x /dev/shm && "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], check=False).returncode:
        pytest.skip("unshare -m is not allowed here")
    clip = write_clip(tmp_path / "clip", vision={**VISION, "image_size": 448, "patch_size": 64})
    best, scores = tmp_path / "out" / "baseline_best.pt", tmp_path / "scores.csv"
    words = [*flags("--epochs", 1, "--cache", "off", "--num_workers", 2, clip=clip), "then",
             "--predict", data.csv, "--checkpoint", best, "--num_workers", 2,
             "--predictions_csv", scores]
    code = ("import sys, baseline; end = sys.argv.index('then'); "
            "baseline.main(sys.argv[1:end]); baseline.main(sys.argv[end + 1:])")
    done = subprocess.run([*mount, sys.executable, "-c", code, *map(str, words)],
                          cwd=baseline.HERE, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(read_csv(scores)) == 36


@pytest.mark.parametrize("cache, threads, when", [
    ("auto", 0, "load_clip"), ("off", 2, "load_clip"), ("off", 0, "fit"),
    ("off", 2, "train_one_epoch"), ("auto", 0, "fit")])
def test_images_that_vanish(flags, capsys, monkeypatch, own, tmp_path, cache, threads, when):
    """Deleted after the CSV was checked or later: one and its row are named, if not all cached."""
    real = getattr(baseline, when)

    def gone(*args):
        for path in own.images.iterdir():
            path.unlink()
        return real(*args)
    monkeypatch.setattr(baseline, when, gone)
    words = flags("--freeze_clip", "--cache", cache, "--num_workers", threads, data=own)
    words.remove("--no_plots")
    if (cache, when) == ("auto", "fit"):
        baseline.main(words)  # the report shows grey squares
        assert (tmp_path / "out" / "report.html").exists() and not os.listdir(own.images)
        return
    with pytest.raises(SystemExit, match="2"):
        baseline.main(words)
    said = capsys.readouterr().err
    assert "No such file" in said and any(f"{own.images / row['name']} (CSV row {i})" in said
                                          for i, row in enumerate(own.rows, start=2))


def png(width, height):
    """Return a PNG whose header claims a size, without pixels."""
    file = io.BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n")
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")):
        PngImagePlugin.putchunk(file, kind, content)
    return file.getvalue()


CUT = io.BytesIO()
draw(np.random.default_rng(0)).save(CUT, "JPEG")
BAD_IMAGES = {
    "bomb": (png(11_000, 11_000), "decompression bomb"),  # above Pillow's limit, below twice it
    "big bomb": (png(60_000, 60_000), "decompression bomb"),
    "wide": (png(100_000, 1), "100000 x 1 pixels"), "high": (png(1, 60_000), "1 x 60000 pixels"),
    "no data": (png(50, 50), ""), "empty": (b"", "cannot identify"),
    "text": (b"<html><script>alert(1)</script>", "cannot identify"),
    "zeros": (bytes(4000), "cannot identify"), "jpeg": (b"\xff\xd8\xff\xe0" + bytes(30), ""),
    "gif": (b"GIF89a", ""), "webp": (b"RIFF\x10\x00\x00\x00WEBPVP8 " + bytes(8), ""),
    "cut": (CUT.getvalue()[:CUT.tell() // 2], "runcated"),
}


def test_what_is_no_picture_is_named(refused, own, recwarn):
    """Bombs, absurd sizes, cut files are errors in training (in scoring: see test_scoring.py)."""
    path = own.images / "img_010.png"
    for content, reason in BAD_IMAGES.values():
        path.write_bytes(content)
        said = refused("--freeze_clip", data=own)
        assert f"{path} (CSV row 12)" in said and reason in said
    assert not [w for w in recwarn if "bomb" in str(w.message)]


def test_bad_images_are_skipped_and_listed(train, refused, own, tmp_path):
    """One bad image of 36 is left out, listed and in no part; resuming, it has to be bad still."""
    bad, words = own.images / "img_007.jpg", ["--freeze_clip", "--skip_bad_images"]
    bad.write_bytes(b"no picture")
    rest = write_csv(tmp_path / "rest.csv", [r for r in own.rows if r["name"] != bad.name])
    without = train("--freeze_clip", out="without",
                    data=SimpleNamespace(csv=rest, images=own.images))
    for threads in (2, 0):
        run = train(*words, "--num_workers", threads, data=own, out=f"out{threads}")
        (row,) = read_csv(run.folder / "skipped.csv")
        assert (row["name"], row["row"]) == ("img_007.jpg", "9") and "identify" in row["reason"]
        assert sum(read_json(run.folder / "config.json")["images"].values()) == 35
        assert same_tensors(load(run.folder)["state"], load(without.folder)["state"])
        assert run.row["split"] == without.row["split"]
    resumed = ["--resume_from", run.folder / "baseline_last.pt"]
    assert train(*resumed, data=own, out="out0").row["split"] == run.row["split"]
    bad.unlink()
    (row,) = read_csv(train(*words, out="gone", data=own).folder / "skipped.csv")
    assert row["name"] == "img_007.jpg" and "No such file" in row["reason"]
    shutil.copy(own.images / "img_009.jpg", bad)
    assert "another split" in refused(*resumed, out="out0", data=own)


def test_what_is_not_skipped(train, refused, own):
    """More than one bad image in twenty, or one without the flag, is an error that says which."""
    run = train("--freeze_clip", "--skip_bad_images", "--epochs", 1, out="good")
    assert (run.folder / "skipped.csv").read_text() == "name,row,reason\n"
    (own.images / "img_007.jpg").write_bytes(b"no picture")
    said = refused("--freeze_clip", data=own)
    assert "img_007.jpg (CSV row 9)" in said and "--skip_bad_images" in said
    (own.images / "img_011.jpg").unlink()
    said = refused("--freeze_clip", "--skip_bad_images", data=own)
    assert all(words in said for words in ("2 of 36", "5%", "img_007.jpg (CSV row 9:",
                                           "img_011.jpg (CSV row 13:"))


DAMAGES = {
    "cut": lambda old: old[:len(old) // 2], "empty": lambda old: b"",
    "flip": lambda old: bytes(byte ^ (i == len(old) // 2) for i, byte in enumerate(old))}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("names", [("last", "best"), ("best", "last")])
def test_a_damaged_checkpoint_is_named_and_the_other_offered(trained, refused, data, damage, names):
    """The error names the damaged one, and the one beside it if that is another and works."""
    folder, (name, other) = trained("--freeze_clip"), map("baseline_{}.pt".format, names)
    shutil.move(shutil.copy(folder / other, folder / "copy"), folder / other)  # no longer one file
    (folder / name).write_bytes(DAMAGES[damage]((folder / name).read_bytes()))
    for use in (["--resume_from", folder / name],
                ["--predict", folder, "--checkpoint", folder / name]):
        said = refused(*use)
        assert f"{folder / name} cannot be used" in said and str(folder / other) in said
    baseline.main(["--predict", str(data.images), "--checkpoint", str(folder / other),
                   "--predictions_csv", str(folder / "scores.csv"), "--num_workers", "0"])
    assert len(read_csv(folder / "scores.csv")) == 36
    (folder / other).unlink()
    assert str(folder / other) not in refused("--resume_from", folder / name)
    os.link(folder / name, folder / other)  # as it is where the last epoch is the best
    assert str(folder / other) not in refused("--resume_from", folder / name)


def test_what_is_no_checkpoint_of_this_model_says_so(once, refused, data, tmp_path):
    """No file, another program, version, CLIP or head: each is named, and nothing is scored."""
    whole, path = load(once("--freeze_clip")), tmp_path / "other.pt"
    state, clip = whole["state"], {**whole["identity"], "weights": "0" * 64}
    fewer = {k: v for k, v in state.items() if "base" not in k}
    wider = {k: torch.zeros(3, *v.shape) for k, v in state.items()}
    foreign, scores = "another program): give a baseline_last.pt", tmp_path / "scores.csv"
    for content, words in (
            (None, "No such file or directory"), ([1, 2], foreign),
            ({"state_dict": {}}, foreign), (whole | {"format": "timm"}, foreign),
            (whole | {"version": 3}, "version 3"), (whole | {"version": None}, "version None"),
            (whole | {"state": fewer}, "another model"),
            (whole | {"state": wider}, "another model"),
            (whole | {"identity": clip}, "trained from other")):
        if content is not None:
            torch.save(content, path)
        for use in (["--resume_from", path], ["--predict", data.csv, "--checkpoint", path,
                                              "--predictions_csv", scores]):
            said = refused(*use)
            assert words in said and str(path) in said and not scores.exists()


class Bomb:
    """A pickle of this makes a file when it is loaded carelessly."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("how", ["pickle", "torch", "legacy torch"])
@pytest.mark.parametrize("where", ["--resume_from", "--checkpoint", "--pretrained",
                                   "model.pth", "open_clip_pytorch_model.bin"])
def test_code_in_a_file_is_refused_and_does_not_run(refused, tmp_path, data, where, how):
    """A pickle that would run code is refused wherever a file or folder is given, by its path."""
    target, clip, path = tmp_path / "exploded", "vit", tmp_path / "evil.pt"
    more = [where, path] + ["--predict", data.csv] * (where == "--checkpoint")
    if where == "--pretrained":
        more += ["--clip_model", "ViT-S-32-alt"]  # a model that open_clip itself knows
    elif where.startswith(("model", "open")):
        clip, more = write_clip(tmp_path / "clip", pretrained=False), []
        path = clip / where
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb(target)))
    else:
        torch.save({"format": baseline.FORMAT, "state_dict": Bomb(target)}, path,
                   _use_new_zipfile_serialization=how == "torch")
    assert str(path if more else clip) in refused("--freeze_clip", *more, clip=clip)
    assert not target.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert target.exists()  # the bomb was live


@pytest.mark.parametrize("damage", ["bomb", "fewer rows", "cut", "empty"])
@pytest.mark.parametrize("mode", [PARTIAL, []], ids=["partial", "full"])
def test_a_damaged_cache_is_computed_again(once, train, tmp_path, damage, mode):
    """A planted, cut or shorter cache file is never used, but written anew."""
    whole, cache = once(*mode), shutil.copytree(once(*mode) / "cache", tmp_path / "cache")
    files = content(cache)
    for name, right in files.items():
        if damage in DAMAGES:
            (cache / name).write_bytes(DAMAGES[damage](right))
        else:
            rows = np.load(cache / name)
            np.save(cache / name, rows[:-1] if damage == "fewer rows" else np.array(
                [Bomb(tmp_path / "exploded")] * len(rows), dtype=object))
    assert files and all(content(cache)[name] != right for name, right in files.items())
    again = train(*mode, "--cache_dir", cache)
    assert same_tensors(load(whole)["state"], load(again.folder)["state"])
    assert content(cache) == files and not (tmp_path / "exploded").exists()


@pytest.fixture
def poison(monkeypatch):
    """Return a function that spoils the losses of some batches, counted from 1."""
    def make(batches, value=math.inf):
        real, calls = baseline.losses, itertools.count(1)

        def spoiled(out, batch):
            factor = value if next(calls) in batches else 1
            return {name: each * factor for name, each in real(out, batch).items()}
        monkeypatch.setattr(baseline, "losses", spoiled)
    return make


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_an_overflow_in_fp16_is_skipped(train, poison, monkeypatch, where):
    """An update whose loss or gradient overflows changes no weight, and the run goes on."""
    if where == "loss":
        poison({3})
    else:  # until the scaler has found a smaller factor
        real = torch.amp.GradScaler
        monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: real(
            device, enabled=enabled, init_scale=2.0 ** 28))
    run = train(*PARTIAL, "--precision", "fp16", "--lr", 1e-4, "--max_grad_norm", 0)
    last, log = load(run.folder), read_csv(run.folder / "training_log.csv")
    assert all(torch.isfinite(value).all() for value in last["state"].values())
    (steps,) = {int(s["step"]) for s in last["optimizer"]["state"].values()}
    assert steps == 7 if where == "loss" else 0 < steps < 8  # of 8
    assert [math.isfinite(float(row["train_loss"])) for row in log] == [where != "loss", True]


@pytest.mark.parametrize("more, batches, value", [
    ([*PARTIAL, "--precision", "fp16"], range(5, 99), math.inf),
    ([*PARTIAL, "--precision", "fp16"], range(5, 99), math.nan), (PARTIAL, [6], math.nan),
    (["--freeze_clip", "--lr", 1e30], [], 1), (["--batch_size", 64, "--lr", 1e30], [], 1)])
def test_training_that_goes_wrong_ends_with_good_checkpoints(refused, poison, tmp_path, more,
                                                            batches, value):
    """Losses that stay non-finite, or a rate that explodes: images and remedies are named."""
    poison(batches, value)
    said = refused("--lr", 1e-4, "--epochs", 9, *more)
    assert all(words in said for words in ("finite", "img_", "last good checkpoint", "--lr"))
    for name in ("baseline_last.pt", "baseline_best.pt"):
        saved = load(tmp_path / "out", name)
        assert all(torch.isfinite(v).all() for v in saved["state"].values())
        progress = saved["progress"]
        assert progress["best_score"] > -1
        assert not batches or progress["epoch"] == 1 or (name, progress["epoch"]) == (
            "baseline_best.pt", 0)
