"""The demo works without network, learns, and ends well."""

import json

import pandas as pd
import pytest
from starter import DRAWS

import baseline


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run --demo alone, with its real intervals; returns its row of results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline.bootstrap, "__defaults__", (DRAWS,))
        return baseline.main(["--demo", "--output_dir", str(tmp_path_factory.mktemp("demo"))])


@pytest.mark.parametrize("target", baseline.TARGETS)
@pytest.mark.parametrize("floor", ["start", "linear_probe", "zero_shot"])
def test_the_demo_beats_its_floors(demo, floor, target):
    """On prompts that it never saw, the demo is above each floor beyond doubt."""
    assert demo["part"] == "val" and demo[f"gain_{floor}_{target}_low"] > 0


def test_the_demo_ends_well(demo):
    """Both targets reach a good tier, and nothing is left to advise."""
    assert {demo[f"tier_{target}"] for target in "qc"} <= {"good", "excellent"}
    saved = json.loads((baseline.Path(demo["output_dir"]) / "result.json").read_text())
    assert saved["advice"] == demo["advice"] == [] and demo["best_epoch"] > 0


def test_the_demo_says_nothing_in_its_names():
    """Images are named by prompt and copy; neither number tells a score."""
    table = pd.read_csv(baseline.DEMO["data_csv_path"])
    assert len(table) > 300 and table["name"].is_unique
    number = table["name"].str.extract(r"^demo_(\d+)_(\d+)\.jpg$").astype(int)
    assert (table.groupby(number[0])["prompt"].nunique() == 1).all()
    for score in ("mos_quality", "mos_align"):
        assert number.corrwith(table[score], method="spearman").abs().max() < 0.15


@pytest.mark.parametrize("more", [["--partial_freeze", "--freeze_layers", "18"],
                                  ["--preset", "A", "--use_explanations"]])
def test_the_recommended_flags_work_on_the_demo(tmp_path, more):
    """The demo's CLIP is deep enough for the recommended number of frozen blocks."""
    row = baseline.main(["--demo", *more, "--epochs", "1", "--output_dir", str(tmp_path)])
    assert row["epochs_run"] == 1 and row["val_srocc_q"] > 0.5
