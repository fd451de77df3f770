"""Workers of Ray, which get the variables of `dit-patch run --print-env` as their runtime environment."""

import json
import os
import subprocess
import sys

import pytest
from test_elsewhere import PROGRAM, dit_patch

pytest.importorskip("diffusers")
pytest.importorskip("ray", reason="Ray is not among what the tests install: pip install 'dit-patch[test-ray]'")

DRIVER = """
import json, sys
import ray

ray.init(num_cpus=2, runtime_env={"env_vars": json.loads(sys.argv[1])}, log_to_driver=False)

@ray.remote(num_cpus=1)
class Worker:
    def run(self, program):
        import sys
        sys.argv = ["worker"]
        exec(program, {})
        return True

workers = [Worker.remote() for _ in range(2)]
assert ray.get([each.run.remote(sys.argv[2]) for each in workers]) == [True, True]
import time
time.sleep(4)
for each in workers:
    ray.kill(each)
ray.shutdown()
"""


def test_each_actor_is_patched_and_leaves_its_report_when_it_is_killed(tmp_path):
    folder = tmp_path / "reports"
    variables = dit_patch("run", "--print-env", "json", "--patch-report", folder).stdout
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", DRIVER, variables, PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(dit_patch("report", folder, "--json").stdout)
    assert document["patched"] == 2
    assert all(each["handles"][0]["sites"] for each in document["processes"])
