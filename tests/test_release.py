"""What is released: one version, nothing heavy or said at import, no word of one system only, licenses of others."""

import ast
import importlib
import os
import re
import runpy
import socket
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml

from gptq_ao.checkpoint.files import durable
from gptq_ao.journal import files, lock
from gptq_ao.version import VERSION

from .test_architecture import ROOT, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_one_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == VERSION
    assert PROJECT["dynamic"] == ["version"]


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_importing_says_nothing() -> None:
    done = process("-W", "error", "-c", "import gptq_ao")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


HEAVY = {
    *("transformers", "datasets", "pyarrow", "pandas", "matplotlib", "peft", "accelerate", "huggingface_hub", "vllm"),
    *("gguf", "rich", "typer", "PIL", "torchvision", "jinja2", "numba", "scipy", "triton"),
}


def test_importing_brings_nothing_heavy() -> None:
    """Beside what torchao brings; and of this package no kernel for another device than there may be, no model of
    transformers, no command. `benchmarks/import_time.py` measures what that takes."""
    code = """
import sys
import torch, torchao
before = set(sys.modules)
import gptq_ao
print(*sorted(set(sys.modules) - before))
"""
    done = process("-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr
    new = done.stdout.split()
    assert "gptq_ao.pipeline.quantize" in new
    assert {name.partition(".")[0] for name in new} & HEAVY == set()
    rooms = ("gptq_ao.kernels.triton", "gptq_ao.kernels.gluon", "gptq_ao.cli", "gptq_ao.integrations.vllm")
    assert [n for n in new if n.startswith((*rooms, "gptq_ao.integrations.transformers", "gptq_ao.demo"))] == []


# What others import that are in an environment of their own.
OTHERS = ("integrations.vllm.", "integrations.torchtitan")
# What only some systems have: modules, and names in `os` and `signal`.
POSIX = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "_posixsubprocess")
NAMES = [
    *("fork", "forkpty", "sync", "fdatasync", "posix_fadvise", "posix_fallocate", "posix_spawn", "getuid", "geteuid"),
    *("getgid", "setsid", "setpgid", "killpg", "getpgid", "sysconf", "statvfs", "fstatvfs", "sched_getaffinity"),
    *("mkfifo", "mknod", "chown", "lchown", "uname", "nice", "getloadavg", "wait3", "wait4", "sendfile", "pread"),
    *("pwrite", "preadv", "pwritev", "memfd_create", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECT", "O_DIRECTORY", "O_SYNC"),
    *("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGQUIT", "SIGCHLD", "SIGPIPE", "alarm", "setitimer"),
    "pthread_kill",
]


def test_every_module_is_imported_where_there_is_neither_posix_nor_triton() -> None:
    """Those apart that vLLM or torchtitan import, and the kernels themselves, which are imported where one runs."""
    apart = ("kernels.triton.", "kernels.gluon.", *OTHERS, "tiny_lm.train", "__main__")
    names = [f"gptq_ao.{name}".rstrip(".") for name in sources() if not name.startswith(apart)]
    code = f"""
import importlib, os, shutil, signal, sys
# Of others; whether they are there for each system is not asked here.
import torch, torchao, transformers.modeling_utils, peft, tempfile, subprocess, multiprocessing
for name in {[*POSIX, "triton", "triton.language"]}:
    sys.modules[name] = None
for name in {NAMES}:
    for module in (os, signal):
        if hasattr(module, name):
            delattr(module, name)
failed = []
for name in {names}:
    try:
        importlib.import_module(name)
    except Exception as e:
        failed.append(f"{{name}}: {{type(e).__name__}}: {{e}}")
print(*failed, "fine", sep="\\n")
"""
    assert len(names) > 150
    done = process("-W", "ignore", "-c", code)
    assert done.stdout.splitlines() == ["fine"], done.stderr[-3000:]


def used(tree: ast.AST) -> list[str]:
    """Names of `os` and `signal` that only some systems have; `getattr` with a default asks for one."""
    nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name))
    return [f"{n.value.id}.{n.attr}" for n in nodes if n.value.id in ("os", "signal") and n.attr in NAMES]  # type: ignore[attr-defined]


def test_no_name_of_one_system_is_used_where_it_may_not_be() -> None:
    found = {name: used(ast.parse(path.read_text(encoding="utf-8"))) for name, path in sources().items()}
    assert {name: names for name, names in found.items() if names} == {}
    assert used(ast.parse("import os\nos.sync(); getattr(os, 'sync', None)")) == ["os.sync"]


def test_a_journal_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file is text unless it is opened as bytes, only what may be written is synchronized, and to ask for a
    process like elsewhere would end it."""
    opened: list[int] = []

    def remember(path: Path, flags: int, mode: int = 0o777) -> int:
        opened.append(flags)
        return own(path, flags & ~binary, mode)

    own, binary = os.open, 2**30
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(os, "O_BINARY", binary, raising=False)
    monkeypatch.setattr(os, "open", remember)
    os.close(files.open_plain(tmp_path / "file", os.O_RDONLY))
    assert opened.pop() & binary
    asked = str(tmp_path / "file")
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        windows.setattr(os, "kill", lambda *_: pytest.fail("it was ended"))
        durable.sync_file(asked)  # type: ignore[arg-type]
        gone = lock._gone({"host": socket.gethostname(), "pid": os.getpid(), "started": None})
    assert opened.pop() & os.O_RDWR
    assert not gone


@pytest.mark.parametrize("missing", [False, True])
def test_the_peak_of_memory(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = importlib.import_module("gptq_ao.planning.memory")
    if missing:
        monkeypatch.setattr(memory, "resource", None)
    assert set(memory.peak_bytes()) <= ({"cuda"} if missing else {"host", "cuda"})
    assert missing or memory.peak_bytes()["host"] > 2**24


def test_triton_is_asked_for_where_there_is_one() -> None:
    (requirement,) = (r for r in PROJECT["dependencies"] if r.startswith("triton"))
    assert requirement.partition(";")[2].strip() == "sys_platform == 'linux'"


def test_what_is_imported_is_declared() -> None:
    """At the top of a file, so that `import gptq_ao` or a command needs it; by this package or by torch."""
    declared = {re.split(r"[^\w.-]", r, maxsplit=1)[0].replace("pyyaml", "yaml") for r in PROJECT["dependencies"]}
    apart = ("kernels.gluon.", *OTHERS, "integrations.peft", "tiny_lm.train")
    declared |= {re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in distribution("torch").requires or []}
    imported = set()
    for name, path in sources().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not name.startswith(apart) and isinstance(node, ast.Import | ast.ImportFrom):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                imported |= {m.partition(".")[0] for m in modules}
    assert imported - set(sys.stdlib_module_names) - {"gptq_ao", "gptq_ao_autoload"} <= declared


def test_licenses_of_all_dependencies_are_listed() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "licenses.py"))
    page = (ROOT / "docs" / "licenses.md").read_text(encoding="utf-8")
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| ")}
    declared = dict(script["declared"]())
    every = [*PROJECT["dependencies"], *(r for names in PROJECT["optional-dependencies"].values() for r in names)]
    assert set(declared) == {re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in every}
    assert set(rows) - {"package"} == set(declared)
    for name, use in declared.items():
        assert rows[name].endswith(f" | {use} |"), name
        license = rows[name].split(" | ")[1]
        assert license not in ("", "not known here", "not stated"), name
        try:
            assert script["license_of"](distribution(name)) != "not stated", name  # in words that may change
        except PackageNotFoundError:
            continue
