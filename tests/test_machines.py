"""Other Pythons, systems, GPUs, launchers and mirrors; other people's weights; two runs at once."""

import ast
import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import filelock
import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from conftest import LONG, read_json, same_tensors, write_clip
from safetensors.torch import load_file

import baseline

PROGRAM = Path(baseline.__file__).resolve()
ALONE = {name: value for name, value in os.environ.items() if name not in baseline.TORCHRUN}
FILE = "open_clip_model.safetensors"


def started(code, **environment):
    """Run the program's file after some code, in a Python of its own, with --help."""
    code += ("; import sys, runpy; sys.argv = ['baseline.py', '--help']; "
             f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**ALONE, **environment}, check=False)


def test_an_older_python_is_told_what_it_needs():
    """The file parses from 3.8 on, and says at once that it needs 3.11; before, the line shows."""
    ast.parse(PROGRAM.read_text(encoding="utf-8"), feature_version=(3, 8))
    with pytest.raises(SyntaxError) as wrong:
        ast.parse(PROGRAM.read_text(encoding="utf-8"), feature_version=(3, 7))
    assert "3.11" in PROGRAM.read_text(encoding="utf-8").splitlines()[wrong.value.lineno - 1]
    for version in ((3, 8, 10), (3, 10, 12)):
        done = started(f"import sys; sys.version_info = {version}")
        assert done.returncode == 2 and done.stdout == ""
        assert "Python >= 3.11" in done.stderr and len(done.stderr.splitlines()) == 1
    assert started("pass").returncode == 0


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "4"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "four", "RANK": ""},
    {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    {"LOCAL_RANK": "3"}, {name: "" for name in baseline.TORCHRUN}])
def test_half_a_launcher_is_none(start, flags, tmp_path, environment):
    """What a cluster sets of torchrun's variables, unless it is all: one run, alone, to its end."""
    program = start(flags("--freeze_clip", "--epochs", 1), "script", environment)
    assert program.finish() == 0, program.said
    assert (tmp_path / "out" / "baseline_last.pt").exists()
    several = environment.get("WORLD_SIZE") not in (None, "")
    assert ("WARNING: going on alone" in program.said[0]) is several


def test_what_the_imports_make_is_not_searched_for_garbage(start):
    """It is set aside, and what the run makes is collected as ever."""
    program = start(["--predict", "nothing.png", "--checkpoint", "none.pt"], "collected")
    assert program.finish() == 2
    assert "collects: True, frozen: True" in program.said[0]


def test_a_process_that_finds_no_others_says_so(start, flags):
    """All of torchrun's variables by hand, but nobody there: one error, no traceback."""
    numbers = dict(zip(baseline.TORCHRUN, ("1", "2", "1", "2", "nowhere")))
    assert started("pass", **numbers).returncode == 0  # no whole number: alone
    program = start(flags(), "script", numbers | {"MASTER_PORT": "29555"})
    assert program.finish() == 2 and "Traceback" not in program.said[1]
    assert "MASTER_ADDR" in program.said[1] and "torchrun" in program.said[1]


@pytest.mark.parametrize("error", [TypeError, OSError, AttributeError])
def test_a_system_without_mallopt(train, monkeypatch, error):
    """Windows (CDLL(None) is a TypeError), musl and others train like glibc, without its knob."""
    def no_library(name):
        raise error("no such library")
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert np.isfinite(train("--freeze_clip", "--epochs", 1).row["val_srocc_q"])


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_another_gpu_is_named_and_not_used(monkeypatch, capsys, kind):
    """One line says that the run is on the CPU, and why."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available=False: torch.device(kind))
    assert baseline.pick_device(baseline.parse_args(["--no_amp"])).type == "cpu"
    assert capsys.readouterr().out.count(f"running on the CPU: on a GPU of type {kind}") == 1


# --- the hub and other people's weights -----------------------------------------------------


@pytest.mark.parametrize("endpoint, asked", [
    ("https://huggingface.co", ("huggingface.co", "https")),
    ("https://hf-mirror.example", ("hf-mirror.example", "https")),
    ("http://localhost:8090/hub", ("localhost", 8090))])
@pytest.mark.parametrize("there", [True, False])
def test_the_hub_that_is_asked_is_the_users(monkeypatch, endpoint, asked, there):
    """HF_ENDPOINT names the host that decides whether there is a network."""
    def connect(address, timeout):
        assert address == asked and timeout <= 10
        if not there:
            raise OSError("no route")
        return SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(baseline.urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", connect)
    baseline.skip_unreachable_hub()
    assert huggingface_hub.constants.HF_HUB_OFFLINE is not there


def test_a_missing_package_is_one_error_before_any_weights(refused, monkeypatch, tmp_path):
    """Every model whose tokenizer needs transformers says how to get it, and downloads nothing."""
    folder = write_clip(tmp_path / "own")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: pytest.fail("too late"))
    names = [name for name in open_clip.list_models() if "hf_tokenizer_name" in
             open_clip.get_model_config(name)["text_cfg"]]
    assert len(names) > 40 and "ViT-B-16-SigLIP" in names
    monkeypatch.setattr(baseline, "skip_unreachable_hub", lambda: None)
    for name in names:
        args = baseline.parse_args(["--clip_model", name, "--pretrained", "webli"])
        with pytest.raises(baseline.UserError, match="pip install transformers"):
            baseline.load_clip(args, 0)
    text = (folder / "open_clip_config.json").read_text()
    (folder / "open_clip_config.json").write_text(text.replace(
        '"text_cfg": {', '"text_cfg": {"hf_tokenizer_name": "x/y", '))
    assert "pip install transformers" in refused(clip=folder)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_open_clip_loads(flags, clips, tmp_path, old, prefix):
    """Weights beside an optimiser with NumPy's numbers, of NumPy 1 or 2, with DDP's prefix."""
    state = load_file(clips() / FILE)
    numbers = np.float64(1e-3), np.float32(2), np.int64(3), np.bool_(True)
    torch.save({"epoch": 3, "name": "x", "state_dict": {prefix + k: v for k, v in state.items()},
                "optimizer": {"param_groups": [{"lr": number} for number in numbers]}},
               tmp_path / "epoch_3.pt")
    if old:  # the same file, as NumPy 1 names it: in a pickle of another length
        with zipfile.ZipFile(tmp_path / "epoch_3.pt") as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(tmp_path / "epoch_3.pt", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content.replace(b"numpy._core", b"numpy.core"))
    args = baseline.parse_args(flags("--pretrained", tmp_path / "epoch_3.pt"))
    got = baseline.load_clip(args, 0)[0].state_dict()
    assert same_tensors({key.removeprefix("text."): value for key, value in got.items()}, state)


def test_a_torchscript_archive_says_what_to_give_instead(refused, tmp_path):
    """OpenAI's files are programs, not weights."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    said = refused("--pretrained", tmp_path / "ViT-B-32.pt")
    assert "--pretrained openai" in said and len(said.splitlines()) == 1


# --- two runs at once -----------------------------------------------------------------------


@pytest.fixture
def long_run(start, flags, tmp_path):
    """Start a run that does not end, in a process of its own; returns it when it trains."""
    program = start(flags("--freeze_clip", "--epochs", 100_000))
    until = time.monotonic() + LONG
    while not (tmp_path / "out" / "baseline_last.pt").exists():
        assert program.process.is_alive() and time.monotonic() < until
        time.sleep(0.1)
    return program.process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_folder_belongs_to_one_run_at_a_time(long_run, refused, train, tmp_path, number):
    """A second run, resumed or repeated, is refused and changes nothing; a dead one is free."""
    config = (tmp_path / "out" / "config.json").read_bytes()
    last = tmp_path / "out" / "baseline_last.pt"
    for more in ([], ["--repeats", 2], ["--resume_from", last, "--epochs", 100_000]):
        said = refused("--freeze_clip", *more)
        assert f"Another run is writing to {tmp_path / 'out'}" in said and "--output_dir" in said
    assert (tmp_path / "out" / "config.json").read_bytes() == config
    assert not (tmp_path / "out" / "archive").exists() and long_run.is_alive()
    assert train("--freeze_clip", out="other").row["best_epoch"] >= 0
    os.kill(long_run.pid, number)
    long_run.join()
    half = tmp_path / "out" / f".baseline_last.pt.{long_run.pid}.half"
    half.write_bytes(b"of a killed run")
    row = train("--freeze_clip").row
    assert read_json(tmp_path / "out" / "result.json")["command"] == row["command"]
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"),
                                   NotImplementedError("no flock")])
def test_a_disk_without_locks_is_said(train, monkeypatch, capsys, error):
    """Some disks of a network know no locks: one line, and the run goes on."""
    def acquire(self, timeout):
        raise error
    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    train("--freeze_clip", "--epochs", 1)
    assert capsys.readouterr().out.count("WARNING: no lock keeps a second run out") == 1


def test_what_is_no_folder_is_refused_first(refused, tmp_path):
    """Where nothing can be written, nothing is loaded."""
    (tmp_path / "out").write_text("a file")
    assert "must be writable" in refused("--clip_model", "no such model")


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """The name under which a file is written is its process's own."""
    with baseline.writing(tmp_path / "a.csv") as half:
        assert str(os.getpid()) in half.name and half.parent == tmp_path
        half.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
