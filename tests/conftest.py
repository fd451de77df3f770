"""What the tests share: tiny real models with an unpatched twin, and the question whether the two still agree."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from importlib import metadata

import pytest
import torch
import toys
from packaging.requirements import Requirement

from dit_patch.contribute import verify
from dit_patch.handle import Handle, apply
from dit_patch.memo import lookup
from dit_patch.sites import resolve
from dit_patch.sites.layers import Wrapped
from dit_patch.spec import mini
from dit_patch.spec.address import AttributeAddress, SpanAddress
from dit_patch.spec.registry import Registry

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.xdist_group(worker_group(item)))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish(session):
    """What was imported stays: a collection in a test need not go through it, which takes a second each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    gc.unfreeze()


def worker_group(item) -> str:
    """Name what goes to one worker of `pytest -n`: a file, whose fixtures are then made once, or what `spread` says."""
    spread = item.get_closest_marker("spread")
    if spread is None:
        return item.path.stem
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    shared = [str(parameters.get(name, name)) for name in spread.args if name in item.fixturenames]
    return " ".join([item.path.stem, *shared]) if shared else item.nodeid.replace("@", " ")


def skip_unless_installed(spec) -> None:
    """Skip the test where the packages that the spec needs are missing or too old."""
    for line in spec.requires:
        requirement = Requirement(line)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{spec.name} needs {line}")
        if not requirement.specifier.contains(version, prereleases=True):
            pytest.skip(f"{spec.name} needs {line}")


def asked_for(spec, *kinds: str) -> tuple[str, ...] | None:
    """What `only` has to be for the sites of the spec, or those of some kinds: one that is off by default is named."""
    return (*kinds, spec.name) if spec.off_by_default else kinds or None


class Tiny:
    """A spec's mini model to be patched, and `plain`, its twin with the same weights, that never is."""

    def __init__(self, name: str, variant: str | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.spec = Registry(plugins=False).get(name)
        skip_unless_installed(self.spec)
        self.case = self.spec.mini.case(variant)
        self.dtype = dtype
        self.model, self.plain = (mini.build(self.spec, self.case, dtype=dtype) for _ in range(2))
        self.handle: Handle | None = None

    @property
    def both(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        return self.model, self.plain

    def apply(self, **options) -> Handle:
        self.handle = apply(self.model, **{"only": asked_for(self.spec)} | options)
        return self.handle

    def calls(self, steps: int = 2, size: int = 0, **options) -> list[dict]:
        """The arguments of a generation's forwards, two passes a step; a list used again passes the same tensors."""
        options = {"dtype": self.dtype} | options
        return list(mini.forwards(self.case, self.case.sizes[size], steps=steps, **options))

    def agree(self, calls: list[dict], model=None, plain=None) -> Counter[str]:
        """Assert that model and twin give the same bits; returns the hits on the way, of each site that had any."""
        before = self.hits()
        ours = verify.run(self.model if model is None else model, calls)
        hits = self.hits() - before
        theirs = verify.run(self.plain if plain is None else plain, calls)
        assert verify.first_difference(ours, theirs) is None
        return hits

    def hits(self) -> Counter[str]:
        return Counter({row.at: row.hits for row in self.handle.stats()} if self.handle else {})

    def layers_on_globals(self) -> list[str]:
        """The functions shared by all models, of those that the spec names, that somebody's patch is on."""
        shared = [site for site in self.spec.sites if not isinstance(site.address, (AttributeAddress, SpanAddress))]
        assert shared
        found = {site.at: resolve.places(site.address, self.plain, "here")[0] for site in shared}
        return [at for at, (owner, name, _) in found.items() if type(vars(owner)[name]) is Wrapped]

    def reasons(self) -> set[str]:
        """Why calls were passed through, over all sites."""
        return {reason for row in self.handle.stats() for reason in row.bypassed}


@pytest.fixture
def tiny():
    """Makes a `Tiny` of a spec: `tiny("diffusers/wan")`, `tiny("diffusers/wan", "i2v")`. Patches are taken back."""
    made = []

    def make(*args, **options) -> Tiny:
        made.append(Tiny(*args, **options))
        return made[-1]

    yield make
    for each in made:
        if each.handle is not None:
            each.handle.remove()


@pytest.fixture
def wan(tiny) -> Tiny:
    return tiny("diffusers/wan")


@pytest.fixture
def hunyuan(tiny) -> Tiny:
    """HunyuanVideo: timestep embeddings, a token refiner, and a span."""
    return tiny("diffusers/hunyuan_video")


@pytest.fixture(params=["diffusers/wan", "diffusers/hunyuan_video"])
def each(request, tiny) -> Tiny:
    """First one, then the other."""
    return tiny(request.param)


@pytest.fixture
def patched(tmp_path):
    """`patched(sites)`: a toy model, its unpatched twin, and the handle of a spec with these sites."""
    handles = []

    def make(sites, cls=toys.Toy, prepare=None, **options):
        model, plain = toys.build(cls), toys.build(cls)
        if prepare is not None:
            prepare(model)
        handles.append(toys.patch(model, tmp_path / str(len(handles)), sites, **options))
        return model, plain, handles[-1]

    yield make
    for handle in handles:
        handle.remove()


@pytest.fixture(autouse=True)
def diffusers_attention_backend_is_put_back():
    """`model.set_attention_backend` sets it for the whole process, and other kernels give other bits."""
    module = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(module, "_AttentionBackendRegistry", None)
    before = getattr(registry, "_active_backend", None)
    yield
    module = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(module, "_AttentionBackendRegistry", None)
    if registry is not None and before is not None:
        registry._active_backend = before
    elif registry is not None and hasattr(module, "DIFFUSERS_ATTN_BACKEND"):
        registry._active_backend = module.AttentionBackendName(module.DIFFUSERS_ATTN_BACKEND)


@pytest.fixture
def first_checks_only(monkeypatch):
    """No hit is computed again but the first of its signature, so that calls and copies can be counted."""
    monkeypatch.setattr(lookup, "FURTHER", 1 << 40)
