"""The engine's shared library: where it is, its functions and records as Python sees them.

An installed package holds the library beside this file. In a checkout without one it is compiled into the user's cache at
first use, if there is a compiler; otherwise `EngineError` says what to do.
"""

import ctypes
import hashlib
import os
import platform
from ctypes import POINTER, Structure, c_char_p, c_float, c_int8, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from platformdirs import user_cache_path

from wrinklefree.native.build import (
    FLAGS,
    LIBRARY_NAME,
    BuildError,
    compile_library,
    find_compiler,
    source_number,
)
from wrinklefree.utils.errors import ConfigError, EngineError

ISA_VARIABLE = "WRINKLEFREE_ENGINE_ISA"
LIBRARY_VARIABLE = "WRINKLEFREE_ENGINE_LIBRARY"
"""Path of a library to load instead: a sanitizer build, another compiler's."""

F32, F16, BF16, INT8, INT4 = range(5)


class LinearRecord(Structure):
    """WfLinear of csrc/engine.h."""

    _fields_ = (
        ("tiles", c_void_p), ("bias", c_void_p), ("norm", c_void_p),
        ("scale", c_float), ("rows", c_int32), ("columns", c_int32),
    )  # fmt: skip


class LayerRecord(Structure):
    """WfLayer of csrc/engine.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, LinearRecord) for name in ("query", "key", "value", "output", "gate", "up", "down")),
    )


class ConfigRecord(Structure):
    """WfConfig of csrc/engine.h."""

    _fields_ = (
        *((name, c_int32) for name in (
            "vocabulary", "hidden", "inner", "layers", "heads", "key_heads", "head_dim", "squared_relu", "code_max",
        )),
        ("eps", c_float),
        *((name, c_int32) for name in (
            "context", "slots", "max_tokens", "cache_type", "embedding_type", "head_type", "threads",
        )),
        ("isa", c_char_p),
        *((name, c_void_p) for name in ("embedding", "head", "head_scales", "final_norm", "cosines", "sines")),
    )  # fmt: skip


class LogitsBlockRecord(Structure):
    """WfLogitsBlock of csrc/engine.h."""

    _fields_ = (
        *((name, c_int32) for name in ("rows", "width", "first", "type", "powers")),
        ("factors", c_float * 2),
        *((name, c_void_p) for name in (
            "student", "teacher", "labels", "sums", "teacher_sums", "hard", "soft", "gradient", "values",
        )),
    )  # fmt: skip


_INT32S, _FLOATS, _CODES = POINTER(c_int32), POINTER(c_float), POINTER(c_int8)
_SIGNATURES = {
    "wf_sources": (c_int32, ()),
    "wf_isa_name": (c_char_p, (c_int32,)),
    "wf_create": (c_void_p, (POINTER(ConfigRecord), POINTER(LayerRecord))),
    "wf_free": (None, (c_void_p,)),
    "wf_step": (c_int32, (c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_void_p)),
    "wf_copy_prefix": (c_int32, (c_void_p, c_int32, c_int32, c_int32)),
    "wf_runner_create": (c_void_p, (c_char_p, c_int32, c_void_p)),
    "wf_runner_free": (None, (c_void_p,)),
    "wf_encode": (c_int32, (c_void_p, c_int32, c_int32, c_int32, c_void_p, c_int32, c_void_p, c_void_p)),
    "wf_decode": (c_int32, (c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_int32, c_void_p)),
    "wf_ternarize": (c_int32, (c_void_p, c_int64, c_void_p, c_float, c_void_p)),
    "wf_unpack": (c_int32, (c_void_p, c_int32, c_int32, c_void_p, c_float, c_int32, c_void_p)),
    "wf_pack": (c_int32, (c_void_p, c_int32, c_int32, c_void_p, c_void_p)),
    "wf_multiply": (
        c_int32,
        (c_void_p, c_void_p, c_float, c_int32, c_int32, c_int32, c_void_p, c_void_p, c_int32, c_void_p),
    ),
    "wf_sum_logits": (c_int32, (c_void_p, POINTER(LogitsBlockRecord))),
    "wf_differentiate_logits": (c_int32, (c_void_p, POINTER(LogitsBlockRecord))),
    "wf_linear": (c_int32, (c_void_p, POINTER(LinearRecord), c_int32, c_int32, c_void_p, c_int32, c_void_p, c_int32)),
    "wf_products": (c_int32, (c_char_p, c_int32, c_void_p, c_int32, c_void_p, c_int32, c_int32, c_void_p)),
    "wf_quantize": (c_int32, (c_char_p, c_void_p, c_int32, c_int32, c_int32, c_int32, c_void_p, c_void_p)),
}


@cache
def load_library() -> ctypes.CDLL:
    """The library, with the types of its functions declared.

    Raises:
        EngineError: there is none and none can be built, or it is of other sources than this package's.
    """
    if os.environ.get(LIBRARY_VARIABLE):
        return _declared(_open(Path(os.environ[LIBRARY_VARIABLE])))
    installed = Path(__file__).with_name(LIBRARY_NAME)
    if installed.is_file():
        library = _open(installed)
        if _fits(library):
            return _declared(library)
    try:
        return _declared(_open(built_in_cache(user_cache_path("wrinklefree") / "engine", find_compiler())))
    except (BuildError, OSError) as error:
        raise EngineError(
            f"the CPU engine was not built ({error}); install a C compiler or set CC, or choose another engine"
        ) from error


def is_available() -> bool:
    """Whether the library is there, or could be built just now."""
    try:
        load_library()
    except EngineError:
        return False
    return True


def isa_names() -> list[str]:
    """Instruction sets that this CPU can run, best first; the last is always `plain`."""
    library, names = load_library(), list[str]()
    while (name := library.wf_isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


def chosen_isa(isa: str | None = None) -> bytes:
    """The name to pass to C: the argument, else $WRINKLEFREE_ENGINE_ISA, else the best.

    Raises:
        ConfigError: this CPU does not have it.
    """
    names = isa_names()
    wanted = isa or os.environ.get(ISA_VARIABLE) or names[0]
    if wanted not in names:
        raise ConfigError(f"this CPU does not run the instruction set {wanted!r}; it runs {', '.join(names)}")
    return wanted.encode()


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(f"cannot load the CPU engine {path} ({error}); install wrinklefree again") from error


def _fits(library: ctypes.CDLL) -> bool:
    """Whether it was compiled from the sources that lie beside this file."""
    return hasattr(library, "wf_sources") and library.wf_sources() == source_number()


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    if not _fits(library):
        raise EngineError(f"the CPU engine {library._name} is of another version; install wrinklefree again")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, list(arguments)
    return library


def built_in_cache(folder: Path, compiler: list[str], extra_flags: tuple[str, ...] = ()) -> Path:
    """A library compiled from the present sources, kept under a name made of them, the compiler and the flags."""
    identity = (compiler, FLAGS, extra_flags, platform.machine(), source_number())
    digest = hashlib.sha256(repr(identity).encode())
    path = folder / f"{digest.hexdigest()[:16]}-{LIBRARY_NAME}"
    if not path.is_file():
        compile_library(path, compiler, extra_flags)
    return path
