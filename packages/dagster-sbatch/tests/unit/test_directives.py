"""The #SBATCH lines of an existing batch script as a request."""

from typing import Any

import pytest

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.script_request import complete_request, read_directives

BIND = "--gpu-bind=per_task"
ONE_EACH = {"options": [f"{BIND}:1"]}


def script(*lines: str) -> str:
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {line}" for line in lines), "srun ./model"])


def read(*lines: str, **asset: Any) -> SlurmRequest:
    return complete_request(SlurmRequest(**asset), script(*lines), "m.sbatch")[0]


def test_lines_are_read_as_sbatch_reads_them() -> None:
    text = "#!/bin/bash\n# a comment\n\n#SBATCH -N2 -n 8 --time=10 # minutes\n#SBATCH\t--mem 4G\n ##SBATCH --qos=x\n"
    text += "#SBATCHED --no\n\t# \u2028 and a form feed:\n\f\n#SBATCH--exclusive\nmodule load x\n#SBATCH --nodes=9\n"
    shown = [(each.line, str(each)) for each in read_directives(text)]
    assert shown == [(4, "--nodes=2"), (4, "--ntasks=8"), (4, "--time=10"), (5, "--mem=4G"), (10, "--exclusive")]


@pytest.mark.parametrize(
    "option", ["-O", "--overcommit", "-B 2:4:1", "-F nodes.txt", "--x11", "--propagate", "--reboot"]
)
def test_an_option_that_only_sbatch_has_is_named(option: str) -> None:
    """Such an option may be written without a value; the next one is not taken for it."""
    (found, after) = read_directives(script(f"{option} -n1"))
    assert str(after) == "--ntasks=1"
    with pytest.raises(ConfigurationError, match=f"line 2: --{found.name} cannot be an option of an asset's job"):
        read(option)


@pytest.mark.parametrize(
    ("lines", "asset", "request_"),
    [
        (["-N 2", "-n 8", "-c 4"], {}, {"nodes": 2, "ntasks_per_node": 4, "cpus_per_task": 4}),
        (["-n 8", "--ntasks-per-node=4"], {}, {"nodes": 2, "ntasks_per_node": 4}),
        (["-n 8"], {"nodes": 4}, {"nodes": 4, "ntasks_per_node": 2}),
        (["--gres=gpu:h100:4"], {}, {"gpus_per_node": 4}),
        (["--gres=gpu"], {}, {"gpus_per_node": 1}),
        (["--gres=gpu:h100", "--gpus-per-node=h100"], {}, {"gpus_per_node": 1}),
        (["-N2", "-G 8"], {}, {"nodes": 2, "gpus_per_node": 4}),
        (["--gpus-per-task=h100:2", "-n2"], {}, {"ntasks_per_node": 2, "gpus_per_node": 4, "options": [f"{BIND}:2"]}),
        (["--gpus-per-task=1", "-n4"], {"ntasks_per_node": 2}, {"ntasks_per_node": 2, "gpus_per_node": 2, **ONE_EACH}),
        (["--gpus-per-task=1", "-n4"], {"gpus_per_node": 2}, {"ntasks_per_node": 4, "gpus_per_node": 2}),
        (["--gpus-per-task=1", "--gpu-bind=none"], {}, {"gpus_per_node": 1, "options": ["--gpu-bind=none"]}),
        (["--gpus-per-node=2", "--mem-per-gpu=10G"], {}, {"gpus_per_node": 2, "mem": "20G"}),
        (["--mem-per-gpu=10G"], {"gpus_per_node": 4}, {"gpus_per_node": 4, "mem": "40G"}),
        (["-G1", "--mem-per-gpu=10G"], {"gpus_per_node": 4}, {"gpus_per_node": 4, "mem": "40G"}),
        (["--mem=16gb", "--exclusive"], {}, {"mem": "16G", "exclusive": True}),
        (["-t 1-12", "-t 2:00:00", "-p zen4_0768"], {}, {"time_limit": "02:00:00", "partition": "zen4_0768"}),
        (["--mail-type=END", "--nice"], {"options": ["--nice=5"]}, {"options": ["--mail-type=END", "--nice=5"]}),
        (["--gres=gpu:2", "--gpus-per-node=2"], {}, {"gpus_per_node": 2}),
        (["--gres=gpu:2", "--gpus-per-node=4"], {"gpus_per_node": 1}, {"gpus_per_node": 1}),
        (["--mem=1G", "--mem-per-cpu=2G"], {"mem": "3G"}, {"mem": "3G"}),
        (["-N 2", "-n 8", "--ntasks-per-node=2"], {"nodes": 4}, {"nodes": 4, "ntasks_per_node": 2}),
        (["--mem=1G", "--time=5"], {"mem_per_cpu": "2G"}, {"mem_per_cpu": "2G", "time_limit": "5"}),
    ],
)
def test_the_lines_apply_where_the_asset_says_nothing(
    lines: list[str], asset: dict[str, Any], request_: dict[str, Any]
) -> None:
    assert read(*lines, **asset) == SlurmRequest(**request_)


def test_what_does_not_apply_is_named_with_its_line() -> None:
    asset = SlurmRequest(mem="2G", time_limit="5", nodes=1, options=["--nice=5"])
    text = script("--time=10", "--mem-per-cpu=1G", "-N 1", "--nice=7", "-o out", "--export=ALL")
    _, notes = complete_request(asset, text, "m.sbatch")
    assert notes == [
        "m.sbatch, line 2: --time=10 does not apply. The asset requests time_limit='00:05:00'.",
        "m.sbatch, line 3: --mem-per-cpu=1G does not apply. The asset requests mem='2G'.",
        "m.sbatch, line 5: --nice=7 does not apply. The asset has another value in options.",
        "m.sbatch: these do not apply, because the job of an asset has its own: "
        "--output=out (line 6), --export=ALL (line 7).",
    ]


def test_a_number_of_gpus_that_does_not_apply_is_named() -> None:
    _, notes = complete_request(SlurmRequest(gpus_per_node=4), script("-G1", "--mem-per-gpu=10G"), "m")
    assert notes == ["m, line 2: --gpus=1 does not apply. The asset requests gpus_per_node=4."]


def test_of_an_option_that_occurs_twice_the_last_one_applies_as_with_sbatch() -> None:
    text = script("--time=5 -o a", "--nice=1", "--time=10 -o b", "--nice=1")
    request, notes = complete_request(SlurmRequest(), text, "m")
    assert request == SlurmRequest(time_limit="10", options=["--nice=1"])
    assert notes[0] == "m, line 2: --time=5 does not apply. Line 4 has --time=10."
    assert len(notes) == 2


def test_variables_of_export_are_not_lost_in_silence() -> None:
    _, notes = complete_request(SlurmRequest(), script("--export=ALL,MODEL=x"), "m")
    assert notes[0] == "m, line 2: the variables of --export are not set. Pass them to compute.run in env={...}."


def test_lines_of_another_batch_system_are_named() -> None:
    _, notes = complete_request(SlurmRequest(), "#!/bin/bash\n#PBS -l nodes=2\n#SBATCH -n 1\nset -e\n#PBS -q x\n", "m")
    assert notes == ["m, line 2: #PBS -l nodes=2 does not apply. Write what it requests as an #SBATCH line."]


def test_a_script_that_says_the_same_as_the_asset_has_no_notes() -> None:
    assert complete_request(SlurmRequest(nodes=2, time_limit="10"), script("-N 2", "-t 10"), "m")[1] == []


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--array=0-9", "m.sbatch: its #SBATCH lines cannot be used. line 2: --array=0-9: .* array=JobArray"),
        ("--partitoin=x", "line 2: --partitoin cannot be an option .* did you mean 'partition'"),
        ("-N 2-4", "--nodes=2-4: an asset's job needs one whole number"),
        ("-N 3 -n 8", "--ntasks=8 cannot be divided among 3 nodes"),
        ("-N 2 -G 3", "--gpus=3 cannot be divided among 2 nodes"),
        ("--gres=nvme:1", "GPUs only"),
        ("--gpus-per-node=2x", "is not a number of GPUs"),
        ("--time=2h", "'2h' is not a Slurm time"),
        ("--mem", "line 2: --mem has no value"),
        ("-Y 3", "line 2: '-Y' is not an option of sbatch"),
        ('--comment="a', "line 2: No closing quotation"),
        ("--exclusive=user", "exclusive"),
        ("--mem=1G --mem-per-cpu=2G", "--mem=1G and --mem-per-cpu=2G exclude each other. Remove one"),
        ("--mem=1G --mem-per-gpu=2G", "--mem=1G and --mem-per-gpu=2G exclude each other"),
        ("--gres=gpu:2 --gpus-per-node=4", "--gres=gpu:2 and --gpus-per-node=4 request different numbers of GPUs"),
        ("-N 2 -n 8 --ntasks-per-node=2", "--ntasks=8 contradicts --ntasks-per-node=2: with it, 2 nodes can have 4"),
        ("-n 7 --ntasks-per-node=4", "--ntasks=7 contradicts --ntasks-per-node=4: with it, 2 nodes can have 8 tasks"),
    ],
)
def test_what_no_job_of_an_asset_can_have(line: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        read(line)
