"""Run the stand-in as a program until it is killed."""

import argparse
import threading
from pathlib import Path

from .server import AuthentikServer


def main() -> None:
    """Serve on the given address."""
    parser = argparse.ArgumentParser(prog="authentik", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="keeps users, tokens, key and record of requests")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9300)
    options = parser.parse_args()
    with AuthentikServer(options.folder, options.host, options.port) as server:
        print(f"serving {server.base_url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
