"""Nothing of a test stays in diffusers: its list of backends, its methods and its default are as they were."""

import importlib.util

import pytest
import torch.nn.functional as F

collect_ignore = ["rank.py"]  # (a program: test_parallel.py runs it)
collect_ignore_glob = [] if importlib.util.find_spec("diffusers") else ["test_*.py", "t*.py", "r*.py"]

if not collect_ignore_glob:
    import diffusers
    from diffusers.models import attention_dispatch as library
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.modeling_utils import ModelMixin

    from lowbit_attention.integrations import diffusers as ours

    diffusers.utils.logging.set_verbosity_error()


def _as_it_is():
    registry, names = library._AttentionBackendRegistry, library.AttentionBackendName
    return {
        "names": list(names),
        "values": dict(names._value2member_map_),
        "attributes": sorted(name for name in dir(names) if name.startswith("LOWBIT")),
        "backends": dict(registry._backends),
        "constraints": dict(registry._constraints),
        "arguments": dict(registry._supported_arg_names),
        "parallel": set(registry._supports_context_parallel),
        "active": registry._active_backend,
        "methods": [
            registry.__dict__["set_active_backend"],
            ModelMixin.set_attention_backend,
            ModelMixin.reset_attention_backend,
            AttentionModuleMixin.set_attention_backend,
        ],
        "sdpa": F.scaled_dot_product_attention,
    }


@pytest.fixture(autouse=True)
def undone():
    """Whatever the test registers is gone after it."""
    before = _as_it_is()
    yield
    ours.unregister()
    library._AttentionBackendRegistry.set_active_backend(before["active"])
    assert _as_it_is() == before
