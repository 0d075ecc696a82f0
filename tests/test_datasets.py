"""The recipes of docs/DATASETS.md, run as they stand there on small look-alikes of the downloads."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import draw
from scipy.io import savemat

import baseline

DOC = (Path(baseline.HERE) / "docs/DATASETS.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0]: part for part in DOC.split("\n## ")[1:]}
PROMPTS = ["a red house, by the sea", 'a "quoted" sign', "两只狗"]


def images(folder, names):
    """Draw a picture under each name."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw(np.random.default_rng(i), 12, 9).save(folder / name)


def agiqa_3k(folder):
    """A CSV with more columns than are needed, two images for each prompt."""
    rows = [(f"sd_{i:03d}.jpg", PROMPTS[i // 2], "", "", "anime", i / 2, .2, i / 3, .1)
            for i in range(6)]
    pd.DataFrame(rows, columns="name prompt adj1 adj2 style mos_quality std_quality mos_align "
                 "std_align".split()).to_csv(folder / "data.csv", index=False)
    images(folder / "images", [row[0] for row in rows])
    return {row[0]: (row[1], row[5], row[7]) for row in rows}


def aigciqa2023(folder):
    """Scores in MATLAB files, prompts in a sheet without a header, row = 4 P model + 4 prompt + k."""
    (folder / "DATA/MOS").mkdir(parents=True)
    mos = np.random.default_rng(0).uniform(20, 80, (3, 72, 1))
    for i in range(3):
        savemat(folder / f"DATA/MOS/mosz{i + 1}.mat", {"MOSz": mos[i]})
    sheet = [("Basic", "Quantity", prompt, "dog", "x", "y") for prompt in PROMPTS]
    pd.DataFrame(sheet).to_excel(folder / "AIGCIQA2023_Prompts.xlsx", header=False, index=False)
    names = [f"{i}.png" for i in range(72)]
    images(folder / "Image/allimg", names)
    return {name: (PROMPTS[i % 12 // 4], mos[0, i, 0], mos[2, i, 0]) for i, name in enumerate(names)}


def aigiqa_20k(folder):
    """Three sheets, of which only one has scores, and a CSV of all scores."""
    rows = [(f"DALLE2_{i:04d}.png", PROMPTS[i % 3], 1 + i / 4) for i in range(9)]
    for i, part in enumerate(("train", "val", "test")):
        sheet = pd.DataFrame(rows[3 * i:3 * i + 3], columns=["name", "prompt", "mos"])
        sheet[sheet.columns[:3 if i == 0 else 2]].to_excel(folder / f"info_{part}.xlsx", index=False)
        images(folder / part, sheet["name"])
    pd.DataFrame(rows[::-1], columns=["name", "prompt", "mos"])[["name", "mos"]].to_csv(
        folder / "info_merge.csv", index=False)
    return {f"{('train', 'val', 'test')[i // 3]}/{name}": (prompt, mos, mos)
            for i, (name, prompt, mos) in enumerate(rows)}


def evalmuse_40k(folder):
    """A list of objects, each with a list of ratings."""
    rows = [{"prompt_id": f"0{i}", "prompt": PROMPTS[i // 2], "type": "real", "img_path": f"SD/{i}.png",
             "total_score": [1 + i % 5, 3, 4], "element_score": "{'dog (animal)': 1.0}"}
            for i in range(6)]
    (folder / "train_list.json").write_text(json.dumps(rows))
    images(folder / "images", [row["img_path"] for row in rows])
    return {row["img_path"]: (row["prompt"], *[sum(row["total_score"]) / 3] * 2) for row in rows}


def evalmi_50k(folder, per_image=False):
    """Four text files; a prompt a line, or an image's prompt a line."""
    names = [f"{model}/{i + 1:03d}.png" for model in ("flux", "kandinsky") for i in range(3)]
    mos = [[30.5 + i, 60.25 - i] for i in range(6)]
    for file, lines in (("prompts", PROMPTS * (2 if per_image else 1)), ("imgnames", names),
                        ("mos1", [a for a, _ in mos]), ("mos2", [b for _, b in mos])):
        (folder / f"{file}.txt").write_text("\n".join(map(str, lines)) + "\n", encoding="utf-8")
    images(folder / "images", names)
    return {name: (PROMPTS[i % 3], *mos[i]) for i, name in enumerate(names)}


@pytest.mark.parametrize("section, make", [
    ("AGIQA-3K", agiqa_3k), ("AIGCIQA2023", aigciqa2023), ("AIGIQA-20K", aigiqa_20k),
    ("EvalMuse-40K", evalmuse_40k), ("EvalMi-50K", evalmi_50k),
    ("EvalMi-50K", lambda folder: evalmi_50k(folder, True))])
def test_a_recipe_makes_what_its_command_reads(tmp_path, monkeypatch, section, make):
    """Every image has its own prompt and scores; no recipe is longer than 12 lines."""
    want = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", SECTIONS[section], re.S))
    if recipe := blocks.get("python"):
        assert len(recipe.splitlines()) <= 12
        subprocess.run([sys.executable, "-c", recipe], check=True)
    words = shlex.split(blocks["bash"])[2:]
    if "--split_column" in words:
        at = words.index("--split_column")
        split = pd.read_csv("data.csv")[words[at + 1]]
        assert split.tolist() == [name.split("/")[0] for name in want]
    table = baseline.load_table(baseline.parse_args(words))
    assert [f"mos_{'quality' if t == 'q' else 'align'}" in pd.read_csv("data.csv")
            for t in "qc"] == [t in table.targets for t in "qc"]
    for _, row in table.frame.iterrows():
        prompt, *mos = want.pop(row["name"])
        assert row["prompt"] == prompt
        scores = [baseline.to_mos(row[t], table.targets[t]) for t in table.targets]
        assert np.allclose(scores, mos if len(scores) > 1 else mos[:1], rtol=1e-5)
    assert not want


def test_there_are_five():
    """The five that the page is for."""
    assert list(SECTIONS) == ["AGIQA-3K", "AIGCIQA2023", "AIGIQA-20K", "EvalMuse-40K", "EvalMi-50K"]
