"""Where specs come from, how they find their class, and that every bundled one can be read."""

import gc
import weakref

import pytest

from dit_patch.errors import SpecError
from dit_patch.findings import DitPatchWarning
from dit_patch.spec import registry
from dit_patch.spec.loading import load
from dit_patch.spec.registry import BUNDLED, Registry

TOY = "model: {model}\nsites:\n  - {{at: rope.forward, kind: rope}}\n"


class Base:
    pass


class Derived(Base):
    pass


def dotted(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


@pytest.fixture
def write(tmp_path):
    """Writes `text` (by default a toy spec for `model`) to a file below tmp_path/specs."""

    def write(name, text=None, *, model="a.b.C", root="specs"):
        path = tmp_path / root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TOY.format(model=model) if text is None else text)
        return path

    return write


@pytest.fixture
def only(tmp_path):
    """A registry of nothing but the specs written, with more directories or options if asked."""

    def only(*directories, **options):
        options = {"bundled": False, "plugins": False} | options
        return Registry([tmp_path / "specs", *directories], **options)

    return only


class TestNames:
    def test_a_spec_is_called_by_its_path_without_the_suffix(self, write, only):
        write("video/wan.yaml", model="a.b.C")
        write("toy.yml", model="a.b.D")
        write("README.md", "no spec")
        write(".ipynb_checkpoints/toy.yaml", "no spec")
        assert only().names() == ["toy", "video/wan"]
        assert [spec.name for spec in only()] == ["toy", "video/wan"]

    def test_an_unknown_name_is_answered_with_the_nearest_and_all(self, write, only):
        write("video/wan.yaml")
        with pytest.raises(SpecError, match=r"no spec `video/wna`; did you mean `video/wan`\? Known: video/wan"):
            only().get("video/wna")

    def test_two_files_with_one_name_are_both_named(self, write, only, tmp_path):
        write("toy.yaml")
        write("toy.yaml", root="more")
        with pytest.raises(SpecError) as caught:
            only(tmp_path / "more").names()
        assert all(str(tmp_path / folder / "toy.yaml") in str(caught.value) for folder in ("specs", "more"))

    def test_two_suffixes_do_not_make_two_names(self, write, only):
        write("toy.yaml")
        write("toy.yml")
        with pytest.raises(SpecError, match=r"toy\.yaml and .*toy\.yml"):
            only().names()

    def test_a_directory_named_twice_counts_once(self, write, only, tmp_path):
        write("video/toy.yaml")
        assert only(tmp_path / "specs", tmp_path / "specs" / "video").names() == ["video/toy"]

    def test_one_directory_needs_no_list(self, write, tmp_path):
        write("toy.yaml")
        assert Registry(str(tmp_path / "specs"), bundled=False, plugins=False).names() == ["toy"]


class TestDirectories:
    def test_a_directory_that_is_not_there_is_quoted(self, only):
        with pytest.raises(SpecError, match=r"the directory `.*/specs` does not exist"):
            only().names()

    def test_a_file_is_no_directory(self, write, tmp_path):
        path = write("toy.yaml")
        with pytest.raises(SpecError, match="is a file"):
            Registry([path]).names()

    def test_a_directory_without_a_spec_is_not_passed_over(self, write, only):
        write("README.md", "no spec")
        with pytest.raises(SpecError, match="holds no spec"):
            only().names()

    def test_a_foreign_directory_is_trusted_only_if_asked(self, write, only):
        text = TOY.format(model="a.b.C")[:-2] + ", use: os:system, source: 00000000000a}\n"
        write("toy.yaml", text)
        with pytest.raises(SpecError, match="is code outside"):
            only().get("toy")
        assert only(trust=True).get("toy").trusted


class TestFindingTheSpecOfAClass:
    def test_it_is_found_by_the_name_of_the_class(self, write, only):
        write("toy.yaml", model=dotted(Base))
        assert only().find(Base).name == "toy"
        assert list(only().classes()) == [dotted(Base)]

    def test_a_subclass_has_that_of_the_nearest_class_it_inherits_from(self, write, only):
        write("base.yaml", model=dotted(Base))
        registry = only()
        at_run_time = type("FSDPDerived", (Derived,), {})
        assert registry.find(at_run_time).name == "base"
        write("derived.yaml", model=dotted(Derived))
        assert only().find(at_run_time).name == "derived"

    def test_a_class_without_a_spec_has_none(self, write, only):
        write("toy.yaml", model=f"elsewhere.{Base.__qualname__}")
        assert only().find(Base) is None

    def test_one_spec_may_be_for_several_classes(self, write, only):
        write("toy.yaml", TOY.replace("model: {model}", "models: [a.b.C, a.b.D]").format())
        assert {name: spec.name for name, spec in only().classes().items()} == {"a.b.C": "toy", "a.b.D": "toy"}

    def test_two_specs_for_one_class_are_both_named(self, write, only):
        write("one.yaml")
        write("two.yaml")
        with pytest.raises(SpecError, match=r"two\.yaml:1:8: `a\.b\.C` already has a spec, .*one\.yaml:1:8"):
            only().find(Base)

    def test_all_broken_specs_are_told_at_once_and_a_whole_one_can_still_be_had(self, write, only):
        write("one.yaml", "modle: x")
        write("two.yaml", "modle: x")
        write("whole.yaml")
        with pytest.raises(SpecError, match=r"(?s)one\.yaml:1:1.*two\.yaml:1:1"):
            only().find(Base)
        assert only().get("whole").name == "whole"


class TestExtending:
    def test_what_is_extended_may_lie_in_another_directory_and_extend_further(self, write, only, tmp_path):
        write("video/wan.yaml", "model: a.b.C\nextends: base\nblocks: [{at: blocks, pattern: 0}]\n")
        write("base.yaml", model="a.b.D")
        write("own.yaml", "model: a.b.E\nextends: video/wan\nsites: [{at: own.f, kind: mask}]\n", root="more")
        spec = only(tmp_path / "more").get("own")
        assert [site.at for site in spec.sites] == ["rope.forward", "own.f"]
        assert [blocks.at for blocks in spec.blocks] == ["blocks"]

    def test_an_unknown_base_is_answered_with_the_nearest_at_its_place(self, write, only):
        write("video/wan.yaml")
        write("own.yaml", "model: a.b.D\nextends: video/wann\n")
        with pytest.raises(
            SpecError, match=r"own\.yaml:2:10: extends: no spec `video/wann`; did you mean `video/wan`\?"
        ):
            only().get("own")

    def test_a_circle_is_shown(self, write, only):
        for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
            write(f"{name}.yaml", f"model: x.{name}\nextends: {base}\n")
        with pytest.raises(SpecError, match=r"c\.yaml:2:10: extends: goes round in a circle: b -> c -> b"):
            only().get("a")


class TestPlugins:
    @pytest.fixture
    def install(self, tmp_path, monkeypatch, write):
        """A package that breaks when it is imported, installed with this entry point."""

        def install(value):
            write("broken_when_imported/__init__.py", "raise SystemExit('imported')", root="site")
            text = TOY.format(model=dotted(Base))[:-2] + ", use: os:system, source: 00000000000a}\n"
            write("broken_when_imported/specs/video/toy.yaml", text, root="site")
            write("plug-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n", root="site")
            write("plug-1.0.dist-info/entry_points.txt", f"[dit_patch.specs]\nplug = {value}\n", root="site")
            monkeypatch.syspath_prepend(tmp_path / "site")

        return install

    @pytest.mark.parametrize("value", ["broken_when_imported.specs", "broken_when_imported:specs"])
    def test_an_installed_package_may_bring_specs_and_is_not_imported_for_it(self, install, value):
        install(value)
        spec = Registry(bundled=False).find(Base)
        assert (spec.name, spec.trusted) == ("video/toy", True)
        assert Registry(bundled=False, plugins=False).names() == []

    @pytest.mark.parametrize("value", ["broken_when_imported.spces", "no_such_package", "broken_when_imported:a.b"])
    def test_an_entry_point_that_leads_nowhere_is_told_with_its_package(self, install, value):
        install(value)
        said = "from the entry point `plug` of plug, is not a package or a directory"
        with pytest.raises(SpecError, match=said):
            Registry(bundled=False, strict=True).names()
        with pytest.warns(DitPatchWarning, match=f"the specs of the installed package plug are left out: .*{said}"):
            assert Registry().find(Base) is None

    def test_a_broken_spec_of_an_installed_package_is_a_warning_and_all_others_work(self, install, tmp_path):
        install("broken_when_imported.specs")
        (tmp_path / "site/broken_when_imported/specs/broken.yaml").write_text("model: a.B\nsitse: []\n")
        with pytest.warns(DitPatchWarning, match=r"(?s)package plug are left out: .*broken.yaml:2:.*`sites`"):
            registry = Registry()
            assert registry.find(Base) is not None and len(list(registry)) > 20
        with pytest.raises(SpecError, match="broken.yaml:2:"):
            list(Registry(strict=True))
        with pytest.raises(SpecError, match="broken.yaml:2:"):
            registry.get("broken")

    def test_where_a_package_has_a_spec_for_a_class_of_ours_ours_is_taken(self, install, tmp_path):
        install("broken_when_imported.specs")
        wan = "diffusers.models.transformers.transformer_wan.WanTransformer3DModel"
        text = f"model: {wan}\nsites:\n  - {{at: rope.forward, kind: rope, key: {{hidden_states: [shape]}}}}\n"
        (tmp_path / "site/broken_when_imported/specs/aaa.yaml").write_text(text)
        with pytest.warns(DitPatchWarning, match="package plug are left out: .*already has a spec"):
            assert Registry().classes()[wan].name == "diffusers/wan"


def test_a_registry_is_read_once_and_kept_by_nobody_else(write, only):
    path = write("toy.yaml", model=dotted(Base))
    registry = only()
    spec = registry.find(Base)
    path.unlink()
    assert registry.find(Base) is registry.get("toy") is spec
    gone = weakref.ref(registry)
    del registry
    gc.collect()
    assert gone() is None


class TestBundled:
    # By file and not by Registry(), so that one broken spec fails one test and not the collection of all.
    FILES = sorted(path for suffix in ("yaml", "yml") for path in BUNDLED.rglob(f"*.{suffix}"))

    def test_there_are_some(self):
        assert self.FILES

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(BUNDLED).with_suffix("").as_posix())
    def test_it_can_be_read_and_built(self, path):
        spec = load(path, trusted=True)
        assert spec.mini, "every bundled spec has a `mini:`, with which it is verified"
        assert spec.requires, "every bundled spec says what it was verified with"
        name = path.relative_to(BUNDLED).with_suffix("").as_posix()
        assert name in Registry(plugins=False).names()
        assert Registry(plugins=False).get(name).sites

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(BUNDLED).with_suffix("").as_posix())
    def test_it_needs_no_trust(self, path):
        assert load(path, trusted=False)

    def test_no_two_are_for_one_class(self):
        assert Registry(plugins=False).classes()


def test_a_file_is_read_again_only_where_it_has_changed(tmp_path, monkeypatch):
    path = tmp_path / "one.yaml"
    path.write_text("model: a.B\nsites:\n  - {at: rope.forward, kind: rope}\n")
    read = []
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda path, **options: read.append(path) or load(path, **options))

    def sites():
        return [site.at for site in Registry((tmp_path,), bundled=False, plugins=False).get("one").sites]

    assert sites() == sites() == ["rope.forward"] and len(read) == 1
    path.write_text("model: a.B\nsites:\n  - {at: other.rope.forward, kind: rope}\n")
    assert sites() == ["other.rope.forward"] and len(read) == 2


def test_a_base_that_has_changed_counts_for_what_extends_it(tmp_path):
    base, spec = tmp_path / "base.yaml", tmp_path / "spec.yaml"
    base.write_text("model: a.B\nsites:\n  - {at: rope.forward, kind: rope}\n")
    spec.write_text("model: a.C\nextends: base\nsites:\n  - {at: own.forward, kind: rope}\n")

    def sites():
        return {site.at for site in Registry((tmp_path,), bundled=False, plugins=False).get("spec").sites}

    assert sites() == sites() == {"rope.forward", "own.forward"}
    base.write_text("model: a.B\nsites:\n  - {at: rope_of_base.forward, kind: rope}\n")
    assert sites() == {"rope_of_base.forward", "own.forward"}
