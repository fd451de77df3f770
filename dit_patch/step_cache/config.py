"""What step caching can be asked for: the presets and `StepCache`, with every rule that needs no model.

Knows nothing of cache-dit or torch. The names are those of DBCache's publications (F, B, W, R); what each knob does is
cache-dit's `DBCacheConfig`, read and measured at 1.5.3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from ..errors import LONG, StepCacheError, quote, suggest
from ..outputs import replacing
from ..spec.messages import one_of
from .calibration import Calibration

CALIBRATORS = ("taylorseer", "foca", "dmd")
MASKS = ("slow", "medium", "fast", "ultra")
POLICIES = ("dynamic", "static")
_THEIRS = {
    "Fn_compute_blocks": "fn",
    "Bn_compute_blocks": "bn",
    "residual_diff_threshold": "threshold",
    "max_warmup_steps": "warmup",
    "max_cached_steps": "max_cached",
    "max_continuous_cached_steps": "max_continuous",
    "max_accumulated_residual_diff_threshold": "max_accumulated",
    "steps_computation_mask": "mask",
    "steps_computation_policy": "mask_policy",
    "taylorseer_order": "order",
    "dmd_history": "history",
}
"""cache-dit's names of the knobs, for whoever brings them."""


@dataclass(frozen=True)
class StepCache:
    """How step caching decides what to skip. The output changes: by how much is for `dit-patch bench step-cache`.

    At each forward the first `fn` blocks run. Where what they add to the hidden states differs from what they added in
    the last computed step of the same pass by less than `threshold` (mean |a - b| / mean |b|), the middle blocks are
    skipped and what they added last time is added again, or a forecast of it; then the last `bn` blocks run.

    Attributes:
        fn: first blocks that always run, at least 1. By default 8, or 0.4 of the blocks where those are fewer.
        bn: last blocks that always run.
        threshold: relative L1 difference below which a step is skipped; at 0 nothing is, at 1 and above every step.
        warmup: steps at the start of a generation that are computed whatever the difference.
        warmup_interval: with n > 1, only every n-th of them.
        max_cached: at most this many skipped steps in a generation and pass; None for no limit.
        max_continuous: at most this many in a row; None for no limit.
        max_accumulated: none skipped any more once the differences add up to this; None for no limit.
        calibrator: forecast what is added: "taylorseer", "foca" or "dmd"; None adds what was added last.
        order: of TaylorSeer's expansion (1 by default); more memory with each.
        history: steps that DMD looks back (6 by default).
        mask: which steps may be skipped (0) and which not (1), by step: "1110100..." or a list; or "slow", "medium",
            "fast", "ultra", which make one for the number of steps. It begins with 1.
        mask_policy: "dynamic" skips by difference where the mask says 0, "static" in any case.
        min_steps: generations with fewer steps are left uncached; by default what the model's spec says.
        release: give the memory back at the end of each generation, rather than keep it for the next.
    """

    fn: int | None = None
    bn: int = 0
    threshold: float = 0.08
    warmup: int = 8
    warmup_interval: int = 1
    max_cached: int | None = None
    max_continuous: int | None = None
    max_accumulated: float | None = None
    calibrator: str | None = None
    order: int | None = None
    history: int | None = None
    mask: str | tuple[int, ...] | None = None
    mask_policy: str = "dynamic"
    min_steps: int | None = None
    release: bool = False
    calibration: Calibration | None = field(default=None, compare=False, repr=False)
    """What `calibrate` found, where it made this."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", _mask(self.mask))
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if value is None and name in _OPEN:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise _wrong(name, value, f"expected a whole number of at least {least}")
        for name in ("threshold", "max_accumulated"):
            value = getattr(self, name)
            if value is None and name in _OPEN:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise _wrong(name, value, "expected a number of at least 0")
        for name, words in (("calibrator", CALIBRATORS), ("mask_policy", POLICIES)):
            value = getattr(self, name)
            if value not in words and not (value is None and name in _OPEN):
                raise _wrong(name, value, f"expected {one_of(words)}{suggest(str(value), words)}")
        if not isinstance(self.release, bool):
            raise _wrong("release", self.release, "expected True or False")
        for name, whose in (("order", "taylorseer"), ("history", "dmd")):
            if getattr(self, name) is not None and self.calibrator != whose:
                raise _wrong(name, getattr(self, name), f'goes only with calibrator="{whose}"')
        if self.mask_policy == "static" and self.mask is None:
            raise _wrong("mask_policy", "static", "needs a mask that says which steps to skip")

    @classmethod
    def of(cls, asked: StepCache | str | PathLike | Mapping[str, Any] | None) -> StepCache | None:
        """What the user asked for: a preset's name, a YAML file, a mapping of knobs (with `preset`), or a StepCache.

        Raises:
            StepCacheError: a preset, a knob or a value that does not exist.
        """
        if asked is None or asked is False:
            return None
        if isinstance(asked, cls):
            return asked
        if isinstance(asked, PathLike) or isinstance(asked, str) and Path(asked).suffix in _YAML:
            return cls.load(asked)
        if isinstance(asked, str):
            return _preset(asked)
        if not isinstance(asked, Mapping):
            raise StepCacheError(
                f"step_cache: expected a preset ({', '.join(PRESETS)}), a YAML file, a mapping of knobs or a "
                f"StepCache, not {quote(repr(asked))}"
            )
        knobs = dict(asked)
        base = _preset(knobs.pop("preset")) if "preset" in knobs else cls()
        for name in knobs:
            if name not in KNOBS:
                near = f"; here it is called `{_THEIRS[name]}`" if name in _THEIRS else suggest(str(name), KNOBS)
                raise StepCacheError(f"step_cache: no knob {quote(name)}{near}\n    Knobs: {', '.join(KNOBS)}.")
        return dataclasses.replace(base, **knobs)

    @classmethod
    def calibrate(
        cls,
        pipeline: Any,
        prompts: Sequence[str],
        target: str | None = None,
        *,
        ssim: float | None = None,
        **options: Any,
    ) -> StepCache:
        """The threshold that reaches a target on these prompts, from the residuals of one uncached run of each.

        Args:
            pipeline: a diffusers pipeline, not patched.
            prompts: what to generate with; a few that are typical.
            target: a speed-up of the whole generation, such as "1.5x"; predicted from the run's own timings.
            ssim: instead of `target`: the least structural similarity to the uncached frames, between 0 and 1. Found
                by generating again with a few thresholds.
            options: `step_cache`, what everything but the threshold is taken from (default "balanced"), `seed`, and
                what to call the pipeline with.

        Returns:
            A `StepCache` to give to `apply`; its `calibration` says what was predicted and measured.

        Raises:
            StepCacheError: the target cannot be reached; it says what can.
        """
        # What generates and measures is in a room above; its name is all that this one knows of it.
        calibration = import_module("dit_patch.bench.step_cache.calibrate")
        return calibration.calibrate(pipeline, prompts, target, ssim=ssim, **options)

    def blocks(self, count: int, where: str) -> tuple[int, int]:
        """The first and last blocks that always run, of a list of `count`.

        Raises:
            StepCacheError: no block would be left to skip, or some would run twice.
        """
        fn = min(8, max(1, round(0.4 * count))) if self.fn is None else self.fn
        if fn + self.bn < count:
            return fn, self.bn
        given = "" if self.fn is None else f"fn={self.fn} and "
        raise StepCacheError(
            f"{where} has {count} block{'s' if count != 1 else ''}, and {given}bn={self.bn} leave none to skip.\n"
            f"    fn + bn must be less than {count}."
            + (" Step caching has nothing to do on this model." if count < 2 else "")
        )

    def memory(self, nbytes: int, *, encoder: int = 0, passes: int = 2, itemsize: int = 2) -> int:
        """Bytes that the state of one block list takes at most, while a generation runs and until the next.

        Args:
            nbytes: of the hidden states, (batch, tokens, width) in their dtype; Wan 14B at 720p, 81 frames: 738 MiB.
            encoder: bytes of the encoder's hidden states, where the blocks return those too (HunyuanVideo).
            passes: of a step: 2 with classifier-free guidance, else 1.
            itemsize: bytes of one element, 2 for bfloat16. DMD keeps what it fits in complex128.
        """
        history = self.history or 6
        kept = {
            None: 1,
            "taylorseer": 2 * ((self.order or 1) + 1),
            "foca": 4,
            "dmd": history + 4 + (history - 1) * 16 / itemsize,
        }[self.calibrator]
        return int(passes * (nbytes + kept * (nbytes + encoder)))

    def save(self, path: str | PathLike) -> None:
        """Write the knobs to a YAML file, which `load` reads, and so does `--step-cache FILE`.

        Raises:
            StepCacheError: the file cannot be written, or its name does not end in .yaml or .yml.
        """
        label = f"step_cache: {quote(path, LONG)}"
        if Path(path).suffix not in _YAML:
            raise StepCacheError(f"{label}: expected a name that ends in .yaml")
        found = "".join(f"# {line}\n" for line in str(self.calibration or "").splitlines())
        about = f"# A step cache of dit_patch; it changes the output.\n{found}"
        try:
            with replacing(path) as draft:
                draft.write_text(about + yaml.safe_dump(self.as_dict(), sort_keys=False), encoding="utf-8")
        except OSError as error:
            raise StepCacheError(f"{label} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | PathLike) -> StepCache:
        """Read a file that `save` has written, or that somebody has: a mapping of knobs, with `preset` to start from.

        Raises:
            StepCacheError: there is no such file, it is no YAML, or it names a knob or a value that does not exist.
        """
        label = f"step_cache: {quote(path, LONG)}"
        try:
            knobs = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise StepCacheError(f"{label} cannot be read: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeError) as error:
            raise StepCacheError(f"{label} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(knobs, dict):
            raise StepCacheError(f"{label}: expected a mapping of knobs, such as `threshold: 0.1`")
        try:
            return cls.of(knobs)
        except StepCacheError as error:
            raise StepCacheError(f"{quote(path, LONG)}: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """Return the knobs that are not as they are by default, as YAML and JSON can hold them."""
        knobs = {name: getattr(self, name) for name in KNOBS}
        changed = {name: value for name, value in knobs.items() if value != _DEFAULTS[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}

    def __str__(self) -> str:
        """The knobs that matter, and the preset that they are of: balanced (threshold=0.15 warmup=8 ...)."""
        knobs = {"threshold": self.threshold, "warmup": self.warmup, **self.as_dict()}
        if isinstance(self.mask, tuple):
            knobs["mask"] = "".join(map(str, self.mask))
        words = " ".join(f"{name}={value}" for name, value in knobs.items())
        preset = next((name for name, preset in PRESETS.items() if preset == self), None)
        return words if preset is None else f"{preset} ({words})"


KNOBS = tuple(each.name for each in dataclasses.fields(StepCache) if each.name != "calibration")
_DEFAULTS = {each.name: each.default for each in dataclasses.fields(StepCache)}
_YAML = (".yaml", ".yml")
_WHOLE = {"fn": 1, "bn": 0, "warmup": 0, "warmup_interval": 1, "max_cached": 0, "max_continuous": 0, "order": 1,
          "history": 2, "min_steps": 0}  # fmt: skip
_OPEN = {"fn", "max_cached", "max_continuous", "max_accumulated", "calibrator", "order", "history", "min_steps"}


def _preset(name: Any) -> StepCache:
    if name in PRESETS:
        return PRESETS[name]
    raise StepCacheError(
        f"step_cache: no preset {quote(name)}{suggest(str(name), PRESETS)}\n"
        f"    Presets: {', '.join(PRESETS)}; or the name of a .yaml file."
    )


def _mask(given: Any) -> str | tuple[int, ...] | None:
    if given is None or given in MASKS:
        return given
    each = given if isinstance(given, str) else list(given) if isinstance(given, (list, tuple)) else None
    words = {"0": 0, "1": 1, 0: 0, 1: 1}
    if not each or any(isinstance(one, (bool, float)) or one not in words for one in each):
        near = suggest(given, MASKS) if isinstance(given, str) else ""
        raise _wrong("mask", given, f"expected {one_of(MASKS)}, or a 0 or 1 for each step{near}")
    mask = tuple(words[one] for one in each)
    if mask[0] != 1:
        raise _wrong("mask", given, "begins with 0, and the first step has nothing to reuse; begin with 1")
    return mask


def _wrong(name: str, value: Any, message: str) -> StepCacheError:
    return StepCacheError(f"step_cache: {name}={quote(repr(value))}: {message}")


PRESETS = {
    # FastVideo's published operating points on Wan 2.1 1.3B, 720p, 30 steps, L40S: -18 % wall time, SSIM 0.957 ...
    "quality": StepCache(threshold=0.08, calibrator="taylorseer"),
    # ... and -32 %.
    "balanced": StepCache(threshold=0.15, calibrator="taylorseer"),
    # SGLang's defaults for Wan 2.2 A14B, 40 steps, one H20: 2.13x, with no quality given.
    "performance": StepCache(fn=1, warmup=4, threshold=0.24, max_continuous=3, calibrator="taylorseer"),
}
