"""Compare crops at native scale with larger whole images, by linear probes on a frozen CLIP.

    python benchmarks/crops.py --data_csv_path data/data.csv --image_base_dir data/images \\
        --clip_model local-dir:encoder --sizes 288 512 640 --crops 288

Each row of the table is a way of looking at an image: the whole at a size; the mean of five crops
(corners and centre) of a size at the image's own scale; both beside each other. Consistency's
cosine is always the whole image's. By prompt, SROCC on the test parts of several splits; the gain
is over the whole at the model's own size, its interval the corrected one of repeated splits. Work
is the number of pixels that the tower reads, over that of the whole at the model's own size.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import baseline  # noqa: E402  the file next door, not an installed package


def parse_args():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data_csv_path", default="data/data.csv", help="CSV as for baseline.py")
    parser.add_argument("--image_base_dir", default="data/images", help="images of the CSV")
    parser.add_argument("--clip_model", required=True, help="with its weights: local-dir:PATH ..")
    parser.add_argument("--sizes", type=int, nargs="+", required=True,
                        help="pixels of whole images; the first is what gains are over")
    parser.add_argument("--crops", type=int, nargs="*", default=[], help="pixels of crops")
    parser.add_argument("--splits", type=int, default=5, help="seeds 42, 43, ..")
    return parser.parse_args()


def crops_of(image, size):
    """Return five crops of a PIL image, or what there is of it where it is not larger."""
    width, height = (max(size, side) for side in image.size)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image)
    corners = {(0, 0), (width - size, 0), (0, height - size), (width - size, height - size),
               ((width - size) // 2, (height - size) // 2)}
    return [canvas.crop((x, y, x + size, y + size)) for x, y in sorted(corners)]


@torch.inference_mode()
def embeddings(options, table, size, cropped):
    """Return (image (N, D), text (N, D)) unit-norm embeddings at a size, float64."""
    args = baseline.parse_args(["--clip_model", options.clip_model, "--image_size", str(size),
                                "--freeze_clip"])
    device = baseline.pick_device(args)
    clip, tokenizer, identity = baseline.load_clip(args, 42)
    scorer = baseline.CLIPScorer(clip, baseline.make_towers(clip, tokenizer, args, {}), identity,
                                 args).to(device).eval()
    decode = baseline.Decoder(table.frame["path"], identity["preprocess"] | {"size": size})

    def views(rows):
        if not cropped:
            return decode(rows)[0][:, None]
        crops = [crops_of(baseline.load_image(decode.paths[row]), size) for row in rows]
        return [torch.from_numpy(np.stack(each)).permute(0, 3, 1, 2) for each in crops]

    out = []
    steps = baseline.batches_of(len(table.frame), 16)
    for images in baseline.ahead(views, steps, 2, turns=device.type == "cpu"):
        pixels = scorer.pixels(torch.cat([*images]).to(device))
        each = scorer.towers["image"].prefix(pixels).split([len(image) for image in images])
        out += [F.normalize(of.double().mean(0), dim=0) for of in each]
    text = scorer.towers["text"].prefix(tokenizer(table.prompts).to(device)).double()
    return torch.stack(out), text[table.frame["prompt_id"].to_numpy(copy=True)]


def probe(f, whole, t, table, parts):
    """Return the SROCC of linear probes on the test part: quality, consistency."""
    frame, s = table.frame, (whole * t).sum(-1)
    product = whole * t * whole.shape[1] ** 0.5
    inputs = {"q": (f, torch.ones_like(s)[:, None]),
              "c": (torch.cat([f, t, product], 1), torch.stack([torch.ones_like(s), s], 1))}
    found = []
    for target, (x, free) in inputs.items():
        weights, others, _ = baseline.fit_ridge(
            x, free, *baseline.training_scores(frame, target, parts["train"], x))
        pred = (x @ weights + free @ others).cpu().numpy()[parts["test"]]
        found.append(scipy.stats.spearmanr(pred, frame[target].iloc[parts["test"]])[0])
    return found


def main():
    """Print a row per way of looking at the images."""
    options = parse_args()
    args = baseline.parse_args(["--data_csv_path", options.data_csv_path, "--image_base_dir",
                                options.image_base_dir, "--test_ratio", "0.2"])
    table = baseline.load_table(args)
    splits = [baseline.split_rows(table, args, 42 + i) for i in range(options.splits)]
    ratio = len(splits[0]["test"]) / len(splits[0]["train"])
    own, ways, cropped = options.sizes[0], {}, {}
    for size in options.sizes:
        f, t = embeddings(options, table, size, cropped=False)
        ways[f"whole at {size}"] = f, f, t, (size / own) ** 2
    for size in options.crops:
        cropped[size] = embeddings(options, table, size, cropped=True)[0]
    for size, crops in cropped.items():
        work = 5 * (size / own) ** 2
        for name in [f"whole at {each}" for each in options.sizes]:
            _, f, t, alone = ways[name]
            ways[f"{name} beside five crops of {size}"] = torch.cat([f, crops], 1), f, t, (
                alone + work)
        ways[f"mean of five crops of {size}"] = crops, ways[f"whole at {own}"][1], t, 1 + work
    print("| | work | SROCC quality | consistency | gain in quality | in consistency |\n"
          + "| --- " * 6 + "|")
    first = None
    for name, (f, whole, t, work) in ways.items():
        found = np.array([probe(f, whole, t, table, parts) for parts in splits])
        first = found if first is None else first
        gain = found - first
        half = baseline.split_margin(gain.std(axis=0, ddof=1), len(splits), ratio)
        cells = [f"{m:.3f} +- {sd:.3f}" for m, sd in zip(found.mean(0), found.std(0, ddof=1))]
        cells += [f"{m:+.3f} ({m - h:+.3f} to {m + h:+.3f})" for m, h in zip(gain.mean(0), half)]
        print(f"| {name} | {work:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
