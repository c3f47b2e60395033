"""What identifies a run: the script, what that imports, and their digest; commit, versions, hardware."""

import ast
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import resolve_name
from itertools import accumulate, groupby
from pathlib import Path

import torch
from git import GitError, InvalidGitRepositoryError, Repo

from mnist_lab.errors import is_script
from mnist_lab.training import RECIPE

LAB = Path(__file__).resolve().parents[1]
SCRIPT = "script"  # the name under which the script itself counts, whatever its file is called
SILENT_FIELDS = ("ctx", "kind", "type_comment", "type_ignores")  # of syntax nodes: they do not say what is computed
PACKAGES = ("torch", "torchvision", "mlflow", "numpy", "pandas", "matplotlib")

logger = logging.getLogger(__name__)


def find_sources(script: Path) -> dict[str, Path]:
    """Return the files of the script and of the modules that it imports, directly or not, by module name.

    Counted are Python files outside the standard library, site-packages and this lab, wherever an import stands. Where
    `script` is the running program, the modules of its folder that it has loaded by `importlib` and the like count too.
    """
    found, path, waiting = {SCRIPT: script}, [str(script.parent), *sys.path], [("", script)]
    while waiting:
        package, file = waiting.pop()
        for spec in _imported(file, package, path):
            if spec.name not in found and spec.origin is not None and is_script(Path(spec.origin)):
                found[spec.name] = Path(spec.origin)
                waiting.append((spec.parent or "", found[spec.name]))
    return {**_loaded_modules(script, found), **found}


def place(name: str, file: Path) -> Path:
    """Return where the file of this module is imported from, relative to the folder of the script."""
    *folders, last = name.split(".")
    return Path(*folders, last if file.name == "__init__.py" else "", file.name)


def code_sha256(sources: Mapping[str, Path]) -> str:
    """Return a SHA-256 over what the sources say to any Python, and over `RECIPE`, what the lab makes of it.

    Comments, docstrings and layout do not count: a Result can be written into a script without making its runs look
    like those of another. Nor does a space to search in, given as `main(..., search=SPACE)`.
    """
    digest = hashlib.sha256(f"recipe {RECIPE}".encode())
    for name in sorted(sources):
        content = sources[name].read_bytes()
        try:
            text = _canonical(_without_search(ast.parse(content)))
        except (SyntaxError, ValueError):  # a module that this Python can't read, behind a `try`
            text = content.hex()
        digest.update(f"\0{name}\0{text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _without_search(tree: ast.Module) -> ast.Module:
    """Leave out the space that `main` is given as `search`, its assignment, and the imports from Optuna."""
    spaces = set()
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] == "main":
            spaces |= {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "search"}
            call.keywords = [keyword for keyword in call.keywords if keyword.arg != "search"]

    def stays(node: ast.stmt) -> bool:
        match node:
            case ast.Assign(targets=[target]):
                return ast.unparse(target) not in spaces
            case ast.Import(names=names):
                return any(alias.name.partition(".")[0] != "optuna" for alias in names)
            case ast.ImportFrom(module=module):
                return (module or "").partition(".")[0] != "optuna"
        return True

    tree.body = list(filter(stays, tree.body))
    return tree


def _imported(file: Path, package: str, path: list[str]) -> Iterator[ModuleSpec]:
    """Yield every module that the file's import statements may mean, and the packages that it lies in."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # Python will say so itself when the module is used
        return
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                for alias in node.names:
                    yield from _found(alias.name, path)
            case ast.ImportFrom():
                with suppress(ImportError):  # beyond the outermost package
                    module = resolve_name("." * node.level + (node.module or ""), package)
                    for alias in node.names:  # each may be a module
                        yield from _found(f"{module}.{alias.name}", path)


def _found(name: str, path: list[str]) -> Iterator[ModuleSpec]:
    """Yield "a", "a.b" and "a.b.c" for "a.b.c", as far as they are found."""
    with suppress(ImportError, ValueError):
        for full in accumulate(name.split("."), "{}.{}".format):
            if (spec := PathFinder.find_spec(full, path)) is None:
                return
            yield spec
            path = list(spec.submodule_search_locations or [])


def _loaded_modules(script: Path, found: Mapping[str, Path]) -> dict[str, Path]:
    """Return what the running script has loaded of its folder besides `found`; nothing where another program runs."""
    loaded = {name: getattr(module, "__file__", None) or "" for name, module in [*sys.modules.items()]}
    if Path(loaded.pop("__main__")).resolve() != script.resolve():
        return {}
    known = {file.resolve() for file in found.values()}
    is_own = cache(lambda folder: folder.resolve().is_relative_to(script.resolve().parent))
    own = {name: Path(file).resolve() for name, file in sorted(loaded.items()) if is_own(Path(file).parent)}
    return {name: file for name, file in own.items() if file not in known and is_script(file)}


def _canonical(node: object) -> str:
    """Write a syntax tree as text, without docstrings and without what differs between versions of Python."""
    if isinstance(node, list):
        return f"[{','.join(filter(None, map(_canonical, node)))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return ""  # a docstring
    fields = {name: value for name, value in ast.iter_fields(node) if name not in SILENT_FIELDS}
    if isinstance(node, ast.JoinedStr):  # Pythons split the text of f-strings differently
        fields["values"] = _joined(node.values)
    named = (f"{name}={_canonical(value)}" for name, value in fields.items() if value not in (None, []))
    return f"{type(node).__name__}({','.join(named)})"


def _joined(parts: list[ast.expr]) -> list[ast.expr]:
    joined: list[ast.expr] = []
    for is_text, group in groupby(parts, lambda part: isinstance(part, ast.Constant)):
        if not is_text:
            joined += group
        elif text := "".join(part.value for part in group):  # type: ignore[attr-defined]
            joined.append(ast.Constant(text))
    return joined


# ---- where it comes from


def commit_tags(script: Path, written: Iterable[Path] = ()) -> dict[str, str]:
    """Return the state of the repository that the script lies in, as tags of a run.

    git_commit: the commit, "none" outside a repository or before the first commit, "unknown" where git refuses to say.
    git_dirty: whether any file differs from it, new ones included, except `written`: what the lab writes or fetches.
    """
    folder = script.resolve().parent
    try:
        with Repo(folder, search_parent_directories=True) as repository:
            root = Path(str(repository.working_dir))
            own = [path.resolve() for path in written]
            own = [path for path in own if path.is_relative_to(root) and not folder.is_relative_to(path)]
            others = [":/", *(f":(top,exclude,literal){path.relative_to(root)}" for path in own)]
            changes = repository.git.status("--porcelain", "--untracked-files=all", "--", *others)
            sha = repository.git.rev_parse("--verify", "--quiet", "HEAD", with_exceptions=False) or "none"
            return {"git_commit": sha, "git_dirty": "true" if changes else "false"}
    except InvalidGitRepositoryError:
        return {"git_commit": "none", "git_dirty": "false"}
    except GitError as error:
        reason = next(iter(re.findall("fatal: .*", str(error))), f"git can't be used: {error}")
        logger.warning("commit and changes of %s are recorded as unknown: %s", folder, reason)
        return {"git_commit": "unknown", "git_dirty": "unknown"}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def environment(device: torch.device) -> dict[str, str]:
    return {
        **versions(),
        "cuda": torch.version.cuda if device.type == "cuda" and torch.version.cuda else "none",
        "os": platform.platform(),
        "hardware": hardware(device),
        "threads": str(torch.get_num_threads()),
        "tf32": str(torch.backends.cudnn.allow_tf32) if device.type == "cuda" else "none",
    }


def hardware(device: torch.device) -> str:
    """Return the name of the device that trains, e.g. "NVIDIA H100" or "AMD EPYC 9R14, 2 cores, AVX512".

    A CPU's name comes with the vector instructions that torch uses: another name or others round sums in another order.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # of Linux
    named = re.search(r"^model name\s*: *(.*?) *$", info.read_text() if info.exists() else "", re.MULTILINE)
    processor = named[1] if named else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
