"""A process that has imported everything and forks for each command: `python -m tests.fork_server SOCKET`.

A test that needs the command in a process of its own would wait for its imports, for seconds. A fork of this process begins
with them done. Nothing is computed here before a fork, so no thread is lost by it. See `tests/command.py` for its client.
"""

import atexit
import gc
import importlib
import json
import os
import selectors
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

PRELOADED = (
    *("accelerate", "faiss", "matplotlib.figure", "matplotlib.backends.backend_svg", "open_clip", "pyarrow.parquet", "uvicorn"),
    *("timm.optim", "torch.distributed.checkpoint", "torch.utils.tensorboard", "torchvision.transforms.v2"),
    *("transformers.models.bert.modeling_bert", "mmcontrast.cli", "mmcontrast.embedder", "mmcontrast.search"),
    *("mmcontrast.doctor.run", "mmcontrast.plan", "mmcontrast.slurm", "mmcontrast.suites", "mmcontrast.embedding_job"),
    "mmcontrast.training.loop",
)


def serve(listener: socket.socket, owner: int) -> tuple[dict[str, Any], list[int]]:
    """Fork for each request until the owner has ended. Returns in the children alone: a request, and its stdout and stderr.

    A request is one JSON object with two open files. The answer is the process's number, and when it ends its exit code.
    """
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    clients: dict[int, tuple[int, socket.socket]] = {}  # by a file that is readable once the process has ended
    while True:
        for key, _ in selector.select(timeout=1):
            if key.fileobj is not listener:
                pid, client = clients.pop(key.fd)
                _tell(client, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                client.close()
                selector.unregister(key.fd)
                os.close(key.fd)
                continue
            client, _ = listener.accept()
            message, files, _, _ = socket.recv_fds(client, 1 << 20, 2)
            pid = os.fork()
            if not pid:
                listener.close()
                selector.close()
                return json.loads(message), files
            for file in files:
                os.close(file)
            _tell(client, pid)
            ended = os.pidfd_open(pid)
            clients[ended] = pid, client
            selector.register(ended, selectors.EVENT_READ)
        if not os.path.exists(f"/proc/{owner}"):
            sys.exit()


def _tell(client: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError):  # a test that does not ask how its process ended
        client.sendall(f"{number}\n".encode())


def become(request: Mapping[str, Any], files: list[int]) -> NoReturn:
    """Run a request's target in this process, and end as an interpreter does, but for the taking apart of its modules.

    That takes as long as their import.
    """
    try:
        _run(request, files)
        code: object = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for what still runs
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


def _run(request: Mapping[str, Any], files: list[int]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if threads := os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    module, _, name = request["target"].partition(":")
    sys.argv = ["mmcontrast", *request["arguments"]]
    target = getattr(importlib.import_module(module), name)
    target() if module == "mmcontrast.cli" else target(*request["arguments"])


def run_script(script: str, *arguments: str) -> None:
    """Run the text of a program in this process."""
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


def remember_vocabularies() -> None:
    """Let open_clip's tokenizers of equal arguments be read once: each reads its vocabulary anew, in a tenth of a second."""
    from open_clip.tokenizer import SimpleTokenizer

    made: dict[str, dict[str, Any]] = {}
    read = SimpleTokenizer.__init__

    def __init__(self: SimpleTokenizer, *args: Any, **kwargs: Any) -> None:
        key = repr((args, sorted(kwargs.items())))
        if key not in made:
            read(self, *args, **kwargs)
            made[key] = dict(self.__dict__)
        self.__dict__ |= made[key] | {"cache": dict(made[key]["cache"])}

    SimpleTokenizer.__init__ = __init__  # type: ignore[method-assign]


def main() -> None:
    path, owner = sys.argv[1], int(sys.argv[2])
    for name in PRELOADED:
        importlib.import_module(name)
    remember_vocabularies()
    importlib.import_module("mmcontrast.modalities.text").open_clip_tokenizer()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"an import has started {len(threads) - 1} threads: a fork would wait for them for ever"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    gc.collect()
    gc.freeze()  # a collection in a fork leaves alone what is here, and copies none of its pages
    os.rename(f"{path}.new", path)  # whoever sees it can connect
    become(*serve(listener, owner))


if __name__ == "__main__":
    main()
