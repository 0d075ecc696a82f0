"""Pictures and report.html show what happened, stand alone, and no text of the user breaks them."""

import base64
import contextlib
import html.parser
import io
import json
import shlex
import shutil
import subprocess
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import read_json, write_csv, write_data
from PIL import Image

import baseline

FILES = ["curves.png", "scatter.png", "worst.png", "report.html"]
NASTY = ["<script>alert('x')</script> & \"more\"", "一只猫在睡觉，背景是日落", "café 🎨🐈‍⬛ $",
         "$x^2$ costs $5", "\\frac{1}{0} $\\notacommand{$", "a_b^c {d} %s {0} \\$", "$$$", "مرحبا",
         "<img src=x onerror=alert(1)> &amp; ]]> <!--"]


@pytest.fixture
def report(flags, tmp_path, capfd):
    """Train with pictures; returns folder, summary and what was printed."""
    def run(*more, out="out", **options):
        argv = [word for word in flags(*more, out=out, **options) if word != "--no_plots"]
        capfd.readouterr()
        summary = baseline.main(argv)
        printed = capfd.readouterr()
        return SimpleNamespace(folder=tmp_path / out, summary=summary, argv=argv, out=printed.out,
                               err=printed.err)
    return run


@pytest.fixture(scope="module")
def done(clips, tmp_path_factory):
    """One finished run on prompts that try to break things; folder, summary, stdout."""
    root = tmp_path_factory.mktemp("report")
    data = write_data(root / "data", prompts=NASTY)
    out, err = io.StringIO(), io.StringIO()
    with (warnings.catch_warnings(record=True) as seen, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        warnings.simplefilter("always")
        summary = baseline.main([
            "--data_csv_path", str(data.csv), "--image_base_dir", str(data.images),
            "--clip_model", f"local-dir:{clips()}", "--output_dir", str(root / "out <b>&amp;"),
            "--num_workers", "0", "--epochs", "3", "--batch_size", "8", "--freeze_clip",
            "--lr", "0.003", "--val_ratio", "0.4", "--test_ratio", "0.2"])
    return SimpleNamespace(folder=root / "out <b>&amp;", summary=summary, out=out.getvalue(),
                           err=err.getvalue(), warnings=seen)


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


# --- pictures -------------------------------------------------------------------------------


def colourful(pixels, red):
    """Return how many pixels are clearly reddish (or bluish)."""
    r, b = pixels[..., 0].astype(int), pixels[..., 2].astype(int)
    return int(((r - b if red else b - r) > 60).sum())


@pytest.mark.parametrize("name", FILES[:3])
def test_pictures_decode_are_of_sensible_size_and_not_blank(done, name):
    """Each picture is a whole PNG with something on it."""
    with Image.open(done.folder / name) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    assert 300 <= height <= 2000 and 600 <= width <= 3000
    assert pixels.std() > 10 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert (pixels.min(axis=2) < 100).mean() > 0.002  # there is text or a line


@pytest.mark.parametrize("name", ["curves.png", "scatter.png"])
def test_both_targets_are_drawn(done, name):
    """Quality is drawn in blue and consistency in orange."""
    pixels = np.asarray(Image.open(done.folder / name).convert("RGB"))
    assert colourful(pixels, red=True) > 100 and colourful(pixels, red=False) > 100


def test_the_contact_sheet_shows_the_worst_images(done, tmp_path, report):
    """worst.png shows pictures, and others where other images are wrong."""
    pixels = np.asarray(Image.open(done.folder / "worst.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 2000
    other = report("--freeze_clip", "--seed", 3)
    again = np.asarray(Image.open(other.folder / "worst.png").convert("RGB"))
    assert again.shape != pixels.shape or (again != pixels).any()


def test_the_worst_images_are_those_with_the_largest_error(build, monkeypatch, tmp_path):
    """Each line holds the largest errors of its target, the largest first."""
    run, opened = build("--freeze_clip"), []
    load = baseline.load_image
    monkeypatch.setattr(baseline, "load_image", lambda path: opened.append(path) or load(path))
    rows = run.parts["train"]
    mos = baseline.human(run.table, rows)
    order = {"q": np.random.default_rng(0).permutation(len(rows)),
             "c": np.random.default_rng(1).permutation(len(rows))}
    pred = {t: mos[t] + np.where(np.arange(len(rows)) % 2, 1, -1) * 0.01 * (order[t] + 1)
            for t in "qc"}
    baseline.draw_worst(run, pred, rows, tmp_path / "worst.png")
    want = [run.table.paths[rows[i]] for t in "qc" for i in np.argsort(-order[t])[:6]]
    assert opened == want


def test_few_images_and_one_epoch_are_enough(report, tmp_path):
    """Two validation images and a single epoch still make every picture."""
    small = write_data(tmp_path / "small", prompts=[f"thing {i}" for i in range(6)], per_prompt=2)
    run = report("--freeze_clip", "--epochs", 1, "--batch_size", 64, data=small)
    assert all((run.folder / name).stat().st_size > 1000 for name in FILES)


def test_undefined_scores_do_not_stop_the_report(report, data, tmp_path):
    """Where all human scores are equal there are no correlations, but there is a report."""
    rows = [{**row, "mos_align": 2.5} for row in data.rows]
    same = SimpleNamespace(csv=write_csv(tmp_path / "same.csv", rows), images=data.images)
    run = report("--freeze_clip", data=same)
    assert all((run.folder / name).stat().st_size > 1000 for name in FILES)
    assert any("nan" in row for row in Page(run.folder / "report.html").rows)


# --- what is written ------------------------------------------------------------------------


def test_no_plots_writes_none(train, report):
    """--no_plots writes neither pictures nor page; without it all four are written."""
    without = train("--freeze_clip", out="without").folder
    assert not any((without / name).exists() for name in FILES)
    assert not list(without.rglob("*.png")) and not list(without.rglob("*.html"))
    folder = report("--freeze_clip", out="with").folder
    assert all((folder / name).exists() for name in FILES)
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_pictures_change_no_result(train, report):
    """The numbers are the same with and without pictures."""
    plain = train("--freeze_clip", "--lr", 1e-3, out="plain").summary
    drawn = report("--freeze_clip", "--lr", 1e-3, out="drawn").summary
    aside = ("seconds", "output_dir")
    assert {k: v for k, v in plain.items() if k not in aside} == {
        k: v for k, v in drawn.items() if k not in aside}


def test_the_last_line_and_the_result_are_equal(done):
    """result.json holds what the last line on stdout holds."""
    printed = json.loads(done.out.splitlines()[-1])
    assert printed == read_json(done.folder / "result.json")
    assert printed["test"]["srocc_q"] == pytest.approx(done.summary["test"]["srocc_q"])


# --- report.html ----------------------------------------------------------------------------


def test_the_page_stands_alone(done):
    """It refers to nothing outside; its three pictures are inside and are those on disk."""
    page = Page(done.folder / "report.html")
    assert "://" not in page.source and "url(" not in page.source and "@import" not in page.source
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    head = "data:image/png;base64,"
    assert len(page.sources) == 3 and all(source.startswith(head) for source in page.sources)
    inside = [base64.b64decode(source[len(head):], validate=True) for source in page.sources]
    assert inside == [(done.folder / name).read_bytes() for name in FILES[:3]]
    for picture in inside:
        Image.open(io.BytesIO(picture)).load()


def test_the_page_holds_the_numbers(done):
    """The table holds floors and run of the judged part; best epoch and verdict are named."""
    page, summary = Page(done.folder / "report.html"), done.summary
    columns = ["srocc_q", "plcc_q", "srocc_c", "plcc_c"]
    assert page.rows[0] == [name.upper() for name in columns]
    want = {"zero-shot": summary["floors_test"]["zero_shot"],
            "linear probe": summary["floors_test"]["linear_probe"], "this run": summary["test"]}
    assert [row[0] for row in page.rows[1:]] == list(want)
    for row in page.rows[1:]:
        assert row[1:] == [f"{want[row[0]][name]:.4f}" for name in columns]
    assert f"Best epoch {summary['best_epoch']} of 3" in page.source
    for t, name in (("q", "quality"), ("c", "consistency")):
        assert (f"{name}: {summary[f'tier_{t}']}, Train-Val Gap {summary[f'gap_{t}']:+.4f}"
                in page.source)
    count = len(baseline.read_csv(done.folder / "test_predictions.csv"))
    assert f"{count} test images" in page.text["h1"][0]


def test_the_page_is_about_validation_where_there_is_no_test_part(report):
    """Without a test part the table is that of the validation part."""
    run = report("--freeze_clip", "--lr", 1e-2)
    page = Page(run.folder / "report.html")
    assert "val" in page.text["h1"][0] and "test" not in page.text["h1"][0]
    assert page.rows[-1][1:] == [f"{run.summary['val'][name]:.4f}" for name in
                                 ("srocc_q", "plcc_q", "srocc_c", "plcc_c")]


def test_the_page_holds_the_command(done):
    """The first block is the whole command: it parses to the settings of this run."""
    words = shlex.split(Page(done.folder / "report.html").text["pre"][0])
    assert words[:2] == ["python", "baseline.py"]
    got = vars(baseline.parse_args(words[2:]))
    want = read_json(done.folder / "config.json")["arguments"]
    assert want["output_dir"] == str(done.folder) and want["lr"] == 0.003
    assert got["precision"] == "auto" and want["precision"] == "fp32"  # said; what it came to
    aside = ("explicit", "cache_dir", "precision")
    assert {k: v for k, v in got.items() if k not in aside} == {
        k: v for k, v in want.items() if k not in aside}


def test_the_command_of_a_demo_holds_what_was_said():
    """--demo has its own defaults: a flag that sets the program's own is in the command too."""
    args = baseline.parse_args(["--demo", "--epochs", "20", "--lr", "3e-5", "--num_workers", "4"])
    again = baseline.parse_args(shlex.split(baseline.changed_flags(args)))
    for name in ("demo", "epochs", "lr", "num_workers", "clip_model", "data_csv_path"):
        assert getattr(again, name) == getattr(args, name), name


def test_advice_is_on_the_page(report):
    """Each finding stands on the page with its next command."""
    run = report("--freeze_clip", "--lr", 1e-1, "--epochs", 3)
    page = Page(run.folder / "report.html")
    assert "learning rate outside the usual range" in page.text["b"]
    blocks = [parsed for text in page.text["pre"][1:]
              for parsed in [baseline.parse_args(shlex.split(text)[2:])]]
    assert len(blocks) == len(page.text["b"]) and 0.005 in [args.lr for args in blocks]


# --- texts that break things ----------------------------------------------------------------


def test_no_text_of_the_user_becomes_markup(done):
    """Prompts and paths with tags and entities stay text."""
    page = Page(done.folder / "report.html")
    assert not {"script", "svg"} & set(page.tags)
    assert not any(name.startswith("on") for name in page.attributes)
    assert page.tags.count("img") == 3
    assert "out <b>&amp;" in page.text["pre"][0]
    assert "<script>alert" not in page.source and "<img src=x" not in page.source


@pytest.mark.parametrize("flag", ["--name_column", "--prompt_column", "--explanation_column"])
def test_flags_cannot_inject_either(build, tmp_path, flag):
    """A flag's value reaches the page escaped."""
    evil = "</pre><script>alert(1)</script>"
    run = build("--freeze_clip")
    setattr(run.args, flag.lstrip("-"), evil)
    for name in FILES[:3]:
        (tmp_path / name).write_bytes(b"")
    values = {name: 0.5 for name in baseline.METRIC_NAMES}
    summary = {"best_epoch": 1, "epochs_run": 2, "floors": {"zero_shot": values},
               "tier_q": "good", "tier_c": "good", "gap_q": 0.01, "gap_c": 0.01,
               "val": {**values, "interval_q": [0.1, 0.9], "interval_c": [0.1, 0.9]}}
    advice = [baseline.Advice(evil, evil, {"lr": 1e-3})]
    baseline.write_html(run, summary, advice, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "script" not in page.tags and evil not in page.source
    assert evil in page.text["b"][0] and evil in page.text["pre"][0]


def test_no_prompt_makes_a_warning(done):
    """Chinese, Arabic, emoji and dollar signs print no warning about glyphs, fonts or maths."""
    text = [str(w.message) for w in done.warnings if issubclass(w.category, UserWarning)]
    assert text == []
    assert not [word for word in ("Warning", "findfont", "Traceback") if word in done.err]


@pytest.mark.parametrize("prompt", NASTY + ["$\\alpha$ and $", "x" * 500, "a\nb\tc", "\u202eevil"])
def test_every_prompt_can_be_drawn(build, data, tmp_path, prompt, recwarn, caplog):
    """A contact sheet of any prompt is drawn, and without a word."""
    run = build("--freeze_clip")
    run.table.prompts = [prompt] * len(run.table.prompts)
    rows = run.parts["val"]
    pred = {t: np.full(len(rows), 0.5, np.float32) for t in "qc"}
    caplog.clear()
    recwarn.clear()
    baseline.draw_worst(run, pred, rows, tmp_path / "worst.png")
    assert np.asarray(Image.open(tmp_path / "worst.png").convert("L")).std() > 10
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    assert not [r for r in caplog.records if "findfont" in r.message]


# --- in a browser ---------------------------------------------------------------------------


def test_a_browser_shows_the_page(done, tmp_path):
    """Headless Chromium renders heading, table and three pictures."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed")
    page = shutil.copy(done.folder / "report.html", tmp_path / "report.html")
    shown = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu",
         "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", f"file://{page}"],
        capture_output=True, text=True, timeout=120, check=True).stdout
    assert "Quality and consistency on" in shown.split("<h1>")[1].split("</h1>")[0]
    assert shown.count("<img ") == 3 and shown.count("<tr>") == 4 and "<script" not in shown
