"""What the agent asks Slurm about projects, and what the client makes of the answers: recorded ones of Slurm 24.11."""

import re
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.costs.budget import Budget, budgets_of
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.setting_files import load_settings
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import Usage
from dagster_sbatch.slurm.gateway.agent import usage as agent
from support.agent_fixtures import WITHOUT_PROFILE, put

START = 1795751857
SINCE = datetime.fromtimestamp(START - 3600, UTC)
GPUS = "billing=8,cpu=8,gres/gpu:h100={0},gres/gpu={0},mem=8000M,node={1}"
# One line of a comment that has two; a name with the separator; a task; a job that runs; one that has not begun.
SACCT = f"""\
1|COMPLETED|xy12345|p70600|{START}|{START + 1800}|1800|{GPUS.format(2, 1)}|g|K-1|key=K-1,asset=a/b
2_0|NODE_FAIL|xy12345|p70600|{START}|{START + 900}|900|{GPUS.format(4, 1)}|g|j.sh|one
two
3|CANCELLED by 0|ab1|p71234|{START}|{START + 3600}|3600|billing=4,cpu=4,mem=4000M,node=1|c|a|b|c
4|RUNNING|xy12345|p71234|{START}|Unknown|1800|{GPUS.format(8, 2)}|g|K-2|
5|PENDING|xy12345|p71234|Unknown|Unknown|0||g|K-3|"""
NOTHING = "cpu=4,mem=0,node={},billing=4,gres/gpu={},gres/gpu:h100={}"
SSHARE = f"""\
root|||{NOTHING.format(90, 30, 30)}|{NOTHING.format(22, 25, 25)}
 p70600||gres/gpu=600|{NOTHING.format(0, 120, 120)}|{NOTHING.format(20, 30, 30)}
  p70600|xy12345|node=60,gres/gpu=90|{NOTHING.format(6, 12, 12)}|{NOTHING.format(20, 30, 30)}
 p71234|||{NOTHING.format(8, 0, 0)}|{NOTHING.format(2, 0, 0)}"""
SQUEUE = "\n".join(
    [
        *["PENDING   xy12345   p70600  1:00:00   1:00:00  cpu=4,mem=8000M,node=1,billing=4,gres/gpu=2  "] * 3,
        "PENDING   ab1       p70600  2-00:30:00  2-00:30:00  cpu=4,mem=8000M,node=1,billing=4  ",
        "RUNNING   xy12345   p71234  30:00  1:00:00  cpu=8,mem=8000M,node=2,billing=8,gres/gpu=8,gres/gpu:h100=8  ",
        "RUNNING   ab1       p71234  UNLIMITED  UNLIMITED  cpu=8,mem=8000M,node=1,billing=8  ",
        "COMPLETING  ab1     p71234  50:00  1:00:00  cpu=8,mem=8000M,node=1,billing=8,gres/gpu=8  ",  # it has ended
    ]
)
CONFIG = "AccountingStorageTRES   = cpu,mem,energy,node,billing,gres/gpu,gres/gpu:h100\nPrivateData = none"
ASSOCIATIONS = """\
case "$*" in
*configuration*) printf 'PrivateData = none\\nPrivateData = none\\n';;
*"show user"*) printf 'p71234|p70600|q\\np71234|p71234|q\\n';;
*account=*) printf 'p70600||root\\np70600|xy12345|\\np71234||root\\n';;
esac"""
Ask = Callable[..., Usage]


@pytest.fixture
def ask(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """`ask(sacct=...)` gives the client's answer, where Slurm's commands print recorded text or run another script."""
    monkeypatch.setattr(agent, "user", lambda: "xy12345")

    def make(since: datetime | None = SINCE, **scripts: str) -> Usage:
        printed = {"sacct": SACCT, "sshare": SSHARE, "squeue": SQUEUE, "scontrol": CONFIG}
        spoken = {name: f"cat <<'END'\n{text}\nEND" for name, text in printed.items()}
        for name, script in ({"sacctmgr": ASSOCIATIONS} | spoken | scripts).items():
            put(slurm, name, script)
        said = agent.usage(WITHOUT_PROFILE, {"since": since and since.timestamp()}, None)
        return Usage.parse({**said, "now": float(START + 1800)}, since)

    return make


def settings(**values: Any) -> Settings:
    return Settings.model_validate(values)


OWNERS = settings(SLURM_BUDGET_GPU_HOURS=100, SLURM_BUDGET_START=date(2026, 11, 27))
AWAY = "echo 'Connection refused' >&2; exit 1"


def test_lives_of_jobs_are_read(ask: Ask) -> None:
    jobs = ask().jobs
    assert jobs is not None
    assert [(job.job, job.project, job.tres["gres/gpu"], job.tres["node"]) for job in jobs] == [
        ("1", "p70600", 2, 1),
        ("2_0", "p70600", 4, 1),
        ("3", "p71234", 0, 1),
        ("4", "p71234", 8, 2),
    ]
    assert jobs[0].comment == "key=K-1,asset=a/b"
    assert (jobs[3].end, jobs[3].seconds) == (None, 1800)


@pytest.mark.parametrize("elapsed", ["", "INVALID", "-3"])
def test_a_run_time_that_is_no_number_is_no_error(elapsed: str, ask: Ask) -> None:
    """A run with SLURM_KEEP_WITHIN_BUDGET asks for these numbers before it submits its job."""
    odd = SACCT.replace("|900|", f"|{elapsed}|").replace("|1800|", f"|{elapsed}|")
    jobs = ask(sacct=f"cat <<'END'\n{odd}\nEND").jobs
    assert jobs is not None
    assert [job.seconds for job in jobs] == ([0, 0, 3600, 0] if elapsed == "-3" else [1800, 900, 3600, 0])


def test_limits_of_slurm_are_budgets(ask: Ask) -> None:
    """A task that waits counts as often as there are such; a limit of the user counts the user's jobs only."""
    assert budgets_of(ask(), OWNERS)[:3] == [
        Budget("p70600", "p70600", "gres/gpu", "", "GrpTRESMins of p70600", 10, 2, 0.5, 6),
        Budget("p70600", "p70600", "node", "xy12345", "GrpTRESMins of p70600", 1, 0.1, 20 / 60, 3),
        Budget("p70600", "p70600", "gres/gpu", "xy12345", "GrpTRESMins of p70600", 1.5, 0.2, 0.5, 6),
    ]
    budget = budgets_of(ask(), OWNERS)[0]
    assert (budget.unit, budget.left, budget.free) == ("GPU-hours", 8, 1.5)


def test_a_limit_above_the_project_counts(ask: Ask) -> None:
    above = ASSOCIATIONS.replace("p71234||root", "p71234||physics").replace(
        "*account=*)", "*account=physics*) echo 'physics||root';;\n*account=*)"
    )
    shares = f"{SSHARE}\n physics||gres/gpu=60|{NOTHING.format(8, 30, 30)}|{NOTHING.format(2, 0, 0)}"
    found = budgets_of(ask(sacctmgr=above, sshare=f"echo '{shares}'"), settings())
    assert [(each.project, each.source, each.left) for each in found][3:] == [("p71234", "GrpTRESMins of physics", 0.5)]


def test_the_owners_budget_counts_since_its_start(ask: Ask) -> None:
    """Half an hour of 8 GPUs, of which the job may use as much again; of the same project, no limit of Slurm."""
    (budget,) = budgets_of(ask(datetime(2026, 11, 26, tzinfo=UTC)), OWNERS)[3:]
    assert budget == Budget("p71234", "p71234", "gres/gpu", "", "SLURM_BUDGET_GPU_HOURS", 100, 4, 4, 0)
    assert budgets_of(ask(), OWNERS)[3].used is None  # the request was for jobs of a later time


def test_a_project_is_the_same_in_capital_letters(ask: Ask) -> None:
    """Slurm charges it, and writes it in small letters."""
    usage, changed = ask(), OWNERS.model_copy(update={"account": "P71234"})
    assert [each.project for each in budgets_of(usage, changed)][3:] == ["p71234"]


def test_sacct_is_asked_by_its_own_clock(ask: Ask, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the night that ends summer time, a time of day is two times. Without an end, sacct leaves out what began after
    the time of the login node, whose clock may be behind Slurm's."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Vienna")
        time.tzset()
        for hour in (0, 1):  # 02:30 in Vienna, both
            ask(datetime(2026, 10, 25, hour, 30, tzinfo=UTC), sacct=f'echo "$*" >"{slurm}/asked"')
            asked += re.findall(r"-S (\S+) -E now\+1days", (slurm / "asked").read_text())
    time.tzset()
    earlier, later = (int(words.removeprefix("now-").removesuffix("seconds")) for words in asked)
    assert earlier - later == pytest.approx(3600, abs=30)


@pytest.mark.parametrize(
    "forged",
    [
        "1|C|a|p|9999999999999|9|9|cpu=1|c|n|",
        "1|C|a|p|253402300799|253402300799|9|cpu=1|c|n|",
        "1|C|a|p|5|99999999999999999999999|9|cpu=1|c|n|",
        "1|C|a|p|5|6|\N{SUPERSCRIPT TWO}|cpu=1|c|n|",
        f"1|C|a|p|5|6|1|cpu={'9' * 5000}|c|n|",
    ],
)
def test_the_name_of_another_users_job_stops_no_run(forged: str, ask: Ask) -> None:
    """All users of a project see its jobs, and each names his own."""
    usage = ask(sacct=f"cat <<'END'\n6|COMPLETED|ab1|p1|{START}|{START + 60}|60|cpu=4,node=1|c|two\n{forged}\nEND")
    assert usage.jobs is not None
    assert [job.job for job in usage.jobs] == ["6"]


def test_the_comment_of_another_users_job_does_not_control_the_terminal(ask: Ask) -> None:
    (job,) = ask(sacct=f"printf '6|C|ab1|p1|{START}|{START + 60}|60|cpu=4|c|n|asset=\\033[2Ja\n'").jobs or ()
    assert job.comment == "asset=?[2Ja"


def test_a_job_counts_whose_name_has_further_lines(ask: Ask) -> None:
    jobs = ask(sacct=f"printf '6|COMPLETED|ab1|p1|{START}|{START + 60}|60|cpu=4,node=1|c|two\\nlines|more\\n'").jobs
    assert [(job.job, job.name, job.comment, job.tres["node"]) for job in jobs or ()] == [("6", "two", "", 1)]


@pytest.mark.parametrize(
    ("state", "left", "limit", "hours"),
    [
        ("RUNNING", "INVALID", "1:00", 4),  # past its limit: Slurm ends it within a minute
        ("RUNNING", "INVALID", "INVALID", None),  # more than a year
        ("PENDING", "INVALID", "INVALID", None),
        ("RUNNING", "UNLIMITED", "UNLIMITED", None),
        ("PENDING", "NOT_SET", "NOT_SET", None),
    ],
)
def test_times_that_squeue_does_not_write_as_numbers(
    ask: Ask, state: str, left: str, limit: str, hours: float | None
) -> None:
    queue = "\n".join([SQUEUE, f"{state} xy12345 p71234 {left} {limit} cpu=8,mem=8000M,node=1,billing=8,gres/gpu=2"])
    budget = budgets_of(ask(datetime(2026, 11, 26, tzinfo=UTC), squeue=f"cat <<'END'\n{queue}\nEND"), OWNERS)[3]
    assert (budget.running if state == "RUNNING" else budget.queued) == hours


def test_the_limit_of_slurm_comes_before_the_owners_budget(ask: Ask) -> None:
    with_account = OWNERS.model_copy(update={"account": "p70600"})
    assert {each.source for each in budgets_of(ask(), with_account)} == {"GrpTRESMins of p70600"}


def test_limits_that_change_count_from_the_next_request(ask: Ask) -> None:
    """A limit that is lower than what is used, and none any more: then the owner's budget counts."""
    with_account = OWNERS.model_copy(update={"account": "p70600"})
    for limit, expected in (("6000", 98), ("60", -1)):
        changed = SSHARE.replace("gres/gpu=600|", f"gres/gpu={limit}|")
        budget = budgets_of(ask(sshare=f"echo '{changed}'"), with_account)[0]
        assert (budget.limit, budget.left) == (int(limit) / 60, expected)
    gone = SSHARE.replace("gres/gpu=600|", "|").replace("node=60,gres/gpu=90|", "|")
    assert {each.source for each in budgets_of(ask(sshare=f"echo '{gone}'"), with_account)} == {
        "SLURM_BUDGET_GPU_HOURS"
    }


def test_a_job_that_the_accounting_does_not_know_yet_counts_by_the_queue(ask: Ask) -> None:
    """The accounting lags behind: what the job has used is missing until then; what it may still use counts."""
    lagging = "\n".join(line for line in SACCT.splitlines() if not line.startswith("4|"))
    budget = budgets_of(ask(datetime(2026, 11, 26, tzinfo=UTC), sacct=f"echo '{lagging}'"), OWNERS)[3]
    assert (budget.used, budget.running, budget.free) == (0, 4, 96)


def test_the_owners_budget_is_of_the_users_jobs_where_slurm_hides_others(ask: Ask) -> None:
    hidden = ASSOCIATIONS.replace("PrivateData = none\\n'", "PrivateData = accounts,jobs\\n'")
    budget = budgets_of(ask(sacctmgr=hidden), OWNERS)[3]
    assert (budget.user, budget.running) == ("xy12345", 4)
    assert budgets_of(ask(), OWNERS)[3].user == ""
    usage = ask(sacctmgr=hidden.replace("accounts,jobs", "usage"))  # Slurm shows the jobs of others all the same
    assert budgets_of(usage, OWNERS)[3].user == ""


def test_limits_that_slurm_hides_are_unknown(ask: Ask) -> None:
    """With PrivateData=usage, sshare has no rows of projects: that is no project without a limit."""
    rows = "\n".join(line for line in SSHARE.splitlines() if "|xy12345|" in line)
    usage = ask(sshare=f"echo '{rows}'")
    assert usage.shares is None
    assert usage.trouble == ["sshare: Slurm hides from you what your projects may use (PrivateData)"]


def test_limits_of_projects_are_read_where_slurm_hides_what_is_above_them(ask: Ask) -> None:
    """With PrivateData=users, sacctmgr has no rows of projects."""
    hidden = "\n".join(line for line in ASSOCIATIONS.splitlines() if "account=" not in line)
    usage = ask(sacctmgr=hidden)
    assert budgets_of(usage, settings())[0].left == 8
    assert "hides the accounts above your projects" in usage.trouble[0]


def test_gpus_that_slurm_does_not_account_for_are_unknown(ask: Ask) -> None:
    plain = SACCT.replace("gres/gpu", "other/gpu")
    usage = ask(sacct=f"echo '{plain}'", scontrol="echo 'AccountingStorageTRES = cpu,mem,node,billing'")
    assert usage.jobs is not None
    assert {job.tres.get("gres/gpu") for job in usage.jobs} == {None}
    assert {job.tres["node"] for job in usage.jobs} == {1, 2}


@pytest.mark.parametrize(
    ("command", "unknown"),
    [
        ("sacct", {"jobs"}),
        ("squeue", {"queue"}),
        ("sshare", {"shares"}),
        ("sacctmgr", {"shares", "private"}),  # it names the projects, and those above them with a limit
    ],
)
def test_what_slurm_does_not_answer_is_unknown(ask: Ask, command: str, unknown: set[str]) -> None:
    """Nothing fails or waits, and the rest is there."""
    usage = ask(datetime(2026, 11, 26, tzinfo=UTC), **{command: AWAY})
    assert {name for name in ("jobs", "queue", "shares", "private") if getattr(usage, name) is None} == unknown
    assert "Connection refused" in usage.trouble[-1]
    for budget in budgets_of(usage, OWNERS.model_copy(update={"account": "p71234"})):
        owners = budget.source == "SLURM_BUDGET_GPU_HOURS"
        assert (budget.used is None) == (owners and command == "sacct")
        assert (budget.queued is None) == (command == "squeue")


def test_a_controller_that_does_not_answer_is_waited_for_once(ask: Ask, slurm: Path) -> None:
    usage = ask(scontrol=f"echo asked >>'{slurm}/asked'; {AWAY}")
    assert (slurm / "asked").read_text() == "asked\n"
    assert usage.projects == ["p70600", "p71234"]


def test_half_a_budget_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_BUDGET_GPU_HOURS", "100")
    with pytest.raises(ConfigurationError, match="SLURM_BUDGET_START is not set: a budget has an amount and a first"):
        load_settings(["musica"], tmp_path)
