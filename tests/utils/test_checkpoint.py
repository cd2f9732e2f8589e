import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from wrinklefree.utils.checkpoint import (
    CheckpointStore,
    pack_optimizer_state,
    restore_rng_state,
    rng_state,
    unpack_optimizer_state,
    verify_manifest,
    write_manifest,
    write_tensors,
)
from wrinklefree.utils.errors import CheckpointError, StorageError
from wrinklefree.utils.manifest import commit_folder
from wrinklefree.utils.storage import temporary_folder
from wrinklefree.utils.training_state import pack, unpack

# A child is forked and only writes small files there; it never starts threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

CRASHED = 9
WRAPPED = ("open", "write", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "symlink", "link", "ftruncate")


def contents(step: int) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.arange(64, dtype=torch.float32).reshape(8, 8) + step,
        "half": torch.full((3,), step / 7, dtype=torch.bfloat16),
        "count": torch.tensor(step),
    }


def save_step(store: CheckpointStore, step: int) -> Path:
    return store.save(step, contents(step), {"step": step, "rate": step / 3})


def assert_is_step(store: CheckpointStore, step: int) -> None:
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.step == step
    assert checkpoint.state == {"step": step, "rate": step / 3}
    expected = contents(step)
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor)


def in_child(action: Callable[[], object], before_exit: Callable[[], None] = lambda: None) -> int:
    """Exit code of `action` in a forked process: 0, the wrapper's, or 1 for an exception."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            before_exit()
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(call: int) -> None:
    """Make this process vanish at the given file operation; a write is torn in half first."""
    seen = 0

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            nonlocal seen
            if seen == call:
                if name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os._exit(CRASHED)
            seen += 1
            return real(*arguments, **keywords)

        setattr(os, name, wrapped)

    for name in WRAPPED:
        wrap(name)


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_crash_at_any_file_operation_leaves_the_old_or_the_new_state(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    template = tmp_path / "template"
    for step in (1, 2):
        save_step(CheckpointStore(template, 2), step)
    outcomes: list[int] = []
    code, call = CRASHED, 0
    while code == CRASHED:
        folder = tmp_path / "run"
        shutil.copytree(template, folder)
        code = in_child(lambda: save_step(CheckpointStore(folder, 2), 3), lambda: die_at(call))  # noqa: B023
        assert code in (0, CRASHED)
        complaints: list[object] = []
        store = CheckpointStore(folder, 2, on_corrupt=complaints.append)
        store.clean()
        newest = store.latest()
        assert newest is not None
        outcomes.append(newest.step)
        assert_is_step(store, newest.step)
        assert complaints == []
        left = sorted(path.name for path in folder.iterdir())
        assert not [name for name in names_below(folder) if ".tmp-" in name]
        assert len(left) >= 2
        for name in left:
            verify_manifest(folder / name)
        save_step(store, 4)
        assert_is_step(CheckpointStore(folder, 2), 4)
        shutil.rmtree(folder)
        call += 1
    # Enough points to mean something; first all old, then all new: the commit is one instant.
    assert len(outcomes) > 30
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {2, 3}
    assert outcomes[-1] == 3
    record_property("crash_points", len(outcomes) - 1)


def test_everything_is_flushed_before_the_rename_and_old_ones_go_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "run", 2)
    for step in (1, 2):
        save_step(store, step)
    trace: list[tuple[str, str]] = []
    paths: dict[int, str] = {}
    real_open, real_fsync, real_replace, real_unlink = os.open, os.fsync, os.replace, os.unlink

    def traced_open(path: Any, *arguments: Any, **keywords: Any) -> int:
        descriptor = real_open(path, *arguments, **keywords)
        paths[descriptor] = Path(os.fspath(path)).name.split(".tmp-")[0] + ("*" if ".tmp-" in str(path) else "")
        return descriptor

    def traced_fsync(descriptor: int) -> None:
        trace.append(("fsync", paths[descriptor]))
        real_fsync(descriptor)

    def traced_replace(source: Any, target: Any, **keywords: Any) -> None:
        trace.append(("rename", Path(target).name))
        real_replace(source, target, **keywords)

    def traced_unlink(path: Any, **keywords: Any) -> None:
        trace.append(("unlink", Path(path).name))
        real_unlink(path, **keywords)

    monkeypatch.setattr(os, "open", traced_open)
    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    monkeypatch.setattr(os, "unlink", traced_unlink)
    save_step(store, 3)
    commit = trace.index(("rename", "step_00000003"))
    before, after = trace[:commit], trace[commit + 1 :]
    tensors, state, manifest = (
        before.index(("fsync", name)) for name in ("tensors.safetensors*", "state.json*", "manifest.json*")
    )
    assert max(tensors, state) < manifest < before.index(("rename", "manifest.json"))
    assert before[-1] == ("fsync", "step_00000003*")
    assert after[0] == ("fsync", "run")
    # Of the pruned checkpoint, the manifest goes first and durably.
    assert after[1:3] == [("unlink", "manifest.json"), ("fsync", "step_00000001")]


def test_prunes_to_keep_last_n_and_never_below_two(tmp_path: Path) -> None:
    for keep, left in ((1, [4, 5]), (3, [3, 4, 5])):
        store = CheckpointStore(tmp_path / str(keep), keep)
        for step in range(1, 6):
            save_step(store, step)
        assert sorted(path.name for path in store.folder.iterdir()) == [f"step_{step:08d}" for step in left]


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "never", 2)
    assert store.latest() is None
    assert store.clean() == []


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def corruptions(pristine: Path, older: str, newest: str) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """300 ways to damage the newest of two checkpoints in a copy of `pristine`: kind, and what does it."""
    generator = random.Random(0)
    files = ["tensors.safetensors", "state.json", "manifest.json"]
    sizes = {name: (pristine / newest / name).stat().st_size for name in files}

    def another(name: str) -> Path:
        return pristine / older / name

    for number in range(200):
        name = files[number % 3]
        position, bit = generator.randrange(sizes[name]), generator.randrange(8)
        yield "bit flipped", lambda run, name=name, at=position, bit=bit: flip(run / newest / name, at, bit)
    for number in range(50):
        name = files[number % 3]
        length = generator.randrange(sizes[name])
        yield "truncated", lambda run, name=name, length=length: os.truncate(run / newest / name, length)
    for number in range(20):
        name = files[number % 3]
        page = min(64, sizes[name] // 2)
        start = generator.randrange(sizes[name] - page)
        yield "page zeroed", lambda run, name=name, at=start, page=page: zero(run / newest / name, at, page)
    for number in range(9):
        name = files[number % 3]
        yield "file deleted", lambda run, name=name: (run / newest / name).unlink()
    yield "file added", lambda run: (run / newest / "extra.bin").write_bytes(b"x")
    for number in range(10):
        # Another step's file in this one's place: each is sound by itself.
        name = files[number % 2]
        yield "file of another step", lambda run, name=name: shutil.copy(another(name), run / newest / name)
    for number in range(10):
        name = files[number % 2]

        def stale(run: Path, name: str = name) -> None:
            """The manifest of the step before, beside one of its files."""
            shutil.copy(another("manifest.json"), run / newest / "manifest.json")
            shutil.copy(another(name), run / newest / name)

        yield "manifest of another step", stale


def zero(path: Path, start: int, size: int) -> None:
    content = bytearray(path.read_bytes())
    assert any(content[start : start + size])
    content[start : start + size] = bytes(size)
    path.write_bytes(content)


def read_silently(file: Path) -> bool:
    """Whether the plain loader of tensor files takes a damaged one without a word."""
    try:
        load_file(file)
    except SafetensorError:
        return False
    return True


def test_every_corruption_is_found_and_the_one_before_is_used(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    pristine = tmp_path / "pristine"
    for step in (1, 2):
        save_step(CheckpointStore(pristine, 2), step)
    older, newest = "step_00000001", "step_00000002"
    found: list[str] = []
    plain = [0, 0]
    for kind, corrupt in corruptions(pristine, older, newest):
        run = tmp_path / "case"
        shutil.copytree(pristine, run)
        corrupt(run)
        tensors = run / newest / "tensors.safetensors"
        if kind == "bit flipped" and tensors.read_bytes() != (pristine / newest / "tensors.safetensors").read_bytes():
            plain[0] += 1
            plain[1] += read_silently(tensors)
        reports: list[Any] = []
        store = CheckpointStore(run, 2, on_corrupt=reports.append)
        store.clean()
        assert_is_step(store, 1)
        assert [list(report) for report in reports] == [[newest]], kind
        found.append(kind)
        shutil.rmtree(run)
    assert len(found) == 300
    # Most of a tensor file is data, whose bits no loader looks at: the manifest is not there for show.
    assert plain[1] > plain[0] / 2
    record_property("corruptions", len(found))
    record_property("corruptions_loaded_silently", 300 - len(found))
    record_property("bit_flips_in_tensor_files", plain[0])
    record_property("bit_flips_that_a_plain_loader_misses", plain[1])


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    save_step(store, 1)
    save_step(store, 2).rename(tmp_path / "step_00000009")
    assert_is_step(store, 1)


def test_falling_back_is_loud_and_saving_on_replaces_the_corrupt_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, 2)
    save_step(store, 1)
    flip(save_step(store, 2) / "tensors.safetensors", 300, 0)
    assert_is_step(store, 1)
    assert "CORRUPT CHECKPOINT" in caplog.text
    assert "tensors.safetensors is corrupt: its SHA-256 is" in caplog.text
    assert save_step(store, 2).name == "step_00000002_r1"
    assert_is_step(CheckpointStore(tmp_path, 2), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002_r1"]


def test_all_corrupt_is_an_error_that_names_them_and_never_a_fresh_start(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    for step in (1, 2):
        (save_step(store, step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError) as raised:
        store.latest()
    message = str(raised.value)
    assert message.startswith(f"all 2 checkpoints in {tmp_path} are corrupt")
    assert "step_00000001/state.json has 2 bytes" in message
    assert "step_00000002/state.json has 2 bytes" in message
    assert "skip_recovery=true" in message
    assert "\n" not in message


def test_a_newest_checkpoint_without_manifest_is_reported_not_swept(tmp_path: Path) -> None:
    reports: list[Any] = []
    store = CheckpointStore(tmp_path, 2, on_corrupt=reports.append)
    save_step(store, 1)
    (save_step(store, 2) / "manifest.json").unlink()
    store.clean()
    assert_is_step(store, 1)
    assert "manifest.json is missing" in reports[0]["step_00000002"]


def test_clear_removes_all(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    for step in (1, 2):
        save_step(store, step)
    store.clear()
    assert list(tmp_path.iterdir()) == []
    assert store.latest() is None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_a_disk_that_fills_up_on_the_way_keeps_the_last_good_one(
    tmp_path: Path, share: float, record_property: Callable[[str, object], None]
) -> None:
    store = CheckpointStore(tmp_path, 2)
    save_step(store, 1)
    big = {"weight": torch.zeros(100_000)}
    message = tmp_path.parent / "message.txt"
    descriptor = os.open(message, os.O_WRONLY | os.O_CREAT)

    def action() -> None:
        try:
            store.save(2, big, {})
        except StorageError as error:
            # The message was opened before the limit and stays far below it, except for the limit of 0 bytes.
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            os.write(descriptor, str(error).encode())

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(400_000 * share), resource.RLIM_INFINITY))

    assert in_child(action, limit) == 0
    os.close(descriptor)
    text = message.read_text()
    assert text.startswith(f"no space to write {tmp_path}")
    assert "400.0 kB needed" in text
    assert "free" in text
    assert names_below(tmp_path) == [
        "step_00000001",
        "step_00000001/manifest.json",
        "step_00000001/state.json",
        "step_00000001/tensors.safetensors",
    ]
    assert_is_step(store, 1)
    record_property("disk_full_points", 1)


def test_too_little_space_is_refused_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4_799_000))
    with pytest.raises(StorageError, match=r"4\.8 MB needed, 4\.8 MB free"):
        store.save(1, {"weight": torch.zeros(1_000_000)}, {})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4_801_000))
    store.save(1, {"weight": torch.zeros(1_000_000)}, {})


def test_an_interrupt_while_saving_leaves_no_partial_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, 2)
    save_step(store, 1)
    real = os.fsync

    def interrupted(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_step(store, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_integer_keys_in_the_state_are_a_defect_not_a_silent_string(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\.worker: key 3 is not a string"):
        CheckpointStore(tmp_path, 2).save(1, {}, {"worker": {3: "x"}})


def test_tensor_files_are_what_the_library_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "double": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "single": torch.randn(7, generator=generator),
        "strided": torch.randn(4, 6, generator=generator).T,
        "half": torch.randn(3, generator=generator).half(),
        "brain": torch.randn(5, generator=generator).bfloat16(),
        "nonfinite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "eight": torch.randn(9, generator=generator).to(torch.float8_e4m3fn),
        "long": torch.tensor(2**62 + 1),
        "byte": torch.arange(256, dtype=torch.uint8)[::3],
        "bool": torch.tensor([[True], [False]]),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "tensors.safetensors"
    digest = write_tensors(path, tensors)
    write_manifest(tmp_path, {}, digests={path.name: digest})
    verify_manifest(tmp_path)
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        raw = [item.detach().contiguous().reshape(-1).view(torch.uint8) for item in (loaded[name], tensor)]
        assert torch.equal(raw[0], raw[1]), name


def test_an_unlisted_or_nested_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "shard.bin").write_bytes(b"123")
    manifest = write_manifest(tmp_path, {"stage": "stage2"})
    assert manifest["files"]["inner/shard.bin"]["size"] == 3
    assert verify_manifest(tmp_path)["stage"] == "stage2"
    (tmp_path / "inner" / "more.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"inner/more\.bin is not listed"):
        verify_manifest(tmp_path)


def test_what_the_disk_garbled_while_writing_is_found_by_the_digest_of_what_was_meant(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"garbled")
    write_manifest(tmp_path, {}, digests={"weights": "0" * 64})
    with pytest.raises(CheckpointError, match=r"weights is corrupt: its SHA-256 is [0-9a-f]{16}\.\.\., 0{16}"):
        verify_manifest(tmp_path)


def test_commit_replaces_an_older_folder(tmp_path: Path) -> None:
    final = tmp_path / "artifact"
    for text in ("old", "new"):
        temporary = temporary_folder(final)
        (temporary / "model").write_text(text)
        write_manifest(temporary, {})
        commit_folder(temporary, final)
    assert (final / "model").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


class OddOptimizer(torch.optim.Optimizer):
    """State of every awkward kind, with one tensor shared by all parameters as 8-bit optimizers share their maps."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1, "betas": (0.9, 0.95), "foreach": None, "name": "odd"})
        self.shared = torch.linspace(0, 1, 256)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(count=0, map=self.shared, blocks=[torch.zeros(2), None], nested={"scale": 1.5})
                state["count"] += 1
                state["blocks"][0] += parameter.grad.abs().max()
                parameter.data -= group["lr"] * state["blocks"][0][0] * state["map"][3 * state["count"]]


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "odd": OddOptimizer,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_continues_bit_by_bit_through_a_checkpoint(tmp_path: Path, kind: str) -> None:
    def begin() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(1)
        parameters = [torch.nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(2)]
        return parameters, OPTIMIZERS[kind](parameters)

    def train(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.step()

    whole, optimizer = begin()
    train(whole, optimizer, range(6))

    first, optimizer = begin()
    train(first, optimizer, range(3))
    tensors, state = pack_optimizer_state(optimizer)
    store = CheckpointStore(tmp_path, 2)
    store.save(3, {**tensors, "0": first[0], "1": first[1]}, {"optimizer": state})

    checkpoint = store.latest()
    assert checkpoint is not None
    resumed, optimizer = begin()
    for index, parameter in enumerate(resumed):
        parameter.data.copy_(checkpoint.tensors[str(index)])
    unpack_optimizer_state(optimizer, checkpoint.tensors, checkpoint.state["optimizer"])
    train(resumed, optimizer, range(3, 6))
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one, other)


def test_a_shared_tensor_is_stored_once_and_comes_back_as_one() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = OddOptimizer(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    tensors, state = pack_optimizer_state(optimizer)
    assert sum(tensor.numel() == 256 for tensor in tensors.values()) == 1
    other = OddOptimizer(parameters)
    unpack_optimizer_state(other, tensors, json.loads(json.dumps(state)))
    maps = [other.state[parameter]["map"] for parameter in parameters]
    assert maps[0] is maps[1] is maps[2]
    assert other.state[parameters[0]]["nested"] == {"scale": 1.5}
    assert other.param_groups[0]["betas"] == (0.9, 0.95)


def test_trees_come_back_with_their_kinds_and_keys() -> None:
    tree = {3: [1, (2.5, None, True)], "x": {"deep": (torch.ones(2), float("inf"))}, (1, 2): []}
    tensors, packed = pack(tree, "root")
    assert list(tensors) == ["root/x/deep/0"]
    back = unpack(tensors, json.loads(json.dumps(packed)))
    assert back["x"]["deep"][0] is tensors["root/x/deep/0"]
    assert str(back) == str(tree)
    with pytest.raises(TypeError, match="root/bad: cannot store a set"):
        pack({"bad": {1}}, "root")


def test_the_state_of_another_optimizer_is_refused() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    tensors, state = pack_optimizer_state(torch.optim.AdamW(parameters))
    with pytest.raises(CheckpointError, match="holds the state of AdamW, this run uses SGD"):
        unpack_optimizer_state(torch.optim.SGD(parameters, lr=1.0), tensors, state)
    more = torch.optim.AdamW([*parameters, torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(CheckpointError, match="does not fit this model's parameters"):
        unpack_optimizer_state(more, tensors, state)


def test_a_missing_optimizer_tensor_is_named() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(parameters)
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    tensors, state = pack_optimizer_state(optimizer)
    del tensors["optimizer/state/0/exp_avg"]
    with pytest.raises(CheckpointError, match="lacks the tensor optimizer/state/0/exp_avg"):
        unpack_optimizer_state(optimizer, tensors, state)


def test_random_generators_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        # gauss() and normal() cache a second value: that is part of the state.
        return [random.random(), random.gauss(0, 1), float(numpy.random.normal()), torch.randn(3).tolist()]

    draw()
    tensors, state = rng_state()
    store = CheckpointStore(tmp_path, 2)
    store.save(1, tensors, {"rng": state})
    expected = [draw(), draw()]
    checkpoint = store.latest()
    assert checkpoint is not None
    restore_rng_state(checkpoint.tensors, checkpoint.state["rng"])
    assert [draw(), draw()] == expected


def test_a_tensor_outlives_its_file(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    path = save_step(store, 1) / "tensors.safetensors"
    checkpoint = store.latest()
    assert checkpoint is not None
    weight = checkpoint.tensors["weight"]
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(weight, contents(1)["weight"])
    with pytest.raises(KeyError, match="absent"):
        checkpoint.tensors["absent"]
