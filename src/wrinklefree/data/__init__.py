"""Text and task sources, packing, and resumable batch streams."""
