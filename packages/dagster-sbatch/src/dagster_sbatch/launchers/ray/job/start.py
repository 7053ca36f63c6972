"""Run `ray start`, with Ray imported before its arguments are known.

node.py starts this program at once and writes the arguments to its standard input, as a JSON list, when the head
listens. Importing Ray takes seconds, and does not have to wait for the head.
"""

import gc
import json
import os
import sys
from importlib.metadata import distribution


def main() -> None:
    """Become `ray start`; Ray's exit code is 0 when this node has joined the cluster."""
    gc.disable()  # this process is short: collecting garbage takes a fifth of the import, and finds nothing
    (entry_point,) = distribution("ray").entry_points.select(group="console_scripts", name="ray")
    ray = entry_point.load()
    sys.argv = ["ray", "start", *json.load(sys.stdin)]
    try:
        code = ray()
    except SystemExit as end:
        code = end.code
    if code:
        raise SystemExit(code)
    # The other nodes or the workload wait for the end of this process. Python takes a third of a second for it, to free
    # what Ray has loaded. What Ray has started does not need that.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
