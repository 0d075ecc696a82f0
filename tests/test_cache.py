"""The cache makes runs faster and changes nothing else."""

import os
import re
import resource
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import VARIANTS, load, same_tensors, write_csv
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import baseline

PARTIAL = ["--partial_freeze", "--freeze_layers", 2]
MODES = {"frozen": ["--freeze_clip"], "partial": PARTIAL, "full": []}
KINDS = {"frozen": {"image", "text", "text-embedding"},
         "partial": {"image", "image-embedding", "text", "text-embedding"},
         "full": {"image-embedding", "pixels", "text-embedding"}}
SCORES = ["quality", "consistency", "quality_base", "consistency_base"]
modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def numbers(train, tmp_path):
    """Train one epoch with a shared cache; returns losses, validation predictions and folder."""
    def run(*more, out, **options):
        folder = train("--epochs", 1, "--lr", 1e-3, "--cache_dir", tmp_path / "cache", *more,
                       out=out, **options).folder
        losses = pd.read_csv(folder / "training_log.csv").filter(like="loss").to_numpy()
        pred = pd.read_csv(folder / "val_predictions.csv")[SCORES].to_numpy()
        return SimpleNamespace(folder=folder, losses=losses, pred=pred)
    return run


def same(a, b, atol=1e-5):
    """Return whether two runs have the same losses and predictions (0 to 5, with 4 decimals)."""
    assert np.ptp(a.losses) > 0 and np.ptp(a.pred[:, 0]) > 0
    return (np.allclose(a.losses, b.losses, atol=atol, rtol=0)
            and np.allclose(a.pred, b.pred, atol=5 * atol + 1.01e-4, rtol=0))


def kinds(tmp_path):
    """Return the kinds of the complete files in the cache."""
    return {path.stem.rsplit("-", 1)[0] for path in (tmp_path / "cache").glob("[!.]*.npy")}


@pytest.mark.parametrize("clip, more", [
    *(("vit", [*mode, "--augment", augment, "--lr", 1e-3]) for mode in MODES.values()
      for augment in ("none", "flip", "crop")),
    *((clip, PARTIAL) for clip in VARIANTS if clip != "vit"), ("conv", MODES["frozen"]),
    ("resnet", []), *(("vit", ["--partial_freeze", "--freeze_layers", n]) for n in (1, 4))])
def test_cached_runs_equal_uncached_ones(numbers, tmp_path, clip, more):
    """With the cache, losses and predictions are those of --cache off, whatever the tower.

    The step is small: BatchNorm amplifies the float noise of a convolution at another batch size.
    """
    off = numbers("--lr", 1e-5, *more, "--cache", "off", out="off", clip=clip)
    assert not (tmp_path / "cache").exists()
    assert same(numbers("--lr", 1e-5, *more, out="on", clip=clip), off)


def test_threads_decode_in_order_and_take_turns_with_a_cpu(train, monkeypatch):
    """However long an image takes, two threads give what none gives; a CPU's arithmetic is alone.

    They decode two batches, rest while these two are trained on, and decode the next two.
    """
    more = ["--cache", "off", "--batch_size", 4, "--epochs", 1]
    alone = train(*more, out="alone")
    begun, seen, load_image, update = [], [], baseline.load_image, baseline.update

    def slow(path):
        begun.append(path)
        time.sleep(0.002 * (len(begun) // 4 % 2))  # every second batch is overtaken
        return load_image(path)

    def look(run, factor):
        time.sleep(0.1)
        seen.append(len(begun) - 36)  # all were embedded
        update(run, factor)
    monkeypatch.setattr(baseline, "load_image", slow)
    monkeypatch.setattr(baseline, "update", look)
    two = train(*more, "--num_workers", 2, out="two")
    assert same_tensors(load(alone.folder)["state"], load(two.folder)["state"])
    assert seen == [8, 8, 16, 16, 24, 24, 28]


def test_threads_work_some_items_ahead_of_a_gpu():
    """In order, however long each takes, by one item more than there are threads."""
    begun, seen = [], []

    def slow(item):
        begun.append(item)
        time.sleep(0.01 * (item % 2))
        return item

    for item in baseline.ahead(slow, range(8), 2):
        time.sleep(0.1)
        seen.append((item, len(begun)))
    assert [item for item, _ in seen] == [*range(8)] and seen[0][1] > 1
    assert all(count <= item + 4 for item, count in seen)


def test_an_error_in_a_thread_ends_the_run(train, monkeypatch):
    """What goes wrong in a thread is raised where its images are used, and no thread stays."""
    monkeypatch.setattr(baseline, "load_image", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("--cache", "off", "--num_workers", 2)
    assert not [thread for thread in threading.enumerate() if "Pool" in thread.name]


@pytest.mark.parametrize("augment", ["flip", "crop"])
@modes
def test_a_second_run_reads_the_cache(numbers, monkeypatch, tmp_path, mode, augment):
    """A warm run decodes no image, writes no file and gives the same bits; so does another head."""
    more = [*MODES[mode], "--augment", augment]
    cold = numbers(*more, out="cold")
    files = {path: path.stat().st_ino for path in (tmp_path / "cache").iterdir()}
    assert augment == "crop" or kinds(tmp_path) == KINDS[mode]
    monkeypatch.setattr(baseline, "load_image", None)  # to decode one would fail
    warm = numbers(*more, out="warm")
    assert same_tensors(load(cold.folder)["state"], load(warm.folder)["state"])
    numbers(*more, "--seed", 3, "--use_refinement", "--batch_size", 4, out="other")
    assert {path: path.stat().st_ino for path in (tmp_path / "cache").iterdir()} == files


@pytest.fixture
def own(data, clips, tmp_path):
    """A copy of the data, its images all of one size in bytes, and of a CLIP, to be changed."""
    images = shutil.copytree(data.images, tmp_path / "own")
    for path in images.iterdir():
        Image.open(path).save(path, format="BMP")
    rows = [dict(row) for row in data.rows]
    return SimpleNamespace(csv=write_csv(tmp_path / "own.csv", rows), rows=rows, images=images,
                           clip=shutil.copytree(clips(), tmp_path / "clip"))


def change(own, what):
    """Change the weights, some prompts, or some pictures, of which only time or size tells."""
    if what == "weights":
        path = own.clip / "open_clip_model.safetensors"
        save_file({k: v * 1.3 for k, v in load_file(path).items()}, path)
    for row in own.rows[4:16]:
        path = own.images / row["name"]
        before = path.stat()
        if what == "prompts":
            row["prompt"] = "something else " + row["prompt"]
        elif what in ("time", "size"):
            ImageOps.flip(Image.open(path)).save(path, format="BMP" if what == "time" else "PNG")
            assert (path.stat().st_size == before.st_size) == (what == "time")
        if what == "size":
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    write_csv(own.csv, own.rows)


@pytest.mark.parametrize("mode, what", [
    *(("partial", what) for what in ("time", "size", "weights", "prompts")), ("frozen", "time"),
    ("frozen", "weights"), ("full", "time"), ("full", "weights")])
def test_what_changed_is_computed_again(numbers, own, mode, what):
    """After a change of images, weights or prompts, the cache gives what --cache off gives."""
    before = numbers(*MODES[mode], out="before", data=own, clip=own.clip)
    change(own, what)
    after = numbers(*MODES[mode], out="after", data=own, clip=own.clip)
    off = numbers(*MODES[mode], "--cache", "off", out="off", data=own, clip=own.clip)
    assert same(after, off) and not same(before, after)


@pytest.mark.parametrize("first, second", [
    (PARTIAL, ["--partial_freeze", "--freeze_layers", 3]), (PARTIAL, ["--freeze_clip"]),
    (["--freeze_clip"], ["--freeze_clip", "--quick_gelu"]),
    (["--freeze_clip"], ["--freeze_clip", "--resize_mode", "squash"]),
    ([], ["--resize_mode", "squash"]),
    (["--freeze_clip", "--augment", "none"], ["--freeze_clip", "--augment", "flip"]),
    (["--freeze_clip"], ["--freeze_clip", "--precision", "bf16"])])
def test_settings_share_no_wrong_features(numbers, first, second):
    """A run after one with other settings in the same cache gives what --cache off gives."""
    numbers(*first, out="first")
    on, off = numbers(*second, out="on"), numbers(*second, "--cache", "off", out="off")
    assert same(on, off, 1e-2 if "bf16" in second else 1e-5)


@pytest.mark.parametrize("clip", VARIANTS)
def test_a_deeper_boundary_starts_from_a_cached_one(numbers, monkeypatch, tmp_path, clip):
    """Freezing more blocks runs only these, on no image, and gives the same bits."""
    deeper = ["--partial_freeze", "--freeze_layers", 2]
    alone = numbers(*deeper, "--cache_dir", tmp_path / "alone", out="alone", clip=clip)
    numbers(*deeper, "--freeze_layers", 1, out="first", clip=clip)
    monkeypatch.setattr(baseline, "load_image", None)  # to decode one would fail
    assert same(numbers(*deeper, out="after", clip=clip), alone)
    files = [*(tmp_path / "alone").glob("image-*.npy")]
    assert len(files) == 2  # the boundary, and the embeddings before training
    for path in files:
        assert path.read_bytes() == (tmp_path / "cache" / path.name).read_bytes()


@modes
def test_over_the_limit_goes_on_without(numbers, tmp_path, capsys, mode):
    """A cache that would be too large is left out in one line, and nothing else changes."""
    off = numbers(*MODES[mode], "--cache", "off", out="off")
    capsys.readouterr()
    assert same(numbers(*MODES[mode], "--cache_max_gb", 1e-9, out="on"), off)
    said = re.findall("going on without the (.+) cache, .* --cache_max_gb", capsys.readouterr().out)
    said.remove("text-embedding")  # that of the prompts, and that of the zero-shot quality's words
    assert sorted(said) == sorted(KINDS["full"] | KINDS[mode])
    assert list((tmp_path / "cache").iterdir()) == []


@modes
def test_a_full_disk_while_caching_is_one_error(refused, train, monkeypatch, tmp_path, mode):
    """No room for a cache file: one sentence names --cache off, with which the run goes well."""
    real, limit = baseline.cached, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            return real(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    monkeypatch.setattr(baseline, "cached", full)
    said = refused(*MODES[mode])
    assert "File too large" in said and "--cache off" in said and said.count("error:") == 1
    assert not list((tmp_path / "out" / "cache").glob(".*"))
    train(*MODES[mode], "--cache", "off")
    (tmp_path / "file").write_text("in the way")
    said = refused(*MODES[mode], "--cache_dir", tmp_path / "file" / "cache", out="other")
    assert str(tmp_path / "file") in said and "--cache off" in said


def test_a_run_killed_while_caching_leaves_no_wrong_cache(numbers, start, flags, tmp_path):
    """What a killed run left half-written is neither read nor in the way."""
    cache = tmp_path / "cache"
    killed = start(flags("--freeze_clip", "--cache_dir", cache, out="killed"), "strike_cache", 9, 2)
    assert killed.finish() == -9 and "image" not in kinds(tmp_path)
    assert len(list(cache.glob(".image-*"))) == 1
    off = numbers("--freeze_clip", "--cache", "off", out="off")
    assert same(numbers("--freeze_clip", out="on"), off) and kinds(tmp_path) == KINDS["frozen"]


def test_two_processes_may_build_the_same_cache_at_once(start, flags, tmp_path):
    """Two runs that start together both end well, with the same result."""
    runs = [start(flags(*PARTIAL, "--cache_dir", tmp_path / "cache", out=out)) for out in "ab"]
    assert [run.finish() for run in runs] == [0, 0] and kinds(tmp_path) == KINDS["partial"]
    assert same_tensors(load(tmp_path / "a")["state"], load(tmp_path / "b")["state"])
    assert not list((tmp_path / "cache").glob(".*"))


def test_the_least_recently_used_goes_first(flags, tmp_path, capsys):
    """Where room is needed, what was not used for longest goes, a killed run's file included."""
    cache, half = tmp_path / "cache", tmp_path / "cache" / ".a-1.npy.1"
    args = baseline.parse_args(flags("--cache_dir", cache, "--cache_max_gb", 2.5e-6))

    def get(kind, count=250):
        return baseline.cached(args, kind, {"of": kind}, [np.arange(2), np.arange(2, count)],
                               lambda own: (torch.full((len(rows), 1), 1.5) for rows in own))
    for number, kind in enumerate("ab"):
        assert get(kind).tolist() == [[1.5]] * 250 and not half.exists()
        (path,) = cache.glob(f"{kind}-*.npy")
        os.utime(path, (number, number))
        half.write_bytes(bytes(1000 * (kind == "a")))
        os.utime(half, (-1, -1))
    get("a")  # a hit makes it recent
    get("c")
    assert kinds(tmp_path) == {"a", "c"} and "removed b-" in capsys.readouterr().out
    assert get("d", 900) is None  # more than the whole limit
    assert kinds(tmp_path) == {"a", "c"} and "without the d cache" in capsys.readouterr().out


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_clip_that_gives_no_numbers_is_refused(refused, own, tmp_path, cache):
    """Weights that lead to NaN end the run with one sentence, and nothing of it is kept."""
    path = own.clip / "open_clip_model.safetensors"
    state = load_file(path)
    save_file(state | {"visual.proj": state["visual.proj"] * torch.inf}, path)
    said = refused("--freeze_clip", "--cache", cache, clip=own.clip)
    assert "finite" in said and "--precision" in said
    assert not list((tmp_path / "out").glob("cache/*image*"))
