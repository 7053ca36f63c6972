"""Workloads that run as several ranks."""

from support.workload_asset import PIPES

RANK = PIPES + "    import os, pathlib, signal, socket, sys, time\n    rank = int(os.environ['RANK'])\n"
"""Beginning of a workload; what follows is indented by four spaces."""
RENDEZVOUS = (
    RANK
    + """
    # As PyTorch's init_process_group("env://"): rank 0 listens at MASTER_ADDR:MASTER_PORT, the others connect.
    address, world = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), int(os.environ["WORLD_SIZE"])
    word = f"{rank} {os.environ['LOCAL_RANK']} {socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES')}"
    word += f" {pipes.extras['name']} {os.environ['OMP_NUM_THREADS']}"
    print("a line of", rank)
    words = [word]
    if rank == 0:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", address[1]))
            server.listen(world)
            for _ in range(world - 1):
                words.append(server.accept()[0].makefile().read())
    else:
        while True:
            try:
                peer = socket.create_connection(address)
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        peer.sendall(word.encode())
        peer.close()
    pipes.log.info(f"rank {rank} logs")
    pipes.report_asset_materialization(metadata={"words": sorted(words)})
"""
)
MPI = """
from dagster_pipes import open_dagster_pipes
from mpi4py import MPI
world = MPI.COMM_WORLD
total, nodes = world.allreduce(world.rank), world.gather(MPI.Get_processor_name())
with open_dagster_pipes() as pipes:
    pipes.report_asset_materialization(metadata={"total": total, "nodes": nodes})
"""
