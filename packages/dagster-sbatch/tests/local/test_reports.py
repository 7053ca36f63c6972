"""What a workload reports: sessions, per-partition numbers, several assets, checks, ops; and what comes of it."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.run.compute import ComputeResource
from resources import PROJECT
from support.workload_asset import PIPES, materialize

pytestmark = pytest.mark.local

COMPUTE = {"compute": ComputeResource.of(PROJECT)}
RANGE = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "c"}
LETTERS = dg.StaticPartitionsDefinition(["a", "b", "c"])


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))


def write(folder: Path, body: str) -> Path:
    path = folder / "probe.py"
    path.write_text(PIPES + body)
    return path


def error_of(result: dg.ExecuteInProcessResult) -> str:
    (failure,) = result.get_step_failure_events()
    data = failure.step_failure_data
    return f"{data.error}\n{data.user_failure_data.description if data.user_failure_data else ''}"


def test_an_asset_without_partitions_in_a_run_over_partitions(tmp_path: Path) -> None:
    """As the example's model after its months: it gets no partition keys, and its costs once."""
    path = write(
        tmp_path, "    pipes.report_asset_materialization(metadata={'keys': pipes.extras.get('partition_keys')})\n"
    )

    @dg.asset(partitions_def=LETTERS, backfill_policy=dg.BackfillPolicy.single_run())
    def letters(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        return compute.run(context, workload=path, launcher=ScriptLauncher()).get_materialize_result()

    @dg.asset(deps=[letters])
    def word(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        return compute.run(context, workload=path, launcher=ScriptLauncher()).get_materialize_result()

    result = dg.materialize([letters, word], resources=COMPUTE, tags=RANGE)
    (event,) = result.asset_materializations_for_node("word")
    assert event.metadata["keys"].value is None
    assert "workload_seconds" in event.metadata
    each = result.asset_materializations_for_node("letters")
    assert [event.metadata["keys"].value for event in each] == [["a", "b", "c"]] * 3


# Sessions


CHILD = """
    import subprocess, sys
    child = "from dagster_pipes import open_dagster_pipes as o\\nwith o() as p: {body}"
    done = subprocess.run([sys.executable, "-c", child], check={check})
"""


def test_a_second_process_that_opens_pipes_discards_nothing(tmp_path: Path) -> None:
    workload = PIPES + "    pipes.report_asset_check('fine', passed=True)\n    pipes.report_custom_message('mine')\n"
    workload += CHILD.format(body="p.log.info('child')", check=True)
    workload += "    pipes.report_asset_materialization(metadata={'important': 1})\n"
    outcome = materialize(workload, tmp_path, checks=("fine",))
    assert outcome.error == ""
    assert outcome.materializations[None][0]["important"] == 1
    assert outcome.checks == {"fine": True}


def test_a_child_s_closed_session_does_not_count_as_the_parent_s(tmp_path: Path) -> None:
    workload = PIPES + CHILD.format(body="p.log.info('child')", check=True) + "    import os; os._exit(0)\n"
    outcome = materialize(workload, tmp_path)
    assert "without closing its Dagster Pipes session" in outcome.error


@pytest.mark.parametrize(("check", "error"), [(False, ""), (True, "raised subprocess.CalledProcessError")])
def test_whether_a_child_s_exception_counts_is_the_parent_s_choice(check: bool, error: str, tmp_path: Path) -> None:
    workload = PIPES + CHILD.format(body="1/0", check=check) + "    pipes.report_asset_materialization()\n"
    outcome = materialize(workload, tmp_path)
    assert error in outcome.error
    assert outcome.success is not check


def test_the_exception_of_one_of_two_children_in_turn_counts(tmp_path: Path) -> None:
    """The program itself opens no session, and ignores how its children ended."""
    child = "from dagster_pipes import open_dagster_pipes as o\nwith o() as p: {}"
    workload = "import subprocess, sys\n"
    for body in ("1/0", "p.report_asset_materialization()"):
        workload += f"subprocess.run([sys.executable, '-c', {child.format(body)!r}])\n"
    assert "raised ZeroDivisionError" in materialize(workload, tmp_path).error


@pytest.mark.parametrize("call", ["sys.exit()", "sys.exit(0)", "sys.exit(None)", "raise SystemExit", "sys.exit(False)"])
def test_exit_code_0_inside_the_session_is_success(call: str, tmp_path: Path) -> None:
    workload = PIPES + f"    import sys\n    pipes.report_asset_materialization(metadata={{'rows': 1}})\n    {call}\n"
    outcome = materialize(workload, tmp_path)
    assert outcome.error == ""
    assert outcome.materializations[None][0]["rows"] == 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("sys.exit(2)", "raised SystemExit: 2"),
        ("sys.exit('no data')", "raised SystemExit: no data"),
        ("sys.exit(256)", "raised SystemExit: 256"),  # the system makes 0 of it
        ("sys.exit('')", "ended with exit code 1"),
    ],
)
def test_any_other_exit_inside_the_session_is_a_failure(call: str, text: str, tmp_path: Path) -> None:
    assert text in materialize(PIPES + f"    import sys; {call}\n", tmp_path).error


def test_two_megabytes_of_exception_are_shortened(tmp_path: Path) -> None:
    error = materialize(PIPES + "    raise ValueError('begin' + 'x' * 2_000_000 + 'end')\n", tmp_path).error
    assert "raised ValueError: begin" in error
    assert "characters left out" in error
    assert "end" in error
    assert len(error) < 50_000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_and_an_ascii_locale_do_not_end_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster's database and the step's output are refused while the workload runs; then there is room again."""
    full = tmp_path / "full"
    workload = (
        PIPES
        + f"""
    import pathlib, sys, time
    full = pathlib.Path({str(full)!r})
    full.touch()
    for number in range(100):
        print("\u2713", number)
        print("\u2713", number, file=sys.stderr)
        pipes.log.info(str(number))
    pipes.report_asset_materialization(metadata={{"rows": 7}})
    deadline = time.monotonic() + 60
    while not (full.parent / "refused").exists():
        assert time.monotonic() < deadline, "nothing was refused"
        time.sleep(0.01)
    full.unlink()
    """
    )
    store = dg.DagsterInstance.handle_new_event

    def refuse(*arguments: Any, **names: Any) -> Any:
        if full.exists():
            (tmp_path / "refused").touch()
            raise OSError(28, "No space left on device")
        return store(*arguments, **names)

    monkeypatch.setattr(dg.DagsterInstance, "handle_new_event", refuse)
    output = open("/dev/full", "w", encoding="ascii")  # noqa: PTH123, SIM115 - it cannot be closed
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", output)
    outcome = materialize(workload, tmp_path)
    monkeypatch.undo()
    with suppress(OSError):
        output.close()
    assert outcome.error == ""
    assert outcome.materializations[None][0]["rows"] == 7


# Reports on partitions


@pytest.mark.parametrize("key", ["a'; echo $HOME `id`", "../up", "é ü/ö", "x" * 200])
def test_a_partition_key_with_odd_characters(tmp_path: Path, key: str) -> None:
    workload = (
        PIPES
        + """
    (key,) = pipes.extras["partition_keys"]
    report = {"partition": key, "metadata": {"rows": len(key)}}
    pipes.report_custom_message({"musica.partition": report})
    pipes.report_asset_materialization()
    """
    )
    outcome = materialize(workload, tmp_path, partitions=(key, "other"), partition_key=key)
    assert outcome.error == ""
    assert outcome.materializations[key][0]["rows"] == len(key)


def test_each_asset_of_a_multi_asset_has_numbers_of_all_types_per_partition(tmp_path: Path) -> None:
    workload = write(
        tmp_path,
        """
    for name in ("one", "group/two"):
        for number, key in enumerate(pipes.extras["partition_keys"]):
            title = {"raw_value": f"# {name} {key}", "type": "md"}
            metadata = {"rows": number, "text": title, "list": [1], "none": None}
            report = {"partition": key, "asset_key": name, "metadata": metadata}
            pipes.report_custom_message({"musica.partition": report})
            report = {"partition": key, "asset_key": name, "metadata": {"more": 1.5}, "data_version": f"v{number}"}
            pipes.report_custom_message({"musica.partition": report})
    pipes.report_custom_message({"partition": "train", "metadata": {"mine": 1}})
    pipes.report_custom_message({"musica.partition": 1, "other": 2})
    """,
    )
    messages: list[Any] = []

    @dg.multi_asset(
        specs=[dg.AssetSpec("one"), dg.AssetSpec(["group", "two"])],
        partitions_def=LETTERS,
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def both(context: dg.AssetExecutionContext, compute: ComputeResource) -> Iterator[Any]:
        done = compute.run(context, workload=workload, launcher=ScriptLauncher())
        messages.extend(done.get_custom_messages())
        yield from done.get_results()

    result = dg.materialize([both], resources=COMPUTE, tags=RANGE)
    events = list(result.get_asset_materialization_events())
    assert len(events) == 6
    seconds = 0
    for event in events:
        found = event.materialization
        assert found.partition
        metadata = found.metadata
        number = "abc".index(found.partition)
        assert metadata["rows"] == dg.IntMetadataValue(number)
        name = found.asset_key.to_user_string()
        assert metadata["text"] == dg.MarkdownMetadataValue(f"# {name} {found.partition}")
        assert metadata["list"] == dg.JsonMetadataValue([1])
        assert metadata["none"] == dg.NullMetadataValue()
        assert metadata["more"] == dg.FloatMetadataValue(1.5)
        assert metadata["data_version"] == dg.TextMetadataValue(f"v{number}")
        seconds += "workload_seconds" in metadata
    assert seconds == 1  # what the whole job took is there once
    assert messages == [{"partition": "train", "metadata": {"mine": 1}}, {"musica.partition": 1, "other": 2}]


def test_the_only_partition_of_a_run_gets_its_data_version(tmp_path: Path) -> None:
    workload = write(
        tmp_path,
        """
    pipes.report_custom_message({"musica.partition": {"partition": "b", "data_version": "7"}})
    """,
    )

    @dg.asset(partitions_def=LETTERS)
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        return compute.run(context, workload=workload, launcher=ScriptLauncher()).get_materialize_result()

    result = dg.materialize([probe], resources=COMPUTE, partition_key="b")
    (event,) = result.asset_materializations_for_node("probe")
    assert event.tags
    assert event.tags["dagster/data_version"] == "7"


@pytest.mark.parametrize(
    ("report", "text"),
    [
        ({"partition": "d", "metadata": {"rows": 1}}, "the partition 'd' is not of this run"),
        ({"partition": ["a"], "metadata": {"rows": 1}}, "not a report on a partition"),
        ({"partition": "a", "metadata": "text"}, "not a report on a partition"),
        ({"partition": "a", "metadata": {"t": {"raw_value": 1, "type": "nonsense"}}}, "nonsense"),
        ({"partition": "a", "metadata": {"t": {"raw_value": {}, "type": "table"}}}, "'table'}: 'records' is missing"),
        ({"metadata": {"rows": 1}}, "not a report on a partition"),
        ({"partition": "a", "numbers": {"rows": 1}}, "its form is"),
        (
            {"partition": "a", "asset_key": "other", "metadata": {}},
            "for the asset 'other'; the assets of this run are probe",
        ),
        ("a", "not a report on a partition"),
    ],
)
def test_a_report_that_cannot_be_used(report: Any, text: str, tmp_path: Path) -> None:
    workload = PIPES + f"    pipes.report_custom_message({{'musica.partition': {report!r}}})\n"
    outcome = materialize(workload, tmp_path, partitions=("a", "b"), partition_key="a")
    assert "probe: what probe workload.py reported cannot be used: " in outcome.error
    assert text in outcome.error


def test_a_report_on_a_partition_of_an_asset_that_has_none(tmp_path: Path) -> None:
    workload = PIPES + "    pipes.report_custom_message({'musica.partition': {'partition': 'a'}})\n"
    assert "cannot be used: the partition 'a' is not of this run" in materialize(workload, tmp_path).error


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"raw_value": "yesterday", "type": "timestamp"}, 'Param "'),
        ({"raw_value": {"records": [{"a": 1}]}, "type": "table"}, "'schema' is missing"),
    ],
)
@pytest.mark.parametrize("report", ["report_asset_materialization(", "report_asset_check('fine', passed=True, "])
def test_metadata_that_dagster_refuses_is_named(value: Any, reason: str, report: str, tmp_path: Path) -> None:
    workload = PIPES + f"    pipes.{report}metadata={{'rows': 1, 'at': {value!r}}})\n"
    error = materialize(workload, tmp_path, checks=("fine",)).error
    assert f"probe: what probe workload.py reported cannot be used: the metadata 'at', {value}: {reason}" in error


# Ops, checks, retries


def test_the_function_of_an_asset_check_runs_a_workload(tmp_path: Path) -> None:
    workload = write(tmp_path, "    pipes.report_asset_check('fresh', passed=False, asset_key='probe')\n")

    @dg.asset_check(asset="probe")
    def fresh(context: dg.AssetCheckExecutionContext, compute: ComputeResource) -> dg.AssetCheckResult:
        return compute.run(context, workload=workload, launcher=ScriptLauncher()).get_asset_check_result()

    @dg.asset
    def probe() -> None: ...

    result = dg.materialize([probe, fresh], resources=COMPUTE)
    (evaluation,) = result.get_asset_check_evaluations()
    assert (evaluation.check_name, evaluation.passed) == ("fresh", False)
    assert "workload_seconds" in evaluation.metadata


def test_an_op_is_named_in_its_failure_and_gets_custom_messages(tmp_path: Path) -> None:
    good = write(tmp_path, "    pipes.report_custom_message(42)\n")
    bad = tmp_path / "bad.py"
    bad.write_text("raise ValueError('why')")

    @dg.op
    def answer(context: dg.OpExecutionContext, compute: ComputeResource) -> int:
        done = compute.run(context, workload=good, launcher=ScriptLauncher())
        return int(done.get_custom_messages()[0])

    @dg.op
    def breaks(context: dg.OpExecutionContext, compute: ComputeResource) -> None:
        compute.run(context, workload=bad, launcher=ScriptLauncher())

    @dg.job(resource_defs=COMPUTE)
    def plain() -> None:
        answer()
        breaks()

    result = plain.execute_in_process(raise_on_error=False)
    assert result.output_for_node("answer") == 42
    assert "breaks: bad.py ended with exit code 1" in error_of(result)


@pytest.mark.parametrize("annotation", [dg.AssetExecutionContext, dg.OpExecutionContext])
def test_the_ops_of_a_graph_asset_and_either_annotation(annotation: type, tmp_path: Path) -> None:
    workload = write(tmp_path, "    pipes.report_custom_message(1)\n")

    def compute_one(context, compute: ComputeResource, start: int) -> dg.Output[int]:  # type: ignore[no-untyped-def]
        done = compute.run(context, workload=workload, launcher=ScriptLauncher())
        return dg.Output(start + sum(done.get_custom_messages()))

    compute_one.__annotations__["context"] = annotation
    first, second = dg.op(name="first")(compute_one), dg.op(name="second")(compute_one)

    @dg.op
    def zero() -> int:
        return 0

    @dg.graph_asset
    def whole() -> int:
        return second(start=first(start=zero()))  # type: ignore[no-any-return]

    result = dg.materialize([whole], resources=COMPUTE)
    assert result.output_for_node("whole.second") == 2
    assert len(result.asset_materializations_for_node("whole.second")) == 1


def retries_of(result: dg.ExecuteInProcessResult) -> int:
    return len(result.filter_events(lambda event: event.event_type_value == "STEP_UP_FOR_RETRY"))


def test_the_retry_policy_of_an_asset_holds(tmp_path: Path) -> None:
    tries = tmp_path / "tries"
    body = f"    with open({str(tries)!r}, 'a') as file:\n        print(file=file)\n"
    workload = write(tmp_path, body + f"    assert len(open({str(tries)!r}).readlines()) == 3\n")

    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=2))
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        return compute.run(context, workload=workload, launcher=ScriptLauncher()).get_materialize_result()

    result = dg.materialize([probe], resources=COMPUTE, raise_on_error=False)
    assert result.success
    assert retries_of(result) == 2


def test_what_the_asset_asks_for_wrongly_is_not_retried(tmp_path: Path) -> None:
    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=2))
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        done = compute.run(context, workload=tmp_path / "none.py", launcher=ScriptLauncher())
        return done.get_materialize_result()

    result = dg.materialize([probe], resources=COMPUTE, raise_on_error=False)
    assert retries_of(result) == 0
    assert "none.py does not exist" in error_of(result)
