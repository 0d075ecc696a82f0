"""Simulate how often the 95 % intervals that baseline.py prints hold what they are meant to hold.

    python benchmarks/coverage.py

Repeats: each simulated data set has `--prompts` prompts with `--images` images each. Two ridges, on
two feature sets that are equally good by construction, are compared on random splits by prompt, so
the true gain in SROCC is 0. Printed: how often the interval over splits (baseline.split_margin)
holds 0, and how often the usual t interval does, which takes splits for independent.

Bootstrap: two fixed predictors of unlike quality judge images of one part. Printed: how often the
intervals of baseline.bootstrap hold the SROCC of the first and the gain over the second that a very
large sample has. Prompts have effects of their own on human scores and on predictions.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import baseline  # noqa: E402  the file next door, not an installed package

WIDTH, STRENGTH = 24, 10.0  # of the feature sets, of the ridges


def draw(rng, prompts, images, noises):
    """Return (latent quality, predictions or features per noise, MOS, prompt number) of images."""
    group = np.repeat(np.arange(prompts), images)
    latent = rng.normal(size=len(group)) + 0.7 * rng.normal(size=prompts)[group]
    mos = latent + 0.5 * rng.normal(size=len(group))
    sides = [latent[:, None] + noise * (rng.normal(size=(len(group), width))
                                        + 0.5 * rng.normal(size=(prompts, width))[group])
             for noise, width in noises]
    return sides, mos, group


def ridge_srocc(x, mos, train, judged):
    """Return the SROCC on the judged rows of a ridge that is fitted to the training rows."""
    mean = x[train].mean(0), mos[train].mean()
    centred = x[train] - mean[0]
    weights = np.linalg.solve(centred.T @ centred + STRENGTH * np.eye(WIDTH),
                              centred.T @ (mos[train] - mean[1]))
    return scipy.stats.spearmanr(x[judged] @ weights, mos[judged])[0]


def repeats(options, splits):
    """Return the coverage of 0 by (the printed interval over splits, the usual t interval)."""
    rng, held = np.random.default_rng(splits), np.zeros(2)
    for _ in range(options.sets):
        sides, mos, group = draw(rng, options.prompts, options.images, [(4, WIDTH)] * 2)
        gains = []
        for _ in range(splits):
            judged = np.isin(group, rng.permutation(options.prompts)[:options.prompts // 5])
            one, two = (ridge_srocc(x, mos, ~judged, judged) for x in sides)
            gains.append(one - two)
        mean, sd = np.mean(gains), np.std(gains, ddof=1)
        corrected = baseline.split_margin(sd, splits, judged.sum() / (~judged).sum())
        usual = scipy.stats.t.ppf(0.975, splits - 1) * sd / math.sqrt(splits)
        held += abs(mean) <= np.array([corrected, usual])
    return held / options.sets


def bootstrap(options):
    """Return the coverage of (the SROCC, the gain) by the bootstrap over prompts."""
    rng, held, noises = np.random.default_rng(0), np.zeros(2), [(0.8, 1), (1.2, 1)]
    (one, two), mos, _ = draw(rng, 100_000, 2, noises)
    true = [scipy.stats.spearmanr(side[:, 0], mos)[0] for side in (one, two)]
    for _ in range(options.sets):
        (one, two), mos, group = draw(rng, options.prompts // 5, options.images, noises)
        drawn = baseline.bootstrap({"one": one[:, 0], "two": two[:, 0]}, mos, group)
        for i, (values, truth) in enumerate((
                (drawn["one"], true[0]), (drawn["one"] - drawn["two"], true[0] - true[1]))):
            low, high = np.quantile(values, [0.025, 0.975])
            held[i] += low <= truth <= high
    return held / options.sets


def main():
    """Print the coverages with the margin that chance leaves them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sets", type=int, default=1000, help="simulated data sets per line")
    parser.add_argument("--prompts", type=int, default=240, help="in a data set; a fifth is judged")
    parser.add_argument("--images", type=int, default=5, help="of each prompt")
    options = parser.parse_args()
    print(f"{options.sets} data sets of {options.prompts} prompts x {options.images} images; "
          f"coverage of 95 % intervals, +- {1.96 * math.sqrt(0.05 * 0.95 / options.sets):.3f}")
    for splits in (5, 10):
        corrected, usual = repeats(options, splits)
        print(f"gain over {splits} splits: {corrected:.3f} (usual t interval: {usual:.3f})")
    srocc, gain = bootstrap(options)
    print(f"bootstrap over prompts: SROCC {srocc:.3f}, paired gain {gain:.3f}")


if __name__ == "__main__":
    main()
