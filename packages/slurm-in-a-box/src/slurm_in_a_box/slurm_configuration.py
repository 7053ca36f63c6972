"""The site's Slurm configuration: files as text; MUSICA's QoS and projects as sacctmgr commands. No side effects."""

from .layout import (
    CERTIFICATE_USER,
    CLUSTER_NAME,
    CONTROLLER,
    CPU_NODES,
    CPU_PARTITION,
    DATABASE,
    GPU_NODES,
    GPU_PARTITION,
    USERS,
    Layout,
    MachineName,
)

ACCOUNT = "p71234"
"""The default project of every user."""
SECOND_ACCOUNT = "p75678"
"""Another project of CERTIFICATE_USER."""
SPENT_ACCOUNT = "p70001"
"""A project of CERTIFICATE_USER without budget: Slurm accepts its jobs in the `idle_*` QoS only."""
LIMITED_ACCOUNT, LIMITED_GPU_MINUTES = "p70600", 600
"""A project of CERTIFICATE_USER whose jobs may use so many GPU-minutes (10 GPU-hours), by Slurm's GrpTRESMins."""
ADMIN_QOS = "admin"
"""QoS of root alone: its jobs take the nodes of every other job, in every partition (fault "preemption")."""

_ACCOUNTS = (ACCOUNT, SECOND_ACCOUNT, SPENT_ACCOUNT, LIMITED_ACCOUNT)
_QOS_CLASSES = {
    # docs/simulated-site.md says what is known of the real ones.
    "": "Priority=100 MaxWall=3-00:00:00",
    "dev_": "Priority=200 MaxWall=00:10:00 MaxTRESPerUser=node=2",
    "idle_": "Priority=0 MaxWall=3-00:00:00",
    "fast_": "Priority=300 MaxWall=3-00:00:00",
    "long_": "Priority=50 MaxWall=10-00:00:00",
}


def qos_names(partition: str) -> list[str]:
    """Names of the QoS that jobs of users may have in a partition."""
    return [prefix + partition for prefix in _QOS_CLASSES]


def slurm_conf(layout: Layout, with_cgroups: bool) -> str:
    """Text of slurm.conf(5).

    Args:
        with_cgroups: enforce memory and track processes with cgroups (version 1).
    """
    run = layout.run
    nodes = "\n".join(
        f"NodeName={node.hostname} NodeAddr={layout.address(node.number)} Boards=1 SocketsPerBoard=8"
        f" CoresPerSocket=24 ThreadsPerCore=2 RealMemory=768000 {own} State=UNKNOWN"
        for group, own in ((CPU_NODES, "CoreSpecCount=2"), (GPU_NODES, "CoreSpecCount=16 Gres=gpu:h100:4"))
        for node in group
    )
    partitions = "\n".join(
        f"PartitionName={partition} Nodes={_hostnames(group)} MaxTime=UNLIMITED DefaultTime=01:00:00"
        f" AllowQos={','.join([*qos_names(partition), ADMIN_QOS])}"
        for partition, group in ((CPU_PARTITION, CPU_NODES), (GPU_PARTITION, GPU_NODES))
    )
    return f"""\
ClusterName={CLUSTER_NAME}
SlurmctldHost={CONTROLLER.hostname}({layout.address(CONTROLLER.number)})
SlurmUser=slurm
AuthType=auth/munge
# A requeued job waits for as long as a credential may live, by default two minutes.
AuthInfo=cred_expire=10
CredType=cred/munge
StateSaveLocation={run}/slurmctld
SlurmdSpoolDir={run}/slurmd/%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd/%n.pid
SlurmctldLogFile={layout.log}/slurmctld.log
SlurmdLogFile={layout.log}/slurmd-%n.log
# 192 claimed cores on the few of this machine: no affinity.
SlurmdParameters=config_overrides
ProctrackType=proctrack/{"cgroup" if with_cgroups else "linuxproc"}
TaskPlugin=task/{"cgroup" if with_cgroups else "none"}
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=2000
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=3,sched_interval=3,batch_sched_delay=1,default_queue_depth=1000,bf_max_job_test=2000
PriorityType=priority/multifactor
PriorityWeightQOS=10000
PriorityWeightAge=1000
PreemptType=preempt/qos
PreemptMode=REQUEUE
JobRequeue=1
Epilog={layout.epilog}
# Short, so that faults show soon; but a program that saves its state on a busy machine needs more than a moment.
SlurmdTimeout=20
SlurmctldTimeout=10
MessageTimeout=10
KillWait=15
InactiveLimit=0
MinJobAge=300
# A node that did not respond returns when its slurmd registers; one that an administrator took down does not.
ReturnToService=1
JobSubmitPlugins=lua
# Wrong and over-long requests are refused at submission, not left pending.
EnforcePartLimits=ALL
MaxJobCount=20000
MaxArraySize=10001
PropagateResourceLimitsExcept=MEMLOCK
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={DATABASE.hostname}
AccountingStorageTRES=gres/gpu,gres/gpu:h100
AccountingStorageEnforce=associations,limits,qos
AccountingStoreFlags=job_script,job_comment
{nodes}
{partitions}
"""


def gres_conf(layout: Layout) -> str:
    """Text of gres.conf(5): four character devices stand for the GPUs of a node. A bare Count drains the node."""
    return f"AutoDetect=off\nNodeName={_hostnames(GPU_NODES)} Name=gpu Type=h100 File={layout.run}/gpus/nvidia[0-3]\n"


def cgroup_conf() -> str:
    """Text of cgroup.conf(5): memory alone is enforced."""
    return """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainRAMSpace=yes
ConstrainSwapSpace=no
ConstrainCores=no
ConstrainDevices=no
"""


def slurmdbd_conf(layout: Layout) -> str:
    """Text of slurmdbd.conf(5). The database listens on a socket of its machine only and trusts the account `slurm`."""
    return f"""\
AuthType=auth/munge
DbdHost={DATABASE.hostname}
DbdAddr={layout.address(DATABASE.number)}
SlurmUser=slurm
LogFile={layout.log}/slurmdbd.log
PidFile={layout.run}/slurmdbd.pid
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StorageLoc=slurm_acct_db
"""


def database_conf(layout: Layout) -> str:
    """Text of the option file of mariadbd: no network, little memory."""
    return f"""\
[mysqld]
datadir={layout.run}/database
tmpdir={layout.run}/database-tmp
socket=/run/mysqld/mysqld.sock
pid-file=/run/mysqld/mysqld.pid
user=mysql
skip-networking
performance_schema=off
innodb_buffer_pool_size=64M
innodb_log_file_size=16M
innodb_lock_wait_timeout=900
innodb_flush_log_at_trx_commit=0
"""


def accounting_commands() -> list[list[str]]:
    """Arguments of the sacctmgr(1) calls that make the cluster, the QoS, the projects and their users, in this order.

    The default QoS of every user is `normal`, which no partition allows: a job without `--qos` is refused.
    """
    commands = [["add", "cluster", CLUSTER_NAME]]
    for partition in (CPU_PARTITION, GPU_PARTITION):
        for prefix, rules in _QOS_CLASSES.items():
            commands.append(["add", "qos", prefix + partition, "set", "Flags=DenyOnLimit", *rules.split()])
        commands.append(["modify", "qos", partition, "set", f"Preempt=idle_{partition}"])
    users_qos = [*qos_names(CPU_PARTITION), *qos_names(GPU_PARTITION)]
    commands += [
        ["add", "qos", ADMIN_QOS, "set", "Priority=1000", f"Preempt={','.join(users_qos)}"],
        ["modify", "user", "root", "set", f"QOS+={ADMIN_QOS}"],
        ["add", "account", ",".join(_ACCOUNTS), "Description=test", "Organization=test"],
    ]
    everything = [f"QOS=normal,{','.join(users_qos)}", "DefaultQOS=normal"]
    commands += [["add", "user", user.name, f"Account={ACCOUNT}", *everything] for user in USERS]
    idle = f"QOS={','.join(name for name in users_qos if name.startswith('idle_'))}"
    commands += [
        *(
            ["add", "user", CERTIFICATE_USER.name, f"Account={own}", *everything]
            for own in (SECOND_ACCOUNT, LIMITED_ACCOUNT)
        ),
        ["add", "user", CERTIFICATE_USER.name, f"Account={SPENT_ACCOUNT}", idle],
    ]
    return commands


def gpu_accounting_commands() -> list[list[str]]:
    """Arguments of the sacctmgr(1) calls that name GPUs, which slurmctld tells slurmdbd of when it first starts.

    A job in the GPU partition that asks for no GPU is refused.
    """
    limit = ["modify", "account", LIMITED_ACCOUNT, "set", f"GrpTRESMins=gres/gpu={LIMITED_GPU_MINUTES}"]
    return [limit, *(["modify", "qos", name, "set", "MinTRESPerJob=gres/gpu=1"] for name in qos_names(GPU_PARTITION))]


def _hostnames(group: tuple[MachineName, ...]) -> str:
    return ",".join(machine.hostname for machine in group)
