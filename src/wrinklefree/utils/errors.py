"""Errors that a user can act on. Each carries the exit code that a command ends with.

A message says what happened, the value, and what to do, in one line; commands print it without a traceback.
Exit codes: 0 done, 1 defect of ours (traceback), 2 configuration, 65 data, 69 network or a service, 74 input/output,
75 out of memory, 76 non-finite loss, 77 credentials, 78 checkpoint, 130 interrupted (SIGINT), 143 terminated (SIGTERM).
"""

from typing import ClassVar


class WrinkleFreeError(Exception):
    """Base of all errors raised for a reason outside our code."""

    exit_code: ClassVar[int] = 1


class ConfigError(WrinkleFreeError):
    """A configuration that cannot be run: unknown key, wrong type, contradiction."""

    exit_code: ClassVar[int] = 2


class NotAvailableError(ConfigError):
    """A documented feature that this version does not have yet."""


class DataError(WrinkleFreeError):
    """A source that is missing, empty, or not what its config says."""

    exit_code: ClassVar[int] = 65


class NetworkError(WrinkleFreeError):
    """A registry, hub or service that cannot be reached."""

    exit_code: ClassVar[int] = 69


class EngineError(WrinkleFreeError):
    """An inference engine that cannot hold the model, did not start, or died."""

    exit_code: ClassVar[int] = 69


class RankLostError(WrinkleFreeError):
    """A process of a distributed run that died or does not answer."""

    exit_code: ClassVar[int] = 69


class StorageError(WrinkleFreeError):
    """A folder or bucket that cannot be read or written, or a full disk."""

    exit_code: ClassVar[int] = 74


class OutOfMemoryError(WrinkleFreeError):
    """The device has too little memory for the batch."""

    exit_code: ClassVar[int] = 75


class NonFiniteError(WrinkleFreeError):
    """Loss or gradients were NaN or infinite too often in a row."""

    exit_code: ClassVar[int] = 76


class CredentialsError(WrinkleFreeError):
    """Credentials that are missing or refused."""

    exit_code: ClassVar[int] = 77


class CheckpointError(WrinkleFreeError):
    """A checkpoint that is truncated, corrupt, of another model, or from another chain of stages."""

    exit_code: ClassVar[int] = 78
