"""The demo works without network, and learns."""

import json

import pytest

import baseline


def test_the_demo_learns(tmp_path, capsys):
    """--demo alone ends above 0.8 on both targets and above where it began."""
    summary = baseline.main(["--demo", "--output_dir", str(tmp_path)])
    val, start = summary["val"], summary["start"]
    assert val["srocc_q"] > 0.8 and val["srocc_c"] > 0.8
    assert val["srocc_q"] > start["srocc_q"] and val["srocc_c"] > start["srocc_c"]
    assert summary["best_epoch"] > 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["best_epoch"] > 0


@pytest.mark.parametrize("more", [["--partial_freeze", "--freeze_layers", "18"],
                                  ["--preset", "A", "--use_explanations"]])
def test_the_recommended_flags_work_on_the_demo(tmp_path, more):
    """The demo's CLIP is deep enough for the recommended number of frozen blocks."""
    summary = baseline.main(["--demo", *more, "--epochs", "1", "--output_dir", str(tmp_path)])
    assert summary["epochs_run"] == 1 and summary["val"]["srocc_q"] > 0.5
