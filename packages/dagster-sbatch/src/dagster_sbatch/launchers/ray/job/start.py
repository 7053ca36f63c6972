"""Run `ray start`, with Ray imported before its arguments are known.

node.py starts this program at once and writes the arguments to its standard input, as a JSON list, when the head
listens. Importing Ray takes seconds, and does not have to wait for the head.
"""

import json
import sys
from importlib.metadata import distribution


def main() -> None:
    """Become `ray start`; Ray's exit code is 0 when this node has joined the cluster."""
    (entry_point,) = distribution("ray").entry_points.select(group="console_scripts", name="ray")
    ray = entry_point.load()
    sys.argv = ["ray", "start", *json.load(sys.stdin)]
    raise SystemExit(ray())


if __name__ == "__main__":
    main()
