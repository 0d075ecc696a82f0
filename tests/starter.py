"""Start the program in forks of one process that has imported it: in 0.1 s instead of 5 s.

That is multiprocessing's fork server. It has computed nothing, so that its forks begin as a fresh
process would; `run` is what they do. tamper: a function below and its arguments.
"""

import functools
import gc
import itertools
import os
import runpy
import signal
import sys
import threading
import time
from types import SimpleNamespace

import open_clip
import torch

import baseline

# Most of a tiny run were its intervals; the program draws DRAWS, which test_trust.py tests.
(DRAWS,), baseline.bootstrap.__defaults__ = baseline.bootstrap.__defaults__, (50,)


def read_vocabulary_once(real=open_clip.SimpleTokenizer.__init__):
    """Let all tokenizers of open_clip share their vocabulary, which takes an epoch to be read."""
    @functools.cache
    def content(*args, **options):
        first = SimpleNamespace()
        real(first, *args, **options)
        return vars(first)
    open_clip.SimpleTokenizer.__init__ = (
        lambda self, *args, **options: vars(self).update(content(*args, **options)))


read_vocabulary_once()
open_clip.get_tokenizer("ViT-B-32")  # before any fork

PLACES = {  # where it can be struck: (owner, function, which argument is the file)
    "update": (baseline, "update", 0), "evaluation": (baseline, "evaluate", 0),
    "half checkpoint": (torch, "save", 1), "half written": (os, "replace", 1),
    "before rename": (os, "replace", 1), "after rename": (os, "replace", 1)}


def hang(name, call=1):
    """Let a call (from 1) of a function of the program hang: it says `here`, and never ends."""
    real, calls = getattr(baseline, name), itertools.count(1)

    def wait(*args, **kwargs):
        if next(calls) == call:
            print("here", flush=True)
            while True:  # a signal just before a long sleep would wait for its end
                time.sleep(0.05)
        return real(*args, **kwargs)
    setattr(baseline, name, wait)


def strike(number, place, call=1, name=""):
    """Send this process a signal at a call (from 1) of a place, among those on files of a name."""
    owner, function, which = PLACES[place]
    real, calls = getattr(owner, function), itertools.count(1)

    def struck(*args, **kwargs):
        file = args[which]
        if (name and name not in str(file)) or next(calls) != call:
            return real(*args, **kwargs)
        if hasattr(file, "write"):  # torch writes through Python: inside of what it does
            writes = itertools.chain([file.write] * 19, [lambda _: signal.raise_signal(number)],
                                     itertools.repeat(file.write))
            return real(args[0], SimpleNamespace(write=lambda part: next(writes)(part),
                                                 flush=file.flush))
        if place in ("half checkpoint", "after rename"):
            real(*args, **kwargs)
        if place.startswith("half"):
            half = file if function == "save" else args[0]
            os.truncate(half, os.path.getsize(half) // 2)
        signal.raise_signal(number)
        if threading.current_thread() is not threading.main_thread():
            raise KeyboardInterrupt  # what the main thread gets, wherever it is
    setattr(owner, function, struck)


def strike_cache(number, batch):
    """Send this process a signal before a batch (from 1) of any cache is computed."""
    real = baseline.cached

    def cached(args, kind, key, batches, compute):
        def struck(own):
            for i, value in enumerate(compute(own), 1):
                if i == batch:
                    signal.raise_signal(number)
                yield value
        return real(args, kind, key, batches, struck)
    baseline.cached = cached


def strike_later(number, seconds):
    """Send this process a signal so long after its training has begun."""
    def fit(run, real=baseline.fit):
        threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
        real(run)
        time.sleep(60)  # it is struck here at the latest
    baseline.fit = fit


def script(environment):
    """Run the program's file as a script, with all that it reads of its environment at first."""
    def main(argv):
        sys.argv = [baseline.__file__, *map(str, argv)]
        runpy.run_path(baseline.__file__, run_name="__main__")
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=environment.get("PYTHONIOENCODING"))
    baseline.main = main


def collected():
    """Run the program's file as a script, and say at the end whether garbage is collected."""
    def main(argv):
        sys.argv = [baseline.__file__, *map(str, argv)]
        try:
            runpy.run_path(baseline.__file__, run_name="__main__")
        finally:
            print(f"collects: {gc.isenabled()}, frozen: {gc.get_freeze_count() > 100_000}")
    baseline.main = main


def run(argv, files, tamper):
    """Be the program: in a session of its own, with its output and its errors in two files."""
    os.setsid()
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    if tamper:
        globals()[tamper[0]](*tamper[1:])
    baseline.main(argv)
