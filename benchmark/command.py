"""`scripts/run_benchmark.py` after its arguments are read: begin, go on with, or report on a benchmark."""

import logging
from collections.abc import Sequence
from pathlib import Path

from benchmark.config.settings import change_settings, read_settings
from benchmark.optimization.experiment import FILE, Experiment, load_experiment
from wrinklefree.utils.errors import ConfigError

logger = logging.getLogger(__name__)


def run_benchmark(overrides: Sequence[str], *, resume: Path | None, analyze_only: Path | None) -> str:
    """Run what is asked for; the summary for the terminal.

    Raises:
        ConfigError: arguments that do not go together, or a folder that holds another benchmark.
    """
    from benchmark.analysis.report import write_analysis

    if analyze_only is not None:
        if resume is not None or overrides:
            raise ConfigError("--analyze-only FILE reads and reports; leave everything else out")
        experiment, folder = load_experiment(analyze_only), analyze_only.parent
    else:
        experiment, folder = _begin(overrides, resume)
        from benchmark.optimization.search import Search, leave_out_useless

        settings, dropped = leave_out_useless(experiment.settings)
        if dropped:
            logger.info("not searched, as there is no mixture of texts to weigh: %s", ", ".join(dropped))
            experiment.settings = settings
        try:
            Search(experiment, folder).finish()
        finally:
            if experiment.records:
                write_analysis(folder, experiment.records, experiment.settings)
    shown = write_analysis(folder, experiment.records, experiment.settings)
    logger.info("wrote %s, %s and plots to %s", "report.md", "analysis.json", folder)
    return shown


def _begin(overrides: Sequence[str], resume: Path | None) -> tuple[Experiment, Path]:
    if resume is not None:
        experiment = load_experiment(resume)
        experiment.settings = change_settings(experiment.settings, overrides)
        logger.info("going on after %d trials", len(experiment.of("search")))
        return experiment, resume.parent
    settings = read_settings(overrides)
    folder = Path(settings.benchmark.output_dir)
    if (folder / FILE).exists():
        raise ConfigError(
            f"{folder / FILE} exists: go on with --resume {folder / FILE}, or begin another one with benchmark.output_dir=PATH"
        )
    return Experiment(settings), folder
