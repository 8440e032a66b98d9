"""The cluster examples: what they start, what they do when preempted, and torchrun restarting a killed rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launch_cases import launch, prepared_run, trained, wait_for_step, workers
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import parse_args

from longlora.artifacts import RunFolder
from longlora.config import Recipe

CLUSTERS = Path(__file__).parent.parent / "examples" / "clusters"
# Stand-ins: `srun` runs its command once, `scancel` signals it, and all write down what they were asked for.
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\necho $$ > "$LOG/pid"\nexec "$@"',
    "torchrun": 'trap "exit 143" TERM\nif [[ -n ${HANGS:-} ]]; then sleep 30 >&- 2>&- & wait; fi\nexit "${CODE:-0}"',
    "scontrol": 'if [[ $1 == show ]]; then printf "first\\nsecond\\n"; fi',
    "scancel": 'kill -TERM "$(cat "$LOG/pid")"',
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment in which the stand-ins are found; each writes its arguments to a file of its name."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        record = f'printf "%s\\n" "$@" >> "$LOG/{name}"; echo --- >> "$LOG/{name}"'
        path.write_text(f"#!/usr/bin/env bash\n{record}\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LOG": str(tmp_path),
        "SLURM_JOB_ID": "4321",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }


def calls(environment: dict[str, str], name: str) -> list[list[str]]:
    """Arguments of each call of a stand-in."""
    path = Path(environment["LOG"]) / name
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [call.splitlines() for call in text.split("---\n") if call]


def sbatch(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = ["bash", str(CLUSTERS / "slurm.sbatch"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def bash(script: str, environment: dict[str, str]) -> None:
    subprocess.run(["bash", "-c", script], env=environment, check=True, timeout=30)


def started(call: list[str]) -> Any:
    """torchrun's own reading of its arguments, after checks that hold for every cluster."""
    read = parse_args(call)
    assert read.rdzv_backend == "c10d"
    assert int(read.max_restarts) > 0
    assert parse_rendezvous_endpoint(read.rdzv_endpoint, default_port=-1)[1] > 1024
    assert read.module
    assert read.training_script == "longlora"
    assert read.training_script_args[0] == "train"
    assert "--or-resume" in read.training_script_args
    return read


def test_slurm_starts_one_torchrun_that_meets_at_the_first_node(cluster: dict[str, str]) -> None:
    job = sbatch(cluster, "my recipe.yaml", "train.steps=7")
    _, errors = job.communicate(timeout=30)
    assert (job.returncode, errors) == (0, "")
    (call,) = calls(cluster, "torchrun")
    read = started(call)
    assert (read.nnodes, read.nproc_per_node, read.rdzv_id) == ("2", "4", "4321")
    assert read.rdzv_endpoint == "first:24321"
    assert read.training_script_args == ["train", "my recipe.yaml", "--or-resume", "train.steps=7"]
    assert calls(cluster, "scontrol") == [["show", "hostnames", "n[1-2]"]]


def test_slurm_gives_the_error_of_a_failed_run_and_does_not_queue_again(cluster: dict[str, str]) -> None:
    job = sbatch(cluster | {"CODE": "3"}, "recipe.yaml")
    job.communicate(timeout=30)
    assert job.returncode == 3
    assert all(call[0] == "show" for call in calls(cluster, "scontrol"))


def test_slurm_saves_and_queues_again_when_it_is_preempted(cluster: dict[str, str]) -> None:
    job = sbatch(cluster | {"HANGS": "yes"}, "recipe.yaml")
    deadline = time.monotonic() + 20
    while not calls(cluster, "torchrun") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # the stand-in's own trap
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert calls(cluster, "scancel") == [["--signal=TERM", "4321"]]
    assert calls(cluster, "scontrol")[-1] == ["requeue", "4321"]
    assert job.returncode == 143


def test_slurm_without_a_recipe_says_how(cluster: dict[str, str]) -> None:
    job = sbatch(cluster)
    _, errors = job.communicate(timeout=30)
    assert job.returncode != 0
    assert "sbatch slurm.sbatch RECIPE" in errors


def test_slurm_is_told_in_time() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (CLUSTERS / "slurm.sbatch").read_text(), re.MULTILINE))
    assert {"requeue", "nodes", "gpus-per-node"} <= options.keys()
    assert options["ntasks-per-node"] == "1"
    signal_name, _, seconds = options["signal"].removeprefix("B:").partition("@")
    script = (CLUSTERS / "slurm.sbatch").read_text()
    limit = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", script)
    assert signal_name == "TERM"
    assert limit is not None
    assert int(limit[1]) < int(seconds)


def test_kubernetes_joins_its_pods(cluster: dict[str, str]) -> None:
    service, job = yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    # Names of pods: a headless service of the subdomain, which lists pods before they are ready.
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(variables["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["GPUS"])
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    mounts = {each["name"] for each in container["volumeMounts"]}
    assert mounts == {each["name"] for each in pod["volumes"]}
    assert {"mountPath": "/dev/shm", "name": "shm"} in container["volumeMounts"]
    for index, host in ((0, "is_host=1"), (1, "is_host=0")):
        bash(container["args"][0], cluster | variables | {"JOB_COMPLETION_INDEX": str(index)})
        read = started(calls(cluster, "torchrun")[-1])
        assert (read.nnodes, read.nproc_per_node, read.rdzv_conf) == ("2", "8", host)
        name, port = parse_rendezvous_endpoint(read.rdzv_endpoint, default_port=-1)
        assert name == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
        assert port == service["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"]


def test_skypilot_joins_its_nodes(cluster: dict[str, str]) -> None:
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text(encoding="utf-8"))
    known = {"name", "num_nodes", "resources", "workdir", "volumes", "envs", "setup", "run"}
    assert task.keys() == known
    assert re.fullmatch(r"\w+:\d+", task["resources"]["accelerators"])
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    own = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    }
    for rank, host in ((0, "is_host=1"), (1, "is_host=0")):
        bash(task["run"], cluster | task["envs"] | own | {"SKYPILOT_NODE_RANK": str(rank), "RECIPE": "mine.yaml"})
        read = started(calls(cluster, "torchrun")[-1])
        assert (read.nnodes, read.nproc_per_node, read.rdzv_conf) == ("2", "8", host)
        assert read.rdzv_endpoint == "10.0.0.1:29400"
        assert read.training_script_args == ["train", "mine.yaml", "--or-resume"]


def test_every_file_is_in_the_readme() -> None:
    text = (CLUSTERS / "README.md").read_text(encoding="utf-8")
    assert all(f"[{path.name}]({path.name})" in text for path in CLUSTERS.iterdir() if path.name != "README.md")


def run(folder: Path, model: Path, name: str) -> Recipe:
    return prepared_run(folder, model, name, train__steps=30, train__save_steps=5)


@pytest.mark.distributed
def test_torchrun_restarts_a_killed_rank_and_the_result_is_the_same(tmp_path: Path, tiny_model_folder: Path) -> None:
    recipe, undisturbed = (run(tmp_path, tiny_model_folder, name) for name in ("killed", "undisturbed"))

    def kill_once(launcher: subprocess.Popen[str]) -> None:
        ranks = workers(launcher, 2)
        wait_for_step(recipe, 8, launcher)
        os.kill(ranks[1], signal.SIGKILL)

    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as all of the examples set it
    assert all("TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in path.read_text() for path in CLUSTERS.glob("*.[sy]*"))
    options = ("--max-restarts=1",)
    found = launch(recipe, "--or-resume", options=options, environment=own_store, meanwhile=kill_once)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("going on from") == 1
    assert launch(undisturbed, "--or-resume").returncode == 0
    ours, theirs = trained(recipe), trained(undisturbed)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, msg=name)


def test_train_or_resume_does_nothing_where_the_run_is_finished(
    tmp_path: Path, tiny_model_folder: Path, longlora: Any
) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder, train__steps=2)
    code, out, _ = longlora("train", str(recipe.run_path), "--or-resume")
    assert (code, "adapter: " in out) == (0, True)
    before = RunFolder(recipe.run_path).metrics.read_text(encoding="utf-8")
    code, out, _ = longlora("train", str(recipe.run_path), "--or-resume")
    assert (code, out) == (0, f"finished before: {recipe.run_path / 'adapter'}\n")
    assert RunFolder(recipe.run_path).metrics.read_text(encoding="utf-8") == before
    assert longlora("train", str(recipe.run_path))[0] == 2


def test_train_or_resume_goes_on_from_a_checkpoint(tmp_path: Path, tiny_model_folder: Path, longlora: Any) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder)
    folder = RunFolder(recipe.run_path)
    assert longlora("train", str(recipe.run_path))[0] == 0
    folder.adapter.rename(tmp_path / "adapter")
    (folder.checkpoints / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    code, out, _ = longlora("train", str(recipe.run_path), "--or-resume")
    assert code == 0
    assert "going on from" in out
    assert "checkpoint-2" in out
