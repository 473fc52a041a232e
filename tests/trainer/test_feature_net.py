"""The feature net: what it learns to read, that it is the same every time, and images of any size."""

import pytest
import torch
from torch import Tensor

from trainer.feature_net import FEATURES, Attribute, FeatureNet, choose_attributes, features_of, read_attributes, train_feature_net


def coloured_images(count: int, size: int = 8) -> tuple[Tensor, list[dict[str, str]]]:
    """Images whose left half is dark or bright and whose right half red or blue, in noise, with these facts as attributes."""
    stream = torch.Generator().manual_seed(0)
    facts = torch.randint(0, 2, (count, 2), generator=stream)
    images = torch.randint(0, 40, (count, 3, size, size), generator=stream, dtype=torch.uint8)
    images[:, :, :, : size // 2] += (facts[:, 0] * 200).to(torch.uint8)[:, None, None, None]
    for channel in (0, 2):
        images[:, channel, :, size // 2 :] += ((facts[:, 1] * 2 == channel) * 200).to(torch.uint8)[:, None, None]
    rows = [{"left": ("dark", "bright")[left], "right": ("red", "blue")[right]} for left, right in facts.tolist()]
    return images, rows


def test_the_net_reads_plain_attributes_of_held_out_images() -> None:
    images, rows = coloured_images(300)
    trained = train_feature_net(images, rows, seed=0, updates=60)
    assert trained.attributes == (Attribute("left", ("bright", "dark")), Attribute("right", ("blue", "red")))
    assert trained.mean_accuracy > 0.95
    named = [
        [attribute.values[n] for attribute, n in zip(trained.attributes, row, strict=True)]
        for row in read_attributes(trained.net, images).tolist()
    ]
    right = sum(name == [row["left"], row["right"]] for name, row in zip(named, rows, strict=True))
    assert right > 280


def test_training_again_gives_the_same_weights_and_another_seed_others() -> None:
    images, rows = coloured_images(40)
    first, again, other = (train_feature_net(images, rows, seed=seed, updates=5).net.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["projection.weight"], other["projection.weight"])


def test_the_default_generator_and_thread_count_are_left_alone() -> None:
    images, rows = coloured_images(20)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train_feature_net(images, rows, seed=0, updates=2)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_attributes_are_chosen_by_their_number_of_common_values() -> None:
    rows = [
        {"style": "one", "number": str(n), "half": str(n % 2), "many": str(n % 41)} | ({"hat": "cap"} if n % 10 == 0 else {})
        for n in range(2000)
    ]
    rows[7]["half"] = "a typing error"
    assert choose_attributes(rows) == (Attribute("half", ("0", "1")), Attribute("hat", ("cap", "none")))


@pytest.mark.parametrize("size", [8, 32, 64, 100])
def test_images_of_any_size_have_the_same_number_of_features(size: int) -> None:
    net = FeatureNet((Attribute("a", ("x", "y")),), torch.Generator().manual_seed(0)).eval()
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert features_of(net, images).shape == (3, FEATURES)
    assert torch.allclose(features_of(net, images[1:2]), features_of(net, images)[1:2], atol=1e-5)


def test_features_have_unit_variance_over_the_training_images() -> None:
    images, rows = coloured_images(300)
    trained = train_feature_net(images, rows, seed=0, updates=60)
    variance = features_of(trained.net, images).var(dim=0)
    assert 0.7 < float(variance.mean()) < 1.4


def test_images_without_usable_attributes_are_refused() -> None:
    images, rows = coloured_images(30)
    with pytest.raises(ValueError, match="0 usable attributes"):
        train_feature_net(images, [{} for _ in rows], seed=0)
    with pytest.raises(ValueError, match="at least 16 images"):
        train_feature_net(images[:9], rows[:9], seed=0)
