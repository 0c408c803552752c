"""`install_as_sageattention`: consumers' checks find us, nothing real is hidden unasked, and it can be taken back."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
from packaging.version import parse

from lowbit_attention import (
    EmulationRefusedError,
    InvalidArgumentError,
    InvalidRecipeError,
    LowbitError,
    UnsupportedError,
    attention,
)
from lowbit_attention.compat import install_as_sageattention
from lowbit_attention.compat import sageattention as functions


@pytest.fixture(autouse=True)
def nothing_is_left():
    before, finders = set(sys.modules), list(sys.meta_path)
    yield
    assert sys.meta_path == finders
    assert not {name for name in set(sys.modules) - before if name.startswith("sageattention")}


def absent():
    with pytest.raises(ImportError):
        importlib.import_module("sageattention")
    assert importlib.util.find_spec("sageattention") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("sageattention")


def test_nobody_is_aliased_unasked():
    absent()


def test_imports():
    with install_as_sageattention():
        import sageattention
        from sageattention import sageattn_varlen
        from sageattention.core import sageattn_qk_int8_pv_fp8_cuda as fp8

        assert sageattn_varlen is functions.sageattn_varlen
        assert fp8 is functions.sageattn_qk_int8_pv_fp8_cuda
        assert set(functions.__all__) <= set(dir(sageattention))
        q = torch.randn(1, 2, 9, 8)
        assert torch.equal(sageattention.sageattn(q, q, q), attention(q, q, q))
    absent()


def test_what_consumers_import_from_inside():
    """Before their first call they look at the card, at flags, at quantisers and at where the package lies."""
    with install_as_sageattention():
        import sageattention
        from sageattention import core, quant
        from sageattention.core import (  # noqa: F401
            SM80_ENABLED,
            SM89_ENABLED,
            SM90_ENABLED,
            attn_false,
            get_cuda_arch_versions,
            per_block_int8_cuda,
            per_block_int8_triton,
            per_channel_fp8,
            per_thread_int8_triton,
            per_warp_int8_cuda,
            sub_mean,
        )
        from sageattention.quant import per_block_int8, per_warp_int8

        assert SM80_ENABLED is SM89_ENABLED is SM90_ENABLED is True
        assert (per_warp_int8, per_block_int8) == (core.per_warp_int8_cuda, core.per_block_int8_triton)
        assert [archs for archs in get_cuda_arch_versions() if not archs.startswith("sm")] == []
        for module in (sageattention, core, quant):
            assert Path(module.__file__).is_file()
            assert module.__file__ == importlib.util.find_spec(module.__name__).origin
            assert set(module.__all__) <= set(dir(module))
        with pytest.raises(ImportError):
            importlib.import_module("sageattention._qattn_sm89")  # (compiled: not here, and not pretended)
        with pytest.raises(UnsupportedError, match="sageattn_qk_int8_pv_fp16_triton"):
            attn_false(None, None, None, None, None)
    absent()


def test_consumers_checks():
    """As diffusers and transformers ask: find_spec before and after an import, the version, the package map."""
    with install_as_sageattention():
        for _ in range(2):
            assert importlib.util.find_spec("sageattention") is not None
            version = importlib.metadata.version("sageattention")
            assert parse("2.1.1") <= parse(version) < parse("3")
            importlib.import_module("sageattention")
        assert importlib.metadata.packages_distributions()["sageattention"] == ["sageattention"]
        assert importlib.metadata.metadata("sageattention")["Name"] == "sageattention"
        assert importlib.metadata.version("torch").startswith(torch.__version__.split("+")[0])  # others are unharmed
        assert sys.modules["sageattention"].__version__ == version
        assert importlib.reload(sys.modules["sageattention"]).sageattn is not None


def test_the_recipe_of_sageattn():
    q = torch.randn(1, 2, 9, 8)
    with install_as_sageattention("sage2_8b"):
        from sageattention import sageattn

        assert torch.equal(sageattn(q, q, q), attention(q, q, q, recipe="sage2_8b"))
    with pytest.raises(InvalidRecipeError, match="sage9"):
        install_as_sageattention("sage9")


def test_the_default_of_on_emulation():
    q = torch.randn(1, 2, 9, 8)
    with install_as_sageattention(on_emulation="error"):
        from sageattention import sageattn, sageattn_qk_int8_pv_fp16_cuda
        from sageattention.core import sageattn_qk_int8_pv_fp16_cuda as again

        assert again is sageattn_qk_int8_pv_fp16_cuda
        assert inspect.signature(again) == inspect.signature(functions.sageattn_qk_int8_pv_fp16_cuda)
        assert sageattn(q, q, q).shape == q.shape
        with pytest.raises(EmulationRefusedError):
            again(q, q, q)
        assert again(q, q, q, on_emulation="allow").shape == q.shape
    with pytest.raises(InvalidArgumentError, match="on_emulation='loud' is not one of"):
        install_as_sageattention(on_emulation="loud")


def test_remove_twice_and_install_twice():
    alias = install_as_sageattention()
    with pytest.raises(LowbitError, match="already"):
        install_as_sageattention()
    alias.remove()
    alias.remove()
    with install_as_sageattention():
        assert importlib.import_module("sageattention")
    absent()


@pytest.mark.parametrize("imported", [False, True])
def test_a_real_one_is_not_hidden_unless_forced(tmp_path, monkeypatch, imported):
    package = tmp_path / "sageattention"
    package.mkdir()
    (package / "__init__.py").write_text("real = True\n")
    meta = tmp_path / "sageattention-1.0.6.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: sageattention\nVersion: 1.0.6\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    real = importlib.import_module("sageattention") if imported else None
    with pytest.raises(LowbitError, match=str(tmp_path)):
        install_as_sageattention()
    assert importlib.metadata.version("sageattention") == "1.0.6"
    with install_as_sageattention(force=True):
        assert importlib.import_module("sageattention").__version__ == importlib.metadata.version("sageattention")
        assert importlib.metadata.version("sageattention").startswith("2.")
    assert importlib.metadata.version("sageattention") == "1.0.6"
    again = importlib.import_module("sageattention")
    assert again.real
    assert real is None or again is real
    sys.modules.pop("sageattention")


def test_a_module_of_that_name_made_by_hand(monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", types.ModuleType("sageattention"))
    with pytest.raises(LowbitError, match="imported already"):
        install_as_sageattention()
