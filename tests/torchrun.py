"""A program run by two ranks under torchrun, and beside them by one process alone; each leaves a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def reports(program: Path, folder: Path, ranks: int, limit: float, **environment: str) -> tuple[Any, list[Any]]:
    """What a process alone leaves in `alone.json`, and each rank in `0.json`, `1.json`, ...

    Args:
        program: is called with the folder.
        limit: seconds that it may take.
        environment: variables to set.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    running = [
        subprocess.Popen(
            [sys.executable, *how, str(program), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for how in ([], launcher)
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=limit)
            assert process.returncode == 0, output[-5000:]
    finally:
        for process in running:
            process.terminate()  # torchrun ends its ranks when told so; killed, it would leave them behind
            process.wait()
    alone, *others = (json.loads((folder / f"{name}.json").read_text()) for name in ("alone", *range(ranks)))
    return alone, others
