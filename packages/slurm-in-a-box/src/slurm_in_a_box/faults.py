"""Inject faults into a site, and repair them.

A fault that lasts is a context manager: `with site.faults.node_off("n4001"): ...` injects it; on leaving, it repairs it
and waits until the site is healthy again. A fault that is an event (`cancel_job`, `drop_connections`) is a plain
method. `repair_all()` repairs every fault, also those that another process has injected.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

from .authentik import Disturbance
from .errors import SiteError
from .layout import COMPUTE_NODES, CONTROLLER, DATABASE, LOGIN_NODES
from .machines import Machine
from .relay import Settings
from .slurm_configuration import ADMIN_QOS
from .waiting import wait_until

if TYPE_CHECKING:
    from .site import SimulatedSite

SbatchFault = Literal["error-before", "error-after", "silent-after", "slow"]


@dataclass(frozen=True)
class Fault:
    """A fault that lasts until it is repaired.

    Attributes:
        inject: starts it, and returns when it is in force.
        repair: ends it, and returns when the site is healthy again.
    """

    inject: Callable[[], None]
    repair: Callable[[], None]

    def __enter__(self) -> None:
        self.inject()

    def __exit__(self, *_: object) -> None:
        self.repair()


class Faults:
    """The faults of one site."""

    def __init__(self, site: "SimulatedSite") -> None:
        self._site = site
        self._sbatch_fault = site.layout.run / "sbatch-fault"

    # Machines and network

    def node_off(self, node: str) -> Fault:
        """Switch a compute or login node off: all its processes die. Its jobs end as NODE_FAIL, or are requeued."""
        return Fault(self._machine(node).stop, lambda: self._bring_back(node))

    def node_cut(self, node: str) -> Fault:
        """Unplug a node's network cable: its processes keep running."""
        return Fault(self._machine(node).unplug, lambda: self._reconnect(node))

    def node_down(self, node: str) -> Fault:
        """Have an administrator take a compute node out of service: its jobs end at once, as when it fails.

        The node stays out of service until the fault is ended.
        """
        return Fault(lambda: self._take_down(self._machine(node)), lambda: self._reconnect(node))

    # Slurm

    def controller_down(self) -> Fault:
        """Stop slurmctld: squeue and sbatch cannot reach it, jobs run on, sacct answers."""
        controller = self._site.cluster.controller
        return Fault(controller.stop, controller.start)

    def accounting_off(self) -> Fault:
        """Stop slurmdbd: sacct fails, and slurmctld keeps its records until slurmdbd is back."""
        return Fault(self._site.cluster.accounting.stop, self._repair_accounting)

    def accounting_lagging(self) -> Fault:
        """Hold back slurmctld's records from slurmdbd: sacct answers, but with old data."""
        return Fault(self._delay_accounting, self._repair_accounting)

    def sbatch(self, kind: SbatchFault) -> Fault:
        """Disturb sbatch as users call it.

        Args:
            kind: `error-before` submits nothing and fails; `error-after` submits, and fails all the same;
                `silent-after` submits and never answers; `slow` takes two seconds longer.
        """
        if kind not in get_args(SbatchFault):
            raise SiteError(f"no such fault of sbatch: {kind}; there are {', '.join(get_args(SbatchFault))}")
        return Fault(lambda: self._disturb_sbatch(kind), lambda: self._sbatch_fault.unlink(missing_ok=True))

    def cancel_job(self, job: int) -> None:
        """Cancel a job as an administrator does: it ends as `CANCELLED by 0`."""
        self._site.cluster.query("scancel", str(job))

    def requeue_job(self, job: int) -> None:
        """Requeue a running job: it ends here and runs again under the same id some ten seconds later."""
        self._site.cluster.query("scontrol", "requeue", str(job))

    def preemption(self, job: int) -> Fault:
        """Have an administrator's job take the nodes of a running job, which is requeued (sacct: PREEMPTED)."""
        return Fault(lambda: self._preempt(job), self._end_preemption)

    # The way to the login nodes

    def ssh_refused(self) -> Fault:
        """Refuse new connections; sessions that are open stay."""
        return self._login_fault(refuse=True)

    def login_frozen(self) -> Fault:
        """Stop all traffic without closing any connection; new connections hang, too."""
        return self._login_fault(frozen=True)

    def login_slow(self, delay: float = 0.0, bandwidth: float = 0.0) -> Fault:
        """Delay all traffic, and limit its bandwidth.

        Args:
            delay: seconds of delay in each direction.
            bandwidth: bytes per second in each direction, of all connections together; 0 for no limit.
        """
        return self._login_fault(delay=delay, bandwidth=bandwidth)

    def drop_connections(self, after_bytes: int = 0) -> None:
        """Reset every SSH connection once: now, or after the login nodes have sent that many more bytes."""
        self._site.login.relay.send(**({"drop_after": after_bytes} if after_bytes else {"drop": True}))

    def disk_full(self) -> Fault:
        """Leave no free space in the file system of the homes, where deployment folders are, too."""
        return Fault(self._fill_home, self._site.storage.limit_home)

    def no_more_files(self) -> Fault:
        """Use up the quota of files of the homes, though there is free space."""
        return Fault(self._use_up_files, self._site.storage.limit_home)

    # Credentials

    def certificate_authority_down(self) -> Fault:
        """Stop step-ca."""
        daemon = self._site.certificate_authority.daemon
        return Fault(daemon.stop, daemon.start)

    def authentik_down(self) -> Fault:
        """Stop authentik's stand-in. It keeps its users and tokens."""
        daemon = self._site.identity_provider.daemon
        return Fault(daemon.stop, daemon.start)

    def authentik_disturbed(self, disturbance: Disturbance) -> Fault:
        """Disturb authentik's answers: slow, late, 5xx, lost; see Disturbance. Repairing it ends all disturbances."""
        return Fault(lambda: self._site.authentik.disturb(disturbance), self._site.authentik.clear_disturbances)

    # Repairing

    def repair_all(self) -> None:
        """Repair every fault, whichever process injected it, and wait until all parts of the site serve."""
        site = self._site
        self._sbatch_fault.unlink(missing_ok=True)
        site.storage.limit_home()
        self._let_accounting_through()
        for machine in site.machines.values():
            if machine.running:
                machine.plug()
        site.identity_provider.daemon.start()
        site.authentik.clear_disturbances()  # before step-ca starts, which would not without its issuer
        site.start()
        site.login.relay.repair()
        for hostname in site.cluster.out_of_service():
            self._reconnect(hostname)

    def _machine(self, node: str) -> Machine:
        nodes = [each.hostname for each in (*LOGIN_NODES, *COMPUTE_NODES)]
        if node not in nodes:
            raise SiteError(f"no such node: {node}; there are {', '.join(nodes)}")
        return self._site.machines[node]

    def _bring_back(self, node: str) -> None:
        """Switch a node on, and start its daemons."""
        machine = self._site.machines[node]
        machine.start()
        for daemon in self._site.daemons():
            if daemon.machine is machine:
                daemon.start()

    def _take_down(self, machine: Machine) -> None:
        self._site.cluster.query("scontrol", "update", f"nodename={machine.hostname}", "state=down", "reason=fault")

    def _reconnect(self, node: str) -> None:
        """Plug a node in, put it back into service, and restart its slurmd.

        A restarted slurmd registers at once; slurmctld would contact the node only after a minute or more.
        """
        self._site.machines[node].plug()
        if daemon := self._site.cluster.node_daemons.get(node):
            daemon.stop()
            resume = ["scontrol", "update", f"nodename={node}", "state=resume"]
            self._site.machines[CONTROLLER.hostname].run(resume, check=False)  # it fails where the node is in service
            daemon.start()

    def _repair_accounting(self) -> None:
        self._let_accounting_through()
        self._site.cluster.accounting.start()
        wait_until(self._accounting_is_current, "all records of slurmctld in the accounting", 90.0)

    def _delay_accounting(self) -> None:
        """Drop slurmctld's packets to slurmdbd, as if the line had gone dead, by a route of its machine."""
        self._site.machines[CONTROLLER.hostname].run(["ip", "route", "replace", "blackhole", self._database_address])

    def _let_accounting_through(self) -> None:
        route = ["ip", "route", "delete", "blackhole", self._database_address]
        self._site.machines[CONTROLLER.hostname].run(route, check=False)  # it fails where there is none

    @property
    def _database_address(self) -> str:
        return f"{self._site.machines[DATABASE.hostname].address}/32"

    def _accounting_is_current(self) -> bool:
        """Whether slurmctld has sent all of its records to slurmdbd."""
        return "DBD Agent queue size: 0" in self._site.cluster.query("sdiag")

    def _disturb_sbatch(self, kind: SbatchFault) -> None:
        self._sbatch_fault.write_text(kind, encoding="ascii")

    def _preempt(self, job: int) -> None:
        nodes = self._site.squeue("--noheader", f"--jobs={job}", "--format=%N %P").split()
        options = [f"--nodelist={nodes[0]}", f"--partition={nodes[1]}", f"--qos={ADMIN_QOS}", "--exclusive"]
        submit = [str(self._site.layout.state / "libexec/sbatch"), "--output=/dev/null", "--job-name=preemption"]
        self._site.cluster.query(*submit, *options, "--wrap", "exec sleep infinity")
        self._site.wait_for_job(job, "PENDING", timeout=90.0)

    def _end_preemption(self) -> None:
        self._site.cluster.query("scancel", "--name=preemption", "--user=root")
        wait_until(lambda: not self._site.squeue("--noheader", "--name=preemption"), "end of the preemption", 90.0)

    def _login_fault(self, **settings: object) -> Fault:
        """Return a fault that changes some settings of the relay, and resets only these."""
        relay, healthy = self._site.login.relay, asdict(Settings())

        def send(**values: object) -> None:
            relay.send(**values)

        return Fault(lambda: send(**settings), lambda: send(**{name: healthy[name] for name in settings}))

    def _fill_home(self) -> None:
        """Make the file system as small as what is on it: it is full then, and nothing has to be written."""
        state = os.statvfs(self._site.layout.home)
        self._site.storage.limit_home(size=str((state.f_blocks - state.f_bfree) * state.f_frsize))

    def _use_up_files(self) -> None:
        state = os.statvfs(self._site.layout.home)
        self._site.storage.limit_home(files=state.f_files - state.f_ffree)
