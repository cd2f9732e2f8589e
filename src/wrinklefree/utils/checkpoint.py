"""Checkpoints of a run in progress."""

from wrinklefree.utils.manifest import commit_folder, verify_manifest, write_manifest

__all__ = ["commit_folder", "verify_manifest", "write_manifest"]
