"""Pictures and report.html show what happened, stand alone, and no text of the user breaks them."""

import base64
import contextlib
import html.parser
import io
import json
import re
import shlex
import shutil
import subprocess
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import COLUMNS, read_csv, read_json, write_csv, write_data
from matplotlib.axes import Axes
from PIL import Image

import baseline

FILES = ["curves.png", "scatter.png", "worst.png", "report.html"]
SHOWN = ["srocc_q", "plcc_q", "srocc_c", "plcc_c"]
NASTY = ["<script>alert('x')</script> & \"more\"", "一只猫在睡觉，背景是日落", "café 🎨🐈‍⬛ $",
         "$x^2$ costs $5", "\\frac{1}{0} $\\notacommand{$", "a_b^c {d} %s {0} \\$", "$$$", "مرحبا",
         "<img src=x onerror=alert(1)> &amp; ]]> <!--", "$\\alpha$ and $", "x" * 500,
         "a\nb\tc \u202eevil"]
EVIL = "</pre><script>alert(1)</script>"  # a column's name


class Page(html.parser.HTMLParser):
    """Collect a page's tags, attributes and the text of each tag."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.sources, self.attributes = [], [], []
        self.text, self.rows, self.inside = {}, [], None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        self.inside = tag
        self.text.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.text[self.inside][-1] += data
        if self.inside in ("th", "td"):
            self.rows[-1].append(data)


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    """Train on prompts of which six, given, are those of the test part, and thus of worst.png."""
    root = tmp_path_factory.mktemp("report")
    data = write_data(root / "data", [f"thing {i}" for i in range(24)], per_prompt=1)
    columns = [EVIL if name == "prompt" else name for name in COLUMNS]

    def run(prompts):
        folder = root / f"out <b>&amp; {len(list(root.iterdir()))}"
        argv = ["--data_csv_path", str(root / "data.csv"), "--image_base_dir", str(data.images),
                "--clip_model", f"local-dir:{clips()}", "--output_dir", str(folder),
                "--prompt_column", EVIL, "--num_workers", "0", "--epochs", "3", "--batch_size", "8",
                "--cache_dir", str(root / "cache"), "--freeze_clip", "--lr", "0.1",
                "--split_by", "image", "--val_ratio", "0.4", "--test_ratio", "0.25"]
        rows = [{EVIL: row["prompt"], **row} for row in data.rows]
        write_csv(root / "data.csv", rows, columns)
        args = baseline.parse_args(argv)
        for place, prompt in zip(baseline.split_rows(baseline.load_table(args), args, 42)["test"],
                                 prompts, strict=True):
            rows[place][EVIL] = prompt
        write_csv(root / "data.csv", rows, columns)
        out, err = io.StringIO(), io.StringIO()
        with (warnings.catch_warnings(record=True) as seen, contextlib.redirect_stdout(out),
              contextlib.redirect_stderr(err)):
            warnings.simplefilter("always")
            row = baseline.main(argv)
        return SimpleNamespace(folder=folder, row=row, argv=argv, out=out.getvalue(),
                               page=Page(folder / "report.html"), err=err.getvalue(),
                               warnings=[str(w.message) for w in seen
                                         if issubclass(w.category, UserWarning)])
    return run


@pytest.fixture(scope="module")
def done(finished):
    """One finished run; the first six nasty prompts are in its test part."""
    return finished(NASTY[:6])


@pytest.fixture(scope="module")
def again(done, finished):
    """Another one with the other six; what it opened (its features are cached) and lines drawn."""
    opened, lines, load, line = [], [], baseline.load_image, Axes.axhline
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline, "load_image", lambda path: opened.append(path.name) or load(path))
        patch.setattr(Axes, "axhline", lambda *a, **k: lines.append(a[1]) or line(*a, **k))
        run = finished(NASTY[6:])
    return SimpleNamespace(opened=opened, lines=lines, **vars(run))


@pytest.fixture
def report(flags, tmp_path):
    """Train with pictures; returns the folder and the row of results."""
    def run(*more, out="out", **options):
        row = baseline.main([word for word in flags(*more, out=out, **options)
                             if word != "--no_plots"])
        return SimpleNamespace(folder=tmp_path / out, row=row)
    return run


# --- pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES[:3])
def test_pictures_decode_are_of_sensible_size_and_not_blank(done, name):
    """Each picture is a whole PNG with text or lines on it; both targets' colours are drawn."""
    image = Image.open(done.folder / name)
    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    assert image.format == "PNG" and 300 <= height <= 2000 and 600 <= width <= 3000
    assert pixels.std() > 10 and (pixels.min(axis=2) < 100).mean() > 0.002
    if name != "worst.png":
        redness = pixels[..., 0].astype(int) - pixels[..., 2]  # quality is blue, consistency orange
        assert (redness > 60).sum() > 50 and (redness < -60).sum() > 50
    else:
        assert len(np.unique(pixels @ [1 << 16, 1 << 8, 1])) > 2000


def test_the_worst_images_are_those_with_the_largest_error(again):
    """Each line holds the largest errors of its target, the largest first."""
    scores, want = pd.read_csv(again.folder / "test_predictions.csv"), []
    for own, human in (("quality", "mos_quality"), ("consistency", "mos_align")):
        want += scores["name"][np.argsort(-(scores[own] - scores[human]).abs())].tolist()
    assert len(want) == 12 and again.opened == want


def test_the_curves_have_the_floors_of_their_own_part(again):
    """Curves are of the validation part, so are the floors, also where there is a test part."""
    floors = re.search("val SROCC Q / C: (.*)", again.out).group(1)
    want = {name: [float(value) for value in values] for name, *values in re.findall(
        r"([a-z -]+) (\S+) / ([^\s;]+)", floors)}
    lines = [round(value, 4) for value in again.lines]
    assert {*want["start"], *want[" linear probe"], want[" zero-shot"][1]} <= set(lines)
    assert set(lines) <= {value for values in want.values() for value in values}


def test_no_prompt_makes_a_warning(done, again):
    """Chinese, Arabic, emoji, dollars and control characters are drawn without a word."""
    drawn = {row["prompt"] for run in (done, again)
             for row in read_csv(run.folder / "test_predictions.csv")}
    assert drawn == set(NASTY)
    for run in (done, again):
        assert run.warnings == []
        assert not [word for word in ("Warning", "findfont", "Traceback") if word in run.err]


def test_few_images_and_undefined_scores_do_not_stop_the_report(report, tmp_path):
    """Two validation images, one epoch and equal human scores still make every picture."""
    small = write_data(tmp_path / "small", prompts=[f"thing {i}" for i in range(6)], per_prompt=2)
    write_csv(small.csv, [{**row, "mos_align": 2.5} for row in small.rows])
    run = report("--freeze_clip", "--epochs", 1, "--batch_size", 64, data=small)
    assert all((run.folder / name).stat().st_size > 1000 for name in FILES)
    assert Page(run.folder / "report.html").rows[-1][3:] == ["nan", "nan"]
    result = read_json(run.folder / "result.json")
    assert result["val_srocc_c"] is None and result["gain_zero_shot_c"] is None


def test_pictures_change_no_result(train, report):
    """--no_plots writes neither pictures nor page; the numbers are the same with and without.

    Without a test part title and table of the page are those of the validation part.
    """
    plain = train("--freeze_clip", "--lr", 1e-3, out="plain")
    drawn = report("--freeze_clip", "--lr", 1e-3, out="drawn")
    assert not [path for kind in ("png", "html") for path in plain.folder.rglob(f"*.{kind}")]
    assert {path.name for path in drawn.folder.iterdir()} == set(FILES) | {
        path.name for path in plain.folder.iterdir()}
    aside = ("seconds", "output_dir", "checkpoint", "command", "time")
    assert {k: v for k, v in plain.row.items() if k not in aside} == {
        k: v for k, v in drawn.row.items() if k not in aside}
    page = Page(drawn.folder / "report.html")
    assert page.text["h1"] == ["Quality and consistency on 8 val images"]
    assert page.rows[-1][1:] == [f"{drawn.row[f'val_{name}']:.4f}" for name in SHOWN]


def test_the_last_line_and_the_result_are_the_row(done):
    """result.json holds what the last line on stdout holds, and what main returns."""
    result = read_json(done.folder / "result.json")
    assert json.loads(done.out.splitlines()[-1]) == result
    assert result.keys() == done.row.keys() and result["test_srocc_q"] == done.row["test_srocc_q"]


# --- report.html ----------------------------------------------------------------------------


def test_the_page_stands_alone(done):
    """It refers to nothing outside; its three pictures are inside and are those on disk."""
    page = done.page
    assert not [word for word in ("://", "url(", "@import") if word in page.source]
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    head = "data:image/png;base64,"
    assert len(page.sources) == 3 and all(source.startswith(head) for source in page.sources)
    inside = [base64.b64decode(source[len(head):], validate=True) for source in page.sources]
    assert inside == [(done.folder / name).read_bytes() for name in FILES[:3]]


def test_the_page_holds_the_numbers(done):
    """The table holds floors and run of the judged part; best epoch and verdict are named."""
    page, row = done.page, done.row
    want = {"start": "start", "linear probe": "linear_probe", "zero-shot": "zero_shot",
            "prompt mean (no pixels)": "prompt_mean", "this run": "test"}
    assert page.rows == [[name.upper() for name in SHOWN], *(
        [title, *(f"{row[f'{name}_{metric}']:.4f}" for metric in SHOWN)]
        for title, name in want.items())]
    assert f"Best epoch {row['best_epoch']} of 3" in page.source
    text = " ".join(page.text["li"])
    for t, name in (("q", "quality"), ("c", "consistency")):
        assert (f"{name}: 95 % interval of SROCC {row[f'interval_{t}_low']:.3f}.."
                f"{row[f'interval_{t}_high']:.3f}, validation SROCC {row[f'val_srocc_{t}']:.4f}, "
                f"best epoch of its own {row[f'best_epoch_{t}']}, "
                f"Train-Val Gap {row[f'gap_{t}']:+.4f}, tier {row[f'tier_{t}']}") in text
        gain = f"gain_linear_probe_{t}"
        assert (f"{t.upper()} {row[gain]:+.4f} ({row[f'{gain}_low']:+.4f}.."
                f"{row[f'{gain}_high']:+.4f})") in text
    assert page.text["h1"] == ["Quality and consistency on 6 test images"]


def test_the_page_holds_the_command_and_the_advice(done):
    """First the command as it was typed, then with each finding's flags appended."""
    page = done.page
    words = [shlex.split(text) for text in page.text["pre"]]
    assert words[0] == ["python", "baseline.py", *done.argv]
    assert [other[:len(words[0])] for other in words] == [words[0]] * len(words)
    assert page.text["b"] == done.row["advice"] and len(words) == len(page.text["b"]) + 1
    place = page.text["b"].index("learning rate outside the usual range")
    assert words[1 + place][len(words[0]):] == ["--lr", "0.005"]


def test_no_text_of_the_user_becomes_markup(done):
    """Prompts, paths and flags with tags and entities stay text."""
    page = done.page
    assert not {"script", "svg"} & set(page.tags) and page.tags.count("img") == 3
    assert not any(name.startswith("on") for name in page.attributes)
    assert "out <b>&amp;" in page.text["pre"][0] and EVIL in page.text["pre"][0]
    assert "<script>alert" not in page.source and "<img src=x" not in page.source


def test_a_browser_shows_the_page(done, tmp_path):
    """Headless Chromium renders heading, table and three pictures."""
    chromium = shutil.which("chromium") or pytest.skip("chromium is not installed")
    page = shutil.copy(done.folder / "report.html", tmp_path / "report.html")
    shown = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu",
         "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", f"file://{page}"],
        capture_output=True, text=True, timeout=120, check=True).stdout
    assert "Quality and consistency on" in shown.split("<h1>")[1].split("</h1>")[0]
    assert shown.count("<img ") == 3 and shown.count("<tr>") == 5 and "<script" not in shown
