"""What a study keeps on disk between runs of its arms."""

from pathlib import Path

from wrinklefree.training.study_results import RateTrial, read_trials, write_trials


def trial(step: str, seed: int, rate: float, value: float) -> RateTrial:
    return RateTrial(
        study="s", step=step, seed=seed, rate=rate, metric="bits_per_byte", value=value, chosen=False, error=""
    )


def test_trials_of_other_steps_are_kept_and_those_of_the_same_step_replaced(tmp_path: Path) -> None:
    first = [trial("a", 0, 1e-3, 2.0), trial("a", 0, 2e-3, 3.0), trial("b", 0, 1e-3, 4.0)]
    write_trials(tmp_path, first)
    again = [trial("a", 0, 1e-3, 1.5), trial("a", 1, 1e-3, 1.6)]
    write_trials(tmp_path, again)
    assert read_trials(tmp_path) == [first[2], *again]
