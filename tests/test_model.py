"""The CLIP that is loaded, its split towers, what is frozen, and the heads on top."""

import json
import re
import shutil
import socket
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import EMBED_DIM, PROMPTS, TEXT, VISION, decoded, load
from safetensors.torch import load_file

import baseline

# --- loading --------------------------------------------------------------------------------


@pytest.fixture
def parse(flags):
    """Parse the command line of a tiny run."""
    return lambda *more, **options: baseline.parse_args(flags(*more, **options))


def activations(clip):
    """Return the names of the activation classes in a CLIP."""
    names = {type(module).__name__ for module in clip.modules()}
    return names & {"GELU", "QuickGELU"}


def reference(folder, **options):
    """Return open_clip's own model of a folder, in eval mode."""
    return open_clip.create_model(f"local-dir:{folder}", **options).eval()


def embeddings(clip, folder, tokenizer=None):
    """Return the embeddings of three random images and all prompts by open_clip's own code."""
    tokenizer = tokenizer or open_clip.get_tokenizer(f"local-dir:{folder}")
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (clip.encode_image(x, normalize=True),
                clip.encode_text(tokenizer(PROMPTS), normalize=True))


def assert_close(got, want, atol=1e-5):
    """Compare pairs of tensors."""
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=atol, rtol=0), (a - b).abs().max()


@pytest.fixture
def tagged(monkeypatch, tmp_path, clips):
    """Register a tiny model with a tag that was trained with QuickGELU, as OpenAI's were."""
    folder = tmp_path / "configs"
    folder.mkdir()
    config = {"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "tiny-tagged.json").write_text(json.dumps(config))
    for name in ("_MODEL_CONFIG_PATHS", "_MODEL_CONFIGS"):
        value = getattr(open_clip.factory, name)
        monkeypatch.setattr(open_clip.factory, name, type(value)(value))
    open_clip.add_model_config(folder)
    tags = {"openai": {"url": "https://x/y.pt", "quick_gelu": True}, "plain": {"url": "https://x"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-tagged", tags)
    weights = str(clips() / "open_clip_model.safetensors")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *a, **k: weights)
    return "tiny-tagged"


@pytest.mark.parametrize("tag, quick", [("openai", True), ("plain", False)])
def test_a_tag_brings_its_activation(parse, clips, tagged, tag, quick):
    """A tag trained with QuickGELU is built with it, and computes what open_clip computes."""
    args = parse("--clip_model", tagged, "--pretrained", tag)
    clip, tokenizer, identity = baseline.load_clip(args, 0)
    assert activations(clip) == ({"QuickGELU"} if quick else {"GELU"})
    assert identity["quick_gelu"] is quick
    got = embeddings(clip.eval(), None, tokenizer)
    assert_close(got, embeddings(reference(clips(), force_quick_gelu=quick), clips()))
    other = embeddings(reference(clips(), force_quick_gelu=not quick), clips())
    assert not torch.allclose(got[0], other[0], atol=1e-4)


@pytest.mark.parametrize("quick", [True, False])
def test_a_weights_file_with_quick_gelu(parse, clips, quick):
    """--quick_gelu builds a weights file's model with QuickGELU; without the flag it is plain."""
    weights = clips() / "open_clip_model.safetensors"
    args = parse("--pretrained", weights, *(["--quick_gelu"] if quick else []))
    clip, _, identity = baseline.load_clip(args, 0)
    assert activations(clip) == ({"QuickGELU"} if quick else {"GELU"})
    assert identity["quick_gelu"] is quick
    want = embeddings(reference(clips(), force_quick_gelu=quick), clips())
    assert_close(embeddings(clip.eval(), clips()), want)


def test_a_models_own_config_asks_for_quick_gelu(parse, clips):
    """A local folder whose config says quick_gelu is built with it."""
    clip, _, identity = baseline.load_clip(parse(clip="quick"), 0)
    assert activations(clip) == {"QuickGELU"} and identity["quick_gelu"] is True


def test_config_and_checkpoint_remember_the_activation(train):
    """What was trained says in its files whether it was QuickGELU."""
    run = train("--freeze_clip", "--quick_gelu", "--epochs", 1)
    assert json.loads((run.folder / "config.json").read_text())["identity"]["quick_gelu"] is True
    assert load(run.folder)["identity"]["quick_gelu"] is True


@pytest.mark.parametrize("name, quick, warns", [
    ("ViT-B-32.pt", False, True), ("ViT-B-32.pt", True, False), ("mine.pt", False, False)])
def test_openai_file_names_warn(parse, clips, tmp_path, capsys, name, quick, warns):
    """A file named like an OpenAI release is suspected of needing --quick_gelu."""
    path = tmp_path / name
    torch.save(load_file(clips() / "open_clip_model.safetensors"), path)
    baseline.load_clip(parse("--pretrained", path, *(["--quick_gelu"] if quick else [])), 0)
    said = capsys.readouterr().out
    assert ("--quick_gelu" in said) is warns
    assert ("WARNING" in said) is warns


def test_half_precision_weights_equal_full_ones(parse, clips, tmp_path):
    """Weights that are stored in half precision are loaded as they are, into float32."""
    state = load_file(clips() / "open_clip_model.safetensors")
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half.pt")
    clip, _, _ = baseline.load_clip(parse("--pretrained", tmp_path / "half.pt"), 0)
    for name, value in clip.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name].half().float()), name


def test_no_network_is_one_error_with_the_ways_out(refused, monkeypatch, tmp_path):
    """Weights that are neither here nor reachable: model, tag and what to do instead."""
    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    said = refused("--clip_model", "ViT-B-32", "--pretrained", "laion2b_e16")
    for word in ("ViT-B-32", "laion2b_e16", "--pretrained FILE", "--quick_gelu", "local-dir:",
                 "--demo"):
        assert word in said
    assert said.count("baseline.py: error:") == 1 and len(said.splitlines()) == 1


def test_unknown_model_suggests_near_names(refused):
    """A misspelt model is refused with the names that it may have meant."""
    assert "ViT-L-14" in refused("--clip_model", "ViT-L-41").split("try")[1]


def test_unknown_tag_lists_the_models_tags(refused):
    """A misspelt tag is refused with the model's real ones."""
    said = refused("--clip_model", "ViT-B-32", "--pretrained", "laion_nope")
    assert "laion_nope" in said and "laion2b_e16" in said and "openai" in said


def test_local_folder_without_weights(refused, clips, tmp_path):
    """A folder that holds only a config is refused by path."""
    shutil.copytree(clips(), tmp_path / "empty")
    (tmp_path / "empty" / "open_clip_model.safetensors").unlink()
    said = refused(clip=tmp_path / "empty")
    assert str(tmp_path / "empty") in said and "--pretrained none" in said


def test_local_folder_that_is_none(refused, tmp_path):
    """A folder without a config is refused by path."""
    assert "nowhere" in refused(clip=tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["cut", "pickle", "other model"])
def test_weights_that_are_none_of_this_model(refused, clips, tmp_path, damage):
    """A truncated file, a text file and another model's weights are refused by path."""
    path = tmp_path / "weights.pt"
    state = load_file(clips() / "open_clip_model.safetensors")
    if damage == "other model":
        state = {f"x.{k}": v for k, v in state.items()}
    torch.save(state, path)
    if damage != "other model":
        other = b"cos\nsystem\n(S'x'\ntR."
        path.write_bytes(path.read_bytes()[:5000] if damage == "cut" else other)
    assert "weights.pt" in refused("--pretrained", path)


def test_random_weights_are_said_and_seeded(parse, capsys):
    """--pretrained none warns; the weights follow the seed."""
    first, again, other = (
        baseline.load_clip(parse("--pretrained", "none"), seed)[0].visual.proj
        for seed in (1, 1, 2))
    assert "RANDOM" in capsys.readouterr().out
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.std() > 0.01


# --- towers ---------------------------------------------------------------------------------


@pytest.fixture
def towers(parse):
    """Return (clip, image Tower, text Tower, token ids) of a variant, frozen at a boundary."""
    def make(variant, frozen=None):
        clip, tokenizer, _ = baseline.load_clip(parse(clip=variant), 0)
        pair = baseline.image_tower(clip.eval()), baseline.text_tower(clip)
        for tower in pair:
            if tower.splits or frozen in (None, "all"):
                tower.freeze(tower.depth if frozen == "depth" else frozen)
        return clip, *pair, tokenizer(PROMPTS)
    return make


def images(count=4):
    """Return random normalised images."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def through_image(tower, x):
    """Run an image tower as training does: prefix, then suffix."""
    return tower.suffix(tower.prefix(x))


def through_text(tower, ids):
    """Run a text tower as training does: cut, prefix, then suffix."""
    end = tower.end(ids)
    ids = ids[:, :int(end.max()) + 1] if tower.trims else ids
    return tower.suffix(tower.prefix(ids, end), end)


FROZEN = [None, 0, 1, 2, "depth", "all"]
TOWERS = ["vit", "avg", "bidirectional", "quick", "conv", "resnet", "timm_vit"]


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("variant", TOWERS)
def test_split_towers_equal_open_clips_own(towers, clips, variant, frozen):
    """suffix(prefix(x)) is open_clip's own embedding at every freeze boundary."""
    _, image, text, ids = towers(variant, frozen)
    clip = reference(clips(variant))
    with torch.no_grad():
        got = through_image(image, images()), through_text(text, ids)
        want = clip.encode_image(images(), normalize=True), clip.encode_text(ids, normalize=True)
    assert_close(got, want)
    assert (got[0][0] - got[0][1]).norm() > 0.01 and (got[1][0] - got[1][1]).norm() > 0.01


@pytest.mark.parametrize("frozen", [None, 0, 1, "depth"])
@pytest.mark.parametrize("variant", TOWERS)
def test_gradients_equal_open_clips_own(towers, clips, variant, frozen):
    """What trains gets the gradient that open_clip's own code gives, what is frozen gets none."""
    own, image, text, ids = towers(variant, frozen)
    clip = reference(clips(variant))
    weights = torch.randn(EMBED_DIM, generator=torch.Generator().manual_seed(2))
    (through_image(image, images()) @ weights).square().sum().backward()
    (through_text(text, ids) @ weights).square().sum().backward()
    (clip.encode_image(images(), normalize=True) @ weights).square().sum().backward()
    (clip.encode_text(ids, normalize=True) @ weights).square().sum().backward()
    wanted, trained = dict(clip.named_parameters()), 0
    for name, parameter in own.named_parameters():
        if parameter.requires_grad and wanted[name].grad is not None:
            scale = max(1.0, float(wanted[name].grad.abs().max()))
            assert torch.allclose(parameter.grad, wanted[name].grad, atol=1e-5 * scale), name
            trained += 1
        elif not parameter.requires_grad:
            assert parameter.grad is None, name
    assert trained >= 4
    assert frozen is not None or trained == len(wanted) - 1  # all but logit_scale


def gradients(towers, checkpointing=False, half=False):
    """Return {name: gradient} of a sum over both towers, in bf16 where half."""
    clip, image, text, ids = towers("vit", 1)
    image.checkpointing = text.checkpointing = checkpointing
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = through_image(image, images())[:, 0].sum() + through_text(text, ids)[:, 0].sum()
    out.backward()
    return {n: p.grad for n, p in clip.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_nothing(towers):
    """Recomputed activations give the same gradients."""
    plain, recomputed = gradients(towers), gradients(towers, checkpointing=True)
    assert plain.keys() == recomputed.keys() and len(plain) > 20
    assert all(torch.allclose(plain[n], recomputed[n], atol=1e-7) for n in plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_bf16_are_near_those_in_fp32(towers, checkpointing):
    """Whichever attention kernel half precision takes, the gradients are right to its rounding."""
    exact, half = gradients(towers), gradients(towers, checkpointing, half=True)
    assert exact.keys() == half.keys()
    a, b = (torch.cat([g[n].flatten() for n in exact]) for g in (exact, half))
    assert 0 < (a - b).norm() < 0.03 * a.norm()


@pytest.mark.parametrize("frozen", [None, 2, "all"])
def test_texts_cut_at_their_end_equal_full_length(towers, frozen):
    """A causal text tower gives the same embedding for the cut text and for all 77 tokens."""
    _, _, text, ids = towers("vit", frozen)
    end = text.end(ids)
    assert text.trims and int(end.max()) + 1 < 20 and ids.shape[1] == 77
    with torch.no_grad():
        full = text.suffix(text.prefix(ids, end), end)
        assert_close([through_text(text, ids)], [full])


def test_a_bidirectional_text_tower_is_not_cut(towers):
    """Where padding is read, it must stay."""
    assert not towers("bidirectional")[2].trims


@pytest.mark.parametrize("causal", [True, False])
def test_pooled_block_equals_the_whole_block(causal):
    """The block that computes one token only gives what the whole block gives there."""
    torch.manual_seed(0)
    block = open_clip.transformer.CustomResidualAttentionBlock(32, 4).eval()
    plain = open_clip.transformer.ResidualAttentionBlock(32, 4).eval()
    for parameter in block.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    plain.load_state_dict(block.state_dict())
    x, position = torch.randn(5, 9, 32), torch.tensor([8, 3, 0, 5, 8])
    mask = torch.full((9, 9), -torch.inf).triu(1) if causal else None
    seen = (torch.arange(9) <= position[:, None])[:, None, None] if causal else None
    assert baseline.can_pool_block(block)
    got = baseline.pooled_block(block, x, position, seen)
    want = plain(x, attn_mask=mask)[torch.arange(5), position]
    assert got.shape == (5, 1, 32) and torch.allclose(got[:, 0], want, atol=1e-5)


# --- freezing -------------------------------------------------------------------------------


def trains(name, frozen, depth):
    """Return whether a native CLIP's parameter trains with `frozen` blocks frozen, by its name."""
    if name == "logit_scale" or frozen == "all":
        return False
    if frozen is None:
        return True
    block = re.search(r"resblocks\.(\d+)\.", name)
    if block:
        return int(block[1]) >= min(frozen, depth["visual" if "visual" in name else "text"])
    return name in ("visual.ln_post.weight", "visual.ln_post.bias", "visual.proj",
                    "ln_final.weight", "ln_final.bias", "text_projection")


CASES = [(["--freeze_clip"], "all"), ([], None)] + [
    (["--partial_freeze", "--freeze_layers", n], n) for n in (0, 1, 3, 4)]


def snapshot(clip):
    """Return a copy of all parameters and buffers."""
    return {name: value.clone() for name, value in clip.state_dict().items()}


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("more, frozen", CASES)
def test_frozen_stays_bit_identical_and_the_rest_moves(build, more, frozen, cache):
    """After training, exactly what should be frozen is as it was, bit for bit."""
    run = build(*more, "--lr", 1e-3, "--cache", cache, "--epochs", 1)
    before = snapshot(run.scorer.clip)
    heads = snapshot(run.scorer.quality)
    baseline.fit(run)
    after = run.scorer.clip.state_dict()
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved == trains(name, frozen, {"visual": 4, "text": 3}), name
    assert all(not torch.equal(heads[k], v) for k, v in run.scorer.quality.state_dict().items())


def stage_of(name):
    """Return the stage of a conv trunk's entry: -1 before, 99 after the stages."""
    stage = re.search(r"visual\.trunk\.(?:blocks|layer)\.?(\d+)\.", name)
    if stage:
        return int(stage[1])
    return 99 if re.search(r"conv_head|bn2|head\.", name) else -1


@pytest.mark.parametrize("more, frozen", [
    (["--freeze_clip"], 100), (["--partial_freeze", "--freeze_layers", 2], 2), ([], -9)])
def test_batchnorm_of_frozen_stages_does_not_drift(build, more, frozen):
    """Frozen BatchNorm keeps its statistics bit for bit; that of trained stages moves."""
    run = build(*more, "--lr", 1e-3, "--epochs", 1, "--augment", "crop", clip="conv")
    before = snapshot(run.scorer.clip.visual)
    baseline.fit(run)
    after, moved = run.scorer.clip.visual.state_dict(), 0
    for name, value in before.items():
        is_frozen = frozen == 100 or stage_of("visual." + name) < frozen
        assert torch.equal(value, after[name]) == is_frozen, name
        moved += "running" in name and not is_frozen
    assert moved > 0 or frozen == 100


@pytest.mark.parametrize("variant", ["vit", "conv"])
def test_frozen_modules_are_in_eval_mode_while_training(build, variant):
    """scorer.train() leaves the frozen parts in eval mode and nothing else."""
    run = build("--partial_freeze", "--freeze_layers", 2, clip=variant)
    run.scorer.train()
    for tower in run.scorer.towers.values():
        frozen = {m for part in tower.frozen_parts() if isinstance(part, torch.nn.Module)
                  for m in part.modules()}
        assert frozen and not any(m.training for m in frozen)
        assert all(m.training for block in tower.blocks[2:] for m in block.modules())
    assert run.scorer.quality.training and run.scorer.consistency.training


@pytest.mark.parametrize("more, frozen", CASES)
def test_setup_lines_count_blocks_and_parameters(build, capsys, more, frozen):
    """The lines about the towers say the true numbers."""
    capsys.readouterr()
    run = build(*more)
    lines = capsys.readouterr().out.splitlines()
    for tower, depth in (("image", 4), ("text", 3)):
        inside = [(n, p.numel()) for n, p in run.scorer.clip.named_parameters()
                  if n != "logit_scale" and n.startswith("visual.") == (tower == "image")]
        count = sum(size for n, size in inside if trains(n, frozen, {"visual": 4, "text": 3}))
        total = sum(size for _, size in inside)
        blocks = {None: 0, "all": depth}.get(frozen, frozen)
        assert (f"{tower} tower: {min(blocks, depth)} of {depth} blocks frozen, "
                f"{count / 1e6:.2f} M of {total / 1e6:.2f} M parameters train") in lines


def test_too_many_frozen_blocks_says_the_depth_and_a_suggestion(refused):
    """--freeze_layers beyond the image tower is refused with its depth and a value that works."""
    said = refused("--partial_freeze", "--freeze_layers", 5)
    assert "at most 4" in said and "is 5" in said and "--freeze_layers 3" in said


def test_a_tower_without_blocks_cannot_be_partly_frozen(refused):
    """A ModifiedResNet is refused with --partial_freeze, by name and with the ways out."""
    said = refused("--partial_freeze", "--freeze_layers", 1, clip="modified_resnet")
    assert "image tower" in said and "ModifiedResNet" in said and "--freeze_clip" in said


@pytest.mark.parametrize("more", [["--freeze_clip"], ["--lr", 1e-3]])
def test_a_tower_without_blocks_can_be_frozen_or_trained_whole(train, more):
    """A ModifiedResNet works with --freeze_clip and without freezing."""
    run = train(*more, "--epochs", 1, clip="modified_resnet")
    state = load(run.folder)["state"]
    assert ("clip.visual.conv1.weight" in state) == ("--lr" in more)
    assert ("clip.visual.bn1.running_mean" in state) == ("--lr" in more)


# --- heads ----------------------------------------------------------------------------------


def scorer(*more, seed=0):
    """Return a CLIPScorer without a CLIP, its heads filled with random weights."""
    args = baseline.parse_args(["--dropout", "0", *map(str, more)])
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    made = baseline.CLIPScorer(torch.nn.Identity(), {}, EMBED_DIM, preprocess, args)
    torch.manual_seed(seed)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3)
    return made.eval()


def pairs(count=7, seed=3):
    """Return random unit-norm image and text embeddings."""
    torch.manual_seed(seed)
    return F.normalize(torch.randn(count, EMBED_DIM)), F.normalize(torch.randn(count, EMBED_DIM))


def test_residual_formulas():
    """q and c are base plus scale times delta; the bases are those of the documentation."""
    made, (f, t) = scorer("--residual_scale_q", 0.3, "--residual_scale_c", 0.15), pairs()
    out = made.score(f, t)
    a, b, e = made.consistency.affine
    weights = made.quality.base.weight[0] * EMBED_DIM ** 0.5
    cosine = F.cosine_similarity(f, t)
    assert_close([out["q_base"], out["c_base"]],
                 [torch.sigmoid(f @ weights + made.quality.base.bias),
                  a * (cosine + 1) / 2 + b + e * out["q"]])
    assert_close([out["q"], out["c"]], [out["q_base"] + 0.3 * out["q_delta"],
                                       out["c_base"] + 0.15 * out["c_delta"]], 1e-6)
    assert out["q_delta"].abs().min() > 0 and out["q_delta"].std() > 0.01
    assert out["c_delta"].abs().min() > 0 and out["c_delta"].std() > 0.01


def test_residual_is_bounded_by_its_scale():
    """However large the learned residual, the score stays within scale of the base."""
    made, (f, t) = scorer("--residual_scale_q", 0.3, "--residual_scale_c", 0.15), pairs(50)
    for parameter in (*made.quality.delta.parameters(), *made.consistency.delta.parameters()):
        parameter.data.mul_(100)
    out = made.score(f, t)
    for target, bound in (("q", 0.3), ("c", 0.15)):
        distance = (out[target] - out[f"{target}_base"]).abs()
        assert distance.max() <= bound + 1e-6 and distance.max() > 0.99 * bound


@pytest.mark.parametrize("more", [[], ["--use_two_branch"], ["--use_refinement"]])
def test_the_residual_starts_at_zero(build, more):
    """Before training, both scores are their bases, bit for bit."""
    run = build("--freeze_clip", *more)
    out = baseline.evaluate(run, run.parts["val"])
    assert np.array_equal(out["q"], out["q_base"]) and np.array_equal(out["c"], out["c_base"])
    assert np.ptp(out["q"]) > 0 and np.ptp(out["c"]) > 0


def test_direct_formulas():
    """Without residual learning both scores are sigmoids of what is learned, deltas are zero."""
    made, (f, t) = scorer("--no_residual_learning"), pairs()
    out = made.score(f, t)
    weights = made.quality.base.weight[0] * EMBED_DIM ** 0.5
    assert_close([out["q"]], [torch.sigmoid(f @ weights + made.quality.base.bias)])
    assert 0 < out["c"].min() and out["c"].max() < 1 and out["c"].std() > 0.01
    assert (out["q_delta"] == 0).all() and (out["c_delta"] == 0).all()
    before = out["c"]
    made.consistency.affine.data.mul_(5)
    assert torch.equal(made.score(f, t)["c"], before)  # CLIP's base is no part of it


@pytest.mark.parametrize("more", [[], ["--no_residual_learning"]])
def test_two_branch_formula(more):
    """The two-branch base is the mean of a cosine branch and an MLP branch."""
    made, (f, t) = scorer("--use_two_branch", *more), pairs()
    out, cosine = made.score(f, t), F.cosine_similarity(f, t)
    a, b, e = made.consistency.affine
    x = baseline.pair_features(f, t, cosine)
    mlp = torch.sigmoid(made.consistency.branch(x)[:, 0])
    base = (torch.sigmoid(a * cosine + b + e * out["q"]) + mlp) / 2
    assert_close([out["c_base"]], [base])
    assert mlp.std() > 0.01
    delta = 0.0 if more else out["c_delta"]
    assert_close([out["c"]], [base + 0.2 * delta])


def test_refinement_corrects_a_detached_score_within_its_bound():
    """The refined score is within scale of the coarse one and sends it no gradient."""
    made, (f, t) = scorer("--use_refinement", "--refinement_layers", 1, "--refinement_heads", 2,
                          "--refinement_dim", 16, "--residual_scale_c", 0.1), pairs(30)
    out = made.score(f, t)
    distance = (out["c"] - out["c_coarse"]).abs()
    assert 0 < distance.min() and distance.max() <= 0.1 + 1e-6 and distance.std() > 1e-3
    refined = torch.autograd.grad(out["c"].sum(), [*made.refinement.parameters(),
                                                   *made.consistency.parameters()],
                                  retain_graph=True, allow_unused=True)
    count = len(list(made.refinement.parameters()))
    assert all(g is not None for g in refined[:count])
    assert all(g is None or not g.any() for g in refined[count:])
    coarse = torch.autograd.grad(out["c_coarse"].sum(), list(made.consistency.parameters()))
    assert all(g.any() for g in coarse)


def test_refinement_reads_image_text_and_coarse_score():
    """Each of the three tokens changes the correction."""
    made, (f, t) = scorer("--use_refinement", "--refinement_dim", 16), pairs()
    coarse = torch.linspace(0, 1, len(f))
    base = made.refinement(f, t, coarse) - coarse
    assert not torch.allclose(made.refinement(f.flip(0), t, coarse) - coarse, base, atol=1e-4)
    assert not torch.allclose(made.refinement(f, t.flip(0), coarse) - coarse, base, atol=1e-4)
    assert not torch.allclose(made.refinement(f, t, 1 - coarse) - (1 - coarse), base, atol=1e-4)


@pytest.mark.parametrize("more", [[], ["--no_residual_learning"], ["--use_two_branch"],
                                  ["--use_refinement"]])
def test_quality_is_blind_to_the_prompt_and_consistency_is_not(more):
    """Shuffled prompts leave quality as it is, bit for bit, and change consistency."""
    made, (f, t) = scorer(*more), pairs()
    plain, shuffled = made.score(f, t), made.score(f, t.roll(1, 0))
    for key in ("q", "q_base", "q_delta"):
        assert torch.equal(plain[key], shuffled[key])
    assert (plain["c"] - shuffled["c"]).abs().min() > 1e-6


@pytest.mark.parametrize("more", [[], ["--use_two_branch"]])
def test_quality_moves_consistency_and_gets_no_gradient_from_it(more):
    """The base leans on the quality score, whose head learns from human quality scores alone."""
    made, (f, t) = scorer(*more), pairs()
    gradients = torch.autograd.grad(made.score(f, t)["c"].sum(), list(made.quality.parameters()),
                                    allow_unused=True)
    assert all(gradient is None for gradient in gradients)
    before = made.score(f, t)["c_base"]
    made.quality.base.bias.data += 1
    assert (made.score(f, t)["c_base"] - before).abs().min() > 1e-4


def test_the_whole_scorer_sees_prompt_and_picture(build):
    """Through the towers too: prompts move c alone, a black picture moves both scores."""
    run = build("--partial_freeze", "--freeze_layers", 1, "--cache", "off")
    run.scorer.eval()
    for head in (run.scorer.quality, run.scorer.consistency):
        torch.nn.init.normal_(head.delta[-1].weight, 0, 0.3)
    pixels = decoded(run, range(9))
    ids = run.table.prompt_id[[0, 4, 8, 12, 16, 20, 24, 28, 32]]

    def predict(pixels, ids):
        with torch.no_grad():
            return run.scorer(run.images.boundary(pixels), *run.texts.fetch(ids))
    plain, other = predict(pixels, ids), predict(pixels, np.roll(ids, 1))
    assert torch.equal(plain["q"], other["q"])
    assert (plain["c"] - other["c"]).abs().min() > 1e-6
    black = predict(torch.zeros_like(pixels), ids)
    assert (plain["q"] - black["q"]).abs().min() > 1e-6
    assert (plain["c"] - black["c"]).abs().min() > 1e-6


@pytest.mark.parametrize("more, key", [
    ([], "q_delta"), ([], "c_delta"), (["--no_residual_learning"], "q"),
    (["--no_residual_learning"], "c"), (["--use_two_branch"], "c_base"),
    (["--use_refinement"], "refinement"), (["--use_explanations"], "explanation")])
def test_dropout_reaches_every_head(more, key):
    """In training mode with dropout each head's output is random; without dropout it is not."""
    f, t = pairs()
    for dropout, random in ((0.5, True), (0, False)):
        made = scorer(*more, "--dropout", dropout)

        def output(made=made):
            out = made.score(f, t)
            return out["c"] - out["c_coarse"] if key == "refinement" else out[key]
        assert torch.equal(output(), output())  # eval mode
        made.train()
        assert torch.equal(output(), output()) is not random


def test_heads_run_in_float32_under_autocast(build):
    """With bf16 towers the scores are still float32."""
    run = build("--partial_freeze", "--freeze_layers", 1, "--precision", "bf16", "--cache", "off")
    view = baseline.plain_views(run.parts["val"], 4)[0]
    out = baseline.forward(run, view, next(run.images.stream([view])))
    assert {value.dtype for value in out.values()} == {torch.float32}


# --- explanations ---------------------------------------------------------------------------


def test_explanation_loss_is_one_minus_cosine_over_rows_that_have_one():
    """Rows without an explanation give neither loss nor gradient."""
    args = SimpleNamespace(w_q=0.5, w_c=0.25, w_exp=2.0)
    torch.manual_seed(0)
    out = {"q": torch.rand(4), "c": torch.rand(4),
           "explanation": torch.randn(4, 6, requires_grad=True)}
    teacher, has = F.normalize(torch.randn(4, 6)), torch.tensor([True, False, True, False])
    batch = {"q": torch.rand(4), "c": torch.rand(4), "weight": 1 / 4, "weight_exp": 1 / 2,
             "teacher": teacher, "has_teacher": has}
    sums, total = baseline.losses(out, batch, args)
    cosine = F.cosine_similarity(out["explanation"], teacher)
    explain = (1 - cosine[0] + 1 - cosine[2]) / 2
    want = (0.5 * (out["q"] - batch["q"]).square().mean()
            + 0.25 * (out["c"] - batch["c"]).square().mean() + 2.0 * explain)
    assert torch.allclose(total, want) and torch.allclose(sums["exp"], 2 * explain)
    total.backward()
    grad = out["explanation"].grad
    assert not grad[~has].any() and grad[has].abs().sum(1).min() > 0


def test_a_refined_consistency_also_trains_its_coarse_score():
    """The loss of a refined consistency adds the error of the coarse one."""
    args = SimpleNamespace(w_q=0.5, w_c=0.5, w_exp=0.1)
    out = {"q": torch.zeros(2), "c": torch.tensor([0.5, 0.0]), "c_coarse": torch.tensor([1.0, 0])}
    batch = {"q": torch.zeros(2), "c": torch.zeros(2), "weight": 0.5}
    sums, total = baseline.losses(out, batch, args)
    assert float(sums["c"]) == 0.25 + 1 and float(total) == 0.5 * 0.5 * 1.25


def test_the_teacher_is_the_pretrained_text_tower_and_does_not_move(build, clips):
    """Training the whole CLIP leaves the explanations' targets where open_clip puts them."""
    run = build("--use_explanations", "--lr", 1e-3, "--epochs", 1)
    before = run.teacher.clone()
    tokens = open_clip.get_tokenizer(f"local-dir:{clips()}")(run.table.explanations)
    with torch.no_grad():
        want = reference(clips()).encode_text(tokens, normalize=True)
    assert_close([before], [want])
    assert not run.teacher.requires_grad
    baseline.fit(run)
    assert torch.equal(run.teacher, before)
    row = run.state["log"][0]
    assert 0.3 < row["train_loss_exp"] < 2


def test_empty_explanations_change_nothing(build, data):
    """The rows with an empty explanation are exactly those without a teacher."""
    run = build("--freeze_clip", "--use_explanations")
    empty = {row["name"] for row in data.rows if not row["explanation"]}
    assert set(run.table.frame["name"][run.table.explanation_id < 0]) == empty and empty
