"""A warm forward of FastVideo's models brings nothing to the device, and waits for nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dit_patch.contribute.audit.accelerator import SUPPORTED

pytest.importorskip("fastvideo")
pytestmark = [
    pytest.mark.usefixtures("first_checks_only"),
    pytest.mark.skipif(not SUPPORTED, reason="this torch has no device types written in Python"),
]

# Of the minis, but Matrix-Game 2 at real depth: copies to the device and syncs, unpatched.
BEFORE = {
    "fastvideo/wan": [5, 0],
    "fastvideo/causal_wan": [5, 4],
    "fastvideo/hunyuan_video": [5, 0],
    "fastvideo/hunyuan_video15": [4, 1],
    "fastvideo/matrixgame2": [93, 126],
    "fastvideo/matrixgame3": [3, 0],
}
# In a process of its own: which attention kernel torch chooses, and so what it can view, goes by what ran before.
COUNT = """
import json
from transfers import ROWS, Row, deep
counts = {}
for row in ROWS:
    if row.spec.startswith("fastvideo/"):
        depth = row.deep if row.spec == "fastvideo/matrixgame2" else {}
        both = deep(Row(row.name, row.spec, depth, {}, row.size))
        counts[row.spec] = [[len(each.uploads), len(each.syncs), len(each.downloads)] for each in both]
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def counts():
    command = [sys.executable, "-W", "ignore", "-c", COUNT]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("spec", BEFORE)
def test_nothing_is_brought_to_the_device_and_nothing_waited_for(counts, spec):
    plain, patched = counts[spec]
    assert plain[:2] == BEFORE[spec]
    assert patched == [0, 0, 0]
