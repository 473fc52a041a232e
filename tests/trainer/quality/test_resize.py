"""Resizing: TensorFlow 1's positions by hand, Pillow as the oracle of bicubic."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.quality.resize import Resize, resize, resize_method


def _image(size: int) -> Tensor:
    return torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0)) * 255


def test_tensorflow_1_reads_output_pixel_i_at_i_times_the_ratio() -> None:
    column = torch.tensor([0.0, 10.0, 20.0]).reshape(1, 1, 1, 3).expand(1, 1, 3, 3)
    # 3 -> 6: places 0, 0.5, 1, 1.5, 2, 2.5, the last one held at the border
    assert resize(column, 6, "bilinear-tf1")[0, 0, 0].tolist() == [0.0, 5.0, 10.0, 15.0, 20.0, 20.0]
    # 3 -> 2: places 0 and 1.5, without averaging what lies between
    assert resize(column, 2, "bilinear-tf1")[0, 0, 0].tolist() == [0.0, 15.0]
    assert torch.allclose(resize(column.mT, 6, "bilinear-tf1"), resize(column, 6, "bilinear-tf1").mT)


def test_pytorch_fid_reads_at_the_middle_of_pixels() -> None:
    column = torch.tensor([0.0, 10.0]).reshape(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert resize(column, 4, "bilinear")[0, 0, 0].tolist() == [0.0, 2.5, 7.5, 10.0]


@pytest.mark.parametrize(("before", "after"), [(8, 19), (32, 11), (9, 9)])
def test_bicubic_is_pillows(before: int, after: int) -> None:
    image = _image(before)
    wanted = np.asarray(Image.fromarray(image[0, 0].numpy()).resize((after, after), Image.Resampling.BICUBIC))
    assert np.abs(resize(image, after, "bicubic-antialias")[0, 0].numpy() - wanted).max() < 1e-3


@pytest.mark.parametrize("method", ["bilinear-tf1", "bilinear", "bicubic-antialias"])
def test_an_image_of_the_wanted_size_stays_as_it_is(method: Resize) -> None:
    assert torch.allclose(resize(_image(12), 12, method), _image(12), atol=1e-4)
    assert resize_method(method) == method


def test_a_method_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="bilinear-tf1, bilinear, bicubic-antialias"):
        resize_method("lanczos")
