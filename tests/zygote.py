#!/usr/bin/env python3
"""A process that has imported torch and timm, and forks for each test that needs a process of its own.

Nearly all of the time of a short train.py are its imports. `python tests/zygote.py SOCKET WITHOUT PADDING`
imports them once, all but the library WITHOUT if that is not empty; whoever connects says what is to run, as
`python` would be told, and hands over three descriptors. A fork runs it, in a session of its own if that is
asked for, with its own pid, folder, environment, command line in /proc, signals, exit code and global
generators. Its parent is the zygote, whoever asked. Nothing of reconverge is imported before the fork: any
checkout can be run.

`Forked` is the client for tests, with the interface of subprocess.Popen. tests/python is one for programs
that start a Python of their own (torchrun, by PYTHON_EXEC; verify and selftest, by sys.executable).
"""

import array
import atexit
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

# What train.py, eval.py and torchrun import, apart from reconverge.
MODULES = (
    "hydra", "matplotlib.backends.backend_agg", "matplotlib.figure", "PIL.Image", "scipy.io",
    "sklearn.datasets",
    "torch", "torch._dynamo", "torch.distributed.run", "torchvision", "safetensors.torch", "rich.progress",
    "torchmetrics.functional.classification", "timm", "timm.data",
)  # fmt: skip


def preload(without):
    sys.modules["wandb"] = None
    for name in MODULES:
        if name.partition(".")[0] != without:
            importlib.import_module(name)
    assert without not in sys.modules
    del sys.modules["wandb"]
    gc.collect()
    gc.freeze()


def serve(path, without):
    """Until standard input is closed. In a fork this returns what it is to run."""
    preload(without)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(path)
    listening.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listening, selectors.EVENT_READ, None)
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    children = {}  # pid -> (connection, handle of the process)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                sys.exit()
            if key.fileobj is listening:
                connection, _ = listening.accept()
                job, descriptors = received(connection)
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    listening.close()
                    return job, descriptors
                for descriptor in descriptors:
                    os.close(descriptor)
                handle = os.pidfd_open(pid)
                children[pid] = connection, handle
                selector.register(connection, selectors.EVENT_READ, pid)
                selector.register(handle, selectors.EVENT_READ, pid)
                send(connection, pid)
                continue
            pid = key.data
            connection, handle = children[pid]
            if key.fileobj is connection:  # whoever asked is gone, as if it had been the process itself
                selector.unregister(connection)
                os.kill(pid, signal.SIGKILL)
                continue
            _, status = os.waitpid(pid, 0)
            send(connection, os.waitstatus_to_exitcode(status))
            selector.unregister(handle)
            os.close(handle)
            if connection in selector.get_map():
                selector.unregister(connection)
            connection.close()
            del children[pid]


def received(connection):
    """A job and its descriptors."""
    length = int.from_bytes(connection.recv(4), "little")
    data, ancillary, _, _ = connection.recvmsg(length, socket.CMSG_SPACE(3 * 4))
    while len(data) < length:
        data += connection.recv(length - len(data))
    descriptors = array.array("i")
    for _, _, content in ancillary:
        descriptors.frombytes(content)
    return json.loads(data), list(descriptors)


def send(connection, number):
    try:
        connection.sendall(number.to_bytes(4, "little", signed=True))
    except OSError:
        pass  # nobody asks any more


def run(job, descriptors):
    """As `python ARGUMENTS` would."""
    if job["session"]:
        os.setsid()
    for own, theirs in enumerate(descriptors):
        os.dup2(theirs, own)
        os.close(theirs)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    tempfile.tempdir = None
    random.seed()  # what no seed has set differs from process to process
    sys.modules["numpy"].random.seed()
    be_called([job["executable"], *job["arguments"]])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As they would be opened anew: in blocks where they are no terminal.
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.executable = job["executable"]
    arguments = [argument for argument in job["arguments"] if argument != "-u"]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path]
    if arguments[0] == "-m":
        sys.path.insert(0, "")
        sys.argv = arguments[1:]
        sys.modules.pop(arguments[1], None)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def be_called(command):
    """In /proc/PID/cmdline, where pgrep looks: over the zygote's own, which is long enough."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(start)
        memory.write("\0".join(command).encode()[: end - start - 1].ljust(end - start, b"\0"))


# ---- those who ask -----------------------------------------------------------------------------------------


def ask(path, arguments, descriptors, session=False, folder=None, environment=None, executable=None):
    """A connection, over which come the pid of the process and, at its end, its exit code."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    job = {
        "arguments": [str(argument) for argument in arguments],
        "folder": str(folder or os.getcwd()),
        "environment": dict(os.environ if environment is None else environment),
        "session": session,
        "executable": executable or sys.executable,
    }
    data = json.dumps(job).encode()
    connection.sendall(len(data).to_bytes(4, "little"))
    connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])
    return connection


def answer(connection):
    """The next number, if it comes before the connection's time is over; None if the zygote is gone."""
    data = connection.recv(4)
    return int.from_bytes(data, "little", signed=True) if data else None


class Forked:
    """`python ARGUMENTS` as a fork of the zygote, with the interface of subprocess.Popen."""

    def __init__(self, path, arguments, stdout=None, stderr=None, **options):
        self.args, self.returncode, self.stdout, self.stderr = arguments, None, None, None
        own, pipes = [os.open(os.devnull, os.O_RDONLY), 1, 2], []
        if stdout == subprocess.PIPE:
            reading, own[1] = os.pipe()
            pipes.append(own[1])
            self.stdout = os.fdopen(reading)
        elif stdout is not None:
            own[1] = stdout if isinstance(stdout, int) and stdout >= 0 else stdout.fileno()
        if stderr == subprocess.STDOUT:
            own[2] = own[1]
        elif stderr == subprocess.PIPE:
            reading, own[2] = os.pipe()
            pipes.append(own[2])
            self.stderr = os.fdopen(reading)
        self._connection = ask(path, arguments, own, **options)
        self.pid = answer(self._connection)
        for descriptor in [own[0], *pipes]:
            os.close(descriptor)

    def poll(self):
        with selectors.DefaultSelector() as selector:
            if self.returncode is None:
                selector.register(self._connection, selectors.EVENT_READ)
                if selector.select(0):
                    self._end()
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self._end()
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout) from None
        return self.returncode

    def _end(self):
        code = answer(self._connection)
        self.returncode = -signal.SIGKILL if code is None else code
        self._connection.close()

    def communicate(self, timeout=None):
        """What it wrote to its pipes, once it has ended."""
        said = {}
        pipes = [name for name in ("stdout", "stderr") if getattr(self, name)]
        threads = [threading.Thread(target=self._drain, args=(said, name), daemon=True) for name in pipes]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for name, thread in zip(pipes, threads, strict=True):
            thread.join(timeout)
            getattr(self, name).close()
        return said.get("stdout"), said.get("stderr")

    def _drain(self, said, name):
        said[name] = getattr(self, name).read()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def as_python():
    """What tests/python does: run by the zygote what it was told to, hand signals on, end with its code."""
    environment = dict(os.environ)
    path = environment["RECONVERGE_ZYGOTE"]
    connection = ask(path, sys.argv[1:], [0, 1, 2], environment=environment, executable=sys.argv[0])
    pid = answer(connection)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    code = answer(connection)
    if code is None or code < 0:  # as the process itself would have ended
        number = signal.SIGKILL if code is None else -code
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(code)


def end(code):
    """As the interpreter ends, but for the taking apart of its modules, which takes a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    os._exit(code)


def main():
    if Path(sys.argv[0]).name != "zygote.py":
        as_python()
    job = serve(*sys.argv[1:3])
    try:
        run(*job)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        end(1 if isinstance(ended.code, str) else int(ended.code or 0))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)


if __name__ == "__main__":
    main()
