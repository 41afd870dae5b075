"""Paths of the user's: what is no path, or in a bucket that cannot be reached, is one clear error."""

import sys

import pytest
from etils import epath

from srlm_jax.errors import BadInput, MissingExtra
from srlm_jax.storage import paths


@pytest.mark.parametrize("path", ["there", "/there/file.jsonl", "with:colon", "meta-llama/Llama-2-7b"])
def test_a_local_path_is_taken_as_it_stands(path):
    assert paths.given(path) == paths.given(epath.Path(path)) == epath.Path(path)


@pytest.mark.parametrize("scheme", ["https", "http", "file", "hdfs", "HTTPS", "gs2"])
def test_an_address_is_no_path(scheme):
    with pytest.raises(BadInput, match=rf"^{scheme}://host/model is an address and no path: {scheme}:// is not read"):
        paths.given(f"{scheme}://host/model")


def test_a_bucket_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingExtra, match=r"^gs://bucket/model cannot be reached without .*: Please install gcsfs"):
        paths.given("gs://bucket/model")


@pytest.mark.parametrize(("error", "raised"), [(RuntimeError("no credentials"), BadInput), (OSError("no"), OSError)])
def test_a_bucket_that_cannot_be_reached_is_no_fault_of_ours(monkeypatch, error, raised):
    def fail(path):
        raise error

    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", fail)
    with pytest.raises(raised, match="no"):
        paths.given("gs://bucket/model")
