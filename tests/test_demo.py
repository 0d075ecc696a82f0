"""The demo works without network, and learns."""

import json
import re

import pytest

import baseline


def test_the_demo_learns(tmp_path, capsys):
    """--demo alone ends above 0.8 on both targets and above where it began."""
    row = baseline.main(["--demo", "--output_dir", str(tmp_path)])
    out = capsys.readouterr().out
    start = re.search(r"epoch   0 .* SROCC_Q ([\d.]+)  SROCC_C ([\d.]+) ", out).groups()
    assert all(row[f"val_srocc_{t}"] > max(0.8, float(own)) for t, own in zip("qc", start))
    assert json.loads(out.splitlines()[-1])["best_epoch"] == row["best_epoch"] > 0


@pytest.mark.parametrize("more", [["--partial_freeze", "--freeze_layers", "18"],
                                  ["--preset", "A", "--use_explanations"]])
def test_the_recommended_flags_work_on_the_demo(tmp_path, more):
    """The demo's CLIP is deep enough for the recommended number of frozen blocks."""
    row = baseline.main(["--demo", *more, "--epochs", "1", "--output_dir", str(tmp_path)])
    assert row["epochs_run"] == 1 and row["val_srocc_q"] > 0.5
