"""Programs that come along, for what is not the agent's own business; the `data` of a request is the source."""

import json
import subprocess
import sys
import threading
import zlib

from .files import Failure
from .places import with_paths
from .slurm import environment

BOOT = "import json, sys; names = {}; exec(compile(json.loads(sys.stdin.readline()), 'program', 'exec'), names)"
BOOT += "; names['serve']()"
LOADING = threading.Lock()  # the modules of one program at a time


def consult(ask, _):
    """What a program answers to a document, here: for what neither takes long nor writes much.

    It has `answer(document)`, and `Refused`, whose text is an answer, too.
    """
    names = {}
    with LOADING:
        exec(compile(zlib.decompress(ask["data"]), "program", "exec"), names)
    try:
        return {"answer": names["answer"](with_paths(ask["document"]))}
    except names["Refused"] as refused:
        raise Failure("refused", str(refused))


def program(ask, say):
    """Call `serve()` of a program in a process of its own; each line that it prints is told, and its last words if it
    fails.

    Its stdin has the source, then a document, and stays open for as long as this agent lives: a program that may run
    for long ends itself when it closes.
    """
    document = with_paths(ask["document"])
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-u", "-c", BOOT],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    words = []
    reader = threading.Thread(target=lambda: words.append(child.stderr.read()), daemon=True)
    reader.start()
    try:
        source = zlib.decompress(ask["data"]).decode()
        child.stdin.write("".join(json.dumps(part) + "\n" for part in (source, document)).encode())
        child.stdin.flush()
    except OSError:
        pass  # it has ended already: its last words tell why
    for line in child.stdout:
        say(line=line.decode(errors="replace"))
    code = child.wait()
    reader.join()
    if code:
        raise Failure("temporary" if code < 0 else "refused", words[0].decode(errors="replace").strip()[-2000:])
    return {"code": code}
