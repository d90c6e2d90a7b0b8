"""Loading a million transitions: seconds and peak memory, side by side with Minari's own iteration; sampling rate.

    python benchmarks/speed/data.py [--rows 1000000] [--rounds 3]

Writes the same synthetic transitions (HalfCheetah's sizes: 17 and 6 numbers, float32) once in every format we read, in
episodes of 1000 steps (`long`) and of 25 (`short`, Minari's HDF5 and D4RL only: Minari takes long to write 40,000
episodes). Every load is a process of its own; contenders run in turn. `minari` iterates over all episodes with
`iterate_episodes` and joins them into the same six arrays, which is what a user without a reader does.

Memory is the growth of the process's peak resident set over what it held before the load (all imports made), divided by
the bytes of the six arrays that training uses. Files come from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved, rate, write

import rlctl.data
from rlctl.data.arrays import Table
from rlctl.data.convert import convert, write_flat

OBS, ACT = 17, 6
LONG, SHORT = 1000, 25


def synthetic(rows: int, steps: int) -> Table:
    """Random transitions in episodes of `steps`, every second one terminated."""
    rng = np.random.default_rng(0)
    ends = np.arange(steps, rows + 1, steps)
    obs = rng.standard_normal((rows + 1, OBS), np.float32)
    terminated, truncated = np.zeros(rows, bool), np.zeros(rows, bool)
    terminated[ends[::2] - 1], truncated[ends[1::2] - 1] = True, True
    action = rng.uniform(-1, 1, (rows, ACT)).astype(np.float32)
    reward = rng.standard_normal(rows, np.float32)
    next_obs = obs[1:].copy()
    next_obs[ends - 1] = rng.standard_normal((len(ends), OBS), np.float32)
    return Table(obs[:-1], action, reward, next_obs, terminated, truncated, ends, np.add.reduceat(reward, ends - steps))


def write_minari_hdf5(table: Table, id: str) -> None:
    """The layout Minari writes, without its per-episode overhead."""
    folder = Path(os.environ["MINARI_DATASETS_PATH"]) / id / "data"
    folder.mkdir(parents=True)
    box = {"type": "Box", "dtype": "float32"}
    spaces = {
        "observation_space": {**box, "shape": [OBS], "low": [-np.inf] * OBS, "high": [np.inf] * OBS},
        "action_space": {**box, "shape": [ACT], "low": [-1.0] * ACT, "high": [1.0] * ACT},
    }
    meta = {k: json.dumps(v) for k, v in spaces.items()} | {
        "data_format": "hdf5",
        "dataset_id": id,
        "total_steps": len(table.reward),
        "total_episodes": len(table.ends),
        "minari_version": minari.__version__,
    }
    (folder / "metadata.json").write_text(json.dumps(meta))
    with h5py.File(folder / "main_data.hdf5", "w", track_order=True) as file:
        a = 0
        for k, b in enumerate(table.ends):
            group = file.create_group(f"episode_{k}")
            group.attrs.update({"id": k, "total_steps": b - a})
            obs = np.concatenate([table.obs[a:b], table.next_obs[b - 1 : b]])
            columns = {
                "observations": obs,
                "actions": table.action[a:b],
                "rewards": table.reward[a:b],
                "terminations": table.terminated[a:b],
                "truncations": table.truncated[a:b],
            }
            for name, x in columns.items():
                group.create_dataset(name, data=x, chunks=True, maxshape=(None, *x.shape[1:]))
            a = int(b)


def load_ours(source: str, view: str) -> int:
    """Read into a dataset; the bytes of its arrays."""
    data = rlctl.data.load_dataset(source, view=view)  # type: ignore[arg-type]
    return sum(x.nbytes for x in data.rows[:6])


def load_minari(source: str) -> int:
    """Minari's iteration, joined into the same arrays."""
    obs, next_obs, rest = [], [], [[], [], [], []]
    for e in minari.load_dataset(source).iterate_episodes():
        obs.append(e.observations[:-1])
        next_obs.append(e.observations[1:])
        for column, x in zip(rest, (e.actions, e.rewards, e.terminations, e.truncations), strict=True):
            column.append(x)
    arrays = [torch.from_numpy(np.concatenate(x)) for x in (obs, next_obs, *rest)]
    return sum(x.nbytes for x in arrays)


def worker(kind: str, source: str) -> None:
    """One load, measured: a JSON line."""
    try:
        import pyarrow.dataset
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        pass
    import minari.dataset._storages.hdf5_storage  # noqa: F401

    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    held = load_minari(source) if kind == "minari" else load_ours(source, kind)
    seconds = time.perf_counter() - start
    high = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # of this process, not its parent
    assert high is not None
    peak = int(high[1]) * 1024
    print(json.dumps({"seconds": seconds, "growth": (peak - before) / held, "bytes": held}))


def measure(kind: str, source: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--worker", kind, source], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", choices=("long", "short"), default=["long", "short"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    if args.worker:
        return worker(*args.worker)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = str(Path(folder) / "minari")
        sources: dict[str, tuple[str, str]] = {}
        for name in args.layouts:
            steps = {"long": LONG, "short": SHORT}[name]
            table = synthetic(args.rows, steps)
            write_minari_hdf5(table, f"speed/{name}-v0")
            flat = [write_flat(table, Path(folder) / f"{name}{suffix}") for suffix in (".hdf5", ".npz")]
            sources[f"minari-hdf5 {name}"] = ("exact", f"speed/{name}-v0")
            sources[f"d4rl-hdf5 {name}"] = ("exact", str(flat[0]))
            if name == "long":
                sources["npz long"] = ("exact", str(flat[1]))
                sources["d4rl-hdf5 long, d4rl_compat"] = ("d4rl_compat", str(flat[0]))
                for k, storage in ((1, "arrow"), (2, "parquet")):
                    convert("speed/long-v0", id=f"speed/long-v{k}", storage=storage)
                    sources[f"minari-{storage} {name}"] = ("exact", f"speed/long-v{k}")
                    sources[f"minari-{storage} {name}, by minari"] = ("minari", f"speed/long-v{k}")
            sources[f"minari-hdf5 {name}, by minari"] = ("minari", f"speed/{name}-v0")
        results: dict[str, list[dict[str, Any]]] = {k: [] for k in sources}
        for r in range(args.rounds):
            for name, (kind, source) in sources.items():
                results[name].append(measure(kind, source))
                last = results[name][-1]
                print(
                    f"  round {r + 1}/{args.rounds}  {name:<36} {last['seconds']:>7.2f} s  {last['growth']:>5.2f}x",
                    flush=True,
                )
        data = rlctl.data.load_dataset(f"speed/{args.layouts[0]}-v0")
    loads = {
        name: {
            "seconds": float(np.median([x["seconds"] for x in runs])),
            "peak_growth_over_arrays": float(np.median([x["growth"] for x in runs])),
            "rounds": runs,
        }
        for name, runs in results.items()
    }
    torch.set_num_threads(1)

    def draw(n: int) -> int:
        data.sample(n)
        return n

    batches = {f"sample({n})": (lambda n=n: rate(lambda: draw(n), 1.0)) for n in (256, 2048)}
    sampling = interleaved(batches, args.rounds)
    for name, x in loads.items():
        print(f"{name:<36} {x['seconds']:>7.2f} s   {x['peak_growth_over_arrays']:>5.2f} times the arrays")
    result = {
        "rows": args.rows,
        "mib": next(iter(results.values()))[0]["bytes"] / 2**20,
        "loads": loads,
        "rows_sampled": sampling,
    }
    write("speed-data", result, args.out)
    return None


if __name__ == "__main__":
    main()
