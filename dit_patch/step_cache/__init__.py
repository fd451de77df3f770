"""Step caching: the middle blocks of a transformer skipped where a step changes little. It changes the output.

`config` is what can be asked for, `guards` what it does not go with, `generations` when a generation begins and which
pass is running, `gates` the block lists, `live` all of that on one model, `stats` what it did; `calibrate` finds a
threshold, `harness` measures speed and quality side by side.
"""

from .config import PRESETS, StepCache

__all__ = ["PRESETS", "StepCache"]
