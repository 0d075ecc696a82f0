"""Whatever generated input it gets, the program succeeds or says what is wrong."""

import contextlib
import io
import math
import shlex
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import draw
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import baseline

CASES = []


def fuzz(count):
    """Return the settings of a test of so many cases."""
    CASES.append(count)
    return settings(max_examples=count, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def ours():
    """Let our own errors pass: UserError, or the parser's status 2."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    except baseline.UserError as error:
        assert str(error).strip()
    except SystemExit as stop:
        assert stop.code == 2


NUMBERS = st.one_of(st.integers().map(str), st.floats().map(str),
                    st.sampled_from(["9" * 400, "1e400", "-0", "nan", "inf", "1_0", "٣", "0x1", "",
                                     "1" * 5000, "-1e-400", "5e-324"]))
FLAGS = [f"--{name}" for name in vars(baseline.build_parser().parse_args([]))]
WORDS = st.one_of(NUMBERS, st.text(max_size=8), st.sampled_from(FLAGS), st.sampled_from(
    ["A", "F", "prompt", "cosine", "none", "auto", "fp32", "--", "-", "--epochs=", "%s"]))


@fuzz(500)
@given(st.lists(st.one_of(WORDS, st.tuples(st.sampled_from(FLAGS), WORDS).map("=".join)),
                max_size=8))
@example(["--epochs", "9" * 400])
@example(["--freeze_layers", "0", "--partial_freeze"])
def test_any_command_line(words):
    """Any words are a command or are refused."""
    with ours():
        args = baseline.parse_args(words)
        assert 0 <= args.dropout < 1 and args.epochs >= 1 and math.isfinite(args.lr)
        assert args.freeze_layers >= 1 and shlex.split(args.command) == words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with three images for the generated CSVs."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("a.png", "b.jpg", "-c.png"):
        draw(np.random.default_rng(0)).save(folder / name)
    return folder


def load_table(place, *more):
    """Read the generated CSV; check what every table must be; returns it and the arguments."""
    args = baseline.parse_args(["--data_csv_path", place / "x.csv", "--image_base_dir", place,
                                "--num_workers", 0, *more])
    table = baseline.load_table(args)
    frame, mos = table.frame, table.frame[["q", "c"]].to_numpy()
    assert np.isfinite(mos).all() and (mos >= 0).all() and (mos <= 1).all()
    assert all(path.is_file() for path in frame["path"])
    assert frame["prompt"].tolist() == [table.prompts[i] for i in frame["prompt_id"]]
    texts = [*table.explanations, ""]  # -1 is none
    assert "explanation" not in frame or [*map(str.strip, frame["explanation"])] == [
        texts[i] for i in frame["explanation_id"]]
    return table, args


HEADER = b"name,prompt,mos_quality,mos_align\n"
SNIPPETS = st.sampled_from([b"a.png", b"b.jpg", b",", b"\n", b"\r", b'"', b"1", b"5.0", b"nan",
                            b"\0", b"\xff", b"\xef\xbb\xbf", b"\t", b"=1", b"-", b"a cat", b"''",
                            "猫".encode(), b"1e999", b";", HEADER, b"../x", b"x" * 300])
BYTES = st.one_of(st.binary(max_size=60), st.lists(SNIPPETS, max_size=25).map(b"".join),
                  st.lists(SNIPPETS, max_size=25).map(lambda parts: HEADER + b"".join(parts)))


@fuzz(250)
@given(BYTES, st.booleans())
@example(HEADER + b"a.png,x,1,1,\nb.jpg,y,2,2,\n", False)  # one cell too many in every row
def test_any_bytes_as_a_csv(place, content, explanations):
    """Any bytes are a table or are refused."""
    (place / "x.csv").write_bytes(content)
    with ours():
        load_table(place, *(["--use_explanations"] if explanations else []))


CELLS = st.one_of(NUMBERS, st.text(max_size=6), st.sampled_from(["1", "2.5", "5", "a cat"]))
NAMES = st.one_of(st.sampled_from(["a.png", "b.jpg", "-c.png", "./a.png", ".", "..", "/", "a.png/",
                                   "gone.png", "x.csv", "~", "a\0.png", "x" * 5000]),
                  st.text(max_size=6))
ROWS = st.lists(st.tuples(NAMES, CELLS, CELLS, CELLS, CELLS), max_size=4)
COLUMNS = ["name", "prompt", "mos_quality", "mos_align", "explanation"]
SCALES = st.sampled_from([[], ["--label_scale_q", "5e-324"], ["--label_scale_c", "1e308"],
                          ["--skip_bad_images"], ["--use_explanations"]])


@fuzz(100)
@given(ROWS, SCALES)
@example([("a.png", "a cat", "1", "1", " "), ("b.jpg", "a dog", "5", "2.5", "x ")],
         ["--use_explanations"])
def test_any_rows_as_a_csv(place, rows, more):
    """Any cells are a table, with scores in [0, 1] and files that exist, or are refused."""
    pd.DataFrame(rows, columns=COLUMNS).to_csv(place / "x.csv", index=False, errors="replace")
    with ours():
        table, args = load_table(place, *more)
        parts = baseline.split_rows(table, args, 0)
        assert sorted(np.concatenate([*parts.values()])) == list(range(len(table.frame)))


@fuzz(150)
@given(ROWS, st.lists(st.sampled_from([*COLUMNS, "quality", "quality_input", "error", "=x", ""]),
                      min_size=5, max_size=5), st.sampled_from([".csv", ".txt", ".tsv", "", ".png"]))
@example([("x" * 5000, "a cat", "1", "1", "")], COLUMNS, ".csv")  # longer than a name may be
def test_any_rows_to_score(place, rows, columns, suffix):
    """Any target is one image per row, its cells as they stand there, or is refused."""
    target = place / f"score{suffix}"
    pd.DataFrame(rows, columns=columns).to_csv(target, index=False, errors="replace")
    saved = SimpleNamespace(name_column="name", prompt_column="prompt", image_base_dir=str(place))
    with ours():
        args = baseline.parse_args(["--predict", target])
        frame, paths, prompts, _ = baseline.scoring_frame(args, saved)
        assert len(frame) == len(paths) == len(prompts) > 0
        table = suffix in baseline.TABLES
        assert table or (paths == [target] and frame["name"].tolist() == [target.name])
        assert not table or paths == [place / name.strip().replace("\\", "/")
                                      for name in baseline.cells_of(frame, "name")]
        assert all(isinstance(prompt, str) for prompt in prompts)


def encoded(kind):
    """Return a small picture in a format."""
    buffer = io.BytesIO()
    draw(np.random.default_rng(1), 12, 9).save(buffer, kind)
    return buffer.getvalue()


PICTURES = [*map(encoded, "PNG JPEG GIF BMP WEBP TIFF PPM TGA PCX ICO SGI DDS".split())]
PREPROCESS = {"size": 32, "mode": "RGB", "mean": (0.5,) * 3, "std": (0.5,) * 3,
              "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=5)), max_size=4)


def damaged(picture, changes, keep):
    """Return the bytes of a picture, cut and with some of them replaced."""
    content = bytearray(picture)
    for place, new in changes:
        start = int(place * len(content))
        content[start:start + len(new)] = new
    return bytes(content[:math.ceil(keep * len(content))])


IMAGES = st.one_of(st.binary(max_size=80), st.builds(
    damaged, st.sampled_from(PICTURES), CHANGES, st.sampled_from([1.0, 0.9, 0.3])))


@fuzz(1000)
@given(IMAGES)
@example(PICTURES[0])
def test_any_bytes_as_an_image(place, content):
    """Any bytes are an RGB picture or have a reason why not."""
    path = place / "image"
    path.write_bytes(content)
    with warnings.catch_warnings(), ours():
        warnings.simplefilter("ignore")
        images, errors = baseline.Decoder([path], PREPROCESS)(np.array([0]))
        assert images.shape == (1, 3, 32, 32) and set(errors) <= {0}
        assert all(errors.values()) and bool(errors) <= (images == 0).all()
        assert content not in PICTURES or not errors
        assert errors or baseline.load_image(path).mode == "RGB"


def test_there_were_enough_cases():
    """The tests above throw at least 2,000 cases."""
    assert sum(CASES) >= 2000
