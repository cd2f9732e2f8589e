"""What SubLN does to a pretrained model before anything is quantized: gain, placement and strength against the base.

Gains are calibrated on BBC politics and technology articles; the base and the converted model then read held-out business
and sports articles. Written as a Markdown table: mean cosine of the logits, share of positions with the same most likely
token, KL from the base in nats, perplexity.

    uv run python benchmark/subln_table.py --model smollm2_135m
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from wrinklefree.composition import compose
from wrinklefree.models.config import Gain, Placement
from wrinklefree.models.convert import to_bitnet
from wrinklefree.models.hf import load_pretrained
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.utils import assets
from wrinklefree.utils.tokenizer import TextTokenizer

CALIBRATION_TOPICS = ("politics", "tech")
HELD_OUT_TOPICS = ("business", "sports")


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    placement: Placement
    gain: Gain
    strength: float


ARMS = (
    Arm("output", "ones", 1.0),
    Arm("output", "median", 1.0),
    Arm("output", "per_channel", 1.0),
    Arm("output", "median", 0.5),
    Arm("output", "ones", 0.0),
    Arm("output", "median", 0.0),
    Arm("per_projection", "ones", 1.0),
    Arm("per_projection", "median", 1.0),
    Arm("per_projection", "per_channel", 1.0),
    Arm("per_projection", "median", 0.0),
)


def read_rows(tokenizer: TextTokenizer, topics: Sequence[str], *, rows: int, length: int) -> list[Batch]:
    """One row an article, articles of the topics in turn, those that are long enough; a batch holds one row."""
    folder = assets.fetch("bbc_news")
    batches: list[Batch] = []
    for files in zip(*(sorted((folder / topic).glob("*.txt")) for topic in topics), strict=False):
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            ids = tokenizer.document(text)[:length]
            if len(ids) == length:
                row = torch.tensor(ids)[None]
                labels = torch.cat([row[:, 1:], torch.full((1, 1), IGNORE)], dim=1)
                batches.append(Batch(row, labels, torch.arange(length)[None], torch.ones_like(row)))
            if len(batches) == rows:
                return batches
    raise SystemExit(f"only {len(batches)} of {rows} articles have {length} tokens; lower --length")


@torch.no_grad()
def compare(reference: Sequence[torch.Tensor], model: CausalLM, batches: Sequence[Batch]) -> dict[str, float]:
    """Mean over positions of cosine, top-1 agreement and KL(base || model); perplexity; largest logit difference.

    `reference` holds the base model's logits [T, V] for each batch of one row.
    """
    cosine = agreement = divergence = negative_log_likelihood = difference = 0.0
    positions = targets = 0
    for batch, theirs in zip(batches, reference, strict=True):
        ours = model(batch).logits()[0]
        labels = batch.labels[0]
        cosine += float(functional.cosine_similarity(ours, theirs, dim=-1).sum())
        agreement += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
        divergence += float(functional.kl_div(log_ours, log_theirs, reduction="sum", log_target=True))
        negative_log_likelihood += float(functional.nll_loss(log_ours, labels, ignore_index=IGNORE, reduction="sum"))
        difference = max(difference, float((ours - theirs).abs().max()))
        positions += len(labels)
        targets += int((labels != IGNORE).sum())
    return {
        "cosine": cosine / positions,
        "top-1": agreement / positions,
        "KL": divergence / positions,
        "perplexity": float(torch.tensor(negative_log_likelihood / targets, dtype=torch.float64).exp()),
        "largest difference": difference,
    }


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description="SubLN gains against the base model, before quantization")
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--source", default="package", choices=["hub", "package", "path"])
    parser.add_argument("--rows", type=int, default=16, help="held-out articles")
    parser.add_argument("--calibration-rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens an article")
    parser.add_argument("--output", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    config = compose([f"model={arguments.model}", f"model.source={arguments.source}", "training=stage1_subln"]).config
    base, tokenizer = load_pretrained(config.model)
    base.eval()
    calibration = read_rows(tokenizer, CALIBRATION_TOPICS, rows=arguments.calibration_rows, length=arguments.length)
    held_out = read_rows(tokenizer, HELD_OUT_TOPICS, rows=arguments.rows, length=arguments.length)
    lines = [
        "| placement | gain | strength | logit cosine | top-1 agreement | KL, nats | perplexity | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with torch.no_grad():
        reference = [base(batch).logits()[0] for batch in held_out]
    rows = [("-", "base model", "-", compare(reference, base, held_out))]
    sys.stdout.write("\n".join(lines) + "\n")
    for arm in (None, *ARMS):
        if arm is not None:
            model = to_bitnet(
                base,
                placement=arm.placement,
                gain=arm.gain,
                activation_bits=config.model.quantization.activation_bits,
                strength=arm.strength,
                calibration=calibration,
            )
            rows.append((arm.placement, arm.gain, f"{arm.strength:g}", compare(reference, model.eval(), held_out)))
        placement, gain, strength, result = rows[-1]
        lines.append(
            f"| {placement} | {gain} | {strength} | {result['cosine']:.3f} | {result['top-1']:.1%} | {result['KL']:.3f} | "
            f"{result['perplexity']:.4g} | {result['largest difference']:.3g} |"
        )
        sys.stdout.write(lines[-1] + "\n")
        sys.stdout.flush()
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
