"""What the handles of this process did, kept past the lives of their models, and told when the process ends.

A model holds its handle, and both go together: the journal keeps neither alive. It asks a handle for its rows one last
time when the handle is removed, when it is collected with its models, when the workers behind it are about to go, and
at exit, whichever comes first. A forked child tells only of what it did itself.

Knows nothing of how models are patched; `dit-patch run` and `--patch-report` write in it.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .. import _version
from . import rows as report
from .rows import Rows

if TYPE_CHECKING:
    from ..handle import Handle, Options
    from ..launch.workers import RemoteHandle

REFRESHED = 3.0
"""Seconds between two versions of a file that tells of a process which still runs."""

_PATIENCE = 5.0  # how long workers may take to answer, in seconds, where somebody waits for the program to end


class Kept:
    """One handle in the journal, that the journal does not hold."""

    def __init__(self, handle: Handle | RemoteHandle, *, remote: bool) -> None:
        from ..sites import layers

        self.options: Options = handle.options
        self.remote, self.removed = remote, False
        self.inherited: Rows | None = None  # what the process had done before it forked this one
        self._last: Rows | None = None
        self._handle = weakref.ref(handle)
        self._executor = weakref.ref(handle._executor) if remote else None
        self._tokens = dict(handle._tokens) if remote else {}
        self.hooks: list[Any] = []  # of torch, to go with the handle
        layers.install(handle, "remove", self._removing)
        if remote and callable(getattr(handle._executor, "shutdown", None)):
            layers.install(handle._executor, "shutdown", self._shutting_down)
        if not remote:
            handle._last_words = _LastWords(self, handle)

    def is_of(self, handle: Handle | RemoteHandle) -> bool:
        known = self._handle()
        return known is handle or (self.remote and self._tokens == getattr(handle, "_tokens", None))

    @property
    def living(self) -> Handle | RemoteHandle | None:
        """The handle, or another for the same workers."""
        executor = self._executor() if self._executor else None
        if self.remote and executor is not None:
            from ..launch.workers import RemoteHandle

            return RemoteHandle(executor, self._tokens, self.options)
        return self._handle()

    def rows(self) -> Rows:
        """What there is to report now, of this process."""
        self.ask()
        rows = self._last or Rows()
        return rows if self.inherited is None else rows.since(self.inherited)

    def ask(self) -> None:
        """Note what the handle says, if anybody can be asked."""
        if self.removed:
            return
        handle = self.living
        if handle is not None and not self.remote:
            self._last = Rows.of(handle)
        elif handle is not None:
            with suppress(Exception):  # the workers are gone, or busy
                _within(_PATIENCE, lambda: self.tell(Rows.of(handle)))

    def tell(self, rows: Rows) -> None:
        self._last = rows

    def fork(self) -> bool:
        """In a forked child: from here on count anew. False where there is nothing that this process could do."""
        if self.removed or self.remote or self._handle() is None:
            return False  # answers from a worker are for the parent
        self.inherited = Rows.of(self._handle())
        return True

    def _removing(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        if not self.remote:
            self.ask()  # counters stay, what is held does not
            self.removed = True
            for hook in self.hooks:
                hook.remove()
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        handle = self._handle()
        with suppress(Exception):
            if handle is not None:
                self.tell(Rows.of(handle))
        self.removed = True
        return result

    def _shutting_down(self, original: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        self.ask()
        return original(*args, **kwargs)


class _LastWords:
    """Part of a handle: when it is collected, and it is still whole, its rows go to the journal."""

    def __init__(self, kept: Kept, handle: Handle) -> None:
        self.kept, self.handle = kept, handle

    def __del__(self) -> None:
        if not self.kept.removed:
            with suppress(Exception):  # in the last moments of the interpreter everything may be missing
                self.kept.tell(Rows.of(self.handle))


class Journal:
    """What this process has to tell. There is one: `journal`."""

    def __init__(self) -> None:
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def keep(self, handle: Handle | RemoteHandle, *, refreshing: bool = False) -> None:
        """Report what this handle does; `refreshing`, also while it does, where there is a file (`record_in`)."""
        if any(kept.is_of(handle) for kept in self._kept):
            return
        kept = Kept(handle, remote=not hasattr(handle, "models"))
        self._kept.append(kept)
        if kept.remote:
            # Whoever registers last is called first: the executor ends its workers at exit, too.
            self._finish_at_exit()
        if refreshing:
            from ..sites.scope import Hook

            for model in handle.models.values():
                kept.hooks.append(model.register_forward_hook(Hook(self._forward_ended)))
        self._write_now()

    def note(self, what: str, state: str, instead_of: str = "") -> None:
        """A model of class `what` has come into this state, and is no more in the other."""
        if instead_of:
            self._models[what, instead_of] -= 1
        self._models[what, state] += 1
        if not self._written:
            self._write_now()

    def failed(self, what: str, message: str) -> None:
        """This could not be patched."""
        self._failures.setdefault((what, message), 0)
        self._failures[what, message] += 1
        self._write_now()

    def report_at_exit(self, path: str) -> None:
        """When the process ends, print the report (`-`) or write it to a file, as JSON if the name ends so.

        Of several ranks all but the first, and child processes, write to files of their own beside it.
        """
        self._path = path
        self._finish_at_exit()

    def record_in(self, folder: str) -> None:
        """From now on have a file on this process in `folder`, as JSON: after changes, now and then, and at the end."""
        if self._folder != folder:
            self._folder = folder
            self._file = os.path.join(folder, f"{os.getpid()}-{time.time_ns()}.json")
            self._finish_at_exit()

    @property
    def failures(self) -> tuple[tuple[str, str], ...]:
        """What could not be patched, each with the message."""
        return tuple(self._failures)

    @property
    def document(self) -> dict[str, Any]:
        """All that there is to tell, as JSON has it."""
        handles = []
        for kept in self._kept:
            rows = kept.rows()
            if kept.inherited is not None and not rows.anything:
                continue
            handles.append(
                {
                    "removed": kept.removed,
                    "sites": [{**asdict(row), "bypassed": dict(row.bypassed)} for row in rows.sites],
                    "steps": [{**asdict(row), "diffs": dict(row.diffs)} for row in rows.steps],
                    "report": _text(rows, kept),
                }
            )
        torch = sys.modules.get("torch")
        rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK")
        error = getattr(sys, "last_value", None)
        return {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "rank": int(rank) if rank and rank.isdigit() else None,
            "world_size": _world_size(),
            "argv": list(getattr(sys, "argv", [])),
            "python": platform.python_version(),
            "versions": {"dit_patch": _version(), "torch": str(getattr(torch, "__version__", "")) or None},
            "ended": self._ended,
            "uncaught": f"{type(error).__name__}: {error}" if self._ended and error is not None else None,
            "handles": handles,
            "failures": [{"what": what, "message": message} for what, message in self._failures],
            "models": [
                {"class": what, "state": state, "count": count}
                for (what, state), count in self._models.items()
                if count > 0
            ],
        }

    def finish(self) -> None:
        """Write everything down for good; only once."""
        if self._finished:
            return
        self._finished = self._ended = True
        try:
            document = self.document
        except Exception as error:  # an exit is no place to raise
            print(f"dit_patch: no report: {type(error).__name__}: {error}", file=sys.stderr)
            return
        if self._child and not _tells(document):
            return
        if self._file is not None:
            self._save(self._file, document, quiet=True)
        if self._path is not None:
            self._publish(document)

    def _publish(self, document: dict[str, Any]) -> None:
        if self._path == "-" or not self._save(own_path(self._path, child=self._child), document):
            print(text(document), file=sys.stderr, flush=True)

    def _save(self, path: str, document: dict[str, Any], *, quiet: bool = False) -> bool:
        try:
            save(path, document, text)
        except Exception as error:
            if not quiet:
                print(f"dit_patch: the report could not be written to `{path}`: {error}", file=sys.stderr)
            return False
        return True

    def _write_now(self) -> None:
        if self._file is None or self._finished:
            return
        self._written = time.monotonic()
        with suppress(Exception):
            document = self.document
            if _tells(document):
                self._save(self._file, document, quiet=True)

    def _forward_ended(self, *_: Any) -> None:
        if time.monotonic() - self._written > REFRESHED and not self._finished:
            self._write_now()

    def _begin(self) -> None:
        self._kept: list[Kept] = []
        self._models: Counter[tuple[str, str]] = Counter()
        self._failures: dict[tuple[str, str], int] = {}
        self._path: str | None = None
        self._folder: str | None = None
        self._file: str | None = None
        self._written = 0.0
        self._finished = self._ended = self._child = False

    def _finish_at_exit(self) -> None:
        atexit.unregister(self.finish)
        atexit.register(self.finish)
        process = sys.modules.get("multiprocessing.process")
        if process is not None and process.parent_process() is not None:
            self._child = True
            # Forked ones leave without running what atexit has, spawned ones run both.
            from multiprocessing.util import Finalize

            Finalize(None, self.finish, exitpriority=-1)

    def _forked(self) -> None:
        kept, path, folder = self._kept, self._path, self._folder
        self._begin()
        self._child = True
        with suppress(Exception):
            self._kept = [each for each in kept if each.fork()]
        if path is not None:
            self.report_at_exit(path)
        if folder is not None:
            self.record_in(folder)
        util = sys.modules.get("multiprocessing.util")
        if util is not None and (path is not None or folder is not None):
            # It forgets what was to be finalized only after this.
            util.register_after_fork(self, Journal._finish_at_exit)


def text(document: dict[str, Any]) -> str:
    """The report on one process, as it is read."""
    lines = [" ".join(("process", f"{document['pid']}{_rank(document)}:", *document["argv"]))[:160].rstrip()]
    for each in document["handles"]:
        lines.append(each["report"])
        if each["removed"]:
            lines.append("  (taken back before the process ended)")
    for each in document["failures"]:
        lines.append(f"NOT PATCHED: {each['what']}: {each['message']}")
    for each in document["models"]:
        if each["state"] != PATCHED:
            lines.append(f"{each['count']} {each['class'].rpartition('.')[2]}: {each['state']}")
    if not document["handles"] and not document["failures"] and not document["models"]:
        lines.append("nothing patched")
    if document["uncaught"]:
        lines.append(f"ended by {document['uncaught']}"[:300])
    elif not document["ended"]:
        lines.append(f"ended without its last word (killed?): this is up to {REFRESHED:.0f} s older than its end")
    return "\n".join(lines)


PATCHED = "patched"
NEVER_CALLED = "made, and never called (or compiled as a whole by torch.compile, which is left alone)"


def save(path: str, document: dict[str, Any], as_text: Callable[[dict[str, Any]], str]) -> None:
    """Write `document` to a file, whole or not at all: as JSON where its name ends so, else as text."""
    told = json.dumps(document, indent=1) if path.endswith(".json") else as_text(document)
    draft = f"{path}.{os.getpid()}"
    with open(draft, "w", encoding="utf-8") as file:
        file.write(told + "\n")
    os.replace(draft, path)


def own_path(path: str, *, child: bool = False) -> str:
    """The report's file of this process: `report.json`, or `report.rank1.json`, or a child's `report.pid42.json`."""
    if path == "-":
        return path
    stem, ending = os.path.splitext(path)
    rank = os.environ.get("RANK", "0")
    if (_world_size() or 1) > 1 and rank != "0":
        stem += f".rank{rank}"
    return f"{stem}.pid{os.getpid()}{ending}" if child else stem + ending


def _tells(document: dict[str, Any]) -> bool:
    return bool(document["handles"] or document["failures"] or document["models"])


def _rank(document: dict[str, Any]) -> str:
    if document["rank"] is None:
        return ""
    return f", rank {document['rank']}" + (f" of {document['world_size']}" if document["world_size"] else "")


def _world_size() -> int | None:
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() else None


def _text(rows: Rows, kept: Kept) -> str:
    if kept.remote and not rows.sites:
        return "dit_patch: patched in worker processes, which could not be asked any more what was saved"
    allowed = kept.options.max_bytes * (len(kept._tokens) or 1)
    return report.text(rows.sites, allowed, rows.nbytes, kept.options.step_cache, rows.steps)


def _within(seconds: float, act: Callable[[], Any]) -> None:
    """Do it, or give up after so long; at exit, when no more threads can be started, too."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        with _alarm(seconds):
            act()
        return
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, ring)
    theirs: Sequence[float] = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *theirs)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)


journal = Journal()
