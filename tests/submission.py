"""Test a copy of one submission; tests/mark.py starts a copy of this file, next to one of unittests.py, in a process.

The result goes to report.json next to this file: verdict, mistakes, what was not checked, and a remark.
"""

import builtins
import contextlib
import functools
import json
import os
import re
import shutil
import sys
import unittest
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

GROUPS = ("Networks", "Losses", "Mistakes", "TrainMistakes")
IGNORED = re.compile(r"\..*|__MACOSX|__pycache__|@eaDir|lost\+found")  # folders of systems and programs
FILE_SIZE, SIZE = 50 * 2**20, 2**30  # bytes of a file, and of all files, that are copied at most
OWN = "of_the_submission"  # the package of those modules of a submission that are named like others


def copy_files(source, target):
    """Copy a folder, but no large files, special files or links to folders; return [(file, its copy, why not)]."""
    room = SIZE

    def copy(file, to):
        nonlocal room
        room -= max(os.path.getsize(file), 4096)  # bounds the number of small files, too
        if not os.path.isfile(file) or os.path.getsize(file) > FILE_SIZE or room < 0 and not str(file).endswith(".py"):
            raise OSError("not a file, too large, or beyond 1 GB in all")
        shutil.copyfile(file, to)

    def ignored(folder, names):
        paths = {name: Path(folder, name) for name in names if os.path.isdir(os.path.join(folder, name))}
        return [name for name, path in paths.items()
                if IGNORED.fullmatch(name) or path.is_symlink() or (path / "pyvenv.cfg").exists()]

    try:
        shutil.copytree(source, target, ignore=ignored, copy_function=copy)
        return []
    except OSError as error:
        return error.args[0] if isinstance(error, shutil.Error) else [(source, target, error.strerror)]
    finally:
        for folder, *_ in os.walk(target):
            os.chmod(folder, 0o700)  # it may be read-only


def what_is_missing(folder):
    """Return why a submission cannot be tested, or None."""
    if (folder / "models.py").is_file() or (folder / "models" / "__init__.py").is_file():
        return None
    others = [path.relative_to(folder) for path in folder.rglob("*")
              if path.name.lower().startswith("models") or path.suffix == ".ipynb"]
    nearest = [f", but {min(others, key=lambda path: (len(path.parts), path))}"] if others else [""]
    return f"no readable models.py directly in the folder{nearest[0]}"


class Finder:
    """Finds modules of the given folders after the standard library's and before those installed."""

    def __init__(self, *folders):
        self.folders = folders

    def find_spec(self, name, path=None, target=None):
        if path is not None or name in sys.stdlib_module_names:
            return None
        spec = PathFinder.find_spec(name, self.folders)
        if spec and spec.has_location:  # a mere folder, such as tensorboard/, does not hide what is installed
            return spec
        if name in ("models", "train"):  # of the submission, or of nobody
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def importer(folder, taken):
    """Return a __import__ by which a submission's files, and no others, get its own modules of the names in `taken`."""
    standard, package = builtins.__import__, ModuleType(OWN)
    sys.modules[OWN], package.__path__ = package, [str(folder)]

    def load(name, globals=None, locals=None, fromlist=(), level=0):
        top, file = name.partition(".")[0], Path((globals or {}).get("__file__") or "")
        if level or top not in taken or folder not in file.parents or file.stem == top:
            return standard(name, globals, locals, fromlist, level)
        module = standard(f"{OWN}.{name}", fromlist=fromlist or ("__name__",))
        own = sys.modules[f"{OWN}.{top}"]
        vars(own).setdefault("__all__", [name for name in vars(own) if not name.startswith("_")])
        vars(own).setdefault("__getattr__", functools.partial(getattr, standard(top)))  # for what it lacks
        return module if fromlist else own

    return load


def run_groups(folder, desk, output):
    """Return the result of the tests; standard library, installed packages and unittests.py do not see the folder."""
    sys.path.insert(0, str(desk))
    import unittests

    unittests.load_groups()
    suite = unittest.defaultTestLoader.loadTestsFromNames(GROUPS, unittests)
    sys.argv[:] = ["unittests.py"]
    sys.path.append(str(folder))  # for the processes that it starts
    sys.meta_path.insert(0, Finder(str(folder), str(desk / "handed_out")))
    names = {*sys.stdlib_module_names, "tests", "unittests"} - {*sys.builtin_module_names}  # built-in ones always win
    if taken := {path.stem for path in folder.iterdir()} & names:
        builtins.__import__ = importer(folder, taken)
    os.chdir(folder)
    return unittest.TextTestRunner(output, verbosity=2, warnings="default").run(suite)


def judge(result):
    """Return a row of marks.csv without its folder; only a submission of which all was checked has passed."""
    counts = ", ".join(f"{kind}={len(tests)}" for kind, tests in (
        ("failures", result.failures), ("errors", result.errors), ("skipped", result.skipped)) if tests)
    right = result.wasSuccessful() and result.testsRun > 0
    failures = "".join(text for _, text in result.failures + result.errors)
    unchecked = [re.match("(?:Mistake )?([^:\n]*)", words)[1][:60] for _, words in result.skipped]
    return {"verdict": "failed" if not right else "incomplete" if result.skipped else "passed",
            "mistakes": numbers(re.findall(r"^AssertionError: Mistake (\d+):", failures, re.MULTILINE)),
            "not checked": numbers(unchecked),
            "remark": ("OK" if right else "FAILED") + (f" ({counts})" if counts else "")}


def numbers(texts):
    """Return different texts as one, numbers first and in their order."""
    return " ".join(sorted(set(texts), key=lambda text: (not text.isdigit(), text.zfill(9))))


def main(submission):
    process, desk = os.getpid(), Path(__file__).resolve().parent
    folder, report = desk / "submission", desk / "report.json"
    output = open(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (for what follows)
    for file, _, why in copy_files(submission, folder):
        print(f"not copied: {os.path.relpath(file, submission)} ({why})", file=output)
    missing = what_is_missing(folder)
    row = {"verdict": "failed", "remark": missing} if missing else judge(run_groups(folder, desk, output))
    if os.getpid() == process:  # and not one that the submission has forked
        report.write_text(json.dumps(row), encoding="utf-8")
    for stream in (output, sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # whatever the submission has put there
            stream.flush()
    os._exit(0)  # whatever threads the submission has started


if __name__ == "__main__":
    main(sys.argv[1])
