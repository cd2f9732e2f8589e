"""How a pipeline ends: its model as a verified GGUF file, and a sample of text from the engine that will serve it."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wrinklefree.data.tokens import start_token_id
from wrinklefree.serving.conversion_report import describe
from wrinklefree.serving.converter import Conversion, ConversionOptions, convert
from wrinklefree.serving.engine.choose import open_engine
from wrinklefree.serving.engine.protocol import Sampling


@dataclass(frozen=True)
class Export:
    """A written and verified file, and what its engine says."""

    conversion: Conversion
    engine: str
    samples: tuple[tuple[str, str], ...]
    """(prompt, greedy continuation)."""

    def lines(self) -> list[str]:
        """For the log and the report: what was written, how it was checked, and the command that serves it."""
        return [" ".join(line.split()) for line in describe(self.conversion).splitlines()]

    def record(self) -> dict[str, Any]:
        """For report.json."""
        made = self.conversion
        return {
            "path": str(made.path),
            "architecture": made.row.name,
            "weight_type": made.weight_type,
            "embedding_type": made.table_type,
            "linear_bytes": made.projection_bytes,
            "linear_bytes_f16": made.projection_bytes_f16,
            "file_bytes": made.file_bytes,
            "file_bytes_f16": made.file_bytes_f16,
            "engine": self.engine,
            "samples": [list(sample) for sample in self.samples],
        }


def export_model(artifact: Path, file: Path, *, shown_as: Path, prompts: Sequence[str], max_tokens: int) -> Export:
    """Write `artifact` as the GGUF file that the most runtimes load, verify it, and let its engine continue the prompts.

    Args:
        artifact: A ternary model whose warm-ups are complete.
        file: The file to write.
        shown_as: The name by which the report and the serving command call it (a link to it).
        prompts: Continued greedily.
        max_tokens: Of each continuation.

    Raises:
        ConfigError, CheckpointError, StorageError: as `convert`.
        EngineError: no engine runs what was written.
    """
    conversion = convert(ConversionOptions(artifact, file))
    samples: list[tuple[str, str]] = []
    with closing(open_engine(file, slots=1)) as engine:
        tokenizer = engine.tokenizer
        for prompt in prompts:
            ids = [start_token_id(tokenizer), *tokenizer.encode(prompt)]
            tokens = [token.id for token in engine.stream(ids, Sampling(max_tokens, temperature=0.0))]
            samples.append((prompt, tokenizer.decode(tokens)))
        name = engine.info.engine
    return Export(replace(conversion, path=shown_as), name, tuple(samples))
