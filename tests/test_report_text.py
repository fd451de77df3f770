"""What the report says in its first line, and of a site that is no cache."""

import pytest

from dit_patch import StepCache
from dit_patch.findings import Finding, FindingKind
from dit_patch.report.html import report_html
from dit_patch.report.rows import Rows, SiteStats, site_stats
from dit_patch.report.text import report_text
from dit_patch.spec.registry import Registry
from dit_patch.step_cache.stats import StepStats

LEFT = (Finding(FindingKind.LEFT_UNCACHED, "transformer", "4 steps are too few"),)


@pytest.mark.parametrize(
    "step, effect",
    [
        (StepStats("m", "", "blocks", 8, 1, 0), "which will change the output"),
        (StepStats("m", "", "blocks", 8, 1, 0, findings=LEFT), "which skipped nothing in the last generation"),
        (StepStats("m", "cond", "blocks", 8, 1, 0, steps=9), "which skipped nothing in the last generation"),
        (StepStats("m", "cond", "blocks", 8, 1, 0, steps=9, cached=(7,)), "which changes the output"),
    ],
)
def test_the_first_line_does_not_contradict_what_step_caching_did(step, effect):
    first = report_text(Rows((), (step,)), 1 << 20, StepCache.of("quality")).splitlines()[0]
    assert first.startswith(f"dit_patch: step caching on, {effect}; all else lossless")


def test_of_a_replacement_no_time_is_said_to_be_saved():
    cached = SiteStats("m", "M", "s", "rope.forward", "rope", 1, 3, 1, seconds_saved=0.002)
    replaced = SiteStats("m", "M", "s", "a:b", "rotary", 1, 256, 0, is_replacement=True)
    lines = report_text(Rows((cached, replaced)), 1 << 20).splitlines()
    assert lines[-2].endswith("2.0 ms") and lines[-1].endswith("MiB  -")
    assert "<td>2.0 ms</td>" in report_html(Rows((cached, replaced)), 1 << 20)


def test_a_site_without_a_key_that_has_a_replacement_is_one():
    spec = Registry(plugins=False).get("diffusers/wan")
    rows = [site_stats("m", spec, spec.name, site, (), None, was_called=False) for site in spec.sites]
    assert [row.kind for row in rows if row.is_replacement] == ["rotary"]
