"""Slurm's notations, and what a request refuses."""

from datetime import timedelta

import pytest

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.units import count_of, format_memory, format_time, parse_memory, parse_time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90 * 60),
        ("10:30", 10 * 60 + 30),
        ("02:00:00", 7200),
        ("1-12", 36 * 3600),
        ("1-12:30", 36 * 3600 + 30 * 60),
        ("1-00:00:01", 86401),
    ],
)
def test_times_are_those_of_sbatch(text: str, seconds: int) -> None:
    assert parse_time(text) == timedelta(seconds=seconds)
    assert parse_time(format_time(parse_time(text))) == timedelta(seconds=seconds)


@pytest.mark.parametrize("time_limit", ["1-12", timedelta(days=1.5)])
def test_a_time_limit_may_be_a_timedelta(time_limit: object) -> None:
    request = SlurmRequest(time_limit=time_limit)
    assert request.time_limit == timedelta(days=1.5)
    assert request.model_dump(mode="json")["time_limit"] == "1-12:00:00"


@pytest.mark.parametrize("time_limit", [90, True, 5.5, None, timedelta(), timedelta(days=-1)])
def test_a_time_limit_is_nothing_else(time_limit: object) -> None:
    advice = "is not a time: write Slurm's notation as text, as in '02:00:00' or '1-12', or a timedelta"
    with pytest.raises(ConfigurationError, match=f"^SlurmRequest: time_limit: .* {advice}"):
        SlurmRequest(time_limit=time_limit)


@pytest.mark.parametrize("text", ["2h", "", "1:2:3:4", "-5", "0", "00:00:00", "1-", "one", "1:00:00\n"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"hours:minutes:seconds|a time of zero"):
        parse_time(text)


@pytest.mark.parametrize(
    ("text", "kib"), [("64G", 64 * 1024**2), ("512", 512 * 1024), ("100K", 100), ("1T", 1024**3), ("0", 0)]
)
def test_memory_is_that_of_sbatch(text: str, kib: int) -> None:
    assert parse_memory(text) == kib
    assert parse_memory(format_memory(kib)) == kib


def test_a_noun_is_that_of_its_number() -> None:
    assert [count_of(number, "GPU") for number in (0, 1, 2)] == ["0 GPUs", "1 GPU", "2 GPUs"]


@pytest.mark.parametrize("text", ["64GB", "00", "1.5G", "-1G", "64 G", "G"])
def test_other_memory_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="64G"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"time_limit": "2h"}, "time_limit: '2h' is not a Slurm time"),
        ({"time_limit": "9999999999-00"}, "time_limit: '9999999999-00' is too long"),
        ({"time_limit": "9" * 400}, "is too long"),
        ({"mem": 64}, "mem: 64 is not a Slurm memory size: write a text with a unit (K, M, G or T), as in '64G'"),
        ({"mem": "64 GB"}, "mem: '64 GB' is not a Slurm memory size"),
        ({"mem": "64G", "mem_per_cpu": "2G"}, "mem or mem_per_cpu, not both"),
        ({"nodes": 0}, "nodes: "),
        ({"gpus_per_node": -1}, "gpus_per_node: "),
        ({"num_gpus": 4}, "num_gpus: unknown field"),
        ({"gpus": 4}, "gpus: unknown field; did you mean 'gpus_per_node'?"),
        ({"gpu_per_node": 4}, "did you mean 'gpus_per_node'"),
        ({"partition": "a b"}, "partition: 'a b' is not a name"),
        ({"partition": 5}, "partition: this is not a text. Write it in quotes"),
        ({"account": "x\n#SBATCH --uid=0"}, "account: "),
        ({"nodelist": "n1;rm"}, "nodelist: "),
        ({"dependency": "after ok"}, "dependency: "),
        ({"constraint": "a'b"}, "constraint: "),
        ({"options": ["--mail-type=END FAIL"]}, "no spaces"),
        ({"options": ["-p gpu"]}, "not of the form"),
        ({"options": ["--partition=x"]}, "--partition has a field of its own"),
        ({"options": ["--gres=gpu:4"]}, "--gres has a field of its own"),
        ({"options": ["--mail-typ=END"]}, "did you mean 'mail-type'"),
        ({"options": ["--job-name=x"]}, "--job-name is not an option"),
        ({"options": ["--wrap=true"]}, "--wrap is not an option"),
    ],
)
def test_mistakes_are_named(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        SlurmRequest(**fields)
    assert text in str(error.value)
    assert str(error.value).startswith("SlurmRequest: ")


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as error:
        SlurmRequest(time_limit="2h", mem="lots", nodes=0)
    assert str(error.value).count("SlurmRequest: ") == 3


def test_valid_values_pass() -> None:
    request = SlurmRequest(
        nodelist="n[4001-4003],n4007",
        dependency="afterok:12:13,singleton",
        constraint="[a|b]",
        options=["--mail-type=END"],
    )
    assert request.time_limit == timedelta(hours=1)
    assert request.options == ("--mail-type=END",)
