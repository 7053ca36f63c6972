"""One request, answered."""

import json
import os
import signal
import sys
import threading

from .files import Refused, tell, trust
from .making import lacking, look, publish
from .shelf import announce, inventory, published, remove, roll_back

VERBS = {verb.__name__: verb for verb in (look, lacking, publish, published, announce, roll_back, inventory, remove)}


def end_with_stdin():
    """The client is gone: end everything that was started here, at once."""
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


def answer(ask):
    """What is asked for; raises Refused."""
    trust(ask["folder"])
    return VERBS[ask["do"]](ask)


def serve():
    """Until it is answered, or the client is gone."""
    ask = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_stdin, daemon=True).start()
    os.umask(0o077)
    os.nice(5)
    try:
        tell(answer=answer(ask))
    except Refused as refused:
        sys.exit(str(refused))
    except OSError as error:
        sys.exit("%s: %s" % (error.filename or ask["folder"], error.strerror))
