"""Models of billions of parameters, cut for eight ranks that do not exist, without memory for more than one rank's part."""

import resource
from pathlib import Path

import pytest
import torch

from benchmark.sharded_equality import ARCHITECTURE, Ranks
from wrinklefree.composition import compose
from wrinklefree.models.config import BitNetSpec
from wrinklefree.models.shards import rows_here

SPEC = BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0, subln_strength=1.0)
WORLD = 8


@pytest.mark.parametrize(("name", "parameters"), [("qwen3_4b", 4_023_000_000), ("llama_7b", 6_738_000_000)])
def test_a_large_model_is_cut_without_being_held(name: str, parameters: int, ranks: Ranks) -> None:
    facts = ranks.run(1, cut_on_meta, name)[0]
    assert facts["parameters"] == pytest.approx(parameters, rel=1e-3)
    # Every matrix divides by eight, so a rank holds an eighth of all.
    assert facts["here"] == pytest.approx(facts["parameters"] / WORLD, rel=1e-6)
    assert facts["groups"] == facts["blocks"] + 1
    assert facts["coded"] == 7 * facts["blocks"]
    assert facts["grown_megabytes"] < 500


def cut_on_meta(name: str) -> dict[str, float]:
    from torch.distributed.fsdp import FSDPModule
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from wrinklefree.models.weights import _empty_model
    from wrinklefree.training.config import DistributedConfig
    from wrinklefree.training.device import Compute
    from wrinklefree.training.fsdp_wrapper import shard, sharding_for

    config, _ = compose([f"model={name}", "training=stage2_pretrain"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=WORLD)
    try:
        model = _empty_model(config.model.architecture, SPEC)
        sharding = sharding_for(
            DistributedConfig(name="test", strategy="fsdp"), Compute(torch.device("cpu"), torch.bfloat16)
        )
        codes = shard(model, sharding)
        assert codes is not None
        parameters = list(model.parameters())
        assert all(parameter.is_meta for parameter in parameters)
        return {
            "parameters": sum(parameter.numel() for parameter in parameters),
            "here": sum(rows_here(parameter).local.numel() for parameter in parameters),
            "groups": sum(isinstance(module, FSDPModule) for module in model.modules()),
            "blocks": len(model.blocks),
            "coded": codes.layers,
            "grown_megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        }
    finally:
        torch.distributed.destroy_process_group()


def test_each_rank_reads_its_rows_of_a_stored_model(tmp_path: Path, ranks: Ranks) -> None:
    """Rank 0's view of the whole, gathered again, is what was stored; and the file was read by rows."""
    whole = ranks.run(1, store, str(tmp_path))[0]
    loaded = ranks.run(2, load_cut, str(tmp_path))
    for name, value in whole.items():
        assert torch.equal(loaded[0]["weights"][name], value)
    assert loaded[0]["weights"].keys() == whole.keys()
    assert [reply["elements"] for reply in loaded] == [sum(value.numel() for value in whole.values()) // 2] * 2
    assert loaded[0]["lambda"] == 0.25


def store(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import save_file

    from wrinklefree.models.llama import CausalLM

    torch.manual_seed(5)
    tensors = {name: p.detach().clone() for name, p in CausalLM(ARCHITECTURE, SPEC).named_parameters()}
    save_file(tensors, Path(folder) / "model.safetensors")
    return tensors


def load_cut(folder: str) -> dict[str, object]:
    from wrinklefree.models.bitlinear import quantization_of
    from wrinklefree.models.weights import assemble, read_rows
    from wrinklefree.training.config import DistributedConfig
    from wrinklefree.training.device import Compute
    from wrinklefree.training.placement import Cutter, collect

    cut = Cutter(DistributedConfig(name="test", strategy="fsdp"), Compute(torch.device("cpu"), torch.float32))
    spec = SPEC.model_copy(update={"quantization_lambda": 0.25})
    model = assemble(ARCHITECTURE, spec, read_rows([Path(folder) / "model.safetensors"]), source="the test", cut=cut)
    elements = sum(rows_here(parameter).local.numel() for parameter in model.parameters())
    gathered = collect(model)
    weights = {} if gathered is None else {name: p.detach() for name, p in gathered.named_parameters()}
    return {"weights": weights, "elements": elements, "lambda": quantization_of(gathered or model)}
