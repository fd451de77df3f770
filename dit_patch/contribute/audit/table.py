"""`dit-patch audit --all`: every class of models of a library that can be built, a row each, in a process each."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import extras
from ...hosts import HOSTS
from ...outputs import replacing, write_errors
from .devices import Device
from .text import figure, share

SECONDS = 180
_HEAD = ("class", "spec", "weights", "repeats", "kernels", "copies", "waits", "patched", "what repeats most")


@dataclass(frozen=True)
class Outcome:
    """What came of one class: what `audit --json` prints, or why there is nothing."""

    name: str
    found: dict[str, Any] | None
    problem: str = ""

    def cells(self) -> list[str]:
        """Return the cells of its row."""
        short = self.name.rpartition(".")[2]
        if self.found is None:
            return [f"`{short}`", "", "", "", "", "", "", "", self.problem]
        plain, patched = self.found["plain"], self.found["patched"]
        total, repeats = plain["total"], plain["repeats"]
        left = None if patched is None else patched["repeats"]
        after = "" if left is None else (
            f"{share(left['milliseconds'], patched['total']['milliseconds'])}, "
            f"{figure(patched['total']['copies'])}, {figure(patched['total']['syncs'])}"
        )  # fmt: skip
        return [
            f"`{short}`",
            self.found["spec"] or "none",
            f"{self.found['weights'] / 1e9:.1f} billion" if self.found["is_full_size"] else "(the small model)",
            share(repeats["milliseconds"], total["milliseconds"]),
            f"{figure(repeats['kernels'])} of {figure(total['kernels'])}",
            figure(total["copies"]),
            figure(total["syncs"]),
            after,
            _most(plain),
        ]


def run(library: str, device: Device, out: Path | None, *, say: Callable[[str], None], as_json: bool = False) -> int:
    """Audit all classes, print the table (or JSON), and write it to `out`, a .md or a .json.

    Returns:
        The exit status: 1 where no class could be audited.

    Raises:
        DitPatchError: the library is not installed.
    """
    extras.require("auditing all its models", {library: library}, library)
    with redirect_stdout(sys.stderr):  # for what libraries print when they are imported
        names = list(class_names(library))
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2 * 2)) as pool:
        for number, outcome in enumerate(pool.map(lambda name: _audit(name, device), names), 1):
            outcomes.append(outcome)
            state = outcome.problem or " | ".join(filter(None, outcome.cells()[1:]))
            say(f"{number}/{len(names)} {outcome.name}: {state}")
    outcomes.sort(key=lambda each: (each.found is None, each.name.rpartition(".")[2]))
    content = [{"class": each.name, "audit": each.found, "problem": each.problem or None} for each in outcomes]
    table = "\n".join(_markdown(outcomes))
    if out is not None:
        with write_errors("--out", out), replacing(out) as draft:
            text = json.dumps(content, indent=1) if out.suffix == ".json" else table
            draft.write_text(f"{text}\n", encoding="utf-8")
    print(json.dumps(content, indent=1) if as_json else table)
    return int(all(each.found is None for each in outcomes))


def class_names(library: str) -> Iterator[str]:
    """Yield the dotted names of a library's classes of diffusion transformers."""
    host = HOSTS.get(library)
    if host is not None:
        importlib.import_module(host).prepare()
    package = importlib.import_module(
        "diffusers.models.transformers" if library == "diffusers" else "fastvideo.models.dits"
    )
    seen: set[type] = set()
    for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            module = importlib.import_module(each.name)
        except Exception:  # of a package that is not here
            continue
        for name, cls in vars(module).items():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__ or cls in seen:
                continue
            seen.add(cls)
            if re.search(r"(Transformer\w*(Model)?|WanModel|DiT\w*)$", name) and _is_whole_model(cls):
                yield f"{cls.__module__}.{name}"


def _is_whole_model(cls: type) -> bool:
    """Return whether the class is a model of its own, by what the library's models inherit from."""
    bases = {base.__name__ for base in cls.__mro__[1:]}
    return bool(bases & {"ModelMixin", "BaseDiT", "CachableDiT"})


def _audit(name: str, device: Device) -> Outcome:
    command = [sys.executable, "-W", "ignore", "-m", "dit_patch", "audit", name, "--json", "--device", device.name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Outcome(name, None, f"took more than {SECONDS} s")
    start = done.stdout.find("{\n")
    if done.returncode not in (0, 1) or start < 0:
        return Outcome(name, None, _reason(done.stderr))
    return Outcome(name, json.loads(done.stdout[start:]))


def _reason(text: str) -> str:
    """Return the first line of the command's message, which is its last."""
    lines = [line for line in text.splitlines() if line.startswith("dit-patch: ")]
    message = lines[-1] if lines else (text.strip().splitlines() or ["no output"])[-1]
    message = re.sub(r"^dit-patch: \w+: (`[^`]*`|[^:]*): (a small model was guessed, and does not run: )?", "", message)
    return message.replace("|", "\\|")[:160]


def _most(plain: dict[str, Any]) -> str:
    rows = [row for row in plain["rows"] if row["category"] in ("sizes", "steps", "passes")]
    worth: dict[str, float] = {}
    for row in rows:
        worth[row["stage"]] = worth.get(row["stage"], 0.0) + row["milliseconds"]
    best = sorted(worth, key=lambda each: -worth[each])[:3]
    total = plain["total"]["milliseconds"] or 1
    return ", ".join(f"`{each}` {worth[each] / total:.1%}" for each in best if worth[each] / total >= 0.0005)


def _markdown(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield "| " + " | ".join(_HEAD) + " |"
    yield "|" + "---|" * len(_HEAD)
    for each in outcomes:
        yield "| " + " | ".join(each.cells()) + " |"
