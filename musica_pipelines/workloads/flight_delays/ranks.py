"""Joins the ranks that SrunLauncher starts: XGBoost then trains one model with all of them, as PyTorch's DDP does."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from xgboost import collective
from xgboost.tracker import RabitTracker

from . import evaluation

RETRY_SECONDS = 0.1


@dataclass(frozen=True)
class Rank:
    """One of the processes that train together.

    Attributes:
        number: from 0.
        count: of all ranks.
        device: its GPU, as XGBoost names it (`cuda:2`); `cpu` for all ranks if one of them cannot use its GPU.
    """

    number: int
    count: int
    device: str


@contextmanager
def joined() -> Iterator[Rank]:
    """Join the other ranks; meanwhile each matrix and each training of XGBoost is common to all of them.

    Every rank must make the same calls. Each puts its own share of the rows into a matrix; XGBoost adds up what the
    ranks find, with NCCL if they use GPUs.

    Yields:
        This rank.
    """
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    gpu = f"cuda:{os.environ['LOCAL_RANK']}"
    usable = np.array([evaluation.can_use(gpu)], dtype=np.int32)
    if number == 0:
        tracker = RabitTracker(n_workers=count, host_ip=socket.gethostbyname(address[0]), sortby="task")
        tracker.start()
        found = tracker.worker_args()
        _send(found, address, count - 1)
    else:
        found = _receive(address)
    with collective.CommunicatorContext(**found, dmlc_task_id=f"{number:05}"):
        all_usable = collective.allreduce(usable, collective.Op.MIN)[0]
        yield Rank(number, count, gpu if all_usable else "cpu")
    if number == 0:
        tracker.wait_for()  # the other ranks have left, too


def _send(message: dict[str, Any], address: tuple[str, int], receivers: int) -> None:
    """Send a message to each of the other ranks, when it asks for it."""
    with socket.create_server(address) as server:  # with SO_REUSEADDR: the launcher keeps the port for rank 0
        for _ in range(receivers):
            connection, _ = server.accept()
            with connection:
                connection.sendall(json.dumps(message).encode())


def _receive(address: tuple[str, int]) -> dict[str, Any]:
    """Return the message of rank 0, as soon as that listens."""
    while True:
        try:
            with socket.create_connection(address) as connection, connection.makefile() as file:
                message: dict[str, Any] = json.load(file)
                return message
        except ConnectionRefusedError:
            time.sleep(RETRY_SECONDS)
