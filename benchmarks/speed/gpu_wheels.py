"""Packages for `gpu.py` on a machine that has torch and CUDA but reaches no package registry.

    python benchmarks/speed/gpu_wheels.py fetch                 # here: fills .wheels/, which git ignores
    (carry the source tree and .wheels/ over)
    python3 benchmarks/speed/gpu_wheels.py unpack /tmp/site     # there
    PYTHONPATH=/tmp/site python3 benchmarks/speed/gpu.py

`fetch` downloads wheels for Linux on x86-64 and the Python of the target, takes out what a GPU run does not need (the
CPU compiler of warp, examples, tests, meshes) and packs the rest: 94 MiB, after three minutes of one core. With
--part-mib the archive is cut into parts of that size, for a way that carries no more at a time: bring one after the
other, unpack when all are there. Without its CPU compiler warp simulates on a GPU alone.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(".wheels")
ARCHIVE = "site.tar.xz"
PACKAGES = (
    "warp-lang",
    "mujoco-warp",
    "mujoco-core",
    "gymnasium",
    "farama-notifications",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "minari",
    "stable-baselines3",
    "etils",
    "glfw",
    "dm_control",
)
"""What a machine with torch, numpy, scipy, h5py, typer, rich, PyYAML, safetensors, psutil, imageio, tensorboard,
pandas, matplotlib and cloudpickle lacks. mujoco-core is MuJoCo without the viewer; glfw is for Gymnasium, whose
environments Stable-Baselines3 is measured in. --add names others."""
NOT_NEEDED = ("warp/bin/warp-clang*", "warp/examples/*", "warp/tests/*", "mujoco_warp/test_data/*", "*_test.py")
ONLY = {"dm_control/*": ("dm_control/__init__.py", "dm_control/suite/*.xml")}
"""Of a folder, these files and no others: of dm_control the models, for its code is never imported."""


def pins() -> dict[str, str]:
    """Versions of constraints.txt, by normalised name."""
    lines = (Path(__file__).resolve().parents[2] / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def download(python: str, packages: list[str], folder: Path) -> list[Path]:
    known = pins()
    wanted = [f"{p}=={known[p]}" if p in known else p for p in packages]
    platforms = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    command += [x for p in platforms for x in ("--platform", p)]
    subprocess.run([*command, *wanted], check=True)
    return sorted(folder.glob("*.whl"))


def needed(name: str) -> bool:
    """Whether a file of a wheel goes along."""
    if name.endswith("/") or any(fnmatch.fnmatch(name, pattern) for pattern in NOT_NEEDED):
        return False
    kept = [patterns for folder, patterns in ONLY.items() if fnmatch.fnmatch(name, folder)]
    return all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for patterns in kept)


def pack(wheels: list[Path], out: Path) -> int:
    """One archive of everything the wheels would install, less what is not needed; returns its bytes."""
    with lzma.open(out, "wb", preset=3) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as z:
                for name in z.namelist():
                    if not needed(name):
                        continue
                    data = z.read(name)
                    info = tarfile.TarInfo(name)
                    info.size, info.mode = len(data), 0o755
                    tar.addfile(info, io.BytesIO(data))
            print(f"  packed {wheel.name}", flush=True)
    return out.stat().st_size


def cut(archive: Path, mib: int) -> list[Path]:
    """Replace an archive by parts of at most `mib` MiB, whose names tell how many there are."""
    size, parts = mib * 2**20, []
    count = -(-archive.stat().st_size // size)
    with archive.open("rb") as f:
        while data := f.read(size):
            part = archive.with_name(f"{archive.name}.{len(parts) + 1:02d}of{count:02d}")
            part.write_bytes(data)
            parts.append(part)
    archive.unlink()
    return parts


def fetch(args: argparse.Namespace) -> None:
    args.folder.mkdir(exist_ok=True)
    for old in args.folder.glob(f"{ARCHIVE}*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as temp:
        wheels = download(args.python, [*PACKAGES, *args.add], Path(temp))
        archive = args.folder / ARCHIVE
        size = pack(wheels, archive)
    parts = cut(archive, args.part_mib) if args.part_mib else [archive]
    print(f"{size / 2**20:.0f} MiB in {', '.join(str(p) for p in parts)}")


def unpack(args: argparse.Namespace) -> None:
    parts = sorted(args.folder.glob(f"{ARCHIVE}*"))
    if not parts:
        sys.exit(f"no {ARCHIVE} in {args.folder}: run `fetch` where there is a package registry, and carry the folder")
    _, cut, count = parts[-1].name.rpartition("of")
    if len(parts) != (int(count) if cut else 1):
        sys.exit(f"{args.folder} holds {', '.join(p.name for p in parts)}: not all parts of one archive, and no others")
    data = b"".join(p.read_bytes() for p in parts)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:xz") as tar:
        tar.extractall(args.target, filter="data")
    print(f"unpacked into {args.target}: set PYTHONPATH={args.target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    get = verbs.add_parser("fetch", help="download and pack, where there is a package registry")
    get.add_argument("--python", default="3.12", help="Python version of the target")
    get.add_argument("--part-mib", type=int, default=0, help="cut the archive into parts of this size")
    get.add_argument("--add", nargs="*", default=[], help="further packages")
    get.set_defaults(verb=fetch)
    put = verbs.add_parser("unpack", help="unpack on the target")
    put.add_argument("target", type=Path)
    put.set_defaults(verb=unpack)
    for sub in (get, put):
        sub.add_argument("--folder", type=Path, default=FOLDER, help="of the archive")
    args = parser.parse_args()
    args.verb(args)


if __name__ == "__main__":
    main()
