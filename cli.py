"""The command line: each command parses, calls one library function and prints. No logic here."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from edgelocal import __version__
from edgelocal.commands.answers import Commands, emit, json_option, say_to
from edgelocal.commands.console import error_console
from edgelocal.commands.export_options import ExportOptions, export_options
from edgelocal.errors import UsageError
from edgelocal.machine.profiles import ASSUMED_SAMPLES

FOLDER = click.Path(path_type=Path)

device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where blocks work."
)


def device_options(command: Any) -> Any:
    """`--device` with what it takes on a GPU."""
    tf32 = click.option("--tf32", is_flag=True, help="CUDA: products and convolutions in TF32, faster and less exact.")
    fall_back = click.option(
        "--allow-cpu-fallback", is_flag=True, help="CUDA: nodes it has no kernel for may run on the CPU."
    )
    return device_option(tf32(fall_back(command)))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgelocal")
def main() -> None:
    """Train neural networks block by block on edge devices.

    On a workstation, `export` turns a PyTorch network into a bundle. On the device, `train` trains it, `eval`
    measures it, `finish` writes the model to deploy.

    Exit codes: 0 done, 1 internal error, 2 usage, 3 over the memory budget, 4 bundle or checkpoint refused,
    5 bad data, 6 diverged, 7 interrupted and resumable, 8 the disk refused a write.
    """


@main.command()
@click.argument("network")
@click.argument("out", type=FOLDER)
@export_options
@json_option
def export(network: str, out: Path, as_json: bool, **options: Any) -> None:
    """Turn NETWORK into the bundle folder OUT.

    NETWORK is a zoo name (resnet32, vgg11, vit, ...), package.module:callable, or file.py:callable.
    """
    from edgelocal.commands.inspect import bundle_table, frontier_table

    _need_export_extra()
    from edgelocal.exporters.pack import export_bundle
    from edgelocal.exporters.request import make_request

    request = make_request(network, ExportOptions(**options))
    result = export_bundle(request, out, say_to(as_json))
    emit(result, as_json, bundle_table(result), *frontier_table(result), f"wrote {out}")


@main.command()
@click.argument("bundle", type=FOLDER)
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what is in BUNDLE."""
    from edgelocal.bundle.folder import open_bundle
    from edgelocal.commands.inspect import bundle_table, describe_bundle, frontier_table

    info = describe_bundle(open_bundle(bundle).manifest)
    emit(info, as_json, bundle_table(info), *frontier_table(info))


@main.command()
@click.argument("bundle", type=FOLDER)
@json_option
def verify(bundle: Path, as_json: bool) -> None:
    """Check every byte of BUNDLE against its manifest."""
    from edgelocal.bundle.folder import open_bundle, verify

    files = verify(open_bundle(bundle))
    emit(
        {"bundle": str(bundle), "files": list(files), "whole": True},
        as_json,
        f"{bundle}: {len(files)} files, all whole",
    )


@main.command(short_help="What training BUNDLE would hold, and give up.")
@click.argument("bundle", type=FOLDER)
@click.option("--memory-budget", default="auto", show_default=True, help="256MiB, 1.5GB, 60%, or auto: 80%.")
@click.option("--batch", type=click.IntRange(min=1), help="[default: the bundle's]")
@click.option("--micro-batch", type=click.IntRange(min=1), help="Samples at a time.  [default: what fits the budget]")
@click.option("--schedule", type=click.Choice(["interleaved", "sequential"]), default="interleaved", show_default=True)
@click.option("--samples", type=click.IntRange(min=1), default=ASSUMED_SAMPLES, show_default=True, help="To train on.")
@click.option("--validate/--no-validate", default=True, show_default=True, help="Whether there is a test split.")
@click.option("--augment/--no-augment", default=True, show_default=True, help="As the bundle says.")
@click.option("--profile", help="Of a device: jetson-orin-nano-8gb, raspberry-pi-5-4gb, ...  [default: this machine]")
@click.option("--threads", type=click.IntRange(1, 256), help="[default: the cores of the device]")
@device_option
@json_option
def plan(as_json: bool, **options: Any) -> None:
    """Say what training BUNDLE would hold in memory, block by block, and what it would give up to fit.

    The device's own arithmetic, on this machine or for another; no data is needed and nothing is loaded.
    """
    from edgelocal.commands.plan import PlanRequest, plan_bundle
    from edgelocal.commands.plan_table import plan_lines, plan_table

    result = plan_bundle(PlanRequest(**options))
    emit(result, as_json, plan_table(result), plan_lines(result))


@main.command(short_help="Train BUNDLE, or continue.")
@click.argument("bundle", type=FOLDER)
@click.option(
    "--data", type=FOLDER, required=True, help="Images by class folder or .zip, CIFAR binary, IDX, .npz, .npy."
)
@click.option("--val", "validation", type=FOLDER, help="Validation data.  [default: the test split of --data]")
@click.option("--val-every", type=click.IntRange(min=0), default=1, show_default=True, help="Epochs; 0: at the end.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the run.")
@click.option("--epochs", type=int, help="Epochs (of each block, when sequential).  [default: the bundle's]")
@click.option("--batch", type=int, help="[default: the bundle's]")
@click.option("--lr", type=float, help="[default: the bundle's]")
@click.option("--lr-schedule", type=click.Choice(["constant", "step", "cosine"]), help="[default: the bundle's]")
@click.option("--warmup-epochs", default=0, show_default=True, help="The rate rises over this many epochs.")
@click.option("--hyper", multiple=True, metavar="NAME=VALUE", help="Override a hyper-parameter of the optimizer.")
@click.option(
    "--schedule",
    type=click.Choice(["interleaved", "sequential"]),
    default="interleaved",
    show_default=True,
    help="Every batch through all blocks, or one block after the other.",
)
@click.option(
    "--runtime",
    type=click.Choice(["auto", "portable", "ort-training"]),
    default="auto",
    show_default=True,
    help="The bundle's own step graphs, or its artifacts for ONNX Runtime's training build. auto: the faster one.",
)
@click.option(
    "--cache",
    type=click.Choice(["off", "auto", "float32", "float16"]),
    default="off",
    show_default=True,
    help="Sequential: keep outputs of frozen blocks on disk.",
)
@click.option("--augment/--no-augment", default=True, show_default=True, help="As the bundle says.")
@click.option("--memory-budget", help="Bytes the process may hold: 256MiB, 1.5GB, 60%, auto.  [default: no limit]")
@click.option("--micro-batch", type=click.IntRange(min=1), help="Samples at a time.  [default: what fits the budget]")
@click.option(
    "--on-oom",
    type=click.Choice(["stop", "replan"]),
    default="stop",
    show_default=True,
    help="Memory runs out: stop with exit code 3, or halve the micro-batches and go on from the last commit.",
)
@click.option(
    "--resume",
    type=click.Choice(["auto", "never", "must"]),
    default="auto",
    show_default=True,
    help="auto: continue the run in --out, if there is one.",
)
@click.option("--checkpoint-steps", type=click.IntRange(min=1), help="Commit every so many steps.")
@click.option(
    "--checkpoint-seconds", type=float, default=300.0, show_default=True, help="Commit every so many seconds."
)
@click.option("--threads", type=click.IntRange(1, 256), help="[default: the usable cores]")
@device_options
@click.option("--seed", default=0, show_default=True, help="Of order, augmentation and masks.")
@json_option
def train(as_json: bool, **options: Any) -> None:
    """Train BUNDLE block by block into a run folder. The same command continues an interrupted run."""
    from edgelocal.commands.progress import Display
    from edgelocal.commands.signals import stop_signals
    from edgelocal.commands.train import train
    from edgelocal.commands.train_request import make_request
    from edgelocal.report.terminal import closing_lines, report_table

    with stop_signals() as stop:
        report = train(make_request(**options), Display(error_console()), stop)
        emit(report, as_json, report_table(report), closing_lines(report))


@main.command("eval", short_help="Measure RUN, at its end and at every exit.")
@click.argument("run", type=FOLDER)
@click.option("--data", type=FOLDER, required=True, help="The test split, or all of it if it has none.")
@click.option("--bundle", type=FOLDER, help="Where the bundle is, if it was moved.")
@click.option("--batch", type=click.IntRange(min=1), help="[default: the run's]")
@click.option("--threads", type=click.IntRange(1, 256), help="[default: the usable cores]")
@device_options
@json_option
def evaluate(run: Path, as_json: bool, **options: Any) -> None:
    """Measure the network of RUN, at its end and at the exit of every block."""
    from edgelocal.commands.evaluate import evaluate_run, exits_table

    result = evaluate_run(run, **options)
    emit(result, as_json, exits_table(result), *(f"note: {note}" for note in result["notes"]))


@main.command(short_help="Write the model of RUN: ONNX and PyTorch.")
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder to write.")
@click.option("--exit-block", type=int, help="End the network at this block, through its auxiliary head.")
@click.option("--bundle", type=FOLDER, help="Where the bundle is, if it was moved.")
@json_option
def finish(run: Path, out: Path, exit_block: int | None, bundle: Path | None, as_json: bool) -> None:
    """Write model.onnx (inference, any runtime) and weights.safetensors (PyTorch) of RUN."""
    from edgelocal.commands.finish import finish_run, finish_text

    result = finish_run(run, out, exit_block, bundle)
    emit(result, as_json, finish_text(result), *(f"note: {note}" for note in result["notes"]))


@main.command(short_help="What RUN reached and measured: tables, a page, JSON.")
@click.argument("run", type=FOLDER)
@click.option(
    "--html", type=FOLDER, help="Also write a page with charts to this file; it needs nothing else to be read."
)
@json_option
def report(run: Path, html: Path | None, as_json: bool) -> None:
    """Show what RUN reached, and what was measured beside what was planned."""
    from edgelocal.report.load import load_report
    from edgelocal.report.page import write_page
    from edgelocal.report.terminal import closing_lines, report_table

    result = load_report(run)
    if html is not None:
        write_page(result, html)
    emit(result, as_json, report_table(result), closing_lines(result), *([f"wrote {html}"] if html else []))


@main.command(short_help="This machine, this installation, what to mend.")
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine and this installation are, and what to mend."""
    from edgelocal.commands.doctor import doctor_report, doctor_table

    result = doctor_report()
    emit(result, as_json, doctor_table(result))
    if result["problems"]:
        sys.exit(UsageError.exit_code)


@main.command(short_help="The whole way on handwritten digits.")
@click.option(
    "--out", type=FOLDER, default=Path("demo"), show_default=True, help="Folder for bundle, data, run and model."
)
@click.option("--memory-budget", default="256MiB", show_default=True)
@json_option
def demo(out: Path, memory_budget: str, as_json: bool) -> None:
    """Train a small ResNet on handwritten digits, from export to the finished model."""
    from edgelocal.report.terminal import report_table

    _need_export_extra()
    from edgelocal.exporters.demo import run_demo

    result = run_demo(out, memory_budget, say_to(as_json))
    emit(result, as_json, report_table(result["report"]), result["conclusion"])


@main.group(short_help="Measure side by side with PyTorch.")
def bench() -> None:
    """Measurements side by side, each variant in a process of its own."""


@bench.command("memory")
@click.argument("network")
@click.option("--input", "input_shape", default="3x32x32", show_default=True)
@click.option("--classes", default=10, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=8, show_default=True, help="Timed steps a round.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Every variant once a round; medians are taken.",
)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=FOLDER, help="Write the figures to this JSON file too.")
@json_option
def bench_memory_command(
    network: str, input_shape: str, rounds: int, out: Path | None, as_json: bool, **options: Any
) -> None:
    """Memory and time of training NETWORK: PyTorch (plain, checkpointed, smaller batch) and edgelocal at budgets."""
    _need_export_extra()
    from edgelocal.exporters.bench.compare import bench_memory, bench_table
    from edgelocal.exporters.bench.result import Setting

    result = bench_memory(Setting(network, input_shape, **options), rounds, out, say_to(as_json))
    emit(result, as_json, bench_table(result))


def _need_export_extra() -> None:
    missing = [name for name in ("torch", "onnx", "safetensors") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f'this needs {", ".join(missing)}, which is not installed: type  pip install "edgelocal[export]"  '
            "(exporting is for the workstation; training needs none of it)"
        )
