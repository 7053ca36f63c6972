"""How it runs: the resources of the code location, and what is particular to each supercomputer."""

from typing import Any

SUPERCOMPUTER_SITE_OVERRIDES: dict[str, dict[str, Any]] = {
    # MUSICA, Austrian Scientific Computing
    "musica": {
        "documentation": "https://docs.asc.ac.at",
        "host_authorities": [
            "@cert-authority *.asc.ac.at ecdsa-sha2-nistp256 "
            "AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBADeLjSj4J0MFrdxdn9M/mcZi1fqKnQB6ZHjysUlontzFXI9PVoxPjYqMDDO0hM6IM6NCnkiiFqveEvSoXDnGWI="
        ],
        "launchers": {"ray": {"pre_start_commands": ["ulimit -n 65536"]}},
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
                    "idle_zen4_0768": {"preemptible": True},
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
                    "idle_zen4_0768_h100x4": {"preemptible": True},
                    "fast_zen4_0768_h100x4": {"time_limit": "3-00"},
                    "long_zen4_0768_h100x4": {},
                },
            },
        },
    },
}
"""By SLURM_SUPERCOMPUTER_SITE. What may stand in an entry: `resources.slurm.site.Site`."""


def build_resources() -> dict[str, Any]:
    """The resources of the code location. They read no settings until a run needs them: the location always loads."""
    from resources.compute import ComputeResource

    return {"compute": ComputeResource(site_overrides=SUPERCOMPUTER_SITE_OVERRIDES)}
