"""Methods for transformers: their losses, padded tokens, and both kinds of stage."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax import losses
from hintjax.method import Context
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
CONTEXT = Context(KEY, jnp.int32(0), True)
HIDDEN = [("s1", "t1"), ("s2", "t2")]
SCORES = [("s3", "t3"), ("s4", "t4")]
SHAPES = {"1": (5, 6), "2": (5, 6), "3": (2, 5, 5), "4": (2, 5, 5)}
TOKENS = np.arange(5) < np.array([[5], [3], [1], [4]])  # True where a token counts


def features(side, seed, **shapes):
    generator = np.random.default_rng(seed)
    return Features(
        hints={
            side + name: jnp.array(generator.normal(size=(4, *shape)), jnp.float32)
            for name, shape in (SHAPES | shapes).items()
        }
    )


STUDENT, TEACHER = features("s", 0), features("t", 1)


def relations(student, teacher, where):
    return losses.relation_loss(student, teacher, heads=2, where=where)


def patients(student, teacher, where):
    return losses.patient_loss(student[:, 0], teacher[:, 0])


# Of each method: how it is made, and what it is the sum of, (loss, pairs).
TERMS = {
    "cosine": (
        lambda **k: hj.cosine(HIDDEN, **k),
        {"hidden": (losses.cosine_loss, HIDDEN)},
    ),
    "minilm": (
        lambda **k: hj.minilm(HIDDEN, SCORES, heads=2, **k),
        {
            "relation": (relations, HIDDEN),
            "attention": (losses.attention_distribution_loss, SCORES),
        },
    ),
    "minilm without attention": (
        lambda **k: hj.minilm(HIDDEN, heads=2, **k),
        {"relation": (relations, HIDDEN)},
    ),
    "patient": (
        lambda padding=None: hj.patient(HIDDEN),
        {"hidden": (patients, HIDDEN)},
    ),
    "tinybert of attention": (
        lambda **k: hj.tinybert([], SCORES, **k),
        {"attention": (losses.attention_score_loss, SCORES)},
    ),
}


def apply(method, batch, params=None, memory=None, student=STUDENT, teacher=TEACHER):
    run = jax.jit(lambda *a: method.apply(*a, CONTEXT))
    return run(params or {}, memory or {}, student, teacher, batch)


def begun(method, teacher=TEACHER):
    return jax.jit(lambda key: method.init(key, STUDENT, teacher, None))(KEY)


@pytest.mark.parametrize("padding", [None, "mask"])
@pytest.mark.parametrize("name", TERMS)
def test_the_values_are_the_losses_summed_over_pairs(name, padding):
    make, terms = TERMS[name]
    where = None if padding is None else jnp.array(TOKENS)
    batch = {} if padding is None else {"mask": where}
    values, memory, metrics = apply(make(padding=padding), batch)
    # A program for each loss: its operations alone would be one each.
    parts = {
        term: sum(
            np.asarray(jax.jit(loss)(STUDENT.hints[s], TEACHER.hints[t], where=where))
            for s, t in pairs
        )
        for term, (loss, pairs) in terms.items()
    }
    np.testing.assert_allclose(values, sum(parts.values()), rtol=1e-5)
    assert memory == {}
    for metric, value in metrics.items():
        np.testing.assert_allclose(value, parts[metric].mean(), rtol=1e-5)


def test_tinybert_has_one_regressor_for_all_hidden_states():
    method = hj.tinybert(HIDDEN, SCORES, padding="mask")
    teacher = features("t", 1, **{"1": (5, 9), "2": (5, 9)})
    params, memory = begun(method, teacher)
    kernel, bias = sorted(jax.tree.leaves(params), key=lambda x: -x.ndim)
    assert (kernel.shape, bias.shape) == ((6, 9), (9,))
    where = jnp.array(TOKENS)
    values, _, metrics = apply(
        method, {"mask": where}, params, memory, STUDENT, teacher
    )
    hint_loss, score_loss = map(
        jax.jit, (losses.hint_loss, losses.attention_score_loss)
    )
    ours, theirs, kernel = jax.device_get((STUDENT.hints, teacher.hints, kernel))
    hidden = sum(
        np.asarray(hint_loss(ours[s] @ kernel, theirs[t], where=where))
        for s, t in HIDDEN
    )
    scores = sum(
        np.asarray(score_loss(ours[s], theirs[t], where=where)) for s, t in SCORES
    )
    assert not np.any(bias)
    np.testing.assert_allclose(values, hidden + scores, rtol=1e-5)
    np.testing.assert_allclose(metrics["hidden"], hidden.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["attention"], scores.mean(), rtol=1e-5)


def test_tinybert_refuses_hidden_states_of_two_widths():
    student = features("s", 0, **{"2": (5, 7)})
    with pytest.raises(ValueError, match="tinybert: .*one shape, got .*5, 7"):
        hj.tinybert(HIDDEN).init(KEY, student, TEACHER, None)


def test_minilm_puts_heads_one_after_another():
    student = features("s", 0, **{"1": (5, 3, 2)})
    flat = Features(hints={"s1": student.hints["s1"].reshape(4, 5, 6)})
    method = hj.minilm(HIDDEN[:1], heads=2)
    got, *_ = apply(method, {}, student=student)
    want, *_ = apply(method, {}, student=flat)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("token", [1, -1])
def test_patient_takes_the_token_it_is_told(token):
    values, *_ = apply(hj.patient(HIDDEN[:1], token=token), {})
    pair = jax.device_get((STUDENT.hints["s1"], TEACHER.hints["t1"]))
    pair = [x[:, token] for x in pair]
    want = jax.jit(losses.patient_loss)(*pair)
    np.testing.assert_allclose(values, want, rtol=1e-6)


@pytest.mark.parametrize("token", [5, -6])
def test_patient_refuses_a_token_that_is_not_there(token):
    with pytest.raises(ValueError, match=f"patient: .*token at {token}, got 5 tokens"):
        apply(hj.patient(HIDDEN[:1], token=token), {})


PADDED = {
    "cosine": lambda: hj.cosine(HIDDEN, padding="mask"),
    "fitnets": lambda: hj.fitnets(HIDDEN, padding="mask"),
    "minilm": lambda: hj.minilm(HIDDEN, SCORES, heads=2, padding="mask"),
    "tinybert": lambda: hj.tinybert(HIDDEN, SCORES, padding="mask"),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_reaches_nothing(name):
    """Neither what stands at padded tokens, nor the examples that fill up a batch."""
    method = PADDED[name]()
    params, memory = begun(method)
    where = np.array([True, True, False, True])
    counts = TOKENS & where[:, None]

    def broken(x):
        if x.ndim == 3:
            return np.where(counts[..., None], x, np.float32(np.nan))
        pairs = counts[:, :, None] & counts[:, None, :]
        return np.where(pairs[:, None], x, np.float32(np.nan))

    batch = {"mask": jnp.array(TOKENS), "where": jnp.array(where)}
    want, _, metrics = apply(method, batch, params, memory)
    hidden = (jax.tree.map(broken, x) for x in (STUDENT, TEACHER))
    got, _, others = apply(method, batch, params, memory, *hidden)
    got, others, metrics = jax.device_get((got, others, metrics))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got[2] == 0
    chex.assert_trees_all_close(metrics, others, rtol=1e-5)
    alone, *_ = apply(method, {"mask": jnp.array(TOKENS)}, params, memory)
    np.testing.assert_allclose(got[where], np.asarray(alone)[where], rtol=1e-6)
    everything, *_ = apply(method, {"mask": jnp.ones((4, 5), bool)}, params, memory)
    assert np.all(np.abs(got - everything)[1:] > 1e-3)


@pytest.mark.parametrize("name", PADDED)
def test_a_mask_that_is_missing_or_no_mask_is_refused(name):
    method = PADDED[name]()
    params, memory = begun(method)
    with pytest.raises(ValueError) as error:
        apply(method, {"label": jnp.zeros(4)}, params, memory)
    assert str(error.value) == (
        f"{name}: expected 'mask' in the batch, got ['label']. Pass the name of "
        "the mask of valid positions as padding=."
    )
    for mask in jnp.ones((4, 5), jnp.int32), jnp.ones(4, bool):
        with pytest.raises(
            ValueError, match=rf"{name}: .*bool \(batch, \*positions\), got"
        ):
            apply(method, {"mask": mask}, params, memory)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hj.tinybert([]), "tinybert: expected at least one pair"),
        (lambda: hj.minilm([], heads=2), "minilm: expected at least one pair"),
        (lambda: hj.patient([]), "patient: expected at least one pair"),
        (lambda: hj.cosine([]), "cosine: expected at least one pair"),
        (lambda: hj.minilm(HIDDEN, heads=0), "minilm: expected heads to be an integer"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# In their stages, on a transformer


class Attention(nn.Module):
    """Two heads that do not see padded keys; its scores are shown without the mask."""

    width: int

    @nn.compact
    def __call__(self, x, mask):
        query, key, value = (
            nn.DenseGeneral((2, self.width // 2), name=name)(x)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bihd,bjhd->bhij", query, key) / (self.width / 2) ** 0.5
        self.sow("intermediates", "scores", scores)
        chosen = nn.softmax(jnp.where(mask[:, None, None, :], scores, -1e9))
        together = jnp.einsum("bhij,bjhd->bihd", chosen, value)
        return x + nn.DenseGeneral(self.width, (-2, -1), name="out")(together)


class Transformer(nn.Module):
    """Tokens in, classes out of the first of them."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, inputs):
        tokens, mask = inputs
        x = nn.Embed(11, self.width, name="embed")(tokens)
        for i in range(self.depth):
            x = Attention(self.width, name=f"attention{i}")(x, mask)
            x = x + nn.Dense(self.width, name=f"mlp{i}")(nn.gelu(x))
        return nn.Dense(3, name="head")(x[:, 0])


PARTS = [(f"attention0/{part}", f"attention1/{part}") for part in ("query", "value")]
ATTENTION = [("attention0/scores", "attention1/scores")]
STATES = [("embed", "embed"), ("attention0", "attention1")]


def terms(narrow):
    """All methods; those that need one width only if the student is not narrow."""
    chosen = {
        "tinybert": hj.tinybert(STATES, ATTENTION, padding="mask"),
        "minilm": hj.weighted(
            hj.minilm(PARTS, ATTENTION, heads=4, padding="mask"), 100.0
        ),
        "hints": hj.fitnets(STATES, padding="mask"),
    }
    if not narrow:
        chosen |= {
            "patient": hj.weighted(hj.patient(STATES), 10.0),
            "cosine": hj.cosine(STATES[1:], padding="mask"),
        }
    return chosen


@pytest.mark.parametrize("kind", ["hint", "distillation"])
def test_a_transformer_learns_from_another_and_never_from_padding(kind):
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 11, (4, 5)).astype(np.int32)
    batch = {
        "tokens": jnp.array(np.where(TOKENS, tokens, 0)),
        "mask": jnp.array(TOKENS),
    }
    other = batch | {"tokens": jnp.array(np.where(TOKENS, tokens, 7))}

    def inputs(batch):
        return batch["tokens"], batch["mask"]

    narrow = kind == "distillation"
    student = hj.linen(Transformer(8 if narrow else 16, 1))
    teacher = hj.linen(Transformer(16, 2))
    ours = jax.jit(student.init)(jax.random.key(0), inputs(batch))
    theirs = jax.jit(teacher.init)(jax.random.key(1), inputs(batch))
    chosen = terms(narrow)
    if kind == "distillation":
        chosen["kd"] = hj.weighted(hj.kd(), 10.0)
    make = hj.hint_stage if kind == "hint" else hj.distillation_stage
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        stage = make(
            student,
            teacher,
            hj.objective(**chosen),
            optax.adam(1e-2),
            inputs=inputs,
            teacher_inputs=inputs,
        )
        state = stage.init(KEY, ours, theirs, batch)
        copy = jax.tree.map(jnp.copy, state)
        after, metrics = stage.update(state, theirs, batch)
        _, same = stage.update(copy, theirs, other)
        chex.assert_trees_all_close(*jax.device_get((metrics, same)), rtol=1e-5)
        for _ in range(60):
            after, last = stage.update(after, theirs, batch)
    chex.assert_tree_all_finite(jax.device_get((after.params, last)))
    for name in chosen:
        assert last[name] < metrics[name], name
