"""Where a run starts: from another run's towers and heads, and at another resolution."""

import numpy as np
import open_clip
import pytest
import torch
from conftest import load, read_csv, same_tensors
from PIL import Image

import baseline

PARTIAL = ["--partial_freeze", "--freeze_layers", 2, "--lr", 1e-3]


@pytest.mark.parametrize("clip", ["vit", "conv"])
def test_a_start_without_calibration_scores_as_the_other_run_ended(train, build, clip):
    """Towers, BatchNorm's statistics and heads are all there; the optimiser is new."""
    source = train(*PARTIAL, clip=clip, out="source").folder / "baseline_last.pt"
    ended = baseline.load(source, batch_size=8)
    run = build(*PARTIAL, "--init_from", source, "--no_base_calibration", clip=clip)
    assert same_tensors(load(source.parent)["state"], run.scorer.trained_state())
    assert not run.optimizer.state and run.progress["epoch"] == 0
    frame = run.table.frame
    want = ended.score(list(frame["path"]), list(frame["prompt"]))
    for t, title in baseline.TITLES.items():
        got = 5 * baseline.evaluate(run, "val")[0][t].to_numpy().clip(0, 1)
        assert np.allclose(got, want[title].to_numpy()[run.parts["val"]], atol=1e-4)
        assert np.allclose(5 * run.floors["start"][t].clip(0, 1), want[title], atol=1e-4)


def test_the_base_is_calibrated_to_what_the_residuals_leave(train, build):
    """On a doubled label scale the start fits as well; the residuals stay as they were."""
    source = train(*PARTIAL, "--epochs", 6, "--head_lr", 1e-2, out="source").folder
    source = source / "baseline_last.pt"
    scaled = "--label_scale_q", 10, "--label_scale_c", 10
    error = {}
    for name, more in (("calibrated", ()), ("as it was", ["--no_base_calibration"]),
                       ("new", ["--no_base_calibration", "--no_init"])):
        flags = [*PARTIAL, *scaled, *[flag for flag in more if flag != "--no_init"]]
        run = build(*flags, *(["--init_from", source] if name != "new" else []), out=name)
        rows = run.parts["train"]
        error[name] = [np.abs(run.floors["start"][t][rows] - run.table.frame[t].iloc[rows]).mean()
                       for t in "qc"]
        if name == "calibrated":
            state, heads = load(source.parent)["state"], run.scorer.trained_state()
            assert all(torch.equal(state[key], heads[key]) for key in state
                       if ".base." not in key and not key.endswith("affine"))
    assert all(a < b / 2 for a, b in zip(error["calibrated"], error["as it was"]))
    assert all(a < b for a, b in zip(error["calibrated"], error["new"]))


def test_a_resumed_run_that_began_from_another_is_the_same(train, monkeypatch):
    """It starts, calibrates and ends bit for bit as the uninterrupted one."""
    source = ["--init_from", train(*PARTIAL, "--epochs", 1, out="source").folder
              / "baseline_last.pt"]
    whole = train(*PARTIAL, *source, out="whole")
    real = baseline.train_one_epoch

    def die(run, epoch):
        if epoch == 2:
            raise MemoryError
        return real(run, epoch)
    monkeypatch.setattr(baseline, "train_one_epoch", die)
    with pytest.raises(MemoryError):
        train(*PARTIAL, *source, out="half")
    monkeypatch.setattr(baseline, "train_one_epoch", real)
    folder = whole.folder.parent / "half"
    row = baseline.main(["--resume_from", str(folder / "baseline_last.pt")])
    assert same_tensors(load(whole.folder)["state"], load(folder)["state"])
    assert row["gain_start_q"] == whole.row["gain_start_q"]


def test_prompts_that_the_other_run_was_trained_on_are_said(train, build, capsys):
    """Another split leaks, the same one does not."""
    source = train("--freeze_clip", "--epochs", 1, out="source").folder / "baseline_last.pt"
    capsys.readouterr()
    one = build("--freeze_clip", "--init_from", source)
    assert "leaks" not in capsys.readouterr().out
    two = build("--freeze_clip", "--init_from", source, "--seed", 43)
    known = {one.table.frame["prompt"].iloc[row] for row in one.parts["train"]}
    val = {two.table.frame["prompt"].iloc[row] for row in two.parts["val"]}
    assert known & val and f"was trained on {len(known & val)} of the prompts in val" in (
        capsys.readouterr().out)


def test_a_checkpoint_that_does_not_know_its_prompts_is_a_start(train, build, capsys):
    """One of an older run lacks their hashes and the image size; it starts the same."""
    folder = train("--freeze_clip", "--epochs", 1, out="source").folder
    content = load(folder)
    del content["prompts"], content["args"]["image_size"]
    torch.save(content, folder / "older.pt")
    one, two = (build("--freeze_clip", "--seed", 43, "--init_from", folder / name, out=name[:4])
                for name in ("baseline_last.pt", "older.pt"))
    assert same_tensors(one.scorer.trained_state(), two.scorer.trained_state())
    assert capsys.readouterr().out.count("WARNING: --init_from leaks") == 1  # it cannot know


@pytest.mark.parametrize("more, named", [
    (["--partial_freeze", "--freeze_layers", 3], "--freeze_layers 3 (there 2)"),
    ([*PARTIAL, "--use_two_branch"], "--use_two_branch True (there False)"),
    ([*PARTIAL, "--image_size", 48], "--image_size 48 (there None)")])
def test_another_architecture_is_refused_by_its_flag(train, refused, more, named):
    """So are the weights of another CLIP."""
    source = train(*PARTIAL, "--epochs", 1, out="source").folder / "baseline_last.pt"
    assert named in refused(*more, "--init_from", source)
    assert "the weights of the CLIP" in refused(*PARTIAL, "--init_from", source, clip="quick")
    assert "cannot be used" in refused(*PARTIAL, "--init_from", source.with_name("no.pt"))


@pytest.mark.parametrize("clip, size", [("vit", 48), ("conv", 64), ("timm_vit", 48)])
def test_image_size_embeds_as_open_clip_does_at_that_size(train, build, clips, data, clip, size):
    """Its positions are interpolated; checkpoint and export know the size, the cache as well."""
    folder = train("--freeze_clip", "--image_size", size, clip=clip).folder
    run = build("--freeze_clip", "--image_size", size, clip=clip)
    own = build("--freeze_clip", clip=clip)
    model, _, transform = open_clip.create_model_and_transforms(
        f"local-dir:{clips(clip)}", force_image_size=size)
    with torch.no_grad():
        want = model.eval().encode_image(torch.stack([transform(
            Image.open(path).convert("RGB")) for path in run.table.frame["path"]]), normalize=True)
    assert np.allclose(run.images.embed(), want, atol=1e-5)
    assert not np.allclose(own.images.embed(), want, atol=1e-3)
    assert len({len(decoded) for decoded in (run.images.decode([0])[0][0, 0],)} & {size}) == 1
    baseline.main(["--export", str(folder / "export"), "--checkpoint",
                   str(folder / "baseline_best.pt")])
    val = {row["name"]: row for row in read_csv(folder / "val_predictions.csv")}
    for place in (folder / "baseline_best.pt", folder / "export"):
        table = baseline.load(place).score([data.images / name for name in val],
                                           [row["prompt"] for row in val.values()])
        assert np.allclose(table["consistency"], [float(row["consistency"])
                                                  for row in val.values()], atol=1e-4)
