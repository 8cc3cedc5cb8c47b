"""The commands; each is one call into the library. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsweep import __version__
from fedsweep.errors import ConfigError, FedsweepError, UsageError

if TYPE_CHECKING:
    from fedsweep.control import Sweep

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
Host = Annotated[
    str, typer.Option(help="Address to listen on. Where other machines can reach it, it speaks TLS; see --join.")
]
MaxTasks = Annotated[int, typer.Option(help="Refuse a grid of more experiments than this.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
Names = Annotated[
    list[str],
    typer.Argument(metavar="TASK|PHASE|GROUP...", help="Names of tasks, of phases, of groups in `fedsweep failures`."),
]
ExitWithParent = Annotated[bool, typer.Option("--exit-with-parent", hidden=True)]
Heartbeat = Annotated[float, typer.Option(hidden=True)]
ExpectedWorkers = Annotated[int, typer.Option(hidden=True)]
AllowOutputRoot = Annotated[
    list[Path] | None,
    typer.Option(
        "--allow-output-root",
        metavar="DIR",
        help="Another folder in which output folders may lie, besides the current one. May be given several times.",
        show_default=False,
    ),
]
ManagerAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="Where the manager listens.", show_default="from STATE_DIR, else 127.0.0.1:5000"
    ),
]
Join = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT#sha256:…",
        help="The join string that a manager on another machine printed; put it in quotes.",
        show_default=False,
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="Copy of the file `token` in the manager's state directory.", show_default="STATE_DIR/token"),
]
ClientPlaintext = Annotated[
    bool,
    typer.Option("--insecure-plaintext", help="Send the token to another machine although nothing is encrypted."),
]
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
    allow_output_root: AllowOutputRoot = None,
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
        output_roots=tuple(allow_output_root or ()),
        quiet=quiet,
        as_json=as_json,
    )
    raise typer.Exit(run_sweep(request))


@app.command()
def plan(
    configs: Configs,
    device: Device = "auto",
    data_dir: DataDir = None,
    state_dir: StateDir = Path(".fedsweep"),
    max_tasks: MaxTasks = 1_000_000,
    allow_output_root: AllowOutputRoot = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Time a few training steps to estimate the whole.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Say how many experiments a sweep has, how many are duplicates or done, and what it will cost. Nothing runs.

    What failed for good, or was cancelled, is known from the ledger in the state directory.
    """
    from fedsweep.planning import make_plan, show_plan

    made = make_plan(
        configs,
        state_dir=state_dir,
        data_dir=data_dir,
        device=device,
        max_tasks=max_tasks,
        output_roots=allow_output_root or (),
        with_probe=probe,
        quiet=as_json,
    )
    show_plan(made, as_json=as_json, option=_state_option(None, None, None, state_dir))


@app.command()
def manager(
    configs: Configs,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 5000,
    state_dir: StateDir = Path(".fedsweep"),
    allow_legacy: AllowLegacy = False,
    insecure_plaintext: Annotated[
        bool, typer.Option("--insecure-plaintext", help="No TLS, although other machines can reach the address.")
    ] = False,
    max_tasks: MaxTasks = 1_000_000,
    allow_output_root: AllowOutputRoot = None,
    heartbeat_s: Heartbeat = 10.0,
    expected_workers: ExpectedWorkers = 1,
    exit_with_parent: ExitWithParent = False,
) -> None:
    """Read configurations, hand experiments to workers, keep every result, and end when all is done.

    With `--host` it serves other machines too, encrypted, and prints the string by which workers there join; see
    docs/security.md.
    """
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
        output_roots=allow_output_root or (),
    )
    raise typer.Exit(experiment_manager.start())


@app.command()
def worker(
    manager: ManagerAddress = None,
    join: Join = None,
    device: Device = "auto",
    token_file: TokenFile = None,
    insecure_plaintext: ClientPlaintext = False,
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
    """Claim a GPU (or the CPU), ask the manager for experiments, run them, and submit the results.

    On the manager's machine, in the same folder, it needs no option. Elsewhere it needs the manager's join string and a
    copy of its token: `fedsweep worker --join 'node7:5000#sha256:…' --token-file token`.
    """
    from fedsweep.worker.worker import leave_process, worker_loop

    _start_logging(exit_with_parent)
    code = worker_loop(
        manager=_one_address(manager, join),
        device=device,
        token_file=token_file,
        insecure_plaintext=insecure_plaintext,
        data_dir=data_dir,
        state_dir=state_dir,
        threads=threads,
    )
    leave_process(code)


@app.command()
def status(
    manager: ManagerAddress = None,
    join: Join = None,
    token_file: TokenFile = None,
    insecure_plaintext: ClientPlaintext = False,
    state_dir: StateDir = Path(".fedsweep"),
    as_json: Json = False,
) -> None:
    """Ask a running manager how its sweep is getting on.

    Where none runs, it says how the sweep was left, with exit status 1.
    """
    from fedsweep.run import ask_status, show_status

    answer = ask_status(state_dir, _one_address(manager, join), token_file, insecure_plaintext=insecure_plaintext)
    show_status(answer, as_json=as_json)


@app.command()
def failures(
    manager: ManagerAddress = None,
    join: Join = None,
    token_file: TokenFile = None,
    insecure_plaintext: ClientPlaintext = False,
    state_dir: StateDir = Path(".fedsweep"),
    earlier: Annotated[
        bool, typer.Option("--earlier", help="Failures of an earlier configuration, which is not run any more.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what failed and why: failures of one cause together, and the command that repeats one of them.

    Works while the sweep runs and afterwards. A cause is the type of the error and its message, without numbers,
    addresses and paths, and the place in the code. Tasks that are still being tried count too, and so do workers that
    were set aside because they failed whatever they were given.
    """
    from fedsweep.control import ask_failures, show_failures

    option = _state_option(manager, join, token_file, state_dir)
    found = ask_failures(_sweep(state_dir, manager, join, token_file, insecure_plaintext), option, earlier=earlier)
    show_failures(found, as_json=as_json, state_option=option, earlier=earlier)


@app.command()
def repeat(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task's name, as `fedsweep failures` shows it.")],
    device: Device = "auto",
    data_dir: DataDir = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="batched|reference",
            help="`reference` is slow and easy to follow in a debugger.",
            show_default="that of the configuration",
        ),
    ] = None,
    manager: ManagerAddress = None,
    join: Join = None,
    token_file: TokenFile = None,
    insecure_plaintext: ClientPlaintext = False,
    state_dir: StateDir = Path(".fedsweep"),
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the traceback also of an error that says what to do.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run one experiment of a sweep once more in this terminal, with its seed: its rounds, its result or its error.

    Nothing is written, and the sweep hears nothing of it. Numbers are cut to four places; `--json` has all their
    digits. Exit status: 0 if the experiment ended, 1 if it raised.
    """
    if engine not in (None, "batched", "reference"):
        raise UsageError(f"--engine {engine}: expected batched or reference")
    sweep = _sweep(state_dir, manager, join, token_file, insecure_plaintext)
    found = sweep.ask({"type": "show_task", "task_id": task})["task"]
    from fedsweep.repeat import repeat as run_again

    code = run_again(found, device=device, data_dir=data_dir, engine=engine, as_json=as_json, verbose=verbose)
    raise typer.Exit(code)


@app.command()
def retry(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK|PHASE|GROUP]...",
            help="Names of tasks, of phases, of groups in `fedsweep failures`.",
            show_default="all that failed, without those that were cancelled",
        ),
    ] = None,
    manager: ManagerAddress = None,
    join: Join = None,
    token_file: TokenFile = None,
    insecure_plaintext: ClientPlaintext = False,
    state_dir: StateDir = Path(".fedsweep"),
) -> None:
    """Let failed tasks be tried again, as if they had never failed.

    In a sweep that runs they wait at once; in one that has ended, the command that started it runs them. `fedsweep
    retry cancelled` brings back what was cancelled.
    """
    from fedsweep.control import retry as retry_tasks

    print(retry_tasks(_sweep(state_dir, manager, join, token_file, insecure_plaintext), names or ()))


@app.command()
def cancel(
    names: Names,
    manager: ManagerAddress = None,
    join: Join = None,
    token_file: TokenFile = None,
    insecure_plaintext: ClientPlaintext = False,
    state_dir: StateDir = Path(".fedsweep"),
) -> None:
    """Do not run these tasks. What is running is dropped; what is complete stays.

    Of a phase those tasks are meant that no other phase asks for. The sweep can end without them, with exit status 1.
    `fedsweep retry cancelled` brings all of them back, `fedsweep retry` with their names some.
    """
    from fedsweep.control import cancel as cancel_tasks

    print(cancel_tasks(_sweep(state_dir, manager, join, token_file, insecure_plaintext), names))


@app.command()
def drain(
    manager: ManagerAddress = None,
    join: Join = None,
    token_file: TokenFile = None,
    insecure_plaintext: ClientPlaintext = False,
    state_dir: StateDir = Path(".fedsweep"),
) -> None:
    """End a running sweep gently: workers finish what they hold and get nothing more.

    May take as long as the longest experiment under way. The command that started the sweep goes on where it ended.
    """
    from fedsweep.control import end

    print(end(_sweep(state_dir, manager, join, token_file, insecure_plaintext), "drain"))


@app.command()
def stop(
    manager: ManagerAddress = None,
    join: Join = None,
    token_file: TokenFile = None,
    insecure_plaintext: ClientPlaintext = False,
    state_dir: StateDir = Path(".fedsweep"),
) -> None:
    """End a running sweep now: workers save what they hold, give it back and end, on all machines.

    They hear it with their next sign of life, within ten seconds. The command that started the sweep goes on from the
    round where each experiment was.
    """
    from fedsweep.control import end

    print(end(_sweep(state_dir, manager, join, token_file, insecure_plaintext), "stop"))


@app.command()
def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Output folders, each with a final_results.csv.")
    ],
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the sweep's ledger; else `.fedsweep` here, else that of the nearest folder above DIR.",
            show_default=False,
        ),
    ] = None,
    every_row: Annotated[
        bool, typer.Option("--all", help="Show rows of an earlier configuration too, which are else left out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw the plots and print the summary of finished experiments.

    What failed, was cancelled or has not finished is said too, as far as the ledger in the state directory knows of it.
    """
    from fedsweep.report import report as make_report
    from fedsweep.report.tables import show_report

    show_report(make_report(directories, state_dir=state_dir, every_row=every_row), as_json=as_json)


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


def _one_address(manager: str | None, join: str | None) -> str | None:
    """The address that either option names, checked."""
    from fedsweep.address import parse_address

    if manager is not None and join is not None:
        raise UsageError("--manager and --join both say where the manager is; keep --join")
    if join is not None:
        return str(parse_address(join, "--join"))
    return None if manager is None else str(parse_address(manager))


def _sweep(
    state_dir: Path, manager: str | None, join: str | None, token_file: Path | None, insecure_plaintext: bool
) -> Sweep:
    from fedsweep.control import Sweep

    return Sweep(state_dir, _one_address(manager, join), token_file, insecure_plaintext=insecure_plaintext)


def _state_option(manager: str | None, join: str | None, token_file: Path | None, state_dir: Path) -> str:
    """What the next command needs to find the same sweep."""
    options = {"--manager": manager, "--join": join, "--token-file": token_file}
    options["--state-dir"] = None if state_dir == Path(".fedsweep") else state_dir
    return "".join(f" {name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None)


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
