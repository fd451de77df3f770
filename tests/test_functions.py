"""Replacements give the original's bits, whatever they are given; and a source's fingerprint is that of its code."""

from __future__ import annotations

import inspect
import itertools
import textwrap

import pytest
import torch
import toys
from torch.utils._python_dispatch import TorchDispatchMode

from dit_patch.functions import kv_cache, sinusoid
from dit_patch.hosts import fastvideo
from dit_patch.memo.keys import same_bits
from dit_patch.spec.fingerprint import fingerprint
from dit_patch.spec.registry import Registry

embeddings = pytest.importorskip("diffusers.models.embeddings")

DTYPES = [torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
VALUES = [0, 1, 7, 499, 500, 863, 999, 1000]


def both(module, function, *args, **kwargs):
    return module(*args, **kwargs), function(module.forward, module, args, kwargs)


def same(one, other):
    return one.stride() == other.stride() and same_bits(one, other)


class Built(TorchDispatchMode):
    """Counts the operations that build a table."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("arange", "exp", "pow", "reciprocal")
        return function(*args, **(kwargs or {}))


# diffusers' Timesteps.


SETTINGS = [
    *((channels, flip, shift, 1) for channels in (256, 320, 7) for flip in (True, False) for shift in (0, 1)),
    (2, True, 0, 1),
    (256, True, 0.5, 1),
    (32, True, 0, 1000),
    (9, False, 1, 0.5),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, flip, shift, scale", SETTINGS)
def test_timesteps_are_the_original_s_in_every_bit(dtype, channels, flip, shift, scale):
    module = embeddings.Timesteps(channels, flip, shift, scale)
    assert same(*both(module, sinusoid.timesteps, torch.tensor(VALUES).to(dtype)))


@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_any_number_of_timesteps(count):
    module = embeddings.Timesteps(256, True, 0)
    generator = torch.Generator().manual_seed(0)
    assert same(*both(module, sinusoid.timesteps, torch.rand(count, generator=generator) * 1000))


def test_timesteps_that_are_a_view():
    module = embeddings.Timesteps(64, True, 0)
    assert same(*both(module, sinusoid.timesteps, torch.arange(20.0)[::3]))
    assert same(*both(module, sinusoid.timesteps, torch.tensor([5.0]).expand(4)))


def test_a_timestep_by_keyword():
    module = embeddings.Timesteps(64, True, 0)
    assert same(*both(module, sinusoid.timesteps, timesteps=torch.tensor([5.0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    module = embeddings.Timesteps(64, True, 0)
    with torch.autocast("cpu", dtype=dtype):
        assert same(*both(module, sinusoid.timesteps, torch.tensor([5.0, 900.0])))


def test_gradients_reach_the_timesteps():
    module = embeddings.Timesteps(8, True, 0)
    gradients = []
    for result_of in (module, lambda t: sinusoid.timesteps(module.forward, module, (t,), {})):
        t = torch.tensor([5.0, 900.0], requires_grad=True)
        result_of(t).sum().backward()
        gradients.append(t.grad)
    assert same_bits(*gradients)


def test_the_table_is_built_once():
    sinusoid._frequencies.cache_clear()
    module = embeddings.Timesteps(256, True, 0)
    with Built() as original:
        module(torch.tensor([5.0]))
    with Built() as first:
        sinusoid.timesteps(module.forward, module, (torch.tensor([5.0]),), {})
    with Built() as later:
        for _ in range(3):
            sinusoid.timesteps(module.forward, module, (torch.tensor([7.0, 9.0]),), {})
        twin = embeddings.Timesteps(256, False, 0)
        sinusoid.timesteps(twin.forward, twin, (torch.tensor([7]),), {})
    assert (original.count, first.count, later.count) == (2, 2, 0)


def test_a_table_built_under_inference_mode_can_be_trained_with():
    sinusoid._frequencies.cache_clear()
    module = embeddings.Timesteps(256, True, 0)
    with torch.inference_mode():
        sinusoid.timesteps(module.forward, module, (torch.tensor([5.0]),), {})
    t = torch.tensor([5.0], requires_grad=True)
    sinusoid.timesteps(module.forward, module, (t,), {}).sum().backward()
    assert t.grad is not None


def test_what_the_original_refuses_is_refused():
    module = embeddings.Timesteps(8, True, 0)
    with pytest.raises(TypeError):
        sinusoid.timesteps(module.forward, module, (), {})
    with pytest.raises(TypeError):
        sinusoid.timesteps(module.forward, module, (torch.ones(1), 2), {})


# SkyReels V2.


@pytest.fixture
def skyreels():
    return pytest.importorskip("diffusers.models.transformers.transformer_skyreels_v2").SkyReelsV2Timesteps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, flip", list(itertools.product([256, 6, 2], [True, False])))
@pytest.mark.parametrize("shape", [(8,), (2, 4), (1, 1), (8, 1)])
def test_skyreels_timesteps_are_the_original_s_in_every_bit(skyreels, dtype, channels, flip, shape):
    module = skyreels(channels, flip)
    timesteps = torch.tensor(VALUES)[: torch.Size(shape).numel()].view(shape).to(dtype)
    try:
        expected = module(timesteps)
    except RuntimeError:  # torch.outer of some dtypes
        with pytest.raises(RuntimeError):
            sinusoid.skyreels_timesteps(module.forward, module, (timesteps,), {})
    else:
        assert same(expected, sinusoid.skyreels_timesteps(module.forward, module, (timesteps,), {}))


def test_the_table_of_skyreels_is_built_once(skyreels):
    sinusoid._powers.cache_clear()
    module = skyreels(256, True)
    timesteps = torch.tensor([[5, 7]])
    with Built() as original:
        module(timesteps)
    with Built() as first:
        sinusoid.skyreels_timesteps(module.forward, module, (timesteps,), {})
    with Built() as later:
        for _ in range(3):
            sinusoid.skyreels_timesteps(module.forward, module, (timesteps,), {})
    assert first.count == original.count > 0
    assert later.count == 0


# FastVideo's timestep_embedding.


@pytest.fixture
def fastvideo_embedding():
    pytest.importorskip("fastvideo")
    fastvideo.prepare()
    from fastvideo.layers import visual_embedding

    return visual_embedding.timestep_embedding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [256, 32, 7, 2])
def test_fastvideo_s_embeddings_are_the_original_s_in_every_bit(fastvideo_embedding, dim, dtype):
    t = torch.tensor(VALUES).to(dtype)
    for args, kwargs in (
        ((t, dim), {}),
        ((t, dim, 5000), {}),
        ((t,), {"dim": dim, "dtype": torch.float64}),
        ((t[2:3], dim, 10000, torch.bfloat16), {}),
    ):
        ours = sinusoid.timestep_embedding(fastvideo_embedding, None, args, kwargs)
        assert same(ours, fastvideo_embedding(*args, **kwargs))


def test_fastvideo_s_table_holds_numbers_under_a_meta_default_device(fastvideo_embedding):
    sinusoid._periods.cache_clear()
    t = torch.tensor([3.0, 5.0])
    expected = fastvideo_embedding(t, 64)
    with torch.device("meta"), torch.inference_mode(), Built() as first:
        under_meta = sinusoid.timestep_embedding(fastvideo_embedding, None, (t, 64), {})
    with Built() as later:
        after = sinusoid.timestep_embedding(fastvideo_embedding, None, (t, 64), {})
    assert same(after, expected) and torch.equal(under_meta, expected)
    assert first.count > 0 and later.count == 0


# KV caches.


def test_indices_of_kv_caches_become_integers_with_one_read_from_the_device():
    keys = torch.ones(1, 2)
    cache = {"k": keys, "global_end_index": torch.tensor([7]), "local_end_index": torch.tensor([3]), "is_init": False}
    other = {"k": keys, "global_end_index": torch.tensor(5), "local_end_index": 2}
    caches = [cache], [other]
    assert kv_cache.integer_indices(caches) is caches
    assert {name: value for name, value in cache.items() if name != "k"} == {
        "global_end_index": 7,
        "local_end_index": 3,
        "is_init": False,
    }
    assert cache["k"] is keys and type(other["global_end_index"]) is int
    assert (other["global_end_index"], other["local_end_index"]) == (5, 2)


@pytest.mark.parametrize("caches", [None, [], [{}], [{"k_end_index": torch.ones(2, dtype=torch.long)}], "text", 3])
def test_what_has_no_index_is_left_as_it_is(caches):
    before = repr(caches)
    assert kv_cache.integer_indices(caches) is caches and repr(caches) == before


# Kandinsky 5.


@pytest.fixture
def kandinsky():
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
    if fingerprint(module.Kandinsky5TimeEmbeddings.forward) not in USES["dit_patch.functions.sinusoid:kandinsky_times"]:
        pytest.skip("needs diffusers>=0.37")
    return module.Kandinsky5TimeEmbeddings(32, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kandinsky_times_are_the_original_s_in_every_bit(kandinsky, dtype):
    with torch.no_grad():
        assert same(*both(kandinsky, sinusoid.kandinsky_times, torch.tensor(VALUES).to(dtype)))


def test_frequencies_are_brought_to_a_device_once_and_again_when_they_change():
    freqs, meta = torch.arange(4.0), torch.device("meta")
    assert sinusoid._on_device(freqs, freqs.device) is freqs
    first = sinusoid._on_device(freqs, meta)
    assert first.device == meta and sinusoid._on_device(freqs, meta) is first
    assert sinusoid._on_device(freqs.clone(), meta) is not first
    freqs.mul_(2)
    again = sinusoid._on_device(freqs, meta)
    assert again is not first and sinusoid._on_device(freqs, meta) is again
    assert len(sinusoid._copies[freqs]) == 1
    with torch.inference_mode():
        unversioned = torch.arange(4.0)
        assert sinusoid._on_device(unversioned, meta) is not sinusoid._on_device(unversioned, meta)


def test_frequencies_are_let_go_with_their_model():
    freqs = torch.arange(4.0)
    sinusoid._on_device(freqs, torch.device("meta"))
    before = len(sinusoid._copies)
    del freqs
    assert len(sinusoid._copies) == before - 1


# Every replacement that a bundled spec names.

USES = {site.use: site.source for spec in Registry(plugins=False) for site in spec.sites if site.use}


def test_these_are_the_replacements_tested_here():
    assert {use.removeprefix("dit_patch.functions.") for use in USES} == {
        "sinusoid:timesteps",
        "sinusoid:skyreels_timesteps",
        "sinusoid:timestep_embedding",
        "sinusoid:kandinsky_times",
        "rotary:wan",
        "rotary:diffusers",
        "rotary:fastvideo",
        "matrixgame:causal_rope",
        "matrixgame:frame_rope",
    }


@pytest.mark.parametrize("use", USES)
def test_a_replacement_takes_wrapt_s_four_arguments(use):
    place, _, name = use.partition(":")
    function = getattr(__import__(place, fromlist=[name]), name)
    assert list(inspect.signature(function).parameters) == ["original", "instance", "args", "kwargs"]


def test_the_fingerprint_of_fastvideo_s_original_is_one_that_the_spec_knows(fastvideo_embedding):
    from fastvideo.models.dits.matrixgame3 import model

    assert fingerprint(fastvideo_embedding) in USES["dit_patch.functions.sinusoid:timestep_embedding"]
    known = USES["dit_patch.functions.matrixgame:frame_rope"]
    assert fingerprint(model._apply_rope_with_frame_indices) in known


def test_the_fingerprint_of_the_installed_original_is_one_that_the_spec_knows(skyreels):
    assert fingerprint(embeddings.Timesteps.forward) in USES["dit_patch.functions.sinusoid:timesteps"]
    assert fingerprint(skyreels.forward) in USES["dit_patch.functions.sinusoid:skyreels_timesteps"]


# Fingerprints.


@pytest.fixture
def define(tmp_path, monkeypatch):
    """`define(source)`: the function `f` of a new module with this source."""
    numbers = itertools.count()
    monkeypatch.syspath_prepend(tmp_path)

    def make(source):
        name = f"made_{tmp_path.name.replace('-', '_')}_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return __import__(name).f

    return make


PLAIN = """
def f(x, y=1):
    return x + y
"""


@pytest.mark.parametrize(
    "source",
    [
        '''
def f(x, y=1):
    """Documented."""
    return x + y
''',
        """
# About f.
def f(x, y=1):
    # Adds.

    return x + y  # the sum
""",
        """
def f(
    x,
    y = 1,
):
    return (x
            + y)
""",
    ],
    ids=["docstring", "comments", "layout"],
)
def test_comments_docstrings_and_layout_do_not_count(define, source):
    assert fingerprint(define(source)) == fingerprint(define(PLAIN))


@pytest.mark.parametrize(
    "old, new", [("x + y", "y + x"), ("y=1", "y=2"), ("y=1", "y"), ("return", "yield"), ("f(x", "f(self, x")]
)
def test_code_and_signature_count(define, old, new):
    assert fingerprint(define(PLAIN.replace(old, new))) != fingerprint(define(PLAIN))


def test_a_docstring_of_a_helper_class_or_function_inside_does_not_count(define):
    inside = """
def f(x):
    def g(y):
        {}return y
    return g(x)
"""
    assert fingerprint(define(inside.format('"""Inner."""\n        '))) == fingerprint(define(inside.format("")))


HELPERS = """
def deepest(x):
    return x * {deepest}

def helper(x):
    return deepest(x) + {helper}

def unrelated(x):
    return {unrelated}

def f(x):
    return helper(x)
"""


def test_functions_that_are_called_count_and_others_do_not(define):
    def of(**changed):
        values = {"deepest": 1, "helper": 1, "unrelated": 1} | changed
        # One module after the other under one name, so that only the source differs.
        return fingerprint(define(HELPERS.format(**values)))

    digits = {name: of(**{name: 2}) for name in ("deepest", "helper")}
    module = inspect.getmodule(define(HELPERS.format(deepest=1, helper=1, unrelated=1)))
    assert module.f.__globals__["helper"] is module.helper
    assert len({of(), *digits.values()}) == 3
    assert of(unrelated=2) == of()


def test_a_function_of_another_package_does_not_count():
    assert fingerprint(toys.cosine) == fingerprint(toys.cosine)
    assert len(fingerprint(toys.Toy.forward)) == 12


def test_a_decorated_a_bound_and_a_patched_function_are_seen_through(tmp_path):
    model = toys.build()
    plain = fingerprint(toys.Table.forward)
    assert fingerprint(torch.no_grad()(toys.Table.forward)) == plain
    assert fingerprint(model.table.forward) == plain
    with toys.patch(model, tmp_path, "- {at: table.forward, kind: rope, key: {x: [shape]}}"):
        assert fingerprint(model.table.forward) == plain


def test_what_has_no_source_is_an_error_of_its_kind():
    with pytest.raises((OSError, TypeError)):
        fingerprint(len)
