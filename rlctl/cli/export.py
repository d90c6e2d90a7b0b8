"""`rlctl export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlctl.cli.video import Checkpoint


def export(
    run_dir: Annotated[Path, typer.Argument(help="The directory of the run.", metavar="RUN_DIR")],
    format_: Annotated[str, typer.Option("--format", help="onnx, or torch (a torch.export program, .pt2).")] = "onnx",
    checkpoint: Checkpoint = "latest",
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write; the default is RUN_DIR/export/policy.onnx or .pt2, policy-sampled for draws."
        ),
    ] = None,
    sampled: Annotated[
        bool,
        typer.Option("--sampled", help="Of a generative policy: draws, by noise that is an input, not the one action."),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    r"""Export a trained policy as one file: raw observations in, actions in the environment's own units out.

    Normalisation and action scaling are inside; batches may have any size. The action is the deterministic one; with
    --sampled a generative policy draws it from noise, which is then a second input. The written file is run and
    compared with the agent; the largest difference stands in the JSON file beside it. ONNX needs pip install
    'rlctl\[export]'.

    [bold]Examples[/bold]

      rlctl export runs/sac/Hopper-v5/s0-0123abcd

      rlctl export RUN_DIR --format torch --checkpoint best --out hopper.pt2
    """
    import json
    from typing import cast

    from rlctl.cli.output import print_json
    from rlctl.export import Format
    from rlctl.export import export as write

    file = write(run_dir, cast(Format, format_), checkpoint=checkpoint, sampled=sampled, out=out)
    record = json.loads(file.with_name(file.name + ".json").read_text())
    if json_:
        print_json(record | {"file": str(file)})
        return
    parity = record["parity"]
    inputs = ", ".join(f"{x['name']} [batch, {', '.join(map(str, x['shape'][1:]))}]" for x in record["inputs"])
    print(f"model:     {file} ({file.stat().st_size / 1024:,.0f} KiB)")
    print(f"takes:     {inputs}")
    print(f"gives:     action [batch, {record['output']['shape'][1]}] in the units of {record['env']}")
    print(
        f"parity:    at most {parity['max_difference']:.1e} of half the action range off, "
        f"over {parity['observations']} observations ({parity['runtime']})"
    )
    print(f"described: {file.name}.json")
