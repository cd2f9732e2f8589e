"""Stages, trainer, pipeline and evaluation: the only layer that knows all others."""
