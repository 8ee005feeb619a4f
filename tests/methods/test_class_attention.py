"""CAT-KD as a method: maps through the classifiers, or maps that are there already."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import class_attention
from hintjax.losses import class_attention_loss
from hintjax.method import Context
from hintjax.networks import Features, Wants

pytestmark = pytest.mark.usefixtures("strict")

CONTEXT = Context(jax.random.key(0), jnp.int32(0), True)


def drawn(*shapes):
    generator = np.random.default_rng(0)
    return [jnp.array(generator.normal(size=shape), jnp.float32) for shape in shapes]


def test_maps_go_through_dense_and_convolutional_classifiers():
    s, t, dense, conv = drawn((3, 4, 4, 5), (3, 8, 8, 7), (5, 10), (1, 1, 7, 10))
    method = class_attention(("a", "x"), ("head", "top"))
    assert method.student == Wants(hints=("a",), params=("head",))
    assert method.teacher == Wants(hints=("x",), params=("top",))
    student = Features(hints={"a": s}, params={"head": {"kernel": dense}})
    teacher = Features(hints={"x": t}, params={"top": {"kernel": conv}})
    values, *rest = method.apply({}, {}, student, teacher, {}, CONTEXT)
    want = class_attention_loss(s @ dense, t @ conv[0, 0])
    np.testing.assert_allclose(values, want, rtol=1e-5)
    assert rest == [{}, {}]


def test_maps_of_classes_need_no_classifier():
    s, t = drawn((3, 4, 4, 10), (3, 8, 8, 10))
    method = class_attention(("a", "x"), None, size=4)
    features = Features(hints={"a": s}), Features(hints={"x": t})
    assert method.init(CONTEXT.key, *features, None) == ({}, {})
    values, _, _ = method.apply({}, {}, *features, {}, CONTEXT)
    np.testing.assert_array_equal(values, class_attention_loss(s, t, size=4))


def test_what_does_not_fit_is_refused():
    s, t = drawn((3, 4, 4, 10), (3, 8, 8, 11))
    features = Features(hints={"a": s}), Features(hints={"x": t})
    with pytest.raises(ValueError, match="class_attention: .*classes, got 10 and 11"):
        class_attention(("a", "x"), None).init(CONTEXT.key, *features, None)
    norm = {"scale": jnp.ones(10)}
    features = [f._replace(params={"head": norm}) for f in features]
    with pytest.raises(ValueError, match="class_attention: .*'head' .*kernel"):
        class_attention(("a", "x"), ("head", "head")).init(CONTEXT.key, *features, None)
    with pytest.raises(ValueError, match="class_attention: .*size.*integer >= 1"):
        class_attention(("a", "x"), size=0)
