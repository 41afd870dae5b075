"""Tensors of several files as one, and files that cannot be read where they lie."""

import numpy as np
import pytest
from etils import epath

from srlm_jax.model import sources
from srlm_jax.model.config_files import BadModelFile
from srlm_jax.model.sources import Tensor


def tensor(x):
    return Tensor(x.shape, str(x.dtype), lambda index: x[index])


def merged(*parts, shape):
    """The parts of one tensor, each from a shard of its own, as one."""
    return sources.merged([{"w": tensor(part)} for part in parts], {"w": shape})["w"]


X = np.arange(24.0).reshape(4, 6)


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_are_joined_along_the_axis_in_which_they_are_short(axis):
    joined = merged(*np.split(X, [1, 3], axis), shape=(4, 6))
    np.testing.assert_array_equal(joined.whole(), X)
    for rows in ((0, 1), (0, 2), (1, 3), (2, 4)):  # of one part, and over two or three of them
        for columns in ((0, 6), (0, 2), (2, 5)):
            index = (slice(*rows), slice(*columns))
            np.testing.assert_array_equal(joined.read(index), X[index])


def test_what_every_shard_holds_whole_is_taken_once():
    np.testing.assert_array_equal(merged(X, X, shape=(4, 6)).whole(), X)
    np.testing.assert_array_equal(merged(X[0], X[0], shape=(6,)).whole(), X[0])


@pytest.mark.parametrize(
    ("parts", "odd"),
    [
        ((X, X[:, :5]), (4, 5)),  # one whole, one cut
        ((X[:2], X[2:, :5]), (2, 6)),  # as long together as they should be, but not as wide
        ((X, X[0]), (6,)),  # fewer axes
        ((X[:2], X[2:][None]), (2, 6)),  # more axes
        ((X, X[0, 0]), ()),
    ],
)
def test_of_parts_that_fit_in_no_way_one_is_left_that_shows_it(parts, odd):
    assert merged(*parts, shape=(4, 6)).shape == odd


def test_a_tensor_that_nobody_knows_is_left_as_it_is():
    assert sources.merged([{"w": tensor(X)}, {"w": tensor(X)}], {})["w"].shape == (4, 6)


@pytest.mark.parametrize("read", [sources.hugging_face, sources.meta_shards])
def test_a_bucket_is_to_be_copied_first(read):
    with pytest.raises(BadModelFile, match=r"gs://bucket/model: these weights are mapped into memory, so copy"):
        read(epath.Path("gs://bucket/model"))
