"""One look at the world per forward: everything that results of a model's sites depend on, as one number.

What is not an argument and not a weight is compared with what was found at the last look, once for all sites:
structure, hooks, attributes, classes, numerics. Any difference is another epoch, with other results. What cannot be
compared, such as a hook, makes the sites that it concerns step aside, with the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import FunctionType, MethodType
from typing import Any

import torch

from ..upstream.torch_internals import buffers, children, forward_hooks, forward_pre_hooks, global_hooks, parameters
from .guards import (
    AttributeGuard,
    CellGuard,
    ContainerGuard,
    ForwardGuard,
    FunctionGuard,
    Guard,
    HookGuard,
    LooseTensorGuard,
    MembersGuard,
    ModuleGuard,
    NamesGuard,
    NumericsGuard,
    PartialGuard,
    PlaceGuard,
    TypeGuard,
)
from .reachable import Reachable, merged
from .site_guards import SiteGuards

HOOKED_INSIDE = "a hook is registered on a submodule, and a hit would skip it"
HOOKED_BETWEEN = "a hook stands between the model's arguments and the site"
HOOKED_GLOBALLY = "a hook is registered on all modules, and a hit would skip it"
OTHER_FORWARD = "a forward was replaced by a function that cannot be seen through"
OPAQUE = "it depends on an array or a context variable, whose changes cannot be seen"
TRAINING = "the module is in training mode; call `.eval()`"


class ModelGuards:
    """The guards of one model's sites, made anew whenever one of them does not hold any more.

    Args:
        root: the model.
        is_own_hook: tells hooks that do not count, since they are ours.
        foreign_forwards: returns what a call of a module's forward goes through besides its class's forward and hooks
            that change nothing. It is also told whether a layer is on the module itself, below all hooks.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        is_own_hook: Callable[[Any], bool] = lambda hook: False,
        foreign_forwards: Callable[[torch.nn.Module, bool], Iterable[Any]] = lambda module, is_own: (),
    ) -> None:
        self.root, self.is_own_hook, self.foreign_forwards = root, is_own_hook, foreign_forwards
        self.sites: list[SiteGuards] = []
        self.epoch = 0
        self._forward = type(root).forward
        self._checks: Sequence[Callable[[], bool]] = (bool,)  # which is False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<ModelGuards of {type(self.root).__name__}: epoch {self.epoch}, {len(self.sites)} sites>"

    def add(self, site: SiteGuards) -> None:
        """Look at what a site depends on, too."""
        self.sites.append(site)
        self.forget()

    def drop_replaced(self) -> None:
        """Look no longer at what sites depend on whose modules are not in the model any more."""
        tree = set(self.root.modules())
        self.sites = [site for site in self.sites if all(module in tree for module in site.modules)]
        self.forget()

    def look(self) -> int:
        """Return a number that changes whenever anything that counts has changed."""
        if not self._holds():
            self._look()
        return self.epoch

    def _holds(self) -> bool:
        try:
            for still_holds in self._checks:
                if not still_holds():
                    return False
        except Exception:  # what is looked at is other people's, and another thread may be changing it
            return False
        return True

    def forget(self) -> None:
        """Let go of what was found; results before the next look are of another epoch."""
        with self._lock:
            self._checks = (bool,)
            for site in self.sites:
                site.forget()

    def _look(self) -> None:
        with self._lock:
            self.epoch += 1
            try:
                self._checks = tuple(guard.still_holds for guard in self._guards())
            except Exception as error:  # as where a weak proxy has lost what it stood for; the model may not need it
                self._checks = (bool,)
                for site in self.sites:
                    site.refusal = f"what it depends on cannot be looked at ({type(error).__name__}: {error})"

    def _guards(self) -> list[Guard]:
        world = _World(self)
        for site in self.sites:
            world.add(site)
        found = world.found
        return [
            HookGuard(world.hooks.values()),
            TypeGuard(world.modules),
            NamesGuard(world.spaces),
            AttributeGuard(world.holders),
            MembersGuard([*world.groups, *world.families, *found.classes]),
            ContainerGuard(found.containers),
            CellGuard(found.cells),
            FunctionGuard(found.functions),
            PartialGuard(found.partials),
            LooseTensorGuard(found.tensors),
            ModuleGuard(world.families),
            PlaceGuard(self._places()),
            ForwardGuard(self.root),
            NumericsGuard(),
        ]

    def _places(self) -> Iterable[tuple[dict, str]]:
        """Return where the modules of the sites stand, and all that they are in, each once."""
        steps = (step for site in self.sites for path in site.paths for step in path)
        return {(id(family), name): (family, name) for family, name in steps}.values()

    def has_foreign(self, hooks: Mapping[int, Callable]) -> bool:
        """Return whether there is a hook among these that is not ours."""
        return any(not self.is_own_hook(hook) for hook in hooks.values())

    @property
    def has_other_forward(self) -> bool:
        """Whether the model's class has got another forward."""
        return type(self.root).forward is not self._forward


class _World:
    """What was found in one look, of all sites."""

    def __init__(self, guards: ModelGuards) -> None:
        self.guards = guards
        self.found = Reachable(set(guards.root.modules()))
        self.modules: dict[torch.nn.Module, None] = {}
        self.hooks: dict[int, Mapping] = {id(each): each for each in global_hooks()}

    def __repr__(self) -> str:
        return f"<_World of {len(self.modules)} modules>"

    def add(self, site: SiteGuards) -> None:
        """Collect what one site depends on, and find out whether its results can be kept."""
        inside, between = site.inside(), [*site.between()]
        own = {*site.tops(), *site.modules}
        below_hooks = () if site.ancestors else own
        forwards = [
            each
            for module in (*inside, *between, *site.ancestors)
            for each in self.guards.foreign_forwards(module, module in below_hooks)
        ]
        for module in (*inside, *between, *site.ancestors):
            if module is not self.guards.root or module in own:  # of the model, no more than how it is called
                self._add_module(module)
        for each in (*site.functions, *forwards):
            self.found.add(each)
        for cls, name in site.methods:
            self.found.add_method(cls, name)
        reached = self._reached(inside, (*site.functions, *forwards))
        outside = list(dict.fromkeys(each for module in reached.modules for each in module.modules()))
        for module in outside:
            self._add_module(module)
        site.weights.look_again()
        site.weights.others = outside
        site.weights.attributes = [place for module in (*inside, *outside) for place in self._tensors(module)]
        below = [module for module in (*inside, *outside) if module not in own]
        within = [read(module) for module in below for read in (forward_hooks, forward_pre_hooks)]
        around = [read(module) for module in between for read in (forward_hooks, forward_pre_hooks)]
        if site.ancestors:
            ancestors = [module for module in site.ancestors if module is not self.guards.root]
            around += [forward_pre_hooks(module) for module in (*ancestors, *own)]
        observing = [forward_hooks(module) for module in own]
        self.hooks |= {id(each): each for each in (*within, *around, *observing)}
        site.is_observed = any(map(self.guards.has_foreign, (*observing, *global_hooks())))
        site.refusal = self._refusal(site, within, around, forwards)
        if reached.is_opaque and site.refusal is None:
            site.refusal = OPAQUE

    def _refusal(
        self, site: SiteGuards, within: Iterable[Mapping], around: Iterable[Mapping], forwards: Iterable[Any]
    ) -> str | None:
        has_foreign = self.guards.has_foreign
        if any(map(has_foreign, global_hooks())):
            return HOOKED_GLOBALLY
        if any(map(has_foreign, within)):
            return HOOKED_INSIDE
        if any(map(has_foreign, around)):
            return HOOKED_BETWEEN
        if not all(map(_can_be_compared, forwards)) or (site.ancestors and self.guards.has_other_forward):
            return OTHER_FORWARD
        if any(module.training for module in site.modules) and site.weights.are_parameters:
            return TRAINING
        return None

    def _reached(self, inside: Iterable[torch.nn.Module], functions: Iterable[Any]) -> Reachable:
        """Return what these modules and functions alone reach: modules that are not in the model, say."""
        found = Reachable(self.found.tree)
        for module in inside:
            found.add_module(module, is_model=module is self.guards.root)
        for each in functions:
            found.add(each)
        return found

    def _add_module(self, module: torch.nn.Module) -> None:
        self.modules.setdefault(module)
        self.found.add_module(module, is_model=module is self.guards.root)

    def _tensors(self, module: torch.nn.Module) -> list[tuple[dict, str]]:
        """Return the places of a module's plain attributes that are tensors."""
        space = vars(module)
        if module is self.guards.root:
            return []
        return [(space, name) for name, value in space.items() if _is_public_tensor(name, value)]

    @cached_property
    def holders(self) -> list:
        """The namespaces with attributes to compare, each once; asked for when all sites are in."""
        return merged(self.found.holders)

    @property
    def spaces(self) -> list[Mapping]:
        """The namespaces of which all attributes count."""
        return [values for values, _, is_whole in self.holders if is_whole]

    @property
    def families(self) -> list[dict]:
        """The children of each module."""
        return [children(module) for module in self.modules]

    @property
    def groups(self) -> list[dict]:
        """The parameters and buffers of each module."""
        return [read(module) for module in self.modules for read in (parameters, buffers)]


def _is_public_tensor(name: str, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_meta and not name.startswith("_")


def _can_be_compared(forward: Any) -> bool:
    """Return whether all that a function depends on can be looked at: it is a method, or has only its own variables."""
    return isinstance(forward, MethodType) or (isinstance(forward, FunctionType) and not forward.__closure__)
