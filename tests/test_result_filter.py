"""A result that is put through a function."""

from __future__ import annotations

import torch
import toys
from toys import counts


def test_a_result_is_put_through_what_then_names(patched):
    model, plain, handle = patched("- {at: table.forward, kind: rope, then: 'toys:negated'}")
    with torch.no_grad():
        model(**toys.inputs()), plain(**toys.inputs())
    assert torch.equal(model.seen, -plain.seen)
    assert counts(handle, "table.forward") == (1, 0, {})
    handle.remove()
    model(**toys.inputs())
    assert torch.equal(model.seen, plain.seen)
