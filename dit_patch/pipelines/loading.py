"""Load a diffusers pipeline for a command line, from a folder or the hub, and read its dtypes and device.

The hub's own errors are a page of traceback each. Here every one becomes a message that says what was asked for, what
went wrong, and how to do it without network. This module knows nothing of patches.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .. import extras
from ..errors import DitPatchError, quote, suggest

DTYPES = ("bfloat16", "float16", "float32", "float64")
_NEEDED = {"diffusers": "diffusers", "transformers": "transformers", "accelerate": "accelerate"}
_UNREACHABLE = {
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
    """Return a dtype by its name in torch, or a dtype for each component from `NAME=DTYPE` words.

    A word without NAME is for all other components.

    Raises:
        DitPatchError: torch has no such dtype to load weights in.
    """
    dtypes: dict[str, torch.dtype] = {}
    for word in [words] if isinstance(words, str) else words:
        component, _, name = word.rpartition("=")
        dtypes[component or "default"] = one_dtype(name, flag, word)
    return dtypes["default"] if set(dtypes) == {"default"} else dtypes


def one_dtype(name: str, flag: str = "--dtype", word: str | None = None) -> torch.dtype:
    """Return a floating point dtype by its name in torch; `word` is what the user wrote, if that is more.

    Raises:
        DitPatchError: torch has no such dtype to load weights in.
    """
    dtype = getattr(torch, name, None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    why = "is not a floating point dtype" if isinstance(dtype, torch.dtype) else "is no dtype of torch"
    raise DitPatchError(f"{flag}: {quote(word or name)} {why}{suggest(name, DTYPES)}\n    Usual: {', '.join(DTYPES)}.")


def device(word: str | None, flag: str = "--device") -> torch.device:
    """Return the device of that name, which was tried; by default the GPU if there is one.

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


TRAINED_EXAMPLE = "shapes"
"""What is said for the small trained pipeline that comes with dit_patch, in the place of a folder or a hub id."""


def call_defaults(model: str) -> dict[str, Any]:
    """Return what a pipeline is called with where nothing else is said: the sizes that the trained example knows."""
    if model != TRAINED_EXAMPLE:
        return {}
    extras.require("a pipeline", _NEEDED, "generate")
    from . import trained_example

    return dict(trained_example.CALL)


def read_index(model: str, revision: str | None = None) -> dict[str, Any]:
    """Return a pipeline's `model_index.json`, which names its classes; no weights are read.

    Raises:
        DitPatchError: there is no such pipeline, or it cannot be reached.
    """
    extras.require("loading a pipeline", _NEEDED, "generate")
    if model == TRAINED_EXAMPLE:
        return {"_class_name": "WanPipeline"}
    import diffusers

    with _explained(model):
        return diffusers.DiffusionPipeline.load_config(_folder_or_id(model), **_without_none(revision=revision))


def pipeline_class(index: Mapping[str, Any]) -> type | None:
    """Return the class of the pipeline with that index; None if it is not one of diffusers'."""
    return _class_of("diffusers", index.get("_class_name"))


def model_classes(index: Mapping[str, Any]) -> list[type]:
    """Return the classes of the models of the pipeline with that index; none where one is not of a known library."""
    classes: list[type] = []
    for component in index.values():
        if not isinstance(component, (list, tuple)) or component[0] is None:
            continue
        library, name = component
        cls = _class_of(library, name) if library in ("diffusers", "transformers") else None
        if cls is None:
            return []
        classes += [cls] if issubclass(cls, torch.nn.Module) else []
    return classes


def load(
    model: str,
    dtype: torch.dtype | dict[str, torch.dtype],
    *,
    variant: str | None = None,
    revision: str | None = None,
) -> Any:
    """Load the pipeline to the CPU; the trained example is float32 whatever `dtype` is.

    Raises:
        DitPatchError: it cannot be loaded; the message says why, and what to do without network.
    """
    cls = pipeline_class(read_index(model, revision))
    # diffusers imports ftfy where it is there, and fails at the first prompt where it is not.
    if cls is not None and hasattr(sys.modules[cls.__module__], "is_ftfy_available"):
        extras.require(cls.__name__, {"ftfy": "ftfy"}, "generate")
    if model == TRAINED_EXAMPLE:
        return _load_trained_example()
    from diffusers import DiffusionPipeline

    with _explained(model), warnings.catch_warnings():
        # Newer versions prefer `dtype`, which older ones do not know.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        return DiffusionPipeline.from_pretrained(
            _folder_or_id(model), torch_dtype=dtype, **_without_none(variant=variant, revision=revision)
        )


def _load_trained_example() -> Any:
    from . import trained_example

    try:
        return trained_example.pipeline()
    except Exception as error:  # of diffusers or transformers: it was saved by later ones than the oldest supported
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DitPatchError(
            f"--model: {quote(TRAINED_EXAMPLE)}, the small trained pipeline, cannot be loaded by the versions of "
            f"diffusers and transformers that are installed: {quote(reason, 200)}"
        ) from error


def _class_of(library: str, name: Any) -> type | None:
    found = getattr(import_module(library), name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) else None


def _without_none(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _folder_or_id(model: str) -> str:
    """Return the folder or the hub id to load from; what looks like a path is not looked for on the hub.

    Raises:
        DitPatchError: it looks like a path, and there is no such folder.
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
    """Turn whatever loading raises into a `DitPatchError` with an explanation."""
    try:
        yield
    except DitPatchError:
        raise
    except Exception as error:
        raise DitPatchError(_explanation(model, error)) from error


def _explanation(model: str, error: Exception) -> str:
    """Return what went wrong and what to do, by the names of error classes, which the hub's clients agree on."""
    kinds = {cls.__name__ for each in _chain(error) for cls in type(each).__mro__}
    message = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    start = f"--model: {quote(model)} cannot be loaded: "
    if isinstance(error, ImportError):
        return f"{start}{message}"
    if Path(model).expanduser().is_dir():
        return f"{start}{message}{_LOCAL}"
    offline = (
        f"\n    Offline: `hf download {model} --local-dir DIR` on a machine with network, bring DIR here, and say "
        "--model DIR.\n    What is in this machine's cache already is used without network under HF_HUB_OFFLINE=1."
    )
    if "GatedRepoError" in kinds:
        page = f"https://huggingface.co/{model}"
        return f"{start}it is gated. Accept its terms at {page}, then `hf auth login`, or set HF_TOKEN.{offline}"
    if "RevisionNotFoundError" in kinds:
        return f"{start}the hub has no such --revision of it.{offline}"
    if "RepositoryNotFoundError" in kinds:
        return (
            f"{start}the hub has no repository of that name, or only for those who are logged in (`hf auth login`), "
            f"and there is no such folder here.{offline}"
        )
    if kinds & _UNREACHABLE:
        how = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
        return f"{start}{how}, it is not in this machine's cache, and there is no such folder here.{offline}"
    if "EntryNotFoundError" in kinds:
        return f"{start}it lacks a file that a diffusers pipeline has: {message}{offline}"
    if "HTTPError" in kinds or "HfHubHTTPError" in kinds:
        return f"{start}the hub refused: {message}{offline}"
    return f"{start}{message}{offline}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and all that caused it: diffusers wraps the hub's errors into its own."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__
