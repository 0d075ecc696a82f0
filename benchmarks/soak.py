"""Train the demo for many epochs and watch whether the process grows: memory, files, seconds.

    python benchmarks/soak.py                 2,000 epochs of the demo, heads only
    python benchmarks/soak.py --epochs 200

Prints the growth of the resident memory after the warm-up (the first fifth of the run), the open
files, the temporary files that are left, and the seconds per epoch at the beginning and the end.
Exits with status 1 where memory grew by 2 % or more or anything was left.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "baseline.py"


def sample(pid):
    """Return (resident memory in MB, number of open files) of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return int(resident) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def epochs_done(log):
    """Return the number of epochs in a log."""
    return len(log.read_bytes().splitlines()) - 1 if log.exists() else 0


def watch(folder, epochs, interval):
    """Run the demo; returns (status, [(epochs done, MB, open files, time)] while it trained)."""
    command = [sys.executable, str(PROGRAM), "--demo", "--freeze_clip", "--epochs", str(epochs),
               "--no_plots", "--output_dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    samples = []
    while process.poll() is None:
        time.sleep(interval)
        done = epochs_done(folder / "training_log.csv")
        try:
            if 0 < done < epochs:
                samples.append((done, *sample(process.pid), time.monotonic()))
        except (FileNotFoundError, StopIteration):  # it has just ended
            break
    return process.wait(), samples


def pace(samples):
    """Return the seconds per epoch between the first and the last of some samples."""
    (first, *_, begin), (last, *_, end) = samples[0], samples[-1]
    return (end - begin) / max(1, last - first)


def main():
    """Run and print what was found; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between samples")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "out")
        status, samples = watch(folder, args.epochs, args.interval)
        left = [path for path in folder.rglob("*") if path.name.startswith(".")]
        done = epochs_done(folder / "training_log.csv")
    warm = [s for s in samples if s[0] >= args.epochs / 5]
    tenth = max(2, len(warm) // 10)
    begin, end = (statistics.median(s[1] for s in part) for part in (warm[:tenth], warm[-tenth:]))
    growth = end / begin - 1
    print(f"status {status}, {done} epochs, {len(samples)} samples")
    print(f"memory after warm-up: {begin:.1f} MB to {end:.1f} MB, {growth:+.2%}")
    print(f"open files: {min(s[2] for s in warm)} to {max(s[2] for s in warm)}")
    print(f"temporary files left: {len(left)}")
    print(f"seconds per epoch, saving included: {pace(samples[:tenth]):.4f} in the beginning, "
          f"{pace(samples[-tenth:]):.4f} in the end")
    return int(status != 0 or growth >= 0.02 or bool(left))


if __name__ == "__main__":
    sys.exit(main())
