"""All logits of a text out of llama.cpp, through the C functions inside the package xllamacpp.

The package's own interface reports probabilities of one token a request; a perplexity over ten thousand tokens needs all
of them. Structures are passed by value and grow with every release: they are passed here as blocks that are larger than
they can be (the C calling conventions of x86-64 and ARM allow it for a last argument), and the few fields that are
written are first compared with their documented defaults.
"""

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 2048
_FIELDS = {
    "n_ctx": (0, 512), "n_batch": (4, 2048), "n_threads": (28, 4), "n_threads_batch": (32, 4), "context_type": (36, 0),
    "rope_scaling": (40, -1), "pooling": (44, -1), "attention": (48, -1), "flash_attention": (52, -1),
    "rope_base": (56, 0), "type_k": (104, 1), "type_v": (108, 1),
}  # fmt: skip
"""Field of llama_context_params in the releases of autumn 2026: offset in bytes, default."""
_F32, _DISABLED = 0, 0


class _Params(ctypes.Structure):
    _fields_ = [("content", ctypes.c_uint8 * _BLOCK)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def _library() -> Any:
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    library.llama_model_default_params.restype = _Params
    library.llama_context_default_params.restype = _Params
    library.llama_batch_init.restype = _Batch
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory", "llama_model_get_vocab"):
        getattr(library, name).restype = ctypes.c_void_p
    library.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    library.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Params]
    library.llama_init_from_model.argtypes = [ctypes.c_void_p, _Params]
    library.llama_set_n_threads.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
    library.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
    library.llama_batch_init.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
    library.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    for name in ("llama_get_memory", "llama_model_get_vocab", "llama_free", "llama_model_free", "llama_vocab_n_tokens"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.llama_batch_free.argtypes = [_Batch]
    return library


class LlamaCpp:
    """A loaded GGUF file that returns the logits of every position; one thread, float32 key-value cache."""

    def __init__(self, path: Path, *, context: int) -> None:
        self._library = library = _library()
        self._quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        library.llama_log_set(self._quiet, None)
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {path}")
        params = library.llama_context_default_params()
        for name, (offset, default) in _FIELDS.items():
            [found] = struct.unpack_from("<i", params.content, offset)
            if found != default:
                raise SystemExit(f"this xllamacpp has another llama_context_params ({name} is {found}, not {default})")
        changes = {"n_ctx": context, "n_batch": context, "flash_attention": _DISABLED, "type_k": _F32, "type_v": _F32}
        for name, value in changes.items():
            struct.pack_into("<i", params.content, _FIELDS[name][0], value)
        self._context = library.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context for {path}")
        library.llama_set_n_threads(self._context, 1, 1)
        self.vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """[T, V], of one text from its start."""
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        batch = library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for position, token in enumerate(ids):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, 1
        status = library.llama_decode(self._context, batch)
        library.llama_batch_free(batch)
        if status != 0:
            raise SystemExit(f"llama_decode returned {status}")
        rows = [
            np.ctypeslib.as_array(library.llama_get_logits_ith(self._context, position), (self.vocab_size,)).copy()
            for position in range(len(ids))
        ]
        return np.stack(rows)

    def close(self) -> None:
        """Free context and model."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)
