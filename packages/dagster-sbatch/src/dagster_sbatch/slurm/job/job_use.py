"""What the samples of all nodes of a job come to."""

STALE = 60.0  # seconds after which a node's last sample says nothing about now: it may be lost
MOST_POINTS = 32  # of the series; then each two become one


class Usage:
    """Sums, maxima and a series of all samples.

    nodes  how many the job has
    gpus   on each of them
    """

    def __init__(self, nodes, gpus, now):
        self.nodes, self.gpus, self.begun = nodes, gpus, now
        self.memory, self.gpu_memory, self.cpu = {}, {}, {}  # by node: most memory, most of a GPU, CPU time so far
        self.gpu_sum, self.gpu_count = 0.0, 0
        self.idle_since, self.seen = {}, {}  # by node: when its GPUs began to be idle, and when they were read
        self.latest = {}  # by node: GPU utilization, CPUs in use, memory
        self.sampled = {}  # by node: when, and its CPU time then
        self.points, self.every, self.pending = [], 1, []

    def add(self, node, now, memory, cpu, gpus):
        """Add a sample of a node; None stands for an unknown number."""
        if memory is not None:
            self.memory[node] = max(self.memory.get(node, 0), memory)
        if cpu is not None:
            self.cpu[node] = max(self.cpu.get(node, 0), cpu)
        known, sizes = known_columns(gpus) if gpus else ([], [])
        if gpus and len(sizes) == self.gpus:
            self.gpu_memory[node] = max(self.gpu_memory.get(node, 0), *sizes)
        if gpus and len(known) < self.gpus:  # some are not known, so the mean is not either
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

        No point is added while the numbers of a node are not known: the sum of CPUs in use would lack them.
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
        """Return all numbers, except those to which a node cannot add its part."""
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
