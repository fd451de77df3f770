"""What the results of one site depend on besides arguments: which modules, and the weights in them.

The rest of the world is compared once a forward, by `model_guards`. Weights and adapters are compared at each call,
since they may change within a forward: under offload, and where a model scales its adapters by an argument.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..upstream.torch_internals import buffers, fsdp2_modules, parameters
from .guards import AdapterGuard, TensorGuard, find_path, outermost
from .keys import PLAIN, Uncacheable

Named = tuple[dict, str, torch.Tensor]
"""A tensor with the group that holds it, and its name there."""


_UNSEEN = "what it depends on was just changed"


class SiteGuards:
    """What one site depends on, and whether its results can be kept at all.

    Args:
        modules: what computes the results, each with all below it.
        root: the model that they are in. A LoRA layer that stands around one of them there counts with it, as it may be
            merged into it.
        subtree: whether what is below the modules counts, too.
        parameters: single parameters that count, too: the group that holds each, and its name there.
        between: returns the modules that run between the model's arguments and the site, if its key has some of those.
        ancestors: modules that the site is in, if its key has arguments of the model; of these no more than how they
            are called and what they are set to.
        functions: functions and other objects that compute the results.
        methods: classes with the name of a method that does; of modules, all methods count.
    """

    def __init__(
        self,
        modules: Iterable[torch.nn.Module],
        root: torch.nn.Module,
        *,
        subtree: bool = True,
        parameters: Iterable[tuple[dict, str]] = (),
        between: Callable[[], Iterable[torch.nn.Module]] = tuple,
        ancestors: Iterable[torch.nn.Module] = (),
        functions: Iterable[Any] = (),
        methods: Iterable[tuple[type, str]] = (),
    ) -> None:
        self.modules, self.subtree, self.parameters = tuple(modules), subtree, tuple(parameters)
        self.between, self.ancestors, self.functions = between, tuple(ancestors), tuple(functions)
        self.methods = tuple(methods)
        #: The way to each of the modules.
        self.paths = [find_path(root, module) for module in self.modules]
        #: Why nothing can be kept, as the last look at the world has found.
        self.refusal: str | None = _UNSEEN
        #: Whether a hook reads the results of the site's own module.
        self.is_observed = False
        self.weights = WeightGuards(self)

    def __repr__(self) -> str:
        return f"<SiteGuards of {', '.join(type(module).__name__ for module in self.modules) or 'no module'}>"

    def forget(self) -> None:
        """Let go of what was found; until the next look at the world nothing is kept."""
        self.refusal = _UNSEEN
        self.weights.forget()

    def tops(self) -> list[torch.nn.Module]:
        """Return the modules, or what stands in their places around them now."""
        return [outermost(module, path[-1] if path else None) for module, path in zip(self.modules, self.paths)]

    def inside(self) -> list[torch.nn.Module]:
        """Return all modules that compute the results, each once."""
        tops = self.tops()
        return list(dict.fromkeys(each for top in tops for each in (top.modules() if self.subtree else (top,))))


class WeightGuards:
    """The weights and adapters of one site, looked at anew whenever one of them is not what it was."""

    def __init__(self, site: SiteGuards) -> None:
        self.site = site
        #: Further modules with weights: adapters outside of the model.
        self.others: Sequence[torch.nn.Module] = ()
        #: Plain attributes that are tensors: the namespace of each, and its name there.
        self.attributes: Sequence[tuple[dict, str]] = ()
        self._lock = threading.Lock()
        #: A number that changes whenever a weight does, once `look` was called where `still_hold` says no.
        self.number = 0
        #: Why nothing can be kept.
        self.refusal: str | None = None
        #: Tells whether no weight has changed.
        self.still_hold: Callable[[], bool] = bool  # which is False
        #: Where the tensors were at the last look.
        self._places: Sequence[tuple[dict, str]] = ()

    def __repr__(self) -> str:
        return f"<WeightGuards of {self.site!r}: number {self.number}>"

    def epoch(self) -> int:
        """Return a number that changes whenever a weight does.

        Raises:
            Uncacheable: weights are on the meta device, sharded, recorded by autograd, or cannot be followed.
        """
        if not self.still_hold():
            self.look()
        if self.refusal is not None:
            raise Uncacheable(self.refusal)
        if torch.is_grad_enabled():
            self.refuse_autograd()
        return self.number

    def refuse_autograd(self) -> None:
        """Raise Uncacheable where a weight takes part in autograd."""
        for group, name in self._places:
            if group[name].requires_grad:
                self.look_again()  # an optimizer may come next, and a fused one leaves no version behind
                raise Uncacheable("autograd is recording")

    def tensors(self) -> list[torch.Tensor]:
        """Return the weights and buffers that count."""
        return [tensor for _, _, tensor in self._named()]

    @property
    def are_parameters(self) -> bool:
        """Whether there are parameters among them."""
        return any(isinstance(tensor, torch.nn.Parameter) for tensor in self.tensors())

    def forget(self) -> None:
        """Let go of what was found; results before the next look are of another epoch."""
        with self._lock:
            self.others, self.attributes, self._places = (), (), ()
            self.still_hold = bool

    def look_again(self) -> None:
        """Have results before the next call be of another epoch."""
        self.still_hold = bool

    def look(self) -> None:
        """Find the weights anew; results before are of another epoch."""
        with self._lock:
            named = self._named()
            self._places = [(group, name) for group, name, _ in named]
            self.refusal = _why_not(named)
            self.number += 1
            self.still_hold = bool if self.refusal else self._guard(named)

    def _guard(self, named: Sequence[Named]) -> Callable[[], bool]:
        tensors, adapters = TensorGuard(named).still_holds, AdapterGuard(map(vars, self._all_modules()))
        return (lambda: tensors() and adapters.still_holds()) if adapters else tensors

    def _all_modules(self) -> list[torch.nn.Module]:
        return [*self.site.inside(), *self.others]

    def _named(self) -> list[Named]:
        groups = [read(module) for module in self._all_modules() for read in (parameters, buffers)]
        named = [(group, name, tensor) for group in groups for name, tensor in group.items()]
        named += [(group, name, group.get(name)) for group, name in (*self.site.parameters, *self.attributes)]
        return [each for each in named if isinstance(each[-1], torch.Tensor)]


def _why_not(tensors: Sequence[Named]) -> str | None:
    """Return why nothing can be kept that is computed with these; None if it can."""
    has_weights = False
    for _, _, tensor in tensors:
        has_weights = has_weights or isinstance(tensor, torch.nn.Parameter)
        if type(tensor) not in PLAIN:
            return f"weights of type {type(tensor).__qualname__}"
        if tensor.is_meta:
            return "weights on the meta device"
        if tensor.layout is not torch.strided:
            return f"weights with the layout {tensor.layout}"
        if tensor.is_inference():
            return "weights made under inference_mode have no version: changes in place would go unseen"
    if has_weights and _is_sharded(group for group, _, _ in tensors):
        return "its weights are sharded by FSDP2, where changes in a shard leave no version behind"
    return None


def _is_sharded(groups: Iterable[dict]) -> bool:
    """Return whether one of these is filled by `fully_shard` anew at each forward: same tensors, same versions."""
    sharded = fsdp2_modules()
    if sharded is None:
        return torch.distributed.is_initialized()
    asked = {id(group) for group in groups}
    # The root, which has most, comes last.
    return any(id(parameters(each)) in asked for module in reversed(sharded) for each in module.modules())
