"""Ax behind a small face: propose, tell, snapshot. Ax is imported here and nowhere else."""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmark.config.settings import Knob, Settings
from benchmark.core.metrics import BenchmarkMetrics
from wrinklefree.utils.errors import ConfigError

EFFICIENCY, LOSS, SPEED, MEMORY = "efficiency", "loss", "tokens_per_second", "peak_gigabytes"
NAME = "wrinklefree"


class AxSearch:
    """A search over the knobs of a benchmark.

    Knobs that need another one stand in the space like all others: the model learns that they do nothing while that one is
    off, and the trial leaves them out.
    """

    def __init__(self, settings: Settings, snapshot: dict[str, Any] | None) -> None:
        """Begin a search, or go on with a snapshot.

        Raises:
            ConfigError: Ax is not installed.
        """
        with _quiet():
            try:
                from ax.api.client import Client
            except ImportError as error:
                raise ConfigError("the benchmark needs Ax: uv sync --extra benchmark") from error
            for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "ax"]:
                logging.getLogger(name).setLevel(logging.ERROR)  # each of them has a level and a handler of its own
            self._client = self._new(Client, settings) if snapshot is None else self._restored(Client, snapshot)
            self._forget_lost_trials()

    def propose(self, most: int = 1) -> list[tuple[int, dict[str, Any], str]]:
        """(index, parameters, who chose them) of the next trials: `most` of them, or fewer while Ax waits for data."""
        found: list[tuple[int, dict[str, Any], str]] = []
        with _quiet():
            for index, parameters in self._client.get_next_trials(max_trials=most).items():
                rows = self._client.summarize([index])
                method = str(rows["generation_node"].iloc[0]) if "generation_node" in rows else "Ax"
                found.append((index, dict(parameters), method))
        return found

    def _forget_lost_trials(self) -> None:
        """Trials that were in flight when a benchmark was killed: nobody will ever answer them."""
        rows = self._client.summarize(trial_statuses=["running"])
        if "trial_index" in rows:
            for index in rows["trial_index"].tolist():
                self._client.mark_trial_abandoned(int(index))

    def tell(self, index: int, metrics: BenchmarkMetrics | None) -> None:
        """The outcome of a trial; None: it failed. Ax learns nothing from a failure, and does not propose it again."""
        with _quiet():
            if metrics is None:
                self._client.mark_trial_abandoned(index)
            else:
                self._client.complete_trial(
                    index,
                    {
                        EFFICIENCY: metrics.efficiency,
                        LOSS: metrics.loss,
                        SPEED: metrics.tokens_per_second,
                        MEMORY: metrics.peak_gigabytes,
                    },
                )

    def snapshot(self) -> dict[str, Any]:
        """Ax's state as a plain tree."""
        with _quiet(), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ax.json"
            self._client.save_to_json_file(str(path))
            tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return tree

    @staticmethod
    def _restored(client: Any, snapshot: dict[str, Any]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ax.json"
            path.write_text(json.dumps(snapshot), encoding="utf-8")
            return client.load_from_json_file(str(path))

    @staticmethod
    def _new(client: Any, settings: Settings) -> Any:
        told = settings.benchmark
        search = client(random_seed=told.seed)
        search.configure_experiment([_parameter(name, knob) for name, knob in settings.knobs.items()], name=NAME)
        both = told.objectives == "efficiency_and_loss"
        search.configure_optimization(f"{EFFICIENCY}, -{LOSS}" if both else EFFICIENCY)
        search.configure_tracking_metrics([SPEED, MEMORY] if both else [LOSS, SPEED, MEMORY])
        search.configure_generation_strategy(
            initialization_budget=told.initial_trials,
            initialization_random_seed=told.seed,
            initialize_with_center=False,
        )
        return search


def _parameter(name: str, knob: Knob) -> Any:
    from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig

    if knob.values is not None:
        first = knob.values[0]
        kind = "bool" if isinstance(first, bool) else "str" if isinstance(first, str) else "int"
        if kind == "int" and any(isinstance(value, float) for value in knob.values):
            kind = "float"
        values: Any = list(knob.values)
        return ChoiceParameterConfig(name, values, kind, is_ordered=knob.numeric or kind == "bool")
    assert knob.low is not None
    assert knob.high is not None
    return RangeParameterConfig(
        name, (knob.low, knob.high), "int" if knob.whole else "float", scaling="log" if knob.log else "linear"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of Ax's dependencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
