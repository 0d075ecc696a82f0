"""The CLIP that is loaded, its towers against open_clip's own, what is frozen, and the heads."""

import functools
import json
import shutil
import socket
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import EMBED_DIM, PROMPTS, TEXT, TIMM, VARIANTS, VISION, decoded, load, write_clip
from safetensors.torch import load_file

import baseline

# --- loading --------------------------------------------------------------------------------


@pytest.fixture
def parse(flags):
    """Parse the command line of a tiny run."""
    return lambda *more, **options: baseline.parse_args(flags(*more, **options))


def reference(folder, **options):
    """Return open_clip's own model of a folder, in eval mode."""
    return open_clip.create_model(f"local-dir:{folder}", **options).eval()


def images(count=4):
    """Return random normalised images of high contrast."""
    return 5 * torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def embeddings(clip):
    """Return the embeddings of random images and all prompts by open_clip's own code."""
    ids = open_clip.tokenize(PROMPTS)
    with torch.no_grad():
        return clip.encode_image(images(), normalize=True), clip.encode_text(ids, normalize=True)


def assert_close(got, want, atol=1e-5):
    """Compare pairs of tensors."""
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=atol, rtol=0), (a - b).abs().max()


FILE = "open_clip_model.safetensors"


@pytest.mark.parametrize("how, quick", [("tag openai", True), ("tag plain", False),
                                        ("flag", True), ("no flag", False), ("config", True)])
def test_quick_gelu_follows_tag_flag_and_config(parse, clips, monkeypatch, tmp_path, how, quick):
    """What was trained with QuickGELU is built with it, and computes what open_clip computes."""
    folder = clips("quick" if how == "config" else "vit")
    more = [] if how == "config" else ["--pretrained", folder / FILE] + ["--quick_gelu"] * quick
    if how.startswith("tag"):  # a model that open_clip knows, with a tag as OpenAI's are
        more = ["--clip_model", "tiny-tagged", "--pretrained", how[4:]]
        config = {"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": TEXT}
        (tmp_path / "tiny-tagged.json").write_text(json.dumps(config))
        for name in ("_MODEL_CONFIG_PATHS", "_MODEL_CONFIGS"):
            value = getattr(open_clip.factory, name)
            monkeypatch.setattr(open_clip.factory, name, type(value)(value))
        open_clip.add_model_config(tmp_path / "tiny-tagged.json")
        tags = {"openai": {"url": "https://x", "quick_gelu": True}, "plain": {"url": "https://x"}}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-tagged", tags)
        monkeypatch.setattr(open_clip.factory, "download_pretrained",
                            lambda *a, **k: str(folder / FILE))
    clip, _, identity = baseline.load_clip(parse(*more, clip=folder), 0)
    names = {type(module).__name__ for module in clip.modules()} & {"GELU", "QuickGELU"}
    assert names == ({"QuickGELU"} if quick else {"GELU"})
    assert identity["quick_gelu"] is quick
    got, other = embeddings(clip), embeddings(reference(folder, force_quick_gelu=True))
    assert_close(got, embeddings(reference(folder, force_quick_gelu=quick)))
    assert torch.allclose(got[0], other[0], atol=1e-4) is quick


@pytest.mark.parametrize("name, quick, warns", [
    ("ViT-B-32.pt", False, True), ("ViT-B-32.pt", True, False), ("mine.pt", False, False)])
def test_openai_file_names_warn_and_half_precision_is_loaded(parse, clips, tmp_path, capsys, name,
                                                             quick, warns):
    """A file named like an OpenAI release may need --quick_gelu; half weights become float32."""
    state = {k: v.half() for k, v in load_file(clips() / FILE).items()}
    torch.save(state, tmp_path / name)
    clip, _, _ = baseline.load_clip(
        parse("--pretrained", tmp_path / name, *(["--quick_gelu"] if quick else [])), 0)
    said = capsys.readouterr().out
    assert ("--quick_gelu" in said) is warns and ("WARNING" in said) is warns
    for key, value in clip.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key.removeprefix("text.")].float()), key


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
    for word in ("ViT-B-32", "laion2b_e16", "a file", "--quick_gelu", "local-dir:", "--demo"):
        assert word in said
    assert said.count("baseline.py: error:") == 1 and len(said.splitlines()) == 1


def test_names_that_lead_nowhere_are_refused_with_a_remedy(refused, clips, tmp_path):
    """A misspelt model or tag, a folder without weights or without a config."""
    assert "ViT-L-14" in refused("--clip_model", "ViT-L-41")
    said = refused("--clip_model", "ViT-B-32", "--pretrained", "laion_nope")
    assert "laion_nope" in said and "laion2b_e16" in said and "openai" in said
    shutil.copytree(clips(), tmp_path / "empty")
    (tmp_path / "empty" / FILE).unlink()
    said = refused(clip=tmp_path / "empty")
    assert str(tmp_path / "empty") in said and "--pretrained is none" in said
    assert "nowhere" in refused(clip=tmp_path / "nowhere")


@pytest.mark.parametrize("cut", [True, False])
def test_weights_that_are_none_of_this_model(refused, clips, tmp_path, cut):
    """A truncated file and another model's weights are refused by path."""
    path = tmp_path / "weights.pt"
    torch.save({k if cut else f"x.{k}": v for k, v in load_file(clips() / FILE).items()}, path)
    path.write_bytes(path.read_bytes()[:5000 if cut else None])
    assert "weights.pt" in refused("--pretrained", path)


def test_random_weights_are_said_and_seeded(parse, capsys):
    """--pretrained none warns; the weights follow the seed."""
    first, again, other = (baseline.load_clip(parse("--pretrained", "none"), seed)[0].visual.proj
                           for seed in (1, 1, 2))
    assert "RANDOM" in capsys.readouterr().out
    assert torch.equal(first, again) and not torch.equal(first, other) and first.std() > 0.01


# --- towers ---------------------------------------------------------------------------------

CREATE_MODEL = timm.create_model
SMALL = {"img_size": 32, "depth": 4, "embed_dim": 32, "num_heads": 2}


def timm_tower(name, pool="avg", proj="linear", **more):
    """Return the options of write_clip for an image tower of timm."""
    return {"vision": {**TIMM, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj},
            **more}


# For each family: its CLIP, its trunk's own arguments, and where the image tower's blocks are.
FAMILIES = {
    "vit": ({}, {}, "transformer.resblocks"),
    "vit avg": ({"vision": {**VISION, "pool_type": "avg"}, "text": {"no_causal_mask": True}}, {},
                "transformer.resblocks"),
    "vit sin cos": ({"vision": {**VISION, "pos_embed_type": "sin_cos_2d"}}, {},
                    "transformer.resblocks"),  # its positions never train
    "vit eos": ({"quick_gelu": True, "text": {"pool_type": "eos", "eos_id": 49407},
                 "custom_text": True}, {}, "transformer.resblocks"),
    "coca": ({"vision": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2,
                         "output_tokens": True},
              "text": {"embed_cls": True, "output_tokens": True, "context_length": 76},
              "multimodal_cfg": {**TEXT, "width": 24, "context_length": 76},
              "custom_text": True}, {}, "transformer.resblocks"),
    "modified_resnet": (VARIANTS["modified_resnet"], {}, "layer1 layer2 layer3 layer4"),
    "eva02": (timm_tower("eva02_base_patch16_clip_224", "token"), SMALL, "trunk.blocks"),
    "swin": (timm_tower("swin_tiny_patch4_window7_224"), {
        "img_size": 32, "depths": (1, 2, 1, 1), "embed_dim": 16, "num_heads": (1, 1, 2, 2),
        "window_size": 4}, "trunk.layers"),
    "relpos": (timm_tower("test_vit_relpos"), {**SMALL, "shared_rel_pos": True}, "trunk.blocks"),
    "relpos cls": (timm_tower("vit_relpos_base_patch16_cls_224", "token"), SMALL, "trunk.blocks"),
    "pe core": (timm_tower("vit_pe_core_base_patch16_224", "map", None), SMALL, "trunk.blocks"),
    "siglip": (timm_tower("vit_base_patch16_siglip_224", "map", "none", custom_text=True, text={
        "no_causal_mask": True, "pool_type": "last", "proj_bias": True}),
        {**SMALL, "embed_dim": EMBED_DIM}, "trunk.blocks"),
    "timm vit": (timm_tower("test_vit", "token"), {}, "trunk.blocks"),
    "efficientnet": (timm_tower("test_efficientnet"), {}, "trunk.blocks"),
    "resnet": (timm_tower("test_resnet"), {}, " ".join(f"trunk.layer{i}" for i in (1, 2, 3, 4))),
    "convnext": (timm_tower("test_convnext"), {}, "trunk.stages"),
    "nfnet": (timm_tower("test_nfnet"), {}, "trunk.stages"),
    "densenet": (timm_tower("densenet121"), {"growth_rate": 4, "block_config": (1, 1)}, ""),
}  # a DenseNet's blocks are unknown: it trains or is frozen as a whole
KNOWN = [name for name in FAMILIES if name != "densenet"]


def objective(f):
    """Return a sum over embeddings whose gradient reaches every entry."""
    weights = torch.randn(EMBED_DIM, generator=torch.Generator().manual_seed(2))
    return 100 * (f @ weights).square().sum()


def blocks_of(encoder, places):
    """Return the blocks that are at these places of an encoder."""
    found = [encoder.get_submodule(place) for place in places.split()]
    return list(found[0]) if len(found) == 1 else found


def walk(encoder, blocks, encode):
    """Return open_clip's own embeddings, gradients, and what the output of each block needs."""
    outputs, named = [], {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    for block in blocks:
        block.register_forward_hook(lambda *call: outputs.append(call[2]))
    out = encode()
    needs = [{n for n, g in zip(named, torch.autograd.grad(
        y.sum(), named.values(), allow_unused=True, retain_graph=True)) if g is not None}
        for y in outputs]
    grads = zip(named, torch.autograd.grad(objective(out), named.values(), allow_unused=True))
    return SimpleNamespace(out=out.detach(), needs=needs,
                           grads={n: grad for n, grad in grads if grad is not None})


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """Return (folder, {"image", "text"} of walk) of a family: its reference, computed once."""
    @functools.cache
    def make(name):
        folder = write_clip(tmp_path_factory.mktemp("families") / "clip", **FAMILIES[name][0])
        clip, ids = reference(folder), open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
        text = getattr(clip, "text", clip)  # a plain CLIP has its text tower's parts itself
        return folder, {
            "image": walk(clip.visual, blocks_of(clip.visual, FAMILIES[name][2]),
                          lambda: clip.encode_image(images(), normalize=True)),
            "text": walk(text, text.transformer.resblocks,
                         lambda: clip.encode_text(ids, normalize=True))}
    return make


@pytest.fixture
def family(walks, monkeypatch):
    """Return walks of a family; from then on timm makes trunks of its size."""
    def make(name):
        small = functools.partial(CREATE_MODEL, **FAMILIES[name][1])
        monkeypatch.setattr(timm, "create_model", small)
        return walks(name)
    return make


@pytest.fixture
def towers(family, parse):
    """Return (clip, {"image", "text"} Towers, token ids) of a family, frozen at a boundary."""
    def make(name, frozen=None, change=lambda clip: None):
        folder, walked = family(name)
        layers = len(walked["image"].needs) if frozen == "depth" else frozen
        more = {None: [], "all": ["--freeze_clip"]}.get(
            frozen, ["--partial_freeze", "--freeze_layers", layers])
        args = parse(*more, clip=folder)
        clip, tokenizer, _ = baseline.load_clip(args, 0)
        change(clip)
        return clip, baseline.make_towers(clip, tokenizer, args, {}), tokenizer(PROMPTS)
    return make


def through(tower, x):
    """Run a tower as training does: texts are cut at their end, prefix, then suffix."""
    if x.is_floating_point():
        return tower.suffix(tower.prefix(x))
    ids = x[:, :int(tower.ends(x).max()) + 1]
    return tower.suffix(tower.prefix(ids), ids)


@pytest.mark.parametrize("name, frozen", [
    *((name, frozen) for name in KNOWN for frozen in (None, 2, "depth", "all")),
    ("densenet", None), ("densenet", "all")])
def test_towers_equal_open_clips_own(towers, walks, name, frozen):
    """suffix(prefix(x)) gives open_clip's own embeddings, and what trains its gradients.

    What trains is all that open_clip's encoder uses, but what the last frozen block needs.
    """
    clip, pair, ids = towers(name, frozen)
    for which, x, encoder in (("image", images(), clip.visual), ("text", ids, clip.text)):
        want, depth = walks(name)[1][which], len(walks(name)[1][which].needs)
        got = through(pair[which], x)
        assert_close([got], [want.out])
        assert (want.out[0] - want.out[1]).norm() > 1e-3  # 100 times what is let pass
        if which == "image" and frozen in (2, "depth"):
            with torch.no_grad():
                first = pair[which].walk(x, 0, 1)
                assert torch.equal(pair[which].prefix(first, 1), pair[which].prefix(x))
        trains = {n for n, p in encoder.named_parameters() if p.requires_grad}
        if frozen is None:
            assert trains == set(want.grads)
        elif frozen == "all":
            assert not trains and not got.requires_grad
            continue
        else:
            last = min(depth, depth if frozen == "depth" else frozen)
            assert trains == set(want.grads) - want.needs[last - 1]
        objective(got).backward()
        grads = [(encoder.get_parameter(n).grad, want.grads[n]) for n in trains]
        for a, b in grads:
            assert (a - b).abs().max() <= 1e-4 * max(1, b.abs().max())
        a, b = (torch.cat([grad.flatten() for grad in side]) for side in zip(*grads))
        assert (a - b).norm() <= 1e-4 * b.norm() and b.norm() > 0.1
    assert all(p.grad is None for p in clip.parameters() if not p.requires_grad)


@pytest.mark.parametrize("frozen", [None, 2, "depth", "all"])
@pytest.mark.parametrize("name, early", [("vit", True), ("vit eos", True), ("vit avg", False),
                                         ("coca", False), ("siglip", False)])
def test_only_what_the_pooled_token_needs_is_computed(towers, name, early, frozen):
    """Where one token goes on, the last block's MLP runs for it alone, and texts end with it.

    Causal towers give the same for a text cut at its end; others read all tokens and padding.
    """
    _, pair, ids = towers(name, frozen)
    text, ends = pair["text"], pair["text"].ends(ids).tolist()
    assert text.trims is early
    assert ids.shape[1] == 77 or not early
    assert ends == [list(row).index(49407) if early else len(row) - 1 for row in ids.tolist()]
    with torch.no_grad():
        full = text.suffix(text.prefix(ids), ids)
        alone = [through(text, ids[i:i + 1]) for i in range(len(ids))]
        assert_close([through(text, ids), torch.cat(alone)], [full, full])
    for tower, x in ((pair["image"], images()), (text, ids)) if frozen != "all" else ():
        seen = []
        for block in tower.blocks:
            block.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
        with torch.no_grad():
            through(tower, x)
        assert len(seen) == len(tower.blocks)  # each block once, whichever is frozen
        assert set(seen[:-1]) == {max(seen)} and (seen[-1] == 1) is early and max(seen) > 1
        if tower.frozen == len(tower.blocks):
            assert (tower.prefix(x).shape[1] == 1) is early


# --- gradient checkpointing -----------------------------------------------------------------


def step(tower, x, *more):
    """Return (gradients, buffers, calls of each leaf module) of a training step of a tower."""
    tower.tune(baseline.parse_args(more))
    encoder = tower.encoder.train()
    calls = {name: [] for name, module in encoder.named_modules()
             if not list(module.children()) and list(module.parameters())}
    for name, called in calls.items():
        encoder.get_submodule(name).register_forward_pre_hook(
            lambda *_, called=called: called.append(1))
    objective(through(tower, x)).backward()
    return ({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None},
            {n: b.clone() for n, b in encoder.named_buffers()},
            {n: len(called) for n, called in calls.items()})


@pytest.mark.parametrize("name, frozen", [
    ("densenet", None), ("modified_resnet", None), ("modified_resnet", 2), ("efficientnet", 1),
    ("efficientnet", None), ("resnet", None), ("swin", 2), ("relpos", 1), ("pe core", None),
    ("vit", 1), ("coca", None), ("vit avg", 2)])
def test_gradient_checkpointing_recomputes_and_changes_nothing(towers, name, frozen):
    """What trains is computed twice, gradients are the same, statistics move once.

    An encoder whose blocks are unknown is recomputed as a whole: the flag is never ignored.
    """
    found = {"image": [], "text": []}
    for more in ([], ["--grad_checkpointing"]):
        _, pair, ids = towers(name, frozen)
        for which, steps in found.items():
            steps.append(step(pair[which], images() if which == "image" else ids, *more))
    for which, ((grads, buffers, calls), (again, moved, more_calls)) in found.items():
        assert grads.keys() == again.keys()
        for n, grad in grads.items():
            assert (again[n] - grad).abs().max() <= 1e-5 * max(1, grad.abs().max()), n
        assert all(torch.equal(moved[n], buffer) for n, buffer in buffers.items())
        twice = {n for n in calls if more_calls[n] == 2 * calls[n] > 0}
        assert all(more_calls[n] == calls[n] for n in calls if n not in twice)
        encoder = pair[which].encoder
        places = "transformer.resblocks" if which == "text" else FAMILIES[name][2]
        leaves = [{n for n in calls if encoder.get_submodule(n) in set(block.modules())}
                  for block in blocks_of(encoder, places)[frozen or 0:] or [encoder]]
        assert twice <= set.union(*leaves)
        # torch stops a recomputation where nothing more is needed
        assert all(len(twice & own) >= len(own) / 2 for own in leaves)


@pytest.mark.parametrize("more", [[], ["--grad_checkpointing"]])
def test_gradients_in_bf16_are_near_those_in_fp32(towers, more):
    """Whichever attention kernel half precision takes, the gradients are right to its rounding."""
    found = {"image": [], "text": []}
    for half in (False, True):
        _, pair, ids = towers("vit", 1)
        for which, seen in found.items():
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                grads, *_ = step(pair[which], images() if which == "image" else ids, *more)
            seen.append(torch.cat([grad.flatten() for grad in grads.values()]))
    for full, low in found.values():
        assert 0 < (full - low).norm() < 0.03 * full.norm()


# --- freezing -------------------------------------------------------------------------------

PARTIAL = ["--partial_freeze", "--freeze_layers", 2]


@pytest.mark.parametrize("name, more", [
    *((name, PARTIAL) for name in ("coca", "modified_resnet", "eva02", "swin", "relpos", "pe core",
                                   "efficientnet", "vit")),
    *((name, []) for name in ("coca", "modified_resnet", "efficientnet", "vit", "vit sin cos",
                              "densenet")),
    *((name, ["--freeze_clip"]) for name in ("efficientnet", "vit", "densenet")),
    *(("vit", [*more, "--cache", "off"]) for more in (["--freeze_clip"], PARTIAL, []))])
def test_frozen_stays_bit_identical_and_the_rest_moves(family, build, name, more):
    """Training moves all that the suffix alone needs, and a checkpoint holds just that.

    Frozen modules stay in eval mode, so BatchNorm does not drift there.
    """
    folder, walks = family(name)
    run = build(*more, "--lr", 1e-3, "--weight_decay", 0.1, "--epochs", 1, clip=folder)
    run.scorer.train()
    for tower in run.scorer.towers.values() if more[:3] == PARTIAL else ():
        assert not any(m.training for block in tower.blocks[:2] for m in block.modules())
        assert all(m.training for block in tower.blocks[2:] for m in block.modules())
    before, heads = ({n: v.clone() for n, v in module.state_dict().items()}
                     for module in (run.scorer.clip, run.scorer.quality))
    baseline.fit(run)
    after, state = run.scorer.clip.state_dict(), load(run.args.output_dir)["state"]
    moved = {n for n, v in before.items() if v.numpy().tobytes() != after[n].numpy().tobytes()}
    assert moved == {n.removeprefix("clip.") for n in state if n.startswith("clip.")}
    needed = set() if more[0:1] == ["--freeze_clip"] else {
        f"{place}.{n}" for place, want in (("visual", walks["image"]), ("text", walks["text"]))
        for n in set(want.grads) - (want.needs[1] if more[:3] == PARTIAL else set())}
    assert {n for n, _ in run.scorer.clip.named_parameters() if n in moved} == needed
    statistics = {n for n in before if n.endswith("running_mean")}
    assert statistics & moved == {n for n in statistics if n.replace(
        "running_mean", "weight") in needed}
    assert all(not torch.equal(heads[k], v) for k, v in run.scorer.quality.state_dict().items())


@pytest.mark.parametrize("frozen, learns", [(1, False), (None, True)])
def test_a_parameter_of_frozen_and_trained_blocks_does_not_train(towers, frozen, learns):
    """What a frozen block needs stays as it is, though a block that trains shares it."""
    def share(clip):
        blocks = clip.visual.transformer.resblocks
        blocks[3].mlp.c_fc.weight = blocks[0].mlp.c_fc.weight
    mlp = towers("vit", frozen, share)[0].visual.transformer.resblocks[3].mlp
    assert mlp.c_fc.weight.requires_grad is learns and mlp.c_fc.bias.requires_grad


@pytest.mark.parametrize("more, blocks", [
    (["--freeze_clip"], (4, 3)), ([], (0, 0)), (PARTIAL, (2, 2)), ([*PARTIAL[:2], 4], (4, 3))])
def test_setup_lines_count_blocks_and_parameters(build, capsys, more, blocks):
    """The lines about the towers say the true numbers."""
    capsys.readouterr()
    run = build(*more)
    lines = capsys.readouterr().out.splitlines()
    for tower, place, depth, frozen in (("image", "visual", 4, blocks[0]),
                                        ("text", "text", 3, blocks[1])):
        inside = list(run.scorer.clip.get_submodule(place).parameters())
        count, total = (sum(p.numel() for p in inside if p.requires_grad or of_all)
                        for of_all in (False, True))
        assert (f"{tower} tower: {frozen} of {depth} blocks frozen, {count / 1e6:.2f} M of "
                f"{total / 1e6:.2f} M parameters train") in lines


def test_freezing_that_cannot_be_is_refused(refused, family):
    """Too many blocks, with the depth and a value that works, none, or unknown ones."""
    said = refused("--partial_freeze", "--freeze_layers", 5)
    assert "at most 4" in said and "is 5" in said and "--freeze_layers 3" in said
    assert "at least 1" in refused("--partial_freeze", "--freeze_layers", 0)
    folder, _ = family("densenet")
    said = refused("--partial_freeze", "--freeze_layers", 1, clip=folder)
    assert "image tower" in said and "TimmModel" in said and "--freeze_clip" in said


# --- heads ----------------------------------------------------------------------------------

def scorer(*more):
    """Return a CLIPScorer without a CLIP, its heads filled with random weights."""
    args = baseline.parse_args(["--dropout", "0", *map(str, more)])
    identity = {"embed_dim": EMBED_DIM, "preprocess": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    made = baseline.CLIPScorer(torch.nn.Identity(), {}, identity, args)
    torch.manual_seed(0)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3)
    return made.eval()


def pairs(count=7):
    """Return random unit-norm image and text embeddings."""
    torch.manual_seed(3)
    return F.normalize(torch.randn(count, EMBED_DIM)), F.normalize(torch.randn(count, EMBED_DIM))


@pytest.mark.parametrize("two", [[], ["--use_two_branch"]])
@pytest.mark.parametrize("direct", [[], ["--no_residual_learning"]])
def test_score_formulas(two, direct):
    """Bases are the documented ones, with scale times delta on them or learned scores instead."""
    made = scorer("--residual_scale_q", 0.3, "--residual_scale_c", 0.15, *two, *direct)
    f, t = pairs()
    before, cosine = torch.linspace(-0.5, 0.5, len(f)), F.cosine_similarity(f, t)
    out, now = made.score(f, t, before), made.score(f, t)
    a, b, e = made.consistency.affine
    weights = made.quality.base.weight[0] * EMBED_DIM ** 0.5
    assert_close([out["q_base"]], [torch.sigmoid(f @ weights + made.quality.base.bias)])
    for scored, s0 in ((out, before), (now, cosine)):
        base = a * (s0 + 1) / 2 + b + e * out["q"]
        if two:
            mlp = torch.sigmoid(made.consistency.branch(baseline.pair_features(f, t, cosine)))
            base = (torch.sigmoid(a * s0 + b + e * out["q"]) + mlp) / 2
            assert mlp.std() > 0.01
        assert_close([scored["c_base"]], [base])
    assert torch.equal(out["c_delta"], now["c_delta"])  # it reads the cosine as it is now
    for target, scale in (("q", 0.3), ("c", 0.15)):
        delta = out[f"{target}_delta"]
        if not direct or two or target == "q":
            assert_close([out[target]], [out[f"{target}_base"] + scale * delta], 1e-6)
        assert not delta.any() if direct else delta.abs().min() > 0 and delta.std() > 0.01
    if direct and not two:
        made.consistency.affine.data.mul_(5)
        assert torch.equal(made.score(f, t)["c"], out["c"])  # CLIP's base is no part of it
        assert 0 < out["c"].min() and out["c"].max() < 1 and out["c"].std() > 0.01


def test_a_residual_stays_within_its_scale():
    """However large what the heads compute, no score is further from its base."""
    made = scorer("--residual_scale_q", 0.3, "--residual_scale_c", 0.15)
    for parameter in (*made.quality.delta.parameters(), *made.consistency.delta.parameters()):
        parameter.data.mul_(100)
    out = made.score(*pairs(50))
    for target, scale in (("q", 0.3), ("c", 0.15)):
        distance = (out[target] - out[f"{target}_base"]).abs().max()
        assert 0.99 * scale < distance <= scale + 1e-6


@pytest.mark.parametrize("more", [[], ["--use_two_branch"], ["--use_refinement"]])
def test_the_residual_starts_at_zero(build, more):
    """Before training, both scores are their bases, bit for bit."""
    out, _ = baseline.evaluate(build("--freeze_clip", *more), "val")
    assert np.array_equal(out["q"], out["q_base"]) and np.array_equal(out["c"], out["c_base"])
    assert np.ptp(out["q"]) > 0 and np.ptp(out["c"]) > 0


def test_refinement_corrects_a_detached_score_within_its_bound():
    """It reads image, text and coarse score, is within scale of it and sends it no gradient."""
    made, (f, t) = scorer("--use_refinement", "--refinement_layers", 1, "--refinement_heads", 2,
                          "--refinement_dim", 16, "--residual_scale_c", 0.1), pairs(30)
    out = made.score(f, t)
    distance = (out["c"] - out["c_coarse"]).abs()
    assert 0 < distance.min() and distance.max() <= 0.1 + 1e-6 and distance.std() > 1e-3
    refinement, heads = list(made.refinement.parameters()), list(made.consistency.parameters())
    grads = torch.autograd.grad(out["c"].sum(), refinement + heads, retain_graph=True,
                                allow_unused=True)
    assert all(g is None or not g.any() for g in grads[len(refinement):])
    assert all(g is not None for g in grads[:len(refinement)])
    assert all(g.any() for g in torch.autograd.grad(out["c_coarse"].sum(), heads))
    coarse = torch.linspace(0, 1, len(f))
    plain = made.refinement(f, t, coarse) - coarse
    for x in ((f.flip(0), t, coarse), (f, t.flip(0), coarse), (f, t, 1 - coarse)):
        assert not torch.allclose(made.refinement(*x) - x[2], plain, atol=1e-4)


@pytest.mark.parametrize("more", [[], ["--no_residual_learning"], ["--use_two_branch"],
                                  ["--use_refinement"]])
def test_quality_is_blind_to_the_prompt_and_learns_from_its_own_scores(more):
    """Shuffled prompts change consistency alone; it leans on quality, but sends it no gradient."""
    made, (f, t) = scorer(*more), pairs()
    plain, shuffled = made.score(f, t), made.score(f, t.roll(1, 0))
    assert all(torch.equal(plain[key], shuffled[key]) for key in ("q", "q_base", "q_delta"))
    assert (plain["c"] - shuffled["c"]).abs().min() > 1e-6
    assert set(torch.autograd.grad(plain["c"].sum(), list(made.quality.parameters()),
                                   allow_unused=True)) == {None}
    made.quality.base.bias.data += 1
    assert (made.score(f, t)["c_base"] - plain["c_base"]).abs().min() > 1e-4


def test_the_whole_scorer_sees_prompt_and_picture_in_float32(build):
    """With bf16 towers: prompts move c alone, a black picture both; scores are float32."""
    run = build("--partial_freeze", "--freeze_layers", 1, "--cache", "off", "--precision", "bf16")
    run.scorer.eval()
    for head in (run.scorer.quality, run.scorer.consistency):
        torch.nn.init.normal_(head.delta[-2].weight, 0, 0.3)
    views = baseline.plan_views(np.arange(0, 36, 4))  # a picture of each prompt
    pixels, prompts = decoded(run, views.row), run.table.frame["prompt_id"].to_numpy()

    def predict(pixels, prompts):
        run.table.frame["prompt_id"] = prompts
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            x = run.scorer.towers["image"].prefix(run.scorer.pixels(pixels))
            rows, _, texts = next(baseline.inputs(run, [views]))
            return baseline.forward(run, run.scorer, rows, x, texts)
    plain, other = predict(pixels, prompts), predict(pixels, np.roll(prompts, 4))
    black = predict(torch.zeros_like(pixels), prompts)
    assert {value.dtype for value in plain.values()} == {torch.float32}
    assert torch.equal(plain["q"], other["q"])
    for a, b in ((plain["c"], other["c"]), (plain["q"], black["q"]), (plain["c"], black["c"])):
        assert (a - b).abs().min() > 1e-6


@pytest.mark.parametrize("more, key", [
    ([], "q_delta"), ([], "c_delta"), (["--no_residual_learning"], "q"),
    (["--no_residual_learning"], "c"), (["--use_two_branch"], "c_base"),
    (["--use_refinement"], "refined"), (["--use_explanations"], "explanation")])
def test_dropout_reaches_every_head(more, key):
    """In training mode with dropout each head's output is random; without dropout it is not."""
    f, t = pairs()
    for dropout, random in ((0.5, True), (0, False)):
        made, found = scorer(*more, "--dropout", dropout), []
        for training in (False, False, True, True):
            out = made.train(training).score(f, t)
            found.append(out["c"] - out["c_coarse"] if key == "refined" else out[key])
        assert torch.equal(*found[:2]) and torch.equal(*found[2:]) is not random


# --- losses and explanations ----------------------------------------------------------------


def test_losses_follow_their_formulas():
    """Each image's losses: squared errors, the coarse score's too, and 1 - cosine."""
    torch.manual_seed(0)
    out = {name: torch.rand(4) for name in ("q", "c")} | {"explanation": torch.randn(4, 6)}
    batch = {"q": torch.rand(4), "c": torch.rand(4), "teacher": F.normalize(torch.randn(4, 6))}
    q, c = ((out[name] - batch[name]) ** 2 for name in ("q", "c"))
    cosine, coarse = F.cosine_similarity(out["explanation"], batch["teacher"]), torch.rand(4)
    for more, want in (({}, c), ({"c_coarse": coarse}, c + (coarse - batch["c"]) ** 2)):
        found = baseline.losses(out | more, batch)
        assert list(found) == ["q", "c", "exp"]
        assert_close(found.values(), [q, want, 1 - cosine])


def test_each_window_weighs_what_its_flags_say(build, data):
    """A window's weights are --w_<loss> / the images that have it: rows without one weigh 0."""
    run = build("--freeze_clip", "--use_explanations", "--w_q", 0.5, "--w_c", 0.25, "--w_exp", 2,
                "--batch_size", 4, "--grad_accum_steps", 2)
    views = baseline.plan_views(run.parts["train"], run.args, run.seed, 1)
    weights = baseline.loss_weights(run, views)
    told = {row["name"]: row["explanation"] for row in data.rows}
    has = np.array([told[name] != "" for name in run.table.frame["name"].iloc[views.row]])
    assert 0 < has.sum() < len(has) and len(views) % 8
    for start in range(0, len(views), 8):
        window = slice(start, start + 8)
        count = len(views[window])
        assert weights["q"][window] == pytest.approx([0.5 / count] * count)
        assert weights["c"][window] == pytest.approx([0.25 / count] * count)
        assert weights["exp"][window] == pytest.approx(2 * has[window] / has[window].sum())


def test_the_teacher_is_the_pretrained_text_tower_and_does_not_move(build, clips):
    """Training the whole CLIP leaves the explanations' targets where open_clip puts them."""
    run = build("--use_explanations", "--lr", 1e-3, "--epochs", 1)
    before = run.teacher.clone()
    tokens = open_clip.get_tokenizer(f"local-dir:{clips()}")(run.table.explanations)
    with torch.no_grad():
        want = reference(clips()).encode_text(tokens, normalize=True)
    rows = run.table.frame["explanation_id"].to_numpy()
    assert_close([before[rows >= 0]], [want[rows[rows >= 0]]])
    assert not run.teacher.requires_grad
    baseline.fit(run)
    assert torch.equal(run.teacher, before)
    assert 0.3 < run.progress["log"][0]["train_loss_exp"] < 2
