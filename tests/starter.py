"""Start the program in forks of one process that has imported it: in 0.1 s instead of 5 s.

The process has imported, but never computed, so its forks begin as a fresh one would. Each request
comes through the socket on standard input: a JSON object {"argv", "tamper"}, with three files: the
fork's standard output, its standard error, and where its process id and, in the end, its status
are written. The fork ends by a signal, or as any Python program does, but for the seconds in which
Python would tear a thousand modules down.
"""

import atexit
import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import baseline


def slow(name, seconds):
    """Slow one function of the program down: it says `here`, waits, then goes on."""
    real = getattr(baseline, name)

    def wait(*args, **kwargs):
        print("here", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)
        return real(*args, **kwargs)
    setattr(baseline, name, wait)


def die():
    """Be killed, as by an out-of-memory killer: nothing of the program can notice."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill(place, call):
    """Kill this process at the given call (from 1) of a place: in the middle of what it does."""
    owner, name = PLACES[place]
    real, calls = getattr(owner, name), []

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) < call:
            return real(*args, **kwargs)
        if place == "checkpoint":  # half of it is in the file
            path = f"{args[1].name}.whole"
            real(args[0], path)
            content = Path(path).read_bytes()
            Path(path).unlink()
            args[1].write(content[:len(content) // 2])
            args[1].flush()
        elif place == "after rename":
            real(*args, **kwargs)
        return die()
    setattr(owner, name, killing)


PLACES = {"update": (baseline, "apply_update"), "evaluation": (baseline, "evaluate"),
          "cache": (baseline.ImageInputs, "boundary"), "checkpoint": (torch, "save"),
          "before rename": (os, "replace"), "after rename": (os, "replace"),
          "log": (baseline, "write_log"), "result": (baseline, "write_json")}


def run(request, files):
    """Become the program: a session of its own, with its own standard streams."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, *files[:2])):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    name, *more = request["tamper"] or [None]
    if name:
        {"slow": slow, "kill": kill}[name](*more)
    status = 0
    try:
        baseline.main(request["argv"])
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()  # ends worker processes, as every exit does
    os._exit(status)


def keep(request, files):
    """Start the program in a fork, and report its process id and its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        run(request, files)
    for file in files[:2]:
        os.close(file)
    os.write(files[2], f"{pid}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(files[2], f"{status}\n".encode())
    os._exit(0)


def serve():
    """Answer requests until the socket is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who keeps a program is nobody's concern
    with socket.socket(fileno=os.dup(0)) as requests:
        while True:
            content, files, _, _ = socket.recv_fds(requests, 2 ** 20, 3)
            if not content:
                return
            if not os.fork():
                requests.close()
                keep(json.loads(content), files)
            for file in files:
                os.close(file)
            requests.send(b".")


if __name__ == "__main__":
    gc.freeze()  # collecting in a fork would copy the memory of all that was imported
    serve()
