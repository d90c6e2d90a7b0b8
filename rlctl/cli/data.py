"""`rlctl data`: list, info, verify, collect, convert, download."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="data",
    help="Datasets: look at them, check them, record, convert and fetch them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="DATASET", help="A local Minari id or folder, a D4RL id, or the path of an .hdf5 or .npz file."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
EpisodeLen = Annotated[
    int | None, typer.Option(min=1, help="Step limit of the task, for a flat file that does not tell.")
]


@app.command("list")
def list_(
    remote: Annotated[
        bool, typer.Option("--remote", help="What can be downloaded instead of what is here; needs a network.")
    ] = False,
    prefix: Annotated[str, typer.Option(help="Only ids that begin with this, e.g. mujoco/hopper.")] = "",
    json_: Json = False,
) -> None:
    """List the datasets on this machine: Minari's, and D4RL's files.

    [bold]Examples[/bold]

      rlctl data list

      rlctl data list --remote --prefix mujoco/
    """
    from rlctl.cli.output import print_json, print_table

    if remote:
        from rlctl.data.d4rl import catalogue
        from rlctl.data.download import remote_ids

        rows = [{"id": i, "benchmark": "D4RL"} for i in sorted(catalogue()) if i.startswith(prefix)]
        if not (prefix and rows and "/" not in prefix):  # a D4RL prefix needs no network
            rows += [{"id": i, "benchmark": "Minari"} for i in remote_ids(prefix)]
        if json_:
            print_json({"datasets": rows})
        else:
            print_table(["ID", "BENCHMARK"], [list(r.values()) for r in rows])
            print("\nFetch one: rlctl data download ID")
        return
    found = [r for r in _local() if str(r["id"]).startswith(prefix)]
    if json_:
        print_json({"datasets": found})
        return
    head = ["ID", "FORMAT", "EPISODES", "STEPS", "MIB", "ENVIRONMENT", "ALGORITHM"]
    shown = [
        [r["id"], r["format"], r["episodes"], r["transitions"], f"{r['bytes'] / 2**20:.1f}", r["env"], r["algorithm"]]
        for r in found
    ]
    print_table(head, shown)
    if not found:
        print("none here: rlctl data download ID, or rlctl data collect")


def _local() -> list[dict[str, Any]]:
    from rlctl.data import d4rl, minari_files
    from rlctl.data.arrays import DatasetError

    rows: list[dict[str, Any]] = []
    root = minari_files.minari_root()
    for id in minari_files.local_ids(root):
        data = root / id / "data"
        size = sum(f.stat().st_size for f in data.rglob("*") if f.is_file())
        try:
            origin = minari_files.describe(data)
        except DatasetError:
            rows.append(_row(id, "damaged", None, None, size))
            continue
        meta = origin.meta
        row = _row(id, origin.format, meta.get("total_episodes"), meta.get("total_steps"), size)
        rows.append(row | {"env": origin.env_id, "algorithm": meta.get("algorithm_name")})
    folder = d4rl.d4rl_root()
    files = sorted(folder.glob("*.hdf5")) if folder.is_dir() else []
    return rows + [_row(d4rl.d4rl_id(f.stem) or str(f), "d4rl-hdf5", None, None, f.stat().st_size) for f in files]


def _row(id: str, fmt: str, episodes: Any, steps: Any, size: int) -> dict[str, Any]:
    return {
        "id": id,
        "format": fmt,
        "episodes": episodes,
        "transitions": steps,
        "bytes": size,
        "env": None,
        "algorithm": None,
    }


@app.command("info")
def info(dataset: Source, episode_len: EpisodeLen = None, json_: Json = False) -> None:
    """Show what a dataset holds: episodes, returns, lengths, actions, scores, and the histogram of returns.

    [bold]Examples[/bold]

      rlctl data info mujoco/hopper/medium-v0

      rlctl data info ~/data/hopper_medium-v2.hdf5 --json
    """
    from rlctl.cli.output import busy, print_json, print_table
    from rlctl.data.dataset import read
    from rlctl.data.inspect import summarize

    with busy(f"reading {dataset}"):
        found = summarize(*read(dataset, episode_len=episode_len))
    if json_:
        print_json(found)
        return
    box = found["action_box"]
    score = found["normalized_score"]
    steps = f"{found['transitions']:,} transitions in {found['episodes']:,} episodes"
    rows = [
        ["dataset", f"{found['dataset']} ({found['format']}, benchmark {found['benchmark']})"],
        ["environment", found["env"] or "not named"],
        ["size", f"{steps}, {found['terminated_episodes']:,} of them ended by the task"],
        ["observation", f"{found['obs_dim']} numbers"],
        ["return", _spread(found["return"])],
        ["length", _spread(found["length"])],
        ["reward", _spread(found["reward"], 4)],
        ["action", f"{found['act_dim']} numbers" + ("" if box is None else f", mapped to [-1, 1] from {_bounds(box)}")],
        ["  lowest", _numbers(found["action_min"])],
        ["  highest", _numbers(found["action_max"])],
        ["  clipped", f"{found['clipped_actions']:.2%} of all components are at ±1 or beyond"],
    ]
    if score is not None:
        scale = f"D4RL's scale for {found['score_reference']} (0 random, 100 expert)"
        rows.append(["score", f"{score:.1f} = mean return on {scale}"])
    if "ref_max_score" in found:
        rows.append(["references", f"{found['ref_min_score']:g} and {found['ref_max_score']:g}, as the dataset says"])
    rows += [[key, found[key]] for key in ("algorithm", "description") if found[key]]
    if found["author"]:
        rows.append(["author", ", ".join(found["author"])])
    print_table(["", ""], rows)
    print("\nepisode returns")
    print("\n".join(histogram(found["histogram"]["counts"], found["histogram"]["edges"])))


def histogram(counts: list[int], edges: list[float], width: int = 50) -> list[str]:
    """Horizontal bars, one per bin, drawn in eighths of a character; a bin that is not empty shows at least one."""
    most = max(counts)
    labels = [f"{a:.6g}" for a in edges]
    pad = max(map(len, labels))
    lines = []
    for count, low, high in zip(counts, labels[:-1], labels[1:], strict=True):
        eighths = max(round(count / most * width * 8), count > 0)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        lines.append(f"{low:>{pad}} to {high:>{pad}}  {bar} {count or ''}".rstrip())
    return lines


def _spread(x: dict[str, float], digits: int = 1) -> str:
    mean, std, low, high = (f"{x[k]:.{digits}f}" for k in ("mean", "std", "min", "max"))
    return f"{mean} ± {std}, {low} to {high}"


def _bounds(box: list[list[float]]) -> str:
    low, high = (f"{x[0]:g}" if len(set(x)) == 1 else _numbers(x) for x in box)
    return f"[{low}, {high}]"


def _numbers(x: list[float]) -> str:
    return " ".join(f"{v:.3f}" for v in x)


@app.command("verify")
def verify(
    dataset: Source,
    episode_len: EpisodeLen = None,
    reward_range: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="Bounds every reward must keep.")
    ] = None,
    json_: Json = False,
) -> None:
    """Look for what breaks training: one line per finding, exit code 1 when one of them is an error.

    Found are arrays of unequal lengths, damaged files, NaN, next observations that are copies or do not follow,
    terminals at the time limit, actions outside [-1, 1], rewards out of range, metadata that is not true.

    [bold]Examples[/bold]

      rlctl data verify mujoco/hopper/medium-v0

      rlctl data verify my_robot.npz --episode-len 500 --reward-range -10 10
    """
    from dataclasses import asdict

    from rlctl.cli.output import busy, print_json
    from rlctl.data.inspect import verify as look

    with busy(f"reading {dataset}"):
        found = look(dataset, episode_len=episode_len, reward_range=reward_range)
    bad = any(f.level == "error" for f in found)
    if json_:
        print_json({"dataset": dataset, "ok": not bad, "findings": [asdict(f) for f in found]})
    else:
        for f in found:
            print(f"{f.level}: {f.about}: {f.message}")
        if not found:
            print(f"{dataset}: nothing found")
    if bad:
        raise typer.Exit(1)


@app.command("collect")
def collect(
    policy: Annotated[
        str, typer.Option(metavar="POLICY", help="random, RUN_DIR, RUN_DIR@best or RUN_DIR@STEP of a checkpoint.")
    ],
    id: Annotated[str, typer.Option(metavar="NAMESPACE/NAME-vK", help="Id of the new Minari dataset.")],
    steps: Annotated[int, typer.Option(min=1, help="Transitions, at least: episodes are played to their ends.")],
    env: Annotated[str | None, typer.Option(help="Task; the default is the run's own. See `rlctl envs`.")] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(metavar="POLICY=SHARE", help="Another policy with its share of the steps; may be repeated."),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The policies' deterministic actions instead of sampled ones.")
    ] = False,
    num_envs: Annotated[int, typer.Option(min=1, help="Worlds simulated side by side.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Root of every random stream.")] = 0,
    storage: Annotated[str, typer.Option(help="hdf5, arrow or parquet (these two need pyarrow).")] = "hdf5",
    author: Annotated[str, typer.Option(help="Who recorded it, for the metadata.")] = "anonymous",
    author_email: Annotated[str | None, typer.Option(help="For the metadata.")] = None,
    code_permalink: Annotated[str | None, typer.Option(help="Link to the code, for the metadata.")] = None,
    description: Annotated[str | None, typer.Option(help="A sentence to begin the description with.")] = None,
    ref_scores: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="RANDOM EXPERT", help="Returns that score 0 and 100; D4RL's where it has the task."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Setting of the task, e.g. physics=native.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Record policies into a Minari dataset, which `minari.load_dataset` opens.

    [bold]Examples[/bold]

      rlctl data collect --env Hopper --policy random --steps 100000 --id mine/hopper-random-v0

      rlctl data collect --policy runs/sac/Hopper-v5/s0-0123abcd --steps 200000 --id mine/hopper-expert-v0

      rlctl data collect --policy RUN_DIR --mix RUN_DIR@100000=0.3 --mix random=0.2 --steps 200000 --id mine/mixed-v0
    """
    from rlctl.config import parse_overrides
    from rlctl.data import collect as recording
    from rlctl.data.write import check_new_id, check_storage

    check_new_id(id)
    check_storage(storage)
    options = parse_overrides(set_ or [])
    policies = recording.parse_policies(policy, mix or [])
    with _progress("steps", steps, quiet) as advance:
        folder = recording.collect(
            env,
            policies,
            steps,
            id,
            num_envs=num_envs,
            seed=seed,
            stochastic=not deterministic,
            env_options=options,
            author=author,
            author_email=author_email,
            code_permalink=code_permalink,
            description=description,
            ref_scores=ref_scores,
            storage=storage,
            progress=advance,
        )
    if not quiet:
        print(f"dataset:   {id} in {folder}")
        print(f"look at:   rlctl data info {id}")
        print(f"learn:     rlctl train --algo td3bc --data {id}")


@app.command("convert")
def convert(
    dataset: Source,
    out: Annotated[Path | None, typer.Option(help="Flat file to write: .hdf5 (D4RL's layout) or .npz.")] = None,
    id: Annotated[str | None, typer.Option(metavar="NAMESPACE/NAME-vK", help="Minari dataset to write.")] = None,
    storage: Annotated[str, typer.Option(help="Of a Minari dataset: hdf5, arrow or parquet.")] = "hdf5",
    env: Annotated[str | None, typer.Option(help="Task to name in a Minari dataset, e.g. Hopper.")] = None,
    author: Annotated[str | None, typer.Option(help="For the metadata of a Minari dataset.")] = None,
    episode_len: EpisodeLen = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Write a dataset in another format: Minari (three storages), D4RL's HDF5, .npz.

    [bold]Examples[/bold]

      rlctl data convert hopper_medium-v2.hdf5 --id d4rl/hopper-medium-v2 --env Hopper-v4

      rlctl data convert mujoco/hopper/medium-v0 --out hopper.npz

      rlctl data convert mine/hopper-v0 --id mine/hopper-v1 --storage parquet
    """
    from rlctl.cli.output import busy
    from rlctl.data import convert as conversion

    with busy(f"converting {dataset}", quiet):
        target = conversion.convert(
            dataset, out=out, id=id, storage=storage, env=env, author=author, episode_len=episode_len
        )
    if not quiet:
        print(f"written:   {target}")


@app.command("download")
def download(
    dataset: Annotated[str, typer.Argument(metavar="ID", help="A Minari id or a D4RL id; see `data list --remote`.")],
    remote: Annotated[
        str | None, typer.Option(help="Minari remote: hf://ORG or gcp://BUCKET. Default: MINARI_REMOTE, or Minari's.")
    ] = None,
    mirror: Annotated[
        str | None, typer.Option(help="Other source of D4RL's files: a URL laid out as theirs, or hf://ORG/REPO.")
    ] = None,
    sha256: Annotated[str | None, typer.Option(metavar="HEX", help="What a D4RL file must hash to.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Fetch a public dataset. Given again after an interruption, the command goes on where it was.

    Published hashes are checked; the SHA-256 of what came is written beside it. Exit code 1 means the network failed.

    [bold]Examples[/bold]

      rlctl data download mujoco/hopper/medium-v0

      rlctl data download hopper-medium-replay-v2
    """
    from rlctl.data import download as fetching

    with _progress("bytes", None, quiet) as advance:
        target = fetching.download(dataset, remote=remote, mirror=mirror, sha256=sha256, progress=advance)
    if not quiet:
        print(f"dataset:   {dataset} in {target}")
        print(f"look at:   rlctl data info {dataset}")


# ------------------------------------------------------------------------------------------------------------ display
@contextmanager
def _progress(unit: str, total: int | None, quiet: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on a terminal, a line every ten seconds in a pipe; both on stderr."""
    import sys
    import time

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    last = time.monotonic()
    if quiet or not console.is_terminal:

        def line(done: int, of: int | None) -> None:
            nonlocal last
            if not quiet and time.monotonic() - last >= 10:
                last = time.monotonic()
                print(f"{done:,} of {of:,} {unit}" if of else f"{done:,} {unit}", file=sys.stderr, flush=True)

        yield line
        return
    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    with Progress(TextColumn(unit), BarColumn(), count, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(unit, total=total)
        yield lambda done, of: bar.update(task, completed=done, total=of)
