"""What lies between a model's arguments and a site that is keyed by them: hooks, forwards and submodules on the way.

A site with `model.timestep` in its key does not look at what it is called with. Whoever changes that on the way has to
be noticed: on every spec that has such a site, and on the modules beside and above it.
"""

from fnmatch import fnmatch

import pytest
import torch
from seams import altered, assert_seen, case, hook, other_argument, own_forward, pre_hook, warm

from dit_patch.spec.address import AttributeAddress
from dit_patch.spec.registry import Registry


def borrowed(site) -> list[str]:
    return [key.removeprefix("model.") for key in site.key or () if key.startswith("model.")]


def sites_of(spec) -> list:
    """The sites of submodules, by name, that are keyed by an argument of the model."""
    return [
        site
        for site in spec.sites
        if isinstance(site.address, AttributeAddress) and borrowed(site) and site.at.endswith(".forward")
    ]


SPECS = [
    spec.name
    for spec in Registry(plugins=False)
    if spec.mini and not spec.name.startswith("transformers/") and sites_of(spec)
]


def every(kind):
    return pytest.mark.parametrize("name", [case(f"{kind} {name}", name) for name in SPECS])


def around(tiny) -> list[str]:
    """The sites' parents and all that is in them, and the sites of the model itself; each is called in a forward."""
    called, hooks = set(), []
    for name, module in tiny.plain.named_modules():
        hooks.append(module.register_forward_hook(lambda *_, name=name: called.add(name)))
    with torch.no_grad():
        tiny.plain(**tiny.calls(1)[0])
    for each in hooks:
        each.remove()
    sites = [site.at.removesuffix(".forward") for site in sites_of(tiny.spec)]
    found = [name for name in called for site in sites if fnmatch(name, site)]
    tops = {name.partition(".")[0] for name in found}
    return [name for name in dict(tiny.plain.named_modules()) if name.partition(".")[0] in tops and name in called]


def few(names: list[str]) -> list[str]:
    """At most two of them: the outermost, and one of the innermost."""
    names = sorted(names, key=lambda name: name.count("."))
    return names[:1] + names[1:][-1:]


def with_sites(tiny, name):
    """A tiny model of the spec, of the first variant in which such a site is reached."""
    spec = Registry(plugins=False).get(name)
    for variant in (None, *spec.mini.variants):
        each = tiny(name, variant)
        if around(each):
            return each
    pytest.fail(f"no variant of {name} reaches its sites")


@every("pre-hook")
def test_a_pre_hook_on_any_module_around_the_site(tiny, name):
    assert sweep(with_sites(tiny, name), pre_hook)


@every("hook")
def test_a_hook_on_any_module_around_the_site(tiny, name):
    assert sweep(with_sites(tiny, name), hook)


@every("forward")
def test_a_forward_of_its_own_on_any_module_around_the_site(tiny, name):
    assert sweep(with_sites(tiny, name), own_forward)


def sweep(each, edit) -> int:
    """How many of the modules changed the output when they were edited, one after the other."""
    calls = each.calls(1)
    edits = [at(path, edit) for path in few(around(each))]
    return sum([assert_seen(each, calls, edit, matters=False) for edit in edits])


def at(path, edit):
    return lambda model: edit(model.get_submodule(path))


@every("model's pre-hook")
def test_a_pre_hook_on_the_model_that_was_registered_after_apply(tiny, name):
    each = with_sites(tiny, name)
    calls = each.calls(1)
    names = {argument for site in sites_of(each.spec) for argument in borrowed(site)}
    names = [argument for argument in sorted(names) if argument in calls[0] and not argument.endswith(("mask", "idx"))]
    assert [argument for argument in names if assert_seen(each, calls, other_argument(argument), matters=False)]


@pytest.fixture(params=[case("global forward hook", "hook"), case("global forward pre-hook", "pre_hook")])
def global_hook(request):
    """Registers a hook for all modules that changes what those of a class give, or get; it goes with the test."""
    handles = []

    def register(cls):
        def hook(module, args, output=None):
            if isinstance(module, cls):
                return altered(args if output is None else output)

        register = getattr(torch.nn.modules.module, f"register_module_forward_{request.param}")
        handles.append(register(hook))

    yield register
    for handle in handles:
        handle.remove()


def test_a_global_hook_for_all_modules(wan, global_hook):
    calls = wan.calls()
    warm(wan, calls)
    global_hook(type(wan.plain.condition_embedder.time_embedder))
    for _ in range(2):
        wan.agree(calls)


def replace_activation(model):
    before, model.condition_embedder.act_fn = model.condition_embedder.act_fn, torch.nn.Tanh()
    return lambda: setattr(model.condition_embedder, "act_fn", before)


def reset_activation(model):
    model.condition_embedder.act_fn.inplace = False
    model.condition_embedder.act_fn.__class__ = torch.nn.Mish


def argument_in_forward(model):
    """Replace the model's own forward by one that changes the timestep, as samplers' wrappers do."""
    before, had_own = model.forward, "forward" in vars(model)
    model.forward = lambda *args, timestep, **kwargs: before(*args, timestep=timestep + 7, **kwargs)
    return lambda: setattr(model, "forward", before) if had_own else delattr(model, "forward")


def hook_with_a_state(model):
    """A hook that gives something else each time."""
    seen = []

    def hook(module, args, output):
        seen.append(None)
        return output * len(seen)

    return model.condition_embedder.timesteps_proj.register_forward_hook(hook).remove


def hook_first(model):
    """A pre-hook that comes before those that are there already."""

    def hook(module, args, kwargs):
        return args, kwargs | {"timestep": kwargs["timestep"] + 7}

    return model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove


def hook_that_writes(model):
    """A pre-hook that writes into what the site is called with, and returns nothing."""

    def hook(module, args):
        args[0].mul_(0.5)

    return model.condition_embedder.time_proj.register_forward_pre_hook(hook).remove


def wrapped_module(model):
    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return 2 * self.inner(*args, **kwargs)

    before = model.condition_embedder.act_fn
    model.condition_embedder.act_fn = Doubled(before)
    return lambda: setattr(model.condition_embedder, "act_fn", before)


def other_flags(model):
    """An attribute of the parent that its forward reads."""
    before = model.condition_embedder.timesteps_proj.flip_sin_to_cos
    model.condition_embedder.timesteps_proj.flip_sin_to_cos = not before
    return lambda: setattr(model.condition_embedder.timesteps_proj, "flip_sin_to_cos", before)


def embedder_weight(model):
    """A weight of another site on the way."""
    with torch.no_grad():
        model.condition_embedder.time_embedder.linear_2.weight.mul_(3)


EDITS = {
    "activation replaced": replace_activation,
    "activation of another class": reset_activation,
    "model.forward replaced": argument_in_forward,
    "hook with a state": hook_with_a_state,
    "prepended pre-hook on the model": hook_first,
    "pre-hook that writes": hook_that_writes,
    "module wrapped": wrapped_module,
    "attribute of a module on the way": other_flags,
    "weight on the way": embedder_weight,
    "hook on timesteps_proj": lambda model: hook(model.condition_embedder.timesteps_proj),
    "pre-hook on the parent": lambda model: pre_hook(model.condition_embedder),
}


@pytest.mark.parametrize("edit", [case(name, edit) for name, edit in EDITS.items()])
def test_of_wan(wan, edit):
    assert_seen(wan, wan.calls(), edit)
