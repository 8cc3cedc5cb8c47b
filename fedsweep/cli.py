"""The commands; each is one call into the library. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedsweep import __version__
from fedsweep.errors import ConfigError, FedsweepError

app = typer.Typer(
    name="fedsweep",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: `fedsweep run configs/quickstart.yaml`",
)

Configs = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG|KEY=VALUE",
        help="YAML files, folders or globs; KEY=VALUE overrides a default, as in `global_rounds=5`.",
        show_default=False,
    ),
]
StateDir = Annotated[Path, typer.Option(help="Folder of the ledger, the token, logs and undelivered results.")]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder with the official data files; else FEDSWEEP_DATA, else they are downloaded once."),
]
Device = Annotated[str, typer.Option(help="`auto` (a free GPU, else the CPU), `cpu` or `cuda:N`.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
MaxTasks = Annotated[int, typer.Option(help="Refuse a grid of more experiments than this.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
ExitWithParent = Annotated[bool, typer.Option("--exit-with-parent", hidden=True)]
Heartbeat = Annotated[float, typer.Option(hidden=True)]
ExpectedWorkers = Annotated[int, typer.Option(hidden=True)]
AllowLegacy = Annotated[bool, typer.Option("--allow-legacy", help="Serve old clients, without a token, on loopback.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """Sweeps of federated-learning poisoning experiments: a YAML grid in; results, tables and plots out.

    Every distinct experiment runs once, and no result is lost: stop at any time, then give the same command again.
    """
    if version:
        typer.echo(f"fedsweep {__version__}")
        raise typer.Exit


@app.command()
def run(
    configs: Configs,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Worker processes.", show_default="one for each GPU; one with all CPUs on a machine without"
        ),
    ] = None,
    device: Device = "auto",
    data_dir: DataDir = None,
    state_dir: StateDir = Path(".fedsweep"),
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.", show_default="a free one")] = 0,
    max_tasks: MaxTasks = 1_000_000,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of the display.")] = False,
) -> None:
    """Run a sweep on this machine: a manager, its workers, a live display, and at the end tables and plots.

    Stop it with Ctrl-C; the same command goes on where it stopped. Exit status: 0 all complete, 1 some experiments
    failed for good, 2 wrong usage or configuration, 130 interrupted.
    """
    from fedsweep.run import RunRequest, run_sweep

    request = RunRequest(
        arguments=tuple(configs),
        state_dir=state_dir,
        data_dir=data_dir,
        num_workers=workers,
        device=device,
        host=host,
        port=port,
        max_tasks=max_tasks,
        quiet=quiet,
        as_json=as_json,
    )
    raise typer.Exit(run_sweep(request))


@app.command()
def plan(
    configs: Configs,
    device: Device = "auto",
    data_dir: DataDir = None,
    max_tasks: MaxTasks = 1_000_000,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Time a few training steps to estimate the whole.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Say how many experiments a sweep has, how many are duplicates or done, and what it will cost. Nothing runs."""
    from fedsweep.planning import make_plan, show_plan

    made = make_plan(configs, data_dir=data_dir, device=device, max_tasks=max_tasks, with_probe=probe, quiet=as_json)
    show_plan(made, as_json=as_json)


@app.command()
def manager(
    configs: Configs,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 5000,
    state_dir: StateDir = Path(".fedsweep"),
    allow_legacy: AllowLegacy = False,
    insecure_plaintext: Annotated[
        bool, typer.Option("--insecure-plaintext", help="Listen off loopback although nothing is encrypted.")
    ] = False,
    max_tasks: MaxTasks = 1_000_000,
    heartbeat_s: Heartbeat = 10.0,
    expected_workers: ExpectedWorkers = 1,
    exit_with_parent: ExitWithParent = False,
) -> None:
    """Read configurations, hand experiments to workers, keep every result, and end when all is done."""
    from fedsweep.manager import ExperimentManager
    from fedsweep.manager.sources import split_arguments

    _start_logging(exit_with_parent)
    paths, overrides = split_arguments(configs)
    experiment_manager = ExperimentManager(
        paths,
        host=host,
        port=port,
        state_dir=state_dir,
        overrides=overrides,
        allow_legacy=allow_legacy,
        insecure_plaintext=insecure_plaintext,
        heartbeat_s=heartbeat_s,
        expected_workers=expected_workers,
        max_tasks=max_tasks,
    )
    raise typer.Exit(experiment_manager.start())


@app.command()
def worker(
    manager: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the manager listens.")] = "127.0.0.1:5000",
    device: Device = "auto",
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the manager's token.", show_default="STATE_DIR/token"),
    ] = None,
    data_dir: DataDir = None,
    state_dir: StateDir = Path(".fedsweep"),
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Threads that train on a CPU; they change no result.", show_default="one for each CPU"
        ),
    ] = None,
    exit_with_parent: ExitWithParent = False,
) -> None:
    """Claim a GPU (or the CPU), ask the manager for experiments, run them, and submit the results."""
    from fedsweep.worker.worker import leave_process, worker_loop

    _start_logging(exit_with_parent)
    code = worker_loop(
        manager=manager,
        device=device,
        token_file=token_file,
        data_dir=data_dir,
        state_dir=state_dir,
        threads=threads,
    )
    leave_process(code)


@app.command()
def status(
    manager: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where the manager listens.", show_default="from STATE_DIR"),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the manager's token.", show_default="STATE_DIR/token"),
    ] = None,
    state_dir: StateDir = Path(".fedsweep"),
    as_json: Json = False,
) -> None:
    """Ask a running manager how its sweep is getting on."""
    from fedsweep.run import ask_status, show_status

    show_status(ask_status(state_dir, manager, token_file), as_json=as_json)


@app.command()
def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Output folders, each with a final_results.csv.")
    ],
    as_json: Json = False,
) -> None:
    """Draw the plots and print the summary of finished experiments."""
    from fedsweep.report import report as make_report
    from fedsweep.report.tables import show_report

    show_report(make_report(directories), as_json=as_json)


@app.command()
def doctor(
    state_dir: Annotated[Path, typer.Argument(metavar="[DIR]", help="The state directory of the sweep.")] = Path(
        ".fedsweep"
    ),
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Put right what the ledger allows; a copy of what is changed stays beside it."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a state directory and its results files: every result there once, and every file saying so.

    Call it in the folder where the sweep ran, while no manager runs. Exit status: 0 sound, or repaired; 1 something is
    wrong; 2 the ledger cannot be read, or a manager has it.
    """
    from fedsweep.manager.doctor import examine, show_diagnosis

    diagnosis = examine(state_dir, repair=repair)
    show_diagnosis(diagnosis, as_json=as_json)
    raise typer.Exit(diagnosis.exit_code)


def _start_logging(exit_with_parent: bool) -> None:
    import logging

    from fedsweep.launch.parent import exit_when_stdin_closes

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if exit_with_parent:
        exit_when_stdin_closes()


def main() -> None:
    """Run the command line; an error of ours is a message and an exit status, never a traceback."""
    try:
        app()
    except ConfigError as error:
        count = len(error.problems)
        print(error, file=sys.stderr)
        print(f"{count} problem{'s' * (count > 1)} in the configuration; nothing was started.", file=sys.stderr)
        sys.exit(error.exit_code)
    except FedsweepError as error:
        print(f"fedsweep: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
