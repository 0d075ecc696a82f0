"""Measure what --init_from is worth: a run on some generators adapted to others, with and without.

    python benchmarks/transfer.py --data_csv_path data/data.csv --image_base_dir data/images \\
        --source sd1.5 AttnGAN glide --target midjourney DALLE2 xl2.2 -- \\
        --clip_model local-dir:encoder --partial_freeze --freeze_layers 3

What follows -- is given to every run. The generator is the first part of an image's name. In each
repetition a fifth of the prompts is held out of all runs, the source run's included: the target
generators' images of them are the test part. Of the other prompts the adapted runs get a share,
of which they take a fifth as validation.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import baseline  # noqa: E402  the file next door, not an installed package


def parse_args():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data_csv_path", default="data/data.csv", help="CSV as for baseline.py")
    parser.add_argument("--image_base_dir", default="data/images", help="images of the CSV")
    parser.add_argument("--source", nargs="+", required=True, help="generators of the source run")
    parser.add_argument("--target", nargs="+", required=True, help="those that it is adapted to")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2, 1.0],
                        help="of the prompts that are not held out")
    parser.add_argument("--repeats", type=int, default=3, help="seeds 42, 43, ..")
    parser.add_argument("flags", nargs="*", help="of baseline.py, after --")
    return parser.parse_args()


def train(options, frame, folder, *flags):
    """Train on a DataFrame; returns the row of results."""
    csv = Path(folder, "data.csv")
    frame.to_csv(csv, index=False)
    with contextlib.redirect_stdout(io.StringIO()):
        return baseline.main(["--data_csv_path", csv, "--image_base_dir", options.image_base_dir,
                              "--no_plots", "--output_dir", folder, *options.flags, *flags])


def repetition(options, frame, seed):
    """Yield (way, share, [SROCC of quality, of consistency] on the test part)."""
    generator = frame["name"].str.split("_").str[0]
    prompts = np.random.default_rng(seed).permutation(frame["prompt"].unique())
    tested, given = np.split(prompts, [len(prompts) // 5])
    test = frame[generator.isin(options.target) & frame["prompt"].isin(tested)]
    with tempfile.TemporaryDirectory() as folder:
        known = frame[generator.isin(options.source) & frame["prompt"].isin(given)]
        source = train(options, known, folder, "--seed", seed)["checkpoint"]
        paths = [Path(options.image_base_dir, name) for name in test["name"]]
        pred = baseline.load(source).score(paths, list(test["prompt"]))
        yield "source run alone", 0.0, [
            scipy.stats.spearmanr(pred[title], test[column].astype(float))[0]
            for title, column in (("quality", "mos_quality"), ("consistency", "mos_align"))]
        for share in options.shares:
            some = given[:round(share * len(given))]
            adapted = frame[generator.isin(options.target) & frame["prompt"].isin(some)]
            both = pd.concat([adapted.assign(part="train"), test.assign(part="test")])
            for way, flags in (("without", []), ("--init_from", ["--init_from", source])):
                with tempfile.TemporaryDirectory() as place:
                    row = train(options, both, place, "--split_column", "part", "--seed", seed,
                                "--cache_dir", Path(folder, "cache"), *flags)
                yield way, share, [row["test_srocc_q"], row["test_srocc_c"]]


def main():
    """Print a row per share and way."""
    options = parse_args()
    frame = pd.read_csv(options.data_csv_path, dtype=str, keep_default_na=False)
    found = {}
    for seed in range(42, 42 + options.repeats):
        for way, share, sroccs in repetition(options, frame, seed):
            found.setdefault((share, way), []).append(sroccs)
            print(seed, share, way, *(f"{srocc:.4f}" for srocc in sroccs), file=sys.stderr)
    print("| prompts | | SROCC quality | consistency |\n" + "| --- " * 4 + "|")
    for (share, way), sroccs in found.items():
        mean, sd = np.mean(sroccs, axis=0), np.std(sroccs, axis=0, ddof=1)
        print(f"| {share:.0%} | {way} | " + " | ".join(
            f"{m:.3f} +- {s:.3f}" for m, s in zip(mean, sd)) + " |")


if __name__ == "__main__":
    main()
