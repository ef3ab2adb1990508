"""Shapes in signatures are checked while tests run: wrong ones are refused."""

import pytest
import torch
from jaxtyping import TypeCheckError

from devec.linalg.factors import product_svd
from devec.linalg.subspaces import principal_vectors


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(TypeCheckError):
        product_svd(torch.randn(5, 2), torch.randn(3, 7))


def test_bases_of_different_spaces_are_refused():
    with pytest.raises(TypeCheckError):
        principal_vectors(torch.eye(5)[:, :2], torch.eye(6)[:, :2])


def test_a_vector_in_the_place_of_a_matrix_is_refused():
    with pytest.raises(TypeCheckError):
        product_svd(torch.randn(5), torch.randn(2, 7))
