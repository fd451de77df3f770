"""Sites while a CUDA graph is captured. There is no GPU here: torch is made to say what it would say on one."""

from __future__ import annotations

import types

import pytest
import torch
import toys
from toys import EMBED, TABLE, agree, counts

from dit_patch.memo import context
from dit_patch.spec.fingerprint import fingerprint
from dit_patch.upstream import torch_internals

SOURCE = fingerprint(toys.Sinusoid.forward)
GOOD = "toys:good_sinusoid"


@pytest.fixture
def cuda(monkeypatch):
    """A current CUDA stream, by number, and whether a graph is being captured on it."""
    state = types.SimpleNamespace(stream=1, capturing=False)
    for module in (context, torch_internals):
        monkeypatch.setattr(module, "is_cuda_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(context, "raw_stream", lambda device: state.stream)
    return state


def capture(cuda):
    cuda.stream, cuda.capturing = 7, True  # capture has a stream of its own


def test_a_graph_takes_what_depends_on_no_content_and_computes_the_rest_itself(patched, cuda):
    model, plain, handle = patched(f"{TABLE}\n{EMBED}")
    given = toys.inputs()
    agree(model, plain, given, given, given)
    made = model.table._made, model.embed._made
    capture(cuda)
    agree(model, plain, given)
    assert (model.table._made, model.embed._made) == (made[0], made[1] + 1)
    assert counts(handle, "table.forward") == (3, 1, {})
    assert counts(handle, "embed.forward")[2] == {"a CUDA graph is being captured": 1}
    cuda.stream, cuda.capturing = 2, False
    agree(model, plain, given)
    assert counts(handle, "table.forward")[:2] == (3, 2), "another stream's table"


def test_a_graph_takes_nothing_that_is_not_there_or_not_checked(patched, cuda):
    model, plain, handle = patched(TABLE)
    agree(model, plain, toys.inputs())
    capture(cuda)
    agree(model, plain, toys.inputs(), {"x": torch.randn(2, 6)})
    assert counts(handle, "table.forward") == (0, 1, {"a CUDA graph is being captured": 2})
    assert handle.nbytes == 16


def test_a_graph_takes_stand_ins_and_proven_replacements(patched, cuda):
    unused = "- {at: table.forward, kind: rope, unused: true}"
    replaced = f"- {{at: time.forward, kind: timestep, use: '{GOOD}', source: '{SOURCE}'}}"
    model, _, _ = patched(f"{unused}\n{replaced}")
    fresh, _, _ = patched(f"{unused}\n{replaced}")
    model(**toys.inputs())
    made = model.table._made, model.time._made
    capture(cuda)
    model(**toys.inputs())
    assert model.seen.isnan().all() and (model.table._made, model.time._made) == made
    fresh(**toys.inputs())
    assert not fresh.seen.isnan().any() and fresh.time._made == 1


def test_a_graph_takes_from_a_span_what_no_tensor_went_into(patched, cuda):
    model, plain, handle = patched(
        "- {at: ..first, kind: rope}\n- {at: first..last, kind: context, key: {model.mask: [identity]}}",
        cls=toys.Counting,
    )
    given = {"x": torch.randn(3, 2), "rows": [2, 0], "mask": [torch.zeros(2)]}
    agree(model, plain, given, given, given)
    before = counts(handle, "..first"), counts(handle, "first..last")
    capture(cuda)
    agree(model, plain, given)
    assert model.seen[3][0] is model.seen[0][0]
    assert counts(handle, "..first") == (before[0][0] + 2, before[0][1], {})
    assert counts(handle, "first..last") == before[1]
