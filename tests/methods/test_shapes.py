"""Layers that cannot work are refused by name before any loss; masks reach the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax as hj
from hintjax import losses, regressors
from hintjax.method import Context
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

PAIRS = [("guided", "hint")]
KEY = jax.random.key(0)
CONTEXT = Context(KEY, jnp.int32(0), True)
DATA = hj.Data(np.arange(12, dtype=np.int32) % 3)
NORM = {"hint": {"scale": jnp.ones(5), "bias": jnp.zeros(5)}}

ANY = {  # they read all features of an example, whatever their axes
    "correlation_congruence": hj.correlation_congruence(PAIRS),
    "crd": hj.crd(PAIRS[0], negatives=hj.BatchNegatives()),
    "probability_transfer": hj.probability_transfer(PAIRS),
    "relational": hj.relational(PAIRS),
    "similarity_preserving": hj.similarity_preserving(PAIRS),
}
REGRESSED = {
    "activation_boundary": hj.activation_boundary(PAIRS),
    "fitnets": hj.fitnets(PAIRS),
    "overhaul": hj.overhaul(PAIRS),
    "variational": hj.variational(PAIRS),
}
MAPS = {
    "attention_transfer": hj.attention_transfer(PAIRS),
    "channel_wise": hj.channel_wise(PAIRS),
    "class_attention": hj.class_attention(PAIRS[0], None),
    "fsp": hj.fsp([(("guided", "guided"), ("hint", "hint"))]),
    "selectivity": hj.selectivity(PAIRS),
    "token_gram": hj.token_gram(PAIRS),
}
ALIKE = {"cosine": hj.cosine(PAIRS)}
ALL = ANY | REGRESSED | MAPS | ALIKE


def shown(guided, hint):
    """The features of both networks, as shapes."""
    ours, theirs = (
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (guided, hint)
    )
    return Features(hints={"guided": ours}), Features({}, {"hint": theirs}, NORM)


def begun(name, student, teacher):
    """What `init` gives, as shapes: nothing is compiled."""
    return jax.eval_shape(lambda key: ALL[name].init(key, student, teacher, DATA), KEY)


def refused(name, guided, hint, batch=None):
    """The sentence of `init`, or of `apply` for a batch."""
    method = ALL[name]
    with pytest.raises(hj.Refusal) as error:
        if batch is None:
            method.init(KEY, *shown(guided, hint), DATA)
        else:
            jax.eval_shape(
                lambda s, t: method.apply({}, {}, s, t, batch, CONTEXT),
                *shown(guided, hint),
            )
    sentence = str(error.value)
    start = f"{name}: expected guided (student) and hint (teacher) to "
    assert sentence.startswith(start), sentence
    assert f", got {guided} and {hint}. " in sentence
    return sentence


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(), (4,)])
def test_layers_without_channels_are_refused(name, shape):
    for shapes in (shape, (4, 6, 6, 5)), ((4, 6, 6, 5), shape):
        refused(name, *shapes)


@pytest.mark.parametrize("name", ALL)
def test_another_batch_is_refused(name):
    assert "batch as their first axis" in refused(name, (6, 4, 5), (4, 6, 5))


@pytest.mark.parametrize("name", ALL)
def test_time_first_in_both_networks_is_refused_before_the_loss(name):
    batch = {"x": jnp.zeros((4, 2)), "label": jnp.zeros(4, jnp.int32)}
    sentence = refused(name, (6, 4, 5), (6, 4, 5), batch)
    assert "to have the batch of 4 as their first axis" in sentence
    assert "hintjax.viewed" in sentence


@pytest.mark.parametrize("name", MAPS)
def test_vectors_and_maps_of_other_axes_are_refused(name):
    assert "one or more positions axes" in refused(name, (4, 5), (4, 5))
    assert "same number of axes" in refused(name, (4, 36, 5), (4, 6, 6, 5))


def test_other_sizes_are_refused_where_nothing_stands_between():
    assert "same shape" in refused("cosine", (4, 3, 5), (4, 6, 5))
    assert "same positions" in refused("token_gram", (4, 3, 5), (4, 6, 5))


@pytest.mark.parametrize(
    ("make", "regressor"),
    [
        (hj.fitnets, regressors.identity),
        (hj.channel_wise, regressors.identity),
        (hj.variational, regressors.linear),
        (hj.activation_boundary, regressors.linear),
    ],
)
def test_a_regressor_that_does_not_fit_names_the_pair(make, regressor):
    features = shown((4, 3, 5), (4, 6, 5))
    with pytest.raises(hj.Refusal, match=r"^guided->hint: regressors\..*: expected"):
        make(PAIRS, regressor=regressor).init(KEY, *features, DATA)


@pytest.mark.parametrize("name", ANY)
def test_layers_of_any_axes_are_taken(name):
    begun(name, *shown((4, 5), (4, 6, 6, 7)))


@pytest.mark.parametrize("name", ["attention_transfer", "selectivity", "fsp"])
@pytest.mark.parametrize(
    "sizes", [((6,), (3,)), ((6, 4), (3, 5)), ((4, 4, 2), 3 * (3,))]
)
def test_maps_of_any_rank_and_size_are_taken(name, sizes):
    shapes = shown(*((4, *size, 5) for size in sizes))
    begun(name, *shapes)
    values, *_ = jax.eval_shape(
        lambda s, t: ALL[name].apply({}, {}, s, t, {}, CONTEXT), *shapes
    )
    assert values.shape == (4,)


GRID = (3, 2)
WHERE = np.array([[[1, 1], [1, 1], [1, 1]], [[1, 0], [0, 0], [0, 0]]], bool)
WHERE = np.concatenate([WHERE, ~WHERE[1:], ~WHERE[:1]])  # the last example has none


def flow(student, teacher, where):
    return losses.fsp_loss((student, student), (teacher, teacher), where=where)


def varied(student, teacher, where):
    scale = jnp.full(5, jnp.log(jnp.expm1(5.0 - 1e-5)))
    return losses.variational_loss(student, teacher, scale=scale, where=where)


MASKED = {
    "attention_transfer": (
        functools.partial(hj.attention_transfer, PAIRS),
        losses.attention_transfer_loss,
    ),
    "channel_wise": (functools.partial(hj.channel_wise, PAIRS), losses.channel_loss),
    "cosine": (functools.partial(hj.cosine, PAIRS), losses.cosine_loss),
    "fitnets": (
        functools.partial(hj.fitnets, PAIRS, regressor=regressors.identity),
        losses.hint_loss,
    ),
    "fsp": (
        functools.partial(hj.fsp, [(("guided", "guided"), ("hint", "hint"))]),
        flow,
    ),
    "selectivity": (functools.partial(hj.selectivity, PAIRS), losses.selectivity_loss),
    "similarity_preserving": (
        functools.partial(hj.similarity_preserving, PAIRS),
        losses.similarity_loss,
    ),
    "token_gram": (functools.partial(hj.token_gram, PAIRS), losses.token_gram_loss),
    "variational": (
        functools.partial(hj.variational, PAIRS, regressor=regressors.identity),
        varied,
    ),
}


def drawn(hidden=None):
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=(4, *GRID, 5)).astype(np.float32) for _ in "st"]
    if hidden is not None:
        arrays = [np.where(WHERE[..., None], x, np.float32(hidden)) for x in arrays]
    return arrays


@pytest.mark.parametrize("name", MASKED)
def test_padding_reaches_the_loss_and_hides_what_is_masked(name):
    make, loss = MASKED[name]
    method = make(padding="mask")

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(student, teacher):
        features = (
            Features(hints={"guided": student}),
            Features(hints={"hint": teacher}),
        )
        params, memory = method.init(KEY, *features, None)
        batch = {"mask": jnp.asarray(WHERE)}
        values, *_ = method.apply(params, memory, *features, batch, CONTEXT)
        return values.sum(), values

    gradient, values = run(*drawn())
    want = jax.jit(loss)(*drawn(), where=WHERE)
    np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-7)
    assert np.asarray(values)[3] == 0
    for hidden in (np.nan, np.inf):
        again, same = run(*drawn(hidden))
        np.testing.assert_array_equal(same, values)
        np.testing.assert_array_equal(again, gradient)


def test_attention_transfer_takes_the_codes_signs():
    student, teacher = map(jnp.asarray, drawn())
    method = hj.attention_transfer(PAIRS, power=3, attention=losses.attention_map_code)
    features = Features(hints={"guided": student}), Features(hints={"hint": teacher})
    values, *_ = jax.jit(lambda *a: method.apply({}, {}, *a, {}, CONTEXT))(*features)
    loss = jax.jit(
        losses.attention_transfer_loss, static_argnames=("power", "attention")
    )
    want = loss(student, teacher, power=3, attention=losses.attention_map_code)
    np.testing.assert_allclose(values, want, rtol=1e-6)
    unsigned = np.asarray(loss(student, teacher, power=3))
    assert np.all(np.abs(unsigned - want) > 1e-3)


@pytest.mark.parametrize("name", ANY)
def test_too_few_examples_to_compare_are_refused_in_the_first_batch_alone(name):
    """Their loss is 0 and the student would not move; a last batch may be small."""
    least = 3 if name == "relational" else 2
    words = f"{least} examples or more, got"
    assert words in refused(name, (least - 1, 5), (least - 1, 5))
    student, teacher = shown((least, 5), (least, 5))
    params, memory = begun(name, student, teacher)
    small, batch = shown((1, 5), (1, 5)), {"label": jnp.zeros(1, int)}
    small = small if name != "crd" else (student, teacher)
    batch = batch if name != "crd" else {"label": jnp.zeros(least, int)}
    jax.eval_shape(
        lambda *a: ALL[name].apply(*a, batch, CONTEXT)[0], params, memory, *small
    )


@pytest.mark.parametrize("name", ["attention_transfer", "channel_wise", "selectivity"])
def test_one_position_is_refused_where_positions_are_compared(name):
    """A softmax or a normalized map over one position is constant."""
    for shape in ((2, 1, 5), (2, 1, 1, 5)):
        assert "two positions or more" in refused(name, shape, shape)


def test_one_channel_has_no_direction():
    assert "two channels or more" in refused("cosine", (2, 4, 1), (2, 4, 1))
    student, teacher = shown((2, 4, 1), (2, 4, 1))
    with pytest.raises(hj.Refusal, match="patient: .* two channels or more"):
        hj.patient(PAIRS).init(KEY, student, teacher, None)
