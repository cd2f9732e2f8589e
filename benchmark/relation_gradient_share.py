"""How much of the first stage-3 gradient comes from the relation loss, for each published gamma and for `auto`.

Composes stage 3 as `scripts/train.py` would (give it the same overrides, `training.init_from=` and
`training.teacher.source=` included), takes the first batches of its data, and prints for each setting the value of
L_AD, its weight, and the norms of the weighted terms' gradients. share = |attention| / sum of the norms of all terms.

    uv run python -m benchmark.relation_gradient_share training=stage3_distill data=recall output_dir=outputs/pipeline_tiny
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence

import torch

from wrinklefree.composition import compose
from wrinklefree.distillation.combined_loss import stage3_objective
from wrinklefree.distillation.teacher import Teacher
from wrinklefree.models.bitlinear import set_quantization
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.models.subln import set_subln_strength
from wrinklefree.training.config import DistillationConfig
from wrinklefree.training.device import Compute, choose_compute
from wrinklefree.training.plan import plan_stage
from wrinklefree.training.run import load_model, open_stream

SETTINGS: dict[str, Mapping[str, object]] = {
    "gamma 1e-5, paper preset": {"preset": "paper", "gamma_attention": 1e-5},
    "published 1e5, paper preset (algorithm 1)": {"preset": "paper", "gamma_attention": 1e5},
    "published 1e3, paper preset (algorithm 1)": {"preset": "paper", "gamma_attention": 1e3},
    "published 1e5, authors' code preset": {"preset": "authors_code", "gamma_attention": 1e5},
    "published 1e3, authors' code preset": {"preset": "authors_code", "gamma_attention": 1e3},
    "auto, paper preset": {"preset": "paper", "gamma_attention": "auto"},
}


def gradient_norms(
    model: CausalLM, teacher: Teacher, config: DistillationConfig, batches: Sequence[Batch], compute: Compute
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Value, weight and weighted-gradient norm of each term, summed over the batches."""
    objective = stage3_objective(config, model.architecture, model.architecture)
    counts: dict[str, float] = {}
    for batch in batches:
        for name, count in objective.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count

    def losses(only: str | None) -> dict[str, float]:
        values: dict[str, float] = {}
        for batch in batches:
            moved = batch.to(compute.device)
            with compute.autocast():
                student = model(moved, objective.student_wants)
                taught = teacher(moved, objective.teacher_wants) if objective.teacher_wants else None
                part = (objective if only is None else objective.alone(only))(student, taught, moved, counts)
            if only is not None:
                part.total.backward()
            for name, value in part.terms.items():
                values[name] = values.get(name, 0.0) + float(value)
        return values

    with torch.no_grad():
        values = losses(None)
    objective.calibrate(values)
    norms: dict[str, float] = {}
    for name in values:
        model.zero_grad(set_to_none=True)
        losses(name)
        squares = [float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None]
        norms[name] = math.sqrt(sum(squares))
    return values, objective.weights, norms


def main(argv: Sequence[str]) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmark.relation_gradient_share", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="what one would type after scripts/train.py for stage 3")
    composed = compose(parser.parse_args(argv).overrides)
    plan = plan_stage(composed.config, composed.tree)
    compute = choose_compute("float32")
    model, tokenizer = load_model(plan.source, composed.config)
    assert plan.teacher is not None
    taught_by, _ = load_model(plan.teacher, composed.config)
    model.to(compute.device)
    set_quantization(model, 1.0)
    set_subln_strength(model, 1.0)
    stream = open_stream(composed.config, tokenizer)
    batches = [stream.next_batch() for _ in range(4)]
    rows = [f"{'setting':44} {'L_AD':>10} {'weight':>10} {'weighted':>10} {'share of the gradient':>22}"]
    for name, update in SETTINGS.items():
        config = composed.config.distillation.model_copy(update=update)
        values, weights, norms = gradient_norms(model, Teacher(taught_by.to(compute.device)), config, batches, compute)
        share = norms["attention"] / sum(norms.values())
        weighted = values["attention"] * weights["attention"]
        rows.append(
            f"{name:44} {values['attention']:10.3g} {weights['attention']:10.3g} {weighted:10.3g} {share:22.3g}"
        )
    sys.stdout.write("\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
