"""The client's half of the gateway.

A lost connection says nothing about a job: every request is repeated until it is answered, and a run is followed on
from the byte where it stopped.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dagster_sbatch.atomic_write import replacing
from dagster_sbatch.slurm.gateway.answers import Claim, JobEnd, JobState, Projects, RefusedError, Submitted
from dagster_sbatch.slurm.gateway.link import AgainError, Link

PIECE = 1 << 20
ACCOUNTED = ("JobID", "State", "MaxRSS", "TotalCPU")
"""What sacct is asked for: a row for the job, then one for each of its steps."""

Files = Mapping[str, str | bytes]
Sinks = Mapping[str, Callable[[bytes], None]]


class Gateway(Link):
    """Requests to the agent on a login node; for one thread at a time."""

    def claim(
        self, runs: str, family: str, token: str, who: str, related: Sequence[str] = (), data_root: str = ""
    ) -> Claim:
        """Become the one that acts on a family of runs, for as long as the connection lives.

        Args:
            runs: folder of all runs; it is made.
            family: first part of the submission keys of the attempts, which follow as `-1`, `-2`, ...
            token: tells this client from others, also after it had to connect anew.
            who: it is, for others.
            related: beginnings of the submission keys of further runs to report if their jobs may not be over.
            data_root: DATA_ROOT, for which the answer has the absolute path.
        """
        claim = {"runs": runs, "family": family, "token": token, "who": who}
        found = Claim.parse(self.ask(do="claim", related=list(related), data_root=data_root, **claim))
        if found.held_by is None:
            self.claimed = claim
        return found

    def submit(self, run: str, files: Files | None, options: Sequence[str] = ()) -> Submitted:
        """Submit a run, once, however often it is asked for.

        Args:
            run: the run directory; its last part is the submission key, which the job has as its name.
            files: content by name; one is `job.sh`. None: the run is there already.
            options: for sbatch, before the script's own.

        Raises:
            RefusedError: sbatch said no, or another run is there under that key.
            StoppedError: `stop` was set.
        """
        answer = self.ask(**_submission(run, files, options))
        return Submitted(answer["job"], answer["how"])

    def cancel(self, run: str) -> JobEnd | None:
        """Cancel a run, and wait until that is done; None if it never had a job.

        Raises:
            RefusedError: its job is not over after a minute.
        """
        answer = self.ask(do="cancel", run=run)
        if answer["job"] and not answer["end"]:
            raise RefusedError(
                f"Slurm has accepted that job {answer['job']} is cancelled, and it is not over after a minute. Its "
                f"epilog or its node may be slow. See how it stands with\n  scripts/job {answer['job']} state"
            )
        return JobEnd.parse(answer["end"]) if answer["end"] else None

    def look(self, run: str) -> tuple[JobState | None, JobEnd | None]:
        """The state of a run's job, or how it ended; neither if it has no job."""
        said = self.ask(do="look", run=run)
        if said["end"]:
            return None, JobEnd.parse(said["end"])
        if not said["job"]:
            return None, None
        state, reason, start, *_ = said["row"] or ("PENDING", "None", "")
        if said["started"] and state == "PENDING":  # the queue's view is older
            state, reason, start = "RUNNING", "None", ""
        return JobState(state, reason, float(start) if start.isdecimal() else None), None

    def test(self, script: str) -> tuple[bool, str]:
        """Whether Slurm would take a batch script, and what it says: the expected start, or why not."""
        said = self.ask(do="test", script=script)
        return said["code"] == 0, said["text"]

    def projects(self) -> Projects:
        """Return the projects that the user may charge jobs to."""
        said = self.ask(do="projects")
        return Projects.parse(said["rows"], said["exported"])

    def states(self, runs: str) -> Mapping[str, Any]:
        """Return the view of all of the user's jobs, which the agents share in the folder of all runs.

        Returns:
            `jobs` by id (state, reason, start, name, account), `at`, `calls`, `trouble`.
        """
        return self.ask(do="states", runs=runs)

    def runs(self, runs: str) -> list[Mapping[str, Any]]:
        """Every run in the folder: `run` (its path), `about`, `job`, `end` (empty: not known), `at` (last word)."""
        found: list[Mapping[str, Any]] = self.ask(do="runs", runs=runs)["found"]
        return found

    def reject(self, run: str) -> None:
        """Note that a run's result was found wanting: no attempt uses it again. No answer is waited for.

        If the note is lost, the next attempt examines the result, rejects it and fails; the one after that is new.
        """
        if self.wire:
            with suppress(OSError, EOFError):
                self.wire.send(do="reject", run=run)

    def clean(self, runs: str, names: Sequence[str]) -> list[str]:
        """Remove the runs of these names, and what was begun and never finished; names of the runs removed."""
        cleaned: list[str] = self.ask(do="clean", runs=runs, names=list(names))["cleaned"]
        return cleaned

    def put(self, local: Path, path: str, on_progress: Callable[[int, int], None] = lambda *_: None) -> int:
        """Send a file, from where an earlier try has stopped; it appears under its name when it is whole.

        Args:
            local: the file.
            path: where it is to be.
            on_progress: is told the bytes that are there, and how many there will be.

        Returns:
            The bytes that had to be sent.
        """
        with local.open("rb") as file:
            whole, size = hashlib.file_digest(file, "sha256").hexdigest(), local.stat().st_size
            about = {"path": path, "sha256": whole, "bytes": size}
            sent = 0

            def go_on() -> int:
                nonlocal sent
                at = next(self.exchange({"do": "put", **about}))[1]["at"]
                file.seek(at)
                while at < size:
                    data = file.read(PIECE)
                    at = next(self.exchange({"do": "piece", **about, "at": at}, data=data))[1]["at"]
                    sent += len(data)
                    on_progress(at, size)
                return sent

            return self.patiently(go_on)

    def get(self, path: str, local: Path, on_progress: Callable[[int], None] = lambda _: None) -> None:
        """Fetch a file, going on where a lost connection has stopped it; it appears under its name when it is whole.

        Raises:
            RefusedError: it cannot be read.
        """
        with replacing(local) as file:

            def go_on() -> None:
                for _, head, data in self.exchange({"do": "get", "path": path, "at": file.tell()}):
                    if "file" in head:
                        file.write(data)
                        on_progress(file.tell())
                        continue
                    file.seek(0)
                    if hashlib.file_digest(file, "sha256").hexdigest() == head["sha256"]:
                        return
                    file.seek(0)
                    file.truncate()
                    raise AgainError(f"{path} did not arrive as it was sent")

            self.patiently(go_on)

    def perform(self, program: bytes, document: Mapping[str, Any], on_line: Callable[[str], None]) -> None:
        """Run a Python program on the login node, once more after each lost connection: it must bear that.

        Args:
            program: its source, compressed with zlib; Python 3.6, standard library. Its `serve()` is called.
            document: JSON, for its stdin.
            on_line: is told each line that it prints.

        Raises:
            RefusedError: it has failed; the text is the end of its stderr.
        """

        def go_on() -> None:
            for _, head, _ in self.exchange({"do": "program", "document": document}, data=program):
                if "line" not in head:
                    return
                on_line(head["line"])

        self.patiently(go_on)

    def consult(self, program: bytes, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a program's `answer(document)` returns, in the agent itself: what takes no time needs no process.

        Raises:
            RefusedError: it has raised its `Refused`.
        """

        def go_on() -> Mapping[str, Any]:
            _, head, _ = next(self.exchange({"do": "consult", "document": document}, data=program))
            answer: Mapping[str, Any] = head["answer"]
            return answer

        return self.patiently(go_on)

    def host(self) -> str:
        """Return the name of the login node."""
        return str(self.ask(do="ping")["host"])

    def ping(self) -> None:
        """Keep the connection alive while other work takes long; raises StoppedError if `stop` was set meanwhile."""
        self.ask(do="ping")

    def follow(self, run: str, sinks: Sinks, on_state: Callable[[JobState], None]) -> JobEnd:
        """Pass on what a run writes, each byte once and in order, until its job is over.

        Args:
            run: the run directory.
            sinks: who takes the new bytes of `stdout`, `stderr` and `messages.jsonl`.
            on_state: is told of each change.

        Raises:
            RefusedError: there is no such run.
            StoppedError: `stop` was set; the job goes on.
        """
        return self._follow(run, sinks, on_state, [], lambda _: None, lasting=lambda: False)

    def run(
        self,
        run: str,
        files: Files | None,
        sinks: Sinks,
        on_submitted: Callable[[Submitted], None],
        on_state: Callable[[JobState], None],
        follower: str,
    ) -> JobEnd:
        """Submit and follow in one request; see there.

        `follower` is the id of the Dagster run; it is noted in the run directory.
        """
        before = [{**_submission(run, files, ()), "follower": follower}]
        # An error of the following itself ends nothing: its job exists, or is about to.
        return self._follow(
            run, sinks, on_state, before, on_submitted, lasting=lambda: not before or self._failed == len(before)
        )

    def _follow(
        self,
        run: str,
        sinks: Sinks,
        on_state: Callable[[JobState], None],
        before: list[dict[str, Any]],
        on_submitted: Callable[[Submitted], None],
        lasting: Callable[[], bool],
    ) -> JobEnd:
        offsets = dict.fromkeys(sinks, 0)
        follow = {"do": "follow", "run": run, "fields": ",".join(ACCOUNTED)}

        def go_on() -> JobEnd:
            for _, head, data in self.exchange(*before, {**follow, "offsets": offsets}):
                if "end" in head:
                    if before:  # its sbatch has never answered
                        on_submitted(Submitted(head["job"], "found"))
                    return JobEnd.parse(head["end"], head["short"], head["rows"])
                if "job" in head:
                    before.clear()
                    on_submitted(Submitted(head["job"], head["how"]))
                elif "file" in head:
                    name = head["file"]
                    if head["at"] != offsets[name]:
                        raise AgainError(f"{name} came from byte {head['at']} on, not {offsets[name]}")
                    offsets[name] += len(data)
                    sinks[name](data)
                elif "trouble" in head:
                    self._on_trouble(head["trouble"])
                elif "state" in head:
                    start = float(head["start"]) if head["start"].isdecimal() else None
                    place = {name: head[name] for name in ("account", "node", "temporary")}
                    on_state(JobState(head["state"], head["reason"], start, **place))
            raise AgainError("the agent ended its answer")

        return self.patiently(go_on, lasting)


def _submission(run: str, files: Files | None, options: Sequence[str]) -> dict[str, Any]:
    if files is None:
        return {"do": "submit", "run": run, "options": []}
    contents = {
        name: content if isinstance(content, str) else {"base64": base64.b64encode(content).decode()}
        for name, content in files.items()
    }
    return {"do": "submit", "run": run, "options": list(options), "files": contents}
