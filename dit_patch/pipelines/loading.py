"""Loads a diffusers pipeline for a command line: a folder or hub id, a dtype, a device; and what to do if it fails.

Knows nothing of patches. The hub's own errors are a page of traceback each; here every one becomes a sentence that says
what was asked for, what went wrong, and how to do it without network.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import extras
from ..errors import DitPatchError, quote, suggest

DTYPES = ("bfloat16", "float16", "float32", "float64")
_NEEDED = {"diffusers": "diffusers", "transformers": "transformers", "accelerate": "accelerate"}
_REACHED_NOTHING = {
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "Timeout",
    "NetworkError",
}


def dtype(words: str | Iterable[str], flag: str = "--dtype") -> torch.dtype | dict[str, torch.dtype]:
    """A dtype by its name in torch; or one for each component, from `NAME=DTYPE` words, with or without one for all.

    Raises:
        DitPatchError: torch has no such dtype to load weights in.
    """
    found: dict[str, torch.dtype] = {}
    for word in [words] if isinstance(words, str) else words:
        component, _, name = word.rpartition("=")
        found[component or "default"] = one_dtype(name, flag, word)
    return found["default"] if set(found) == {"default"} else found


def one_dtype(name: str, flag: str = "--dtype", word: str | None = None) -> torch.dtype:
    """A floating point dtype by its name in torch; `word` is what the user wrote, where that is more.

    Raises:
        DitPatchError: torch has no such dtype to load weights in.
    """
    kind = getattr(torch, name, None)
    if isinstance(kind, torch.dtype) and kind.is_floating_point:
        return kind
    why = "is not a floating point dtype" if isinstance(kind, torch.dtype) else "is no dtype of torch"
    raise DitPatchError(f"{flag}: {quote(word or name)} {why}{suggest(name, DTYPES)}\n    Usual: {', '.join(DTYPES)}.")


def device(word: str | None, flag: str = "--device") -> torch.device:
    """A device that is there; where none is said, the GPU if there is one.

    Raises:
        DitPatchError: torch has no such device, or it is not on this machine.
    """
    word = word or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(word)
    except RuntimeError as error:
        raise DitPatchError(
            f"{flag}: {quote(word)} is no device of torch{suggest(word, ('cpu', 'cuda', 'mps', 'xpu'))}"
        ) from error
    try:
        torch.empty(1, device=found).cpu()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DitPatchError(f"{flag}: {quote(word)} cannot be used on this machine: {reason}") from error
    return found


def pipeline_class(model: str, revision: str | None = None) -> type | None:
    """The class of a pipeline by its `model_index.json` alone, before any weights are read; None where it is unusual.

    Raises:
        DitPatchError: there is no pipeline to be had.
    """
    extras.require("loading a pipeline", _NEEDED, "generate")
    import diffusers

    with _explained(model):
        index = diffusers.DiffusionPipeline.load_config(_place(model), **_asked(revision=revision))
    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) else None


def load(
    model: str,
    dtype: torch.dtype | dict[str, torch.dtype],
    *,
    variant: str | None = None,
    revision: str | None = None,
) -> Any:
    """The pipeline, on the CPU.

    Raises:
        DitPatchError: it cannot be loaded; the message says why, and what to do without network.
    """
    cls = pipeline_class(model, revision)
    # diffusers imports ftfy where it is there, and fails at the first prompt where it is not.
    if cls is not None and hasattr(sys.modules[cls.__module__], "is_ftfy_available"):
        extras.require(cls.__name__, {"ftfy": "ftfy"}, "generate")
    from diffusers import DiffusionPipeline

    with _explained(model), warnings.catch_warnings():
        # `dtype`, as newer versions would rather have it, says nothing to older ones.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        return DiffusionPipeline.from_pretrained(
            _place(model), torch_dtype=dtype, **_asked(variant=variant, revision=revision)
        )


def _asked(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _place(model: str) -> str:
    """Where to load from: what looks like a path is not asked of the hub.

    Raises:
        DitPatchError: it looks like a path and there is none.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise DitPatchError(f"--model: {quote(model)} is a file, and not the folder of a saved pipeline{_LOCAL}")
    if model.startswith((".", "~", os.sep)) or model.count("/") != 1 and os.sep in model:
        raise DitPatchError(f"--model: {quote(model)}: there is no such folder{_LOCAL}")
    return model


_LOCAL = (
    "\n    A whole one, with model_index.json, comes from `hf download ID --local-dir DIR` on a machine with network, "
    "or from pipeline.save_pretrained(DIR)."
)


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Whatever loading raises, as one error in this project's words."""
    try:
        yield
    except DitPatchError:
        raise
    except Exception as error:
        raise DitPatchError(_explanation(model, error)) from error


def _explanation(model: str, error: Exception) -> str:
    """What went wrong and what to do: by the kinds of error, which the hub's clients agree on, not by their texts."""
    kinds = {cls.__name__ for each in _chain(error) for cls in type(each).__mro__}
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    here = f"--model: {quote(model)} cannot be loaded: "
    if isinstance(error, ImportError):
        return f"{here}{said}"
    if Path(model).expanduser().is_dir():
        return f"{here}{said}{_LOCAL}"
    offline = (
        f"\n    Offline: `hf download {model} --local-dir DIR` on a machine with network, bring DIR here, and say "
        "--model DIR.\n    What is in this machine's cache already is used without network under HF_HUB_OFFLINE=1."
    )
    if "GatedRepoError" in kinds:
        page = f"https://huggingface.co/{model}"
        return f"{here}it is gated. Accept its terms at {page}, then `hf auth login`, or set HF_TOKEN.{offline}"
    if "RevisionNotFoundError" in kinds:
        return f"{here}the hub has no such --revision of it.{offline}"
    if "RepositoryNotFoundError" in kinds:
        return (
            f"{here}the hub has no repository of that name, or only for those who are logged in (`hf auth login`), and "
            f"there is no such folder here.{offline}"
        )
    if kinds & _REACHED_NOTHING:
        how = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
        return f"{here}{how}, it is not in this machine's cache, and there is no such folder here.{offline}"
    if "EntryNotFoundError" in kinds:
        return f"{here}it lacks a file that a diffusers pipeline has: {said}{offline}"
    if "HTTPError" in kinds or "HfHubHTTPError" in kinds:
        return f"{here}the hub refused: {said}{offline}"
    return f"{here}{said}{offline}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all that led to it; diffusers puts one of its own around the hub's."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__
