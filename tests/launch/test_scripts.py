"""The shell and Kubernetes launchers: lint, and what they run, by stand-ins for their programs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.launch.scripts import LAUNCH, program, start

SCRIPTS = ("local.sh", "slurm.sbatch", "tpu_pod.sh")

# Ends with the code in the file `code`, or waits for a signal and ends with 75.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> calls
trap 'echo TERM >> calls; exit 75' TERM
[[ -e code ]] && exit "$(cat code)"
echo "$$" > starting && mv starting running
while true; do sleep 0.02; done
"""


def linted(*paths):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.defpath}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; it comes with the extra `test`")
    return subprocess.run([shellcheck, *paths], capture_output=True, text=True).stdout


@pytest.fixture
def jobset():
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


@pytest.fixture
def cluster(tmp_path):
    """A working directory with stand-ins for SLURM's programs, which write down their calls."""
    program(tmp_path, "srun", SRUN)
    program(tmp_path, "scontrol", '#!/bin/sh\necho "scontrol $*" >> calls\n')
    return tmp_path


def submit(cluster, *flags, environment=".venv"):
    return start(
        ["bash", LAUNCH / "slurm.sbatch", *flags],
        cwd=cluster,
        path=cluster,
        SLURM_JOB_ID="7",
        SLURM_CPUS_PER_TASK="3",
        MIM_JAX_VENV=environment,
    )


def calls(cluster):
    return (cluster / "calls").read_text().splitlines()


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name):
    assert linted(LAUNCH / name) == ""
    assert os.access(LAUNCH / name, os.X_OK)


def test_shellcheck_finds_nothing_in_the_jobset(jobset, tmp_path):
    (script,) = container(jobset)["args"]
    (tmp_path / "train.sh").write_text(f"#!/usr/bin/env bash\n{script}")
    assert linted(tmp_path / "train.sh") == ""


@pytest.mark.parametrize("gpus", [True, False])
def test_local_installs_jax_for_the_devices_it_finds(tmp_path, gpus):
    program(tmp_path, "python3", '#!/bin/sh\necho "$@"\n')
    if gpus:
        program(tmp_path, "nvidia-smi", "#!/bin/sh\n")
    process = start([LAUNCH / "local.sh", "--config", "a b"], cwd=tmp_path, path=tmp_path)
    output, _ = process.communicate(timeout=20)
    extra = "--extra cuda " if gpus else ""
    assert output == f"{LAUNCH}/start.py {extra}mim-jax train --config a b\n"


def test_slurm_starts_one_task_for_each_gpu(cluster):
    (cluster / "code").write_text("0")
    process = submit(cluster, "--config", "mae:vit_b16")
    assert process.wait(timeout=20) == 0, process.stdout.read()
    (call,) = calls(cluster)
    assert call.endswith(".venv/bin/mim-jax train --distributed --config mae:vit_b16")
    assert "--cpus-per-task=3" in call
    directives = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]
    assert not {"gpus-per-task", "gpu-bind"} & set(directives)


def test_slurm_job_uses_the_environment_that_the_launcher_made(cluster):
    (cluster / "code").write_text("0")
    assert submit(cluster, environment="/shared/environment").wait(timeout=20) == 0
    (call,) = calls(cluster)
    assert call.endswith(" /shared/environment/bin/mim-jax train --distributed")


@pytest.mark.parametrize(
    "number, again",
    [(signal.SIGUSR1, True), (signal.SIGTERM, False)],
    ids=["time is nearly up", "scancel"],
)
def test_slurm_job_that_saved_queues_again_unless_it_was_cancelled(cluster, number, again):
    process = submit(cluster)
    while not (cluster / "running").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    if number == signal.SIGTERM:  # scancel signals all steps, with the batch script
        os.kill(int((cluster / "running").read_text()), signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert calls(cluster)[1:] == ["TERM", *["scontrol requeue 7"] * again]


@pytest.mark.parametrize(
    "code, again", [(75, True), (143, True), (70, True), (1, False), (137, False)]
)
def test_slurm_job_that_was_preempted_or_stuck_queues_again_and_one_that_failed_does_not(
    cluster, code, again
):
    (cluster / "code").write_text(str(code))
    assert submit(cluster).wait(timeout=20) == code
    assert calls(cluster)[1:] == ["scontrol requeue 7"] * again


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_the_script(name):
    checked = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_tpu_pod_sets_up_the_last_commit_and_stops_what_runs(tmp_path):
    program(tmp_path, "gcloud", '#!/bin/bash\nprintf "%s\\n" "$*" >> calls\n')
    program(tmp_path, "git", '#!/bin/bash\necho "git $*" >> calls\n')
    slice_ = {"TPU": "my-slice", "ZONE": "my-zone"}
    for verb in ("setup", "stop"):
        command = [LAUNCH / "tpu_pod.sh", verb]
        assert start(command, cwd=tmp_path, path=tmp_path, **slice_).wait(timeout=20) == 0
    text = (tmp_path / "calls").read_text()
    archive, copy, *_ = text.splitlines()
    assert archive.startswith(f"git -C {LAUNCH}/.. archive --format=tar.gz --output=")
    file = archive.split("--output=")[1].split()[0]
    where = "my-slice: --zone=my-zone --worker=all"
    assert copy == f"compute tpus tpu-vm scp {file} {where}"
    assert "launch/start.py --extra tpu mim-jax --version" in text
    # The pattern must not name the shell that looks for it.
    assert text.endswith("--command=pkill -TERM -f '[m]im-jax train' || true\n")
    assert not Path(file).exists(), "what was copied is removed here"


def test_tpu_pod_runs_the_same_command_on_all_workers(tmp_path):
    program(tmp_path, "gcloud", '#!/bin/bash\nprintf "%s\\n" "$@" >> calls\n')

    def pod(*arguments, **environment):
        process = start(
            [LAUNCH / "tpu_pod.sh", *arguments], cwd=tmp_path, path=tmp_path, **environment
        )
        output, _ = process.communicate(timeout=20)
        return process.returncode, output

    slice_ = {"TPU": "my-slice", "ZONE": "my-zone"}
    assert pod("train", "--config", "mae:tiny", "--config.data.mean=(0.5, 0.5)", **slice_)[0] == 0
    *where, command = calls(tmp_path)
    assert where[-3:] == ["my-slice", "--zone=my-zone", "--worker=all"]
    # The remote shell reads the flags as they were given here.
    remote = command.removeprefix("--command=cd mim_jax && exec .venv/bin/mim-jax train ")
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {remote}"], capture_output=True, text=True
    )
    expected = ["--distributed", "--config", "mae:tiny", "--config.data.mean=(0.5, 0.5)"]
    assert words.stdout.splitlines() == expected
    for arguments, environment in (([], slice_), (["train"], {}), (["dance"], slice_)):
        code, output = pod(*arguments, **environment)
        assert code == 2 and "launch/tpu_pod.sh train --config" in output


def container(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    (found,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return found


def test_jobset_restarts_after_a_save_or_an_eviction_without_counting(jobset):
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (job,) = jobset["spec"]["replicatedJobs"]
    evicted, saved = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert saved["onExitCodes"]["values"] == [75]
    assert saved["onExitCodes"]["containerName"] == container(jobset)["name"]
    assert job["template"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def schema_errors(manifest):
    """What Kubernetes would refuse, unknown fields included; None if nothing."""
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate comes with the extra `test`"
    )
    try:
        validator.validate(manifest, "1.31", strict=True)
    except validator.ValidationError as error:
        return f"{'/'.join(map(str, error.path))}: {error.message}"
    return None


def test_jobs_of_the_jobset_and_their_pods_are_valid_in_the_schema_of_kubernetes(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "worker"}}
    job |= replicated["template"]
    assert schema_errors(job) is None
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "worker"}}
    pod |= {"spec": job["spec"]["template"]["spec"]}
    assert schema_errors(pod) is None
    pod["spec"]["terminationGracePeriod"] = 120
    assert "terminationGracePeriod" in schema_errors(pod), "a misspelt field is found"


def test_jobset_has_only_fields_that_jobset_knows(jobset):
    # Its schema comes with no package; these are the fields of v1alpha2 that are used here.
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(jobset["spec"]) == {"network", "failurePolicy", "replicatedJobs"}
    assert set(jobset["spec"]["network"]) == {"enableDNSHostnames", "publishNotReadyAddresses"}
    assert set(jobset["spec"]["failurePolicy"]) == {"maxRestarts", "rules"}
    assert set(jobset["spec"]["replicatedJobs"][0]) == {"name", "replicas", "template"}


@pytest.mark.parametrize("tpu", [True, False])
def test_jobset_pods_find_the_coordinator(jobset, tmp_path, tpu):
    (job,) = jobset["spec"]["replicatedJobs"]
    spec, environment = job["template"]["spec"], {"JOB_COMPLETION_INDEX": "1"}
    environment |= {entry["name"]: entry["value"] for entry in container(jobset)["env"]}
    assert spec["completions"] == spec["parallelism"] == int(environment["NODES"])
    if tpu:
        environment["TPU_WORKER_HOSTNAMES"] = "a,b"
    program(tmp_path, "mim-jax", '#!/bin/sh\necho "$@"\n')
    process = start(
        ["bash", "-c", *container(jobset)["args"]], cwd=tmp_path, path=tmp_path, **environment
    )
    output, _ = process.communicate(timeout=20)
    name = jobset["metadata"]["name"]
    coordinator = f"--coordinator={name}-{job['name']}-0-0.{name}:8476"
    where = "--distributed" if tpu else f"{coordinator} --num-processes=2 --process-id=1"
    assert output.startswith(f"train {where} --config=mae:vit_l16 ")
