"""The cache makes runs faster and changes nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load, read_csv, read_json, same_tensors, write_csv
from safetensors.torch import load_file, save_file

import baseline

ROOT = Path(baseline.__file__).parent
PARTIAL = ["--partial_freeze", "--freeze_layers", 2]
MODES = {"frozen": ["--freeze_clip"], "partial": PARTIAL, "full": []}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


@pytest.fixture
def numbers(train, monkeypatch, tmp_path):
    """Train with a shared cache; returns the log's losses and the validation predictions."""
    def run(*more, out, **options):
        kept, write = [], baseline.write_predictions

        def keep(run, part, pred):
            kept.append(pred)
            write(run, part, pred)
        with monkeypatch.context() as patch:
            patch.setattr(baseline, "write_predictions", keep)
            done = train("--lr", 1e-3, "--cache_dir", tmp_path / "cache", *more, out=out,
                         **options)
        log = read_csv(done.folder / "training_log.csv")
        losses = [[float(row[k]) for k in row if "loss" in k] for row in log]
        return SimpleNamespace(losses=np.array(losses), pred=kept[0], folder=done.folder)
    return run


def assert_equal(a, b, atol=1e-5):
    """Compare the losses and predictions of two runs."""
    assert np.allclose(a.losses, b.losses, atol=atol, rtol=0)
    assert a.losses.shape == b.losses.shape and np.ptp(a.losses) > 0
    for name in ("q", "c", "q_base", "c_base"):
        assert np.allclose(a.pred[name], b.pred[name], atol=atol, rtol=0), name


def cache_files(tmp_path, kind=""):
    """Return the names of the cache's files of one kind."""
    return sorted(p.name for p in (tmp_path / "cache").glob(f"{kind}*.npy"))


@pytest.fixture
def no_decoding(monkeypatch):
    """Return a function that makes every later decoding of an image fail."""
    def refuse(self, index):
        raise AssertionError("an image was decoded although it is cached")
    return lambda: monkeypatch.setattr(baseline.ImageBatches, "view", refuse)


# --- the same numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
@modes
def test_cached_runs_equal_uncached_ones(numbers, tmp_path, mode, augment):
    """With the cache, losses and predictions are those of --cache off."""
    off = numbers(*mode, "--augment", augment, "--cache", "off", out="off")
    assert not (tmp_path / "cache").exists()
    on = numbers(*mode, "--augment", augment, out="on")
    assert_equal(on, off)
    kind = "pixels" if augment == "crop" or not mode else "image"
    assert len(cache_files(tmp_path, kind)) == 1


@pytest.mark.parametrize("clip", ["avg", "bidirectional", "conv", "resnet", "timm_vit"])
def test_cached_runs_of_other_towers_equal_uncached_ones(numbers, clip):
    """The boundary is cached rightly whatever the tower.

    The step is small, because BatchNorm over a batch of 8 amplifies the float noise of a
    convolution that ran with another batch size.
    """
    flags = [*PARTIAL, "--lr", 1e-4, "--epochs", 1]
    off = numbers(*flags, "--cache", "off", out="off", clip=clip)
    assert_equal(numbers(*flags, out="on", clip=clip), off)


@pytest.mark.parametrize("frozen", [0, 4])
def test_the_outermost_boundaries_equal_too(numbers, frozen):
    """Only the embeddings frozen, or all blocks: the cache changes nothing."""
    flags = ["--partial_freeze", "--freeze_layers", frozen, "--epochs", 1]
    off = numbers(*flags, "--cache", "off", out="off")
    assert_equal(numbers(*flags, out="on"), off)


def test_a_cpu_reads_the_cache_where_it_lies(tmp_path):
    """Rows are neither copied to the memory of the process nor changed, half precision included."""
    path, content = tmp_path / "x.npy", torch.randn(6, 2, 5).bfloat16()
    np.save(path, content.view(torch.int16).numpy())
    array = np.load(path, mmap_mode="r")
    cached = baseline.CachedRows(array, torch.device("cpu"))
    assert cached.rows.data_ptr() == array.ctypes.data
    rows, views = np.array([4, 0, 5]), np.array([1, 0, 1])
    assert torch.equal(cached.fetch(rows, views), content[rows, views])
    assert torch.equal(cached.fetch(rows), content[rows])


def test_reading_ahead_keeps_the_order_and_its_bound():
    """What is read in a thread comes in order, at most `depth` ahead, its errors included."""
    begun, read = [], baseline.prefetch(lambda i: begun.append(i) or 6 // i, [3, 2, 1, 0, 5], 2)
    assert [next(read), next(read)] == [2, 3]
    assert len(begun) <= 4 and next(read) == 6
    with pytest.raises(ZeroDivisionError):
        next(read)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_goes_to_a_gpu_is_read_as_for_a_cpu(device):
    """Read ahead in a thread, for a GPU, or not: the rows are the same, in the same order."""
    cached = baseline.CachedRows(np.arange(24.0).reshape(6, 2, 2), torch.device("cpu"))
    inputs = SimpleNamespace(device=torch.device(device), args=SimpleNamespace(pin_memory=False))
    batches = [(np.array(rows), np.array(views)) for rows, views in
               (([5, 0], [1, 0]), ([3, 3], [0, 1]), ([2], [1]), ([1, 4], [0, 0]))]
    got = list(baseline.ImageInputs.read(inputs, cached, batches))
    assert len(got) == 4
    assert all(torch.equal(x, cached.rows[rows, views]) for x, (rows, views) in zip(got, batches))


# --- what is read and what is computed again ------------------------------------------------


@pytest.mark.parametrize("augment", ["flip", "crop"])
@modes
def test_a_second_run_reads_the_cache(numbers, no_decoding, tmp_path, mode, augment):
    """A warm run decodes no image, writes no file and gives the same bits."""
    flags = [*mode, "--augment", augment, "--epochs", 1]
    cold, files = numbers(*flags, out="cold"), cache_files(tmp_path)
    no_decoding()
    warm = numbers(*flags, out="warm")
    assert cache_files(tmp_path) == files and files
    assert same_tensors(load(cold.folder)["state"], load(warm.folder)["state"])


def test_another_run_on_the_same_features_reads_the_cache(numbers, no_decoding):
    """Other heads, seeds and learning rates need nothing new from the frozen CLIP."""
    numbers("--freeze_clip", "--epochs", 1, out="one")
    no_decoding()
    numbers("--freeze_clip", "--epochs", 1, "--seed", 3, "--use_refinement", "--lr", 1e-2,
            "--batch_size", 4, out="two")


@pytest.fixture
def own(data, clips, tmp_path):
    """A copy of data and CLIP that a test may change."""
    shutil.copytree(data.images, tmp_path / "own")
    shutil.copytree(clips(), tmp_path / "clip")
    rows = [dict(row) for row in data.rows]
    return SimpleNamespace(csv=write_csv(tmp_path / "own.csv", rows), rows=rows,
                           images=tmp_path / "own", clip=tmp_path / "clip")


def change_image(own):
    """Replace a picture by a mirrored negative of itself; size and time may or may not change."""
    for row in own.rows[:12]:
        path = own.images / row["name"]
        pixels = 255 - np.asarray(baseline.load_image(path))
        baseline.Image.fromarray(pixels).save(path)


def change_image_only_in_time(own):
    """Replace pictures by others of exactly as many bytes."""
    for row in own.rows[:12]:
        path = (own.images / row["name"]).with_suffix(".bmp")
        image = baseline.load_image(own.images / row["name"])
        image.save(path)
        size = path.stat().st_size
        (own.images / row["name"]).unlink()
        path.rename(own.images / row["name"])
        assert path.with_name(row["name"]).stat().st_size == size


def change_weights(own):
    """Change the CLIP's weights in place."""
    path = own.clip / "open_clip_model.safetensors"
    save_file({k: v * 1.3 for k, v in load_file(path).items()}, path)


def change_prompt(own):
    """Change some prompts."""
    for row in own.rows[4:12]:
        row["prompt"] = "something else " + row["prompt"]
    write_csv(own.csv, own.rows)


def reorder(own):
    """Give two pictures each other's content."""
    a, b = (own.images / own.rows[i]["name"] for i in (0, 8))
    content = a.read_bytes(), b.read_bytes()
    a.write_bytes(content[1]), b.write_bytes(content[0])


@pytest.mark.parametrize("change", [change_image, change_weights, change_prompt, reorder])
@pytest.mark.parametrize("mode", ["frozen", "partial"])
def test_what_changed_is_computed_again(numbers, own, mode, change):
    """After a change of images, weights or prompts, the cache gives what --cache off gives."""
    flags = [*MODES[mode], "--epochs", 1]
    before = numbers(*flags, out="before", data=own, clip=own.clip)
    change(own)
    after = numbers(*flags, out="after", data=own, clip=own.clip)
    off = numbers(*flags, "--cache", "off", out="off", data=own, clip=own.clip)
    assert_equal(after, off)
    assert not np.allclose(before.losses, after.losses, atol=1e-5, rtol=0)


def test_a_new_picture_of_the_same_size_is_seen_by_its_time(numbers, own):
    """A picture that was replaced by one with as many bytes is decoded again."""
    change_image_only_in_time(own)
    before = numbers("--freeze_clip", "--epochs", 1, out="before", data=own)
    for row in own.rows[:12]:
        path = own.images / row["name"]
        size = path.stat().st_size
        pixels = 255 - np.asarray(baseline.load_image(path))
        baseline.Image.fromarray(pixels).save(path, format="BMP")
        assert path.stat().st_size == size
    after = numbers("--freeze_clip", "--epochs", 1, out="after", data=own)
    off = numbers("--freeze_clip", "--epochs", 1, "--cache", "off", out="off", data=own)
    assert_equal(after, off)
    assert not np.allclose(before.losses, after.losses, atol=1e-5, rtol=0)


@pytest.mark.parametrize("first, second", [
    ([*PARTIAL], ["--partial_freeze", "--freeze_layers", 3]), ([*PARTIAL], ["--freeze_clip"]),
    (["--freeze_clip"], ["--freeze_clip", "--quick_gelu"]),
    (["--freeze_clip"], ["--freeze_clip", "--resize_mode", "squash"]),
    ([], ["--resize_mode", "squash"]),
    (["--freeze_clip", "--augment", "none"], ["--freeze_clip", "--augment", "flip"]),
    (["--freeze_clip"], ["--freeze_clip", "--precision", "bf16"])])
def test_settings_share_no_wrong_features(numbers, first, second):
    """A run after one with other settings in the same cache gives what --cache off gives."""
    numbers(*first, "--epochs", 1, out="first")
    on = numbers(*second, "--epochs", 1, out="on")
    assert_equal(on, numbers(*second, "--epochs", 1, "--cache", "off", out="off"),
                 1e-2 if "bf16" in second else 1e-5)


# --- limits and damage ----------------------------------------------------------------------


@modes
def test_over_the_limit_goes_on_without(numbers, tmp_path, capsys, mode):
    """A cache that would be too large is not written; that is said, and nothing else changes."""
    off = numbers(*mode, "--epochs", 1, "--cache", "off", out="off")
    capsys.readouterr()
    on = numbers(*mode, "--epochs", 1, "--cache_max_gb", 1e-9, out="on")
    said = capsys.readouterr().out
    assert "going on without" in said and "--cache_max_gb" in said
    assert_equal(on, off)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_written_goes_on_without(numbers, tmp_path, capsys):
    """A cache folder that is a file is no reason to stop."""
    off = numbers("--freeze_clip", "--epochs", 1, "--cache", "off", out="off")
    (tmp_path / "cache").write_text("in the way")
    assert_equal(numbers("--freeze_clip", "--epochs", 1, out="on"), off)
    assert "going on without" in capsys.readouterr().out
    assert (tmp_path / "cache").read_text() == "in the way"


def test_a_truncated_temporary_file_is_not_used(numbers, tmp_path):
    """What a killed run left half-written is neither read nor in the way."""
    cold = numbers(*PARTIAL, "--epochs", 1, out="cold")
    for name in cache_files(tmp_path):
        path = tmp_path / "cache" / name
        for pid in (os.getpid(), 1):
            half = path.with_name(f".{name}.{pid}")
            half.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
        path.unlink()
    again = numbers(*PARTIAL, "--epochs", 1, out="again")
    assert same_tensors(load(cold.folder)["state"], load(again.folder)["state"])
    assert cache_files(tmp_path)


def test_a_run_killed_while_caching_leaves_no_wrong_cache(numbers, monkeypatch, tmp_path, flags):
    """A cache is complete or not there, whenever the run that writes it dies."""
    class Killed(BaseException):
        pass

    boundary, calls = baseline.ImageInputs.boundary, []

    def die(self, images):
        calls.append(1)
        if len(calls) == 4:  # within the second of two batches, each with two views
            raise Killed
        return boundary(self, images)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(baseline.ImageInputs, "boundary", die)
        numbers("--freeze_clip", out="killed")
    assert cache_files(tmp_path, "image") == []
    off = numbers("--freeze_clip", "--cache", "off", out="off")
    assert_equal(numbers("--freeze_clip", out="on"), off)


def test_two_processes_may_build_the_same_cache_at_once(flags, tmp_path):
    """Two runs that start together both end well, with the same result."""
    commands = [[sys.executable, "-W", "ignore", str(ROOT / "baseline.py"),
                 *flags(*PARTIAL, "--epochs", 1, "--cache_dir", tmp_path / "cache", out=out)]
                for out in ("a", "b")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for command in commands]
    for process in running:
        errors = process.communicate(timeout=240)[1]
        assert process.returncode == 0, errors.decode()
    a, b = (read_json(tmp_path / out / "result.json") for out in ("a", "b"))
    assert a["val"] == b["val"]
    assert not list((tmp_path / "cache").glob(".*"))


def limits(tmp_path, size):
    """Return the arguments that cached_array needs, with a limit in bytes."""
    return SimpleNamespace(cache_dir=str(tmp_path / "cache"), cache_max_gb=size / 1e9)


def test_the_least_recently_used_goes_first(tmp_path):
    """Where room is needed, the file that was not used for longest is deleted."""
    args = limits(tmp_path, 2500)

    def get(name):
        value = float(ord(name[0]))
        array = baseline.cached_array(args, name, "key", 250,
                                      lambda: iter([torch.full((250, 1), value)]))
        assert array.shape == (250, 1) and (np.array(array) == value).all()
    for number, name in enumerate(["a", "b"]):
        get(name)
        os.utime(tmp_path / "cache" / f"{name}-key.npy", (number, number))
    get("a")  # a hit makes it recent
    get("c")
    assert cache_files(tmp_path) == ["a-key.npy", "c-key.npy"]


def test_nothing_is_deleted_for_what_would_never_fit(tmp_path):
    """A file larger than the whole limit does not empty the cache."""
    args = limits(tmp_path, 2500)
    baseline.cached_array(args, "a", "key", 250, lambda: iter([torch.zeros(250, 1)]))
    assert baseline.cached_array(args, "b", "key", 900, lambda: iter([torch.zeros(900, 1)])) is None
    assert cache_files(tmp_path) == ["a-key.npy"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(tmp_path, bad):
    """Features with NaN or infinity are an error with a remedy and are never kept."""
    chunks = [torch.zeros(2, 3), torch.tensor([[0, bad, 0]])]
    with pytest.raises(baseline.UserError, match="--precision"):
        baseline.cached_array(limits(tmp_path, 1e9), "image", "key", 3, lambda: iter(chunks))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_clip_that_gives_no_numbers_is_refused(refused, own, cache):
    """Weights that lead to NaN end the run with one sentence."""
    path = own.clip / "open_clip_model.safetensors"
    state = load_file(path)
    state["visual.proj"] = state["visual.proj"] * torch.inf
    save_file(state, path)
    assert "finite" in refused("--freeze_clip", "--cache", cache, clip=own.clip)
