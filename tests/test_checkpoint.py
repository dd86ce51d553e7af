"""What is written comes back bit for bit, damage is found, and a stranger's .metadata runs nothing."""

import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import checkpoint as files


@pytest.fixture
def state(device):
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (1,))
    return {
        "plain": torch.randn(700, 1000),
        "sharded": distribute_tensor(torch.randn(33, 5), mesh, [Shard(0)]),
        "transposed": torch.randn(6, 4).T,
        "view": torch.randn(10, 4)[3:5],
        "half": torch.randn(9).bfloat16(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
    }


@pytest.fixture
def written(tmp_path, state):
    return files.write_tensors(tmp_path, state)


def metadata(folder, change):
    """Has `change` at the content of .metadata."""
    content = pickle.loads((folder / ".metadata").read_bytes())
    change(content)
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def test_comes_back_in_place(tmp_path, state, written):
    there = {name: torch.zeros_like(t) for name, t in state.items()}
    same = dict(there)
    files.read_tensors(tmp_path, there)
    for name, t in state.items():
        assert there[name] is same[name]
        assert torch.equal(*(getattr(x, "_local_tensor", x) for x in (t, there[name]))), name


def test_sizes_and_checksums_are_of_the_files(tmp_path, written):
    assert set(written) == {".metadata", "__0_0.distcp"} == set(os.listdir(tmp_path))
    for name, entry in written.items():
        content = (tmp_path / name).read_bytes()
        assert entry == [len(content), xxhash.xxh3_64_hexdigest(content)]


class Call:
    """Calls `function` when it is unpickled by anybody who allows that."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def named(module, name, argument):
    """A pickle of protocol 4 that calls module.name(argument); name may be a dotted one."""
    text = lambda s: b"\x8c" + bytes([len(s)]) + s.encode()  # noqa: E731
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


@pytest.mark.parametrize(("module", "name"), [
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"),
    ("torch", "os.system"), ("torch.serialization", "os.system"),
    ("torch.distributed.checkpoint", "metadata.os.system"),
    ("torch.serialization", "_get_layout.__globals__"), ("torch", "Size.__class__"), ("torch", "load"),
    ("collections", "OrderedDict"), ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
])  # fmt: skip
def test_a_foreign_name_is_refused(tmp_path, state, written, module, name):
    ran = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(named(module, name, f"touch {ran}"))
    with pytest.raises(ValueError, match=rf"it names {module}\.{name}\)$"):
        files.read_tensors(tmp_path, state)
    assert not ran.exists()


def test_a_call_within_good_metadata_does_not_run(tmp_path, state, written):
    ran = tmp_path / "ran"
    metadata(tmp_path, lambda m: setattr(m, "planner_data", Call(os.system, f"touch {ran}")))
    with pytest.raises(ValueError, match=r"names (posix|nt|os)\.system"):
        files.read_tensors(tmp_path, state)
    assert not ran.exists()
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert ran.exists()  # so the test can fail


def test_a_call_in_the_data_does_not_run(tmp_path, state, written):
    ran = tmp_path / "ran"
    torch.save(Call(os.system, f"touch {ran}"), tmp_path / "__0_0.distcp")

    def point_there(m):
        for shard in m.storage_data.values():
            shard.offset, shard.length = 0, (tmp_path / "__0_0.distcp").stat().st_size

    metadata(tmp_path, point_there)
    with pytest.raises(dcp.CheckpointException, match="weights_only"):
        files.read_tensors(tmp_path, state)
    assert not ran.exists()


def test_an_object_in_place_of_a_tensor_is_refused(tmp_path, state, written):
    metadata(tmp_path, lambda m: m.state_dict_metadata.update(plain=BytesStorageMetadata()))
    with pytest.raises(ValueError, match="BytesStorageMetadata"):
        files.read_tensors(tmp_path, state)


@pytest.mark.parametrize("path", ["../../x", "/etc/passwd", "..", "", "a/__0_0.distcp", "gone", 3])
def test_a_path_elsewhere_is_refused(tmp_path, state, written, path):
    metadata(tmp_path, lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", path))
    with pytest.raises(ValueError, match=r"\.metadata refers to .*, which is not beside it"):
        files.read_tensors(tmp_path, state)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04", b"nonsense", pickle.dumps(None), pickle.dumps({"a": 1})]
)
def test_a_damaged_metadata_is_one_line(tmp_path, state, written, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="is not the description of tensors") as error:
        files.read_tensors(tmp_path, state)
    assert "\n" not in str(error.value)


def test_another_model(tmp_path, state, written):
    for other in ({"more": torch.zeros(1)}, {"plain": torch.zeros(3, 3)}):
        with pytest.raises(dcp.CheckpointException):
            files.read_tensors(tmp_path, other)
