"""Hadamard matrices of the sizes that Sylvester and Paley construct."""

import numpy as np
import pytest

from hintjax.losses.hadamard import hadamard_matrix

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize("size", [1, 2, 8, 12, 20, 24, 28, 36, 44, 192, 768])
def test_a_hadamard_matrix_is_orthogonal_and_flat(size):
    h = np.float64(hadamard_matrix(size))
    np.testing.assert_allclose(h @ h.T, np.eye(size), atol=1e-5)
    np.testing.assert_allclose(np.abs(h), size**-0.5, rtol=1e-5)


@pytest.mark.parametrize("size", [3, 10, 92])
def test_no_other_rotation_stands_in_for_a_hadamard_matrix(size):
    with pytest.raises(ValueError, match=f"hadamard_matrix: .*got {size}"):
        hadamard_matrix(size)
