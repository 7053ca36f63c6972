"""Joins the ranks that SrunLauncher starts: XGBoost then trains one model with all of them, as PyTorch's DDP does."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from xgboost import collective
from xgboost.tracker import RabitTracker

from . import evaluation


@contextmanager
def joined() -> Iterator[str]:
    """Join the other ranks; meanwhile each matrix and each training of XGBoost is common to all of them.

    Every rank must make the same calls. Each puts its own share of the rows into a matrix; XGBoost adds up what the
    ranks find, with NCCL if they use GPUs.

    Yields:
        The GPU of this rank, as XGBoost names it (`cuda:2`), or `cpu` for all ranks if one cannot use its GPU.
    """
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    gpu = f"cuda:{os.environ['LOCAL_RANK']}"
    usable = np.array([evaluation.can_use(gpu)], dtype=np.int32)
    if rank == 0:
        tracker = RabitTracker(n_workers=count, host_ip=socket.gethostbyname(address[0]), sortby="task")
        tracker.start()
        found = tracker.worker_args()
        with socket.create_server(address) as server:  # with SO_REUSEADDR: the launcher keeps the port for rank 0
            for _ in range(count - 1):
                with server.accept()[0] as connection:
                    connection.sendall(json.dumps(found).encode())
    else:
        found = _ask_rank_0(address)
    with collective.CommunicatorContext(**found, dmlc_task_id=f"{rank:05}"):
        yield gpu if collective.allreduce(usable, collective.Op.MIN)[0] else "cpu"
    if rank == 0:
        tracker.wait_for()  # the other ranks have left, too


def _ask_rank_0(address: tuple[str, int]) -> dict[str, Any]:
    """Return where XGBoost's tracker listens, as soon as rank 0 listens."""
    while True:
        try:
            with socket.create_connection(address) as connection, connection.makefile() as file:
                return dict(json.load(file))
        except ConnectionRefusedError:
            time.sleep(0.1)
