"""The command line: help, exit codes, what is refused, and Hydra's own flags."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from wrinklefree import cli, cli_help
from wrinklefree.composition import compose, groups
from wrinklefree.training.config import RunConfig
from wrinklefree.utils import errors

ROOT = Path(__file__).resolve().parents[1]
Runs = list[tuple[RunConfig, list[str]]]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """What `wrinklefree.training.run.run` was called with; it trains nothing here."""
    return fake_run(monkeypatch, lambda config: 0)


def fake_run(monkeypatch: pytest.MonkeyPatch, outcome: Callable[[RunConfig], int]) -> Runs:
    calls: Runs = []

    def run(config: RunConfig, tree: dict[str, Any], overrides: Sequence[str]) -> int:
        assert tree["model"]["name"] == config.model.name
        calls.append((config, list(overrides)))
        return outcome(config)

    module = ModuleType("wrinklefree.training.run")
    module.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, "wrinklefree.training.run", module)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return calls


def test_a_command_is_composed_and_run(runs: Runs) -> None:
    assert cli.train_main(["model=smollm2_135m", "training=stage2_pretrain", "+skip_recovery=true"]) == 0
    [(config, overrides)] = runs
    assert (config.model.name, config.training.stage, config.skip_recovery) == ("smollm2_135m", "stage2", True)
    assert overrides == ["model=smollm2_135m", "training=stage2_pretrain", "+skip_recovery=true"]


def test_the_console_script_takes_the_same_command(runs: Runs) -> None:
    assert cli.main(["train", "model=qwen3_4b", "dry_run=true"]) == 0
    assert runs[0][0].model.name == "qwen3_4b"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["training.batchsize=4"],
            "training.batchsize: unknown key, given 4; training (stage=bitdistill) has no batchsize; "
            "did you mean training.batch_size?",
        ),
        (["training.lr=fast"], "training.lr: expected a number, given 'fast'"),
        (
            ["training=stage2_pretraim"],
            "training: expected one of bitdistill, bitnet_sft, fp_pretrain, fp_sft, stage1_9_layerwise, stage1_subln, "
            "stage2_pretrain, stage3_distill, stage3_distill_smollm2, given 'stage2_pretraim'; "
            "did you mean stage2_pretrain?",
        ),
        (["--model=tiny"], "unknown flag --model: settings are written key=value, for example model=tiny; see --help"),
        (
            ["--cfg", "job", "modael=x"],
            "modael: unknown key, given 'x'; the configuration has no modael; did you mean model?",
        ),
        (["--resolve"], "The --resolve flag can only be used in conjunction with --cfg or --help"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.train_main(arguments) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")
    assert not runs


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["distributed=fsdp_multi"],
            "the pipeline training=bitdistill runs in one process: with distributed=fsdp_* give its stages one by one "
            "(training=stage1_subln, stage1_9_layerwise, stage2_pretrain, fp_sft, stage3_distill)",
        ),
        (
            ["training=stage2_pretrain", "distributed.optimizer_offload=true"],
            "distributed.optimizer_offload=true needs shards, and distributed=single_gpu has none: use "
            "distributed=fsdp_large (it runs on one GPU too)",
        ),
        (
            ["training=fp_sft", "influence.enabled=true"],
            "influence.enabled=true moves the weights of text sources in stage2, stage3, fp_pretrain, and "
            "training.stage=fp_sft has none to move: leave it out here",
        ),
    ],
)
def test_what_is_not_there_yet_is_refused_and_may_be_planned(
    arguments: list[str], line: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.train_main(arguments) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not runs
    assert cli.train_main([*arguments, "dry_run=true"]) == 0
    assert len(runs) == 1


@pytest.mark.parametrize("rank", ["0", "3"])
def test_several_processes_need_a_sharded_run_and_one_of_them_says_so(
    rank: str, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", rank)
    assert cli.train_main(["training=stage2_pretrain"]) == 2
    line = (
        "error on rank 0: 4 processes were started (WORLD_SIZE), and distributed=single_gpu trains in one: add "
        "distributed=fsdp_multi, or start train.py without torchrun\n"
    )
    assert capsys.readouterr().err == (line if rank == "0" else "")
    assert not runs


@pytest.mark.parametrize("arguments", [[], ["-m"], ["hydra.verbose=false"]])
def test_errors_of_a_run_keep_their_exit_code(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: RunConfig) -> int:
        raise errors.CheckpointError("model.safetensors is truncated")

    fake_run(monkeypatch, fail)
    assert cli.train_main([*arguments, f"output_dir={tmp_path}"]) == 78
    assert capsys.readouterr().err == "error: model.safetensors is truncated\n"


@pytest.mark.parametrize("arguments", [[], ["-m"], ["hydra.verbose=false"]])
def test_defects_keep_their_traceback(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: RunConfig) -> int:
        raise RuntimeError("a defect")

    fake_run(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.train_main([*arguments, f"output_dir={tmp_path}"])
    assert "HYDRA_FULL_ERROR" not in os.environ


@pytest.mark.parametrize("arguments", [[], ["-m"]])
def test_an_interruption_is_130(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(config: RunConfig) -> int:
        raise KeyboardInterrupt

    fake_run(monkeypatch, interrupt)
    assert cli.train_main([*arguments, f"output_dir={tmp_path}"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_sweep_runs_each_job_and_reports_the_first_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_run(monkeypatch, lambda config: 0)
    monkeypatch.chdir(tmp_path)
    sweep = ["-m", "training=stage2_pretrain,stage3_distill", "training.lr=0.5,slow", f"output_dir={tmp_path / 'out'}"]
    assert cli.train_main(sweep) == 2
    assert [(config.training.stage, overrides[1]) for config, overrides in calls] == [
        ("stage2", "training.lr=0.5"),
        ("stage3", "training.lr=0.5"),
    ]
    assert capsys.readouterr().err == "error: training.lr: expected a number, given 'slow'\n" * 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_sweep_stops_when_a_job_is_stopped_by_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_run(monkeypatch, lambda config: 143)
    assert cli.train_main(["-m", "seed=1,2,3", f"output_dir={tmp_path}"]) == 143
    assert len(calls) == 1


def test_a_sweep_leaves_our_log_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_run(monkeypatch, lambda config: 0)
    ours = logging.getLogger("wrinklefree.training.trainer")
    assert cli.train_main(["-m", "seed=1,2", f"output_dir={tmp_path}"]) == 0
    assert not ours.disabled


def test_cfg_job_prints_the_configuration(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train_main(["--cfg", "job", "--package", "optimizer", "optimizer.type=muon"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[:2] == ["# @package optimizer", "type: muon"]
    assert not runs


def test_hydra_keys_go_through_hydra_and_write_nothing(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.train_main(["hydra.job.name=mine", "seed=3"]) == 0
    assert runs[0][0].seed == 3
    assert runs[0][1] == ["seed=3"]
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train_main(["model=tiny", "--help"]) == 0
    text = capsys.readouterr().out
    words = text.replace("|", " ").split()
    for group, options in groups().items():
        assert group == "recipe" or set(options) <= set(words)
    assert set(cli_help.STAGES) == set(groups()["training"])
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert {kind.exit_code for kind in kinds} <= set(cli_help.EXIT_CODES)  # type: ignore[attr-defined]
    for code in cli_help.EXIT_CODES:
        assert f"  {code} " in text


def test_overrides_that_help_shows_are_accepted() -> None:
    shown = [override for key in cli_help.OVERRIDES for override in key.split()]
    local = [override for override in shown if override.startswith("data.sources")]
    compose(["training=stage3_distill", *(override for override in shown if override not in local)])
    compose(["training=stage2_pretrain", "data=local", *local])


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_quick_and_loads_nothing_heavy(flag: str) -> None:
    program = (
        "import sys; from wrinklefree.cli import train_main; "
        "train_main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, flag], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: train.py")
    assert time.perf_counter() - started < 10  # about one second on an idle machine


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        ([], 0, "usage: wrinklefree COMMAND", ""),
        (
            ["trayn"],
            2,
            "",
            "error: unknown command 'trayn': expected train, convert, ",
        ),
        (
            ["convert", "--input", "a", "--output", "b"],
            78,
            "",
            "error: a does not exist; pass an artifact or a stage's output folder",
        ),
        (["serve", "--model", "a", "--port", "8080"], 2, "", "error: a does not exist; give a GGUF file or a"),
        (["generate", "--model", "a", "--prompt", "b"], 2, "", "error: a does not exist; give a GGUF file or a folder"),
        (
            ["benchmark", "benchmark.num_trials=0"],
            2,
            "",
            "error: benchmark.num_trials: expected a number greater than or equal to 1, given 0",
        ),
    ],
)
def test_other_commands(
    arguments: list[str], code: int, out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == code
    printed = capsys.readouterr()
    assert printed.out.startswith(out)
    assert printed.err.startswith(err)


def test_logs_are_plain_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(logging.getLogger("wrinklefree"), "level", logging.NOTSET)
    cli.set_up_logging()
    cli.set_up_logging()
    logging.getLogger("wrinklefree.anything").info("step %d", 3)
    assert len(root.handlers) == 1
    assert capsys.readouterr().err.endswith(" INFO step 3\n")


@pytest.mark.parametrize("script", ["train", "convert_to_gguf", "serve", "generate", "run_benchmark"])
def test_scripts_answer_help(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"usage: {script}.py")
