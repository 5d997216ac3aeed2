"""Start-up of several processes: who meets, who is missing, and whether it is what SLURM gave."""

import asyncio
import dataclasses
import functools
import os
import re
import socket
import subprocess
import sys
import time

import jax
import pytest

from mim_jax import cli
from mim_jax.training import loop, processes
from mim_jax.training.processes import (
    SLURM_VARIABLES,
    Member,
    NotStarted,
    Place,
    locate,
    member_of,
    mismatches,
    process_table,
)
from tests.launch.scripts import load
from tests.training.runs import TINY, losses_of

STEP = dict(zip(SLURM_VARIABLES, ("77", "node[3-4],other", "4", "2", "0"), strict=True))
"""The variables of task 2 of 4, as srun sets them."""

START = """
import sys
from rich.console import Console
from mim_jax.training import processes
timeout = int(sys.argv[1])
processes.SECONDS_FOR_JAX = timeout
try:
    started = processes.start_processes(*eval(sys.argv[2]), timeout=timeout)
except processes.NotStarted as error:
    sys.exit(f"error: {error}")
import jax
print("I am", jax.process_index(), "of", jax.process_count())
if started:
    Console(width=100).print(started[0], *started[1])
"""


def start(where, timeout=30, **environment):
    """A real process that starts as `mim-jax train` does."""
    dropped = ("XLA_FLAGS", *SLURM_VARIABLES)
    base = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.Popen(
        [sys.executable, "-c", START, str(timeout), repr(where)],
        env={**base, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ends(*started):
    """Exit code and output of processes."""
    outputs = [process.communicate(timeout=60)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, outputs, strict=True)]


@pytest.fixture
def port():
    return load("multiprocess").free_port()


async def meeting(port, came, timeout=2.0, expected=None):
    """What each process gets of a meeting: its members, or the error's text.

    Args:
        port: of process 0.
        came: number of each process that comes; a tuple says how many it expects as well.
        timeout: in seconds.
        expected: processes; by default those that come.
    """

    async def one(number):
        process, count = number if isinstance(number, tuple) else (number, expected or len(came))
        place = Place(f"localhost:{port}", count, process)
        try:
            return await processes._meet(place, Member(process, count, f"host{process}"), timeout)
        except NotStarted as error:
            return str(error)

    return await asyncio.gather(*map(one, came))


def test_all_meet_and_process_0_knows_them_all(port):
    first, *others = asyncio.run(meeting(port, [0, 2, 1, 3]))
    assert [member.host for member in first] == ["host0", "host1", "host2", "host3"]
    assert others == [[], [], []]


def test_missing_processes_are_named_to_all_who_came(port):
    start = time.monotonic()
    outcomes = asyncio.run(meeting(port, [0, 2], timeout=1, expected=4))
    assert time.monotonic() - start < 5
    assert len(set(outcomes)) == 1
    assert f"2 of 4 processes did not come to localhost:{port} within 1 s: 1, 3." in outcomes[0]
    assert "Those that came are on host0, host2." in outcomes[0]


def test_processes_that_expect_other_numbers_are_told_at_once(port):
    start = time.monotonic()
    outcomes = asyncio.run(meeting(port, [(0, 3), (1, 2)], timeout=30))
    assert time.monotonic() - start < 5
    for outcome in outcomes:
        assert "process 1 on host1 was started as one of 2 processes" in outcome
        assert "but process 0 on host0 as one of 3" in outcome


def test_two_processes_of_one_number_are_told_at_once(port):
    outcomes = asyncio.run(meeting(port, [0, 1, 1], timeout=30))
    assert all("there are two processes 1, on host1 and on host1" in o for o in outcomes)


def test_a_process_may_come_before_the_coordinator_or_leave_and_come_again(port):
    async def scene():
        early = asyncio.create_task(meeting(port, [1], timeout=20, expected=4))
        await asyncio.sleep(0.7)
        first = asyncio.create_task(meeting(port, [0], timeout=20, expected=4))
        await asyncio.sleep(0.3)
        for _ in range(2):  # killed while it waits, and started again by its scheduler
            _, line = await asyncio.open_connection("localhost", port)
            line.write(b'{"process": 2, "processes": 4, "host": "host2"}\n')
            await asyncio.sleep(0.1)
            line.close()
            await asyncio.sleep(0.1)
        late = await meeting(port, [2, 3], timeout=20, expected=4)
        return [*await first, *await early, *late]

    members, *others = asyncio.run(scene())
    assert [member.process for member in members] == [0, 1, 2, 3]
    assert others == [[], [], []]


def test_what_tries_all_ports_does_not_disturb(port):
    async def scene():
        late = asyncio.create_task(meeting(port, [0], timeout=20, expected=2))
        await asyncio.sleep(0.2)
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff", b'{"process": 1}\n', b"[]\n"):
            _, line = await asyncio.open_connection("localhost", port)
            line.write(text)
            line.close()
        return (await meeting(port, [1], timeout=20, expected=2)), await late

    joined, (members,) = asyncio.run(scene())
    assert joined == [[]] and len(members) == 2


@pytest.mark.parametrize(
    "host, why",
    [("localhost", "Connection refused"), ("no-such-host.invalid", "Name|name|resolution")],
)
def test_unreachable_coordinator_is_a_clear_error_within_the_time_limit(host, why, port):
    start = time.monotonic()
    place = Place(f"{host}:{port}", 2, 1)
    with pytest.raises(NotStarted) as error:
        asyncio.run(processes._meet(place, Member(1, 2, "here"), 1))
    assert time.monotonic() - start < 8
    message = str(error.value)
    assert f"process 1 of 2 (on here) could not meet process 0 at {host}, port {port}" in message
    assert re.search(f"within 1 s: .*({why})", message) and "firewall" in message


def test_port_of_another_program_is_told_on_both_sides(monkeypatch):
    monkeypatch.setattr(processes, "SECONDS_FOR_PORT", 0.5)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        place = Place(f"localhost:{port}", 2, 0)
        with pytest.raises(NotStarted, match=f"cannot listen on port {port}.*in use"):
            asyncio.run(processes._meet(place, Member(0, 2, "here"), 30))

    async def other_side():
        async def greet(reader, writer):
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(greet, "localhost", 0)
        port = server.sockets[0].getsockname()[1]
        place = Place(f"localhost:{port}", 2, 1)
        with pytest.raises(NotStarted, match="another program listens there"):
            await processes._meet(place, Member(1, 2, "here"), 1)

    asyncio.run(other_side())


def test_command_that_cannot_reach_its_coordinator_says_so_and_exits_with_1(port):
    start = time.monotonic()
    flags = [f"--coordinator=localhost:{port}", "--num-processes=2", "--process-id=1"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mim_jax",
            "train",
            "--config=mae:tiny",
            "--start-timeout=2",
            *flags,
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: process 1 of 2") and "within 2 s" in done.stderr
    assert done.stderr.count("\n") == 1 and time.monotonic() - start < 30


def test_two_tasks_of_slurm_start_and_process_0_shows_the_table_and_what_does_not_fit():
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    job |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}
    tasks = [
        start((None, None, None), SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **job)
        for i in range(2)
    ]
    (code, first), (other_code, second) = ends(*tasks)
    assert code == other_code == 0, first + second
    assert "2 processes on 1 host, 2 devices" in first
    assert re.search(rf"│ +1 │ {re.escape(socket.gethostname())} +│ 1 x cpu +│", first)
    assert "SLURM started the tasks on 2 nodes, but the processes are on 1" in first
    assert "I am 0 of 2" in first and second.strip().endswith("I am 1 of 2")
    assert "Traceback" not in first + second and "devices" not in second


def test_process_that_fails_leaves_at_once_though_the_others_go_on(port, tmp_path):
    # A healthy process would wait for it: here it waits in its data, as others would in a step.
    healthy = (
        "import time\n"
        "from mim_jax import cli\n"
        "from mim_jax.training import loop\n"
        "loop.training_source = lambda config: time.sleep(600)\n"
        "cli.main({flags!r})\n"
    )
    flags = ["train", "--config=mae:tiny", f"--workdir={tmp_path}", "--num-processes=2"]
    flags += [f"--coordinator=localhost:{port}"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    first = subprocess.Popen(
        [sys.executable, "-c", healthy.format(flags=[*flags, "--process-id=0"])],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        second = subprocess.run(
            [sys.executable, "-m", "mim_jax", *flags, "--process-id=1", "--data=folder:/no/such"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert second.returncode == 1
        assert second.stderr == "error: process 1: image folder '/no/such' does not exist\n"
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


def test_process_lost_between_meeting_and_start_gives_a_message_and_no_trace(port):
    async def come_and_go():
        for _ in range(100):
            try:
                reader, line = await asyncio.open_connection("localhost", port)
                break
            except OSError:
                await asyncio.sleep(0.2)
        line.write(b'{"process": 1, "processes": 2, "host": "there"}\n')
        assert await reader.readline() == b'{"problem": ""}\n'
        line.close()

    process = start((f"localhost:{port}", 2, 0), timeout=3)
    asyncio.run(come_and_go())
    ((code, output),) = ends(process)
    assert code == processes.EXIT_FAILED
    assert "error: process 0 met the others, but JAX did not start within 3 s" in output
    assert "stack trace" not in output and "Traceback" not in output


@pytest.fixture
def clean(monkeypatch):
    """An environment without a cluster."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_LOCAL", "KUBERNETES_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_tasks_of_slurm_are_found_with_one_device_each(clean):
    for name, value in STEP.items():
        clean.setenv(name, value)
    place = locate(None, None, None)
    assert (place.processes, place.process, place.local_devices) == (4, 2, (0,))
    assert place.address == ("node3", 61440 + 77)
    clean.setenv("SLURM_STEP_NUM_NODES", "3")
    clean.setenv("SLURM_GPUS_ON_NODE", "8")
    member = member_of(place, os.environ)
    assert (member.tasks, member.nodes, member.gpus) == (4, 3, 8)
    # Bound to its own GPU, a task sees only that, as number 0.
    clean.setenv("SLURM_GPUS_PER_TASK", "1")
    clean.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert locate(None, None, None).local_devices is None


def test_processes_of_open_mpi_are_found_even_in_the_shell_of_a_slurm_job(clean):
    clean.setenv("SLURM_JOB_ID", "77")
    clean.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    clean.setenv("OMPI_COMM_WORLD_SIZE", "8")
    clean.setenv("OMPI_COMM_WORLD_RANK", "5")
    clean.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    place = locate(None, None, None)
    assert (place.processes, place.process, place.local_devices) == (8, 5, (1,))
    assert place.address[0] == "10.96.0.1"


def test_what_is_given_is_taken_and_nothing_detected(clean):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS"):  # JAX 0.8 would ask for the others
        clean.setenv(name, STEP[name])
    assert locate("[fe80::1]:99", 2, 1) == Place("[fe80::1]:99", 2, 1, None)
    assert locate("[fe80::1]:99", 2, 1).address == ("fe80::1", 99)
    clean.setenv("JAX_LOCAL_DEVICE_IDS", "2,3")
    assert locate("here:99", 2, 1).local_devices == (2, 3)


@pytest.mark.parametrize(
    "where, message",
    [
        (("here", 2, 0), "HOST:PORT"),
        (("here:http", 2, 0), "HOST:PORT"),
        (("here:99", 2, 2), "process-id is 2 and --num-processes 2"),
    ],
)
def test_place_that_cannot_be_is_refused(clean, where, message):
    with pytest.raises(ValueError, match=message):
        locate(*where)


@pytest.mark.parametrize(
    "name, value, hint",
    [
        ("HOME", "/", "or give each --coordinator=HOST:PORT"),
        ("OMPI_COMM_WORLD_RANK", "0", r"Open MPI 5 .*OMPI_COMM_WORLD_SIZE"),
        ("KUBERNETES_SERVICE_HOST", "10.0.0.1", r"pip install 'jax\[k8s\]'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Kubernetes")
def test_no_cluster_is_an_error_that_says_what_was_looked_for(clean, name, value, hint):
    clean.setenv(name, value)
    clean.setitem(sys.modules, "kubernetes", None)
    for where in ((None, None, None), ("here:99", None, None), ("here:99", 2, None)):
        with pytest.raises(NotStarted, match=f"no cluster was found.*{hint}") as error:
            locate(*where)
        assert all(variable in str(error.value) for variable in SLURM_VARIABLES)


def test_half_set_variables_of_a_job_shell_are_an_error_with_distributed(clean):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NODELIST"):
        clean.setenv(name, STEP[name])
    with pytest.raises(NotStarted) as error:
        locate(None, None, None)
    assert "shell of SLURM job 77, where SLURM_PROCID, SLURM_LOCALID are not set" in str(
        error.value
    )
    assert "Start them with srun" in str(error.value)


def test_half_set_variables_of_a_job_shell_are_ignored_without_distributed(clean, tmp_path):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID"):
        clean.setenv(name, STEP[name])
    small = {"model.depth": 1, "model.decoder_depth": 1, "steps": 2, "schedule.warmup_epochs": 0.0}
    fields = {**TINY, **small}.items()
    flags = [f"--config.{name}={value}" for name, value in fields]
    # One device compiles faster than the eight of the tests.
    one_device = functools.partial(loop.train, devices=jax.devices()[:1])
    clean.setattr(loop, "train", one_device)
    assert cli.main(["train", "--config=mae:tiny", f"--workdir={tmp_path}", *flags]) == 0
    assert jax.process_count() == 1
    assert list(losses_of(tmp_path)) == [1, 2]


def members(hosts, **slurm):
    return [Member(i, len(hosts), host, **slurm) for i, host in enumerate(hosts)]


def test_mismatch_with_what_slurm_gave_names_both_numbers():
    four = members(["a", "a", "b", "b"], tasks=4, nodes=2, gpus=2)
    one_each = dict.fromkeys(range(4), 1)
    assert mismatches(four, one_each, "gpu") == []
    others = [dataclasses.replace(member, tasks=8, nodes=4, gpus=8) for member in four]
    tasks, nodes, *gpus = mismatches(others, one_each, "gpu")
    assert "8 tasks, but the run has 4 processes" in tasks
    assert "on 4 nodes, but the processes are on 2: a, b" in nodes
    assert [text.split(",")[0] for text in gpus] == [f"SLURM gave 8 GPUs on {h}" for h in "ab"]
    assert all("its 2 processes use 2" in text for text in gpus)
    assert mismatches(members(["a", "b"]), {0: 4, 1: 4}, "gpu") == []
    (uneven,) = mismatches(members(["a", "b"]), {0: 4, 1: 3}, "gpu")
    assert "between 3 and 4 devices" in uneven


def test_gpus_that_jax_does_not_see_are_an_error():
    (member,) = members(["a"], gpus=8)
    with pytest.raises(NotStarted, match="SLURM gave 8 GPUs on a, but JAX found 0"):
        processes._check_gpus(member, "cpu", {})
    processes._check_gpus(member, "cpu", {"JAX_PLATFORMS": "cpu"})
    processes._check_gpus(member, "gpu", {})


def test_table_of_a_thousand_processes_is_short():
    hosts = [f"host{i // 8}" for i in range(1024)]
    table = process_table(members(hosts), dict.fromkeys(range(1024), 1), "TPU v5p")
    assert table.title == "1024 processes on 128 hosts, 1024 devices"
    assert table.row_count == processes.MOST_ROWS + 1
    last = [list(column.cells)[-1] for column in table.columns]
    assert last == ["64 to 1023", "120 hosts", "960 x TPU v5p"]
