"""A real Slurm of several nodes on one Linux machine, of whose own services and settings it touches none.

A node is a set of Linux namespaces (network, host name, mounts, processes) with a name, an address and /etc/hosts of
its own, joined to the others by a bridge inside of a "login" namespace, where slurmctld and munged run. All processes
are nested in that one's, so killing a single process ends every daemon and every job; the kernel does so by itself
when this Python is killed. Nodes have pretended GPUs and more cores than there are.

Needs root, util-linux, iproute2 and the packages of `PACKAGES`. Three nodes are up within a second or two.

    python -m tests.slurm.cluster --nodes 3 -- sinfo       # or without a command, for a shell
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
TOOLS = ["munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "unshare", "nsenter", "setpriv", "ip"]
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"])
NAMESPACES = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}
NET = "10.231.0"

INIT = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
print("up", flush=True)
while True:
    try:
        os.waitpid(-1, 0)  # a process that loses its parent becomes a child of this process
    except ChildProcessError:
        signal.sigwait([signal.SIGCHLD])
"""

CONF = """
ClusterName=mini
SlurmctldHost=login({net}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket
CredType=cred/munge
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# the cores and memory below count, not what slurmd finds
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
EnforcePartLimits=ALL
JobRequeue=1
# a node that was set down by hand stays down
ReturnToService=1
KillWait=5
MessageTimeout=10
SlurmctldTimeout=30
SlurmdTimeout=20
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmdSpoolDir={dir}/spool/%n
StateSaveLocation={dir}/state
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=spot Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Programs that are not installed."""
    return [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]


def why_not() -> str:
    """Why no cluster can be started here; empty if one can."""
    if not sys.platform.startswith("linux"):
        return "Slurm needs Linux"
    if tools := missing():
        return f"not installed: {', '.join(tools)} (apt-get install --no-install-recommends {PACKAGES})"
    if os.geteuid() != 0:
        return "only root can make the nodes' namespaces"
    probe = [*NAMESPACES, "ip", "link", "add", "probe0", "type", "veth", "peer", "name", "probe1"]
    tried = subprocess.run(probe, capture_output=True, text=True, env={"PATH": PATH})
    return f"namespaces or links between them cannot be made: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass
class Box:
    """A set of namespaces, alive for as long as its first process."""

    name: str
    outer: subprocess.Popen
    """`unshare`, outside of the namespaces."""
    init: int
    """The first process inside, by its number outside."""

    def enter(self, *command: str, folder: Path | str = "/") -> list[str]:
        """What runs ``command`` inside."""
        return ["nsenter", "-t", str(self.init), "--net", "--uts", "--mount", "--pid", f"--wd={folder}", *command]

    def kill(self) -> None:
        """Everything inside is gone on return, as if the power had failed."""
        if self.outer.poll() is None:
            os.kill(self.init, signal.SIGKILL)
        reap(self.outer)


def reap(process: subprocess.Popen) -> None:
    """Wait for the end of what was killed, or of what it was about to end with."""
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)


def only_child(pid: int) -> int:
    """The number of the one process that ``pid`` has started."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


class Cluster:
    """``with Cluster(nodes=3) as slurm: slurm.wait(slurm.sbatch("job.sh"))``."""

    def __init__(self, nodes: int = 3, cpus: int = 64, gpus: int = 8):
        self.nodes = {f"node{number}": f"{NET}.{number}" for number in range(1, nodes + 1)}
        self.cpus, self.gpus = cpus, gpus
        self.dir = Path(tempfile.mkdtemp(prefix="slurm-"))  # not in pytest's: a socket's path has 107 characters
        self.login: Box | None = None
        self.boxes: dict[str, Box] = {}
        self.daemons: dict[str, subprocess.Popen] = {}

    # ---- start and end

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *why: object) -> None:
        self.stop()

    def _start(self) -> None:
        self._configure()
        munge = self.dir / "munge"
        subprocess.run(["mungekey", "--create", f"--keyfile={munge}/key"], check=True, env=self.environment())
        self.login = self._box("login", f"{NET}.254")
        own = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", self.login, "--foreground", *(f"--{name}={munge}/{file}" for name, file in own.items()))
        self.until(lambda: (munge / "socket").exists(), "munged's socket")
        self._daemon("slurmctld", self.login, "-D", "-i")
        self.until(lambda: self.run("scontrol", "ping").returncode == 0, "slurmctld")
        for name in self.nodes:
            self.start_node(name)
        self.wait_until_idle()

    def stop(self) -> None:
        """End every process of the cluster; the logs stay."""
        if self.login:
            self.login.kill()
        for process in (*(box.outer for box in self.boxes.values()), *self.daemons.values()):
            reap(process)
        self.login = None
        self.boxes.clear()
        self.daemons.clear()

    def _configure(self) -> None:
        for folder in ("munge", "state", "spool", "log", "dev"):
            (self.dir / folder).mkdir()
        self.dir.chmod(0o755)
        (self.dir / "munge").chmod(0o711)
        for number in range(self.gpus):  # Slurm takes none but devices; these are /dev/null
            os.mknod(self.dir / "dev" / f"gpu{number}", 0o20666, os.makedev(1, 3))
        size = f"CPUs={self.cpus} RealMemory=4000 Gres=gpu:{self.gpus} State=UNKNOWN"
        nodes = "\n".join(f"NodeName={name} NodeAddr={address} {size}" for name, address in self.nodes.items())
        hosts = [f"127.0.0.1 localhost\n{NET}.254 login", *(f"{at} {name}" for name, at in self.nodes.items())]
        # slurmd wants to load a cgroup plugin, though nothing uses one; where there is no such file system, that which
        # it finds by itself ends it. Old ones do not know "disabled", but cgroup/v1 touches nothing before it is used.
        version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, env=self.environment()).stdout
        old = tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (24, 5)
        for name, text in {
            "slurm.conf": CONF.format(dir=self.dir, net=NET, nodes=nodes),
            "gres.conf": f"Name=gpu File={self.dir}/dev/gpu[0-{self.gpus - 1}]",
            "cgroup.conf": f"CgroupPlugin={'cgroup/v1' if old else 'disabled'}",
            "hosts": "\n".join(hosts),
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files",  # no question leaves a node
        }.items():
            (self.dir / name).write_text(f"{text}\n")

    def environment(self) -> dict[str, str]:
        """That of a user of this cluster, who is in no job yet."""
        alien = ("SLURM", "SBATCH", "SALLOC", "SQUEUE", "SRUN", "MEGAMASK")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(alien)}
        return kept | {"SLURM_CONF": f"{self.dir}/slurm.conf", "PATH": PATH}

    def _box(self, name: str, address: str, parent: Box | None = None) -> Box:
        new = [*NAMESPACES, sys.executable, "-S", "-E", "-c", INIT]
        command = parent.enter(*new) if parent else ["setpriv", "--pdeathsig", "KILL", *new]
        with (self.dir / "log" / f"{name}.box").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=self.environment(),
                start_new_session=True,
            )  # fmt: skip
        assert process.stdout
        if process.stdout.readline() != b"up\n":
            reap(process)
            raise RuntimeError(f"{name} did not start: {Path(log.name).read_text()}")
        # nsenter starts a process of its own
        box = Box(name, process, only_child(only_child(process.pid) if parent else process.pid))
        try:
            self._furnish(box, address, parent)
        except BaseException:
            box.kill()
            raise
        return box

    def _furnish(self, box: Box, address: str, parent: Box | None) -> None:
        mounts = [f"mount --bind {self.dir}/{file} /etc/{file}" for file in ("hosts", "nsswitch.conf")]
        self._shell(box, f"echo {box.name} > /proc/sys/kernel/hostname", "ip link set lo up", *mounts,
                    "mount -t tmpfs tmpfs /dev/shm")  # fmt: skip
        if not parent:
            self._shell(box, "ip link add br0 type bridge", f"ip addr add {address}/24 dev br0", "ip link set br0 up")
            return
        numbers = re.search(r"NSpid:\s+(.*)", Path(f"/proc/{box.init}/status").read_text())
        assert numbers
        link, seen_from_login = f"v{box.name}", numbers[1].split()[-2]
        self._shell(parent, f"ip link add {link} type veth peer name eth0 netns {seen_from_login}",
                    f"ip link set {link} master br0", f"ip link set {link} up")  # fmt: skip
        self._shell(box, f"ip addr add {address}/24 dev eth0", "ip link set eth0 up")

    def _shell(self, box: Box, *lines: str) -> None:
        command = box.enter("sh", "-ec", "\n".join(lines))
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment())
        if done.returncode:
            raise RuntimeError(f"{box.name}: {lines}: {done.stdout}{done.stderr}")

    def _daemon(self, name: str, box: Box, *arguments: str) -> None:
        command = box.enter(name.split("-")[0], *arguments, folder=self.dir)
        with (self.dir / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment(),
                start_new_session=True,
            )  # fmt: skip

    # ---- nodes

    def start_node(self, name: str) -> None:
        """Bring a node up, for the first time or after a crash."""
        assert self.login
        self.boxes[name] = self._box(name, self.nodes[name], self.login)
        self._daemon(f"slurmd-{name}", self.boxes[name], "-D", "-N", name)

    def crash_node(self, name: str) -> None:
        """Cut a node's power, and let Slurm know, which would find out by itself after a while."""
        self.boxes.pop(name).kill()
        reap(self.daemons.pop(f"slurmd-{name}"))
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=crashed", check=True)

    def repair_node(self, name: str) -> None:
        """Bring a crashed node back; by itself Slurm leaves down what it was told is down."""
        log = self.dir / "log" / f"slurmd-{name}.log"
        before = log.read_text().count("slurmd started")
        self.start_node(name)
        self.until(lambda: log.read_text().count("slurmd started") > before, f"slurmd on {name}")
        self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=True)

    def node_states(self) -> dict[str, str]:
        """Name -> state."""
        output = self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %T").stdout
        return {words[0]: words[1] for words in (line.split() for line in output.splitlines()) if len(words) == 2}

    def wait_until_idle(self) -> None:
        """No node has anything to do."""
        self.until(lambda: set(self.node_states().values()) == {"idle"}, "idle nodes", lambda: str(self.node_states()))

    def clean(self) -> None:
        """Back to an idle cluster without jobs, all nodes up."""
        for name in self.nodes:
            if name not in self.boxes:
                self.start_node(name)
        self.run("scancel", "--state=PENDING", "--user=root")
        self.run("scancel", "--full", "--signal=KILL", "--user=root")
        self.run("scancel", "--user=root")
        for name, state in self.node_states().items():
            if state.startswith(("down", "drain", "fail")):
                self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        self.wait_until_idle()

    # ---- jobs

    def run(
        self, *command: str, node: str = "", env: dict[str, str] | None = None, folder: Path | str = "/",
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a command on the login node or on ``node``, as a user would."""
        box = self.boxes[node] if node else self.login
        assert box
        inside = box.enter(*command, folder=folder)
        done = subprocess.run(inside, capture_output=True, text=True, timeout=120, env=self.environment() | (env or {}))
        if check and done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def sbatch(self, *arguments: str, env: dict[str, str] | None = None, folder: Path | str = "/") -> str:
        """Submit; returns the job's number."""
        done = self.run("sbatch", "--parsable", *arguments, env=env, folder=folder, check=True)
        return done.stdout.split(";")[0].split()[-1]

    def job(self, number: str) -> dict[str, str]:
        """All that Slurm knows of a job."""
        return dict(
            re.findall(r"(?:^|\s)([A-Za-z/:]+)=(\S*)", self.run("scontrol", "-o", "show", "job", number).stdout)
        )

    def state(self, number: str) -> str:
        """PENDING, RUNNING, COMPLETED ..."""
        return self.job(number).get("JobState", "UNKNOWN")

    def wait(self, number: str, states: set[str] = ENDED) -> str:
        """The state of the job, when it is one of ``states``."""
        self.until(lambda: self.state(number) in states, f"job {number}: {states}", lambda: str(self.job(number)))
        return self.state(number)

    def expire(self, number: str, seconds: int) -> None:
        """Let a running job's time limit come in so many seconds. Slurm looks at its clock twice a minute."""
        end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
        self.run("scontrol", "update", f"JobId={number}", f"EndTime={end}", check=True)

    def restart(self, number: str) -> None:
        """Start a job that was requeued, which Slurm would hold back for two minutes."""

        def clean() -> bool:
            job, states = self.job(number), self.node_states().values()
            waits = job.get("JobState") == "PENDING" and job.get("Reason") in ("BeginTime", "Resources", "Priority")
            return waits and not any(state.startswith(("alloc", "mix", "comp")) for state in states)

        self.until(clean, f"job {number} to be requeued", lambda: str(self.job(number)))
        # leave to start a step is dated by the second, and none of the second in which the old was taken back is good
        time.sleep(1 - time.time() % 1)
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now", check=True)

    def until(
        self, happens: Callable[[], bool], what: str, more: Callable[[], str] = lambda: "", seconds: float = 300
    ) -> None:
        """Wait; TimeoutError with ``more`` if it takes too long or a daemon has died.

        Looks the more seldom the longer it takes, for a look may cost more than what is waited for.
        """
        begin = time.monotonic()
        while not happens():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            waited = time.monotonic() - begin
            if dead or waited > seconds:
                raise TimeoutError(f"waited for {what}; daemons that ended: {dead}\n{more()}\n{self.logs()}")
            time.sleep(min(max(0.05, waited / 20), 0.5))

    def logs(self, lines: int = 15) -> str:
        """The ends of all logs."""
        logs_found = sorted((self.dir / "log").iterdir())
        return "\n".join(f"== {log.name}\n" + "\n".join(log.read_text().splitlines()[-lines:]) for log in logs_found)


def main() -> int:
    parser = argparse.ArgumentParser(description="Start a cluster, run a command on its login node, stop it.")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 77
    with Cluster(options.nodes) as slurm:
        print(f"{options.nodes} nodes are up; {slurm.dir}", file=sys.stderr, flush=True)
        command = options.command[options.command[:1] == ["--"] :] or ["bash"]
        assert slurm.login
        inside = slurm.login.enter(*command, folder=os.getcwd())
        code = subprocess.run(inside, env=slurm.environment()).returncode
    shutil.rmtree(slurm.dir)
    return code


if __name__ == "__main__":
    sys.exit(main())
