"""The start of every Python process under `dit-patch run`.

Python imports the first `sitecustomize` on its path: this one, which then imports the one it has hidden. It must cost
next to nothing and run on any Python: until a package with models that have specs is imported, it leaves no more than a
finder on `sys.meta_path` that finds nothing.
"""

# ruff: noqa: SIM105, UP031  (for any Python, and imports nothing that is not there)

import os
import sys


def _start():
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [each for each in sys.path if each != here]
    try:
        _watch()
    except Exception:  # the folder is gone: the run has ended, and this process outlives it
        pass
    # As if ours were not there: the next one takes the name, or nobody, and Python reports what it raises.
    del sys.modules["sitecustomize"]
    __import__("sitecustomize")


def _watch():
    audit = os.environ.get("DIT_PATCH_AUDIT")
    if audit:
        sys.meta_path.insert(0, _Watch(audit, None, {"torch"}))
        return
    folder, classes = os.environ.get("DIT_PATCH_RUN", ""), os.environ.get("DIT_PATCH_CLASSES", "").split()
    if classes:  # of `run --print-env`: the folder may be one of another machine
        folder = _usable(folder)
    else:
        with open(os.path.join(folder, "classes")) as file:
            classes = file.read().split()
        _count_in(folder)
    packages = {each.partition(".")[0] for each in classes}
    if packages.isdisjoint(sys.modules):
        sys.meta_path.insert(0, _Watch(folder, classes, packages))
    else:
        _watch_imports(folder, classes)


def _usable(folder):
    if folder:
        try:
            _count_in(folder)
        except OSError as error:
            sys.stderr.write("dit_patch: no report can be written in %s, so it comes here: %s\n" % (folder, error))
            return ""
    return folder


def _count_in(folder):
    name = "python-%d-%d" % (os.getpid(), len(os.listdir(folder)))
    os.close(os.open(os.path.join(folder, name), os.O_CREAT))


class _Watch:
    """A finder that finds nothing, and starts `watch_imports` when the first of these packages is imported."""

    def __init__(self, folder, classes, packages):
        self.folder, self.classes, self.packages = folder, classes, packages

    def find_spec(self, name, path=None, target=None):
        if name in self.packages and self in sys.meta_path:
            from importlib.util import find_spec

            sys.meta_path.remove(self)
            _watch_imports(self.folder, self.classes)
            return find_spec(name)  # from the start, now that the finders are others


def _watch_imports(folder, classes):
    try:
        if classes is None:
            from dit_patch.contribute.audit import watching
        else:
            from dit_patch.launch import watch_imports
    except Exception as error:
        _report_missing(folder, "%s: %s" % (type(error).__name__, error))
    else:
        watching.start(folder) if classes is None else watch_imports.start(folder, classes)


def _report_missing(folder, why):
    message = "dit_patch cannot be imported by %s, so nothing is patched there: %s" % (sys.executable, why)
    if not folder or _is_first(folder, message):
        sys.stderr.write("dit_patch: %s\n    Install dit_patch there.\n" % message)
    if os.environ.get("DIT_PATCH_RUN_STRICT"):
        raise SystemExit(3)


def _is_first(folder, message):
    path = os.path.join(folder, "unreachable-%s" % sys.executable.replace(os.sep, "_"))
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except OSError:  # another process has reported it
        return False
    os.write(file, message.encode("utf-8", "replace"))
    os.close(file)
    return True


_start()
