"""CRD's bank, split by rows over 8 devices: its placement and the cost of a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import hintjax as hj
from hintjax import memory
from hintjax.method import Context
from hintjax.sharding import make_mesh, over_batch, replicated

KEY = jax.random.key(0)
BATCH, NEGATIVES, SIZE, WIDTH = 64, 8192, 50_000, 128


@pytest.mark.quick
def test_rows_that_do_not_divide_are_filled_up():
    mesh = make_mesh(data=2, fsdp=4)
    plain, split = memory.init(KEY, 37, 6), memory.init(KEY, 37, 6, mesh)
    for name in ("student", "teacher"):
        rows = getattr(split, name)
        assert rows.shape == (40, 6)
        np.testing.assert_array_equal(rows[:37], getattr(plain, name))
        np.testing.assert_array_equal(rows[37:], 0)
    assert memory.init(KEY, 40, 6, mesh).student.shape == (40, 6)
    where = memory.split_rows(split, mesh)
    assert where.student == where.teacher == PartitionSpec(("data", "fsdp"))
    assert where.student_constant == where.teacher_constant == PartitionSpec()


@pytest.mark.quick
def test_without_a_bank_there_is_nothing_to_split():
    with pytest.raises(ValueError, match="crd: expected mesh only with negatives that"):
        hj.crd(("a", "b"), negatives=hj.BatchNegatives(), mesh=make_mesh())


ROWS = 512


def banks_and_batch(batch, among):
    """The same bank whole and split, and a batch from its first examples."""
    generator = np.random.default_rng(0)
    index = jnp.asarray(generator.integers(0, among, batch), jnp.int32)
    embeddings = jnp.asarray(generator.normal(size=(2, batch, 6)), jnp.float32)
    mesh = make_mesh(data=2, fsdp=4)
    plain, split = memory.init(KEY, ROWS, 6), memory.init(KEY, ROWS, 6, mesh)
    return mesh, plain, split, index, embeddings


def assert_alike(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


@pytest.mark.quick
@pytest.mark.parametrize("among", [ROWS, 40])
def test_rows_are_found_and_written_however_a_batch_is_spread(among):
    """If one device holds all examples, those without room are sent in a later turn."""
    mesh, plain, split, index, (s, t) = banks_and_batch(256, among)
    where = jnp.arange(256) % 3 > 0

    @jax.jit
    def by_rows(split, index):
        after = memory.update(split, index, s, t, where=where, mesh=mesh)
        return memory.batch_rows(split, index, mesh=mesh), after

    found, after = by_rows(split, index)
    assert_alike(found, memory.batch_rows(plain, index))
    assert_alike(after, memory.update(plain, index, s, t, where=where))


@pytest.mark.quick
@pytest.mark.parametrize("batch", [8, 128])
@pytest.mark.parametrize("good", [True, False])
def test_a_bad_step_is_undone_where_rows_live(batch, good):
    """The batch is much smaller than a device's rows, or larger."""
    mesh, plain, split, index, (s, t) = banks_and_batch(batch, ROWS)

    @jax.jit
    def by_rows(split, index):
        after = memory.update(split, index, s, t, mesh=mesh)
        return memory.select(jnp.asarray(good), after, split, index, mesh=mesh)

    assert_alike(
        by_rows(split, index), memory.update(plain, index, s, t) if good else plain
    )


@pytest.mark.quick
def test_what_is_not_in_the_bank_scores_nothing():
    mesh, plain, split, index, (s, _) = banks_and_batch(16, ROWS)
    asked = jnp.stack([index, jnp.full_like(index, -1), jnp.full_like(index, ROWS)], 1)
    got = memory.scores_by_rows(s, split.teacher, asked, mesh=mesh)
    want = jnp.sum(s * plain.teacher[index], -1)
    np.testing.assert_allclose(got[:, 0], want, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got[:, 1:], 0)


def temporary_bytes(mesh, method, split):
    """The memory of one step of CRD alone with its gradients, on each device."""
    hints = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    student, teacher = (hj.Features(hints={name: hints}) for name in ("a", "b"))
    labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    data = jax.ShapeDtypeStruct((SIZE,), jnp.int32)

    def init(labels):
        return method.init(KEY, student, teacher, hj.Data(labels))

    def step(params, memory, student, teacher, batch):
        def loss(params, student):
            context = Context(KEY, jnp.zeros((), jnp.int32), True)
            values, after, _ = method.apply(
                params, memory, student, teacher, batch, context
            )
            return values.mean(), after

        return jax.grad(loss, (0, 1), has_aux=True)(params, student)

    params, bank = jax.eval_shape(init, data)
    everywhere, parts = replicated(mesh), over_batch(mesh)
    homes = jax.tree.map(lambda _: everywhere, bank)
    if split:
        rows = NamedSharding(mesh, PartitionSpec("data"))
        homes["bank"] = homes["bank"]._replace(student=rows, teacher=rows)
    jitted = jax.jit(
        step,
        in_shardings=(everywhere, homes, parts, parts, parts),
        out_shardings=((everywhere, parts), homes),
        donate_argnums=1,
    )
    batch = {"label": labels, "index": labels}
    compiled = jitted.lower(params, bank, student, teacher, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_split_bank_takes_an_eighth_of_a_gather_or_less():
    """Compares its memory with two gathers: from whole banks, and from split rows.

    For split rows, the partitioner sends whole rows to all devices.
    """
    mesh, kind = make_mesh(), hj.AnchorNegatives(NEGATIVES)
    pair = ("a", "b")
    by_rows = hj.crd(pair, negatives=kind, feature_dim=WIDTH, mesh=mesh)
    plain = hj.crd(pair, negatives=kind, feature_dim=WIDTH)
    ours = temporary_bytes(mesh, by_rows, split=True)
    assert 8 * ours <= temporary_bytes(mesh, plain, split=False)
    assert 8 * ours <= temporary_bytes(mesh, plain, split=True)
