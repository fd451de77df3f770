"""What every Python process under `dit-patch run` comes by at its start.

Python imports the first `sitecustomize` on its path; this one steps aside for the one that would have been it. It has
to cost next to nothing, and to run on any Python: until a package that has models of ours is imported, all that stays
of it is a finder on `sys.meta_path` that finds nothing.
"""

# ruff: noqa: SIM105, UP031  (for any Python, and imports nothing that is not there)

import os
import sys


def _start():
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [each for each in sys.path if each != here]
    try:
        _watch()
    except Exception:  # the folder is gone: the run is over, and this is something that it has left running
        pass
    # As if ours were not there: the next one takes the name, or nobody, and Python reports what it raises.
    del sys.modules["sitecustomize"]
    __import__("sitecustomize")


def _watch():
    folder = os.environ["DIT_PATCH_RUN"]
    with open(os.path.join(folder, "classes")) as file:
        classes = file.read().split()
    name = "python-%d-%d" % (os.getpid(), len(os.listdir(folder)))
    os.close(os.open(os.path.join(folder, name), os.O_CREAT))
    packages = {each.partition(".")[0] for each in classes}
    if packages.isdisjoint(sys.modules):
        sys.meta_path.insert(0, _Watch(folder, classes, packages))
    else:
        _hook(folder, classes)


class _Watch:
    """Finds nothing itself, and sets the hooks before the first of these packages is imported."""

    def __init__(self, folder, classes, packages):
        self.folder, self.classes, self.packages = folder, classes, packages

    def find_spec(self, name, path=None, target=None):
        if name in self.packages and self in sys.meta_path:
            from importlib.util import find_spec

            sys.meta_path.remove(self)
            _hook(self.folder, self.classes)
            return find_spec(name)  # from the start, now that the finders are others


def _hook(folder, classes):
    try:
        from dit_patch.launch import hooks
    except Exception as error:
        _cannot(folder, "%s: %s" % (type(error).__name__, error))
    else:
        hooks.start(folder, classes)


def _cannot(folder, why):
    said = os.path.join(folder, "unreachable-%s" % sys.executable.replace(os.sep, "_"))
    message = "dit_patch cannot be imported by %s, so nothing is patched there: %s" % (sys.executable, why)
    try:
        file = os.open(said, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except OSError:  # said already, by another process
        pass
    else:
        os.write(file, message.encode("utf-8", "replace"))
        os.close(file)
        sys.stderr.write("dit_patch: %s\n    Install dit_patch there.\n" % message)
    if os.environ.get("DIT_PATCH_RUN_STRICT"):
        raise SystemExit(3)


_start()
