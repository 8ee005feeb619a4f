"""Transformers: sizes as published, hint paths, and what the layers compute."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax import models, pairing

DIGITS = (8, 8, 1)
ATTENTION = ("query", "key", "value", "scores", "distribution")


def shapes(model, inputs):
    """Of all parameters and, by path, of one example's activations; nothing runs."""
    network = hj.linen(model)
    variables = jax.eval_shape(network.init, jax.random.key(0), inputs)
    layers = network.layers(*variables, inputs)
    return variables.params, {path: layer.shape[1:] for path, layer in layers.items()}


def images(*shape):
    return jax.ShapeDtypeStruct((2, *shape), jnp.float32)


def texts(n):
    ids = jax.ShapeDtypeStruct((2, n), jnp.int32)
    return {"tokens": ids, "mask": jax.ShapeDtypeStruct((2, n), jnp.bool)}


def count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("model", "inputs", "size"),
    [
        (models.vit_micro(10), images(*DIGITS), 51_946),
        (models.vit_mini(10), images(28, 28, 1), 205_066),
        (models.vit_tiny(10), images(32, 32, 3), 5_362_762),
        (models.vit_small(10), images(32, 32, 3), 21_342_346),
        # DeiT-Ti and its distilled form, as their authors have them.
        (models.vit_tiny(1000, patch=16), images(224, 224, 3), 5_717_416),
        (
            models.vit_tiny(1000, patch=16, distillation=True),
            images(224, 224, 3),
            5_910_800,
        ),
        (models.encoder_tiny(2), texts(16), 4_369_410),
        (models.encoder_mini(2), texts(16), 11_104_770),
        (models.encoder_small(2), texts(16), 28_500_994),
    ],
)
def test_sizes(model, inputs, size):
    assert count(shapes(model, inputs)[0]) == size


@pytest.mark.quick
@pytest.mark.parametrize("distillation", [False, True])
def test_the_hint_paths_of_a_vision_transformer(distillation):
    model = models.vit_micro(10, distillation=distillation)
    _, layers = shapes(model, images(*DIGITS))
    n = 4 * 4 + 1 + distillation
    assert layers["embed/patches"] == (4, 4, 32)
    for path in ("embed", "block1", "block4", "norm"):
        assert layers[path] == (n, 32)
    for path in ("norm1", "attention", "sum", "norm2", "mlp"):
        assert layers[f"block2/{path}"] == (n, 32)
    assert layers["block2/mlp/hidden"] == (n, 128)
    parts = [layers[f"block2/attention/{path}"] for path in ATTENTION]
    assert parts == 3 * [(n, 2, 16)] + 2 * [(2, n, n)]
    vectors = {path: shape for path, shape in layers.items() if len(shape) == 1}
    aside = {"distillation_token": (32,), "distillation_classifier": (10,)}
    want = {"token": (32,), "classifier": (10,), ":out": (10,)}
    assert vectors == (aside | want if distillation else want)
    structs = {path: images(*shape) for path, shape in layers.items()}
    assert pairing.head(structs) == ("token", "classifier")


@pytest.mark.quick
def test_the_hint_paths_of_an_encoder():
    _, layers = shapes(models.encoder_tiny(2), texts(7))
    for path in ("embed", "embed/words", "block1", "block2", "block1/norm1"):
        assert layers[path] == (7, 128)
    assert layers["block1/attention"] == layers["block1/mlp"] == (7, 128)
    assert layers["block1/mlp/hidden"] == (7, 512)
    parts = [layers[f"block1/attention/{path}"] for path in ATTENTION]
    assert parts == 3 * [(7, 2, 64)] + 2 * [(2, 7, 7)]
    structs = {path: images(*shape) for path, shape in layers.items()}
    assert pairing.head(structs) == ("token", "classifier")


# What the layers compute, against the formulas in numpy


def run(model, inputs):
    """Output, activations by path and parameters, of weights drawn by numpy."""
    network = hj.linen(model)
    params, state = jax.eval_shape(network.init, jax.random.key(0), inputs)
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: generator.normal(0.1, 0.3, leaf.shape).astype(np.float32), params
    )
    paths = tuple(network.layers(params, state, inputs))
    wants = hj.Wants(output=True, hints=paths)

    @jax.jit
    def apply(params, inputs):
        return network.apply(params, state, inputs, wants=wants, train=False)[0]

    seen = jax.tree.map(np.float64, apply(params, inputs))
    return seen.output, seen.hints, jax.tree.map(np.float64, params), apply


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def normed(x, p, epsilon):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def attended(x, p, where=None):
    """Scores and output of two heads, head by head."""
    scores, out = [], p["out"]["bias"]
    for head in range(2):
        query, key, value = (
            x @ p[name]["kernel"][:, head] + p[name]["bias"][head]
            for name in ("query", "key", "value")
        )
        score = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
        scores.append(score)
        if where is not None:
            score = np.where(where[:, None, :], score, -np.inf)
        out = out + softmax(score) @ value @ p["out"]["kernel"][head]
    return np.stack(scores, 1), out


def perceptron(x, p):
    hidden = dense(x, p["hidden"])
    erf = np.vectorize(math.erf)(hidden / np.sqrt(2))
    return dense(hidden * (1 + erf) / 2, p["out"])


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_vision_transformer_is_its_formula():
    model = models.VisionTransformer(2, 8, 1, 2, 3, distillation=True)
    x = np.random.default_rng(1).normal(size=(2, 4, 6, 3)).astype(np.float32)
    output, hints, p, _ = run(model, x)
    patches = x.reshape(2, 2, 2, 3, 2, 3).swapaxes(2, 3).reshape(2, 6, 12)
    kernel = p["embed"]["patches"]["kernel"].reshape(12, 8)
    patches = patches @ kernel + p["embed"]["patches"]["bias"]
    close(hints["embed/patches"], patches.reshape(2, 2, 3, 8))
    tokens = np.broadcast_to(p["embed"]["tokens"], (2, 2, 8))
    z = np.concatenate([tokens, patches], 1) + p["embed"]["positions"]
    close(hints["embed"], z)
    block = p["block1"]
    scores, y = attended(normed(z, block["norm1"], 1e-6), block["attention"])
    close(hints["block1/attention/scores"], scores)
    close(hints["block1/attention/distribution"], softmax(scores))
    close(hints["block1/attention"], y)
    z = z + y
    close(hints["block1/sum"], z)
    z = z + perceptron(normed(z, block["norm2"], 1e-6), block["mlp"])
    close(hints["block1"], z)
    z = normed(z, p["norm"], 1e-6)
    close(hints["norm"], z)
    heads = (
        dense(z[:, 0], p["classifier"]),
        dense(z[:, 1], p["distillation_classifier"]),
    )
    close(hints["token"], z[:, 0])
    close(hints["classifier"], heads[0])
    close(hints["distillation_classifier"], heads[1])
    close(output, (heads[0] + heads[1]) / 2)


def test_an_encoder_is_its_formula_and_padding_changes_nothing():
    model = models.Encoder(11, 8, 1, 2, 3, length=6)
    mask = np.arange(5) < np.array([[5], [3], [0]])
    ids = np.random.default_rng(1).integers(0, 11, (3, 5)).astype(np.int32)
    output, hints, p, apply = run(model, {"tokens": ids, "mask": mask})
    assert all(np.isfinite(hint).all() for hint in hints.values())
    embed, block = p["embed"], p["block1"]
    z = normed(
        embed["words"]["embedding"][ids] + embed["positions"][:5], embed["norm"], 0
    )
    close(hints["embed"], z)
    full = mask[:2]
    scores, y = attended(z[:2], block["attention"], full)
    close(hints["block1/attention/scores"][:2], scores)
    chosen = hints["block1/attention/distribution"]
    assert not chosen[1, :, :, 3:].any()
    np.testing.assert_allclose(chosen.sum(-1), 1, rtol=1e-5)
    z = normed(z[:2] + y, block["norm1"], 0)
    close(hints["block1/norm1"][:2], z)
    z = normed(z + perceptron(z, block["mlp"]), block["norm2"], 0)
    close(hints["block1"][:2], z)
    close(hints["token"][:2], z[:, 0])
    close(output[:2], dense(z[:, 0], p["classifier"]))
    changed = np.where(mask, ids, (ids + 1) % 11)
    params = jax.tree.map(jnp.float32, p)
    other = apply(params, {"tokens": changed, "mask": mask})
    np.testing.assert_allclose(other.output[:2], output[:2], rtol=1e-6)
    got, want = other.hints["block1"], hints["block1"]
    np.testing.assert_allclose(got[1, :3], want[1, :3], rtol=1e-5)
    assert np.abs(got[1, 3:] - want[1, 3:]).min(-1).max() > 0


def test_an_encoder_learns_the_relations_and_states_of_another():
    """TinyBERT and MiniLM in a hint stage, on the hint paths of the house's encoder."""
    parts = [
        (f"block1/attention/{part}", f"block2/attention/{part}") for part in ATTENTION
    ]
    objective = hj.objective(
        tinybert=hj.tinybert(
            [("embed", "embed"), ("block1", "block2")], parts[3:4], padding="mask"
        ),
        minilm=hj.minilm(parts[:3], parts[3:4], heads=4, padding="mask"),
    )
    student = hj.linen(models.Encoder(11, 8, 1, 2, 3, length=5))
    teacher = hj.linen(models.Encoder(11, 16, 2, 2, 3, length=5))
    generator = np.random.default_rng(0)
    batch = {
        "tokens": jnp.array(generator.integers(0, 11, (4, 5)), jnp.int32),
        "mask": jnp.array(np.arange(5) < np.array([[5], [3], [1], [4]])),
    }
    stage = hj.hint_stage(
        student,
        teacher,
        objective,
        optax.adam(1e-2),
        inputs=lambda batch: batch,
        teacher_inputs=lambda batch: batch,
    )
    ours = jax.jit(student.init)(jax.random.key(0), batch)
    theirs = jax.jit(teacher.init)(jax.random.key(1), batch)
    # As drawn for BERT, scores are near 0: nothing to learn.
    louder = jax.tree.map(lambda x: 10 * x, theirs.params["block2"]["attention"])
    theirs.params["block2"]["attention"] = louder
    state = stage.init(jax.random.key(2), ours, theirs, batch)
    state, first = stage.update(state, theirs, batch)
    for _ in range(40):
        state, last = stage.update(state, theirs, batch)
    for name in objective_parts(first):
        assert last[name] < 0.9 * first[name], name


def objective_parts(metrics):
    return [name for name in metrics if "/" in name and "weighted" not in name]


# Errors


@pytest.mark.quick
@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (
            models.vit_mini(10),
            images(30, 28, 1),
            "VisionTransformer: .*multiples of the patch, 4, got 30x28. Resize",
        ),
        (
            models.VisionTransformer(2, 8, 1, 3, 10),
            images(*DIGITS),
            "SelfAttention: expected heads to divide the width 8, got 3",
        ),
        (
            models.Encoder(11, 8, 1, 2, 3, length=5),
            texts(6),
            "Encoder: expected at most 5 tokens, got 6",
        ),
        (
            models.encoder_tiny(2),
            {"image": texts(6)["tokens"]},
            r"Encoder: expected 'tokens' in the inputs, got \['image'\]",
        ),
    ],
)
def test_what_does_not_fit_says_what_to_do(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        shapes(model, inputs)
