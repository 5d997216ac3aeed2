"""Starts the processes of a run: each finds the others, all meet, and `jax.distributed` begins.

JAX's own client ends a process with a C++ stack trace when another does not come. So the processes
first meet at the coordinator's port over a plain connection: whoever is missing, comes twice or was
started with other numbers is named to all of them. Then the port is left to JAX.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import jax
from rich.table import Table

from mim_jax.training.interruption import Interrupted

DEFAULT_TIMEOUT = 300
"""Seconds that a process waits for all others."""

SECONDS_FOR_JAX = 60
"""What JAX gets at least, once all processes have met."""

SECONDS_FOR_PORT = 30
"""How long process 0 waits for its port, which a run that was just ended may still hold."""

SECONDS_BETWEEN_TRIES = 0.5

EXIT_FAILED = 1
"""Exit code of every error."""

SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
"""All of them are set where `srun` started the process, and only some in a job's shell."""

OPEN_MPI_VARIABLE = "OMPI_MCA_orte_hnp_uri"

_OF_A_LOST_PROCESS = re.compile(
    r"gloo|nccl|heartbeat|coordination|barrier|connection (closed|reset)|unavailable", re.IGNORECASE
)
"""In errors of JAX when a process with which it exchanges something is gone."""

MOST_ROWS = 64
"""Of the table; more processes than this are told in sum."""


class NotStarted(RuntimeError):
    """The processes did not come together; the message says why and what to check."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands among the others.

    Attributes:
        coordinator: HOST:PORT of process 0.
        processes: how many there are.
        process: number of this one.
        local_devices: which of the visible devices are its own; None for all.
    """

    coordinator: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


@dataclasses.dataclass(frozen=True)
class Member:
    """What a process says of itself when all meet; the last three only if SLURM started it.

    Attributes:
        process: its number.
        processes: how many it expects.
        host: name of its machine.
        tasks: how many processes SLURM started.
        nodes: on how many machines.
        gpus: GPUs that SLURM gave on its machine.
    """

    process: int
    processes: int
    host: str
    tasks: int | None = None
    nodes: int | None = None
    gpus: int | None = None


def start_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = DEFAULT_TIMEOUT,
) -> tuple[Table, list[str]] | None:
    """Starts `jax.distributed`; to be called before anything else of JAX.

    Args:
        coordinator: HOST:PORT of process 0. What is None is found by JAX's own detection of TPU
            pods, SLURM, Open MPI and Kubernetes. If all three are given, nothing is detected.
        processes: how many there are.
        process: number of this one.
        timeout: seconds to wait for the others.

    Returns:
        In process 0, a table of all processes, and warnings about what does not fit; else None.

    Raises:
        NotStarted: if no cluster is found, the processes do not all come together in time, or
            this one has no GPU though SLURM gave some.
        ValueError: for a place that cannot be.
    """
    start = time.monotonic()
    place = locate(coordinator, processes, process, timeout=timeout)
    me = member_of(place, os.environ)
    members = asyncio.run(_meet(place, me, timeout))
    left = max(SECONDS_FOR_JAX, timeout - (time.monotonic() - start))
    with _deadline(left, f"process {place.process} met the others, but JAX did not start"):
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_device_ids=place.local_devices,
            cluster_detection_method="deactivate",  # all is known; half-set variables mislead it
            initialization_timeout=int(left + SECONDS_FOR_JAX),  # ours comes first
        )
        # JAX would only take note of SIGTERM; until the loop listens, it shall end the process.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        devices = jax.devices()
    _check_gpus(me, jax.local_devices()[0].platform, os.environ)
    if place.process != 0:
        return None
    owned = Counter(device.process_index for device in devices)
    kind, platform = devices[0].device_kind, devices[0].platform
    return process_table(members, owned, kind), mismatches(members, owned, platform)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ends this process with its error's message as soon as its body fails, if it is one of many.

    At its end JAX would wait up to five minutes for the others, who wait for this process to take
    part in their next step; and its launcher would not know that one has failed.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, Interrupted):
            raise
        if os.environ.get("MIM_JAX_TRACEBACK"):
            traceback.print_exc()
        text = str(error) or type(error).__name__
        if _OF_A_LOST_PROCESS.search(text):
            text += (
                "\nAnother process of this run has probably ended; the log of the one that ended "
                "first says why. Start all of them again with the same command: the run goes on "
                "from its last checkpoint."
            )
        print(f"error: process {jax.process_index()}: {text}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(EXIT_FAILED)


def locate(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    *,
    timeout: float = DEFAULT_TIMEOUT,
) -> Place:
    """This process's place, by what is given and what JAX finds.

    Raises:
        NotStarted: if something is neither given nor found.
        ValueError: for a place that cannot be.
    """
    environment = os.environ  # which JAX reads as well
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    local_devices: Sequence[int] | None = None
    if coordinator is None or processes is None or process is None:
        _check_slurm(environment)
        from jax._src.clusters import ClusterEnv

        coordinator, processes, process, local_devices = (
            ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, processes, process, None, None, int(timeout)
            )
        )
        if coordinator and environment.get("JAX_COORDINATOR_PORT"):  # older JAX ignores it
            host = coordinator.rpartition(":")[0]
            coordinator = f"{host}:{environment['JAX_COORDINATOR_PORT']}"
        if local_devices and _sees_only_its_own_gpus(environment):
            local_devices = None
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        local_devices = [int(i) for i in environment["JAX_LOCAL_DEVICE_IDS"].split(",")]
    if coordinator is None or processes is None or process is None:
        raise NotStarted(_nothing_found(environment))
    _, separator, port = coordinator.rpartition(":")
    if not separator or not port.isdigit():
        raise ValueError(f"--coordinator is {coordinator!r}; expected HOST:PORT, of process 0.")
    if not 0 <= process < processes:
        raise ValueError(
            f"--process-id is {process} and --num-processes {processes}; expected "
            "0 <= process-id < num-processes."
        )
    own = None if local_devices is None else tuple(local_devices)
    return Place(coordinator, processes, process, own)


def member_of(place: Place, environment: Mapping[str, str]) -> Member:
    """What this process says of itself."""
    host = socket.gethostname()
    if not set(SLURM_VARIABLES) <= set(environment):
        return Member(place.process, place.processes, host)

    def number(*names: str) -> int | None:
        found = next((environment[name] for name in names if name in environment), "")
        return int(found) if found.isdigit() else None

    return Member(
        place.process,
        place.processes,
        host,
        tasks=number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        nodes=number("SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
        gpus=number("SLURM_GPUS_ON_NODE"),
    )


def _check_slurm(environment: Mapping[str, str]) -> None:
    """Raises `NotStarted` in a shell of a SLURM job, where only some variables are set."""
    missing = [name for name in SLURM_VARIABLES if name not in environment]
    if "SLURM_JOB_ID" in environment and missing and OPEN_MPI_VARIABLE not in environment:
        raise NotStarted(
            f"--distributed in a shell of SLURM job {environment['SLURM_JOB_ID']}, where "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: this process "
            "is none of the job's tasks. Start them with srun (srun mim-jax train --distributed "
            "...), or leave out --distributed to train in this process alone."
        )


def _sees_only_its_own_gpus(environment: Mapping[str, str]) -> bool:
    """Whether SLURM bound GPUs to the task, which then counts them from 0 like every other."""
    share = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return share.isdigit() and len(visible) == int(share)


def _nothing_found(environment: Mapping[str, str]) -> str:
    hint = ""
    if "OMPI_COMM_WORLD_RANK" in environment:
        hint = (
            " This is Open MPI 5 or newer, which no longer tells where its first process is: add "
            '--coordinator=HOST:PORT --num-processes="$OMPI_COMM_WORLD_SIZE" '
            '--process-id="$OMPI_COMM_WORLD_RANK" in a shell script that mpirun starts.'
        )
    elif "KUBERNETES_SERVICE_HOST" in environment:
        hint = (
            " This is Kubernetes: JAX finds the pods of a Job or JobSet if the package "
            "`kubernetes` is installed (pip install 'jax[k8s]')."
        )
    return (
        f"no cluster was found. Looked for Open MPI ({OPEN_MPI_VARIABLE}), SLURM "
        f"({', '.join(SLURM_VARIABLES)}), TPU pods (TPU_WORKER_HOSTNAMES, or the metadata of a TPU "
        f"VM) and Kubernetes (KUBERNETES_SERVICE_HOST).{hint} Start the processes by srun or "
        "mpirun, or give each --coordinator=HOST:PORT --num-processes=N --process-id=I; for one "
        "process leave out --distributed."
    )


async def _meet(place: Place, me: Member, timeout: float) -> list[Member]:
    """Waits until all processes are there; returns them, in process 0 only."""
    deadline = asyncio.get_running_loop().time() + timeout
    if place.process != 0:
        await _join(place, me, timeout, deadline)
        return []
    return await _Meeting(place, me).held(timeout, deadline)


class _Meeting:
    """The meeting in process 0: all others connect, say who they are, and wait for the word."""

    def __init__(self, place: Place, me: Member) -> None:
        self.place = place
        self.joined = {me.process: me}
        self.lines: dict[int, asyncio.StreamWriter] = {}
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if place.processes == 1:
            self.complete.set_result(None)

    async def held(self, timeout: float, deadline: float) -> list[Member]:
        """All members, in order of their numbers.

        Raises:
            NotStarted: to all who came, if some did not, or if they do not belong together.
        """
        server = await self._listening(min(deadline, _now() + SECONDS_FOR_PORT))
        problem = ""
        try:
            async with asyncio.timeout_at(deadline):
                await self.complete
        except TimeoutError:
            problem = self._who_is_missing(timeout)
        except NotStarted as error:
            problem = str(error)
        server.close()
        for line in list(self.lines.values()):
            with contextlib.suppress(OSError):
                line.write(json.dumps({"problem": problem}).encode() + b"\n")
                await line.drain()
            line.close()
        if problem:
            raise NotStarted(problem)
        return [self.joined[i] for i in range(self.place.processes)]

    async def _listening(self, deadline: float) -> asyncio.Server:
        host, port = self.place.address
        bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "")
        if bound:
            host, _, text = bound.rpartition(":")
            port = int(text)
        while True:
            try:
                return await asyncio.start_server(
                    self._greet,
                    host.strip("[]") if bound else None,  # on all interfaces, as JAX does
                    port,
                    backlog=self.place.processes + 16,
                )
            except OSError as error:
                if _now() >= deadline:
                    raise NotStarted(
                        f"process 0 cannot listen on port {port} of {socket.gethostname()}: "
                        f"{_reason(error)}. Another program, or a run that is still ending, may "
                        "hold it: choose another port in --coordinator, or by JAX_COORDINATOR_PORT."
                    ) from error
            await asyncio.sleep(SECONDS_BETWEEN_TRIES)

    async def _greet(self, reader: asyncio.StreamReader, line: asyncio.StreamWriter) -> None:
        try:
            member = Member(**json.loads(await reader.readline()))
        except (ValueError, TypeError, OSError):
            line.close()  # none of ours: something that tries all ports
            return
        problem = self._disagreement(member)
        if problem:
            self.lines.setdefault(-len(self.lines) - 1, line)
            self._decide(problem)
            return
        self.joined[member.process], self.lines[member.process] = member, line
        if len(self.joined) == self.place.processes:
            self._decide("")
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await reader.read()  # nothing more is said, so this waits until it leaves
        if not self.complete.done():
            del self.joined[member.process], self.lines[member.process]

    def _decide(self, problem: str) -> None:
        if self.complete.done():
            return
        if problem:
            self.complete.set_exception(NotStarted(problem))
        else:
            self.complete.set_result(None)

    def _disagreement(self, member: Member) -> str:
        if member.processes != self.place.processes:
            return (
                f"process {member.process} on {member.host} was started as one of "
                f"{member.processes} processes, but process 0 on {self.joined[0].host} as one of "
                f"{self.place.processes}: all need the same --num-processes."
            )
        if member.process in self.joined:
            return (
                f"there are two processes {member.process}, on {member.host} and on "
                f"{self.joined[member.process].host}: each needs a --process-id of its own."
            )
        return ""

    def _who_is_missing(self, timeout: float) -> str:
        missing = [i for i in range(self.place.processes) if i not in self.joined]
        named = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        hosts = ", ".join(sorted({member.host for member in self.joined.values()})[:20])
        return (
            f"{len(missing)} of {self.place.processes} processes did not come to "
            f"{self.place.coordinator} within {timeout:g} s: {named}. Those that came are on "
            f"{hosts}. See what the missing ones print, and whether all were started; "
            "--start-timeout waits longer."
        )


async def _join(place: Place, me: Member, timeout: float, deadline: float) -> None:
    """Goes to the meeting and waits for its outcome."""
    host, port = place.address
    hello = json.dumps(dataclasses.asdict(me)).encode() + b"\n"
    last = ""
    while _now() < deadline:
        try:
            async with asyncio.timeout_at(deadline):
                reader, line = await asyncio.open_connection(host, port)
            with contextlib.closing(line):
                last = "it answers, but other processes are still missing"
                line.write(hello)
                async with asyncio.timeout_at(deadline + 10):  # it then says who is missing
                    outcome = await reader.readline()
            if not outcome:
                last = "the connection was closed at the other end"
            elif problem := json.loads(outcome)["problem"]:
                raise NotStarted(problem)
            else:
                return
        except (ValueError, TypeError, KeyError):
            last = "another program listens there"
        except OSError as error:  # of which TimeoutError is one
            last = _reason(error) or last or "no answer"
        await asyncio.sleep(SECONDS_BETWEEN_TRIES)
    raise NotStarted(
        f"process {place.process} of {place.processes} (on {me.host}) could not meet process 0 at "
        f"{host}, port {port}, within {timeout:g} s: {last}. Check that process 0 was started and "
        "what it prints, that its host name means the same machine here, and that no firewall "
        "closes the port; --start-timeout waits longer."
    )


def _now() -> float:
    return asyncio.get_running_loop().time()


def _reason(error: OSError) -> str:
    """What the operating system says, without the address, which the message has already."""
    if isinstance(error, TimeoutError) and error.errno is None:
        return ""
    # asyncio puts its own text in place of the operating system's.
    number = error.errno or 0  # negative where a host name has no address
    return os.strerror(number) if number > 0 else str(error.strerror or error)


@contextlib.contextmanager
def _deadline(seconds: float, what: str) -> Iterator[None]:
    """Ends the process with a message if its body takes longer: JAX's own calls cannot be stopped.

    Otherwise JAX would end it, with a stack trace of C++.
    """

    def end() -> None:
        print(
            f"error: {what} within {seconds:g} s. Another process may have ended meanwhile: see "
            "what the others print. Proxies (the variables http_proxy, https_proxy) and firewalls "
            "between the hosts are other causes.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_FAILED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_gpus(me: Member, platform: str, environment: Mapping[str, str]) -> None:
    """Raises `NotStarted` if JAX fell back to the CPU where SLURM gave GPUs."""
    if me.gpus and platform == "cpu" and not environment.get("JAX_PLATFORMS"):
        raise NotStarted(
            f"process {me.process}: SLURM gave {me.gpus} GPUs on {me.host}, but JAX found 0 and "
            "would train on the CPU. Install JAX for GPUs (launch/start.py --extra cuda) and see "
            "whether nvidia-smi works there, or set JAX_PLATFORMS=cpu if that is meant."
        )


def process_table(members: Sequence[Member], devices: Mapping[int, int], kind: str) -> Table:
    """A row for each process: number, host, local devices; the totals in the title.

    Args:
        members: all processes.
        devices: local devices by number of the process.
        kind: of the devices.
    """
    hosts = len({member.host for member in members})
    table = Table(
        title=f"{_counted(len(members), 'process', 'es')} on {_counted(hosts, 'host')}, "
        f"{_counted(sum(devices.values()), 'device')}"
    )
    table.add_column("process", justify="right")
    table.add_column("host")
    table.add_column("local devices")
    for member in members[:MOST_ROWS]:
        count = f"{devices.get(member.process, 0)} x {kind}"
        table.add_row(str(member.process), member.host, count)
    if more := members[MOST_ROWS:]:
        count = f"{sum(devices.get(member.process, 0) for member in more)} x {kind}"
        names = len({member.host for member in more})
        table.add_row(f"{more[0].process} to {more[-1].process}", f"{names} hosts", count)
    return table


def _counted(number: int, name: str, plural: str = "s") -> str:
    return f"{number} {name}{plural * (number != 1)}"


def mismatches(members: Sequence[Member], devices: Mapping[int, int], platform: str) -> list[str]:
    """Where the processes are not what SLURM gave; each says both numbers.

    Args:
        members: all processes, in order.
        devices: local devices by number of the process.
        platform: of the devices, such as "gpu".
    """
    first, found = members[0], []
    hosts = {member.host for member in members}
    if first.tasks not in (None, len(members)):
        found.append(
            f"SLURM started {first.tasks} tasks, but the run has {len(members)} processes: "
            "--num-processes does not fit the job."
        )
    if first.nodes not in (None, len(hosts)):
        found.append(
            f"SLURM started the tasks on {first.nodes} nodes, but the processes are on "
            f"{len(hosts)}: {', '.join(sorted(hosts)[:20])}."
        )
    for host in sorted(hosts):
        there = [member for member in members if member.host == host]
        given = there[0].gpus
        used = sum(devices.get(member.process, 0) for member in there)
        if given and platform == "gpu" and used != given:
            found.append(
                f"SLURM gave {given} GPUs on {host}, but its {len(there)} processes use {used}: "
                "each task takes one, so --ntasks-per-node should be --gpus-per-node."
            )
    if len(set(devices.values())) > 1:
        found.append(
            f"the processes have between {min(devices.values())} and {max(devices.values())} "
            "devices; all should have the same number."
        )
    return found
