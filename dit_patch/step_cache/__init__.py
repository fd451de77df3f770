"""Step caching: the middle blocks of a transformer skipped where a step changes little. It changes the output.

    handle = dit_patch.apply(pipeline, step_cache="balanced")
    handle.step_stats()

`config` is what can be asked for, `calibration` what was found to meet a target, `requirements` what it does not go
with. `model_step_cache` is all of it on one model: `tracker` knows which generation and pass runs, from what `listener`
hears and `passes` reads; `block_list` stands in for lists of blocks, whose arguments `block_pattern` knows;
`cache_dit_config` tells cache-dit what was asked for, `ranks` which ranks must decide alike. `report` and `stats` say
what it did.
"""

from .config import PRESETS, StepCache

__all__ = ["PRESETS", "StepCache"]
