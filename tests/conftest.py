"""Tiny data, tiny random CLIPs and an in-process way to run the program, for every test file."""

import csv
import json
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests hold on any machine: everything on the CPU
os.environ["OMP_NUM_THREADS"] = "1"  # nothing here is large enough to share; `-n` uses the cores

import numpy as np
import open_clip
import pytest
import starter
import torch
from PIL import Image
from safetensors.torch import save_file

import baseline

PROMPTS = ["a red house", "two dogs, playing", "the sea at night", "一只猫在睡觉", "a café 🎨 painting",
           "an old man reading a very long book in the garden", "green hills", "a city in rain",
           "portrait of a \"queen\""]
PER_PROMPT = 4
COLUMNS = ["name", "prompt", "mos_quality", "mos_align", "explanation"]
VISION = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
EMBED_DIM = 24
SOON = 20  # seconds that a stopped program may take on a busy machine
LONG = 120  # seconds that it may take to start, or to train a tiny run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Lift a test's limit on file sizes before pytest reports: its own output may be a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        return (yield)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each process half of the files, so that what a file's tests share is made once."""
    from xdist.scheduler import WorkStealingScheduling
    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def write_csv(path, rows, columns=COLUMNS, **options):
    """Write rows (dictionaries) as a CSV and return its path."""
    options = {"encoding": "utf-8", "lineterminator": "\n", **options}
    with open(path, "w", newline="", encoding=options.pop("encoding")) as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore", **options)
        writer.writeheader()
        writer.writerows(rows)
    return Path(path)


def read_csv(path):
    """Return a CSV's rows as dictionaries of text."""
    with open(path, newline="", encoding="utf-8-sig") as handle:
        return list(csv.DictReader(handle))


def read_json(path):
    """Return the content of a JSON file; NaN and Infinity, which JSON has not, are errors."""
    def refuse(constant):
        raise ValueError(constant)
    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


def draw(rng, width=48, height=40):
    """Return a random picture of coloured squares."""
    small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def write_data(folder, prompts=PROMPTS, per_prompt=PER_PROMPT, seed=0):
    """Write images and a CSV; quality follows brightness, every fourth explanation is empty."""
    rng = np.random.default_rng(seed)
    images = Path(folder, "images")
    images.mkdir(parents=True)
    rows = []
    for i in range(len(prompts) * per_prompt):
        image = draw(rng)
        name = f"img_{i:03d}.{'jpg' if i % 2 else 'png'}"
        image.save(images / name)
        rows.append({"name": name, "prompt": prompts[i // per_prompt],
                     "mos_quality": round(float(np.asarray(image).mean() / 255 * 5), 3),
                     "mos_align": round(float(rng.uniform(0, 5)), 3),
                     "explanation": "" if i % 4 == 0 else f"it shows {i % 7} things"})
    return SimpleNamespace(csv=write_csv(Path(folder, "data.csv"), rows), images=images, rows=rows)


def write_clip(folder, seed=0, vision=None, text=None, pretrained=True, **model):
    """Write a random CLIP for local-dir:; every weight is perturbed so that each one matters."""
    folder.mkdir(parents=True)
    config = {"embed_dim": EMBED_DIM, "vision_cfg": VISION if vision is None else vision,
              "text_cfg": {**TEXT, **(text or {})}, **model}
    preprocess = {"size": 32, "mode": "RGB", "mean": [0.48, 0.45, 0.4], "std": [0.27, 0.26, 0.28],
                  "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
    Path(folder, "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(seed)
    clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in clip.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.1 * torch.rand_like(buffer))
    if pretrained:
        save_file({k: v.contiguous() for k, v in clip.state_dict().items()},
                  Path(folder, "open_clip_model.safetensors"))
    return folder


@pytest.fixture(autouse=True)
def empty_shelf():
    """Let no run find what another test's run left in this process."""
    baseline.SHELF.clear()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """36 pictures of 9 prompts: csv, images, rows."""
    return write_data(tmp_path_factory.mktemp("data"))


TIMM = {"timm_model_pretrained": False, "image_size": 32}
VARIANTS = {
    "vit": {},
    "avg": {"vision": {**VISION, "pool_type": "avg"}},
    "bidirectional": {"text": {"no_causal_mask": True}},
    "quick": {"quick_gelu": True},
    "conv": {"vision": {**TIMM, "timm_model_name": "test_efficientnet", "timm_pool": "avg",
                        "timm_proj": "linear"}},
    "resnet": {"vision": {**TIMM, "timm_model_name": "test_resnet", "timm_pool": "avg",
                          "timm_proj": "linear"}},
    "timm_vit": {"vision": {**TIMM, "timm_model_name": "test_vit", "timm_pool": "token",
                            "timm_proj": "linear"}},
    "modified_resnet": {"vision": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16,
                                   "patch_size": None}},
}


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Return the folder of a tiny random CLIP by the name of its variant, written on first use."""
    root, made = tmp_path_factory.mktemp("clips"), {}

    def clip(name="vit"):
        if name not in made:
            made[name] = write_clip(root / name, **VARIANTS[name])
        return made[name]
    return clip


@pytest.fixture
def flags(data, clips, tmp_path):
    """Return the command line of a tiny run: flags(*more, out=.., clip=.., data=..)."""
    own = data

    def make(*more, out="out", clip="vit", data=None):
        data = data or own
        folder = clip if isinstance(clip, Path) else clips(clip)
        return ["--data_csv_path", str(data.csv), "--image_base_dir", str(data.images),
                "--clip_model", f"local-dir:{folder}", "--output_dir", str(tmp_path / out),
                "--num_workers", "0", "--epochs", "2", "--batch_size", "8", "--no_plots",
                *map(str, more)]
    return make


@pytest.fixture
def train(flags, tmp_path):
    """Run the program in this process; returns its row of results and `folder`, its output_dir."""
    def run(*more, out="out", **options):
        row = baseline.main(flags(*more, out=out, **options))
        return SimpleNamespace(folder=tmp_path / out, row=row)
    return run


@pytest.fixture
def build(flags):
    """Set a run up in this process without training it; returns a baseline.Run."""
    def make(*more, **options):
        args = baseline.parse_args(flags(*more, **options))
        return baseline.set_up(args, baseline.load_table(args), args.seed)
    return make


@pytest.fixture
def refused(flags, capsys):
    """Run a command line that must end with status 2; returns what it said on stderr."""
    def run(*more, **options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            baseline.main(flags(*more, **options))
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert "Traceback" not in said
        return said
    return run


class Program:
    """A run of the program in a process and a session of its own; see starter.py."""

    def __init__(self, context, folder, argv, tamper):
        self.files = [folder / "out", folder / "err"]
        for file in self.files:
            file.touch()
        self.process = context.Process(target=starter.run, args=(argv, self.files, tamper))
        self.process.start()

    @property
    def said(self):
        """All that was printed so far: the output, the errors."""
        return [file.read_text(encoding="utf-8") for file in self.files]

    def stop_at(self, text, number, group=False):
        """Wait for a text, send a signal (to the group: as a terminal does); return the status."""
        end = time.monotonic() + LONG
        while text not in self.said[0]:
            assert self.process.is_alive() and time.monotonic() < end, (text, self.said)
            time.sleep(0.01)
        (os.killpg if group else os.kill)(self.process.pid, number)
        return self.finish(SOON)

    def finish(self, timeout=LONG):
        """Wait for the end; returns the status, negative if a signal killed it."""
        self.process.join(timeout)
        return self.process.exitcode


@pytest.fixture(scope="session")
def context():
    """What forks a process that has imported the program."""
    context, here = multiprocessing.get_context("forkserver"), Path(__file__).parent
    context.set_forkserver_preload(["starter"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{here}{os.pathsep}{here.parent}")
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture
def start(context, tmp_path_factory):
    """Start the program; tamper: see starter.py. What runs at the end of the test is killed."""
    programs = []

    def run(argv, *tamper):
        programs.append(Program(context, tmp_path_factory.mktemp("said"), argv, tamper))
        return programs[-1]
    yield run
    for program in programs:
        program.process.kill()
        program.finish()


def decoded(run, rows):
    """Return the preprocessed (B, 3, H, W) uint8 pixels of some rows of a run."""
    images, errors = run.images.decode(np.asarray(rows))
    assert not errors
    return images


def load(folder, name="baseline_last.pt"):
    """Return a checkpoint, loaded as safely as it must be loadable."""
    return torch.load(Path(folder, name), map_location="cpu", weights_only=True)


def same_tensors(a, b):
    """Return whether two dictionaries hold the same tensors, bit for bit."""
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
