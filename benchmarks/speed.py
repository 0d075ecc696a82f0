"""Time this program against a plain training loop and against the bare limit, in one run.

    python benchmarks/speed.py --data_csv_path data/data.csv --image_base_dir data/images

(a) this program: first run, which is set-up with an empty cache and an epoch, and warm epoch
    (baseline.train_one_epoch with the cache filled).
(b) a plain loop, as most fine-tuning scripts have it: open_clip's default model, prompts padded to
    the full context, images decoded in every epoch, the whole forward pass, requires_grad=False on
    what is frozen, unfused AdamW.
(c) the limit: forward and backward of only what trains, on tensors that are already resident.
(d) the arithmetic of (a), from 24 N d^2 + 4 N^2 d floating-point operations per block of N tokens
    of width d (forward), over the best matrix-product rate at that precision, measured in every
    repetition beside the others.

Repetitions are interleaved and medians are printed, so that a busy machine slows all alike. Each
case has a process for the first run and one for the rest, so that the peak memory is that of (a)
with a warm cache: of the process, set-up included, or of the GPU's tensors.
"""

import argparse
import contextlib
import io
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import baseline  # noqa: E402  the file next door, not an installed package

CASES = {"freeze_clip": ["--freeze_clip"], "partial_freeze": ["--partial_freeze"], "full": []}


def parse_args():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data_csv_path", default="data/data.csv", help="CSV as for baseline.py")
    parser.add_argument("--image_base_dir", default="data/images", help="images of the CSV")
    parser.add_argument("--clip_model", default="ViT-B-32", help="open_clip model")
    parser.add_argument("--freeze_layers", type=int, default=8, help="for partial_freeze")
    parser.add_argument("--images", type=int, default=160, help="rows of the CSV; 80 %% train")
    parser.add_argument("--batch_size", type=int, default=32, help="images per step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of towers")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions")
    parser.add_argument("--cases", nargs="*", choices=[*CASES, "predict", "tune"],
                        default=list(CASES), help="what to time; predict: scoring by a partly "
                        "trained tower; tune: the whole flow of --tune, two epochs each")
    parser.add_argument("--num_workers", type=int, default=2,
                        help="decoding threads, of (b) processes")
    parser.add_argument("--whole", action="store_true",
                        help="also time whole commands: --freeze_clip --epochs 10, cold and again")
    parser.add_argument("--growth", type=int, nargs="*", default=[],
                        help="also time and memory of the partial run at these numbers of images")
    return parser.parse_args()


def write_subset(options, count, folder):
    """Write a CSV of `count` images, drawn evenly over the prompts, and return its path."""
    frame = pd.read_csv(options.data_csv_path, dtype=str, keep_default_na=False)
    path = Path(folder, f"subset_{count}.csv")
    frame.sample(min(count, len(frame)), random_state=0).to_csv(path, index=False)
    return path


def flags(options, case, csv, folder):
    """Return the baseline.py flags of one case."""
    frozen = CASES[case] + (["--freeze_layers", str(options.freeze_layers)]
                            if case == "partial_freeze" else [])
    return ["--data_csv_path", str(csv), "--image_base_dir", options.image_base_dir,
            "--clip_model", options.clip_model, "--pretrained", "none", "--precision",
            options.precision, "--batch_size", str(options.batch_size), "--num_workers",
            str(options.num_workers), "--output_dir", str(Path(folder, case)), *frozen]


def set_up(options, case, csv, folder):
    """Return the baseline.Run of one case, its cache filled."""
    args = baseline.parse_args(flags(options, case, csv, folder))
    with contextlib.redirect_stdout(io.StringIO()):
        return baseline.set_up(args, baseline.load_table(args), args.seed)


class PlainImages(torch.utils.data.Dataset):
    """Decode, preprocess and tokenise one image at a time, in every epoch."""

    def __init__(self, run, part, preprocess, tokens):
        self.frame = run.table.frame.iloc[run.parts[part]]
        self.preprocess, self.tokens = preprocess, tokens

    def __len__(self):
        return len(self.frame)

    def __getitem__(self, i):
        row = self.frame.iloc[i]
        image = self.preprocess(Image.open(row["path"]).convert("RGB"))
        return image, self.tokens[row["prompt_id"]], row["q"], row["c"]


class PlainLoop:
    """The training loop that most scripts have (see b), with the same heads and freezing."""

    def __init__(self, run, options):
        self.run, self.options, self.device = run, options, run.device
        with baseline.quiet_library():  # it says of every model that it is random
            self.clip, _, preprocess = open_clip.create_model_and_transforms(options.clip_model)
        # open_clip's default CLIP holds the text tower's entries as its own.
        state = {name.removeprefix("text."): value for name, value in
                 run.scorer.clip.state_dict().items()}
        self.clip.load_state_dict(state)
        self.clip.to(self.device)
        frozen = {name.removeprefix("text.") for name, p in run.scorer.clip.named_parameters()
                  if not p.requires_grad}
        for name, parameter in self.clip.named_parameters():
            parameter.requires_grad_(name not in frozen)
        dim = run.identity["embed_dim"]
        self.heads = nn.ModuleList([baseline.QualityHead(dim, run.args),
                                    baseline.ConsistencyHead(dim, run.args)]).to(self.device)
        tokens = open_clip.get_tokenizer(options.clip_model)(run.table.prompts)
        self.loaders = {part: torch.utils.data.DataLoader(
            PlainImages(run, part, preprocess, tokens), batch_size=options.batch_size,
            shuffle=part == "train", num_workers=options.num_workers) for part in ("train", "val")}
        trained = [p for p in [*self.clip.parameters(), *self.heads.parameters()]
                   if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=3e-5, fused=False)

    def score(self, image, text):
        """Return (quality, consistency) of a batch."""
        with baseline.autocast(self.options, self.device):
            f = self.clip.encode_image(image.to(self.device), normalize=True).float()
            t = self.clip.encode_text(text.to(self.device), normalize=True).float()
        q, s = self.heads[0](f)[0], (f * t).sum(-1)
        return q, self.heads[1](f, t, s, s, q.detach())[0]

    def epoch(self):
        """Train for one epoch."""
        self.clip.train()
        for image, text, quality, consistency in self.loaders["train"]:
            q, c = self.score(image, text)
            loss = (nn.functional.mse_loss(q, quality.to(self.device))
                    + nn.functional.mse_loss(c, consistency.to(self.device)))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()

    def validate(self):
        """Score the validation part once."""
        self.clip.eval()
        with torch.no_grad():
            for image, text, _, _ in self.loaders["val"]:
                self.score(image, text)


class Limit:
    """Forward, backward and update of only what trains, on resident tensors (see c)."""

    def __init__(self, run):
        self.run, self.batches = run, []
        for rows, x, text in baseline.inputs(run, epoch_batches(run)):
            self.batches.append(((x.clone(), *text, run.s0[rows]),
                                 {target: run.mos[target][rows] for target in baseline.TARGETS}))

    def epoch(self):
        """Run one epoch's batches."""
        run = self.run
        run.scorer.train()
        for inputs, batch in self.batches:
            with baseline.autocast(run.args, run.device):
                out = run.scorer(*inputs)
            loss = baseline.losses(out, batch)
            (loss["q"].mean() + loss["c"].mean()).backward()
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)


def epoch_batches(run):
    """Return the batches of views of an epoch of one process."""
    views = baseline.plan_views(run.parts["train"], run.args, run.seed, 1)
    return [batch for batch, _ in baseline.deal(views, run.args.batch_size)]


def block_flops(tokens, width, one_token=False):
    """Return forward operations of a block: 24 N d^2 + 4 N^2 d, or with one query token."""
    if one_token:
        return 4 * tokens * width ** 2 + 20 * width ** 2 + 4 * tokens * width
    return 24 * tokens * width ** 2 + 4 * tokens ** 2 * width


def trained_flops(run):
    """Return forward + backward operations of one warm epoch (backward: twice the forward).

    Blocks that train cost three forwards; a frozen prefix costs nothing when it is cached.
    """
    total = 0
    image, text = run.scorer.towers["image"], run.scorer.towers["text"]
    tokens = image.encoder.positional_embedding.shape[0]
    for batch in epoch_batches(run):
        unique = np.unique(run.table.frame["prompt_id"].to_numpy()[batch.row])
        length = int(run.texts.ends[unique].max()) + 1
        for tower, count, n in ((image, len(batch), tokens), (text, len(unique), length)):
            if tower.frozen == "all":
                continue
            depth = len(tower.blocks)
            own = sum(block_flops(n, tower.encoder.transformer.width, one_token=i == depth - 1)
                      for i in range(tower.frozen or 0, depth))
            total += 3 * count * own
    return total


def gemm_rate(precision, device, seconds=0.25):
    """Return the best measured operations per second of a matrix product at a precision."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best, count = 0.0, 50 if device.type == "cuda" else 1  # a single one is too short there
    for m, k, n in ((1600, 768, 3072), (1600, 3072, 768), (2048, 1024, 4096), (4096, 1024, 1024)):
        a, b = (torch.randn(shape, dtype=dtype, device=device) for shape in ((m, k), (k, n)))
        timed(lambda: a @ b)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            best = max(best, count * 2 * m * k * n / timed(lambda: [a @ b for _ in range(count)]))
    return best


def layer_shares(precision, device, rate, tokens=1600, inputs=768, outputs=3072, count=20):
    """Return {product: its share of a rate} of a linear layer's three matrix products.

    Their mean is what a training step of nothing but such products would reach.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, w, g = (torch.randn(shape, dtype=dtype, device=device)
               for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs)))
    products = {"forward": lambda: x @ w.T, "input gradient": lambda: g @ w,
                "weight gradient": lambda: g.T @ x}
    seconds = {name: statistics.median(timed(product) for _ in range(count))
               for name, product in products.items()}
    seconds["all three"] = sum(seconds.values()) / 3
    return {name: 2 * tokens * inputs * outputs / s / rate for name, s in seconds.items()}


def wait():
    """Wait for the GPU, where there is one, to finish what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function):
    """Return the seconds that a call takes."""
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def memory_mb():
    """Return (anonymous, file-backed, peak) resident megabytes of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "VmHWM"))


def peak_mb():
    """Return the peak megabytes so far: of the GPU where there is one, else of this process."""
    return (torch.cuda.max_memory_allocated() / 2 ** 20 if torch.cuda.is_available()
            else memory_mb()[2])


def in_process(function, *args):
    """Return what a function returns in a new process of its own."""
    # Its own children, the decoding workers of (b), are forked: they start anew in every epoch.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"),
                             multiprocessing.set_start_method, ("fork", True)) as pool:
        return pool.submit(function, *args).result()


def first_run(options, case, csv, folder):
    """Return the seconds of set-up with an empty cache and one epoch."""
    began = time.perf_counter()
    baseline.train_one_epoch(set_up(options, case, csv, folder), 1)
    wait()
    return time.perf_counter() - began


def compare(options, case, csv, folder, first):
    """Time (a), (b), (c) of one case, interleaved, and print the row.

    first: seconds of the first run. Returns those of the plain loop's epoch and its validation.
    """
    epochs = iter(range(1, 10_000))
    run = set_up(options, case, csv, folder)

    def ours():
        baseline.train_one_epoch(run, next(epochs))

    ours()
    peak = peak_mb()
    plain, limit = PlainLoop(run, options), Limit(run)
    limit.epoch()  # warm up: thread pools, allocators
    seconds, rates = {"a": [], "b": [], "c": []}, []
    quick = 5 if case == "freeze_clip" else 1  # millisecond epochs need more repetitions
    order = [("a", ours), ("c", limit.epoch)]
    for _ in range(options.rounds):
        seconds["b"].append(timed(plain.epoch))
        limit.epoch()  # (b) leaves the memory in pieces; a run of (a) never finds it so
        rates.append(gemm_rate(options.precision, run.device))
        for _ in range(quick):
            for name, function in order:
                seconds[name].append(timed(function))
        order.reverse()
    a, b, c = (statistics.median(seconds[name]) for name in "abc")
    images = len(run.parts["train"])
    used = trained_flops(run) / statistics.median(rates) / a
    print(f"| {case} | {images} | {b:.2f} | {first:.2f} | {a:.3f} | {c:.3f} | {images / a:.0f} | "
          f"{b / a:.1f} | {a / c:.2f} | {used:.2f} | {peak:.0f} |", flush=True)
    return b, timed(plain.validate)


def score_rates(options, csv, folder):
    """Print the images per second of --predict, of its bare forward and of a plain loop.

    The bare forward has decoded images and token ids at hand, and runs what scoring needs of both
    towers: the prefix once, the suffix before and after training. The plain loop has open_clip's
    default model and one image and prompt at a time, as most scoring scripts do.
    """
    argv = [*flags(options, "partial_freeze", csv, folder), "--epochs", "1", "--no_plots"]
    with contextlib.redirect_stdout(io.StringIO()):
        baseline.main(argv)
        checkpoint = Path(folder, "partial_freeze", "baseline_best.pt")
        scorer = baseline.load(checkpoint, batch_size=options.batch_size,
                               num_workers=options.num_workers)
    frame = pd.read_csv(csv, dtype=str, keep_default_na=False)
    paths = [Path(options.image_base_dir, name) for name in frame["name"]]
    prompts = list(frame["prompt"])
    steps = baseline.batches_of(len(paths), options.batch_size)
    decode = baseline.Decoder(paths, scorer.identity["preprocess"])
    pixels = [decode(rows)[0] for rows in steps]
    index, unique = pd.factorize(np.array(prompts, dtype=object))
    ids = baseline.TextInputs(scorer.towers[0]["text"], scorer.tokenizer, scorer.identity,
                              scorer.args, scorer.model.pixel_mean.device, "prompts", list(unique))
    index = torch.from_numpy(index).to(ids.device)
    clip, _, preprocess = open_clip.create_model_and_transforms(options.clip_model)
    tokenizer = open_clip.get_tokenizer(options.clip_model)

    @torch.no_grad()
    def bare():
        texts = torch.cat([scorer.embed("text", x, each) for x, each, _ in
                           ids.stream(baseline.batches_of(len(unique), 64))])
        for rows, images in zip(steps, pixels):
            scorer.outputs(images.to(index.device), texts[index[rows]])

    @torch.no_grad()
    def plain():
        model = clip.eval().to(index.device)
        for path, prompt in zip(paths, prompts):
            image = preprocess(Image.open(path).convert("RGB"))[None].to(index.device)
            f = model.encode_image(image, normalize=True)
            t = model.encode_text(tokenizer([prompt]).to(index.device), normalize=True)
            float((f * t).sum())

    work = {"--predict": lambda: list(scorer.scored(paths, prompts, steps)), "bare": bare,
            "plain": plain}
    seconds = {name: [] for name in work}
    for _ in range(options.rounds):
        for name, function in work.items():
            seconds[name].append(timed(function))
    ours, limit, loop = (len(paths) / statistics.median(each) for each in seconds.values())
    print(f"\nscoring, images/s: --predict {ours:.1f}, its bare forward {limit:.1f}, a plain loop "
          f"{loop:.1f}: {ours / limit:.2f} of the bare forward, {ours / loop:.1f}x the plain loop",
          flush=True)


def tuning_flow(options, csv, folder):
    """Time --tune, and what its candidates take as commands of their own with the plain loop.

    The plain loop's epoch and validation are timed once for each number of frozen blocks; start-up
    is not counted against it. What a later candidate costs beside its epochs is printed, too.
    """
    argv = [*flags(options, "partial_freeze", csv, folder), "--epochs", "2", "--no_plots",
            "--test_ratio", "0.2"]
    lines, began = [], time.perf_counter()
    with subprocess.Popen([sys.executable, "-u", baseline.__file__, *argv, "--tune"],
                          stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            lines.append((time.perf_counter() - began, line.strip()))
    whole = time.perf_counter() - began
    moments = [(moment, line) for moment, line in lines if line.startswith(("===", "stage "))]
    place, logs = Path(folder, "partial_freeze"), {}
    for log in place.glob("tuning/*/repeat_*/training_log.csv"):
        logs[log.parts[-3].replace("_", " ")] = pd.read_csv(log)["seconds"].sum()
    seen, beside = {}, []
    for (start, line), (end, _) in zip(moments, moments[1:]):
        if "does not apply" not in line:
            stage = line.removeprefix("=== ").split(":")[0]
            seen[stage] = seen.get(stage, -1) + 1
            beside.append(end - start - logs[f"{stage} {seen[stage]}"])
    depths = [baseline.parse_args([*argv, *words.split()]).freeze_layers for words in
              pd.read_csv(place / "tuning.csv", keep_default_na=False)["flags"]]
    plain = {depth: in_process(plain_epoch, options, argv, depth) for depth in {*depths}}
    loop = 2 * sum(plain[depth] for depth in depths)
    print(f"\n--tune, {len(depths)} candidates of two epochs: {whole:.0f} s; the same with the "
          f"plain loop: {loop:.0f} s, {loop / whole:.1f}x (an epoch and validation by frozen "
          f"blocks: {', '.join(f'{depth}: {each:.1f} s' for depth, each in plain.items())})\n"
          f"a candidate beside its epochs, s: {', '.join(f'{each:.1f}' for each in beside)}",
          flush=True)


def plain_epoch(options, argv, depth):
    """Return the seconds of an epoch and a validation of the plain loop."""
    args = baseline.parse_args([*argv, "--freeze_layers", str(depth)])
    with contextlib.redirect_stdout(io.StringIO()):
        plain = PlainLoop(baseline.set_up(args, baseline.load_table(args), args.seed), options)
    return timed(plain.epoch) + timed(plain.validate)


def whole_commands(options, csv, folder, plain):
    """Time `--freeze_clip --epochs 10` as whole commands, cold and again, start-up included.

    plain: seconds of the plain loop's epoch and validation; start-up is not counted against it.
    """
    script = str(Path(baseline.__file__))
    command = [sys.executable, script, *flags(options, "freeze_clip", csv, folder),
               "--epochs", "10", "--cache_dir", str(Path(folder, "whole_cache"))]
    cold, again = (timed(lambda: subprocess.run(command, check=True, capture_output=True))
                   for _ in range(2))
    print(f"\n--freeze_clip --epochs 10, whole command: cold {cold:.1f} s, again {again:.1f} s")
    for what, seconds in (("training and validation", sum(plain)), ("training alone", plain[0])):
        print(f"ten epochs of the plain loop, {what}: {10 * seconds:.0f} s, "
              f"{10 * seconds / cold:.1f}x cold, {10 * seconds / again:.1f}x again", flush=True)


def growth(options, counts, folder):
    """Print seconds and memory of a warm partial-freeze epoch as the number of images grows.

    Each count is a process of its own, after one that fills the cache.
    """
    print("\n| images | warm epoch s | cache MB | anonymous MB | file-backed MB | peak MB |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for count in counts:
        csv = write_subset(options, count, folder)
        in_process(fill_cache, options, csv, folder)
        in_process(measure_growth, options, csv, folder)


def fill_cache(options, csv, folder):
    """Fill the cache of the partial-freeze run."""
    set_up(options, "partial_freeze", csv, folder)


def measure_growth(options, csv, folder):
    """Print one row of the growth table."""
    run = set_up(options, "partial_freeze", csv, folder)
    baseline.train_one_epoch(run, 1)
    seconds = timed(lambda: baseline.train_one_epoch(run, 2))
    anonymous, mapped, peak = memory_mb()
    size = run.images.features.rows.nbytes / 1e6
    print(f"| {len(run.table.frame)} | {seconds:.2f} | {size:.0f} | {anonymous:.0f} | "
          f"{mapped:.0f} | {peak:.0f} |", flush=True)


def main():
    """Print the tables."""
    options = parse_args()
    device = baseline.pick_device(options)
    rate = gemm_rate(options.precision, device)
    print(f"{options.clip_model}, {options.precision}, batch {options.batch_size}, "
          f"{device}, {torch.get_num_threads()} threads, best matrix product "
          f"{rate / 1e9:.0f} GFLOP/s; a layer's products reach of it: " + ", ".join(
              f"{name} {share:.2f}" for name, share in
              layer_shares(options.precision, device, rate).items()) + "\n")
    print("| case | images | plain b, s | first a, s | warm a, s | limit c, s | images/s | b : a | "
          "a : c | of the GEMM rate | peak MB |\n| " + " | ".join(["---"] * 11) + " |")
    with tempfile.TemporaryDirectory() as folder:
        csv = write_subset(options, options.images, folder)
        plain = {}
        for case in [case for case in options.cases if case in CASES]:
            first = in_process(first_run, options, case, csv, folder)
            plain[case] = in_process(compare, options, case, csv, folder, first)
        if "predict" in options.cases:
            in_process(score_rates, options, csv, folder)
        if "tune" in options.cases:
            tuning_flow(options, csv, folder)
        if options.whole:
            whole_commands(options, csv, folder, plain["freeze_clip"])
        if options.growth:
            growth(options, options.growth, folder)


if __name__ == "__main__":
    main()
