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
import sys
import time

SAMPLE_SECONDS = 15.0
FIRST_PAUSES = (1.0, 2.0, 4.0, 8.0)  # of a short job there are samples, too
REPORT_IDLE = 600.0  # seconds; GPUs also wait while a program reads its data
STALE = 60.0  # seconds after which a node's last sample says nothing about now: it may be lost
MOST_POINTS = 64  # of the series; then each two become one
CGROUPS, PROC = "/sys/fs/cgroup", "/proc"
MEBIBYTE = float(1 << 20)
TICKS = os.sysconf("SC_CLK_TCK")
QUERY = ["nvidia-smi", "--query-gpu=index,uuid,utilization.gpu,memory.used", "--format=csv,noheader,nounits"]


# CPU time and memory of the job on this node


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
        if "2" in self.cgroups:
            found = fields(read(self.cgroups["2"] + "/memory.stat"))
            if "anon" in found:
                return (found["anon"] + found.get("shmem", 0)) / MEBIBYTE
        if "memory" in self.cgroups:
            found = fields(read(self.cgroups["memory"] + "/memory.stat"))
            if "total_rss" in found:
                return (found["total_rss"] + found.get("total_shmem", 0)) / MEBIBYTE
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
        memory, cpu = self.memory(), self.cpu()
        if (memory is None or cpu is None) and not self.processes:
            self.processes = Processes(self.job)
            self.processes.scan()
            memory, cpu = self.memory(), self.cpu()
        return memory, cpu


class Processes:
    """The processes of a job on this node: those with its id in their environment, and their descendants."""

    def __init__(self, job):
        self.mark = b"SLURM_JOB_ID=" + job.encode()
        self.members, self.others, self.unclear = set(), set(), set()
        self.memory, self.cpu = 0, 0.0

    def scan(self):
        """Read the processes that there are now.

        One counts as another job's if it is so twice: Slurm may be about to start it, or its parent comes after it.
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


# GPUs of the job on this node


class Gpus:
    """The job's GPUs on this node, of which one nvidia-smi prints a line each, every SAMPLE_SECONDS."""

    def __init__(self, count):
        self.count, self.process, self.rest, self.rows = count, None, b"", {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        self.visible = {name.strip() for name in visible.split(",") if name.strip()}

    def start(self):
        """Start nvidia-smi; do nothing without GPUs, or on a node that does not have it."""
        import subprocess

        if self.count:
            try:
                command = QUERY + ["--loop=%d" % SAMPLE_SECONDS]
                self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            except OSError:
                pass

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


# What the samples of all nodes come to


class Usage:
    """Sums, maxima and a series of all samples.

    nodes  how many the job has
    gpus   on each of them
    """

    def __init__(self, nodes, gpus, now):
        self.nodes, self.gpus, self.begun = nodes, gpus, now
        self.memory, self.gpu_memory, self.cpu = {}, {}, {}  # by node: the most, the most of a GPU, and until now
        self.gpu_sum, self.gpu_count = 0.0, 0
        self.idle_since, self.seen = {}, {}  # by node: when its GPUs began to be idle, and when they were read
        self.latest = {}  # by node: GPU utilization, CPUs in use, memory
        self.sampled = {}  # by node: when, and its CPU time then
        self.points, self.every, self.pending = [], 1, []

    def add(self, node, now, memory, cpu, gpus):
        """Add a sample of a node; None is not known."""
        if memory is not None:
            self.memory[node] = max(self.memory.get(node, 0), memory)
        if cpu is not None:
            self.cpu[node] = max(self.cpu.get(node, 0), cpu)
        known, sizes = known_columns(gpus) if gpus else ([], [])
        if gpus and len(sizes) == self.gpus:
            self.gpu_memory[node] = max(self.gpu_memory.get(node, 0), *sizes)
        if gpus and len(known) < self.gpus:  # that of some is not known, nor is their mean
            known = []
            self.idle_since.pop(node, None)
        utilization = sum(known) / len(known) if known else self.latest.get(node, (None,))[0]
        self.latest[node] = (utilization, self.cpus_in_use(node, now, cpu), memory)
        if not known:
            return
        self.gpu_sum += sum(known)
        self.gpu_count += len(known)
        if now - self.seen.get(node, now) > STALE:  # the job was suspended, or nvidia-smi did not answer
            self.idle_since.pop(node, None)
        self.seen[node] = now
        if any(known):
            self.idle_since.pop(node, None)
        else:
            self.idle_since.setdefault(node, now)

    def cpus_in_use(self, node, now, cpu):
        """Return how many CPUs a node has used since its last sample; None if that is not known."""
        time_before, cpu_before = self.sampled.get(node, (now, None))
        self.sampled[node] = (now, cpu)
        if cpu is None or cpu_before is None or now <= time_before:
            return None
        return max(cpu - cpu_before, 0.0) / (now - time_before)

    def all_recent(self, times, now):
        """Return whether there is a time for each node, and none is long ago."""
        return len(times) == self.nodes and all(now - time < STALE for time in times)

    def all_sampled(self, now):
        """Return whether there is a recent sample of each node: not before all have begun, nor if one is lost."""
        return self.all_recent([time for time, _ in self.sampled.values()], now)

    def idle(self, now):
        """Return for how many seconds all GPUs of all nodes have been idle; 0 if one is not, or is not known."""
        since = [self.idle_since[node] for node in self.idle_since if now - self.seen[node] < STALE]
        return now - max(since) if self.gpus and len(since) == self.nodes else 0.0

    def point(self, now):
        """Add a point to the series: mean GPU utilization, CPUs in use, most memory of a node.

        There is none while a node is not known: CPUs in use would be those of the other nodes.
        """
        if not self.all_sampled(now):
            return
        gpus, cpus, sizes = known_columns(self.latest.values())
        mean = sum(gpus) / len(gpus) if len(gpus) == self.nodes else None
        used = sum(cpus) if len(cpus) == self.nodes else None
        self.pending.append((mean, used, max(sizes) if len(sizes) == self.nodes else None))
        if len(self.pending) < self.every:
            return
        self.points.append(combine(self.pending))
        self.pending = []
        if len(self.points) == MOST_POINTS:
            self.points = [combine(self.points[place : place + 2]) for place in range(0, MOST_POINTS, 2)]
            self.every *= 2

    def document(self, now, series):
        """Return all of it; without the numbers of which a node does not know its part."""
        found = {"seconds": round(now - self.begun, 1)}
        if not self.all_sampled(now):
            return found
        if len(self.memory) == self.nodes:
            found["memory_mib"] = round(max(self.memory.values()), 1)
        if len(self.cpu) == self.nodes:
            found["cpu_seconds"] = round(sum(self.cpu.values()), 2)
        if self.all_recent(self.seen.values(), now):
            found["gpu_percent"] = round(self.gpu_sum / self.gpu_count, 2)
            if len(self.gpu_memory) == self.nodes:
                found["gpu_memory_mib"] = max(self.gpu_memory.values())
        if series and len(self.points) > 1:
            found["series"] = self.points
        return found


def known_columns(points):
    """Return the known numbers of each column."""
    return [[value for value in column if value is not None] for column in zip(*points)]


def combine(points):
    """Return one point of several: their means, and the most memory."""
    gpus, cpus, sizes = known_columns(points)
    mean = [round(sum(each) / len(each), 2) if each else None for each in (gpus, cpus)]
    return (mean[0], mean[1], round(max(sizes), 1) if sizes else None)


# The processes


class Sampler:
    """What both kinds share: it takes samples until its standard input ends."""

    def __init__(self, gpus):
        self.node, self.gpus = Node(os.environ["SLURM_JOB_ID"]), Gpus(gpus)
        self.parent = os.getppid()
        self.inputs = {0: self.asked}  # what reads a descriptor, and is given its data
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
            for descriptor in sorted(ready, reverse=True):  # before an answer, what has come is counted
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
        """Nobody asks here."""

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
        self.reported, self.scancel = False, None

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
        import subprocess

        count = self.usage.nodes - 1
        step = ["--overlap", "--relative=1", "--nodes=%d" % count, "--ntasks=%d" % count, "--ntasks-per-node=1"]
        step += ["--cpus-per-task=1", "--mem=0", "--mpi=none", "--export=ALL", "--kill-on-bad-exit=0", "--quiet"]
        step += ["--gres=gpu:%d" % self.usage.gpus] if self.usage.gpus else []
        program = [sys.executable, "-I", "-S", os.path.abspath(__file__), "node", str(self.usage.gpus)]
        try:
            self.others = subprocess.Popen(
                ["srun"] + step + program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
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
        try:
            descriptor = os.open("events", os.O_WRONLY | os.O_APPEND)
            try:
                os.write(descriptor, json.dumps(event).encode() + b"\n")
            finally:
                os.close(descriptor)
        except OSError:
            pass

    def cancelled(self):
        """Return whether it has cancelled the job, or is doing so; if Slurm did not answer, it tries again."""
        return self.scancel is not None and (self.scancel.poll() or 0) <= 0  # SIGTERM also ends scancel in the job

    def end_job(self):
        """Cancel this job, or this task of an array job."""
        import subprocess

        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        job = "%s_%s" % (array, task) if array and task else os.environ["SLURM_JOB_ID"]
        try:
            self.scancel = subprocess.Popen(["scancel", job], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        except OSError:
            pass

    def end(self):
        """End what this program has started, also on the other nodes."""
        super().end()
        if self.others and self.others.poll() is None:
            self.others.terminate()


def main():
    """Run one of both kinds."""
    # Slurm may send SIGTERM to all processes of a job: the batch script still asks this one. Programs that this one
    # starts have the default again.
    signal.signal(signal.SIGTERM, lambda *_: None)
    kind, *numbers = sys.argv[1:]
    if kind == "job":
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
