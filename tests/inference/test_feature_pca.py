"""Feature colours: the main directions of patch features, against a singular value decomposition."""

import numpy as np
import pytest
import torch

from xcit.errors import CheckpointError, DataError, ShapeError
from xcit.inference.feature_pca import feature_colours, fit_basis, patch_features
from xcit.models.xcit import XCiT


def grids(num=3, channels=12, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(channels, channels)) * np.linspace(3, 0.1, channels)[:, None]
    return [rng.normal(size=(4 + i, 6, channels)) @ mixing + 5 for i in range(num)]


def test_the_directions_are_those_of_the_svd():
    features = grids()
    basis = fit_basis(features)
    rows = np.concatenate([grid.reshape(-1, 12) for grid in features])
    _, values, directions = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    for i in range(3):
        assert abs(basis.components[i] @ directions[i]) == pytest.approx(1, abs=1e-9)
        assert basis.components[i][np.abs(basis.components[i]).argmax()] > 0
        assert basis.explained[i] == pytest.approx(values[i] ** 2 / (values**2).sum())
    np.testing.assert_allclose(basis.mean, rows.mean(axis=0))


def test_colours_spread_over_the_range_and_do_not_depend_on_order():
    features = grids()
    basis = fit_basis(features)
    colours = np.concatenate([feature_colours(grid, basis).reshape(-1, 3) for grid in features])
    assert colours.min() == 0
    assert colours.max() == 1
    assert (np.abs(colours.mean(axis=0) - 0.5) < 0.2).all()
    again = fit_basis(features[::-1])
    np.testing.assert_allclose(again.components, basis.components, atol=1e-9)
    np.testing.assert_allclose(feature_colours(features[0], again), feature_colours(features[0], basis), atol=1e-8)


def test_one_basis_gives_like_patches_like_colours_in_all_images():
    features = grids()
    features[1][0, 0] = features[0][2, 3]
    basis = fit_basis(features)
    np.testing.assert_array_equal(feature_colours(features[1], basis)[0, 0], feature_colours(features[0], basis)[2, 3])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_does_not_touch_the_border(sign):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(10, 12, 8)) * 0.3
    inside = np.zeros((10, 12), dtype=bool)
    inside[3:7, 4:9] = True
    features[inside, 2] += sign * 6
    basis = fit_basis([features], foreground=True)
    colours = feature_colours(features, basis)
    assert ((colours > 0).any(axis=-1) <= inside).all()
    assert (colours[inside] > 0).any(axis=-1).mean() > 0.9
    assert colours[inside].std(axis=0).min() > 0.1  # the directions are those within the foreground


def test_fewer_directions_than_colours():
    features = np.zeros((3, 4, 2))
    features[..., 0] = np.arange(12).reshape(3, 4)
    colours = feature_colours(features, fit_basis([features]))
    assert (np.diff(colours[..., 0].ravel()) >= 0).all()
    assert (colours[..., 1:] == 0.5).all()


def test_refusals():
    with pytest.raises(DataError, match="nothing to tell apart"):
        fit_basis([np.ones((3, 4, 5))])
    with pytest.raises(DataError, match="no features"):
        fit_basis([])
    with pytest.raises(ShapeError, match="rows, columns, channels"):
        fit_basis([np.ones((3, 4, 5)), np.ones((3, 4, 6))])


@pytest.mark.parametrize("variant", ["none", "avg_pool"])
def test_features_are_the_final_patch_tokens(variant):
    torch.manual_seed(0)
    model = XCiT(patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=2, variant=variant).train()
    images = torch.randn(2, 3, 20, 33)
    features = patch_features(model, images)
    assert model.training
    assert features.shape == (2, 3, 5, 32)
    with torch.no_grad():
        tokens = model.eval().forward_features(images)
    np.testing.assert_allclose(features[1, 2, 4], tokens[1, -1], rtol=1e-6)
    np.testing.assert_allclose(features[0, 1, 0], tokens[0, model.num_prefix_tokens + 5], rtol=1e-6)


def test_features_that_are_not_finite_are_refused():
    model = XCiT(patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=2)
    with torch.no_grad():
        model.norm.weight.fill_(float("inf"))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        patch_features(model, torch.randn(1, 3, 16, 16))
