"""Inception against a forward written out layer by layer in this test from its paper and the known quirks of its FID variant."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from trainer.quality.inception import Inception, load_inception

Weights = Mapping[str, Tensor]


def _conv(w: Weights, name: str, x: Tensor, *, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
    x = F.conv2d(x, w[f"{name}.conv.weight"], stride=stride, padding=padding)
    mean, variance = w[f"{name}.bn.running_mean"], w[f"{name}.bn.running_var"]
    return F.relu(F.batch_norm(x, mean, variance, w[f"{name}.bn.weight"], w[f"{name}.bn.bias"], training=False, eps=0.001))


def _average(x: Tensor) -> Tensor:
    """3 x 3 means that count only what lies inside, as TensorFlow's SAME average pooling."""
    ones = torch.ones_like(x[:1, :1])
    kernel = torch.ones(x.shape[1], 1, 3, 3)
    return F.conv2d(x, kernel, padding=1, groups=x.shape[1]) / F.conv2d(ones, torch.ones(1, 1, 3, 3), padding=1)


def _block_a(w: Weights, n: str, x: Tensor) -> Tensor:
    five = _conv(w, f"{n}.branch5x5_2", _conv(w, f"{n}.branch5x5_1", x), padding=(2, 2))
    double = _conv(w, f"{n}.branch3x3dbl_2", _conv(w, f"{n}.branch3x3dbl_1", x), padding=(1, 1))
    double = _conv(w, f"{n}.branch3x3dbl_3", double, padding=(1, 1))
    return torch.cat([_conv(w, f"{n}.branch1x1", x), five, double, _conv(w, f"{n}.branch_pool", _average(x))], dim=1)


def _block_b(w: Weights, n: str, x: Tensor) -> Tensor:
    double = _conv(w, f"{n}.branch3x3dbl_2", _conv(w, f"{n}.branch3x3dbl_1", x), padding=(1, 1))
    double = _conv(w, f"{n}.branch3x3dbl_3", double, stride=2)
    return torch.cat([_conv(w, f"{n}.branch3x3", x, stride=2), double, F.max_pool2d(x, 3, 2)], dim=1)


def _block_c(w: Weights, n: str, x: Tensor) -> Tensor:
    row, column = (0, 3), (3, 0)
    seven = _conv(w, f"{n}.branch7x7_2", _conv(w, f"{n}.branch7x7_1", x), padding=row)
    seven = _conv(w, f"{n}.branch7x7_3", seven, padding=column)
    double = _conv(w, f"{n}.branch7x7dbl_1", x)
    for number, padding in ((2, column), (3, row), (4, column), (5, row)):
        double = _conv(w, f"{n}.branch7x7dbl_{number}", double, padding=padding)
    return torch.cat([_conv(w, f"{n}.branch1x1", x), seven, double, _conv(w, f"{n}.branch_pool", _average(x))], dim=1)


def _block_d(w: Weights, n: str, x: Tensor) -> Tensor:
    three = _conv(w, f"{n}.branch3x3_2", _conv(w, f"{n}.branch3x3_1", x), stride=2)
    seven = _conv(w, f"{n}.branch7x7x3_2", _conv(w, f"{n}.branch7x7x3_1", x), padding=(0, 3))
    seven = _conv(w, f"{n}.branch7x7x3_4", _conv(w, f"{n}.branch7x7x3_3", seven, padding=(3, 0)), stride=2)
    return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], dim=1)


def _block_e(w: Weights, n: str, x: Tensor, pooled: Tensor) -> Tensor:
    three = _conv(w, f"{n}.branch3x3_1", x)
    double = _conv(w, f"{n}.branch3x3dbl_2", _conv(w, f"{n}.branch3x3dbl_1", x), padding=(1, 1))
    parts = [
        _conv(w, f"{n}.branch1x1", x),
        _conv(w, f"{n}.branch3x3_2a", three, padding=(0, 1)),
        _conv(w, f"{n}.branch3x3_2b", three, padding=(1, 0)),
        _conv(w, f"{n}.branch3x3dbl_3a", double, padding=(0, 1)),
        _conv(w, f"{n}.branch3x3dbl_3b", double, padding=(1, 0)),
    ]
    return torch.cat([*parts, _conv(w, f"{n}.branch_pool", pooled)], dim=1)


def _oracle(w: Weights, x: Tensor) -> tuple[Tensor, ...]:
    x = _conv(w, "Conv2d_2a_3x3", _conv(w, "Conv2d_1a_3x3", x, stride=2))
    first = F.max_pool2d(_conv(w, "Conv2d_2b_3x3", x, padding=(1, 1)), 3, 2)
    second = F.max_pool2d(_conv(w, "Conv2d_4a_3x3", _conv(w, "Conv2d_3b_1x1", first)), 3, 2)
    x = second
    for n in ("5b", "5c", "5d"):
        x = _block_a(w, f"Mixed_{n}", x)
    assert x.shape[1:] == (288, 35, 35)
    x = _block_b(w, "Mixed_6a", x)
    for n in ("6b", "6c", "6d", "6e"):
        x = _block_c(w, f"Mixed_{n}", x)
    assert x.shape[1:] == (768, 17, 17)
    third = x
    x = _block_d(w, "Mixed_7a", x)
    x = _block_e(w, "Mixed_7b", x, _average(x))
    x = _block_e(w, "Mixed_7c", x, F.max_pool2d(x, 3, 1, 1))
    assert x.shape[1:] == (2048, 8, 8)
    return first, second, third, x


def test_every_depth_equals_a_forward_written_out(inception_weights: Weights, inception_file: Path) -> None:
    net = load_inception(inception_file)
    pixels = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        wanted, layers, features = _oracle(inception_weights, pixels), net.layers(pixels), net(pixels)
    for layer, other in zip(layers, wanted, strict=True):
        assert 0.05 < float(other.std()) < 50
        assert float((layer - other).abs().max()) < 1e-5 * float(other.abs().max())
    assert torch.allclose(features, wanted[-1].mean(dim=(2, 3)), rtol=1e-5, atol=1e-6)


def test_the_net_has_the_known_number_of_weights() -> None:
    # torchvision's inception_v3 has 27,161,264; of these 3,326,696 are the auxiliary classifier and 2,049,000 the last layer
    assert sum(parameter.numel() for parameter in Inception().parameters()) == 27_161_264 - 3_326_696 - 2_049_000


def test_files_of_both_formats_and_safetensors_hold_the_same(inception_weights: Weights, inception_file: Path, tmp_path: Path) -> None:
    torch.save(dict(inception_weights), tmp_path / "new.pth")
    save_file(dict(inception_weights), tmp_path / "same.safetensors")
    nets = [load_inception(path).state_dict() for path in (inception_file, tmp_path / "new.pth", tmp_path / "same.safetensors")]
    assert all(torch.equal(nets[0][name], other[name]) for other in nets[1:] for name in nets[0])


class _Canary:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self._path,)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"x": _Canary(tmp_path / "ran")}, protocol=2))
    torch.save({"x": _Canary(tmp_path / "ran")}, tmp_path / "worse.pth")
    for name in ("bad.pth", "worse.pth"):
        with pytest.raises(ValueError, match=f"{name}: refused: it holds more than tensors"):
            load_inception(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_other_weights_are_named(inception_weights: Weights, tmp_path: Path) -> None:
    name = "Mixed_6c.branch7x7_2.conv.weight"
    cases = {
        "missing": {key: tensor for key, tensor in inception_weights.items() if key != name},
        "strange": {**inception_weights, "Mixed_8a.conv.weight": torch.zeros(1)},
        "shape": {**inception_weights, name: inception_weights[name].mT.contiguous()},
    }
    for case, tensors in cases.items():
        save_file(tensors, tmp_path / f"{case}.safetensors")
        with pytest.raises(ValueError, match=r"1 weights are missing, strange or of another shape, Mixed_"):
            load_inception(tmp_path / f"{case}.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_inception(tmp_path / "text.safetensors")
    torch.save({**inception_weights, "epoch": 3}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="is no mapping of names to tensors"):
        load_inception(tmp_path / "more.pth")
    with pytest.raises(ValueError, match="no such file"):
        load_inception(tmp_path / "nowhere.pth")
