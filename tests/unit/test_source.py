"""Nothing that comes from a file or a socket is ever run: the source has no way to do it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import bascule

RUNS_DATA = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "jsonpickle",
    "joblib",
    "yaml",
    "code",
    "runpy",
}
CALLS = {"eval", "exec", "compile", "__import__"}
LOADS = {("torch", "load"), ("zmq", "recv_pyobj"), ("os", "system"), ("subprocess", "getoutput")}
METHODS = {"recv_pyobj", "send_pyobj"}


def forbidden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of what could run data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names if each.name.split(".")[0] in RUNS_DATA)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in RUNS_DATA:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in CALLS:
                yield node.lineno, called.id
            elif isinstance(called, ast.Attribute):
                owner = called.value.id if isinstance(called.value, ast.Name) else ""
                if (owner, called.attr) in LOADS or called.attr in METHODS:
                    yield node.lineno, f"{owner}.{called.attr}"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in ("allow_pickle", "shell", "trust_remote_code") and value is not False:
                    yield node.lineno, f"{keyword.arg}={value}"


def test_no_module_of_ours_can_run_what_it_is_given() -> None:
    package = Path(bascule.__file__).parent
    sources = sorted(package.rglob("*.py"))
    assert len(sources) > 100
    found = [
        f"{path.relative_to(package)}:{line}: {name}"
        for path in sources
        for line, name in forbidden(ast.parse(path.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "eval(x)",
        "torch.load(f)",
        "s.recv_pyobj()",
        "numpy.load(f, allow_pickle=True)",
        "subprocess.run(c, shell=yes)",
    ],
)
def test_what_could_is_found(source: str) -> None:
    assert list(forbidden(ast.parse(source)))
