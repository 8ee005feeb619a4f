"""The promises of every loss and of every method.

The tables below have one row for each loss or method, and each promise has one test. A
row waives a promise by the name of its test, with the reason. A new loss or method
without a row fails.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

from hintjax import losses, methods, regressors, sharding, stages
from hintjax.method import Context, Data, Method, reduced
from hintjax.methods.task import task
from hintjax.methods.uncertainty import uncertain
from hintjax.networks import Features, Network, Variables
from hintjax.objective import objective

pytestmark = pytest.mark.usefixtures("strict")


class Loss(NamedTuple):
    """How to call a loss, and which promises it does not make."""

    loss: Callable[..., jax.Array]
    student: Any  # shape of one example, or a tree of shapes
    teacher: Any = None  # as the student's by default
    positions: int = 0  # number of first axes of an example that a mask can cover
    batch_dims: bool = False  # does it need the number of batch axes?
    coupled: bool = False  # does it compare the examples of a batch?
    tied: bool = False  # must equal sizes stay equal on whatever axes they stand?
    least: int = 1  # smallest size of an axis
    waived: Mapping[str, str] = MappingProxyType({})  # test without "test_": reason
    name: str = ""  # filled in from the table

    def over(self, batch_dims):
        """The loss for this number of batch axes."""
        if self.batch_dims:
            return functools.partial(self.loss, batch_dims=batch_dims)
        return self.loss

    def places(self):
        """Shape of the positions of one example."""
        first = jax.tree.leaves(self.student, is_leaf=is_shape)[0]
        return first[: self.positions] if self.positions else ()


HEADS = dict.fromkeys(
    ("any_sizes", "a_method_takes_any_sizes"), "channels are a multiple of the heads"
)
CHANNELS = {"names_both_shapes": "channels may differ; a batch of 1 is refused below"}
SIZES = {"names_both_shapes": "features may differ; a batch of 1 is refused below"}
KINK = {"flat_at_equality": "a distance has a kink at 0; its slope is bounded"}
ENTROPY = {"zero_at_equality": "the least value is the teacher's entropy"}
SIGNS = dict.fromkeys(
    ("least_at_equality", "zero_at_equality", "flat_at_equality"),
    "the student should be beyond a margin, not equal",
) | {"teacher_may_be_stopped": "only the teacher's signs are read"}
CLASS = dict.fromkeys(
    ("least_at_equality", "zero_at_equality", "flat_at_equality"),
    "only the teacher's largest class is read",
) | {"teacher_may_be_stopped": "only the teacher's largest class is read"}
GAUSSIAN = {"zero_at_equality": "the least value is half the log of the variance"}
CANDIDATES = dict.fromkeys(
    ("least_at_equality", "zero_at_equality", "flat_at_equality"),
    "the teacher's are candidates, of which one is the student's own",
)

FEATURES = {"student": (4, 3, 5), "positions": 2, "batch_dims": True}
LOGITS = {"student": (4, 10), "positions": 1, "batch_dims": True}  # of tokens
UNEQUAL = FEATURES | {"teacher": (8, 7, 6)}
FLOWS = UNEQUAL | {
    "student": ((4, 3, 3), (4, 3, 5)),
    "teacher": ((5, 3, 3), (3, 4, 5)),
}
SCORES = (3, 4, 4)  # a mask of tokens covers its last two axes: tested beside the loss

RELATION = {"student": (12,), "teacher": (3, 5), "coupled": True, "waived": SIZES}

PEARSON = dict.fromkeys(
    ("zero_at_equality", "flat_at_equality"),
    "the published 1e-8 beside the variance; its own test bounds what is left",
)
ORDER = {"a_method_does_not_mind_the_order_of_examples": "it goes by their order"}


FLAT = {"positions_on_any_number_of_axes_agree": "its maps are flat already"}
ONE_AXIS = {"positions_on_any_number_of_axes_agree": "tokens have one axis"}
SQUARE = {
    "positions_on_any_number_of_axes_agree": "it pools every axis to the same size"
}


def labeled(student, teacher, *, batch_dims=1, where=None):
    """Decoupled KD with the same label for all examples."""
    label = jnp.full(student.shape[:-1], 1, jnp.int32)
    return losses.decoupled_kd_loss(
        student, teacher, label, batch_dims=batch_dims, where=where
    )


def varied(student, teacher, *, batch_dims=1, where=None):
    """VID with the same variance for all channels."""
    scale = jnp.ones(student.shape[-1:], student.dtype)
    return losses.variational_loss(
        student, teacher, scale=scale, batch_dims=batch_dims, where=where
    )


def queued(student, teacher, *, where=None):
    """The loss of a queue of three rows, of any width."""
    width = student.shape[-1]
    queue = jnp.sin(jnp.arange(3.0 * width, dtype=jnp.float32)).reshape(3, width)
    return losses.queue_similarity_loss(
        student, teacher, queue, temperature=1.0, where=where
    )


LOSSES = {
    "activation_boundary_loss": Loss(
        losses.activation_boundary_loss, **FEATURES, waived=SIGNS
    ),
    "angle_loss": Loss(losses.angle_loss, **RELATION),
    "attention_distribution_loss": Loss(
        losses.attention_distribution_loss, SCORES, tied=True
    ),
    "attention_map_loss": Loss(
        losses.attention_map_loss, (12,), positions=1, waived=FLAT
    ),
    "attention_map_loss_paper": Loss(
        losses.attention_map_loss_paper, (12,), positions=1, waived=FLAT
    ),
    "attention_score_loss": Loss(losses.attention_score_loss, SCORES, tied=True),
    "attention_score_loss_code": Loss(
        losses.attention_score_loss_code, SCORES, tied=True
    ),
    "attention_transfer_loss": Loss(
        losses.attention_transfer_loss, **UNEQUAL, waived=CHANNELS
    ),
    "attention_transfer_loss_paper": Loss(
        losses.attention_transfer_loss_paper, **UNEQUAL, waived=CHANNELS | KINK
    ),
    "class_attention_loss": Loss(
        losses.class_attention_loss,
        (5, 4, 3),
        (3, 6, 3),
        batch_dims=True,
        waived=SQUARE,
    ),
    "contrastive_loss": Loss(
        functools.partial(
            losses.contrastive_loss, size=50, log_constant=4.0, temperature=2.0
        ),
        (6,),
        (3, 6),
        waived=CANDIDATES,
    ),
    "binary_kd_loss": Loss(losses.binary_kd_loss, **LOGITS),
    "channel_loss": Loss(losses.channel_loss, **FEATURES),
    "correlation_loss": Loss(losses.correlation_loss, (3, 5), coupled=True),
    "cosine_loss": Loss(losses.cosine_loss, **FEATURES),
    "cosine_smooth_l1_loss": Loss(losses.cosine_smooth_l1_loss, **FEATURES),
    "cosine_smooth_l1_map_loss": Loss(losses.cosine_smooth_l1_map_loss, **FEATURES),
    "decoupled_kd_loss": Loss(labeled, **LOGITS, least=2),
    "dist_loss": Loss(
        losses.dist_loss, (4, 10), positions=1, coupled=True, waived=PEARSON
    ),
    "distance_loss": Loss(losses.distance_loss, **RELATION),
    "factor_loss": Loss(losses.factor_loss, **UNEQUAL, waived=CHANNELS | KINK),
    "fsp_loss": Loss(losses.fsp_loss, **FLOWS),
    "fsp_loss_paper": Loss(losses.fsp_loss_paper, **FLOWS),
    "fsp_matrix_loss": Loss(losses.fsp_matrix_loss, (3, 5)),
    "fsp_matrix_loss_paper": Loss(losses.fsp_matrix_loss_paper, (3, 5)),
    "hard_label_loss": Loss(losses.hard_label_loss, **LOGITS, waived=CLASS),
    "hierarchical_context_loss": Loss(
        losses.hierarchical_context_loss, (5, 4, 3), batch_dims=True, waived=SQUARE
    ),
    "hint_loss": Loss(losses.hint_loss, **FEATURES),
    "hint_loss_paper": Loss(losses.hint_loss_paper, **FEATURES),
    "kd_loss": Loss(losses.kd_loss, **LOGITS),
    "masked_generation_loss": Loss(losses.masked_generation_loss, **FEATURES),
    "partial_l2_loss": Loss(losses.partial_l2_loss, **FEATURES),
    "patient_loss": Loss(losses.patient_loss, (12,)),
    "probability_loss": Loss(losses.probability_loss, **RELATION),
    "position_similarity_loss": Loss(
        losses.position_similarity_loss,
        **FEATURES | {"teacher": (4, 3, 6)},
        waived=CHANNELS,
    ),
    "queue_similarity_loss": Loss(queued, (6,)),
    "relation_loss": Loss(
        functools.partial(losses.relation_loss, heads=2),
        (4, 6),
        (4, 10),
        positions=1,
        waived=CHANNELS | HEADS | ONE_AXIS,
    ),
    "selectivity_loss": Loss(losses.selectivity_loss, **UNEQUAL, waived=CHANNELS),
    "similarity_loss": Loss(losses.similarity_loss, **RELATION),
    "smooth_l1_loss": Loss(losses.smooth_l1_loss, **FEATURES),
    "soft_cross_entropy_loss": Loss(
        losses.soft_cross_entropy_loss, **LOGITS, waived=ENTROPY
    ),
    "token_gram_loss": Loss(
        losses.token_gram_loss,
        (4, 6),
        (4, 5),
        positions=1,
        batch_dims=True,
        waived=CHANNELS,
    ),
    "variational_loss": Loss(varied, **FEATURES, waived=GAUSSIAN),
}
STANDARDIZATION = {
    "FeatureMoments",
    "Standardization",
    "channel_standardization",
    "feature_moments",
    "global_standardization",
    "hadamard_whitening",
    "layer_normalize",
    "merge_moments",
    "pca_whitening",
    "phi_standardization",
    "restore_features",
    "standardize_features",
    "zca_whitening",
}
NOT_LOSSES = STANDARDIZATION | {
    "attention_energy",
    "attention_map",
    "attention_map_code",
    "attention_maps",
    "contrastive_log_constant",
    "contrastive_scores_loss",  # the row of contrastive_loss runs it
    "similarity_matrix",
    "standardize_logits",
    "fsp_matrix",
    "fsp_matrix_paper",
    "batch_norm_margin",
    "margin_relu",
    "class_activation_map",
}


@pytest.fixture(params=LOSSES)
def row(request):
    row = LOSSES[request.param]._replace(name=request.param)
    promise = request.function.__name__.removeprefix("test_")
    if promise in row.waived:
        pytest.skip(row.waived[promise])
    return row


def random(shapes, batch=(4,), seed=0, dtype=np.float32):
    """Random arrays with the shapes of one example, after the batch axes."""
    generator = np.random.default_rng(seed)

    def one(shape):
        return generator.normal(size=(*batch, *shape)).astype(dtype)

    return jax.tree.map(one, shapes, is_leaf=is_shape)


def is_shape(tree):
    return isinstance(tree, tuple) and all(isinstance(n, int) for n in tree)


def pair(row, seed=0, **kwargs):
    """Student and teacher arrays with the shapes of the row."""
    teacher = row.student if row.teacher is None else row.teacher
    student = random(row.student, seed=seed, **kwargs)
    return student, random(teacher, seed=seed + 1, **kwargs)


def axes(row, shape):
    """Each axis as its kind and size: rows and columns of maps, and all others."""
    maps = len(shape) == 3 and not row.tied
    kinds = ("row", "column", "") if maps else ("",) * len(shape)
    return list(zip(kinds, shape, strict=True))


def resized(row, draw):
    """The row with new random sizes; equal sizes of a kind of axis stay equal."""
    shapes = row.student, row.teacher
    leaves = jax.tree.leaves(shapes, is_leaf=is_shape)
    known = dict.fromkeys(axis for shape in leaves for axis in axes(row, shape))
    sizes = draw(st.fixed_dictionaries(dict.fromkeys(known, st.integers(row.least, 9))))
    student, teacher = jax.tree.map(
        lambda shape: tuple(sizes[axis] for axis in axes(row, shape)),
        shapes,
        is_leaf=is_shape,
    )
    return row._replace(student=student, teacher=teacher)


def peers(row, **kwargs):
    """Student and teacher arrays of the same shape."""
    return pair(row._replace(teacher=None), **kwargs)


@functools.cache
def compiled(loss):
    """Values, and the gradient of their sum by the student and by the teacher."""

    def total(student, teacher, where):
        values = loss(student, teacher, where=where)
        return values.sum(), values

    gradients = jax.jit(jax.grad(total, (0, 1), has_aux=True))

    def run(student, teacher, where=None):
        (by_student, by_teacher), values = gradients(student, teacher, where)
        return values, by_student, by_teacher

    return run


def largest(tree):
    """The largest entry; nan if there is one (Python's own max may miss it)."""
    return np.max([np.abs(np.asarray(x)).max() for x in jax.tree.leaves(tree)])


def assert_close(got, want, rtol):
    """Compares with a tolerance relative to the largest entry, as gradients need."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        atol = rtol * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def scaled(tree, factor):
    return jax.tree.map(lambda x: x * np.asarray(factor, x.dtype), tree)


def test_every_loss_has_a_row():
    assert set(LOSSES) | NOT_LOSSES == set(losses.__all__)
    assert list(losses.__all__) == sorted(losses.__all__)


def test_only_promises_are_waived():
    rows = [*LOSSES.values(), *METHODS.values()]
    waived = {name for row in rows for name in row.waived}
    assert all(f"test_{name}" in globals() for name in waived)


def test_annotations_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        losses.kd_loss(jnp.zeros((2, 3)), jnp.zeros((2, 4)))


@pytest.mark.parametrize("batch", [(4,), (1,), (2, 3)])
def test_one_value_per_example(row, batch):
    if row.coupled and len(batch) > 1:
        pytest.skip("examples are compared along one axis")
    values = jax.eval_shape(row.over(len(batch)), *pair(row, batch=batch))
    assert (values.shape, values.dtype) == (batch, jnp.float32)


def test_least_at_equality(row):
    noise, teacher = peers(row)
    least, *_ = compiled(row.loss)(teacher, teacher)
    for size in 1e-2, 1.0, -1.0:
        student = jax.tree.map(np.add, teacher, scaled(noise, size))
        values, *_ = compiled(row.loss)(student, teacher)
        assert np.all(values > least)


def test_zero_at_equality(row):
    _, teacher = peers(row)
    values, *_ = compiled(row.loss)(teacher, teacher)
    np.testing.assert_allclose(values, 0, atol=1e-6)


def test_flat_at_equality(row):
    _, teacher = peers(row)
    _, gradient, _ = compiled(row.loss)(teacher, teacher)
    assert largest(gradient) < 1e-6


def test_jit_is_eager(row):
    student, teacher = jax.device_put(pair(row))
    values, *_ = compiled(row.loss)(student, teacher)
    rtol = 1e-5 if row.coupled else 1e-6  # differences of sums over the batch
    np.testing.assert_allclose(row.loss(student, teacher), values, rtol=rtol)


def test_vmap_is_batch(row):
    student, teacher = pair(row)
    values, *_ = compiled(row.loss)(student, teacher)
    if row.coupled:  # many batches at once
        turned = jax.tree.map(lambda x: np.stack([x, x[::-1]]), (student, teacher))
        got = jax.jit(jax.vmap(row.loss))(*turned)
        np.testing.assert_allclose(got, [values, values[::-1]], rtol=1e-5)
        return
    got = jax.jit(jax.vmap(row.over(0)))(student, teacher)
    np.testing.assert_allclose(got, values, rtol=1e-6)


def test_finite_differences(row):
    """First and second derivatives, in forward and in reverse mode."""
    with jax.enable_x64(True):
        point = pair(row, dtype=np.float64)
        direction = pair(row, dtype=np.float64, seed=2)
        total = jax.value_and_grad(lambda s, t: row.loss(s, t).sum(), (0, 1))
        along = jax.jit(lambda point: jax.jvp(total, point, direction))
        (value, gradient), (slope, bend) = jax.device_get(along(point))
        step = 1e-5
        ahead, behind = (
            jax.device_get(along(jax.tree.map(np.add, point, scaled(direction, h)))[0])
            for h in (step, -step)
        )
    want = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    assert value.dtype == np.float64
    assert_close((slope, bend), want, rtol=1e-6)
    product = jax.tree.map(np.vdot, gradient, direction)
    np.testing.assert_allclose(slope, sum(jax.tree.leaves(product)), rtol=1e-9)


@pytest.mark.parametrize("size", [0, 1e-30, 1e-20])
def test_bounded_gradient_at_zero(row, size):
    student, teacher = pair(row)
    for arrays in (
        (scaled(student, size), teacher),
        (student, scaled(teacher, size)),
        (scaled(student, size), scaled(teacher, size)),
    ):
        values, *gradients = compiled(row.loss)(*arrays)
        assert np.isfinite(values).all()
        assert largest(gradients) < 100


def test_nan_stays_nan(row):
    student, teacher = pair(row)
    arrays = {"student": student, "teacher": teacher}
    for name, tree in arrays.items():
        broken = jax.tree.map(np.copy, tree)
        for leaf in jax.tree.leaves(broken):
            leaf[1].flat[0] = np.nan
        values, *_ = compiled(row.loss)(**arrays | {name: broken})
        assert np.isnan(values[1])
        if not row.coupled:
            np.testing.assert_array_equal(np.isnan(values), np.arange(4) == 1)


def hidden(tree, where):
    """The tree with nan wherever `where` is False."""

    def hide(x):
        x = np.copy(x)
        x[~where] = np.nan
        return x

    return jax.tree.map(hide, tree)


def test_masked_is_sliced(row):
    arrays = pair(row, batch=(8,))
    where = np.arange(8) % 2 == 0
    got = compiled(row.loss)(*(hidden(tree, where) for tree in arrays), where)
    want = compiled(row.loss)(*jax.tree.map(lambda x: x[where], arrays))
    assert_close([np.asarray(x)[where] for x in jax.tree.leaves(got)], want, rtol=1e-6)
    assert largest([np.asarray(x)[~where] for x in jax.tree.leaves(got)]) == 0


def test_masked_positions_are_sliced(row):
    if not row.positions:
        pytest.skip("one example is one position")
    arrays = peers(row, batch=(8,))
    where = np.zeros((8, *row.places()), bool)
    where[:, :2] = True
    got = compiled(row.loss)(*(hidden(tree, where) for tree in arrays), where)
    want = compiled(row.loss)(*jax.tree.map(lambda x: x[:, :2], arrays))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    gradients = [np.asarray(x) for x in jax.tree.leaves(got[1:])]
    assert_close([x[:, :2] for x in gradients], want[1:], rtol=1e-5)
    assert largest([x[:, 2:] for x in gradients]) == 0


def test_fully_masked_is_zero(row):
    for shape in {(8,), (8, *row.places())}:
        where = np.zeros(shape, bool)
        arrays = (pair if where.ndim == 1 else peers)(row, batch=(8,))
        got = compiled(row.loss)(*(hidden(tree, where) for tree in arrays), where)
        assert largest(got) == 0


def test_positions_on_any_number_of_axes_agree(row):
    """A sequence is a map of one column, and a volume of one layer of such maps."""
    if not row.positions:
        pytest.skip("it has no positions")

    def shaped(axes):
        def one(shape):
            n, channels = shape[0], shape[-1]
            return (*(n if axis == "n" else 1 for axis in axes), channels)

        shapes = row.student, row.teacher
        student, teacher = jax.tree.map(one, shapes, is_leaf=is_shape)
        return row._replace(student=student, teacher=teacher)

    sequence = pair(shaped("n"))
    values, *gradients = compiled(row.loss)(*sequence)
    for axes in "n1", "1n", "1n1":
        like = pair(shaped(axes))
        arrays = jax.tree.map(lambda x, y: x.reshape(y.shape), sequence, like)
        got, *others = compiled(row.loss)(*arrays)
        np.testing.assert_allclose(got, values, rtol=1e-5, atol=1e-7)
        flat = jax.tree.map(lambda x, y: x.reshape(y.shape), others, gradients)
        assert_close(flat, gradients, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_within_one_percent(row, dtype):
    arrays = pair(row)
    want, *gradients = compiled(row.loss)(*arrays)
    half = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), arrays)
    got, *halves = compiled(row.loss)(*half)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0.01)
    for a, b in zip(jax.tree.leaves(halves), jax.tree.leaves(gradients), strict=True):
        a, b = np.float64(a).ravel(), np.float64(b).ravel()
        assert a @ b >= 0.999 * np.linalg.norm(a) * np.linalg.norm(b)


def assert_names_both(row, student, teacher):
    with pytest.raises(ValueError, match=f"^{row.name}: expected ") as error:
        row.loss(student, teacher)
    for tree in student, teacher:
        for leaf in jax.tree.leaves(tree):
            assert str(leaf.shape) in str(error.value)


def test_names_both_shapes(row, unchecked):
    student, teacher = jax.device_put(peers(row))
    assert_names_both(row, student, jax.tree.map(lambda x: x[..., 1:], teacher))


def test_never_broadcasts(row, unchecked):
    student, teacher = jax.device_put(pair(row))
    assert_names_both(row, student, jax.tree.map(lambda x: x[:1], teacher))
    assert_names_both(row, jax.tree.map(lambda x: x[:1], student), teacher)


def test_refuses_integers(row, unchecked):
    student, teacher = pair(row)
    whole = jax.tree.map(lambda x: x.astype(jnp.int32), student)
    for arrays in (whole, teacher), (teacher, whole):
        with pytest.raises(TypeError, match=f"^{row.name}: .*floating-point"):
            row.loss(*arrays)


@pytest.mark.parametrize("where", [np.ones(3, bool), np.ones(4, np.float32)])
def test_refuses_a_wrong_mask(row, unchecked, where):
    got = f"{where.dtype} \\({where.shape[0]},\\)"
    with pytest.raises(ValueError, match=f"^{row.name}: .*where to be bool .*{got}"):
        row.loss(*pair(row), where=where)


def test_teacher_may_be_stopped(row):
    """The loss stops no gradient; if the caller stops it, only the student learns."""
    student, teacher = pair(row)
    _, by_student, by_teacher = compiled(row.loss)(student, teacher)
    assert largest(by_student) > 0
    assert largest(by_teacher) > 0
    stopped = jax.jit(
        jax.grad(lambda s, t: row.loss(s, jax.lax.stop_gradient(t)).sum(), (0, 1))
    )(student, teacher)
    assert_close(stopped[0], by_student, rtol=1e-6)
    assert largest(stopped[1]) == 0


def test_a_batch_of_one(row):
    student, teacher = pair(row)
    one = jax.tree.map(lambda x: x[:1], (student, teacher))
    if row.coupled:  # one example has no other to compare with
        got = compiled(row.loss)(*one)
        assert np.isfinite(got[0]).all()
        assert largest(got[1:]) < 100
        return
    got, want = compiled(row.loss)(*one), compiled(row.loss)(student, teacher)
    assert_close(got, [x[:1] for x in jax.tree.leaves(want)], rtol=1e-5)


@pytest.mark.parametrize("near", [0, 1e-7, 1e-6])
def test_bounded_gradient_at_duplicates(row, near):
    """Equal examples, almost equal examples, and an example of zeros."""
    student, teacher = pair(row, batch=(8,))

    def doubled(x):
        noise = np.random.default_rng(3).normal(size=x.shape).astype(x.dtype)
        x = x[[0, 0, 1, 1, 1, 2, 3, 4]] + np.asarray(near, x.dtype) * noise
        x[6] = 0
        return x

    same = jax.tree.map(doubled, (student, teacher))
    for arrays in (same[0], teacher), (student, same[1]), same:
        values, *gradients = compiled(row.loss)(*arrays)
        assert np.isfinite(values).all()
        assert largest(gradients) < 100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(*2 * [st.sampled_from([0, 1e-30, 1e-12, 1e-4, 1, 1e2, 3e4])]),
)
def test_finite_at_any_magnitude(row, dtype, seed, sizes):
    generator = np.random.default_rng(seed)
    arrays = [
        jax.tree.map(
            lambda x, size=size: generator.uniform(-size, size, x.shape).astype(
                jnp.dtype(dtype)
            ),
            tree,
        )
        for tree, size in zip(pair(row), sizes, strict=True)
    ]
    values, *gradients = compiled(row.loss)(*arrays)
    assert np.isfinite(values).all()
    assert np.all(values >= -1e-5)
    if dtype == "float16" and not np.isfinite(largest(gradients)):  # too large for it?
        whole = jax.tree.map(lambda x: x.astype(np.float32), arrays)
        _, *gradients = compiled(row.loss)(*whole)
        assert largest(gradients) > np.finfo(np.float16).max
    assert np.isfinite(largest(gradients))


# Failures are not shrunk: each example is compiled, and sizes are already small.
ANEW = (hypothesis.Phase.generate,)


@hypothesis.settings(max_examples=3, phases=ANEW)
@hypothesis.given(
    data=st.data(), dtype=st.sampled_from(["float64", "bfloat16", "float16"])
)
def test_any_sizes(row, data, dtype):
    """Maps larger or smaller than the teacher's, not square, odd, of one position."""
    row = resized(row, data.draw)

    def masked(student, teacher):
        values = row.loss(student, teacher, where=jnp.arange(8) % 2 == 0)
        return values.sum(), values

    @jax.jit
    def both(arrays):
        broken = [
            jax.tree.map(lambda x: x.at[1::2].set(jnp.nan), tree) for tree in arrays
        ]
        gradients, values = jax.grad(masked, (0, 1), has_aux=True)(*broken)
        return gradients, values, row.loss(*jax.tree.map(lambda x: x[::2], arrays))

    with jax.enable_x64(dtype == "float64"):
        arrays = pair(row, batch=(8,), dtype=jnp.dtype(dtype))
        gradients, values, sliced = jax.device_get(both(jax.device_put(arrays)))
    assert values.shape == (8,)
    assert values.dtype == ("float64" if dtype == "float64" else "float32")
    assert np.isfinite(largest(gradients))
    np.testing.assert_allclose(values[::2], sliced, rtol=1e-5, atol=1e-6)
    assert np.all(values[1::2] == 0)


def test_sharded_is_one_device():
    """All losses at once, with the batch over 8 devices.

    In float64, because devices sum in another order.
    """
    arrays = {name: pair(row, batch=(8,)) for name, row in LOSSES.items()}

    @jax.jit
    def everything(arrays):
        return {name: LOSSES[name].loss(*arrays[name]) for name in arrays}

    def widened(leaf):
        wide = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(jnp.float64) if wide else leaf

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with jax.enable_x64(True):
        arrays = jax.tree.map(widened, arrays)
        got, want = everything(jax.device_put(arrays, batch)), everything(arrays)
    chex.assert_trees_all_close(got, want, rtol=1e-11)


class Taught(NamedTuple):
    """A method, with the shapes of one example of every feature that it wants."""

    method: Method
    student: Features
    teacher: Features
    tied: bool = False  # must equal sizes stay equal on whatever axes they stand?
    least: int = 1  # smallest size of an axis
    waived: Mapping[str, str] = MappingProxyType({})
    name: str = ""


PAIRS = [("guided", "hint")]
OUTPUTS = Features(output=(10,)), Features(output=(10,))
TEACHER_ALONE = dict.fromkeys(
    (
        "a_method_teaches_the_student_and_never_the_teacher",
        "a_method_keeps_nan_to_its_example",
        "a_method_stands_in_both_stages",
    ),
    "a stage before, on the teacher alone",
)
UNLIKE = Features(hints={"guided": (4, 4, 3)}), Features(hints={"hint": (7,)})
TOGETHER = {
    "a_method_keeps_nan_to_its_example": "the examples of a batch are compared",
}

METHODS = {
    "activation_boundary": Taught(
        methods.activation_boundary(PAIRS),
        Features(hints={"guided": (4, 4, 3)}),
        Features(hints={"hint": (8, 8, 5)}),
    ),
    "attention_transfer": Taught(
        methods.attention_transfer(PAIRS),
        Features(hints={"guided": (4, 4, 3)}),
        Features(hints={"hint": (8, 8, 5)}),
        least=2,
    ),
    "binary_kd": Taught(methods.binary_kd(), *OUTPUTS),
    "channel_wise": Taught(
        methods.channel_wise(PAIRS, regressor=regressors.linear),
        Features(hints={"guided": (4, 4, 3)}),
        Features(hints={"hint": (4, 4, 5)}),
        least=2,
    ),
    "class_attention": Taught(
        methods.class_attention(("guided", "hint")),
        Features(
            hints={"guided": (4, 4, 3)}, params={"classifier": {"kernel": (3, 10)}}
        ),
        Features(hints={"hint": (8, 8, 5)}, params={"classifier": {"kernel": (5, 10)}}),
    ),
    "correlation_congruence": Taught(
        methods.correlation_congruence(PAIRS, feature_dim=8),
        *UNLIKE,
        waived=TOGETHER | ORDER,
    ),
    "cosine": Taught(
        methods.cosine(PAIRS),
        Features(hints={"guided": (4, 6)}),
        Features(hints={"hint": (4, 6)}),
        least=2,
    ),
    "crd": Taught(
        methods.crd(
            ("guided", "hint"),
            negatives=methods.AnchorNegatives(12),
            feature_dim=8,
        ),
        Features(hints={"guided": (6,)}),
        Features(hints={"hint": (2, 2, 5)}),
    ),
    "decoupled_kd": Taught(methods.decoupled_kd(), *OUTPUTS, least=2),
    "dense_kd": Taught(
        methods.dense_kd(),
        Features(output=(2, 3, 10)),
        Features(output=(2, 3, 10)),
        least=2,
    ),
    "dist": Taught(methods.dist(), *OUTPUTS, least=2, waived=TOGETHER),
    "dense_matching": Taught(
        methods.dense_matching(PAIRS),
        Features(hints={"guided": (4, 4, 3)}),
        Features(hints={"hint": (8, 7, 5)}),
    ),
    "factor_transfer": Taught(
        methods.factor_transfer(PAIRS),
        Features(hints={"guided": (4, 4, 3)}),
        Features(hints={"hint": (8, 8, 5)}),
    ),
    "fitnets": Taught(
        methods.fitnets(
            PAIRS, regressor=functools.partial(regressors.conv, batch_norm=True)
        ),
        Features(hints={"guided": (4, 4, 3)}),
        Features(hints={"hint": (2, 2, 5)}),
    ),
    "fsp": Taught(
        methods.fsp([(("low", "high"), ("one", "two"))], regressor=regressors.linear),
        Features(hints={"low": (4, 4, 3), "high": (2, 2, 4)}),
        Features(hints={"one": (8, 8, 5), "two": (4, 4, 6)}),
    ),
    "hard_labels": Taught(methods.hard_labels(), *OUTPUTS, least=2),
    "kd": Taught(methods.kd(), *OUTPUTS, least=2),
    "masked_generation": Taught(
        methods.masked_generation(PAIRS),
        Features(hints={"guided": (4, 4, 3)}),
        Features(hints={"hint": (8, 8, 5)}),
    ),
    "minilm": Taught(
        methods.minilm(PAIRS, [("scores", "attention")], heads=2),
        Features(hints={"guided": (4, 6), "scores": SCORES}),
        Features(hints={"hint": (4, 2, 5), "attention": SCORES}),
        waived=HEADS,
    ),
    "orthogonal_projection": Taught(
        methods.orthogonal_projection(PAIRS),
        Features(hints={"guided": (4, 3)}),
        Features(hints={"hint": (2, 2, 5)}),
    ),
    "overhaul": Taught(
        methods.overhaul(PAIRS, ["norm"]),
        Features(hints={"guided": (4, 4, 3)}),
        Features(
            hints={"hint": (8, 8, 5)}, params={"norm": {"scale": (5,), "bias": (5,)}}
        ),
    ),
    "paraphrase": Taught(
        methods.paraphrase(PAIRS),
        Features(hints={"guided": (4, 4, 3)}),
        Features(hints={"hint": (8, 8, 5)}),
        waived=TEACHER_ALONE,
    ),
    "patient": Taught(
        methods.patient(PAIRS),
        Features(hints={"guided": (4, 6)}),
        Features(hints={"hint": (4, 6)}),
        least=2,
    ),
    "probability_transfer": Taught(
        methods.probability_transfer(PAIRS), *UNLIKE, waived=TOGETHER
    ),
    "regression_kd": Taught(methods.regression_kd(), *OUTPUTS),
    "queue_similarity": Taught(
        methods.queue_similarity(("guided", "hint"), size=6),
        Features(hints={"guided": (4, 4, 3)}),
        Features(hints={"hint": (5,)}),
    ),
    "relational": Taught(methods.relational(PAIRS), *UNLIKE, waived=TOGETHER),
    "review": Taught(
        methods.review([("shallow", "low"), ("guided", "hint"), ("pooled", "last")]),
        Features(hints={"shallow": (6, 6, 3), "guided": (4, 4, 5), "pooled": (5,)}),
        Features(hints={"low": (6, 6, 4), "hint": (3, 3, 5), "last": (7,)}),
    ),
    "selectivity": Taught(
        methods.selectivity(PAIRS),
        Features(hints={"guided": (4, 4, 3)}),
        Features(hints={"hint": (8, 8, 5)}),
        least=2,
    ),
    "similarity_preserving": Taught(
        methods.similarity_preserving(PAIRS), *UNLIKE, waived=TOGETHER
    ),
    "simkd": Taught(
        methods.simkd(("guided", "hint")),
        Features(hints={"guided": (4, 4, 3)}),
        Features(
            hints={"hint": (8, 8, 5)},
            params={"classifier": {"kernel": (5, 10), "bias": (10,)}},
        ),
    ),
    "standardized_kd": Taught(methods.standardized_kd(), *OUTPUTS, least=3),
    "soft_targets": Taught(methods.soft_targets(), *OUTPUTS, least=2),
    "token_gram": Taught(
        methods.token_gram(PAIRS),
        Features(hints={"guided": (4, 6)}),
        Features(hints={"hint": (4, 9)}),
    ),
    "tinybert": Taught(
        methods.tinybert(PAIRS, [("scores", "attention")]),
        Features(hints={"guided": (4, 6), "scores": SCORES}),
        Features(hints={"hint": (4, 9), "attention": SCORES}),
        tied=True,
    ),
    "uncertain": Taught(
        uncertain(methods.fitnets(PAIRS)),
        Features(hints={"guided": (4, 4, 3)}),
        Features(hints={"hint": (2, 2, 5)}),
    ),
    "variational": Taught(
        methods.variational(PAIRS),
        Features(hints={"guided": (4, 4, 3)}),
        Features(hints={"hint": (8, 8, 5)}),
    ),
}
NEGATIVES = {"AnchorNegatives", "BatchNegatives", "GivenNegatives", "SharedNegatives"}
NOT_METHODS = NEGATIVES | {
    "crd_bytes",
    "explained_variance",
    "lambda_decay",
    "warm_up",
    "flows",
    "masked_channels",
    "masked_positions",
    "reused_classifier",
}

OF_METHODS = {"uncertain"}  # they make a method of any other

KEY = jax.random.key(0)


@pytest.fixture(params=METHODS)
def taught(request):
    row = METHODS[request.param]._replace(name=request.param)
    promise = request.function.__name__.removeprefix("test_")
    if promise in row.waived:
        pytest.skip(row.waived[promise])
    return row


def seen(row, size=4):
    """Random features of student and teacher, and the batch that they come from."""
    features = (
        random(shapes._replace(params={}), (size,), seed)._replace(
            params=random(shapes.params, (), seed)  # one for all examples
        )
        for seed, shapes in enumerate((row.student, row.teacher))
    )
    label = np.arange(size, dtype=np.int32) % 10
    return *features, {"label": label, "index": np.arange(size, dtype=np.int32)}


@functools.cache
def started(name):
    """A method's first parameters and memory, made for another batch size."""
    row = METHODS[name]
    shapes = jax.eval_shape(lambda: seen(row, size=6)[:2])
    data = Data(labels=np.arange(32, dtype=np.int32) % 10)
    return jax.jit(lambda key, data: row.method.init(key, *shapes, data))(KEY, data)


@functools.cache
def applied(name, train):
    """The method as stages apply it, compiled: the teacher is stopped."""
    method = METHODS[name].method

    def total(params, student, teacher, memory, batch, key, step):
        stopped = jax.lax.stop_gradient(teacher)
        context = Context(key, step, train)
        values, memory, metrics = method.apply(
            params, memory, student, stopped, batch, context
        )
        return values.sum(), (values, memory, metrics)

    chex.clear_trace_counter()  # chex counts by name, and these functions share one
    once = chex.assert_max_traces(total, n=1)
    return jax.jit(jax.grad(once, (0, 1, 2), has_aux=True))


def applied_to(row, student, teacher, batch, *, train=True, step=0):
    """Gradients (parameters, student, teacher) and values, memory, metrics."""
    params, memory = started(row.name)
    arguments = memory, batch, jax.random.fold_in(KEY, step), np.int32(step)
    return applied(row.name, train)(params, student, teacher, *arguments)


def test_every_method_has_a_row():
    assert set(METHODS) | NOT_METHODS == set(methods.__all__) | OF_METHODS


def test_a_method_names_what_it_wants(taught):
    for wants, shown in (
        (taught.method.student, taught.student),
        (taught.method.teacher, taught.teacher),
    ):
        assert wants.output == (shown.output is not None)
        assert set(wants.hints) == set(shown.hints)
        assert set(wants.params) == set(shown.params)


REDUCED = [name for name, row in METHODS.items() if row.method.reduced is not None]


@pytest.mark.parametrize("name", REDUCED)
def test_a_reduction_of_the_teacher_gives_a_method_the_same_values(name):
    row = METHODS[name]
    student, teacher, batch = jax.tree.map(jnp.asarray, seen(row))
    params, memory = started(name)
    found = reduced(row.method, jax.eval_shape(lambda: student))
    small = jax.jit(found.reduce)(teacher)
    own = jax.eval_shape(
        lambda key: found.method.init(key, student, small, None), jax.random.key(0)
    )
    assert own == jax.eval_shape(lambda: (params, memory))
    assert set(found.method.teacher.hints) == set(small.hints)
    context = Context(KEY, np.int32(0), True)
    got, want = (
        jax.jit(lambda *shown, of=method: of.apply(*shown, batch, context)[0])(
            params, memory, student, shown
        )
        for method, shown in ((found.method, small), (row.method, teacher))
    )
    assert_close(got, want, 1e-5)
    # One reduction may serve several terms, beside terms that have none.
    both = objective(first=row.method, second=row.method)
    again = jax.eval_shape(reduced(both, student).reduce, teacher)
    assert set(again.hints) == set(small.hints)


def test_a_method_gives_values_memory_and_metrics(taught):
    params, memory = started(taught.name)
    _, (values, after, metrics) = applied_to(taught, *seen(taught))
    assert isinstance(params, dict)
    assert isinstance(memory, dict)
    chex.assert_shape(values, (4,))
    chex.assert_type(values, jnp.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(memory, after)
    chex.assert_rank(list(metrics.values()), 0)
    chex.assert_tree_all_finite(jax.device_get((values, metrics)))


def test_a_method_teaches_the_student_and_never_the_teacher(taught):
    (params, student, teacher), _ = applied_to(taught, *seen(taught))
    assert largest(student) > 0
    assert not params or largest(params) > 0
    assert largest(teacher) == 0


def test_a_method_remembers_nothing_in_evaluation(taught):
    _, memory = started(taught.name)
    _, (_, after, _) = applied_to(taught, *seen(taught), train=False)
    chex.assert_trees_all_equal(*jax.device_get((memory, after)))


def test_a_method_is_traced_once(taught):
    for step in range(3):
        applied_to(taught, *seen(taught), step=step)


def test_a_method_does_not_mind_the_order_of_examples(taught):
    _, (values, _, _) = applied_to(taught, *seen(taught))
    order = np.array([2, 0, 3, 1])
    student, teacher, batch = seen(taught)
    turned = jax.tree.map(
        lambda x: x[order],
        (student._replace(params={}), teacher._replace(params={}), batch),
    )
    turned = (
        turned[0]._replace(params=student.params),
        turned[1]._replace(params=teacher.params),
        turned[2],
    )
    _, (got, _, _) = applied_to(taught, *turned)
    np.testing.assert_allclose(got, np.asarray(values)[order], rtol=1e-5)


def test_a_method_keeps_nan_to_its_example(taught):
    student, teacher, batch = seen(taught)
    for leaf in jax.tree.leaves(student._replace(params={})):
        leaf[1].flat[0] = np.nan
    _, (values, _, _) = applied_to(taught, student, teacher, batch, train=False)
    np.testing.assert_array_equal(np.isnan(values), np.arange(4) == 1)


@hypothesis.settings(max_examples=8, phases=ANEW)
@hypothesis.given(
    data=st.data(),
    dtype=st.sampled_from(["bfloat16", "float32", "float16"]),
    computed=st.sampled_from([True, False, False, False, False]),
)
def test_a_method_takes_any_sizes(taught, data, dtype, computed):
    """Regressors take their sizes from the features; most methods are only traced."""
    row = resized(taught, data.draw)
    student, teacher, batch = seen(row)
    student, teacher = (
        jax.tree.map(lambda x: x.astype(dtype), shown._replace(params={}))._replace(
            params=shown.params
        )
        for shown in (student, teacher)
    )
    shapes = jax.eval_shape(lambda: (student, teacher))
    batch |= {"label": np.zeros(4, np.int32)}  # the first of any number of classes

    @jax.jit
    def run(key, data, student, teacher, batch):
        params, memory = row.method.init(key, *shapes, data)

        def total(params, student):
            values, _, _ = row.method.apply(
                params, memory, student, teacher, batch, Context(key, 0, True)
            )
            return values.sum(), values

        return jax.grad(total, (0, 1), has_aux=True)(params, student)

    labels = Data(labels=np.arange(32, dtype=np.int32) % 10)
    with jax.numpy_dtype_promotion("standard"):  # Flax raises the hints itself
        inputs = KEY, labels, student, teacher, batch
        gradients, values = run(*inputs) if computed else jax.eval_shape(run, *inputs)
    chex.assert_shape(values, (4,))
    assert values.dtype == jnp.float32
    if computed:
        chex.assert_tree_all_finite(jax.device_get((gradients, values)))


def linear(shapes, seed):
    """A network whose hints are linear in its inputs, with the shapes of a row."""
    shown = {"output": (10,), **shapes.hints}
    kernels = {name: (3, math.prod(shape)) for name, shape in shown.items()}
    params = random({"kernels": kernels, "shown": shapes.params}, (), seed)

    def apply(params, state, inputs, *, wants, train, key=None):
        def show(name):
            y = inputs @ params["kernels"][name]
            return y.reshape(inputs.shape[0], *shown[name])

        hints = {name: show(name) for name in wants.hints}
        own = {name: params["shown"][name] for name in wants.params}
        return Features(show("output") if wants.output else None, hints, own), state

    return Network(None, apply, None), Variables(params, {})


@pytest.mark.parametrize("kind", ["hint", "distillation"])
def test_a_method_stands_in_both_stages(taught, kind):
    """The second stage also has the task and KD; each stage is compiled once."""
    if kind == "hint" and taught.method.student.output:
        pytest.skip("a hint stage has no outputs")
    (student, ours), (teacher, theirs) = (
        linear(shapes, seed)
        for seed, shapes in enumerate((taught.student, taught.teacher))
    )
    make, method = stages.hint_stage, taught.method
    if kind == "distillation":
        entropy = optax.softmax_cross_entropy_with_integer_labels
        make = stages.distillation_stage
        method = objective(own=method, kd=methods.kd(), task=task(entropy))
    batch = seen(taught)[2] | {"x": random((3,))}
    data, x = Data(labels=np.arange(32, dtype=np.int32) % 10), operator.itemgetter("x")

    def begun(make, method):
        stage = make(
            student, teacher, method, optax.adam(1e-3), inputs=x, teacher_inputs=x
        )
        carry = method.prepare and begun(stages.hint_stage, method.prepare)[1]
        return stage, stage.init(KEY, ours, theirs, batch, data, carry)

    def own(params):
        kernels = params["student"]["kernels"]
        yield params["regressors"]
        yield {path: kernels[path] for path in taught.method.student.hints}

    def update(state, theirs, batch):
        return stage.step(state, stage.teach(state, theirs, batch), batch)

    chex.clear_trace_counter()
    once = jax.jit(chex.assert_max_traces(update, n=1))
    with jax.numpy_dtype_promotion("standard"):  # Adam promotes
        stage, state = begun(make, method)
        before = jax.device_get(state.params)
        for _ in range(2):
            state, metrics = once(state, theirs, batch)
    after, metrics = jax.device_get((state.params, metrics))
    chex.assert_tree_all_finite((after, metrics))
    for trees in zip(own(after), own(before), strict=True):
        moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), *trees))
        assert any(moved) or not moved


def widened(leaf):
    wide = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.float64) if wide else leaf


def accumulated(name):
    """Parameters after an update from 1 and 2 micro-batches; SGD, float64.

    Both start from one state. That of two micro-batches is only traced.
    """
    row = METHODS[name]
    (student, ours), (teacher, theirs) = (
        linear(shapes, seed) for seed, shapes in enumerate((row.student, row.teacher))
    )
    batch = seen(row, size=8)[2] | {"x": random((3,), (8,)).astype(np.float64)}
    batch["where"] = np.arange(8) > 2  # a micro-batch has 2 that count, the other 3
    x, data = operator.itemgetter("x"), Data(np.arange(32, dtype=np.int32) % 10)

    def begun(method, count, run):
        stage = stages.distillation_stage(
            student,
            teacher,
            method,
            optax.sgd(0.1),
            inputs=x,
            teacher_inputs=x,
            accumulate=count,
        )
        carry = method.prepare and begun(method.prepare, count, run)[1]
        return stage, run(stage.init, KEY, ours, theirs, batch, data, carry)

    one, state = begun(row.method, 1, lambda init, *arguments: init(*arguments))
    two, traced = begun(row.method, 2, jax.eval_shape)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, traced)
    state, wide = jax.tree.map(widened, (state, theirs))
    for stage in one, two:
        start = jax.tree.map(jnp.copy, state)  # an update deletes what it is given
        yield jax.device_get(stage.update(start, wide, batch)[0].params)


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_give_a_method_the_same_update_or_it_is_said(name):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        one, two = accumulated(name)
    apart = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), one, two))
    said = f"`{name}`" in stages.distillation_stage.__doc__
    assert max(apart) > 1e-9 if said else max(apart) < 1e-12


def scoped(name, method):
    """The names of a method among others start with its own name."""

    def wants(of):
        return of._replace(
            hints=tuple(f"{name}.{path}" for path in of.hints),
            params=tuple(f"{name}.{path}" for path in of.params),
        )

    def own(shown, of):
        return shown._replace(
            hints={path: shown.hints[f"{name}.{path}"] for path in of.hints},
            params={path: shown.params[f"{name}.{path}"] for path in of.params},
        )

    def both(student, teacher):
        return own(student, method.student), own(teacher, method.teacher)

    def init(key, student, teacher, data):
        return method.init(key, *both(student, teacher), data)

    def apply(params, memory, student, teacher, batch, context):
        return method.apply(params, memory, *both(student, teacher), batch, context)

    return Method(wants(method.student), wants(method.teacher), init, apply)


def together(sides):
    """One network with the features of all rows, each from its own weights."""
    hints, params = {}, {}
    for name, shapes in sides.items():
        hints |= {f"{name}.{path}": shape for path, shape in shapes.hints.items()}
        params |= {f"{name}.{path}": shape for path, shape in shapes.params.items()}
    return Features(output=(10,), hints=hints, params=params)


@pytest.mark.long
def test_every_method_gives_eight_devices_the_numbers_of_one():
    """All methods are in one step, which is compiled once for each placement.

    Each has its own weights. In float64, because devices sum in another order.
    """
    (student, ours), (teacher, theirs) = (
        linear(together(sides), seed)
        for seed, sides in enumerate(
            {name: getattr(row, side) for name, row in METHODS.items()}
            for side in ("student", "teacher")
        )
    )
    batch = {
        "x": random((3,), (16,)).astype(np.float64),
        "label": np.arange(16, dtype=np.int32) % 10,
        "index": np.arange(16, dtype=np.int32),
        "where": np.arange(16) % 5 > 0,
    }
    x, data = operator.itemgetter("x"), Data(np.arange(32, dtype=np.int32) % 10)

    def run(layout):
        stage = stages.distillation_stage(
            student,
            teacher,
            objective(**{n: scoped(n, row.method) for n, row in METHODS.items()}),
            optax.sgd(1e-3),
            inputs=x,
            teacher_inputs=x,
            mesh=layout,
        )
        state = jax.tree.map(widened, stage.init(KEY, ours, theirs, batch, data))
        reported = []
        for _ in range(2):
            state, metrics = stage.update(state, widened_theirs, batch)
            reported.append(metrics)
        return jax.device_get((state.params, state.memory, reported))

    fsdp = sharding.Layout(sharding.make_mesh(data=2, fsdp=4), at_least=16)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        widened_theirs = jax.tree.map(widened, theirs)
        one, *others = map(run, (None, sharding.Layout(sharding.make_mesh()), fsdp))
    for got in others:
        chex.assert_trees_all_close(got, one, rtol=1e-12, atol=1e-12)
    before, after = ours.params["kernels"], one[0]["student"]["kernels"]
    still = {name for name in before if np.array_equal(before[name], after[name])}
    assert still == {"paraphrase.guided"}  # it trains on the teacher alone
