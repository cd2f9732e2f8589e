"""Bytes that one device holds during a training step, from what the code allocates. Imports no torch.

A step is walked through the moments at which memory can peak: the teacher's forward pass, the end of the student's, the
loss, the first and the last block of the backward pass, the optimizer. At each, what is alive is summed by part. Byte
counts of a token follow the tensors that autograd keeps (`models/attention.py`, `ffn.py`, `subln.py`, `bitlinear.py`),
those of the losses their chunks (`distillation/head_losses.py`, `attention_loss.py`). Work space inside a block is the
one thing that was measured instead of derived: multiples of the widest float32 activation, `_FORWARD_COPIES` and
`_BACKWARD_COPIES`.

Not counted: the allocator's rounding and fragmentation, the CUDA context, PyTorch itself, the batch (32 bytes a token).

Legend: D hidden size, F FFN size, Q query width, K key width, V vocabulary, N tokens of a micro-batch, c bytes of the
compute dtype.
"""

from dataclasses import dataclass, replace
from typing import Literal

from wrinklefree.models.config import Architecture, Placement

Checkpointing = Literal["off", "selective", "full"]
OptimizerName = Literal["adamw", "adamw_8bit", "muon", "apollo", "apollo_mini"]

PARTS = ("masters", "weights", "gradients", "optimizer", "activations", "logits", "relations", "teacher")
"""Names of the parts, in the order in which they are shown."""

PART_TITLES = {
    "masters": "float32 masters",
    "weights": "compute copies of weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits chunk and head",
    "relations": "relations and layer losses",
    "teacher": "teacher",
}

_FORWARD_COPIES = 2.7
"""Float32 copies of the FFN's activation that a block needs at once beyond what it keeps (measured)."""
_BACKWARD_COPIES = 3.3
"""The same in the backward pass (measured)."""
_ROW_LOOP_FROM = 512
"""`attention.MIN_LENGTH_FOR_LOOP`: shorter rows of several documents are masked on a CPU."""
_FLOAT32_KEYS = 256
"""`runs.MAX_KEYS_FOR_FLOAT32`: rows up to this length attend in float32 on a CPU."""
_BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
"""`head_losses.CHUNK_BYTES`, and `relation_pieces.DEFAULT_BLOCK_BYTES` for the second."""
_RELATION_BLOCK_BYTES = 2**20
"""`relation_pieces.CPU_BLOCK_BYTES`."""
_RELATION_ROWS = 128
"""`relation_pieces.CPU_ROWS`."""
_FEWEST_ROWS = 256
"""`head_losses.FEWEST_ROWS_A_CHUNK`."""
_VOCABULARY_BLOCKS = 10 * 2**20
"""Scratch of `vocabulary_blocks`: float32 blocks of 512 rows and words, and their products."""
_KEPT_SHARE = 0.42
"""`vocabulary_blocks.KEPT_SHARE`."""


@dataclass(frozen=True)
class Workload:
    """One stage on one device of a group: everything that memory, arithmetic and traffic follow from."""

    architecture: Architecture
    device_type: Literal["cpu", "cuda"]
    compute_bytes: Literal[2, 4]
    rows: int
    length: int
    accumulation: int
    target_share: float
    """Share of positions whose logits the loss needs."""
    ternary: bool
    placement: Placement
    quantized_inputs: bool
    """Whether activations are integer codes."""
    quantized: bool
    """False while lambda is below 1."""
    cross_entropy: bool
    logits_kl: bool
    relation_heads: int
    """0: no relation loss."""
    layerwise: bool
    logit_lens: bool
    teacher: Literal["none", "resident", "offloaded", "cached"]
    optimizer: OptimizerName
    optimizer_rank: int
    optimizer_offload: bool
    checkpointing: Checkpointing
    shards: int
    gathered_blocks: int = 2
    """Blocks of a sharded model that are whole at one time: the one that computes, and those gathered ahead."""
    keeps_gathered: bool = False
    """Whether gathered blocks stay from the forward to the backward pass."""
    codes_gathered: bool = True
    """Whether a sharded model's ternary weights travel as codes."""
    documents_a_row: float = 1.0

    @property
    def tokens(self) -> int:
        """N: tokens of a micro-batch."""
        return self.rows * self.length

    @property
    def targets(self) -> int:
        """Positions of a micro-batch that reach the output head."""
        return max(1, round(self.tokens * self.target_share))


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by kind."""

    block: int
    """Linear weights of one block."""
    hidden: int
    """Linear weights of all blocks."""
    table: int
    """Embedding, and the head where it is not tied."""
    head: int
    vectors: int
    """Norm gains and biases."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.hidden + self.table + self.vectors


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment of the peak."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of the peak."""
        return sum(self.parts.values())


def matrices(architecture: Architecture) -> list[tuple[int, int]]:
    """(outputs, inputs) of the seven linear layers of a block."""
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    query, key = _widths(architecture)
    return [
        (query, hidden), (key, hidden), (key, hidden), (hidden, query),
        (inner, hidden), (inner, hidden), (hidden, inner),
    ]  # fmt: skip


def count_parameters(architecture: Architecture, placement: Placement | None) -> Parameters:
    """Parameters of a model; `placement` None: without SubLN."""
    a = architecture
    query, key = _widths(a)
    block = sum(rows * columns for rows, columns in matrices(a))
    gains = {None: 0, "none": 0, "output": query + a.intermediate_size}
    subln = gains[placement] if placement != "per_projection" else 5 * a.hidden_size + query + a.intermediate_size
    biases = (
        (query + 2 * key) * a.attention_bias
        + a.hidden_size * a.attention_output_bias
        + (2 * a.intermediate_size + a.hidden_size) * a.mlp_bias
    )
    vectors = 2 * a.hidden_size + 2 * a.head_dim * a.qk_norm + subln + biases
    head = a.vocab_size * a.hidden_size
    return Parameters(
        block=block,
        hidden=a.num_hidden_layers * block,
        table=head * (1 if a.tie_word_embeddings else 2),
        head=head,
        vectors=a.num_hidden_layers * vectors + a.hidden_size,
    )


def optimizer_bytes(workload: Workload) -> int:
    """State of the whole model's optimizer, before sharding."""
    parameters = count_parameters(workload.architecture, workload.placement if workload.ternary else None)
    rest = 8 * (parameters.table + parameters.vectors)
    layers, shapes = workload.architecture.num_hidden_layers, matrices(workload.architecture)
    match workload.optimizer:
        case "adamw":
            return 8 * parameters.total
        case "adamw_8bit":
            # Two bytes, and two float32 maxima a block of 256; small tensors keep float32.
            return round((2 + 8 / 256) * (parameters.hidden + parameters.table)) + 8 * parameters.vectors
        case "muon":
            return 4 * parameters.hidden + rest
        case "apollo" | "apollo_mini":
            return layers * sum(_apollo_bytes(shape, workload) for shape in shapes) + rest


def _apollo_bytes(shape: tuple[int, int], workload: Workload) -> int:
    short, long = sorted(shape)
    rank = min(1 if workload.optimizer == "apollo_mini" else workload.optimizer_rank, short)
    projection = 0 if rank == short else 4 * rank * short
    return 2 * 4 * rank * long + projection


def _optimizer_workspace(workload: Workload) -> int:
    """What a step of the optimizer needs beside its state: temporaries of the largest matrix."""
    if workload.optimizer_offload:
        return 0
    largest = max(rows * columns for rows, columns in matrices(workload.architecture))
    match workload.optimizer:
        case "adamw" | "adamw_8bit":
            return 0
        case "muon":
            return (4 + 3 * 2) * largest
        case "apollo" | "apollo_mini":
            return 2 * 4 * largest


def _widths(architecture: Architecture) -> tuple[int, int]:
    """(Q, K): widths of the query and key states."""
    return (
        architecture.num_attention_heads * architecture.head_dim,
        architecture.num_key_value_heads * architecture.head_dim,
    )


def _state_width(architecture: Architecture) -> int:
    """Width of the query, key and value states together."""
    query, key = _widths(architecture)
    return query + 2 * key


def _norm(width: int, *, input_is_new: bool, workload: Workload) -> int:
    """Bytes a token that an RMSNorm keeps: its float32 input, where nothing else does, and on a CPU the normalised one."""
    normalised = 4 * width if workload.device_type == "cpu" else 0
    return (4 * width if input_is_new else 0) + normalised + 4


def _linear_inputs(width: int, layers: int, *, float32_source: bool, workload: Workload) -> int:
    """Bytes a token that `layers` linear layers over one input of this width keep of it."""
    c = workload.compute_bytes
    if not workload.ternary:
        if c == 4 or not float32_source:
            return c * width  # the input itself
        return c * width * layers  # autocast makes each layer its own copy
    if not workload.quantized:
        return c * width * layers
    if not workload.quantized_inputs:
        return c * width * layers if float32_source and c == 2 else c * width
    return width + 4


def _projection_inputs(width: int, layers: int, *, workload: Workload) -> int:
    """Inputs of q, k and v, or of gate and up: the output of a norm of the float32 residual stream."""
    if not (workload.ternary and workload.placement == "per_projection"):
        return _linear_inputs(width, layers, float32_source=True, workload=workload)
    each = _norm(width, input_is_new=False, workload=workload)
    each += _linear_inputs(width, 1, float32_source=True, workload=workload)
    return 4 * width + layers * each


def _output_inputs(width: int, *, already_kept: bool, workload: Workload) -> int:
    """Input of o_proj or down_proj, with the SubLN before it; `already_kept`: autograd has that tensor."""
    c = workload.compute_bytes
    subln = workload.ternary and workload.placement != "none"
    kept = 0
    if subln:
        kept = _norm(width, input_is_new=c == 2 or not already_kept, workload=workload)
    if not workload.ternary and already_kept and c == 4:
        return kept
    return kept + _linear_inputs(width, 1, float32_source=False, workload=workload)


def attention_bytes(workload: Workload) -> int:
    """Bytes a token that one block's attention keeps, from the rotated states to its output."""
    a = workload.architecture
    c = workload.compute_bytes
    query, key = _widths(a)
    on_cpu = workload.device_type == "cpu"
    several = workload.documents_a_row > 1
    looped = on_cpu and several and workload.length >= _ROW_LOOP_FROM
    keys = workload.length / workload.documents_a_row if looped else workload.length
    state = 4 if on_cpu and keys <= _FLOAT32_KEYS else c
    kept = state * (2 * query + 2 * key) + 4 * a.num_attention_heads
    if a.qk_norm:
        kept += _norm(query, input_is_new=True, workload=workload) + _norm(key, input_is_new=True, workload=workload)
    if on_cpu and several and workload.length < _ROW_LOOP_FROM:
        kept += 4 * workload.length  # the mask as numbers, made by each layer
    return kept + _output_inputs(query, already_kept=not looped, workload=workload)


def checkpoint_bytes(workload: Workload) -> int:
    """Bytes that one block keeps for its backward pass under the workload's checkpointing, weights not counted."""
    a, c = workload.architecture, workload.compute_bytes
    match workload.checkpointing:
        case "off":
            return block_bytes(workload)
        case "full":
            return 4 * workload.tokens * a.hidden_size
        case "selective":
            # Matrix products and attention's output; everything element-wise is computed again.
            query, key = _widths(a)
            products = c * (query + 2 * key + 2 * a.hidden_size + 2 * a.intermediate_size)
            attended = c * query + 4 * a.num_attention_heads
            return workload.tokens * (4 * a.hidden_size + products + attended)


def block_bytes(workload: Workload) -> int:
    """Bytes that one block keeps for its backward pass without checkpoints, weights not counted."""
    a = workload.architecture
    hidden, inner, c = a.hidden_size, a.intermediate_size, workload.compute_bytes
    token = 2 * _norm(hidden, input_is_new=True, workload=workload)
    token += _projection_inputs(hidden, 3, workload=workload) + attention_bytes(workload)
    token += _projection_inputs(hidden, 2, workload=workload)
    token += 3 * c * inner  # gate, its activation, up
    token += _output_inputs(inner, already_kept=False, workload=workload)
    return workload.tokens * token


def _weight_copies(workload: Workload) -> tuple[int, int]:
    """Bytes of compute copies of all hidden weights: (kept from step to step, kept from forward to backward)."""
    hidden = count_parameters(workload.architecture, None).hidden
    if workload.ternary and workload.quantized:
        return workload.compute_bytes * hidden, 0
    if workload.ternary:
        return 0, workload.compute_bytes * hidden
    return 0, 2 * hidden if workload.compute_bytes == 2 else 0


def _workspace(workload: Workload, copies: float) -> int:
    return round(copies * 4 * workload.tokens * workload.architecture.intermediate_size)


def head_kept(workload: Workload) -> int:
    """Gradients that the chunked head pass makes ahead: of the hidden states and of the head."""
    if not (workload.cross_entropy or workload.logits_kl or workload.logit_lens):
        return 0
    hidden = 4 * workload.tokens * workload.architecture.hidden_size
    if workload.logit_lens and not workload.cross_entropy:
        return hidden
    head = 4 * workload.architecture.vocab_size * workload.architecture.hidden_size
    return 4 * workload.targets * workload.architecture.hidden_size + head


def head_workspace(workload: Workload) -> int:
    """Work space of the head pass: selected states, casts of the heads, the chunk's tensors."""
    if not (workload.cross_entropy or workload.logits_kl or workload.logit_lens):
        return 0
    a, c = workload.architecture, workload.compute_bytes
    vocabulary, hidden = a.vocab_size, a.hidden_size
    positions = workload.tokens if workload.logit_lens else workload.targets
    soft = workload.logits_kl or workload.logit_lens
    budget = _BLOCK_BYTES[workload.device_type]
    fitting = max(16, budget // (4 * vocabulary))
    with_teacher = soft and workload.teacher != "cached"
    if (
        workload.device_type == "cpu"
        and fitting < _FEWEST_ROWS
        and workload.teacher != "cached"
        and not workload.logit_lens
    ):
        # Blocks of the vocabulary as well: states in the compute dtype, a handful of float32 blocks, and logits that are
        # kept (not on a CPU with bfloat16 tiles, but the plan may be made elsewhere).
        models = 2 if with_teacher else 1
        kept_rows = min(positions, 512, max(16, int(_KEPT_SHARE * hidden * 4 / (models * c))))
        return models * ((4 + c) * positions * hidden + c * kept_rows * vocabulary) + _VOCABULARY_BLOCKS
    rows = min(positions, fitting)
    cast = 2 * vocabulary * hidden if c == 2 else 0
    several = positions > rows
    narrow = c if c == 2 else 0
    # A chunk's names stay bound while the next one's tensors are made.
    if soft:
        chunk, folding = 20 + (4 if several else 0), 8 + c
    else:
        chunk, folding = 12 if several else 8 + narrow, 4 + c
    table = vocabulary * hidden
    product = c * table + (4 * table if c == 2 and workload.device_type == "cpu" else 0)
    selected = 4 * positions * hidden * (2 if with_teacher else 1)
    casts = cast * (2 if with_teacher else 1)
    return selected + casts + max(chunk * rows * vocabulary, folding * rows * vocabulary + product)


def relation_bytes(workload: Workload) -> tuple[int, int]:
    """(kept until the backward pass, work space) of the relation loss and of the layer-wise losses."""
    a = workload.architecture
    if workload.relation_heads:
        states = 4 * workload.tokens * _state_width(a)
        if workload.device_type == "cpu":
            one_head = 4 * min(workload.length, _RELATION_ROWS) * workload.length
            block = max(one_head, min(_RELATION_BLOCK_BYTES, workload.relation_heads * one_head))
        else:
            row = 4 * workload.rows * workload.relation_heads * workload.length
            block = row * min(workload.length, max(16, _BLOCK_BYTES[workload.device_type] // row))
        return 3 * states, 2 * states + 4 * block
    if workload.layerwise:
        return 0, 3 * 4 * workload.tokens * a.hidden_size
    return 0, 0


def _teacher_bytes(workload: Workload) -> tuple[int, int, int]:
    """(weights, outputs kept for the loss, work space of its forward pass) of the teacher on this device."""
    if workload.teacher in {"none", "cached"}:
        return 0, 0, 0
    a = workload.architecture
    parameters = count_parameters(a, None)
    on_device = workload.teacher == "resident" or workload.shards == 1
    weights = _share(4 * parameters.total, workload) if on_device else 0
    if workload.shards > 1:
        weights += workload.gathered_blocks * workload.compute_bytes * parameters.block + 4 * parameters.table
    token = 4 * a.hidden_size
    if workload.layerwise:
        token += 4 * a.hidden_size * a.num_hidden_layers
    if workload.relation_heads:
        token += workload.compute_bytes * _state_width(a)
    widest = max(rows * columns for rows, columns in matrices(a))
    cast = 2 * widest if workload.compute_bytes == 2 else 0
    work = workload.tokens * (3 * 4 * a.hidden_size + 3 * workload.compute_bytes * a.intermediate_size) + cast
    return weights, workload.tokens * token, work


def block_dtype_bytes(workload: Workload) -> int:
    """Bytes of a hidden weight as a sharded model gathers it: compute dtype, or float32 for ternary masters."""
    if workload.ternary and not (workload.quantized and workload.codes_gathered):
        return 4
    return workload.compute_bytes


def _gathered(workload: Workload, parameters: Parameters) -> int:
    """Bytes of gathered parameters that a sharded model holds at one time: some blocks, and the tables in float32."""
    layers = workload.architecture.num_hidden_layers
    blocks = layers if workload.keeps_gathered else min(layers, workload.gathered_blocks)
    return blocks * block_dtype_bytes(workload) * parameters.block + 4 * parameters.table


def _resident(workload: Workload) -> dict[str, int]:
    """What is held from step to step, by part; on a sharded model with the blocks that are gathered."""
    parameters = count_parameters(workload.architecture, workload.placement if workload.ternary else None)
    weights = _gathered(workload, parameters) if workload.shards > 1 else _weight_copies(workload)[0]
    masters, state = _share(4 * parameters.total, workload), _share(optimizer_bytes(workload), workload)
    return {
        "masters": 0 if workload.optimizer_offload else masters,
        "weights": weights,
        "optimizer": 0 if workload.optimizer_offload else state,
        "teacher": _teacher_bytes(workload)[0],
    }


def _share(count: int, workload: Workload) -> int:
    return -(-count // workload.shards)


def _gradient_buffers(workload: Workload, parameters: Parameters) -> tuple[int, int, int]:
    """Gradients alive while (the last block, the first block, the embedding) is worked on.

    A tied table's gradient comes in two parts, from the head first and from the embedding last; the first waits in
    autograd. From the second micro-batch on, all gradients exist already.
    """
    tied = workload.architecture.tie_word_embeddings
    from_head = head_kept(workload) > 0 and not (workload.logit_lens and not workload.cross_entropy)
    whole = 0 if workload.optimizer_offload else _share(4 * parameters.total, workload)
    table = 4 * parameters.head
    waiting = table if tied and from_head else 0
    if workload.shards > 1:
        # The tables are one group: their gradients stay whole until all are there, and are copied to be reduced.
        earlier = whole if workload.accumulation > 1 else 0
        tables = 4 * parameters.table
        head_alone = table if from_head else 0
        return earlier + head_alone, whole + head_alone, whole + tables + max(waiting, tables)
    if workload.accumulation > 1:
        last = whole + (table if from_head else 0)
        return last, whole + waiting, whole + waiting + table
    head_alone = table if from_head else 0
    first = max(whole - _share(table, workload), 0) + waiting
    return head_alone, first, whole + waiting


def memory_moments(workload: Workload) -> list[Memory]:
    """What is alive at each moment of a step at which memory can peak."""
    a, layers = workload.architecture, workload.architecture.num_hidden_layers
    parameters = count_parameters(a, workload.placement if workload.ternary else None)
    resident = _resident(workload)
    # A sharded model's copies are those of the gathered block.
    copies = 0 if workload.shards > 1 else _weight_copies(workload)[1]
    held = 0 if workload.optimizer_offload else _share(4 * parameters.total, workload)
    earlier = held if workload.accumulation > 1 else 0
    unsharded = (block_dtype_bytes(workload) + 4) * parameters.block if workload.shards > 1 else 0
    block, hidden = block_bytes(workload), 4 * workload.tokens * a.hidden_size
    recomputed = 0 if workload.checkpointing == "off" else block
    states = workload.compute_bytes * workload.tokens * _state_width(a) if workload.relation_heads else 0
    # The final norm's two tensors and its output, the rotary table.
    edges = (3 if workload.device_type == "cpu" else 2) * hidden + 8 * workload.tokens * a.head_dim
    saved = layers * checkpoint_bytes(workload) + edges + states
    _, outputs, teacher_work = _teacher_bytes(workload)
    kept, head_work = head_kept(workload), head_workspace(workload)
    relations_kept, relations_work = relation_bytes(workload)
    last, first, embedding = _gradient_buffers(workload, parameters)
    forward, backward = _workspace(workload, _FORWARD_COPIES), _workspace(workload, _BACKWARD_COPIES)
    late_copies = copies if workload.checkpointing == "off" else copies // layers
    hidden_gradient = kept - 4 * parameters.head if last > earlier else kept

    def moment(name: str, **parts: int) -> Memory:
        return Memory(name, {part: resident.get(part, 0) + parts.get(part, 0) for part in PARTS})

    moments = [
        moment("teacher's forward pass", gradients=earlier, teacher=outputs + teacher_work),
        moment("student's forward pass", gradients=earlier, weights=copies, teacher=outputs,
            activations=saved + forward),
        moment("loss over the head", gradients=earlier, weights=copies, activations=saved, logits=kept + head_work,
            teacher=outputs),
        moment("loss over relations or layers", gradients=earlier, weights=copies, activations=saved, logits=kept,
            relations=relations_kept + relations_work, teacher=outputs),
        moment("backward pass, last block", gradients=last + unsharded, weights=late_copies, logits=hidden_gradient,
            activations=saved + recomputed + backward, relations=relations_kept,
            teacher=outputs if workload.layerwise else 0),
        moment("backward pass, first block", gradients=first + unsharded, weights=late_copies // layers,
            activations=hidden + recomputed + checkpoint_bytes(workload) + backward),
        moment("gradient of the embedding", gradients=embedding, activations=2 * hidden),
        moment("optimizer", gradients=held, optimizer=_optimizer_workspace(workload)),
    ]  # fmt: skip
    if workload.teacher == "offloaded" and workload.device_type != "cpu":
        # One process sends the blocks home after the forward pass, the rest before the optimizer.
        if workload.shards == 1:
            for late in moments[1:]:
                late.parts["teacher"] -= 4 * count_parameters(a, None).hidden
        moments[-1].parts["teacher"] = 0
    return moments


def peak_memory(workload: Workload) -> Memory:
    """The largest moment of a step."""
    return max(memory_moments(workload), key=lambda memory: memory.total)


def peak_of_run(workload: Workload, *, warms_up: bool) -> Memory:
    """The peak of a run; one that begins at lambda below 1 keeps more while the straight-through path serves it."""
    peak = peak_memory(workload)
    if not (warms_up and workload.ternary):
        return peak
    warm = peak_memory(replace(workload, quantized=False))
    return peak if peak.total >= warm.total else Memory(f"{warm.moment}, lambda below 1", warm.parts)
