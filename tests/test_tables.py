"""Tables as people have them: kinds of files, encodings, quotes, headers, names of images."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import COLUMNS, write_csv

import baseline

ODD = ["a \"quoted\", comma", "两只狗，在海边", "two\nlines, 3, 4\nand, more", "it's 20\" wide; ok"]


@pytest.fixture
def rows(data):
    """The rows of the data, some of them with texts that need care."""
    rows = [{k: str(v) for k, v in row.items()} for row in data.rows]
    for i, text in enumerate(ODD):
        rows[i]["prompt"] = text
    return rows


@pytest.fixture
def table(flags, data):
    """Read a file as the program does: table(path, *flags)."""
    def load(path, *more):
        files = SimpleNamespace(csv=path, images=data.images)
        return baseline.load_table(baseline.parse_args(flags(*more, data=files)))
    return load


@pytest.fixture
def refuse(refused, data, monkeypatch):
    """A file must be refused before a model is loaded; returns what was said."""
    monkeypatch.setattr(baseline, "load_clip", lambda *a, **k: pytest.fail("a model was loaded"))
    return lambda path, *more: refused(*more, data=SimpleNamespace(csv=path, images=data.images))


def comma(rows):
    """Return rows with decimal commas."""
    return [{k: v.replace(".", ",") if k.startswith("mos") else v for k, v in row.items()}
            for row in rows]


def numeric(rows):
    """Return rows with numbers that are no texts."""
    return [{k: float(v) if k.startswith("mos") else v for k, v in row.items()} for row in rows]


KINDS = {
    "plain.csv": lambda path, rows: write_csv(path, rows),
    "excel.csv": lambda path, rows: write_csv(path, comma(rows), delimiter=";",
                                              encoding="utf-8-sig", lineterminator="\r\n"),
    "unicode.txt": lambda path, rows: write_csv(path, comma(rows), delimiter="\t",
                                                encoding="utf-16", lineterminator="\r\n"),
    "tabs.tsv": lambda path, rows: write_csv(path, rows, delimiter="\t"),
    "semicolons.CSV": lambda path, rows: write_csv(path, rows, delimiter=";", encoding="utf-16"),
    "lines.jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, numeric(rows)))),
    "list.json": lambda path, rows: path.write_text(json.dumps(numeric(rows), ensure_ascii=False),
                                                    encoding="utf-8"),
    "a.parquet": lambda path, rows: pd.DataFrame(numeric(rows)).to_parquet(path),
    "a.xlsx": lambda path, rows: pd.DataFrame(numeric(rows)).to_excel(path, index=False),
    "texts.xlsx": lambda path, rows: pd.DataFrame(comma(rows)).to_excel(path, index=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_the_same_table(table, rows, tmp_path, kind):
    """Prompts come letter by letter and scores to the last digit, whatever the file."""
    KINDS[kind](tmp_path / kind, rows)
    got = table(tmp_path / kind, "--use_explanations")
    for row in rows:
        own = got.frame[got.frame["name"] == row["name"]].iloc[0]
        assert (own["prompt"], own["explanation"]) == (row["prompt"], row["explanation"])
        assert own["q"] == np.float32(float(row["mos_quality"]) / 5)
        assert own["c"] == np.float32(float(row["mos_align"]) / 5)
    first = 1 if "json" in kind or "parquet" in kind else 2
    assert sorted(got.frame.index) == list(range(first, first + len(rows)))


@pytest.mark.parametrize("kind", ["excel.csv", "unicode.txt", "lines.jsonl", "a.parquet", "a.xlsx"])
def test_scoring_reads_the_same_kinds(rows, data, tmp_path, kind):
    """Rows, images and prompts of --predict are those of the file; its columns keep their names."""
    KINDS[kind](tmp_path / kind, rows)
    args = baseline.parse_args(["--predict", tmp_path / kind, "--image_base_dir", data.images])
    frame, paths, prompts, _ = baseline.scoring_frame(args, args)
    assert prompts == [row["prompt"] for row in rows] and list(frame) == COLUMNS
    assert paths == [data.images / row["name"] for row in rows]


@pytest.mark.parametrize("kind", ["csv", "xlsx"])
def test_headers_of_the_input_stay(tmp_path, kind):
    """Columns that are called the same, or nothing, come out as they went in."""
    cells = [["name", "note", "note", ""], ["a.png", "1", "2", "007"], ["b.png", "", "NA", "x"]]
    path = tmp_path / f"in.{kind}"
    if kind == "csv":
        path.write_text("\n".join(map(",".join, cells)) + "\n")
    else:
        pd.DataFrame(cells).to_excel(path, header=False, index=False)
    args = baseline.parse_args(["--predict", path])
    frame, _, _, _ = baseline.scoring_frame(args, args)
    assert [[*frame], *frame.to_numpy().tolist()] == cells


# --- quotes ---------------------------------------------------------------------------------

OPEN = [  # lines, row
    (['a.jpg,"a sign,1,1', 'b.jpg,x,2,2', 'c.jpg,a 20" tv,5,5'], 2),
    (['a.jpg,"a sign,1,1', 'b.jpg,x,2,2', 'c.jpg,a 20",5,5'], 2),
    (['z.png,y,3,3', 'a.jpg,"a sign,1,1', 'c.png,a 20",5,5'], 3),
    (['a.jpg,"a sign, red,1.5,1', 'c.jpg,"quoted",5,5'], 2),
    (['z.jpg,y,3,3', 'z.jpg,"two\nlines",3,3', 'a.jpg,"a sign,1,1', 'b.jpg,x,2,2'], 4),
    (['img 1,"a sign,1,1', 'img 2,x,2,2', 'img 3,a 20",5,5'], 2),
    (['a.jpg,"say ""hi,1,1', 'b.jpg,x,2,2', 'c.jpg,a 20""",5,5'], 2),
    (['a.jpg,"he said \\"hi\\" there",1,1'], 2),
    (['a.jpg,"cat" and "dog",1,1'], 2),
]


@pytest.mark.parametrize("lines, row", OPEN)
@pytest.mark.parametrize("separator, end", [(",", "\n"), (";", "\r\n")])
def test_a_quote_that_nobody_closed_is_refused(refuse, tmp_path, lines, row, separator, end):
    """No row becomes a part of another one's text; the row where it begins is named."""
    text = end.join(["name,prompt,mos_quality,mos_align", *lines, ""]).replace(",", separator)
    (tmp_path / "open.csv").write_text(text, newline="")
    said = refuse(tmp_path / "open.csv")
    assert f"row {row}: " in said and "open.csv" in said


@pytest.mark.parametrize("header, lines", [
    ("name,prompt", ['a.jpg,"a sign', 'b.jpg,x', 'c.jpg,a 20"']),
    ("prompt,name,mos_quality,mos_align", ['"a sign,a.jpg,1,1', 'x,b.jpg,2,2', 'a 20",c.jpg,5,5']),
    ("name,prompt,mos_quality,mos_align,explanation",
     ['a.jpg,x,1,1,"it is', 'b.jpg,x,2,2,no', 'c.jpg,y,5,5,a 20"']),
    ("id,name,prompt,mos_quality,mos_align,note",
     ['1,a.jpg,"a sign,1,1,', '2,b.jpg,x,2,2,', '3,c.jpg,a 20",5,5,'])])
def test_wherever_the_text_stands(refuse, tmp_path, header, lines):
    """The open quote is found in the first column and in the last, with numbers behind it or not."""
    (tmp_path / "open.csv").write_text("\n".join([header, *lines, ""]))
    assert "row 2: inside of a text another row seems to begin" in refuse(tmp_path / "open.csv")


@pytest.mark.parametrize("text", [
    "first line\nsecond, third, 4, 5", "1, a dog\n2, a cat\n3, a cow,", "\n\n,,,\n", "a\r\nb.c, d",
    "says:\n\"img_001.jpg\", 3", "x, 1, 2\nstyle, anime", '"""', "'single, quotes\n'", "5,5\n6,6"])
def test_texts_of_several_lines_are_texts(table, data, tmp_path, text):
    """Lines, commas, numbers and quotes in a prompt are no new rows."""
    rows = [{**data.rows[0], "prompt": text}, *data.rows[1:]]
    assert table(write_csv(tmp_path / "lines.csv", rows)).frame["prompt"].iloc[0] == text


# --- what is no table -----------------------------------------------------------------------


@pytest.mark.parametrize("content, words", [
    ("name,prompt\na.png,一只猫在睡觉\n".encode("gbk"), ["byte 24 is not UTF-8", "GBK"]),
    ("name,prompt\na.png,Ein Schloß über Höhlen\n".encode("cp1252"), ["byte 27 is not UTF-8"]),
    (b"MATLAB 5.0 MAT-file, Platform: GLNXA64" + b"\0" * 90, ["MATLAB", "docs/DATASETS.md"]),
    (b"img_000.png,a cat,3.5,4\nimg_001.jpg,a dog,2,3\n",
     ["row 1 is no header", "such as name, prompt, mos_quality, mos_align"]),
    (b"img_000.png;3,5\n", ["row 1 is no header"]),
    (b"name,prompt,mos_quality,mos_align\nimg_000.png,a,1,2\nimg_001.jpg,a,2,3,4\n",
     ["row 3: it has more cells"])])
def test_what_it_is_is_said(refuse, tmp_path, content, words):
    """GBK, MATLAB and a missing header are named for what they are, with what to do."""
    (tmp_path / "what.csv").write_bytes(content)
    said = refuse(tmp_path / "what.csv")
    assert all(word in said for word in words) and "what.csv" in said
    assert ("GBK" in words) == ("GBK" in said)


@pytest.mark.parametrize("kind, content, word", [
    ("jsonl", b'{"name": "a.png"}\n{"name": ', "JSONL"), ("json", b'"a"', "JSON"),
    ("xlsx", b"name,prompt\n", "XLSX"), ("parquet", b"", "PARQUET"), ("tsv", b"", "it is empty")])
def test_damaged_files_of_every_kind(refuse, tmp_path, kind, content, word):
    """A file that is not what its suffix says is refused in one sentence."""
    (tmp_path / f"bad.{kind}").write_bytes(content)
    assert word in refuse(tmp_path / f"bad.{kind}")


def test_readers_that_are_not_installed(rows, tmp_path):
    """The program works without them, and one line says what to install."""
    KINDS["a.xlsx"](tmp_path / "a.xlsx", rows)
    KINDS["a.parquet"](tmp_path / "a.parquet", rows)
    code = ("import sys; sys.modules['openpyxl'] = sys.modules['pyarrow'] = None; import baseline\n"
            "for path in sys.argv[1:]:\n"
            "    try:\n        baseline.main(['--data_csv_path', path])\n"
            "    except SystemExit as stop:\n        assert stop.code == 2\n")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.xlsx", tmp_path / "a.parquet"],
                          cwd=baseline.HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    for package in ("openpyxl", "pyarrow"):
        assert re.search(f"install (the )?{package}", done.stderr)


@pytest.mark.parametrize("column, bad", [("mos_quality", "n/a"), ("mos_align", "4/5"),
                                         ("mos_align", "1.234,5"), ("mos_quality", "--1,5")])
def test_the_first_bad_value_is_shown(refuse, rows, tmp_path, column, bad):
    """The value stands there with its row."""
    rows[3][column] = bad
    assert f'"{bad}" in row 5' in refuse(write_csv(tmp_path / "bad.csv", rows))


# --- headers and names ----------------------------------------------------------------------


def test_case_and_blanks_of_headers(table, rows, refuse, tmp_path):
    """They do not matter, unless columns differ in nothing else: then the exact one counts."""
    lines = write_csv(tmp_path / "a.csv", rows).read_text().split("\n", 1)[1]
    plain, path = table(tmp_path / "a.csv"), tmp_path / "b.csv"
    path.write_text("Name, PROMPT ,MOS_quality, mos_align,Explanation\n" + lines)
    assert table(path).frame.equals(plain.frame)
    path.write_text("name,prompt,mos_quality,mos_align,Prompt\n" + lines)
    assert table(path).frame.equals(plain.frame)
    path.write_text("name,Prompt,mos_quality,mos_align,PROMPT\n" + lines)
    assert "prompt is missing (it has name, Prompt" in refuse(path)


@pytest.mark.parametrize("column", ["{model}/{file}", "{ Model }/{file}", "{model}/img_{id}.{kind}"])
def test_columns_are_joined(table, rows, data, tmp_path, column):
    """Names that are unique inside of a folder only are made of two columns or more."""
    parts = [{**row, "model": f"m{i % 2}", "file": f" {row['name']} ", "id": row["name"][4:7],
              "kind": row["name"][8:]} for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        (tmp_path / f"m{i % 2}").mkdir(exist_ok=True)
        shutil.copy(data.images / row["name"], tmp_path / f"m{i % 2}" / row["name"])
    path = write_csv(tmp_path / "a.csv", parts, [*COLUMNS[1:], "model", "file", "id", "kind"])
    got = table(path, "--name_column", column, "--image_base_dir", tmp_path).frame
    assert sorted(got["name"]) == sorted(f"m{i % 2}/{r['name']}" for i, r in enumerate(rows))
    assert sorted(got["prompt"]) == sorted(row["prompt"] for row in rows)


def test_names_from_anywhere(table, rows, data, tmp_path):
    """Blanks, Windows' slashes, absolute paths and links find their file; the cell stays."""
    (tmp_path / "hub").mkdir()
    os.symlink(data.images / rows[1]["name"], tmp_path / "hub" / "link.jpg")
    shutil.copytree(data.images, tmp_path / "base" / "sub")
    for i, row in enumerate(rows):
        row["name"] = [f" {data.images / row['name']} ", str(tmp_path / "hub/link.jpg"),
                       f"sub\\{row['name']}", f"./sub/{row['name']}\t"][min(i, 2 + i % 2)]
    got = table(write_csv(tmp_path / "a.csv", rows), "--image_base_dir", tmp_path / "base").frame
    assert got["name"].tolist() == sorted(row["name"] for row in rows)
    assert got["path"].map(Path.is_file).all() and got["path"].nunique() == len(rows)


@pytest.mark.parametrize("name, near", [("IMG_004.png", "img_004.png"),
                                        ("img_004.jpeg", "img_004.png"), ("img_004", "img_004.png"),
                                        ("no/img_004.png", "nothing")])
def test_a_missing_file_and_what_lies_near(refuse, rows, data, tmp_path, name, near):
    """The path that was tried is shown, and a file that differs in case or suffix."""
    rows[4]["name"] = name
    said = refuse(write_csv(tmp_path / "a.csv", rows))
    assert f'"{data.images / name}" in row 6; near it lies {near}' in said


def test_one_image_under_two_spellings_is_a_duplicate(refuse, rows, tmp_path):
    """Blanks do not make another image of it."""
    rows[4]["name"] = f"./{rows[3]['name']} "
    assert "duplicate image names: 2 rows (5, 6)" in refuse(write_csv(tmp_path / "a.csv", rows))


def test_memory_follows_the_data(rows, data, tmp_path):
    """A text of 1 MB among 5,000 rows does not make all the others as long."""
    names = [f"{i}.png" for i in range(5_000)]
    for name in names:
        os.symlink(data.images / "img_000.png", tmp_path / name)
    rows = [{**rows[i % 4], "name": name, "prompt": f"p {i // 4}"} for i, name in enumerate(names)]
    rows[7]["prompt"] = rows[7]["explanation"] = "long, " * 170_000
    write_csv(tmp_path / "a.csv", rows)
    code = ("import baseline; args = baseline.parse_args(['--data_csv_path', 'a.csv', "
            "'--image_base_dir', '.', '--use_explanations']); table = baseline.load_table(args); "
            "baseline.split_rows(table, args, 0); baseline.data_hash(table); "
            "args.predict = 'a.csv'; baseline.scoring_frame(args, args)")
    limit = 12 << 30  # of addresses, which the libraries alone need some GB of
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={
        **os.environ, "PYTHONPATH": str(baseline.HERE)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
