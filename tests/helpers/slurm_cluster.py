"""A real SLURM on this machine: one slurmctld and several virtual nodes, each with its own host name and processes.

    python -m tests.helpers.slurm_cluster up [--nodes 3] [--cpus 2]     # prints what to export
    python -m tests.helpers.slurm_cluster down

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge (tests/run.sh installs them where
LZN_DIST_INSTALL_SLURM=1). Everything is under one folder; nothing in /etc is written. A node is a slurmd in namespaces
of its own: killing the process that holds them is the loss of a machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(os.environ.get("LZN_DIST_SLURM", Path(tempfile.gettempdir()) / "lzn_dist-slurm"))
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")

CONFIGURATION = """\
ClusterName=lzn
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
FirstJobId={first_job}
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
ReturnToService=2
SlurmdTimeout=25
KillWait=20
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-{last_port}] CPUs={cpus} RealMemory=1000
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
# AuthInfo: a requeued job may start again after its old credentials have expired, 120 s by default.
# SlurmdTimeout: a busy machine's nodes are not taken for lost ones, which would start their jobs again.
# FirstJobId: numbers that come again after a fresh start would make submitit read an older job's result.

# submitit asks sacct for states; without an accounting database the controller answers
SACCT = """\
#!/bin/bash
ids=()
while [ $# -gt 0 ]; do [ "$1" = -j ] && { ids+=("$2"); shift; }; shift; done
echo 'JobID|State|NodeList'
for id in "${ids[@]}"; do squeue --noheader --states all --jobs "$id" --format '%i|%T|%N' 2>/dev/null; done
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"no SLURM on this machine ({', '.join(absent)} not installed)"
    return "" if os.geteuid() == 0 else "no SLURM on this machine that may be started: that needs root"


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


class Cluster:
    """The cluster in a folder, running or not."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        self.environment = {
            **os.environ, "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}:/usr/sbin:/sbin",
        }  # fmt: skip

    def call(self, *command: object, check: bool = True) -> str:
        """A command's output, with this cluster in its environment."""
        done = subprocess.run(
            [str(part) for part in command], env=self.environment, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    def up(self, nodes: int = 3, cpus: int = 2) -> Cluster:
        """Start it afresh; returns when all nodes are idle."""
        self.down()
        for name in ("bin", "state"):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        first = int(time.time()) % 600_000 * 100 + 1000
        text = CONFIGURATION.format(
            host=host, folder=self.folder, nodes=nodes, cpus=cpus, last_port=17000 + nodes, first_job=first
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "bin" / "sacct").write_text(SACCT)
        (self.folder / "bin" / "sacct").chmod(0o755)
        names = "".join(f"127.0.0.1 node{number}\n" for number in range(1, nodes + 1))
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        self._munge()
        self.call("slurmctld")
        for number in range(1, nodes + 1):
            self.start_node(number)
        self.wait_idle(nodes)
        return self

    def _munge(self) -> None:
        if subprocess.run("munge -n | unmunge", shell=True, capture_output=True).returncode == 0:
            return
        key = Path("/etc/munge/munge.key")
        if not key.is_file() or not key.stat().st_size:
            key.write_bytes(os.urandom(128))
            shutil.chown(key, "munge", "munge")
            key.chmod(0o400)
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        self.call("su", "-s", "/bin/sh", "munge", "-c", "/usr/sbin/munged --force")

    def start_node(self, number: int) -> None:
        """Bring up a virtual node."""
        (self.folder / f"spool-node{number}").mkdir(exist_ok=True)
        inside = f"hostname node{number}; mount --bind {self.folder}/hosts /etc/hosts; slurmd -D -N node{number}; exit"
        with (self.folder / f"node{number}.out").open("a") as output:
            process = subprocess.Popen(
                ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", inside],
                env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        (self.folder / f"node{number}.pid").write_text(str(process.pid))

    def kill_node(self, number: int) -> None:
        """A machine is gone, with all that ran on it."""
        os.kill(int((self.folder / f"node{number}.pid").read_text()), signal.SIGKILL)

    def wait_idle(self, nodes: int, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.call("sinfo", "--noheader", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False)
            if len(found.split()) == nodes:
                return
            time.sleep(0.1)
        raise TimeoutError(self.call("sinfo", check=False) + (self.folder / "slurmctld.log").read_text()[-2000:])

    def state(self, job: str) -> str:
        """A job's state, RUNNING say."""
        return self.call(
            "squeue", "--noheader", "--states", "all", "--jobs", job, "--format", "%T", check=False
        ).strip()

    def down(self) -> None:
        """Stop all of it and wipe its folder."""
        for path in [*self.folder.glob("node*.pid"), self.folder / "slurmctld.pid"]:
            try:
                pid = int(path.read_text())
            except (OSError, ValueError):
                continue
            # a number may have gone to somebody else since
            name = Path(f"/proc/{pid}/comm").read_text().strip() if _alive(pid) else ""
            if name not in ("unshare", "slurmctld"):
                continue
            os.kill(pid, signal.SIGKILL if name == "unshare" else signal.SIGTERM)
            end = time.monotonic() + 10
            while _alive(pid) and time.monotonic() < end:
                time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=2)
    given = parser.parse_args()
    if why := missing():
        print(f"error: {why}", file=sys.stderr)
        return 2
    cluster = Cluster()
    if given.action == "down":
        cluster.down()
        return 0
    cluster.up(given.nodes, given.cpus)
    print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']} PATH={json.dumps(cluster.environment['PATH'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
