"""The scorer in Python, its exported folder and the command line give the same scores anywhere."""

import logging
import random
import resource
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import decoded, load, same_tensors, write_clip
from PIL import Image
from safetensors.torch import load_file
from test_scoring import HEADS, SCORES, train_once

import baseline

WITHIN = 5e-5  # 1e-5 on the [0, 1] scale, of a label scale of 5


@pytest.fixture(scope="module")
def own(data, clips, tmp_path_factory):
    """Return by the name of some heads: (checkpoint, the folder of its CLIP), made on first use."""
    root, made = tmp_path_factory.mktemp("own"), {}

    def get(heads="partial"):
        if heads not in made:
            clip = shutil.copytree(clips(), root / f"clip-{heads}")
            made[heads] = train_once(data, clip, root / heads, *HEADS[heads]), clip
        return made[heads][0] / "baseline_best.pt", made[heads][1]
    return get


@pytest.fixture
def moved(own, tmp_path):
    """Return a checkpoint whose CLIP lies elsewhere now, and where."""
    checkpoint, clip = own()
    clip.rename(tmp_path / "elsewhere")
    yield checkpoint, tmp_path / "elsewhere"
    (tmp_path / "elsewhere").rename(clip)


def predict(data, tmp_path, checkpoint, *more):
    """Score the data by the command line; returns the written scores."""
    out = tmp_path / "scores.csv"
    baseline.main(["--predict", str(data.csv), "--image_base_dir", str(data.images), "--checkpoint",
                   str(checkpoint), "--predictions_csv", str(out), "--overwrite",
                   *map(str, more)])
    return pd.read_csv(out)[SCORES]


def refused(capsys, *command):
    """Run a command that must end with status 2; returns what it said."""
    with pytest.raises(SystemExit) as stop:
        baseline.main([*map(str, command)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def assert_same(got, want, within=WITHIN):
    """Compare scores, row by row."""
    np.testing.assert_allclose(got[SCORES].to_numpy(float), want[SCORES].to_numpy(float), rtol=0,
                               atol=within)


@pytest.mark.parametrize("heads", ["frozen", "partial", "full", "refinement", "quick"])
def test_python_export_and_command_line_agree(own, data, tmp_path, monkeypatch, heads):
    """Files, pictures and arrays, in any order and batch; the folder needs neither CLIP nor cwd."""
    checkpoint, clip = own(heads)
    want = predict(data, tmp_path, checkpoint)
    paths, prompts = [data.images / row["name"] for row in data.rows], [
        row["prompt"] for row in data.rows]
    kinds = str, Image.open, lambda path: np.asarray(Image.open(path)), lambda path: path
    order = np.random.default_rng(1).permutation(len(paths))
    images = [kinds[i % 4](paths[i]) for i in order]
    baseline.main(["--export", str(tmp_path / "a" / "out"), "--checkpoint", str(checkpoint)])
    clip.rename(clip.with_name("gone"))
    monkeypatch.chdir(tmp_path)
    try:
        folder = (tmp_path / "a" / "out").rename(tmp_path / "moved")
        assert_same(predict(data, tmp_path, folder), want)
        scorer = baseline.load(folder, batch_size=7)
    finally:
        clip.with_name("gone").rename(clip)
    for scorer in (scorer, baseline.load(checkpoint, batch_size=5)):
        table = scorer.score(images, [prompts[i] for i in order])
        assert_same(table.iloc[np.argsort(order)], want)
        assert list(table) == [*SCORES, "error"] and (table["error"] == "").all()
    assert want.std().min() > 0.01


def test_pixels_are_scored_like_files_and_carry_gradients(own, build, data):
    """At the CLIP's size to 1e-5; the gradient is that of finite differences; not clamped."""
    scorer = baseline.load(own()[0])
    pixels = (decoded(build("--cache", "off"), range(6)).float() / 255).requires_grad_()
    rows = sorted(data.rows, key=lambda row: row["name"])[:6]
    prompts = [row["prompt"] for row in rows]
    want = scorer.score([data.images / row["name"] for row in rows], prompts)
    with torch.autocast("cpu", torch.bfloat16):  # of the program around it
        out = scorer(pixels, prompts)
    assert_same(pd.DataFrame({name: value.detach() for name, value in out.items()}), want)
    for name in SCORES:
        grad, = torch.autograd.grad(out[name].sum(), pixels, retain_graph=True)
        assert grad.isfinite().all() and (grad != 0).float().mean() > 0.9
        step = 1e-3 * torch.sign(grad)
        with torch.no_grad():
            low, high = (scorer((pixels + s).clamp(0, 1), prompts)[name].sum()
                         for s in (-step, step))
            moved = (pixels + step).clamp(0, 1) - (pixels - step).clamp(0, 1)
        assert abs((high - low) / (grad * moved).sum() - 1) < 0.05
    scorer.targets = {"q": (0.0, 10.0), "c": (0.0, 100.0)}
    with torch.no_grad():
        scorer.model.quality.base.bias += 9
        scorer.model.quality.delta[3].bias += 9
    far = scorer(pixels, prompts)
    assert (far["quality"] > 10).all() and not scorer.train().model.quality.training
    assert torch.allclose(far["consistency_base"], scorer(pixels, prompts)["consistency_base"])
    assert not any(p.requires_grad or p.grad is not None for p in scorer.parameters())


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(48, 40), (33, 90), (20, 24)])
def test_pixels_of_any_size_are_resized_as_files_are(build, mode, size):
    """Within Pillow's rounding to 8 bits at each of its two passes, padding and crops included."""
    run = build("--resize_mode", mode, "--cache", "off")
    smooth = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(smooth).resize(size, Image.Resampling.BICUBIC)
    decode = baseline.Decoder([picture], run.identity["preprocess"])
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    got, (want, errors) = decode.resize(pixels.requires_grad_()), decode([0])
    assert not errors and got.shape == want.shape == (1, 3, 32, 32) and got.requires_grad
    assert (got * 255 - want).abs().max() < 3


def test_prompts_single_images_and_what_cannot_be_read(own, data, tmp_path):
    """One prompt, one each or none; the reason stands in the row, as the command line has it."""
    scorer, paths = baseline.load(own()[0]), [data.images / row["name"] for row in data.rows[:3]]
    each = scorer.score(paths, ["a cat", None, float("nan")])
    assert each["consistency"].notna().tolist() == [True, False, False]
    assert_same(scorer.score(paths, "a cat")[:1], each[:1])
    assert_same(scorer.score(paths), scorer.score(paths, [" "] * 3))
    assert_same(scorer.score(Image.open(paths[0]), "a cat"), each[:1])
    assert_same(scorer.score(np.asarray(Image.open(paths[0])), "a cat"), each[:1])
    assert list(scorer.score([])) == [*SCORES, "error"]
    turned = Image.open(paths[0]).transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    assert_same(scorer.score([paths[1], turned], "a cat")[1:], each[:1])
    (tmp_path / "bad.png").write_bytes(b"junk")
    bad = scorer.score([tmp_path / "bad.png", paths[0], np.zeros((4, 4, 3))], "a cat")
    assert (bad["error"] != "").tolist() == [True, False, True]
    assert bad[SCORES].isna().all(axis=1).tolist() == [True, False, True]
    pixels = torch.rand(2, 3, 40, 50)
    out = scorer(pixels)
    assert out["consistency"].isnan().all() and out["quality"].isfinite().all()
    for call in (lambda: scorer.score(paths, ["a"]), lambda: scorer(pixels, ["a"] * 3),
                 lambda: scorer(pixels * 255), lambda: scorer(pixels * 2 - 1),
                 lambda: scorer(pixels[0]), lambda: scorer(pixels.permute(0, 2, 3, 1))):
        with pytest.raises(baseline.UserError):
            call()


def test_loading_leaves_the_program_around_it_alone(own, data, capsys):
    """Random states, gradients, signals and logging stay, and nothing is printed."""
    def state():
        return [torch.get_rng_state().tolist(), random.getstate(),
                np.random.get_state()[1].tolist(), torch.is_grad_enabled(),
                torch.get_default_dtype(), logging.root.manager.disable,
                *map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)),
                torch.backends.cuda.flash_sdp_enabled()]
    checkpoint, _ = own()
    capsys.readouterr()
    torch.manual_seed(5)
    logging.disable(logging.DEBUG)
    try:
        before = state()
        baseline.load(checkpoint).score(data.images / data.rows[0]["name"], "a cat")
        assert state() == before
    finally:
        logging.disable(logging.NOTSET)
    assert capsys.readouterr().out == ""


def test_a_clip_that_moved_is_named_anew(moved, data, tmp_path, capsys, clips):
    """Its new place is accepted by what is in it: other weights and the old place are refused."""
    checkpoint, place = moved
    weights = ["--pretrained", place / "open_clip_model.safetensors"]
    said = refused(capsys, "--predict", data.csv, "--checkpoint", checkpoint)
    assert "new place with --clip_model" in said and str(checkpoint) in said
    want = predict(data, tmp_path, checkpoint, "--clip_model", f"local-dir:{place}")
    shutil.copytree(clips(), tmp_path / "other")
    (tmp_path / "other" / "open_clip_model.safetensors").unlink()
    assert_same(predict(data, tmp_path, checkpoint, "--clip_model", f"local-dir:{tmp_path}/other",
                        *weights), want, 0)
    assert_same(baseline.load(checkpoint, clip_model=f"local-dir:{place}").score(
        [data.images / row["name"] for row in data.rows], [row["prompt"] for row in data.rows]),
        want)
    for name, clip in (("quick", clips("quick")), ("other", write_clip(tmp_path / "new", 1))):
        for command in (["--predict", data.csv, "--checkpoint"], ["--resume_from"]):
            assert "weights" in refused(capsys, *command, checkpoint, "--clip_model",
                                        f"local-dir:{clip}"), name
    last = shutil.copytree(checkpoint.parent, tmp_path / "run") / "baseline_last.pt"
    row = baseline.main(["--resume_from", str(last), "--clip_model", f"local-dir:{place}"])
    assert same_tensors(load(last.parent)["state"], load(checkpoint.parent)["state"])
    assert row["epochs_run"] == 2


def test_what_an_export_holds(own, data, tmp_path, capsys, monkeypatch):
    """All weights, whoever exports them; the card has the scores of this very epoch."""
    checkpoint, clip = own()
    out, state = tmp_path / "out", load(checkpoint.parent, "baseline_best.pt")["state"]
    out.mkdir()
    baseline.main(["--export", str(out), "--checkpoint", str(checkpoint)])
    tensors = load_file(out / "model.safetensors")
    order = list(baseline.load_checkpoint(out)["state"])  # what a stopped scoring is known by
    assert order == sorted(state)
    assert same_tensors({key: tensors[f"state.{key}"] for key in state}, state)
    first = load_file(clip / "open_clip_model.safetensors")
    trained = {key for key in state if key.startswith("clip.visual.")}
    assert trained and all(torch.equal(tensors[key], first[key[5:]]) for key in trained)
    assert len(tensors) == len(first) + len(state)
    card, row = (out / "README.md").read_text(), baseline.json.loads(
        (checkpoint.parent / "result.json").read_text())
    for said in (f"{row['val_srocc_q']:.4f}", f"{row['linear_probe_srocc_c']:.4f}", "license",
                 row["split"], "data.csv", f"images: {row['images_train']} train"):
        assert said in card
    again = tmp_path / "again"  # from the folder itself: the same weights, no scores beside it
    monkeypatch.setattr(baseline.huggingface_hub, "snapshot_download", {"me/mine": str(out)}.get)
    baseline.main(["--export", str(again), "--checkpoint", "hf-hub:me/mine"])
    assert same_tensors(load_file(again / "model.safetensors"), tensors)
    assert f"{row['val_srocc_q']:.4f}" not in (again / "README.md").read_text()
    assert "optimiser" in refused(capsys, "--resume_from", out)


def test_an_export_is_whole_or_not_there(own, tmp_path, capsys):
    """A folder that is in use is kept, a full disk leaves nothing, damage is found."""
    command, out = ["--checkpoint", own()[0], "--export"], tmp_path / "place" / "out"
    assert "writable" in refused_when_full(capsys, *command, out)
    assert list(out.parent.iterdir()) == []
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note").write_text("mine")
    for used, why in (("used", "Directory not empty"), ("used/note", "Not a directory")):
        said = refused(capsys, *command, tmp_path / used)
        assert f"{tmp_path / used} must be" in said and why in said and "another folder" in said
    assert (tmp_path / "used" / "note").read_text() == "mine"
    assert "--export" in refused(capsys, *command, out, "--predict", tmp_path)
    baseline.main([*map(str, command), str(out)])
    weights = out / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-3] ^= 1
    weights.write_bytes(whole)
    assert "checksum" in refused(capsys, "--predict", tmp_path, "--checkpoint", out)
    (out / "config.json").write_text('{"model_type": "bert"}')
    assert "--export" in refused(capsys, "--predict", tmp_path, "--checkpoint", out)


def refused_when_full(capsys, *command):
    """Run a refused command with room for small files only."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 14, limit[1]))
    try:
        return refused(capsys, *command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)


def test_auto_precision_is_asked_again_and_a_named_one_is_kept(train, data, monkeypatch):
    """A checkpoint knows what was asked for: auto follows the machine that scores or goes on."""
    auto = train("--freeze_clip", "--lr", 1e-3, out="auto").folder / "baseline_last.pt"
    named = train("--freeze_clip", "--precision", "bf16", out="named").folder / "baseline_last.pt"
    for path, asked, here in ((auto, "auto", "fp32"), (named, "bf16", "bf16")):
        assert load(path.parent)["args"]["precision"] == asked
        assert baseline.load(path).args.precision == here
    assert baseline.load(auto, precision="bf16").args.precision == "bf16"
    content = load(auto.parent)  # as a GPU would have left it
    content["scaler"] = {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5,
                         "growth_interval": 9, "_growth_tracker": 0}
    torch.save(content, auto)
    assert train("--resume_from", auto, out="auto").row["epochs_run"] == 2
