"""Measure what a job uses on its nodes, and report GPUs that stay idle.

usage: sampler.py job NODES GPUS [LIMIT]   on the first node, in the folder of the job's events; for each line of its
                                           standard input it prints what the job has used until then, as JSON
       sampler.py node GPUS                on another node: it prints each sample as JSON

GPUS: of the job on one node. LIMIT: end the job when all its GPUs have been idle for this many seconds.

It runs with the environment's Python or that of the system: Python 3.6, standard library. It ends with its standard
input, which ends with the shell of the batch script, and it writes no file but a line of the events. A number that a
node does not show is left out.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

from job_use import Usage
from node_use import SAMPLE_SECONDS, Gpus, Node, read

FIRST_PAUSES = (1.0, 2.0, 4.0, 8.0)  # of a short job there are samples, too
START = '"started"'  # in the events, once per start of the job
REPORT_IDLE = 600.0  # seconds; GPUs also wait while a program reads its data
PYTHON_OPTIONS = ["-B", "-E", "-s", "-S"]  # only Python's own modules, and those beside this program


class Sampler:
    """What both kinds share: it takes samples until its standard input ends."""

    def __init__(self, gpus):
        self.node, self.gpus = Node(os.environ["SLURM_JOB_ID"]), Gpus(gpus)
        self.parent = os.getppid()
        self.inputs = {0: self.asked}  # by descriptor: the function that gets its data
        self.pauses = list(FIRST_PAUSES)
        self.due = 0.0

    def run(self):
        """Take samples until standard input ends, or the parent has ended without closing it."""
        self.gpus.start()
        if self.gpus.process:
            self.inputs[self.gpus.process.stdout.fileno()] = self.gpus.feed
        while os.getppid() == self.parent:
            now = time.monotonic()
            if now >= self.due:
                self.sample(now)
                self.due = now + (self.pauses.pop(0) if self.pauses else SAMPLE_SECONDS)
            ready, _, _ = select.select(list(self.inputs), [], [], max(self.due - now, 0.0))
            for descriptor in sorted(ready, reverse=True):  # samples that have come count in an answer
                data = os.read(descriptor, 65536)
                if not data and descriptor == 0:
                    return
                if data:
                    self.inputs[descriptor](data)
                else:
                    del self.inputs[descriptor]

    def end(self):
        """End what this program has started."""
        if self.gpus.process and self.gpus.process.poll() is None:
            self.gpus.process.terminate()


class OtherNode(Sampler):
    """On another node of the job."""

    def asked(self, data):
        """Do nothing: nobody asks this node."""

    def sample(self, now):
        """Print a sample."""
        memory, cpu = self.node.sample()
        print(json.dumps([os.environ.get("SLURMD_NODENAME"), memory, cpu, self.gpus.take()]), flush=True)


class FirstNode(Sampler):
    """On the first node of the job: it collects the samples of all nodes."""

    def __init__(self, nodes, gpus, limit):
        super().__init__(gpus)
        self.usage, self.limit = Usage(nodes, gpus, time.monotonic()), limit
        self.report_at = min(REPORT_IDLE, limit / 2) if limit else REPORT_IDLE  # before it ends the job
        self.others, self.others_wanted, self.rest = None, nodes > 1, b""
        self.reported, self.scancel, self.starts = False, None, read("events").count(START)

    def asked(self, data):
        """Print what the job has used until now."""
        now = time.monotonic()
        self.usage.add("", now, *self.node.sample(), self.gpus.take())
        document = self.usage.document(now, "SLURM_ARRAY_TASK_ID" not in os.environ)
        if self.cancelled():
            document["ended_idle"] = self.limit
        print(json.dumps(document), flush=True)

    def sample(self, now):
        """Take a sample, and act on idle GPUs. The other nodes begin when the job has run for a moment."""
        if read("events").count(START) > self.starts:  # on another node: Slurm took this one for dead, and it is not
            os.kill(self.parent, signal.SIGKILL)  # then Slurm ends the other processes, and no end is recorded
        memory, cpu = self.node.sample()
        self.usage.add("", now, memory, cpu, self.gpus.take())
        self.usage.point(now)
        if self.others_wanted and not self.pauses:
            self.others_wanted = False
            self.start_others()
        idle = self.usage.idle(now)
        if idle >= self.report_at and not self.reported:
            self.reported = True
            self.record({"idle": round(idle), "time": time.time()})
        if self.limit and idle >= self.limit and not self.cancelled():
            self.end_job()

    def start_others(self):
        """Start this program on the other nodes: a step that shares the job's resources with its other steps."""
        count = self.usage.nodes - 1
        step = ["--overlap", "--relative=1", "--nodes=%d" % count, "--ntasks=%d" % count, "--ntasks-per-node=1"]
        step += ["--cpus-per-task=1", "--mem=0", "--mpi=none", "--export=ALL", "--kill-on-bad-exit=0", "--quiet"]
        step += ["--gres=gpu:%d" % self.usage.gpus] if self.usage.gpus else []
        program = [sys.executable] + PYTHON_OPTIONS + [os.path.abspath(__file__), "node", str(self.usage.gpus)]
        try:
            self.others = subprocess.Popen(
                ["srun"] + step + program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError:
            return
        self.inputs[self.others.stdout.fileno()] = self.hear

    def hear(self, data):
        """Add the samples of other nodes."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            try:
                node, memory, cpu, gpus = json.loads(line.decode())
            except ValueError:  # a node was lost in the middle of its line
                continue
            self.usage.add(node, time.monotonic(), memory, cpu, gpus)

    def record(self, event):
        """Append a line to the job's own record; do nothing if the disk is full."""
        with suppress(OSError), open(os.open("events", os.O_WRONLY | os.O_APPEND), "wb", buffering=0) as file:
            file.write(json.dumps(event).encode() + b"\n")

    def cancelled(self):
        """Return whether this program has cancelled the job, or is doing so; False after a scancel that failed."""
        return self.scancel is not None and (self.scancel.poll() or 0) <= 0  # SIGTERM also ends scancel in the job

    def end_job(self):
        """Cancel this job, or this task of an array job."""
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        job = "%s_%s" % (array, task) if array and task else os.environ["SLURM_JOB_ID"]
        with suppress(OSError):
            self.scancel = subprocess.Popen(["scancel", job], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def end(self):
        """End what this program has started, also on the other nodes."""
        super().end()
        if self.others and self.others.poll() is None:
            self.others.terminate()
            self.others.wait()


def main():
    """Run the sampler of the first node, or that of another one."""
    kind, *numbers = sys.argv[1:]
    if kind == "job":
        # Slurm may send SIGTERM to all processes of a job: the batch script still asks this one. Programs that this one
        # starts have the default again. On other nodes the sampler ends at once, or the job would last for KillWait.
        signal.signal(signal.SIGTERM, lambda *_: None)
        nodes, gpus, *limit = map(int, numbers)
        sampler = FirstNode(nodes, gpus, limit[0] if limit else 0)
    else:
        sampler = OtherNode(int(numbers[0]))
    try:
        sampler.run()
    finally:
        sampler.end()


if __name__ == "__main__":
    main()
