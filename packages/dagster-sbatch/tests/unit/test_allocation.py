"""From a request to what is submitted, by the rules of MUSICA."""

import ast
import re
from datetime import timedelta
from typing import Any

import pytest

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.slurm import Site, SlurmRequest, allocate, load_site
from dagster_sbatch.slurm.accounting import count
from dagster_sbatch.slurm.gateway import JobEnd
from resources import PROJECT
from support import ROOT

CPU, GPU = "zen4_0768", "zen4_0768_h100x4"
SITE = PROJECT.load_site("musica")


@pytest.mark.parametrize(
    ("gpus", "partition", "qos", "wanted"),
    [
        (0, None, None, (CPU, CPU)),
        (4, None, None, (GPU, GPU)),
        (0, GPU, GPU, (CPU, CPU)),  # the document names the GPU partition; CPU work goes to the other one
        (4, GPU, GPU, (GPU, GPU)),
        (4, CPU, CPU, (GPU, GPU)),
        (0, GPU, f"dev_{GPU}", (CPU, f"dev_{CPU}")),
        (4, CPU, f"idle_{CPU}", (GPU, f"idle_{GPU}")),
        (0, CPU, f"long_{GPU}", (CPU, f"long_{CPU}")),
    ],
)
def test_partition_and_qos_are_derived(
    gpus: int, partition: str | None, qos: str | None, wanted: tuple[str, str]
) -> None:
    request = allocate(SlurmRequest(gpus_per_node=gpus, time_limit="5"), SITE, partition, qos).request
    assert (request.partition, request.qos) == wanted


def test_what_the_asset_names_wins() -> None:
    asked = SlurmRequest(partition=GPU, qos=f"fast_{GPU}")
    request = allocate(asked, SITE, CPU, f"dev_{CPU}").request
    assert (request.partition, request.qos) == (GPU, f"fast_{GPU}")


@pytest.mark.parametrize(
    ("fields", "partition", "qos", "text"),
    [
        ({"gpus_per_node": 5}, None, None, f"a node of partition {GPU} has 4"),
        ({"gpus_per_node": 1, "partition": CPU}, None, None, f"{CPU} has no GPUs. Leave partition out, or write"),
        ({"qos": CPU, "gpus_per_node": 1}, None, None, f"qos='{CPU}' is not a QoS of partition {GPU}"),
        ({"partition": "zen4_768"}, None, None, f"did you mean '{CPU}'"),
        ({}, "zen4_768", None, f"SLURM_PARTITION='zen4_768' is no partition of this site; did you mean '{CPU}'"),
        ({}, None, "dev_zen4_768", f"did you mean 'dev_{CPU}'"),
        ({"nodes": 3, "time_limit": "5"}, None, f"dev_{CPU}", "allows a user at most 2"),
        ({"qos": f"dev_{CPU}", "time_limit": "11"}, None, None, "is over the 00:10:00"),
        ({"time_limit": "4-00"}, None, None, f"less time, or QoS idle_{CPU}, or QoS long_{CPU}"),
        ({"time_limit": "4-00", "qos": f"fast_{GPU}", "gpus_per_node": 1}, None, None, "is over the 3-00:00:00"),
        ({"cpus_per_task": 191}, None, None, "gives a job 190 CPUs"),
        ({"cpus_per_task": 100, "ntasks_per_node": 2}, None, None, "gives a job 190 CPUs"),
        (
            {"cpus_per_task": 177, "gpus_per_node": 4},
            None,
            None,
            "gives a job 176 CPUs. Request at most cpus_per_task=176, or more nodes",
        ),
        ({"ntasks_per_node": 191}, None, None, "gives a job 190 CPUs. Request fewer tasks per node"),
        ({"mem_per_cpu": "8G", "cpus_per_task": 97}, None, None, "for 97 CPUs: a node of partition zen4_0768 has 768G"),
        ({"mem_per_cpu": "5G", "exclusive": True, "cpus_per_task": 4}, None, None, "mem_per_cpu=5G for 190 CPUs"),
        ({"mem": "1T"}, None, None, "has 768G"),
    ],
)
def test_what_the_site_cannot_give_is_refused(
    fields: dict[str, Any], partition: str | None, qos: str | None, text: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        allocate(SlurmRequest(**fields), SITE, partition, qos)
    assert text in str(error.value)


def test_a_site_whose_nodes_all_have_gpus_runs_requests_without_gpus_there() -> None:
    site = load_site({"one": {"partitions": {"gpu": {"cores": 8, "mem": "64G", "gpus": 2}}}}, "one")
    assert allocate(SlurmRequest(), site).request.partition == "gpu"


@pytest.mark.parametrize(
    ("partitions", "fields", "text"),
    [
        ({}, {}, "the site has no partition. Describe one in its entry of SUPERCOMPUTER_SITE_OVERRIDES:"),
        ({"cpu": {"cores": 8, "mem": "64G"}}, {"gpus_per_node": 1}, "this site has no GPUs. Leave gpus_per_node out"),
        ({"cpu": {"cores": 8, "mem": "64G"}}, {"qos": "fast"}, "is not a QoS of partition cpu; it has none"),
    ],
)
def test_a_site_that_lacks_what_a_request_needs(partitions: Any, fields: dict[str, Any], text: str) -> None:
    site = load_site({"one": {"partitions": partitions}}, "one")
    with pytest.raises(ConfigurationError) as error:
        allocate(SlurmRequest(**fields), site)
    assert text in str(error.value)


def test_time_over_the_limit_of_a_qos_from_the_environment_is_shortened_with_a_note() -> None:
    allocation = allocate(SlurmRequest(gpus_per_node=4, time_limit="02:00:00"), SITE, GPU, f"dev_{GPU}")
    assert allocation.request.time_limit == timedelta(minutes=10)
    assert "shortened to 00:10:00" in allocation.notes[0]


@pytest.mark.parametrize(("gpus", "cpus", "mem"), [(1, 44, "180G"), (4, 176, "720G")])
def test_a_gpu_brings_its_share_of_the_node(gpus: int, cpus: int, mem: str) -> None:
    request = allocate(SlurmRequest(gpus_per_node=gpus), SITE).request
    assert (request.cpus_per_task, request.mem) == (cpus, mem)


@pytest.mark.parametrize("name", ["account", "reservation"])
def test_what_the_deployment_charges_and_where_it_runs_yields_to_the_asset(name: str) -> None:
    for asked, wanted in (({}, "deployments"), ({name: "assets"}, "assets")):
        request = allocate(SlurmRequest(**asked), SITE, **{name: "deployments"}).request
        assert getattr(request, name) == wanted
    assert getattr(allocate(SlurmRequest(), SITE).request, name) is None


def test_explicit_cpus_and_memory_stay() -> None:
    request = allocate(SlurmRequest(gpus_per_node=2, cpus_per_task=8, mem_per_cpu="2G"), SITE).request
    assert (request.cpus_per_task, request.mem, request.mem_per_cpu) == (8, None, "2G")


@pytest.mark.parametrize(("asked", "cpus", "gpus"), [(0, 190, 0), (1, 176, 4), (4, 176, 4)])
def test_exclusive_means_the_whole_node(asked: int, cpus: int, gpus: int) -> None:
    """Slurm allocates all GPUs of the nodes, so the job may use them, and its numbers count them."""
    request = allocate(SlurmRequest(gpus_per_node=asked, exclusive=True), SITE).request
    assert (request.cpus_per_task, request.mem, request.gpus_per_node) == (cpus, "0", gpus)
    assert count(JobEnd(0, "COMPLETED", started=0, ended=3600), request).get("gpu_hours", 0) == gpus


def test_a_site_without_qos_gets_none() -> None:
    site = Site.model_validate({"partitions": {"all": {"cores": 8, "mem": "16G"}}})
    assert allocate(SlurmRequest(), site).request.qos is None


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"partition": {}}, "['musica']['partition']: unknown field; did you mean 'partitions'"),
        ({"partitions": {"p": {"cores": 1, "mem": "1G", "gpu": 4}}}, "['partitions']['p']['gpu']: unknown field"),
        (
            {"partitions": {"p": {"cores": 1, "mem": "1G", "qos": {"q": {"timelimit": "1"}}}}},
            "did you mean 'time_limit'",
        ),
        (
            {"partitions": {"p": {"cores": 1, "mem": "many"}}},
            "['partitions']['p']['mem']: 'many' is not a Slurm memory",
        ),
        ({"script_header": ["ASC --vanilla"]}, "['script_header'][0]: 'ASC --vanilla' is not a comment: write one"),
        ({"script_header": ["#ASC --vanilla\nrm x"]}, "['script_header'][0]: '#ASC --vanilla\\nrm x' is not a comment"),
        ({"script_header": ["#ASC --vanilla", "#\r"]}, "['script_header'][1]: '#\\r' is not a comment"),
        ({"python_candidates": ["~/bin/python"]}, "['python_candidates'][0]: '~/bin/python' is neither the name of a"),
        ({"python_candidates": ["python3", "$DATA/python"]}, "['python_candidates'][1]: '$DATA/python' is neither"),
        ({"threads_per_core": 3}, "['threads_per_core']: Input should be 1, 2, 4 or 8"),
        ([], "['musica']: this is not a dictionary. Write {...}"),
        (None, "['musica']: this is not a dictionary. Write {...}"),
        ("x", "['musica']: this is not a dictionary. Write {...}"),
        ({"partitions": {"p": []}}, "['partitions']['p']: this is not a dictionary. Write {...}"),
        ({"launchers": {"ray": "x"}}, "['launchers']['ray']: this is not a dictionary. Write {...}"),
        ({"launchers": {"rey": {}}}, "['launchers']['rey']: 'rey' is not the key of a launcher"),
        ({"thread_per_core": 1}, "['thread_per_core']: unknown field; did you mean 'threads_per_core'"),
    ],
)
def test_mistakes_in_the_site_overrides_are_located(entry: Any, text: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        load_site({"musica": entry}, "musica")
    assert text in str(error.value)


def test_the_overrides_are_what_the_seed_document_shows_and_are_merged_over_the_known_facts() -> None:
    assert PROJECT.site_overrides == {"musica": {"launchers": {"ray": {"pre_start_commands": ["ulimit -n 65536"]}}}}
    bare = load_site({}, "musica")
    assert PROJECT.load_site("musica").partitions == bare.partitions
    corrected = {"cores": 180, "qos": {f"dev_{CPU}": {"nodes": 4}, f"long_{CPU}": None}}
    site = load_site({"musica": {"partitions": {CPU: corrected, GPU: None}, "script_header": []}}, "musica")
    assert list(site.partitions) == [CPU]
    assert (site.partitions[CPU].cores, site.partitions[CPU].mem, site.script_header) == (180, "768G", ())
    qos = site.partitions[CPU].qos
    assert (qos[f"dev_{CPU}"].nodes, qos[f"dev_{CPU}"].time_limit) == (
        4,
        bare.partitions[CPU].qos[f"dev_{CPU}"].time_limit,
    )
    assert qos.keys() == bare.partitions[CPU].qos.keys() - {f"long_{CPU}"}
    assert load_site({}, "musica") == bare


def test_the_correction_of_a_known_site_that_the_documentation_shows() -> None:
    page = (ROOT / "packages" / "dagster-sbatch" / "docs" / "another-site.md").read_text()
    _, listing = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    site = load_site(ast.literal_eval("{" + listing + "}"), "musica")
    assert site.partitions[CPU].qos.keys() == SITE.partitions[CPU].qos.keys() - {f"long_{CPU}"}
    assert site.partitions[CPU].qos[f"dev_{CPU}"].time_limit == timedelta(minutes=30)
    assert site.partitions[GPU] == SITE.partitions[GPU]
