"""Files: sent to the login node and fetched from there, on from where a connection broke."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from dagster_sbatch.atomic_write import replacing
from dagster_sbatch.slurm.gateway.link import AgainError, Link

PIECE = 1 << 20


def send_file(link: Link, local: Path, path: str, on_progress: Callable[[int, int], None] = lambda *_: None) -> int:
    """Send a file, from where an earlier try stopped; it appears under its name when it is whole.

    `on_progress`: gets the number of bytes sent so far, by earlier tries too, and the size of the file.
    Returns the number of bytes that this call has sent.
    """
    with local.open("rb") as file:
        whole, size = hashlib.file_digest(file, "sha256").hexdigest(), local.stat().st_size
        about = {"path": path, "sha256": whole, "bytes": size}
        sent = 0

        def go_on() -> int:
            nonlocal sent
            at = next(link.exchange([{"do": "transfer.put", **about}]))[1]["at"]
            file.seek(at)
            while at < size:
                data = file.read(PIECE)
                at = next(link.exchange([{"do": "transfer.put", **about, "at": at}], data=data))[1]["at"]
                sent += len(data)
                on_progress(at, size)
            return sent

        return link.patiently(go_on)


def fetch_file(link: Link, path: str, local: Path, on_progress: Callable[[int], None] = lambda _: None) -> None:
    """Fetch a file, from where a lost connection stopped; it appears under its name when it is whole.

    Raises RefusedError: it cannot be read.
    """
    with replacing(local) as file:

        def go_on() -> None:
            for _, head, data in link.exchange([{"do": "transfer.get", "path": path, "at": file.tell()}]):
                if "file" in head:
                    file.write(data)
                    on_progress(file.tell())
                    continue
                file.seek(0)
                if hashlib.file_digest(file, "sha256").hexdigest() == head["sha256"]:
                    return
                file.seek(0)
                file.truncate()
                raise AgainError(f"{path} arrived damaged")

        link.patiently(go_on)
