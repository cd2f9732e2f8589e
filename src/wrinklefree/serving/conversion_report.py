"""A conversion in a few lines for people: what was written, how it was checked, how to serve it."""

import shlex

from wrinklefree.models.padding import Padding
from wrinklefree.serving.converter import Conversion
from wrinklefree.utils.storage import format_size


def describe(conversion: Conversion) -> str:
    """The summary that `scripts/convert_to_gguf.py` prints."""
    row = conversion.row
    ratio = conversion.projection_bytes_f16 / conversion.projection_bytes
    lines = [
        ("wrote", f"{conversion.path}, {format_size(conversion.file_bytes)}"),
        ("architecture", f"{row.name}, for {'this library' if row.target == 'wrinklefree' else row.target}"),
        ("types", f"projections {conversion.weight_type}, embedding and head {conversion.table_type}, norms F32"),
        ("padding", _padding(conversion)),
        (
            "sizes",
            f"projections {format_size(conversion.projection_bytes)} (F16: {format_size(conversion.projection_bytes_f16)}, "
            f"{ratio:.1f}x), file {format_size(conversion.file_bytes)} (F16: {format_size(conversion.file_bytes_f16)})",
        ),
        ("verified", "no (--no-verify)" if conversion.verification is None else conversion.verification.line()),
        *(("note", note) for note in conversion.notes),
        ("serve", f"uv run python scripts/serve.py --model {shlex.quote(str(conversion.path))} --port 8080"),
    ]
    return "\n".join(f"{title:<13} {text}" for title, text in lines)


def _padding(conversion: Conversion) -> str:
    padding = conversion.padding
    if padding.is_none:
        return "none"
    changes = [
        f"{change.site} works with epsilon {change.effective:.3g} instead of {change.trained:.3g}: its output changes by at "
        f"most {change.relative_change_at(0.01):.1e} of its size for inputs of RMS 0.1 or more, "
        f"{change.largest_relative_change:.1%} for vanishing ones"
        for change in conversion.epsilon_changes
    ]
    return f"{_sizes(padding)}; {'; '.join(changes) if changes else 'the function is exactly the same'}"


def _sizes(padding: Padding) -> str:
    old = padding.original
    pairs = (
        ("hidden", old.hidden_size, padding.hidden_size),
        ("FFN", old.intermediate_size, padding.intermediate_size),
        ("heads", old.num_attention_heads, padding.num_attention_heads),
        ("key-value heads", old.num_key_value_heads, padding.num_key_value_heads),
    )
    return ", ".join(f"{name} {before} to {after}" for name, before, after in pairs if before != after)
