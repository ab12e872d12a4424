"""Removes the datasets and mixtures that a test module declares, at its end."""

from unittest import mock

import pytest

from grit_jax.prepare.datasets import DATASETS, MIXTURES


@pytest.fixture(scope="module", autouse=True)
def own_declarations():
    with mock.patch.dict(DATASETS), mock.patch.dict(MIXTURES):
        yield
