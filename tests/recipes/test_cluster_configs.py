"""The files in `cluster_configs/`: bash and Ray take them, the key reaches the driver alone, pages they name exist."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import yaml

from conftest import REPOSITORY

CONFIGS = REPOSITORY / "cluster_configs"


def test_bash_reads_the_slurm_script_and_ray_has_what_it_asks_for():
    script = CONFIGS / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    asked = set(re.findall(r"^  (--[\w-]+)", text, re.M)) - {"--"}
    assert asked == {"--address", "--min-nodes", "--num-gpus"}
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import symmetric_run

    known = {name for command in (start, symmetric_run) for option in command.params for name in option.opts}
    assert asked <= known
    assert "unset HF_S3T_KEY" in text and "export HF_S3T_KEY" not in text


def pods(job: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    cluster = job["spec"]["rayClusterSpec"]
    return cluster["headGroupSpec"], cluster["workerGroupSpecs"]


def test_only_the_head_of_the_job_has_key_and_store():
    job = yaml.safe_load((CONFIGS / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    head, workers = pods(job)
    (driver,) = head["template"]["spec"]["containers"]
    assert {one["name"] for one in driver["env"]} == {"HF_S3T_KEY", "HF_HOME"}
    assert head["rayStartParams"] == {"num-cpus": "0"}
    for group in workers:
        (worker,) = group["template"]["spec"]["containers"]
        assert [one["name"] for one in worker["env"]] == ["HF_HOME"] and worker["image"] == driver["image"]
        mounts = {one["name"]: one["mountPath"] for one in worker["volumeMounts"]}
        assert mounts == {"cache": "/cache", "scratch": "/tmp"}
        assert worker["resources"]["limits"] == worker["resources"]["requests"]
        volumes = {one["name"] for one in group["template"]["spec"]["volumes"]}
        assert volumes == set(mounts)


def test_pages_that_they_name_exist():
    for file in CONFIGS.iterdir():
        for page in re.findall(r"docs/\w+\.md|cluster_configs/[\w.]+", file.read_text()):
            assert (REPOSITORY / page).exists(), f"{file.name} names {page}"
