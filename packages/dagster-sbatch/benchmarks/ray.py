"""Measure the time from a Ray job's start to its first task on every node. On the simulated site, as root.

    ../../.venv/bin/python -m benchmarks.ray [--rounds 3]

Each round measures four ways in turn, with 1, 2 and 4 nodes of two CPUs; compare the ratios. "bare" is the floor: a
parallel start without any check, as in the scripts that people write. "documented" is the sbatch script of Ray's
documentation, which sleeps. "symmetric" is `ray symmetric-run`, which always starts a dashboard; the others have none.
The target for "ours" is 0.85 of "bare".
"""

import argparse
import shlex
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dagster_sbatch.launchers import RayLauncher
from dagster_sbatch.slurm import SlurmRequest, allocate, render_job_script
from resources import PROJECT
from slurm_in_a_box import CERTIFICATE_USER, CPU_PARTITION, SimulatedSite, SiteError, wait_until

SITE_NAME = "benchmark-ray"
SIZES = (1, 2, 4)
SECONDS = 120.0
OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
CPUS = 2
ARGUMENTS = f"--num-cpus={CPUS} --object-store-memory=200000000 --disable-usage-stats"
FIRST_TASKS = """\
import pathlib, socket, sys, time
import ray
ray.init(address=sys.argv[1] if len(sys.argv) > 1 else None, log_to_driver=False, logging_level="ERROR")
where = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(lambda: socket.gethostname())
found = set()
while len(found) < NODES:
    found |= set(ray.get([where.remote() for _ in range(2 * NODES)]))
pathlib.Path(__file__).with_name("first-tasks").write_text(str(time.time()))
"""
BEGIN = """\
date +%s.%N >began
mkdir bin
printf '#!/bin/sh\\nexec "%s" -m ray.scripts.scripts "$@"\\n' "$PYTHON" >bin/ray # the site's Python has no commands
chmod +x bin/ray
export RAY_USAGE_STATS_ENABLED=0 PATH=$PWD/bin:$BIN:$PATH
mapfile -t N < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
IP=$(getent ahostsv4 "${N[0]}" | awk 'NR==1{print $1}') PORT=$((20000 + SLURM_JOB_ID % 10000))
"""
END = """
kill $(jobs -p)
wait
"""
BARE = (
    BEGIN
    + """
srun --overlap -N1 -n1 -w "${N[0]}" bash -c "ray start --head --node-ip-address=$IP --port=$PORT \\
  --include-dashboard=false ARGUMENTS --block" &
until (exec 3<>/dev/tcp/$IP/$PORT) 2>/dev/null; do sleep 0.25; done
for node in "${N[@]:1}"; do
  srun --overlap -N1 -n1 -w "$node" bash -c "ray start --address=$IP:$PORT ARGUMENTS --block" &
done
"$PYTHON" work.py $IP:$PORT
"""
    + END
)
DOCUMENTED = (
    BEGIN
    + """
srun --overlap -N1 -n1 -w "${N[0]}" bash -c "ray start --head --node-ip-address=$IP --port=$PORT \\
  --include-dashboard=false ARGUMENTS --block" &
sleep 10
for node in "${N[@]:1}"; do
  srun --overlap -N1 -n1 -w "$node" bash -c "ray start --address $IP:$PORT ARGUMENTS --block" &
  sleep 5
done
"$PYTHON" work.py $IP:$PORT
"""
    + END
)
SYMMETRIC = (
    BEGIN
    + """
srun --overlap -N NODES -n NODES bash -c "ray symmetric-run --address $IP:$PORT --min-nodes NODES \\
  --num-cpus=CPUS -- $PYTHON work.py $IP:$PORT"
"""
)


class Bench:
    """Measures jobs on the simulated site."""

    def __init__(self, site: SimulatedSite) -> None:
        self._site = site
        self._python = site.environment()["SLURM_PYTHON"]
        self._count = 0

    def ours(self, nodes: int) -> float | None:
        """Measure RayLauncher."""
        site = PROJECT.load_site("musica")
        request = allocate(self._request(nodes), site, qos=CPU_PARTITION).request
        launcher = RayLauncher(
            ray_start_args=["--include-dashboard=false"], object_store_memory="200M", collect_logs=False
        )
        script = render_job_script(
            request,
            site.model_copy(update={"setup_commands": ("date +%s.%N >began",)}),
            job_name="ours",
            about={},
            environment={"PYTHON": self._python},
            body=launcher.with_site(site.launchers).render(request, ["../work.py"]),
        )
        return self._measure(nodes, {"job.sh": script, **launcher.files(request)})

    def script(self, text: str) -> Callable[[int], float | None]:
        """Return what measures a batch script."""

        def measure(nodes: int) -> float | None:
            options = [f"--partition={CPU_PARTITION}", f"--qos={CPU_PARTITION}", f"--nodes={nodes}", "--time=5"]
            options += ["--ntasks-per-node=1", "--threads-per-core=1"]
            head = "".join(f"#SBATCH {each}\n" for each in (*options, f"--cpus-per-task={CPUS}", "--mem=3G"))
            filled = text.replace("ARGUMENTS", ARGUMENTS).replace("NODES", str(nodes)).replace("CPUS", str(CPUS))
            python = shlex.quote(self._python)
            variables = f"export PYTHON={python} BIN={shlex.quote(str(Path(self._python).parent))}\n"
            return self._measure(nodes, {"job.sh": f"#!/bin/bash\n#ASC --vanilla\n{head}{variables}{filled}"})

        return measure

    @staticmethod
    def _request(nodes: int) -> SlurmRequest:
        return SlurmRequest(nodes=nodes, cpus_per_task=CPUS, mem="3G", time_limit="5")

    def _measure(self, nodes: int, files: dict[str, str]) -> float | None:
        """Return the seconds from the job's start to the first task on its last node; None if the job failed."""
        self._count += 1
        folder = self._site.layout.home / CERTIFICATE_USER.name / f"bench-{self._count}"
        files = {**files, "work.py": FIRST_TASKS.replace("NODES", str(nodes))}
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        inside = f"{CERTIFICATE_USER.home}/{folder.name}"
        self._site.run_on_node("login01", f"chown -R {CERTIFICATE_USER.name} {inside}")
        done = self._site.run_on_login(CERTIFICATE_USER, f"cd {inside} && sbatch --parsable job.sh")
        job = int(next(line for line in done.stdout.splitlines() if line.isdecimal()))
        first = folder / "first-tasks"
        with suppress(SiteError):  # a job that takes too long counts as failed
            wait_until(lambda: first.exists() or self._site.job_state(job) in OVER, f"job {job}", SECONDS)
        with suppress(SiteError):  # it is over
            self._site.cluster.query("scancel", "--full", "--signal=KILL", str(job))
        wait_until(lambda: self._site.job_state(job) in OVER, f"the end of job {job}", 60)
        self._site.clean_machines()
        return float(first.read_text()) - float((folder / "began").read_text()) if first.exists() else None


def main() -> None:
    """Measure, and print the table; exit with 1 if a job failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of all ways (default: 3)")
    rounds = parser.parse_args().rounds
    SimulatedSite.down(SITE_NAME)
    bench = Bench(SimulatedSite.up(SITE_NAME, install=True))
    ways = {
        "ours": bench.ours,
        "bare": bench.script(BARE),
        "documented": bench.script(DOCUMENTED),
        "symmetric": bench.script(SYMMETRIC),
    }
    times: dict[tuple[str, int], list[float | None]] = {(way, size): [] for way in ways for size in SIZES}
    try:
        for number in range(rounds):
            for size in SIZES:
                for way, measure in ways.items():
                    times[way, size].append(measure(size))
                    print(f"{time.strftime('%H:%M:%S')} round {number + 1}: {way}, {size}: {times[way, size][-1]}")
    finally:
        SimulatedSite.down(SITE_NAME)
    table = Table("nodes", *ways, "ours / bare", "ours / best of the others")
    for size in SIZES:
        medians = {way: median(times[way, size]) for way in ways}
        others = [value for way in ("documented", "symmetric") if (value := medians[way])]
        ours, bare = medians["ours"], medians["bare"]
        ratios = [f"{ours / floor:.2f}" if ours and floor else "-" for floor in (bare, min(others, default=None))]
        table.add_row(str(size), *(describe(times[way, size]) for way in ways), *ratios)
    Console().print(table)
    raise SystemExit(any(None in found for found in times.values()))


def median(times: list[float | None]) -> float | None:
    """Return the median of the jobs that did not fail."""
    found = [value for value in times if value is not None]
    return statistics.median(found) if found else None


def describe(times: list[float | None]) -> str:
    """Return the median, and how many jobs failed."""
    failed, middle = times.count(None), median(times)
    return (f"{middle:.1f} s" if middle else "-") + (f", {failed} of {len(times)} failed" if failed else "")


if __name__ == "__main__":
    main()
