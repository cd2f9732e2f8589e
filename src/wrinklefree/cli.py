"""The command line: composes, refuses what cannot run, and turns errors into one line and an exit code.

`scripts/*.py` and the console script `wrinklefree` call the functions of this module. Nothing heavy is imported before
a configuration is known to be right, so that help and mistakes are answered at once.
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from wrinklefree.utils.errors import ConfigError, NotAvailableError, WrinkleFreeError

if TYPE_CHECKING:
    from wrinklefree.training.config import DistributedConfig

HYDRA_FLAGS = {
    "--cfg", "-c", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--experimental-rerun",
    "--hydra-help", "--info", "-i", "--multirun", "-m", "--package", "-p", "--resolve", "--run", "-r",
    "--shell-completion", "-sc", "--version",
}  # fmt: skip
_FLAGS_WITH_VALUE = {
    "--cfg", "-c", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--experimental-rerun",
    "--package", "-p",
}  # fmt: skip
_FLAGS_WITH_CHOICE = {"--info", "-i"}
_INFO = {"all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}
INTERRUPTED = 130

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `wrinklefree COMMAND ...`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "train": train_main,
        "convert": convert_main,
        "export": export_main,
        "serve": serve_main,
        "generate": generate_main,
        "benchmark": benchmark_main,
        "evaluate": evaluate_main,
        "study": study_main,
        "prepare": prepare_main,
        "inspect": inspect_main,
        "cache": cache_main,
        "doctor": doctor_main,
    }
    if not arguments or arguments[0] in {"-h", "--help"}:
        from wrinklefree.cli_help import command_help

        _show(command_help())
        return 0
    if arguments[0] not in commands:
        return _guarded(lambda: _unknown_command(arguments[0], list(commands)))
    return commands[arguments[0]](arguments[1:])


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/train.py`: compose, decode, refuse, train; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        from wrinklefree.cli_help import train_help

        _show(train_help())
        return 0
    return _guarded(lambda: _train(arguments))


def convert_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/convert_to_gguf.py`; returns the exit code."""
    parser = _parser("convert_to_gguf.py", "Write a checkpoint as a GGUF file, and check it.")
    parser.add_argument("--input", required=True, metavar="FOLDER", help="a checkpoint, or a stage's output folder")
    parser.add_argument("--output", required=True, metavar="FILE", help="the GGUF file to write")
    parser.add_argument(
        "--type", choices=("TQ2_0", "TQ1_0", "Q2_0", "Q4_0", "I2_S", "F16", "BF16", "F32"),
        help="of the linear layers (default: the first that the target reads and the model's sizes fit, mostly TQ2_0)",
    )  # fmt: skip
    parser.add_argument(
        "--target", choices=("auto", "llama.cpp", "bitnet.cpp", "wrinklefree"), default="auto",
        help="the runtime that must load the file (auto: the first of the others, in this order, that holds the model)",
    )  # fmt: skip
    parser.add_argument(
        "--cpu", choices=("auto", "x86", "arm"), default="auto",
        help="processors that an I2_S file is for (auto: this machine's kind)",
    )  # fmt: skip
    parser.add_argument(
        "--embedding-type", choices=("F16", "Q8_0", "BF16", "F32"),
        help="of embedding and head (default: F32 or BF16 if --type is, else F16)",
    )  # fmt: skip
    parser.add_argument(
        "--pad", choices=("auto", "never"), default="auto",
        help="whether widths may grow by zeros where a type's blocks demand it",
    )  # fmt: skip
    parser.add_argument("--name", help="the model's name inside the file")
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True,
        help="read the file back, compare every tensor, and run it in llama.cpp where that holds it",
    )  # fmt: skip

    def run() -> int:
        options = parser.parse_args(argv)
        set_up_logging()
        from wrinklefree.serving.conversion_report import describe
        from wrinklefree.serving.converter import ConversionOptions, convert

        conversion = convert(
            ConversionOptions(
                input=Path(options.input),
                output=Path(options.output),
                weight_type=options.type,
                target=options.target,
                embedding_type=options.embedding_type,
                pad=options.pad,
                cpu=options.cpu,
                name=options.name,
                verify=options.verify,
            )
        )
        _show(describe(conversion))
        return 0

    return _guarded(run)


def export_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/export_hf.py`; returns the exit code."""
    parser = _parser("export_hf.py", "Write a checkpoint as a folder that transformers loads.")
    parser.add_argument("--input", required=True, metavar="FOLDER", help="a checkpoint folder")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="the folder to write: new, or an earlier export"
    )
    parser.add_argument(
        "--format", choices=("auto", "plain", "bitnet", "wrinklefree"), default="auto",
        help="the family's own class; BitNetForCausalLM; ours, whose code travels along (auto: the first that fits)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=("bf16", "packed", "f32"), default="bf16",
        help="linear layers: trainable masters in bf16 or f32, or 2-bit codes",
    )  # fmt: skip
    parser.add_argument(
        "--embedding-type", choices=("bf16", "f32"),
        help="embeddings, head, norms and biases (default: f32 with --weights f32, else bf16)",
    )  # fmt: skip
    parser.add_argument(
        "--linear-class", choices=("bitlinear", "autobitlinear"), default="bitlinear",
        help="packed weights in a stock class stay 2-bit in memory (bitlinear), or are unpacked at loading",
    )  # fmt: skip
    parser.add_argument("--report", metavar="FILE", help="report.json of the job, for the card's measured figures")

    def export() -> int:
        options = parser.parse_args(argv)
        set_up_logging()
        from wrinklefree.serving.hf_export import export_from_options

        export_from_options(options)
        return 0

    return _guarded(export)


def serve_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/serve.py`; returns the exit code."""
    from wrinklefree.cli_serving import run_server

    return _guarded(lambda: run_server(argv, set_up_logging))


def generate_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/generate.py`; returns the exit code."""
    from wrinklefree.cli_serving import run_generate

    return _guarded(lambda: run_generate(argv, set_up_logging))


def benchmark_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/run_benchmark.py`; returns the exit code."""
    parser = _parser("run_benchmark.py", "Search for efficient settings with Ax.")
    parser.add_argument("--resume", metavar="FILE", help="experiment.json to go on from")
    parser.add_argument("--analyze-only", metavar="FILE", help="experiment.json to report on, without new trials")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example benchmark.num_trials=10")

    def benchmark() -> int:
        options = parser.parse_intermixed_args(argv)
        root = Path(__file__).resolve().parents[2]
        if not (root / "benchmark" / "command.py").is_file():
            raise NotAvailableError(
                "the benchmark belongs to the repository, not to the package: run it from a checkout"
            )
        if str(root) not in sys.path:
            sys.path.append(str(root))
        set_up_logging()
        from benchmark.command import run_benchmark

        resume, analyze = (None if file is None else Path(file) for file in (options.resume, options.analyze_only))
        _show(run_benchmark(options.overrides, resume=resume, analyze_only=analyze))
        return 0

    return _guarded(benchmark)


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/run_evaluation.py`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        from wrinklefree.cli_help import evaluate_help

        _show(evaluate_help())
        return 0

    def evaluate() -> int:
        from wrinklefree.training.evaluation_config import parse_evaluation

        command, run_config = parse_evaluation(arguments)
        set_up_logging()
        from wrinklefree.training.evaluation_command import run_evaluation

        _show(run_evaluation(command, run_config))
        return 0

    return _guarded(evaluate)


def study_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/run_study.py`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        from wrinklefree.cli_help import study_help

        _show(study_help())
        return 0

    def study() -> int:
        from wrinklefree.training.study_config import parse_study

        command, configuration = parse_study(["dry_run=true" if a == "--dry-run" else a for a in arguments])
        set_up_logging()
        from wrinklefree.training.study import run_study

        return run_study(command, configuration)

    return _guarded(study)


def prepare_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/prepare_data.py`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        from wrinklefree.cli_help import prepare_help

        _show(prepare_help())
        return 0

    def prepare() -> int:
        from wrinklefree.training.data_config import parse_prepare

        command, configuration = parse_prepare(arguments)
        set_up_logging()
        from wrinklefree.training.data_commands import run_prepare

        _show(run_prepare(command, configuration))
        return 0

    return _guarded(prepare)


def inspect_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/inspect_data.py`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        from wrinklefree.cli_help import inspect_help

        _show(inspect_help())
        return 0

    def inspect() -> int:
        from wrinklefree.training.data_config import parse_inspect

        command, configuration = parse_inspect(arguments)
        set_up_logging()
        from rich.console import Console

        from wrinklefree.training.data_commands import run_inspect

        run_inspect(command, configuration, Console(soft_wrap=True))
        return 0

    return _guarded(inspect)


def cache_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/cache_teacher.py`; returns the exit code."""
    parser = _parser("cache_teacher.py", "Run stage 3's teacher once over a task and keep its largest logits.")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the cache to write")
    parser.add_argument("--top-k", type=int, default=64, metavar="K", help="logits kept of each position (default: 64)")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="those of the stage 3 run: model=... data.task=sst2"
    )

    def cache() -> int:
        options = parser.parse_intermixed_args(argv)
        from wrinklefree.composition import compose

        set_up_logging()
        config, _ = compose(["training=stage3_distill", *options.overrides])
        from wrinklefree.training.cache_command import run_cache

        _show(run_cache(config, Path(options.output), options.top_k))
        return 0

    return _guarded(cache)


def doctor_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/doctor.py`; returns the exit code: 0 where a training would run."""
    parser = _parser("doctor.py", "Show what is here and what is missing on this machine, each with its fix.")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--output-dir", default="outputs", metavar="FOLDER", help="where runs will be written (%(default)s)"
    )
    parser.add_argument(
        "--bucket", metavar="NAME", help="write a small object into this bucket, as gcs.enabled=true does"
    )
    parser.add_argument("--offline", action="store_true", help="do not knock at the hub")
    options = parser.parse_args(argv)

    def look() -> int:
        from wrinklefree.doctor import Request, examine

        request = Request(Path(options.output_dir), options.bucket, options.offline)
        text, code = examine(request, as_json=options.json)
        _show(text)
        return code

    return _guarded(look)


def refuse_unavailable(configuration: object) -> None:
    """Refuse a run that needs a part which this version does not have.

    Raises:
        NotAvailableError: naming the part and what to use instead. A dry run or an estimate is never refused.
    """
    from wrinklefree.training.config import MIXING_STAGES, RunConfig

    assert isinstance(configuration, RunConfig)
    config = configuration
    if config.dry_run or config.estimate:
        return
    from wrinklefree.training.tracking_config import check_tracking

    check_tracking(config.tracking)
    _refuse_distributed(config.distributed, is_pipeline=config.training.stage == "bitdistill")
    if config.influence.enabled and config.training.stage not in (*MIXING_STAGES, "bitdistill"):
        raise ConfigError(
            f"influence.enabled=true moves the weights of text sources in {', '.join(MIXING_STAGES)}, and "
            f"training.stage={config.training.stage} has none to move: leave it out here"
        )


def _refuse_distributed(config: "DistributedConfig", *, is_pipeline: bool) -> None:
    """Refuse processes and settings that do not go together, before anything is loaded."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if is_pipeline and (processes > 1 or config.strategy == "fsdp"):
        raise ConfigError(
            "the pipeline training=bitdistill runs in one process: with distributed=fsdp_* give its stages one by one "
            "(training=stage1_subln, stage1_9_layerwise, stage2_pretrain, fp_sft, stage3_distill)"
        )
    if config.strategy == "single" and processes > 1:
        raise ConfigError(
            f"{processes} processes were started (WORLD_SIZE), and distributed={config.name} trains in one: add "
            "distributed=fsdp_multi, or start train.py without torchrun"
        )
    if config.strategy == "single" and config.optimizer_offload:
        raise ConfigError(
            f"distributed.optimizer_offload=true needs shards, and distributed={config.name} has none: use "
            "distributed=fsdp_large (it runs on one GPU too)"
        )


def set_up_logging() -> None:
    """Send the library's log to the terminal (coloured where it is one), or to standard error as plain lines."""
    root = logging.getLogger()
    if root.handlers:
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(
            console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S"
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    # Of several processes one speaks; the others are heard when something goes wrong.
    for name in ("wrinklefree", "benchmark"):
        logging.getLogger(name).setLevel(logging.INFO if _rank() == 0 else logging.ERROR)


def _train(arguments: list[str]) -> int:
    from wrinklefree.composition import compose, normalize_overrides

    flags, overrides = _split(arguments)
    if not flags and not any(_is_hydra_key(override) for override in overrides):
        return _run(overrides)
    if not {"-m", "--multirun"} & set(flags):
        compose(overrides)  # so that a mistake is one line here too
    return _through_hydra(flags, normalize_overrides(overrides))


def _run(overrides: Sequence[str]) -> int:
    from wrinklefree.composition import compose

    set_up_logging()
    config, tree = compose(overrides)
    refuse_unavailable(config)
    if config.estimate:
        from wrinklefree.training.estimate_report import run_estimate

        _show(run_estimate(config, overrides))
        return 0
    if config.gcs.enabled and not config.dry_run:
        from wrinklefree.utils.gcs_storage import check_access

        # Before torch: missing credentials are answered in seconds.
        check_access(config.gcs.bucket, config.gcs.experiment_prefix)
    from wrinklefree.training.run import run

    return run(config, tree, overrides)


def _through_hydra(flags: list[str], overrides: list[str]) -> int:
    """Let Hydra act on its flags; a job, one or each of a sweep, is composed and run as without it."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from wrinklefree.composition import HYDRA_VERSION_BASE, config_directory, describe_hydra_error

    codes: list[int] = []
    jobs: list[list[str]] = []

    def job(_: DictConfig) -> None:
        task = [override.removeprefix("++") for override in HydraConfig.get().overrides.task]
        jobs.append(task)
        set_up_logging()
        if {"-m", "--multirun"} & set(flags):
            logger.info("job %d: %s", len(jobs), " ".join(task))
        try:
            codes.append(_run(task))
        except WrinkleFreeError as error:
            codes.append(_report(error))
        if codes[-1] >= 128:  # stopped by a signal: so is the sweep
            raise SystemExit(codes[-1])

    application = hydra.main(str(config_directory()), "config", HYDRA_VERSION_BASE)(job)
    with _hydra_environment([*flags, *overrides]):
        try:
            application()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(describe_hydra_error(error)) from error
        except ValueError as error:
            if jobs:
                raise
            raise ConfigError(str(error)) from error  # flags that exclude each other
        except SystemExit as stopped:
            return stopped.code if isinstance(stopped.code, int) else 0
    return next((code for code in codes if code), 0)


@contextmanager
def _hydra_environment(arguments: list[str]) -> Iterator[None]:
    """Give Hydra its arguments, and keep it from printing (and swallowing) what a job raises."""
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [before[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part Hydra's flags from overrides; refuse flags that neither knows."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, _, value = argument.partition("=")
        if not argument.startswith("-"):
            is_choice = bool(flags) and flags[-1] in _FLAGS_WITH_CHOICE and argument in _INFO
            (flags if is_choice else overrides).append(argument)
        elif name not in HYDRA_FLAGS:
            raise ConfigError(_explain_flag(name, value))
        else:
            flags.append(argument)
            if name in _FLAGS_WITH_VALUE and not value:
                flags.extend(text for text in [next(rest, None)] if text is not None)
    return flags, overrides


def _explain_flag(name: str, value: str) -> str:
    key = name.lstrip("-").replace("-", "_")
    return f"unknown flag {name}: settings are written key=value, for example {key}={value or '...'}; see --help"


def _is_hydra_key(override: str) -> bool:
    return re.match(r"[+~]*hydra[./]", override) is not None


def _guarded(command: Callable[[], int]) -> int:
    """Run a command; an error that a user can act on becomes its lines on standard error and its exit code."""
    try:
        return command()
    except WrinkleFreeError as error:
        return _report(error)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


def _report(error: WrinkleFreeError) -> int:
    # A wrong configuration is wrong on every rank: one says so.
    if _rank() == 0 or not isinstance(error, ConfigError):
        who = "error" if "WORLD_SIZE" not in os.environ else f"error on rank {_rank()}"
        for line in str(error).splitlines():
            sys.stderr.write(f"{who}: {line}\n")
    return error.exit_code


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _unknown_command(name: str, known: list[str]) -> int:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"unknown command {name!r}: expected {', '.join(known)}{meant}")


def _parser(program: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=program, description=description)


def _show(text: str) -> None:
    sys.stdout.write(f"{text}\n")
