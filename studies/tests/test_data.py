"""The text and how it is split, and how pictures are compared and written."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import metrics

from lowbit_attention import InvalidArgumentError
from lowbit_studies.png import grid, write_png
from lowbit_studies.subjects import stdlib
from lowbit_studies.subjects.quality import psnr, ssim


@pytest.fixture
def library(tmp_path):
    names = [f"package/module_{n}.py" for n in range(60)] + ["encodings/cp1.py", "site-packages/x.py"]
    for n, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n" * (n + 1))
    return tmp_path


def test_every_file_is_in_one_split_and_tables_are_in_none(library):
    train, held_out = stdlib.load("train", library), stdlib.load("held_out", library)
    assert len(train.names) + len(held_out.names) == 60
    assert not set(train.names) & set(held_out.names)
    assert list(train.names) == sorted(train.names)
    assert 1 <= len(held_out.names) <= 12
    text = bytes(held_out.text.tolist())
    assert text.count(bytes([stdlib.SEPARATOR])) == len(held_out.names)
    assert text.startswith(bytes([stdlib.SEPARATOR]) + f"# {held_out.names[0]}\n".encode())


def test_the_split_does_not_change(library):
    before = stdlib.load("held_out", library).names
    (library / "package/module_1000.py").write_text("pass")
    after = stdlib.load("held_out", library).names
    assert set(before) == set(after) - {"package/module_1000.py"}
    assert stdlib.split_of("enum.py") == stdlib.split_of("pathlib.py") == "held_out"
    assert stdlib.split_of("ast.py") == "train"


def test_this_python_has_text_enough():
    held_out = stdlib.load("held_out")
    assert "enum.py" in held_out.names
    assert len(held_out.text) > 100_000


def test_windows_do_not_overlap_and_repeat_by_seed():
    text = (torch.arange(1000) % 251).byte()
    found = stdlib.windows(text, 5, 64, seed=3)
    assert found.shape == (5, 65)
    assert torch.equal(found, stdlib.windows(text, 5, 64, seed=3))
    starts = [int(next(s for s in range(0, 1000, 64) if torch.equal(text[s : s + 65].long(), w))) for w in found]
    assert len(set(starts)) == 5
    with pytest.raises(InvalidArgumentError, match="hold 15 windows of 64, not 16"):
        stdlib.windows(text, 16, 64, seed=0)


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(InvalidArgumentError, match="no source"):
        stdlib.load("train", tmp_path)


def test_psnr_and_ssim_are_scikit_images():
    torch.manual_seed(0)
    a = torch.rand(3, 3, 40, 24) * 2 - 1
    b = (a + 0.1 * torch.randn_like(a)).clamp(-1, 1)
    for n in range(3):
        x, y = a[n].double().numpy(), b[n].double().numpy()
        assert float(psnr(a, b)[n]) == pytest.approx(metrics.peak_signal_noise_ratio(x, y, data_range=2), rel=1e-6)
        whole = metrics.structural_similarity(
            x, y, data_range=2, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )[1]
        inside = whole[:, 5:-5, 5:-5].mean()  # ours counts the places where the window fits
        assert float(ssim(a, b)[n]) == pytest.approx(inside, rel=1e-6)
    assert torch.isinf(psnr(a, a)).all()
    assert torch.allclose(ssim(a, a), torch.ones(3, dtype=torch.float64))
    with pytest.raises(InvalidArgumentError, match="expected"):
        psnr(a, b[:2])
    with pytest.raises(InvalidArgumentError, match="window"):
        ssim(a[..., :8], b[..., :8])


def test_png_is_read_back_by_another_library(tmp_path):
    picture = torch.randint(256, (7, 5, 3), dtype=torch.uint8)
    write_png(tmp_path / "a.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture.numpy())
    with pytest.raises(InvalidArgumentError, match="uint8"):
        write_png(tmp_path / "b.png", picture.float())


def test_a_grid_shows_every_picture_in_its_place():
    whole = grid([torch.full((2, 3, 4, 4), -1.0), torch.zeros(2, 3, 4, 4)], zoom=2)
    assert whole.shape == (2 * 10 + 2, 2 * 10 + 2, 3)
    assert int(whole[0, 0, 0]) == 255
    assert int(whole[4, 4, 0]) == int(whole[4, 14, 0]) == 0
    assert int(whole[14, 4, 0]) == math.ceil(127.5)
