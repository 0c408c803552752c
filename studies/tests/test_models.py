"""The two models: shapes, causality, what the flow learns, weights in 16 bits."""

import pytest
import torch

from lowbit_attention import InvalidArgumentError
from lowbit_studies.subjects import rope, weights
from lowbit_studies.subjects.diffusion import DiffusionConfig, DiffusionTransformer, flow_loss, noise_of, sample
from lowbit_studies.subjects.language import LanguageConfig, LanguageModel, score

SMALL_LM = LanguageConfig(dim=64, heads=1, layers=2, hidden=64)
SMALL_DIT = DiffusionConfig(size=16, dim=64, heads=1, layers=2, hidden=64, classes=3)
PARAMETERS_IN_10_MB = 5_000_000


@pytest.fixture
def lm():
    torch.manual_seed(0)
    return LanguageModel(SMALL_LM).eval()


@pytest.fixture
def dit():
    torch.manual_seed(0)
    model = DiffusionTransformer(SMALL_DIT).eval()
    for parameter in model.parameters():  # it starts as a constant: make it depend on everything
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("model", "tokens"), [(LanguageModel(), 2048), (DiffusionTransformer(), 1024)])
def test_the_default_sizes_fit_and_are_what_was_asked_for(model, tokens):
    assert sum(p.numel() for p in model.parameters()) < PARAMETERS_IN_10_MB
    assert model.config.head_dim == 64
    assert model.config.layers >= 8
    if isinstance(model, DiffusionTransformer):
        assert model.config.side**2 == tokens


def test_the_language_model_sees_no_later_byte(lm):
    text = torch.randint(256, (1, 40))
    changed = text.clone()
    changed[0, 25] = (changed[0, 25] + 1) % 256
    a, b = lm(text), lm(changed)
    assert torch.equal(a[:, :25], b[:, :25])
    assert not torch.allclose(a[:, 25:], b[:, 25:])


def test_rope_makes_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 64).expand(2, 1, 1, 9, 64).double()
    angle = rope.angles(torch.arange(9), 64, 10_000.0).double()
    turned = (rope.turn(q, angle).double() @ rope.turn(k, angle).double().mT)[0, 0]
    assert turned[3, 1].item() == pytest.approx(turned[8, 6].item(), rel=1e-4)
    assert turned[3, 1].item() != pytest.approx(turned[3, 2].item(), rel=1e-3)


def test_bits_are_those_of_the_distribution(lm):
    windows = torch.randint(256, (3, 20))
    found = score(lm, windows)
    p = lm(windows[:, :-1]).double().softmax(dim=-1).gather(2, windows[:, 1:, None])[..., 0]
    assert torch.allclose(found.bits, -p.log2().mean(dim=1))
    hits = (lm(windows[:, :-1]).argmax(dim=-1) == windows[:, 1:]).double().mean(dim=1)
    assert torch.equal(found.accuracy, hits)


def test_patches_come_back_where_they_were():
    model = DiffusionTransformer(DiffusionConfig(size=16, dim=64, heads=1, layers=0, hidden=64)).eval()
    torch.nn.init.normal_(model.pixels.weight)
    pictures = torch.zeros(1, 3, 16, 16)
    pictures[0, :, 4:6, 10:12] = 1.0  # one patch of 2 × 2
    changed = model(pictures, torch.ones(1), torch.zeros(1, dtype=torch.long)) - model(
        torch.zeros_like(pictures), torch.ones(1), torch.zeros(1, dtype=torch.long)
    )
    where = changed.abs().sum(dim=(0, 1)) > 1e-6
    assert where[4:6, 10:12].all()
    assert where.sum() == 4


def test_the_dit_depends_on_time_class_and_noise(dit):
    noise, label, t = noise_of([0, 1], SMALL_DIT), torch.tensor([0, 1]), torch.tensor([0.5, 0.5])
    base = dit(noise, t, label)
    assert base.shape == noise.shape
    for other in (dit(noise, t + 0.2, label), dit(noise, t, label + 1), dit(noise.roll(1, dims=3), t, label)):
        assert not torch.allclose(base, other, atol=1e-4)


def test_a_perfect_velocity_is_no_loss_and_leads_from_noise_to_the_picture():
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    noise = noise_of([5, 6], SMALL_DIT)

    class Perfect(torch.nn.Module):
        def forward(self, noisy, t, label):
            return noise - pictures

    label = torch.zeros(2, dtype=torch.long)
    assert float(flow_loss(Perfect(), pictures, torch.rand(2), noise, label)) == 0.0
    assert torch.allclose(sample(Perfect(), noise, label, steps=20), pictures, atol=1e-5)


def test_sampling_is_the_same_each_time_and_by_seed(dit):
    label = torch.tensor([0, 1, 2])
    first = sample(dit, noise_of([3, 4, 5], SMALL_DIT), label, steps=3)
    assert torch.equal(first, sample(dit, noise_of([3, 4, 5], SMALL_DIT), label, steps=3))
    assert torch.equal(noise_of([4], SMALL_DIT)[0], noise_of([3, 4], SMALL_DIT)[1])
    assert not torch.equal(noise_of([4], SMALL_DIT), noise_of([5], SMALL_DIT))


def test_weights_come_back_to_sixteen_bits(tmp_path, lm):
    path = tmp_path / "lm.safetensors"
    weights.save(path, lm, {"seed": "0"})
    loaded = weights.load(path, LanguageModel, LanguageConfig)
    assert loaded.config == SMALL_LM
    assert not loaded.training
    for name, tensor in lm.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name


def test_wrong_weights_are_refused(tmp_path, lm):
    path = tmp_path / "lm.safetensors"
    with pytest.raises(InvalidArgumentError, match="train them"):
        weights.load(path, LanguageModel, LanguageConfig)
    weights.save(path, lm, {})
    with pytest.raises(InvalidArgumentError, match="'kind': 'LanguageModel'"):
        weights.load(path, DiffusionTransformer, DiffusionConfig)
    with torch.no_grad():
        lm.norm.weight.fill_(1e6)
    with pytest.raises(InvalidArgumentError, match=r"float16: norm\.weight"):
        weights.save(path, lm, {})
