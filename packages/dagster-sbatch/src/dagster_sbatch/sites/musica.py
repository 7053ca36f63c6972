"""MUSICA, the supercomputer of Austrian Scientific Computing."""

from typing import Any

MUSICA: dict[str, Any] = {
    "documentation": "https://docs.asc.ac.at",
    "host_authorities": [
        "@cert-authority *.asc.ac.at ecdsa-sha2-nistp256 "
        "AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBADeLjSj4J0MFrdxdn9M/mcZi1fqKnQB6ZHjysUlontzFXI9PVoxPjYqMDDO0hM6IM6NCnkiiFqveEvSoXDnGWI="
    ],
    # Leaves the layout of a job as it is requested: otherwise the centre's submit plugin refuses or rewrites it.
    "script_header": ["#ASC --vanilla"],
    "threads_per_core": 1,
    "python_candidates": ["python3.12", "python3.11", "python3"],
    "partitions": {
        # Two AMD EPYC 9654. A job gets 190 of the 192 cores.
        "zen4_0768": {
            "cores": 190,
            "mem": "768G",
            "qos": {
                "zen4_0768": {"time_limit": "3-00"},
                "dev_zen4_0768": {"time_limit": "10", "nodes": 2},
                "idle_zen4_0768": {},
                "fast_zen4_0768": {"time_limit": "3-00"},
                "long_zen4_0768": {},
            },
        },
        # The same with four H100 SXM5 of 94 GB. A job gets 176 of the 192 cores: a quarter of them, and of what
        # the system leaves of the memory, for each GPU.
        "zen4_0768_h100x4": {
            "cores": 176,
            "mem": "768G",
            "gpus": 4,
            "cores_per_gpu": 44,
            "mem_per_gpu": "180G",
            "qos": {
                "zen4_0768_h100x4": {"time_limit": "3-00"},
                "dev_zen4_0768_h100x4": {"time_limit": "10", "nodes": 2},
                "idle_zen4_0768_h100x4": {},
                "fast_zen4_0768_h100x4": {"time_limit": "3-00"},
                "long_zen4_0768_h100x4": {},
            },
        },
    },
}
