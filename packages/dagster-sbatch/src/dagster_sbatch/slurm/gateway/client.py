"""What the client can request on the login node."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from dagster_sbatch.atomic_write import replacing
from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway.answers import (
    Attempt,
    Claim,
    JobEnd,
    JobState,
    Questions,
    RefusedError,
    Submitted,
    read_start,
)
from dagster_sbatch.slurm.gateway.channel import choose_channel
from dagster_sbatch.slurm.gateway.following import Files, JobToFollow, SingleTask, Sinks, follow_jobs
from dagster_sbatch.slurm.gateway.link import AgainError, Link
from dagster_sbatch.slurm.gateway.project_usage import Limits, Projects, Usage
from dagster_sbatch.slurm.modules import explain_modules
from dagster_sbatch.slurm.site import Site

NONE = Questions()
PIECE = 1 << 20  # of a file that is sent


class Gateway(Link):
    """Requests to the agent on a login node; for one thread at a time."""

    def claim(self, runs: str, family: str, token: str, who: str, questions: Questions = NONE) -> Claim:
        """Become the client that acts on a family of runs, for as long as the connection lives.

        `family`: first part of the submission keys of the attempts, which follow as `-1`, `-2`, ... `token`: identifies
        this client, also when it connects anew. `questions`: are answered with the claim, in the same round trip.
        """
        claim = {"runs": runs, "family": family, "token": token, "who": who}
        found = Claim.parse(self.ask(do="claims.claim", **claim, **asdict(questions)))
        if found.held_by is None:
            self.claimed = claim
        return found

    def cancel(self, run: str) -> JobEnd | None:
        """Cancel a run's job, and wait until it is over; return how it ended, None if there never was a job.

        Raises RefusedError: its job is not over after a minute.
        """
        outcome = _outcome_of_cancel(self.ask(do="jobs.cancel", run=run))
        if isinstance(outcome, RefusedError):
            raise outcome
        return outcome

    def cancel_all(
        self,
        runs: Sequence[str],
        report: Callable[[str, JobEnd | RefusedError | None], None],
        jobs: Mapping[str, str | None] = {},
    ) -> None:
        """Cancel the jobs of some runs at the same time, and wait until they are over. A slow one delays no other.

        `report`: gets each of them with what `cancel` returns or raises for it. `jobs`: the ids of their jobs, as far
        as they are known: a run directory may have been removed.
        """
        left = list(runs)

        def step() -> None:
            requests = [{"do": "jobs.cancel", "run": run, "job": jobs.get(run)} for run in left]
            for request, head, _ in self.exchange(requests):
                left.remove(request["run"])
                report(request["run"], _outcome_of_cancel(head))
                if not left:
                    return

        if left:
            self.patiently(step)

    def cancel_tasks(self, run: str, tasks: Iterable[int]) -> dict[int, JobEnd]:
        """Cancel some tasks of an array job, and wait until they are over; return how they ended, by index.

        A task that is not over after a minute is missing in the answer.
        """
        ends = self.ask(do="run_directories.cancel_tasks", run=run, tasks=sorted(tasks))["ends"]
        return {int(index): JobEnd.parse(end) for index, end in ends.items()}

    def state(self, run: str) -> tuple[JobState | None, JobEnd | None]:
        """Return the state of a run's job, or how it ended; neither if it has no job."""
        said = self.ask(do="run_directories.state", run=run)
        if said["end"]:
            return None, JobEnd.parse(said["end"])
        if not said["job"]:
            return None, None
        state, reason, start, *_ = said["row"] or ("PENDING", "None", "")
        return JobState(state, reason, read_start(start)), None

    def attempt(self, run: str) -> Attempt:
        """Return what is known of a run."""
        return Attempt.parse(self.ask(do="run_directories.attempt", run=run))

    def limits(self, partition: str, qos: str = "", account: str = "") -> Limits:
        """Return how many tasks and jobs Slurm accepts; `qos`, `account`: of the jobs, empty if they name none."""
        said = self.ask(do="usage.limits", partition=partition, qos=qos, account=account)
        return Limits(said["array"], said["submit"])

    def test(self, script: str) -> tuple[bool, str]:
        """Return whether Slurm would accept a batch script, and its text: the expected start, or why not."""
        said = self.ask(do="slurm_commands.test", script=script)
        return said["code"] == 0, said["text"]

    def load_modules(self, modules: Sequence[str], setup: Sequence[str]) -> str:
        """Load modules on the login node, in a shell of its own; return why that failed, or an empty text."""
        said = self.ask(do="interpreters.load_modules", modules=list(modules), setup=list(setup))
        return explain_modules(said["host"], modules, said["code"], said["text"]) if said["code"] else ""

    def image(self, path: str, data_root: str, runs: str) -> tuple[str, str]:
        """Return what is wrong with the image of a container, empty if nothing is, and the identity of the image.

        The identity is a text that no other image under the same path has.
        """
        said = self.ask(do="images.image", path=path, data_root=data_root, runs=runs)
        return said["problem"], said["identity"]

    def projects(self) -> Projects:
        """Return the projects that the user may charge jobs to."""
        return Projects.parse(self.ask(do="usage.projects"))

    def usage(self, since: datetime | None) -> Usage:
        """Return what the user's projects have used, what waits and runs in them, and their limits.

        `since`: for the jobs that ran at this time or later, Slurm reads its database: ask at most once per hour. None:
        for no jobs.
        """
        return Usage.parse(self.ask(do="usage.usage", since=since and since.timestamp()), since)

    def usage_before_submitting(self, runs: str, since: datetime | None, seconds: float) -> Usage | None:
        """Return the usage as `usage` does, for a client that submits next; None if it does not come in time.

        The user's clients get their answers one after another: an answer counts the jobs of the client before it.
        """
        said = self.ask_once(seconds, do="usage.usage", runs=runs, since=since and since.timestamp())
        return None if said is None else Usage.parse(said, since)

    def queue(self, runs: str) -> Mapping[str, Any]:
        """Return the view of all of the user's jobs, which the agents share in the folder of all runs.

        Returns `jobs` by id (state, reason, start, name, account), `at`, `calls`, `trouble`.
        """
        return self.ask(do="shared_queue.queue", runs=runs)

    def runs(self, runs: str) -> list[Mapping[str, Any]]:
        """Return every run in the folder, oldest first: `run` (path), `about`, `job`, `end` (None: unknown), `at`."""
        return list(self.ask(do="run_directories.runs", runs=runs)["found"])

    def reject(self, run: str, task: int | None = None) -> None:
        """Record that this step rejects a run's result: no attempt uses it again. Nobody waits for the answer.

        `task`: of an array job, the index of the task whose result it is.

        If the record is lost, the next attempt reads the result, rejects it and fails; the attempt after it is new.
        """
        self.notify(do="run_directories.reject", run=run, task=task)

    def clean(self, runs: str, names: Sequence[str]) -> list[str]:
        """Remove the runs of these names, and what was begun and never finished; return the names of removed runs."""
        return list(self.ask(do="claims.clean", runs=runs, names=list(names))["cleaned"])

    def ping(self) -> str:
        """Return the name of the login node; keep the connection alive while other work takes long.

        Raises StoppedError: `stop` was set meanwhile.
        """
        return str(self.ask(do="server.ping")["host"])

    def run(
        self,
        run: str,
        files: Files | None,
        sinks: Sinks,
        follower: str,
        on_submitted: Callable[[Submitted], None] = lambda _: None,
        on_state: Callable[[JobState], None] = lambda _: None,
        *,
        task: int = 0,
    ) -> JobEnd:
        """Submit a run once, however often this is requested, and pass on what it writes until its job is over.

        `run`: the run directory; its last part is the submission key, which is the job's name. `files`: content by
        name; one is `job.sh`. None: the run exists already. `follower`: id of the Dagster run; the agent records it in
        the run directory. Empty: nothing is submitted. `task`: of an array job, the index of the only task that is
        followed.
        Raises RefusedError: sbatch refused the job, another run exists under that key, or there is no such run.
        Raises RemovedError: somebody has removed the run directory; the job is cancelled.
        Raises StoppedError: `stop` was set; the job still runs.
        """
        job = SingleTask(JobToFollow(run, files, [task]), sinks, on_submitted, on_state, self.on_trouble)
        follow_jobs(self, job, follower)
        assert job.end
        return job.end


def _outcome_of_cancel(answer: Mapping[str, Any]) -> JobEnd | RefusedError | None:
    if "refused" in answer:
        return RefusedError(answer["refused"])
    if answer["job"] and not answer["end"]:
        return RefusedError(
            f"Slurm has accepted that job {answer['job']} is cancelled, but the job is not over after a minute. "
            f"Its epilog or its node may be slow. Ask for its state:\n  scripts/job {answer['job']} state"
        )
    return JobEnd.parse(answer["end"]) if answer["end"] else None


def make_gateway(
    settings: Settings,
    site: Site,
    stop: threading.Event | None = None,
    on_trouble: Callable[[str], None] = lambda _: None,
    on_recovered: Callable[[], None] = lambda: None,
) -> Gateway:
    """Make the gateway to the login node of some settings; the first request opens the connection.

    `stop`, `on_trouble`, `on_recovered`: see `Link`.
    """
    channel = choose_channel(
        settings, site.python_candidates, ensure_certificate, site.host_authorities, site.setup_commands
    )
    return Gateway(channel, stop, on_trouble, on_recovered)


def send_file(link: Link, local: Path, path: str, on_progress: Callable[[int, int], None] = lambda *_: None) -> int:
    """Send a file, from where an earlier try stopped; it appears under its name when it is whole.

    `on_progress`: gets the number of bytes sent so far, by earlier tries too, and the size of the file.
    Returns the number of bytes that this call has sent.
    Raises RefusedError: the file changes meanwhile; bytes that are appended do not count.
    """
    with local.open("rb") as file:
        whole, size, sent = hashlib.file_digest(file, "sha256").hexdigest(), file.tell(), 0
        about = {"path": path, "sha256": whole, "bytes": size}
        changed = RefusedError(f"{local} changed while it was sent. Run this again when nothing writes to that file.")

        def go_on() -> int:
            nonlocal sent
            at = next(link.exchange([{"do": "transfer.put", **about}]))[1]["at"]
            file.seek(0)
            if sent and not at and hashlib.file_digest(file, "sha256").hexdigest() != whole:
                raise changed
            file.seek(at)
            while at < size:
                if not (data := file.read(min(PIECE, size - at))):
                    raise changed
                at = next(link.exchange([{"do": "transfer.put", **about, "at": at}], data=data))[1]["at"]
                sent += len(data)
                on_progress(at, size)
            return sent

        return link.patiently(go_on)


def fetch_file(link: Link, path: str, local: Path, on_progress: Callable[[int], None] = lambda _: None) -> None:
    """Fetch a file, from where a lost connection stopped; it appears under its name when it is whole.

    Raises RefusedError: it cannot be read.
    """
    with replacing(local) as file:

        def go_on() -> None:
            for _, head, data in link.exchange([{"do": "transfer.get", "path": path, "at": file.tell()}]):
                if "file" in head:
                    file.write(data)
                    on_progress(file.tell())
                    continue
                file.seek(0)
                if hashlib.file_digest(file, "sha256").hexdigest() == head["sha256"]:
                    return
                file.seek(0)
                file.truncate()
                raise AgainError(f"{path} arrived damaged")

        link.patiently(go_on)
