"""The README's memory tables, computed: what each stage holds on a device, for the models and batches shown there.

uv run python -m benchmark.estimator_tables            # Markdown
uv run python -m benchmark.estimator_tables --device a100_80gb
"""

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from wrinklefree.composition import compose
from wrinklefree.training.device_kinds import DeviceName
from wrinklefree.training.estimate_report import MARKDOWN_HEADER, markdown_row
from wrinklefree.training.estimator import estimate_stage

TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "Qwen3-4B (4 GPUs from stage 2 on)": {
        "Stage 1": ("model=qwen3_4b", "training=stage1_subln"),
        "Stage 1.9, `optimizer.type=adamw_8bit`": (
            "model=qwen3_4b", "training=stage1_9_layerwise", "optimizer.type=adamw_8bit",
            "training.activation_checkpointing=true",
        ),
        "Stage 2": ("model=qwen3_4b", "training=stage2_pretrain", "distributed=fsdp_multi", "estimation.devices=4"),
        "Stage 3": ("model=qwen3_4b", "training=stage3_distill", "distributed=fsdp_multi", "estimation.devices=4"),
    },
    "SmolLM2-135M (one GPU)": {
        "Stage 1": ("model=smollm2_135m", "training=stage1_subln"),
        "Stage 1.9": ("model=smollm2_135m", "training=stage1_9_layerwise"),
        "Stage 2": ("model=smollm2_135m", "training=stage2_pretrain"),
        "Stage 3": ("model=smollm2_135m", "training=stage3_distill_smollm2"),
    },
    "Llama-2-7B": {
        "Stage 2, 4 GPUs": (
            "model=llama_7b", "training=stage2_pretrain", "distributed=fsdp_multi", "estimation.devices=4",
        ),
        "Stage 3, 4 GPUs": (
            "model=llama_7b", "training=stage3_distill", "distributed=fsdp_multi", "estimation.devices=4",
        ),
        "Stage 3, 8 GPUs": (
            "model=llama_7b", "training=stage3_distill", "distributed=fsdp_large", "estimation.devices=8",
        ),
    },
}  # fmt: skip
"""Title -> (row -> overrides)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.estimator_tables", description=__doc__)
    parser.add_argument("--device", choices=get_args(DeviceName), default="h100_80gb")
    options = parser.parse_args(argv)
    for title, rows in TABLES.items():
        lines = [f"### {title}", "", MARKDOWN_HEADER]
        for name, overrides in rows.items():
            config = compose([*overrides, f"estimation.device={options.device}"]).config
            lines.append(markdown_row(name, estimate_stage(config)))
        sys.stdout.write("\n".join(lines) + "\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
