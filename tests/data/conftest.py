"""A small prepared corpus, and a cache that is never the user's."""

from pathlib import Path

import pytest
from small_corpus import VOCAB, data_config, write_corpus

from mhc_jax.data.prepare import prepare
from mhc_jax.data.prepared import Prepared


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def prepared(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(data_config(corpus_folder), VOCAB, cache=tmp_path_factory.mktemp("cache"))
