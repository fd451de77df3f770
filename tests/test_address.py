"""An address is parsed once, into its form; what it says is as it was written."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dit_patch.spec.address import (
    Address,
    AttributeAddress,
    GlobalAddress,
    InnerFunctionAddress,
    SpanAddress,
    StageAddress,
)
from dit_patch.spec.registry import Registry

FORMS = {
    "prepare_mask": AttributeAddress("", "prepare_mask"),
    "blocks.*.attn.forward": AttributeAddress("blocks.*.attn", "forward"),
    "forward:apply_rope": GlobalAddress("forward", "apply_rope"),
    "package.module:name": GlobalAddress("package.module", "name"),
    "package.module:Class.f.<locals>.g": InnerFunctionAddress("package.module", "Class.f", "g"),
    "pipeline:prepare": StageAddress("prepare"),
    "patch_embedding..blocks.0": SpanAddress("patch_embedding", "blocks.0"),
    "..blocks.*.attn": SpanAddress("", "blocks.*.attn"),
}


@pytest.mark.parametrize("text", FORMS)
def test_each_form_of_address_has_a_class(text):
    assert Address.parse(text) == FORMS[text]


def test_an_address_reads_as_it_was_written():
    for text in [*FORMS, *(site.at for spec in Registry(plugins=False) for site in spec.sites)]:
        assert str(Address.parse(text)) == text


def test_addresses_need_no_torch():
    code = "import sys, dit_patch.spec.address as a; a.Address.parse('x.y'); print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"
