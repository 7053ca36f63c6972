"""CPU time, memory and GPUs of a job on the node on which the sampler runs.

A number that the node does not show is None.
"""

import os
import subprocess
from contextlib import suppress

CGROUPS, PROC = "/sys/fs/cgroup", "/proc"
MEBIBYTE = float(1 << 20)
TICKS = os.sysconf("SC_CLK_TCK")
QUERY = ["nvidia-smi", "--query-gpu=index,uuid,utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
SAMPLE_SECONDS = 15


def read(path):
    """Return the content of a file, empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def fields(text):
    """Return the numbers of a file with lines such as `anon 4096`, by name."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def cgroups_of(job):
    """Return the folders of the job's cgroups by controller; that of version 2 has the name `2`."""
    found = {}
    for line in read(PROC + "/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        parts = path.split("/")
        name = "job_%s" % job
        if name not in parts:
            continue
        own = "/".join(parts[: parts.index(name) + 1])
        for controller in controllers.split(",") if controllers else ["2"]:
            folder = CGROUPS + ("/%s" % controller if controllers else "") + own
            if os.path.isdir(folder):
                found[controller] = folder
    return found


class Node:
    """CPU time and memory of a job on this node: from its cgroup, or else from its processes."""

    def __init__(self, job):
        self.job = job
        self.cgroups = cgroups_of(job)
        self.processes = None

    def memory(self):
        """Return MiB in use without the cache of files, which gives way; None if that is not known."""
        for controller, own, shared in (("2", "anon", "shmem"), ("memory", "total_rss", "total_shmem")):
            found = fields(read(self.cgroups[controller] + "/memory.stat")) if controller in self.cgroups else {}
            if own in found:
                return (found[own] + found.get(shared, 0)) / MEBIBYTE
        return self.processes and self.processes.memory / MEBIBYTE

    def cpu(self):
        """Return the seconds of CPU time until now; None if that is not known."""
        if "2" in self.cgroups:
            found = fields(read(self.cgroups["2"] + "/cpu.stat"))
            if "usage_usec" in found:
                return found["usage_usec"] / 1e6
        if "cpuacct" in self.cgroups:
            text = read(self.cgroups["cpuacct"] + "/cpuacct.usage").strip()
            if text.isdigit():
                return int(text) / 1e9
        return self.processes and self.processes.cpu

    def sample(self):
        """Return memory and CPU time."""
        if self.processes:
            self.processes.scan()
        found = self.memory(), self.cpu()
        if self.processes or None not in found:
            return found
        self.processes = Processes(self.job)
        return self.sample()


class Processes:
    """The processes of a job on this node: those with its id in their environment, and their descendants."""

    def __init__(self, job):
        self.mark = b"SLURM_JOB_ID=" + job.encode()
        self.members, self.others, self.unclear = set(), set(), set()
        self.memory, self.cpu = 0, 0.0

    def scan(self):
        """Read the processes that there are now.

        It takes two scans to count one as another job's: Slurm may be about to start it, or its parent comes after it.
        """
        pids = {int(name) for name in os.listdir(PROC) if name.isdigit()}
        self.members &= pids
        self.others &= pids
        own, times, private, shared = os.getpid(), 0, 0, 0
        before, self.unclear = self.unclear, set()
        for pid in sorted(pids - self.others):  # a parent mostly comes before its children
            try:
                with open("%s/%d/stat" % (PROC, pid), "rb") as file:
                    stat = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            parent = int(stat[1])
            if pid not in self.members:
                if own in (pid, parent) or not (parent in self.members or self.has_mark(pid)):
                    (self.others if pid in before else self.unclear).add(pid)
                    continue
                self.members.add(pid)
            times += sum(map(int, stat[11:15]))  # its own, and those of its children that have ended
            status = read("%s/%d/status" % (PROC, pid))
            sizes = {line.partition(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Rss")}
            private += int(sizes.get("RssAnon", 0)) << 10
            shared = max(shared, int(sizes.get("RssShmem", 0)) << 10)  # several processes map the same
        self.memory = private + shared
        self.cpu = max(self.cpu, times / TICKS)

    def has_mark(self, pid):
        """Return whether a process of this user has the job's id in its environment."""
        try:
            if os.stat("%s/%d" % (PROC, pid)).st_uid != os.getuid():
                return False
            with open("%s/%d/environ" % (PROC, pid), "rb") as file:
                return self.mark in file.read().split(b"\0")
        except OSError:
            return False


class Gpus:
    """The job's GPUs on this node, of which one nvidia-smi prints a line each, every SAMPLE_SECONDS."""

    def __init__(self, count):
        self.count, self.process, self.rest, self.rows = count, None, b"", {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        self.visible = {name.strip() for name in visible.split(",") if name.strip()}

    def start(self):
        """Start nvidia-smi; do nothing without GPUs, or on a node that does not have it."""
        if self.count:
            with suppress(OSError):
                command = QUERY + ["--loop=%d" % SAMPLE_SECONDS]
                self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def feed(self, data):
        """Read what nvidia-smi has printed."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            row = parse_row(line.decode(errors="replace"))
            if row and (not self.visible or row[0] in self.visible or row[1] in self.visible):
                self.rows[row[0]] = row[2:]

    def take(self):
        """Return utilization in percent and memory in MiB of each GPU, once per reading; None between two readings."""
        if len(self.rows) < self.count:
            return None
        rows, self.rows = self.rows, {}
        return list(rows.values()) if len(rows) == self.count else None  # else it shows those of other jobs, too


def parse_row(line):
    """Return index, UUID, utilization and memory of a line of nvidia-smi; None for an unknown number or other text.

    Of a GPU that is divided (MIG) it prints `[N/A]`.
    """
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 4 or not parts[0].isdigit():
        return None
    numbers = [float(part) if part.replace(".", "", 1).isdigit() else None for part in parts[2:]]
    return (parts[0], parts[1], numbers[0], numbers[1]) if any(number is not None for number in numbers) else None
