"""A warm forward of FastVideo's models brings nothing to the device, and waits for nothing."""

import pytest
from simulated_accelerator import SUPPORTED
from transfers import ROWS, Row, deep

pytest.importorskip("fastvideo")
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="this torch has no device types written in Python")

FASTVIDEO = {row.spec: row for row in ROWS if row.spec.startswith("fastvideo/")}
# Of the minis, but Matrix-Game 2 at real depth: copies to the device and syncs, unpatched.
BEFORE = {
    "fastvideo/wan": (5, 0),
    "fastvideo/causal_wan": (5, 4),
    "fastvideo/hunyuan_video": (5, 0),
    "fastvideo/hunyuan_video15": (4, 1),
    "fastvideo/matrixgame2": (93, 126),
    "fastvideo/matrixgame3": (3, 0),
}


@pytest.mark.parametrize("spec", BEFORE)
def test_nothing_is_brought_to_the_device_and_nothing_waited_for(spec):
    row = FASTVIDEO[spec]
    depth = row.deep if spec == "fastvideo/matrixgame2" else {}
    plain, patched = deep(Row(row.name, spec, depth, {}, row.size, stage=row.stage))
    assert (len(plain.uploads), len(plain.syncs)) == BEFORE[spec], plain
    assert (patched.uploads, patched.downloads, patched.syncs) == ([], [], []), patched
