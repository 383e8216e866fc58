"""llama.cpp in a process of its own: it loads a model, then answers lines of JSON, {"do": NAME, "flash": BOOL, ...}.

A process of its own, because llama.cpp and PyTorch each bring an OpenMP runtime, whose waiting threads would take the
other's cores; and without PyTorch, of which nothing is needed here.

Only the low-level interface is used. The cache holds what a prefill with a few random tokens gave, again and again; its
state at each length is kept, so that measurements at several lengths can take turns.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import time

import llama_cpp as lib

TYPES = {"float32": 0, "float16": 1}  # enum ggml_type; it could not rotate cached keys of bfloat16
LOG_LEVEL_ERROR = 4  # enum ggml_log_level
PREFILL = 64  # tokens at once; without flash attention room for PREFILL x context x heads scores is made


@lib.llama_log_callback
def only_errors(level: int, text: bytes, data: object) -> None:
    """llama.cpp reports every tensor that it loads."""
    if level == LOG_LEVEL_ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


class Context:
    """One llama_context, its sequence 0, and copies of that sequence at several lengths."""

    def __init__(self, model: object, dtype: str, flash_attention: bool, room: int, threads: int) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = room
        params.n_batch = params.n_ubatch = min(PREFILL, room)
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max, params.kv_unified = 2, True  # a second sequence to fill the cache with, in the same cells
        params.type_k = params.type_v = TYPES[dtype]
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.pointer = lib.llama_init_from_model(model, params)
        if not self.pointer:
            raise RuntimeError("llama.cpp could not make a context")
        self.memory = lib.llama_get_memory(self.pointer)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.size = params.n_batch
        self.batch = lib.llama_batch_init(self.size, 0, 1)
        self.random = random.Random(0)
        self.length = 0
        self.states: dict[int, ctypes.Array] = {}

    def decode(self, tokens: list[int]) -> float:
        """Seconds of one llama_decode, which gives logits of every token, and of waiting for it."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self.length + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = True
        started = time.perf_counter()
        status = lib.llama_decode(self.pointer, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        lib.llama_synchronize(self.pointer)
        self.length += len(tokens)
        return time.perf_counter() - started

    def truncate(self, length: int) -> None:
        if not lib.llama_memory_seq_rm(self.memory, 0, length, -1):
            raise RuntimeError("llama.cpp could not remove positions")
        self.length = length

    def check_length(self) -> None:
        cached = lib.llama_memory_seq_pos_max(self.memory, 0) + 1
        if cached != self.length:
            raise RuntimeError(f"llama.cpp caches {cached} positions, not {self.length}")

    def logits(self, tokens: list[int]) -> list[list[float]]:
        """Of every token: all but the last at once, then the last in a step of its own, as it is measured."""
        self.truncate(0)
        rows = []
        for part in (tokens[:-1], tokens[-1:]):
            self.decode(part)
            rows += [lib.llama_get_logits_ith(self.pointer, i)[: self.vocabulary] for i in range(len(part))]
        self.truncate(0)
        return rows

    def fill(self, length: int) -> None:
        """Cache `length` positions and keep the state.

        Only the first ones come from a prefill, which takes minutes for many: then a copy of the sequence, moved behind
        it, doubles it, until it is long enough. llama.cpp rotates the copied keys to their new positions.
        """
        self.truncate(0)
        self.decode([self.random.randrange(self.vocabulary) for _ in range(min(length, self.size))])
        while self.length < length:
            self.restore(self.state(), sequence=1)
            lib.llama_memory_seq_rm(self.memory, 1, length - self.length, -1)
            lib.llama_memory_seq_add(self.memory, 1, 0, -1, self.length)
            lib.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
            lib.llama_memory_seq_rm(self.memory, 1, -1, -1)
            self.length = min(2 * self.length, length)
            # Moved keys are rotated ahead of the next step, and must be before they are copied again.
            self.decode([0])
            self.truncate(self.length - 1)
        self.check_length()
        self.states[length] = self.state()

    def state(self) -> ctypes.Array:
        """A copy of the sequence."""
        size = lib.llama_state_seq_get_size(self.pointer, 0)
        state = (ctypes.c_uint8 * size)()
        if lib.llama_state_seq_get_data(self.pointer, state, size, 0) != size:
            raise RuntimeError("llama.cpp could not copy its state")
        return state

    def restore(self, state: ctypes.Array, sequence: int) -> None:
        """Make the state that of the sequence."""
        if lib.llama_state_seq_set_data(self.pointer, state, len(state), sequence) != len(state):
            raise RuntimeError("llama.cpp could not restore its state")

    def times(self, length: int, tokens: int) -> list[float]:
        """Seconds of each of `tokens` steps of one token, from `length` cached positions on; one more goes ahead."""
        self.truncate(0)
        self.restore(self.states[length], sequence=0)
        self.length = length
        seconds = [self.decode([self.random.randrange(self.vocabulary)]) for _ in range(tokens + 1)]
        self.check_length()
        return seconds[1:]


def load(path: str) -> object:
    lib.llama_log_set(only_errors, ctypes.c_void_p())
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mode = lib.LLAMA_LOAD_MODE_NONE  # no page of a file is read while a step is timed
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {path}")
    return model


def main() -> None:
    path, dtype, room, threads = sys.argv[1:]
    model = load(path)
    contexts = {flash: Context(model, dtype, flash, int(room), int(threads)) for flash in (True, False)}
    print(json.dumps(lib.llama_print_system_info().decode().strip()), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        method = getattr(contexts[request.pop("flash")], request.pop("do"))
        print(json.dumps(method(**request)), flush=True)


if __name__ == "__main__":
    main()
