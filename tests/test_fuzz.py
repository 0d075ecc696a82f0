"""Whatever is thrown at it, the program succeeds or says what is wrong; it never falls over.

The cases are generated, the same ones in every run.
"""

import contextlib
import csv
import io
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import draw
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import baseline

CASES = {"count": 0}


def fuzz(count):
    """Return the settings of a test of so many cases."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def ours():
    """Let our own errors pass: UserError, or the parser's status 2; count the case."""
    CASES["count"] += 1
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    except baseline.UserError as error:
        assert str(error).strip()
    except SystemExit as stop:
        assert stop.code == 2


# --- flags ----------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers().map(str), st.floats().map(str),
                    st.sampled_from(["9" * 400, "1e400", "-0", "nan", "inf", "1_0", "٣", "0x1", "",
                                     "1" * 5000, "-1e-400", "5e-324"]))
FLAGS = [flag for action in baseline.build_parser()._actions for flag in action.option_strings
         if flag not in ("-h", "--help")]
WORDS = st.one_of(NUMBERS, st.text(max_size=8), st.sampled_from(
    [*FLAGS, "A", "F", "prompt", "cosine", "none", "auto", "fp32", "--", "-", "--epochs=", "%s"]))


@fuzz(700)
@given(st.lists(st.one_of(WORDS, st.sampled_from(FLAGS), st.tuples(
    st.sampled_from(FLAGS), WORDS).map("=".join)), max_size=8))
@example(["--epochs", "9" * 400])
def test_any_command_line(words):
    """Any words are a command or are refused."""
    with ours():
        args = baseline.parse_args(words)
        assert 0 <= args.dropout < 1 and args.epochs >= 1 and math.isfinite(args.lr)


# --- CSVs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with three images for the generated CSVs."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("a.png", "b.jpg", "-c.png"):
        draw(np.random.default_rng(0)).save(folder / name)
    return folder


def csv_flags(place, *more):
    """Return the arguments of a command that reads the generated CSV."""
    return baseline.parse_args(["--data_csv_path", str(place / "x.csv"), "--image_base_dir",
                                str(place), "--num_workers", "0", *more])


HEADER = b"name,prompt,mos_quality,mos_align\n"
SNIPPETS = st.sampled_from([b"a.png", b"b.jpg", b",", b"\n", b"\r", b'"', b"1", b"5.0", b"nan",
                            b"\0", b"\xff", b"\xef\xbb\xbf", b"\t", b"=1", b"-", b"a cat", b"''",
                            "猫".encode(), b"1e999", b";", HEADER, b"../x", b"x" * 300])
BYTES = st.one_of(st.binary(max_size=60), st.lists(SNIPPETS, max_size=25).map(b"".join),
                  st.lists(SNIPPETS, max_size=25).map(lambda parts: HEADER + b"".join(parts)))


@fuzz(500)
@given(BYTES, st.booleans())
@example(HEADER + b"a.png,x,1,1,\nb.jpg,y,2,2,\n", False)  # one cell too many in every row
def test_any_bytes_as_a_csv(place, content, explanations):
    """Any bytes are a table or are refused."""
    (place / "x.csv").write_bytes(content)
    with ours():
        check_table(baseline.load_table(csv_flags(
            place, *(["--use_explanations"] if explanations else []))))


CELLS = st.one_of(NUMBERS, st.text(max_size=6), st.sampled_from(["1", "2.5", "5", "a cat"]))
NAMES = st.one_of(st.sampled_from(["a.png", "b.jpg", "-c.png", "./a.png", ".", "..", "/", "a.png/",
                                   "gone.png", "x.csv", "~", "a\0.png", "x" * 5000]),
                  st.text(max_size=6))
ROWS = st.lists(st.tuples(NAMES, CELLS, CELLS, CELLS, CELLS), max_size=4)
COLUMNS = ["name", "prompt", "mos_quality", "mos_align", "explanation"]
SCALES = st.sampled_from([[], ["--label_scale_q", "5e-324"], ["--label_scale_c", "1e308"],
                          ["--skip_bad_images"], ["--use_explanations"]])


def check_table(table):
    """Check what every table of the loader must be."""
    for mos in (table.quality, table.consistency):
        assert np.isfinite(mos).all() and (mos >= 0).all() and (mos <= 1).all()
    assert len(table.paths) == len(table.prompt_id) == len(table.frame)
    assert all(path.is_file() for path in table.paths)


@fuzz(400)
@given(ROWS, SCALES)
def test_any_rows_as_a_csv(place, rows, more):
    """Any cells are a table, with scores in [0, 1] and files that exist, or are refused."""
    pd.DataFrame(rows, columns=COLUMNS).to_csv(place / "x.csv", index=False, errors="replace")
    with ours():
        args = csv_flags(place, *more)
        table = baseline.load_table(args)
        check_table(table)
        baseline.split_rows(table, args, 0)


def is_number(text):
    """Return whether a text is a number."""
    try:
        return isinstance(float(text), float)
    except ValueError:
        return False


@fuzz(400)
@given(ROWS, st.lists(st.sampled_from([*COLUMNS, "quality", "quality_input", "error", "=x", ""]),
                      min_size=5, max_size=5), st.sampled_from([".csv", ".txt", "", ".png"]))
@example([("x" * 5000, "a cat", "1", "1", "")], COLUMNS, ".csv")  # longer than a name may be
def test_any_rows_to_score(place, rows, columns, suffix):
    """Any target is one image per row and a CSV without formulas, or is refused."""
    target = place / f"score{suffix}"
    pd.DataFrame(rows, columns=columns).to_csv(target, index=False, errors="replace")
    saved = SimpleNamespace(name_column="name", prompt_column="prompt", image_base_dir=str(place))
    with ours():
        args = baseline.parse_args(["--predict", str(target)])
        frame, paths, prompts = baseline.scoring_frame(args, saved)
        assert len(frame) == len(paths) == len(prompts) > 0
        scores = {key: np.full(len(frame), 0.5, np.float32) for key in baseline.PREDICTIONS[:4]}
        named = baseline.rename_taken(frame)
        baseline.add_scores(named, scores, {0: "=bad"}, {"q": 5, "c": 5}, args)
        assert named.columns.is_unique and named.shape[1] == frame.shape[1] + 5
        head, *body = csv.reader(io.StringIO(baseline.frame_csv(named)))
        assert len(body) == len(frame) and body[0][-1] == "'=bad"
        for cell in [*head, *(cell for row in body for cell in row)]:
            assert not cell.startswith(("=", "@"))
            assert not cell.startswith(("+", "-", "\t", "\r")) or is_number(cell)


# --- images ---------------------------------------------------------------------------------


def encoded(kind):
    """Return a small picture in a format."""
    buffer = io.BytesIO()
    draw(np.random.default_rng(1), 12, 9).save(buffer, kind)
    return buffer.getvalue()


PICTURES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM",
                                             "TGA", "PCX", "ICO", "SGI", "DDS")}
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=5)), max_size=4)


def damaged(picture, changes, keep):
    """Return the bytes of a picture, cut and with some of them replaced."""
    content = bytearray(picture)
    for place, new in changes:
        start = int(place * len(content))
        content[start:start + len(new)] = new
    return bytes(content[:math.ceil(keep * len(content))])


IMAGES = st.one_of(st.binary(max_size=80), st.builds(
    damaged, st.sampled_from(list(PICTURES.values())), CHANGES, st.sampled_from([1.0, 0.9, 0.3])))


@fuzz(600)
@given(IMAGES)
def test_any_bytes_as_an_image(place, content):
    """Any bytes are an RGB picture or have a reason why not."""
    path = place / "image"
    path.write_bytes(content)
    with warnings.catch_warnings(), ours():
        warnings.simplefilter("ignore")
        dataset = baseline.ImageBatches([path], vars_of_preprocess())
        images, errors = dataset[np.array([0])]
        assert images.shape == (1, 3, 32, 32) and set(errors) <= {0}
        reason = baseline.ReadErrors([path])[0]
        assert bool(reason) == bool(errors) and all(errors.values())


def vars_of_preprocess():
    """Return a preprocess config for small pictures."""
    return {"size": 32, "mode": "RGB", "mean": (0.5,) * 3, "std": (0.5,) * 3,
            "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}


def test_there_were_enough_cases():
    """The tests above threw at least 2,000 cases."""
    assert CASES["count"] == 0 or CASES["count"] >= 2000
