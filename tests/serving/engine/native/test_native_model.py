"""The engine's logits against the PyTorch decoder's, over families, placements, activations, precisions and schedules."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wrinklefree.models.bitlinear import set_products
from wrinklefree.models.config import Architecture, BitNetSpec, RopeScaling
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.native.library import isa_names
from wrinklefree.serving.engine.native.model import NativeModel, NativeOptions, PackedModel
from wrinklefree.utils.errors import CheckpointError, ConfigError, EngineError

OPTIONS = NativeOptions(context_length=96, slots=3, max_tokens=40, cache="f32")
LLAMA = Architecture(
    family="llama", vocab_size=131, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
)  # fmt: skip
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
ARCHITECTURES = {
    "llama": LLAMA,
    "llama3_untied": LLAMA.model_copy(update={"rope_scaling": SCALING, "tie_word_embeddings": False}),
    "qwen2": LLAMA.model_copy(update={"family": "qwen2", "attention_bias": True, "rope_theta": 1e6}),
    "qwen3": LLAMA.model_copy(update={"family": "qwen3", "qk_norm": True, "head_dim": 32, "rms_norm_eps": 1e-6}),
    "relu2_all_biases": LLAMA.model_copy(
        update={"hidden_act": "relu2", "attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
    ),
    "odd_sizes": LLAMA.model_copy(
        update={"hidden_size": 70, "intermediate_size": 101, "num_attention_heads": 5, "num_key_value_heads": 5,
                "head_dim": 14, "vocab_size": 65}
    ),
}  # fmt: skip
PLACEMENTS = ("none", "output", "per_projection")


def random_model(
    architecture: Architecture, placement: str, *, activation_bits: int | None = 8, seed: int = 0
) -> CausalLM:
    """Random weights, gains and biases, at lambda 1, with logits of a trained model's spread."""
    torch.manual_seed(seed)
    bitnet = BitNetSpec(placement=placement, gain="ones", activation_bits=activation_bits, quantization_lambda=1.0)  # type: ignore[arg-type]
    model = CausalLM(architecture, bitnet)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "embed" in name or "lm_head" in name:
                parameter.normal_(std=0.5)
    set_products(model, "float", "exact")  # the engine shares the kernels that are the default
    return model.eval()


@torch.inference_mode()
def reference(model: CausalLM, ids: list[int]) -> NDArray[np.float32]:
    row = torch.tensor([ids])
    return model(Batch(row, row, torch.arange(len(ids))[None], torch.ones_like(row))).logits()[0].numpy()


def tokens(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """A token's error over the size of its logits."""
    return np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_the_pytorch_model(name: str, placement: str) -> None:
    model = random_model(ARCHITECTURES[name], placement)
    ids = tokens(60, model.architecture.vocab_size)
    native = NativeModel(PackedModel.from_model(model, "f32"), OPTIONS)
    errors = relative_error(native.logits(ids), reference(model, ids))
    # Sums in another order move a value by 1e-7, and now and then one of them rounds to another activation code.
    assert np.median(errors) < 1e-5
    assert errors.mean() < 1e-3


@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_other_activation_precisions(bits: int | None, placement: str) -> None:
    model = random_model(LLAMA, placement, activation_bits=bits)
    ids = tokens(50, 131)
    errors = relative_error(
        NativeModel(PackedModel.from_model(model, "f32"), OPTIONS).logits(ids), reference(model, ids)
    )
    # None: the engine's 15-bit codes stand in for unquantized activations.
    assert np.median(errors) < (1e-5 if bits == 4 else 1e-4)


@pytest.mark.parametrize(("head", "limit"), [("f16", 4e-4), ("int8", 1e-2), ("int4", 0.2)])
def test_narrow_heads_cost_what_their_bits_say(head: str, limit: float) -> None:
    model = random_model(LLAMA, "output")
    ids = tokens(50, 131)
    errors = relative_error(
        NativeModel(PackedModel.from_model(model, head), OPTIONS).logits(ids), reference(model, ids)
    )  # type: ignore[arg-type]
    assert limit / 10 < np.median(errors) < limit


def test_int8_head_is_the_product_of_rounded_rows() -> None:
    model = random_model(LLAMA, "output")
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        rounded = (weight / scale).round() * scale
    ids = tokens(30, 131)
    row = torch.tensor([ids])
    with torch.inference_mode():
        batch = Batch(row, row, torch.arange(len(ids))[None], torch.ones_like(row))
        expected = (model(batch).hidden @ rounded.T)[0].numpy()
    found = NativeModel(PackedModel.from_model(model, "int8"), OPTIONS).logits(ids)
    assert np.median(relative_error(found, expected)) < 1e-4


def test_f16_cache_moves_logits_by_little() -> None:
    model = random_model(LLAMA, "output")
    ids = tokens(60, 131)
    packed = PackedModel.from_model(model, "f32")
    halves = NativeModel(packed, replace(OPTIONS, cache="f16")).logits(ids)
    errors = relative_error(halves, NativeModel(packed, OPTIONS).logits(ids))
    assert 1e-6 < errors.mean() < 1e-2


def test_int8_cache_moves_logits_by_little() -> None:
    """A hundredth, and ten times what half precision does: it is really 8 bits."""
    ids = tokens(60, 131)
    for name in ("llama", "qwen3", "odd_sizes"):
        packed = PackedModel.from_model(random_model(ARCHITECTURES[name], "output"), "f32")
        ids = tokens(60, packed.architecture.vocab_size)
        exact = NativeModel(packed, OPTIONS).logits(ids)
        codes = NativeModel(packed, replace(OPTIONS, cache="int8")).logits(ids)
        assert 1e-4 < relative_error(codes, exact).mean() < 3e-2


def test_int8_cache_is_the_attention_of_rounded_keys_and_values() -> None:
    """One layer, unquantized activations: the keys and values, rounded to 127 steps of their largest, in PyTorch."""
    one = LLAMA.model_copy(update={"num_hidden_layers": 1})
    model = random_model(one, "none", activation_bits=None)
    ids = tokens(50, 131)
    exact = reference(model, ids)
    inner = torch.nn.functional.scaled_dot_product_attention

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        return (x / scale).round() * scale

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object, **named: object
    ) -> torch.Tensor:
        return inner(query, rounded(key), rounded(value), *rest, **named)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        expected = reference(model, ids)
    assert relative_error(expected, exact).mean() > 1e-5, "the reference did not go through the rounding"
    found = NativeModel(PackedModel.from_model(model, "f32"), replace(OPTIONS, cache="int8")).logits(ids)
    assert np.median(relative_error(found, expected)) < np.median(relative_error(found, exact)) / 5


def test_too_wide_a_model_for_four_bits_is_refused() -> None:
    wide = LLAMA.model_copy(update={"hidden_size": 32832})
    with pytest.raises(ConfigError, match="32832 dimensions, a 4-bit head has up to 32768; use int8"):
        PackedModel.from_tensors(wide, BitNetSpec(placement="none", gain="ones"), [], "int4")


@pytest.fixture(scope="module")
def packed() -> PackedModel:
    """Grouped heads, norms everywhere, an int8 head."""
    return PackedModel.from_model(random_model(ARCHITECTURES["qwen3"], "per_projection"))


@pytest.fixture(scope="module", params=["f16", "int8", "f32"])
def expected(packed: PackedModel, request: pytest.FixtureRequest) -> tuple[NativeOptions, NDArray[np.float32]]:
    """Options, and logits of 90 tokens in chunks of 40 on one thread."""
    options = replace(OPTIONS, cache=request.param)
    return options, NativeModel(packed, options).logits(tokens(90, 131))


@pytest.mark.parametrize("chunk", [1, 3, 17, 40])
@pytest.mark.parametrize("isa", isa_names())
def test_no_bit_depends_on_chunks(
    packed: PackedModel, expected: tuple[NativeOptions, NDArray[np.float32]], chunk: int, isa: str
) -> None:
    model = NativeModel(packed, replace(expected[0], isa=isa))
    found = model.logits(tokens(90, 131), chunk=chunk)
    if isa == "plain":  # has no fused multiply-add: its own last bits, but still the same for all chunks
        assert (found == model.logits(tokens(90, 131), chunk=29, slot=1)).all()
        assert np.median(relative_error(found, expected[1])) < 1e-2
    else:
        assert (found == expected[1]).all()


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_no_bit_depends_on_threads(
    packed: PackedModel, expected: tuple[NativeOptions, NDArray[np.float32]], threads: int
) -> None:
    model = NativeModel(packed, replace(expected[0], threads=threads))
    for chunk in (1, 40):
        assert (model.logits(tokens(90, 131), chunk=chunk) == expected[1]).all()


def test_no_bit_depends_on_the_other_sequences(
    packed: PackedModel, expected: tuple[NativeOptions, NDArray[np.float32]]
) -> None:
    options, alone = expected
    ids = [tokens(90, 131), tokens(90, 131, seed=1), tokens(90, 131, seed=2)]
    wanted = [alone, *(NativeModel(packed, options).logits(row) for row in ids[1:])]
    model = NativeModel(packed, options)
    schedule = np.random.default_rng(5)
    done = [0, 0, 0]
    while min(done) < 90:
        step: list[tuple[int, int]] = []
        for slot in schedule.permutation(3):
            count = min(int(schedule.integers(0, 14)), 90 - done[slot])
            step += [(int(slot), done[slot] + index) for index in range(count)]
            done[slot] += count
        if not step:
            continue
        rows = [index for index in range(len(step)) if schedule.random() < 0.5]
        slots, positions = zip(*step, strict=True)
        found = model.step([ids[slot][position] for slot, position in step], slots, positions, rows)
        for row, logits in zip(rows, found, strict=True):
            slot, position = step[row]
            assert (logits == wanted[slot][position]).all()


def test_going_back_forgets(packed: PackedModel, expected: tuple[NativeOptions, NDArray[np.float32]]) -> None:
    model = NativeModel(packed, expected[0])
    model.logits([*tokens(50, 131), *tokens(30, 131, seed=9)])
    again = model.step(tokens(90, 131)[50:], [0] * 40, range(50, 90), range(40))
    assert (again == expected[1][50:]).all()


def test_a_copied_prefix_is_the_prefix(
    packed: PackedModel, expected: tuple[NativeOptions, NDArray[np.float32]]
) -> None:
    model = NativeModel(packed, expected[0])
    model.logits(tokens(90, 131))
    model.logits(tokens(20, 131, seed=3), slot=2)
    model.copy_prefix(0, 2, 61)
    assert (model.step(tokens(90, 131)[61:], [2] * 29, range(61, 90), range(29)) == expected[1][61:]).all()
    for arguments in [(0, 3, 1), (-1, 0, 1), (0, 1, 91), (0, 1, -1)]:
        with pytest.raises(EngineError, match="refused to copy a prefix"):
            model.copy_prefix(*arguments)


@pytest.mark.parametrize(
    ("ids", "slots", "positions", "wanted", "problem"),
    [
        ([], [], [], [], "number of tokens"),
        ([1] * 41, [0] * 41, range(41), [], "number of tokens"),
        ([1], [0], [0], [1], "number of tokens"),
        ([131], [0], [0], [0], "token id"),
        ([-1], [0], [0], [0], "token id"),
        ([1], [3], [0], [0], "slot"),
        ([1], [0], [1], [0], "position"),
        ([1], [0], [96], [0], "position"),
        ([1, 1], [0, 0], [0, 2], [0], "position"),
        ([1, 1], [0, 0], [0, 0], [0], "position"),
    ],
)
def test_a_wrong_step_is_refused_and_changes_nothing(
    packed: PackedModel, ids: list[int], slots: list[int], positions: list[int], wanted: list[int], problem: str
) -> None:
    model = NativeModel(packed, OPTIONS)
    before = model.logits(tokens(5, 131), slot=1)
    with pytest.raises(EngineError, match=f"refused a step: {problem} out of range"):
        model.step(ids, slots, positions, wanted)
    assert (model.step(tokens(5, 131)[4:], [1], [4], [0])[0] == before[4]).all()


def test_lengths_must_agree_and_a_closed_model_says_so(packed: PackedModel) -> None:
    model = NativeModel(packed, OPTIONS)
    with pytest.raises(EngineError, match="2 tokens, 1 slots and 2 positions"):
        model.step([1, 2], [0], [0, 1], [])
    model.close()
    model.close()
    with pytest.raises(EngineError, match="the model was closed"):
        model.logits([1])


def test_a_sequence_that_is_not_a_number_stays_alone() -> None:
    packed = PackedModel.from_model(random_model(LLAMA, "output"))
    assert packed.embedding is not None
    packed.embedding[7] = float("nan")
    native = NativeModel(packed, OPTIONS)
    ids = [token if token != 7 else 8 for token in tokens(20, 131)]
    alone = native.logits(ids, slot=0)
    step = native.step([7, *ids], [1] + [2] * 20, [0, *range(20)], range(21))
    assert np.isnan(step[0]).all()
    assert (step[1:] == alone).all()
    assert (native.logits(ids, slot=1) == alone).all(), "what a slot held before is forgotten"


def test_the_embedding_keeps_every_bit() -> None:
    model = random_model(LLAMA, "output")
    stored = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.to(dtype))
        embedding = PackedModel.from_model(model).embedding
        assert embedding is not None
        stored[dtype] = embedding.dtype
        native = NativeModel(PackedModel.from_model(model, "f32"), OPTIONS)
        assert np.median(relative_error(native.logits([3, 5, 7]), reference(model, [3, 5, 7]))) < 1e-5
    assert stored[torch.float32] == np.float32
    assert {stored[torch.bfloat16], stored[torch.float16]} <= {np.dtype(np.float16), np.dtype(np.uint16)}


def test_names_and_shapes_are_those_of_the_pytorch_model() -> None:
    from wrinklefree.serving.engine.native.model import parameter_shapes

    for architecture in ARCHITECTURES.values():
        for placement in PLACEMENTS:
            model = random_model(architecture, placement)
            assert model.bitnet is not None
            expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            assert parameter_shapes(architecture, model.bitnet) == expected


def test_every_tensor_is_accounted_for() -> None:
    model = random_model(LLAMA, "output")
    assert model.bitnet is not None
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    lacking = [(name, tensor) for name, tensor in named.items() if "layers.1.mlp.up" not in name]
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors \(first: model.layers.1.mlp.up_proj.weight\)"):
        PackedModel.from_tensors(LLAMA, model.bitnet, lacking)
    with pytest.raises(CheckpointError, match=r"other.weight of shape \[3\] is not part of this model"):
        PackedModel.from_tensors(LLAMA, model.bitnet, [*named.items(), ("other.weight", torch.zeros(3))])
    with pytest.raises(CheckpointError, match=r"model.norm.weight of shape \[3\] is not"):
        PackedModel.from_tensors(LLAMA, model.bitnet, [("model.norm.weight", torch.zeros(3))])


def test_weights_that_are_not_finite_are_refused() -> None:
    model = random_model(LLAMA, "output")
    with torch.no_grad():
        model.blocks[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight holds values that are not finite"):
        PackedModel.from_model(model)


def test_a_full_precision_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="full precision and the CPU engine runs ternary ones"):
        PackedModel.from_model(CausalLM(LLAMA))


def test_too_wide_a_model_is_refused() -> None:
    wide = LLAMA.model_copy(update={"intermediate_size": 131073})
    with pytest.raises(ConfigError, match="131073 dimensions, the CPU engine runs up to 131072"):
        PackedModel.from_tensors(wide, BitNetSpec(placement="none", gain="ones"), [])


def test_memory_that_cannot_be_had(packed: PackedModel) -> None:
    with pytest.raises(EngineError, match="could not take the model with 16777216 slots"):
        NativeModel(packed, replace(OPTIONS, slots=1 << 24, context_length=4096))


def test_weights_take_two_bits(packed: PackedModel) -> None:
    weights = sum(linear.rows * linear.columns for linear in packed.linears.values())
    tiles = sum(linear.tiles.nbytes for linear in packed.linears.values())
    assert weights / 4 <= tiles < weights / 4 * 1.5  # small rows are padded to 64
    assert packed.nbytes > tiles


def test_small_projections_lie_in_the_order_of_a_step(packed: PackedModel) -> None:
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    layers = range(packed.architecture.num_hidden_layers)
    tiles = [packed.linears[f"model.layers.{layer}.{name}"].tiles for layer in layers for name in names]
    starts = [array.ctypes.data for array in tiles]
    ends = [start + array.nbytes for start, array in zip(starts, tiles, strict=True)]
    assert starts[1:] == ends[:-1]
