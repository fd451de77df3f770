"""Record the operations of forwards, each with the arguments of the model that its result depends on.

What depends on an argument is followed by storage: whatever is computed from it, or written into with it, also from
one forward to the next. A number on the host cannot be followed: all that comes after the program has read one from a
tensor may depend on it, and so may everything on an argument that is no tensor.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from ...memo.keys import flat
from ...memo.results import flatten, look_into
from ...upstream.torch_internals import storage_id
from . import operations
from .accelerator import AcceleratorTensor
from .operations import Operation, Work, tensors_in
from .transfers import Copy, Sync, is_on_device

_TORCH, _OURS = str(Path(torch.__file__).parent), str(Path(__file__).parents[2])
_CALLS = {torch_module.Module._call_impl.__code__}
_NOTHING: frozenset[str] = frozenset()


class Recorder:
    """Told of every operation, it keeps those of the forwards between `begin` and `end`.

    Args:
        model: the paths of whose submodules are told.
        digests: digest each result, but for those that depend on one of `changing`.
        changing: arguments known to be others in each forward.
    """

    def __init__(self, model: torch.nn.Module, *, digests: bool = False, changing: frozenset[str] = _NOTHING) -> None:
        self.operations: list[Operation] = []
        self.peak_nbytes = 0
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._digests, self._changing = digests, changing
        self._causes: dict[int, frozenset[str]] = {}
        self._storages: dict[int, weakref.ref] = {}
        self._nbytes: dict[int, int] = {}
        self._held = 0
        self._reads: set[str] = set()
        self._is_recording = False
        for tensor in (*model.parameters(), *model.buffers()):
            self._follow(tensor)

    def __repr__(self) -> str:
        return f"<Recorder: {len(self.operations)} operations>"

    def begin(self, arguments: Mapping[str, Any], *, keep: bool = True) -> None:
        """Begin a forward with these arguments, of which operations are kept, or only what they depend on."""
        self.operations, self._reads, self.peak_nbytes = [], set(), self._held
        given: dict[int, frozenset[str]] = {}  # two arguments may share their memory
        for name, value in arguments.items():
            tensors = list(leaves_of(value))
            for tensor in tensors:
                number = self._follow(tensor)
                given[number] = given.get(number, _NOTHING) | {name}
            if not tensors:
                self._reads.add(name)
        self._causes |= given
        self._is_recording = keep

    def end(self) -> list[Operation]:
        """End the forward, and return its operations."""
        self._is_recording = False
        return self.operations

    def operation(
        self, operation: Any, args: tuple, kwargs: dict, result: Any, copies: list[Copy], syncs: list[Sync]
    ) -> None:
        """An operation has run."""
        shapes_only = operations.reads_shapes_only(operation)
        inputs = [] if shapes_only else tensors_in((args, kwargs))
        causes = self._causes_of(inputs)
        outputs = tensors_in(result)
        if not operations.is_view(operation):
            for tensor in outputs:
                number = self._follow(tensor)
                self._causes[number] = self._causes.get(number, _NOTHING) | causes
        elif shapes_only:
            for tensor in outputs:
                self._follow(tensor)
        if not self._is_recording or (operations.is_view(operation) and not copies and not syncs):
            return
        self._reads |= self._causes_of(operations.told_to_host(operation, args, kwargs))
        self.operations.append(self._entry(operation, args, kwargs, result, causes, copies, syncs))

    def read(self, tensor: torch.Tensor, sync: Sync) -> None:
        """The host has read the whole tensor."""
        causes = self._causes_of([tensor])
        self._reads |= causes
        if self._is_recording:
            module, line = self._place()
            nbytes = tensor.numel() * tensor.element_size()
            copy = Copy(False, nbytes, line)
            entry = Operation("tolist", module, line, True, False, Work(0, nbytes, tensor.dtype), causes, _NOTHING)
            entry.copies, entry.syncs = [copy], [sync]
            entry.digest = _digest(tensor) if self._digests and not causes & self._changing else None
            self.operations.append(entry)

    def _entry(
        self,
        operation: Any,
        args: tuple,
        kwargs: dict,
        result: Any,
        causes: frozenset[str],
        copies: list[Copy],
        syncs: list[Sync],
    ) -> Operation:
        module, line = self._place()
        name = operations.name_of(operation)
        is_read = operations.is_read(operation)
        only_moves = bool(copies) and name in ("_to_copy", "copy_") and _keeps_dtype(name, args, result)
        is_kernel = not (is_read or only_moves)
        is_filling = name in ("fill_", "zero_") or operations.reads_shapes_only(operation)
        digest = None
        if self._digests and not causes & self._changing:
            digest = _digest(result)
        return Operation(
            name=name,
            module=module,
            line=line,
            on_device=any(is_on_device(each) for each in (*tensors_in(result), *tensors_in((args, kwargs)))),
            is_kernel=is_kernel,
            work=Work(
                flops=operations.flops(operation, args, kwargs, result) if is_kernel else 0,
                nbytes=operations.traffic(args, kwargs, result, is_filling=is_filling),
                dtype=operations.dtype_of(args, kwargs, result),
                is_product=operations.is_product(operation),
            ),
            causes=causes,
            reads=frozenset(self._reads),
            copies=copies,
            syncs=syncs,
            digest=digest,
        )

    def _causes_of(self, tensors: Sequence[torch.Tensor]) -> frozenset[str]:
        return _NOTHING.union(*(self._causes.get(storage_id(_numbers(each)), _NOTHING) for each in tensors))

    def _follow(self, tensor: torch.Tensor) -> int:
        """Return the number of the tensor's storage, and know of it until it is gone."""
        storage = _storage(tensor)
        number = storage_id(_numbers(tensor))
        if number not in self._storages:
            self._storages[number] = weakref.ref(storage, lambda _: self._forget(number))
            self._nbytes[number] = storage.nbytes() if is_on_device(tensor) else 0
            self._held += self._nbytes[number]
            self.peak_nbytes = max(self.peak_nbytes, self._held)
        return number

    def _forget(self, number: int) -> None:
        self._storages.pop(number, None)
        self._causes.pop(number, None)
        self._held -= self._nbytes.pop(number, 0)

    def _place(self) -> tuple[str, str]:
        """Return the path of the innermost module that runs, and the line outside of torch and of this package."""
        line = path = None
        frame = sys._getframe(2)
        while frame is not None and (line is None or path is None):
            code = frame.f_code
            if line is None and not _is_internal(code):
                line = f"{code.co_filename.rpartition('site-packages/')[2]}:{frame.f_lineno}"
            if path is None and code in _CALLS:
                path = self._paths.get(id(frame.f_locals.get("self")))
            frame = frame.f_back
        return path or "", line or "unknown"


_internal: dict[CodeType, bool] = {}


def _is_internal(code: CodeType) -> bool:
    known = _internal.get(code)
    if known is None:
        name = code.co_filename
        is_ours = name.startswith(_OURS) and not name.startswith(f"{_OURS}/functions")
        known = _internal[code] = name.startswith((_TORCH, "<")) or is_ours
    return known


def leaves_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of an argument, also those in containers of the library's own."""
    leaves, _ = flatten(value)
    for leaf in (part for each in leaves for part in look_into(each)):
        if isinstance(leaf, torch.Tensor):
            yield leaf


def content(value: Any) -> int:
    """Return a number for an argument: the same for the same content."""
    leaves, _ = flatten(value)
    parts = (part for each in leaves for part in look_into(each))
    return hash(tuple(_digest(part) if isinstance(part, torch.Tensor) else repr(part) for part in parts))


def _digest(result: Any) -> int:
    """Return a number for a result: the same for the same shapes and bits."""
    tensors = tensors_in(result)
    if not tensors:
        return hash(repr(result))
    return hash(tuple((tuple(each.shape), each.dtype, _bits(_numbers(each))) for each in tensors))


def _bits(tensor: torch.Tensor) -> int | tuple:
    if tensor.device.type == "meta" or not tensor.numel():
        return 0
    content = flat(tensor).view(torch.uint8)
    if tensor.device.type == "cpu":
        return hash(content.numpy().tobytes())
    # On a device: two sums, of all bytes and of all by their places, since copying everything would take too long.
    numbers = content.to(torch.int64)
    places = torch.arange(numbers.numel(), device=numbers.device) % 65_521 + 1
    return tuple(torch.stack([numbers.sum(), (numbers * places).sum()]).tolist())


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.inner if type(tensor) is AcceleratorTensor else tensor


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return _numbers(tensor).untyped_storage()


def _keeps_dtype(name: str, args: tuple, result: Any) -> bool:
    source = args[0] if name == "_to_copy" else args[1]
    return all(each.dtype == source.dtype for each in tensors_in(result))
