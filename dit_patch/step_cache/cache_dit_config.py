"""A `StepCache` as cache-dit wants to be told; the only place that spells the names of its options."""

from __future__ import annotations

from typing import Any

from ..errors import StepCacheError
from ..findings import Finding, FindingKind, warn
from . import requirements
from .config import MASKS, StepCache


class CacheDitConfig:
    """What cache-dit is given for one model.

    Args:
        config: what the user asked for.
        label: what messages call the model.
    """

    def __init__(self, config: StepCache, label: str) -> None:
        self.config, self.label = config, label
        self._caching = requirements.cache_dit()

    def __repr__(self) -> str:
        return f"<CacheDitConfig of {self.label}: {self.config}>"

    def of_blocks(self, count: int, label: str, steps: int | None, config: StepCache | None = None) -> Any:
        """Return the `DBCacheConfig` of a list of `count` blocks, in a generation of so many steps, if that is known.

        `config` stands in for that of the model.
        """
        config = config or self.config
        fn, bn = config.blocks(count, label)
        return self._caching.DBCacheConfig(
            Fn_compute_blocks=fn,
            Bn_compute_blocks=bn,
            residual_diff_threshold=config.threshold,
            max_accumulated_residual_diff_threshold=config.max_accumulated,
            max_warmup_steps=config.warmup,
            warmup_interval=config.warmup_interval,
            max_cached_steps=-1 if config.max_cached is None else config.max_cached,
            max_continuous_cached_steps=-1 if config.max_continuous is None else config.max_continuous,
            enable_separate_cfg=False,  # each pass has a context of its own
            steps_computation_mask=self._mask(config.mask, steps),
            steps_computation_policy=config.mask_policy,
        )

    def calibrator(self) -> Any:
        """Return the configuration of the forecast; None where there is none."""
        config, caching = self.config, self._caching
        both = {"enable_calibrator": True, "enable_encoder_calibrator": True}
        if config.calibrator == "taylorseer":
            return caching.TaylorSeerCalibratorConfig(taylorseer_order=config.order or 1, **both)
        if config.calibrator == "foca":
            return caching.FoCaCalibratorConfig(**both)
        if config.calibrator == "dmd":
            return caching.DMDCalibratorConfig(dmd_history=config.history or 6, **both)
        return None

    def _mask(self, mask: str | tuple[int, ...] | None, steps: int | None) -> list[int] | None:
        if mask not in MASKS:
            return None if mask is None else list(mask)
        if steps is None:
            raise StepCacheError(
                f'mask="{mask}" needs the number of steps, which nobody has said: a model alone does not know it.\n'
                "    Call handle.begin_generation(steps=...) before each generation, or give the mask itself."
            )
        try:
            return self._caching.steps_mask(total_steps=steps, mask_policy=mask)
        except AssertionError:
            detail = f'mask="{mask}": cache-dit makes none for {steps} steps'
            warn(Finding(FindingKind.NO_MASK, self.label, detail))
            return [1] * steps
