"""An accelerator for machines that have none: device `accel:0`, whose tensors are CPU tensors under another name.

    with Accelerator() as accelerator:
        model.to(DEVICE)
        model(x.to(DEVICE))
        print(accelerator)  # 1 copy to the device (96 bytes), 0 back, 0 syncs, 212 operations

Numbers are those of the CPU kernels. What costs time on a real device is counted: copies to it and from it, syncs, and
operations; what a real device refuses (tensors of two devices in one operation) is refused. Speed, streams, memory and
the bits of other kernels are not simulated. Knows nothing of dit_patch but the tensor types that it takes for plain.

With `largest=`, tensors of more numbers than that are shapes alone (they lie on torch's meta device), and so is what is
computed from them: a model of any size takes no memory, and small tables and indices still have their numbers.

Torch learns the device's name at the first use, for the rest of the process; everything else holds inside the `with`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from ...memo.context import transparent_modes
from ...memo.keys import PLAIN
from ...upstream.torch_internals import lift_only_cpu_tensors, no_torch_function, set_tensor_version
from . import transfers
from .autocast import Autocast
from .operations import name_of, tensors_in
from .shapes import Shapes, map_leaves, no_numbers
from .transfers import INDEXING, Copy, Sync, asking_line

NAME = "accel"
DEVICE = f"{NAME}:0"
SUPPORTED = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # recent torch only

_CPU = torch.device("cpu")
_COPYING = {"copy_", "_to_copy"}


@dataclass
class Counts:
    """What an accelerator did over some time; `operations` are those that ran on it, views included, by name."""

    copies: list[Copy] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)

    @property
    def uploads(self) -> list[Copy]:
        return [copy for copy in self.copies if copy.to_device]

    @property
    def downloads(self) -> list[Copy]:
        return [copy for copy in self.copies if not copy.to_device]

    def add(self, other: Counts) -> None:
        self.copies += other.copies
        self.syncs += other.syncs
        self.operations += other.operations

    def __str__(self) -> str:
        nbytes = sum(copy.nbytes for copy in self.uploads)
        uploads = f"{len(self.uploads)} {'copy' if len(self.uploads) == 1 else 'copies'} to the device ({nbytes} bytes)"
        return f"{uploads}, {len(self.downloads)} back, {len(self.syncs)} syncs, {self.operations.total()} operations"


class Observer(Protocol):
    """What is told of everything that runs while an accelerator is active, on it and on the host."""

    def operation(
        self, operation: Any, args: tuple, kwargs: dict, result: Any, copies: list[Copy], syncs: list[Sync]
    ) -> None:
        """An operation has run, with these copies and syncs."""

    def read(self, tensor: torch.Tensor, sync: Sync) -> None:
        """The host has read the whole tensor."""


class Accelerator(TorchDispatchMode):
    """The device, while it is there. `copies`, `syncs` and `operations` are counted since `take` was last called.

    Args:
        largest: how many numbers a tensor may have; larger ones are shapes alone. None: all have their numbers.
    """

    def __init__(self, largest: int | None = None) -> None:
        super().__init__()
        self.counts = Counts()
        self.shapes = None if largest is None else Shapes(largest)
        #: Is told of every operation.
        self.observer: Observer | None = None

    copies = property(lambda self: self.counts.copies)
    syncs = property(lambda self: self.counts.syncs)
    operations = property(lambda self: self.counts.operations)

    def take(self) -> Counts:
        """What was counted so far; counting starts again from nothing."""
        taken, self.counts = self.counts, Counts()
        return taken

    def __str__(self) -> str:
        return str(self.counts)

    def __enter__(self) -> Accelerator:
        if _state.active is not None:
            raise RuntimeError("there is one accelerator, and it is in use")
        _register()
        _state.active = self
        PLAIN.add(AcceleratorTensor)
        # Like `.data =` from CPU to CUDA: a module that moves keeps its parameters, with other storages.
        self._swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        # torch.tensor(..., device=) makes a CPU tensor and copies that, where it would have asked for device memory.
        self._lifts = lift_only_cpu_tensors(True)
        # An operation of the device's own, so that it is not taken apart into others, whose results have other strides.
        self._kernels = torch.library.Library("aten", "IMPL")
        self._kernels.impl("scaled_dot_product_attention", _never_reached, "PrivateUse1")
        self._autocast = Autocast(NAME)
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._autocast.remove()
        self._kernels._destroy()
        lift_only_cpu_tensors(self._lifts)
        torch.__future__.set_swap_module_params_on_conversion(self._swaps)
        PLAIN.discard(AcceleratorTensor)
        _state.active = None

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copies, syncs = len(self.copies), len(self.syncs)
        result = self._run(operation, args, kwargs)
        if self.observer is not None:
            self.observer.operation(operation, args, kwargs, result, self.copies[copies:], self.syncs[syncs:])
        return result

    def _run(self, operation: Any, args: tuple, kwargs: dict) -> Any:
        tensors = tensors_in((args, kwargs))
        ours = [tensor for tensor in tensors if type(tensor) is AcceleratorTensor]
        device = kwargs.get("device")
        on_device = bool(ours) if device is None else device.type == NAME
        if not ours and not on_device:
            return self._compute(operation, args, kwargs)
        name = name_of(operation)
        if ours and name not in _COPYING:
            _refuse_strangers(name, args, tensors)
        self._count(name, args, kwargs, on_device)
        seen = map_leaves(_as_the_cpu_sees_it, args), map_leaves(_as_the_cpu_sees_it, kwargs)
        result = self._compute(operation, *seen)
        if not on_device or (name == "copy_" and result is args[0]):
            return result
        written = {id(tensor.inner): tensor for tensor in ours}
        return map_leaves(lambda value: _as_the_device_sees_it(value, written), result)

    def _compute(self, operation: Any, args: tuple, kwargs: dict) -> Any:
        return operation(*args, **kwargs) if self.shapes is None else self.shapes.run(operation, args, kwargs)

    def _count(self, name: str, args: tuple, kwargs: dict, on_device: bool) -> None:
        self.operations[name] += 1
        self.copies.extend(transfers.copies(name, args, on_device))
        self.syncs.extend(transfers.syncs(name, args, kwargs))

    def wait(self, operation: str) -> None:
        """Count a sync."""
        self.syncs.append(Sync(operation, asking_line()))

    def read(self, tensor: AcceleratorTensor) -> None:
        """Count the sync of reading a whole tensor."""
        self.wait("tolist")
        if self.observer is not None:
            self.observer.read(tensor, self.syncs[-1])


class AcceleratorTensor(torch.Tensor):
    """A tensor on the device. `inner` is the CPU tensor that holds its numbers.

    Views share their base's version counter, as torch gives it to views of any tensor, and `untyped_storage()` is that
    of the numbers: what holds of a tensor's identity elsewhere holds here.
    """

    __torch_function__ = no_torch_function()
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> AcceleratorTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(DEVICE),
        )
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise RuntimeError(f"{operation} on a tensor of the simulated accelerator, outside of `with Accelerator():`")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        if _state.active is not None:
            _state.active.read(self)
        if self.inner.device.type == "meta":
            raise no_numbers(self)
        return self.inner.tolist()

    def numpy(self, **options: Any):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")

    def _set_data(self, data: AcceleratorTensor) -> None:
        torch.Tensor.data.__set__(self, data)
        self.inner = data.inner

    data = property(torch.Tensor.data.__get__, _set_data)

    def __repr__(self, **options: Any) -> str:
        return f"{type(self).__name__}({self.inner!r})"


def to_accelerator(model: torch.nn.Module) -> torch.nn.Module:
    """Move parameters, which stay the same objects, and buffers there. Tensors in plain attributes stay behind."""
    return _move(model, DEVICE)


def to_cpu(model: torch.nn.Module) -> torch.nn.Module:
    """The way back, which has to be taken inside the `with` too."""
    return _move(model, "cpu")


def _move(model: torch.nn.Module, device: str) -> torch.nn.Module:
    versions = [(parameter, parameter._version) for parameter in model.parameters() if not parameter.is_inference()]
    model.to(device)
    for parameter, version in versions:
        # `.data =` leaves the version alone; the swap that stands for it here does not.
        set_tensor_version(parameter, version)
    return model


def numbers(value: Any) -> Any:
    """`value` with the numbers of its tensors on the device as CPU tensors; counts as nothing."""
    return map_leaves(lambda item: item.inner if type(item) is AcceleratorTensor else item, value)


def _refuse_strangers(name: str, args: tuple, tensors: list[torch.Tensor]) -> None:
    """Of CPU tensors, an operation on the device takes those of one number, and positions to index with."""
    strangers = [tensor for tensor in tensors if tensor.dim() and type(tensor) is not AcceleratorTensor]
    if name in INDEXING and type(args[0]) is AcceleratorTensor:
        strangers = [tensor for tensor in strangers if not any(tensor is index for index in args[1])]
    if strangers:
        found = ", ".join(f"{tensor.device} {tuple(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {found}")


def _as_the_cpu_sees_it(value: Any) -> Any:
    if type(value) is AcceleratorTensor:
        return value.inner
    return _CPU if isinstance(value, torch.device) and value.type == NAME else value


def _as_the_device_sees_it(value: Any, written: dict[int, AcceleratorTensor]) -> Any:
    """A CPU result as a tensor of the device: the very argument that was written into, where that is the result."""
    if not isinstance(value, torch.Tensor):
        return value
    tensor = written.get(id(value))
    if tensor is None:
        # A conjugate view carries a flag that the wrapper would not have.
        return AcceleratorTensor(value.resolve_conj().resolve_neg())
    if tensor.shape != value.shape or tensor.stride() != value.stride():
        raise NotImplementedError("a change of a tensor's shape in place is not simulated")
    return tensor


transparent_modes.add(Accelerator)


class _State:
    active: Accelerator | None = None
    registered = False


_state = _State()


def _register() -> None:
    """Tell torch of the device, which answers as available only while an `Accelerator` is active."""
    if _state.registered:
        return

    class Module(backend_registration._DummyBackendModule):
        def is_available(self) -> bool:
            return _state.active is not None

        def device_count(self) -> int:
            return int(self.is_available())

        def get_rng_state(self, device: Any = None) -> torch.Tensor:
            return torch.get_rng_state()

        def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
            """Random numbers are the CPU's, and so is their state, which torch sets back itself."""

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16, torch.float32]

    class Hook(backend_registration._DummyPrivateUse1Hook):
        def is_available(self) -> bool:
            return _state.active is not None

    backend_registration._setup_privateuseone_for_python_backend(NAME, Module(), Hook())
    _state.registered = True


def _never_reached(*args: Any, **kwargs: Any):
    raise AssertionError("the accelerator's kernels are the CPU's, called by the dispatch mode")
