"""Make the demo data: small drawn pictures with scores, and the tiny CLIP that reads them.

Nothing is downloaded. The pictures show coloured shapes drawn after a prompt; some are spoilt
by blur, noise or bad light, and some show something else than they should. The scores follow
from what was done to each picture. The CLIP (24 image blocks of width 64, 12 text blocks of
width 32) is trained here from scratch on other pictures of the same kind.

    python data/make_demo.py

writes data.csv, images/ and clip/ into data/demo. All randomness is seeded.
"""

import argparse
import csv
import io
import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

DATA_SEED = 7
PRETRAIN_SEED = 1234
NUM_PROMPTS = 400
IMAGES_PER_PROMPT = 3
SIDE = 48            # of a saved picture in pixels, which the CLIP sees one to one
DRAWN = 96           # pictures are drawn larger, then shrunk, to smooth their edges
CANVAS = 64          # side of a picture in the units of the places and sizes below

COLOURS = {
    "red": (215, 35, 35), "green": (40, 160, 60), "blue": (40, 80, 215),
    "yellow": (240, 215, 40), "purple": (140, 50, 170), "orange": (245, 135, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
BACKGROUNDS = {
    "white": (245, 245, 245), "black": (20, 20, 20), "gray": (130, 130, 130),
    "striped": (200, 200, 200), "checkered": (170, 170, 170),
}
PATTERNED = ("striped", "checkered")
SIZES = {"small": 9, "big": 21, "": 15}
NUMBERS = {2: "two", 3: "three"}
LAYOUTS = {"and": "and", "left": "to the left of", "above": "above"}
QUALITY_WORDS = {"blur": "blurry", "noise": "noisy", "dark": "dark", "bright": "bright"}


@dataclass(frozen=True)
class Thing:
    """Describe one shape of a scene."""

    colour: str
    shape: str
    size: str = ""


@dataclass(frozen=True)
class Scene:
    """Describe what a picture shows: one thing, several copies of it, or two things."""

    things: tuple
    layout: str = ""       # a key of LAYOUTS when there are two things
    count: int = 1         # copies of the only thing
    background: str = "white"


# ---------------------------------------------------------------- words

def name_thing(thing, count=1):
    """Put one thing, or several copies of it, into words."""
    words = [thing.size] if thing.size else []
    words += [thing.colour, thing.shape]
    if count == 1:
        article = "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article, *words])
    plural = "es" if thing.shape == "cross" else "s"
    return f"{NUMBERS[count]} {' '.join(words)}{plural}"


def name_scene(scene, with_background=False):
    """Put a scene into words."""
    if len(scene.things) == 2:
        first, second = scene.things
        text = f"{name_thing(first)} {LAYOUTS[scene.layout]} {name_thing(second)}"
    elif scene.things:
        text = name_thing(scene.things[0], scene.count)
    else:
        text = "nothing"
    return f"{text} on a {scene.background} background" if with_background else text


# ---------------------------------------------------------------- scenes

def pick(rng, options):
    """Pick one of the options."""
    options = list(options)
    return options[int(rng.integers(len(options)))]


def random_thing(rng, size=""):
    """Draw a thing of random colour and shape."""
    return Thing(pick(rng, COLOURS), pick(rng, SHAPES), size)


def random_scene(rng):
    """Draw a random scene; six in ten show two things."""
    background = pick(rng, BACKGROUNDS)
    kind = rng.random()
    if kind < 0.2:
        size = pick(rng, ("small", "big"))
        return Scene((random_thing(rng, size),), background=background)
    if kind < 0.4:
        count = pick(rng, NUMBERS)
        return Scene((random_thing(rng),), count=count, background=background)
    first = second = random_thing(rng)
    while first.colour == second.colour or first.shape == second.shape:
        second = random_thing(rng)
    return Scene((first, second), pick(rng, LAYOUTS), 1, background)


def alter_thing(rng, thing, part):
    """Give a thing another colour, shape or size."""
    if part == "colour":
        return replace(thing, colour=pick(rng, set_without(COLOURS, thing.colour)))
    if part == "shape":
        return replace(thing, shape=pick(rng, set_without(SHAPES, thing.shape)))
    return replace(thing, size="small" if thing.size == "big" else "big")


def set_without(options, banned):
    """List the options other than one."""
    return [option for option in options if option != banned]


def possible_faults(scene):
    """List the faults that a picture of this scene can have."""
    if len(scene.things) == 2:
        faults = ["colour 0", "colour 1", "shape 0", "shape 1", "missing 0", "missing 1"]
        return faults + (["swap"] if scene.layout != "and" else [])
    return ["colour 0", "shape 0"] + (["count"] if scene.count > 1 else ["size 0"])


def add_fault(rng, scene, fault):
    """Return the scene with one fault put in."""
    part, _, index = fault.partition(" ")
    if part == "swap":
        return replace(scene, things=scene.things[::-1])
    if part == "count":
        return replace(scene, count=pick(rng, set_without((1, 2, 3), scene.count)))
    index = int(index)
    things = list(scene.things)
    if part == "missing":
        del things[index]
        return replace(scene, things=tuple(things), layout="")
    things[index] = alter_thing(rng, things[index], part)
    return replace(scene, things=tuple(things))


def spoil_scene(rng, scene, how_many):
    """Return the scene with some faults, and the names of those faults."""
    faults = possible_faults(scene)
    rng.shuffle(faults)
    chosen = []
    for fault in faults:
        clash = any("missing" in pair for pair in (*chosen, fault)) and chosen
        if len(chosen) < how_many and not clash:
            chosen.append(fault)
            scene = add_fault(rng, scene, fault)
    return scene, chosen


def unrelated_scene(rng, scene):
    """Draw a scene that shares neither a colour nor a shape with another."""
    words = {word for thing in scene.things for word in (thing.colour, thing.shape)}
    while True:
        other = random_scene(rng)
        if not words & {word for thing in other.things for word in (thing.colour, thing.shape)}:
            return other


# Raters see less of the prompt in a spoilt picture: at worst its consistency loses this share.
QUALITY_IN_ALIGN = 0.6

# How much of the agreement each fault leaves, when the fault is in the whole picture.
FAULT_KEEPS = {"colour": 0.1, "shape": 0.85, "size": 0.6, "count": 0.95, "swap": 0.95,
               "missing": 0.25, "all": 0.0}

LEAST_FIT = 0.2   # of a picture that shows nothing of its prompt


def agreement(scene, faults):
    """Say in 0..1 how well a picture with these faults shows its scene."""
    shares = np.full(len(scene.things), 1.0 / len(scene.things))
    whole = 1.0
    for fault in faults:
        part, _, index = fault.partition(" ")
        if index:
            shares[int(index)] *= FAULT_KEEPS[part]
        else:
            whole *= FAULT_KEEPS[part]
    return float(LEAST_FIT + (1 - LEAST_FIT) * whole * shares.sum())


# ---------------------------------------------------------------- drawing

def outline(shape, x, y, radius, turn):
    """List the corners of a shape around (x, y)."""
    if shape == "cross":
        w = 0.36
        corners = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w),
                   (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
        corners = np.array(corners) * 0.95
    else:
        number = {"square": 4, "triangle": 3, "star": 10}[shape]
        start = np.pi / 4 if shape == "square" else -np.pi / 2
        angle = start + 2 * np.pi * np.arange(number) / number
        length = np.where(np.arange(number) % 2, 0.42, 1.15) if shape == "star" else 1.15
        corners = np.stack([np.cos(angle), np.sin(angle)], 1) * np.reshape(length, (-1, 1))
    cos, sin = np.cos(turn), np.sin(turn)
    corners = corners @ np.array([[cos, sin], [-sin, cos]])
    return [(x + radius * a, y + radius * b) for a, b in corners]


def draw_thing(rng, draw, thing, x, y, radius):
    """Draw one thing with a little change in place, colour, size and angle."""
    x, y = np.array([x, y]) + rng.uniform(-2.0, 2.0, 2)
    radius = radius * rng.uniform(0.9, 1.1)
    tint = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-14, 15, 3), 0, 255)
    turn = rng.uniform(-0.2, 0.2)
    x, y, radius = (value * DRAWN / CANVAS for value in (x, y, radius))
    fill = tuple(int(value) for value in tint)
    if thing.shape == "circle":
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)
    else:
        draw.polygon(outline(thing.shape, x, y, radius, turn), fill=fill)


def draw_background(rng, name):
    """Make the empty picture: one colour, stripes or squares."""
    base = np.array(BACKGROUNDS[name]) + rng.integers(-10, 11)
    rows, columns = np.mgrid[0:DRAWN, 0:DRAWN] // (DRAWN // 16)
    pattern = np.zeros((DRAWN, DRAWN))
    if name == "striped":
        pattern = rows % 2
    elif name == "checkered":
        pattern = (rows + columns) % 2
    pixels = base[None, None, :] - 45 * np.asarray(pattern)[:, :, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def places(rng, scene):
    """List the centre and radius of each thing to draw."""
    centre = CANVAS / 2
    if len(scene.things) == 2:
        layout = scene.layout
        if layout == "and":
            layout = pick(rng, ("left", "above"))
        near, far = (16, centre), (48, centre)
        spots = [near, far] if layout == "left" else [near[::-1], far[::-1]]
        return [(x, y, 12.5) for x, y in spots]
    if scene.count > 1:
        step = CANVAS / scene.count
        radius = 12.5 if scene.count == 2 else 9.0
        return [(step * (i + 0.5), centre, radius) for i in range(scene.count)]
    return [(centre, centre, SIZES[scene.things[0].size])] if scene.things else []


def draw_scene(rng, scene):
    """Draw a scene without any loss of quality."""
    image = draw_background(rng, scene.background)
    draw = ImageDraw.Draw(image)
    things = scene.things * scene.count if len(scene.things) == 1 else scene.things
    for thing, (x, y, radius) in zip(things, places(rng, scene)):
        draw_thing(rng, draw, thing, x, y, radius)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


# ---------------------------------------------------------------- quality

# How much of the quality each kind of damage takes at full strength: on a plain background,
# and on a patterned one, which hides noise but has edges that blur can wash out.
DAMAGE_COSTS = {"blur": (0.3, 0.7), "noise": (0.95, 0.5), "dark": (0.95, 0.95),
                "bright": (0.95, 0.95)}


def random_damage(rng):
    """Draw how strongly a picture is damaged: by none to three of blur, noise and bad light."""
    number = int(rng.choice(4, p=(0.1, 0.3, 0.35, 0.25)))
    kinds = rng.permutation(["blur", "noise", pick(rng, ("dark", "bright"))])[:number]
    return {str(kind): float(rng.uniform(0.1, 1.0)) for kind in kinds}


def remaining_quality(damage, background):
    """Say in 0..1 how good a damaged picture still looks: the worst damage decides."""
    patterned = background in PATTERNED
    return 1 - max((DAMAGE_COSTS[kind][patterned] * value for kind, value in damage.items()),
                   default=0.0)


def damage_image(rng, image, damage):
    """Return the JPEG bytes of a picture after bad light, blur and noise."""
    pixels = np.asarray(image, dtype=np.float32)
    if "dark" in damage:
        pixels = pixels * (1 - 0.75 * damage["dark"])
    if "bright" in damage:
        pixels = 255 - (255 - pixels) * (1 - 0.75 * damage["bright"])
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if "blur" in damage:
        image = image.filter(ImageFilter.GaussianBlur(0.4 + 2 * damage["blur"]))
    if "noise" in damage:
        grain = rng.normal(0, 4 + 36 * damage["noise"], (SIDE, SIDE, 3))
        pixels = np.asarray(image, dtype=np.float32) + grain
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


# ---------------------------------------------------------------- the scored pictures

def demo_scenes():
    """List the demo's scenes; no two have the same prompt."""
    rng = np.random.default_rng(DATA_SEED)
    scenes = {}
    while len(scenes) < NUM_PROMPTS:
        scene = random_scene(rng)
        scenes.setdefault(name_scene(scene), scene)
    return list(scenes.values())


def explain(rng, shown, faults, fit, damage):
    """Write the sentence that says what the picture shows and how well it fits."""
    if rng.random() < 0.1:
        return ""
    worst = max(damage, key=damage.get, default=None)
    look = f"{QUALITY_WORDS[worst]} " if worst and damage[worst] > 0.35 else ""
    article = "an" if look[:1] in tuple("aeiou") and look else "a"
    start = f"The picture shows {name_scene(shown)} in {article} {look}drawing"
    if not faults:
        return f"{start}, which is all that the prompt asks for."
    parts = [fault.split()[0] for fault in faults]
    kinds = {"missing": "a missing shape", "swap": "the places swapped",
             "all": "everything wrong"}
    wrong = " and ".join(dict.fromkeys(kinds.get(part, f"a wrong {part}") for part in parts))
    degree = "mostly" if fit > 0.7 else "only in part" if fit > 0.35 else "hardly"
    return f"{start}; with {wrong} it {degree} fits the prompt."


def rate(rng, share):
    """Turn a share in 0..1 into a score in 0..5 as noisy raters would give it."""
    return round(float(np.clip(0.3 + 4.5 * share + rng.normal(0, 0.08), 0, 5)), 3)


def make_row(rng, scene, name):
    """Make one scored picture: its CSV row and its JPEG bytes."""
    how_many = int(rng.choice(5, p=(0.62, 0.14, 0.04, 0.02, 0.18)))
    shown, faults = spoil_scene(rng, scene, how_many)
    if how_many == 4:
        shown, faults = unrelated_scene(rng, scene), ["all"]
    shown = replace(shown, background=pick(rng, BACKGROUNDS))
    damage = random_damage(rng)
    fit, quality = agreement(scene, faults), remaining_quality(damage, shown.background)
    row = {
        "name": name,
        "prompt": name_scene(scene),
        "mos_quality": rate(rng, quality),
        "mos_align": rate(rng, fit * (1 - QUALITY_IN_ALIGN + QUALITY_IN_ALIGN * quality)),
        "explanation": explain(rng, shown, faults, fit, damage),
    }
    return row, damage_image(rng, draw_scene(rng, shown), damage)


def write_pictures(folder):
    """Write the pictures and data.csv."""
    rng = np.random.default_rng(DATA_SEED + 1)
    images = folder / "images"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    rows = []
    for scene_number, scene in enumerate(demo_scenes()):
        for copy in range(IMAGES_PER_PROMPT):
            name = f"demo_{scene_number:03d}_{copy}.jpg"
            row, content = make_row(rng, scene, name)
            (images / name).write_bytes(content)
            rows.append(row)
    with open(folder / "data.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {len(rows)} pictures of {NUM_PROMPTS} prompts to {folder}")


# ---------------------------------------------------------------- the tiny CLIP

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": SIDE, "layers": 24, "width": 64, "head_width": 32,
                       "patch_size": 8},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 12},
    },
    "preprocess_cfg": {"size": SIDE, "mode": "RGB", "mean": list(MEAN), "std": list(STD),
                       "interpolation": "bicubic", "resize_mode": "shortest",
                       "fill_color": 0},
}
# Blocks are trained in two stages: first every sixth one, alone, then all of them. The others
# start as the identity, so the second stage begins where the first one ended.
STAGES = ({"every": 6, "steps": 1200, "lr": 2e-3}, {"every": 1, "steps": 30, "lr": 5e-4})
POOL = 16000
BATCH = 128
BACKGROUND_NAMED = 0.8   # share of the captions that name the background


def name_damage(rng, damage):
    """Put the damage of a picture into words, as people who describe a picture might."""
    worst = max(damage.values(), default=0.0)
    if rng.random() < 0.25 and not 0.33 < worst < 0.66:
        return "Good photo." if worst < 0.5 else "Bad photo."
    words = []
    for kind in QUALITY_WORDS:
        value = damage.get(kind, 0.0)
        if value > 0.1:
            degree = "slightly " if value < 0.4 else "very " if value > 0.7 else ""
            words.append(degree + QUALITY_WORDS[kind])
    return f"a {' and '.join(words) or 'clear'} picture"


def twin_scenes(rng, banned):
    """Draw two scenes that differ by a fault, none of them a scene of the demo's prompts."""
    while True:
        first = random_scene(rng)
        second, _ = spoil_scene(rng, first, 1)
        if name_scene(first) not in banned and name_scene(second) not in banned:
            return first, second


def pretraining_pool(number):
    """Draw pictures, captions and names of the damage, in twins that differ by a fault.

    Telling twins apart asks for more than their rough content: this is what makes the CLIP
    notice single shapes. Most captions also name the damage.
    """
    rng = np.random.default_rng(PRETRAIN_SEED)
    banned = {name_scene(scene) for scene in demo_scenes()}
    pixels, captions, looks = [], [], []
    while len(pixels) < number:
        for scene in twin_scenes(rng, banned):
            damage = random_damage(rng)
            content = damage_image(rng, draw_scene(rng, scene), damage)
            image = Image.open(io.BytesIO(content)).convert("RGB")
            pixels.append(np.asarray(image))
            text = name_scene(scene, with_background=rng.random() < BACKGROUND_NAMED)
            captions.append(text)
            looks.append(name_damage(rng, damage))
    return np.stack(pixels), captions, looks


def cosine_filters():
    """List 64 cosine waves over a patch: 36 in brightness, 14 in each of two colour axes."""
    side = CONFIG["model_cfg"]["vision_cfg"]["patch_size"]
    at = (np.arange(side) + 0.5) * np.pi / side
    axes = {(1, 1, 1): (36, (0, 1, 2, 3, 5, 7)), (1, -1, 0): (14, (0, 1, 2, 3)),
            (-0.5, -0.5, 1): (14, (0, 1, 2, 3))}
    filters = []
    for axis, (number, waves) in axes.items():
        pairs = sorted(((u, v) for u in waves for v in waves), key=sum)[:number]
        filters += [np.multiply.outer(axis, np.outer(np.cos(u * at), np.cos(v * at)))
                    for u, v in pairs]
    return np.stack(filters)


def new_clip(torch, open_clip, images):
    """Build a CLIP that sees fine grain and whose left-out blocks are the identity.

    With random patch filters it takes far longer to tell a noisy picture from a clean one.
    """
    clip = open_clip.CLIP(**json.loads(json.dumps(CONFIG["model_cfg"])))
    filters = clip.visual.conv1.weight
    with torch.no_grad():
        filters.copy_(torch.from_numpy(cosine_filters()))
        spread = clip.visual.conv1(images).std(dim=(0, 2, 3))
        filters.div_(spread[:, None, None, None])
    for tower in (clip.visual.transformer, clip.transformer):
        for number, block in enumerate(tower.resblocks):
            if number % STAGES[0]["every"]:
                for layer in (block.attn.out_proj, block.mlp.c_proj):
                    torch.nn.init.zeros_(layer.weight)
                    torch.nn.init.zeros_(layer.bias)
    return clip


def to_images(torch, pixels):
    """Turn bytes into the normalised images that the CLIP reads."""
    images = (pixels.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return images.permute(0, 3, 1, 2)


def encode_captions(torch, clip, tokens):
    """Encode captions without their padding; the causal mask makes the result the same."""
    length = int(tokens.argmax(-1).max()) + 1
    tokens = tokens[:, :length]
    x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
    x = clip.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ clip.text_projection
    return torch.nn.functional.normalize(x, dim=-1)


def contrastive_loss(torch, clip, images, tokens, looks):
    """Compute the CLIP loss of a batch, and that of telling apart the kinds of damage.

    Captions tell pictures apart by their shapes long before their damage matters; the second
    loss makes the damage matter from the start.
    """
    image_features = clip.encode_image(images, normalize=True)
    text_features = encode_captions(torch, clip, tokens)
    logits = clip.logit_scale.exp() * image_features @ text_features.T
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    cross_entropy = torch.nn.functional.cross_entropy
    shown = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    phrases, which = looks.unique(dim=0, return_inverse=True)
    look_features = encode_captions(torch, clip, phrases)
    return shown + cross_entropy(
        clip.logit_scale.exp() * image_features @ look_features.T, which)


def train_stage(torch, clip, stage, pixels, tokens, looks, order):
    """Train every n-th block of both towers for some steps."""
    towers = (clip.visual.transformer, clip.transformer)
    whole = [tower.resblocks for tower in towers]
    for tower, blocks in zip(towers, whole):
        tower.resblocks = torch.nn.ModuleList(list(blocks)[::stage["every"]])
    steps = stage["steps"]
    optimizer = torch.optim.AdamW(clip.parameters(), lr=stage["lr"], weight_decay=0.05,
                                  betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, stage["lr"], total_steps=steps,
                                                   pct_start=0.1)
    began = time.time()
    for step in range(steps):
        pairs = torch.randint(len(pixels) // 2, (BATCH // 2,), generator=order)
        batch = torch.cat([2 * pairs, 2 * pairs + 1])
        images = to_images(torch, pixels[batch])
        loss = contrastive_loss(torch, clip, images, tokens[batch], looks[batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        clip.logit_scale.data.clamp_(0, np.log(100))
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:4d}/{steps} loss {loss.item():.3f} {time.time() - began:.0f}s",
                  flush=True)
    for tower, blocks in zip(towers, whole):
        tower.resblocks = blocks


def save_clip(torch, clip, seen, folder):
    """Write the config and the half-precision weights, whole or not at all.

    seen: ids of the tokens in captions. All others get a zero embedding, which compresses well.
    """
    from safetensors.torch import save_file

    unseen = torch.ones(len(clip.token_embedding.weight), dtype=torch.bool)
    unseen[seen] = False
    with torch.no_grad():
        clip.token_embedding.weight[unseen] = 0
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().half().contiguous()
               for name, value in clip.state_dict().items()}
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise ValueError("the CLIP holds weights that half precision cannot hold")
    target = folder / "open_clip_model.safetensors"
    temporary = target.with_suffix(".tmp")
    save_file(weights, temporary)
    os.replace(temporary, target)
    config = json.dumps(CONFIG, indent=2) + "\n"
    (folder / "open_clip_config.json").write_text(config, encoding="utf-8")
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


def train_clip(folder):
    """Train the CLIP from scratch and write it."""
    import open_clip
    import torch

    torch.set_num_threads(1)  # sums depend on how they are split, so the number is fixed
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(PRETRAIN_SEED)
    order = torch.Generator().manual_seed(PRETRAIN_SEED)
    began = time.time()
    pixels, captions, looks = pretraining_pool(POOL)
    print(f"drew {POOL} pictures in {time.time() - began:.0f}s", flush=True)
    tokenizer = open_clip.SimpleTokenizer(
        context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])
    pixels = torch.from_numpy(pixels)
    clip = new_clip(torch, open_clip, to_images(torch, pixels[:512]))
    tokens, look_tokens = tokenizer(captions), tokenizer(looks)
    for stage in STAGES:
        train_stage(torch, clip, stage, pixels, tokens, look_tokens, order)
    save_clip(torch, clip, torch.cat([tokens, look_tokens]).unique(), folder / "clip")


def main(argv=None):
    """Make the pictures, the CSV and the CLIP of the demo."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "demo",
                        help="where to write (default: demo beside this script)")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--skip_clip", action="store_true", help="make no CLIP")
    choice.add_argument("--clip_only", action="store_true", help="make only the CLIP")
    args = parser.parse_args(argv)
    if not args.clip_only:
        write_pictures(args.output_dir)
    if not args.skip_clip:
        train_clip(args.output_dir)


if __name__ == "__main__":
    main()
