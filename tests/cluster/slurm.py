"""A real SLURM on this machine: munged, slurmctld and slurmd below a temporary folder.

    apt-get install -y slurm-wlm munge                       # Debian and Ubuntu, once
    python -m tests.cluster.slurm sinfo                      # any command, in a cluster of one node
    python -m tests.cluster.slurm bash                       # or several

Needs root, because slurmd starts tasks as their users. Nothing outside the folder is written: no
system service, no cgroup, no configuration in /etc. When the command ends, so does the cluster.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo", "srun")

CONFIG = """\
ClusterName=one_machine
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=60
MinJobAge=600
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why SLURM cannot be started here; empty if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install -y slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def search_path() -> str:
    """PATH with the folders of daemons, which a user's may lack."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


@contextlib.contextmanager
def slurm(cpus: int = 2) -> Iterator[dict[str, str]]:
    """A cluster of one node, as long as it is needed.

    Args:
        cpus: that the node is said to have.

    Yields:
        The environment in which SLURM's commands talk to it.

    Raises:
        RuntimeError: a daemon does not start; with the end of its log.
    """
    with contextlib.ExitStack() as stack:
        # Not one of pytest's: munge wants a folder that all may enter.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm_")))
        folder.chmod(0o755)
        yield stack.enter_context(running(folder, cpus))


@contextlib.contextmanager
def running(folder: Path, cpus: int) -> Iterator[dict[str, str]]:
    """The cluster, in an empty folder."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    ports = dict(zip(("controller_port", "node_port"), free_ports(2), strict=True))
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, host=host, cpus=cpus, **ports))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
        "PATH": search_path(),
        "SLURM_CONF": str(config),
    }
    with contextlib.ExitStack() as daemons:
        started: list[subprocess.Popen[bytes]] = []

        def daemon(*command: str) -> None:
            with open(folder / f"{command[0]}.out", "wb") as output:
                process = subprocess.Popen(
                    command, env=environment, stdout=output, stderr=output, start_new_session=True
                )
            started.append(process)
            daemons.callback(stop, process)

        def wait_for(condition: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 60
            while not condition():
                if time.monotonic() > deadline or any(p.poll() is not None for p in started):
                    raise RuntimeError(f"SLURM did not start:\n{logs(folder)}")
                time.sleep(0.2)

        daemon(
            "munged",
            "--foreground",
            f"--key-file={key}",
            *(f"--{name}-file={folder}/munge.{name}" for name in ("log", "pid", "seed")),
            f"--socket={folder}/munge.socket",
        )
        wait_for(lambda: (folder / "munge.socket").exists())
        daemon("slurmctld", "-D", "-i")
        daemon("slurmd", "-D", "-N", host)

        def is_idle() -> bool:
            command = ["sinfo", "--noheader", "--format=%t"]
            asked = subprocess.run(command, env=environment, capture_output=True, text=True)
            return asked.stdout.strip() == "idle"

        wait_for(is_idle)
        yield environment


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a daemon."""
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def logs(folder: Path) -> str:
    """The end of what each daemon wrote."""
    files = sorted([*folder.glob("*.log"), *folder.glob("*.out")])
    return "\n".join(
        f"{file.name}:\n" + "\n".join(file.read_text(errors="replace").splitlines()[-20:])
        for file in files
    )


def free_ports(count: int) -> list[int]:
    """Ports that no one listens on just now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def main() -> int:
    """Runs a command in a cluster and returns its exit code."""
    command = sys.argv[1:]
    if not command or command[0] in ("-h", "--help"):
        print(__doc__)
        return 2
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    with slurm() as environment:
        return subprocess.call(command, env=environment)


if __name__ == "__main__":
    sys.exit(main())
