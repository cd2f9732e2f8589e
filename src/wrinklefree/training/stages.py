"""The table of stages, by name."""

from types import MappingProxyType

from wrinklefree.training import pretrain, sft, stage1, stage1_9, stage2, stage3

STAGES = MappingProxyType(
    {
        row.name: row
        for row in (
            stage1.STAGE,
            stage1_9.STAGE,
            stage2.STAGE,
            stage3.STAGE,
            pretrain.STAGE,
            sft.FP_SFT,
            sft.BITNET_SFT,
        )
    }
)
"""`training.stage` -> stage."""
