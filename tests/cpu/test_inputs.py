"""Tensors from files: every accepted form, nothing executed, clear refusals."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from lowbit_attention import InvalidArgumentError
from lowbit_attention.evaluation.inputs import from_file

Q, K, V = (torch.arange(24.0).reshape(1, 2, 3, 4) + n for n in range(3))


@pytest.mark.parametrize(
    "content",
    [
        {"q": Q, "k": K, "v": V},
        {"query": Q, "key": K, "value": V},
        (Q, K, V),
        [Q, K, V],
        {"q": Q[0], "k": K[0], "v": V[0]},
    ],
    ids=["short names", "long names", "tuple", "list", "three dimensions"],
)
def test_pt_files(tmp_path, content):
    torch.save(content, tmp_path / "qkv.pt")
    (one,) = from_file(tmp_path / "qkv.pt")
    assert one.name == "qkv"
    for got, wanted in zip((one.q, one.k, one.v), (Q, K, V), strict=True):
        assert torch.equal(got, wanted)


def test_nhd_files_are_transposed(tmp_path):
    save_file(
        {n: t.transpose(1, 2).contiguous() for n, t in zip("qkv", (Q, K, V), strict=True)}, tmp_path / "a.safetensors"
    )
    (one,) = from_file(tmp_path / "a.safetensors", "NHD")
    assert torch.equal(one.k, K)


def test_several_sets_in_one_file(tmp_path):
    save_file({f"block.{n}.{r}": Q + n for n in range(3) for r in "qkv"}, tmp_path / "a.safetensors")
    sets = from_file(tmp_path / "a.safetensors")
    assert sorted(s.name for s in sets) == ["block.0", "block.1", "block.2"]


class _Boom:
    def __reduce__(self):
        return (pytest.fail, ("the file's code was executed",))


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("a.pt", lambda p: torch.save({"q": Q, "k": K}, p), "has only k, q"),
        ("a.pt", lambda p: torch.save({"x": Q}, p), "its tensors are x"),
        ("a.pt", lambda p: torch.save(Q, p), "holds a Tensor"),
        ("a.pt", lambda p: p.write_bytes(b"not a file"), "cannot be read as plain tensors"),
        ("a.pt", lambda p: p.write_bytes(pickle.dumps(_Boom(), protocol=2)), "cannot be read as plain tensors"),
        ("a.pt", lambda p: torch.save({"q": _Boom()}, p), "cannot be read as plain tensors"),
        ("a.safetensors", lambda p: p.write_bytes(b"no"), "no safetensors file"),
        ("a.npz", lambda p: p.write_bytes(b"no"), "readable are"),
    ],
)
def test_bad_files_get_one_clear_line_and_nothing_runs(tmp_path, name, write, words):
    write(tmp_path / name)
    with pytest.raises(InvalidArgumentError, match=words) as error:
        from_file(tmp_path / name)
    assert "\n" not in str(error.value)
