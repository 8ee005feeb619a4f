"""Public functions give a result for any argument, or an error that says what to do."""

import importlib
import inspect
import math
import re
import types

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import hintjax
from hintjax import (
    losses,
    memory,
    method,
    methods,
    metrics,
    networks,
    pairing,
    probes,
    regressors,
    sharding,
    stages,
    teachers,
    views,
)
from hintjax.methods import uncertainty
from hintjax.networks import nnx as networks_nnx
from hintjax.stages import balance, debugging, oriented

# The functions of these names hide their modules.
objective = importlib.import_module("hintjax.objective")
population = importlib.import_module("hintjax.population")
task = importlib.import_module("hintjax.methods.task")

SENTENCE = re.compile(r"[\w. ]+: expected .+, got ", re.DOTALL)
PYTHONS_OWN = re.compile(r"[\w.<>]+\(\) (got an unexpected keyword|missing)")


def a(*shape):
    """An array without equal entries."""
    return np.linspace(-1, 1, math.prod(shape), dtype=np.float32).reshape(shape)


def both(x):
    return {"student": x, "teacher": x}


KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 4)
LABEL = np.arange(4, dtype=np.int32) % 3
LOGITS = {"student_logits": a(4, 10), "teacher_logits": a(4, 10)}
CLASSIFIED = {"output": a(4, 10), "labels": LABEL}
TARGETS = {"output": a(4, 10), "labels": a(4, 10)}
SCORES = {"positive": a(4), "negatives": a(4, 5), "size": 50}
PAIRS, PAIR = {"pairs": [("a", "b")]}, {"pair": ("a", "b")}
SIZES = {"student": (4, 4, 3), "teacher": (4, 4, 5)}
LAYER = jax.ShapeDtypeStruct((1, 8, 8, 4), "float32")
VECTOR = jax.ShapeDtypeStruct((1, 8), "float32")
NETWORK, METHOD = networks.linen(nn.Dense(3)), methods.kd()
VARIABLES = networks.Variables({"w": a(3)}, {})
BANK = memory.init(KEY, 8, 6)
CLASSES = memory.by_class(jnp.arange(8) % 3)
FLOW = {"first": a(4, 4, 4, 3), "second": a(4, 2, 2, 5)}
MASK = {"key": KEY, "shape": (4, 4, 3), "rate": 0.5}
NOTHING = {}
MOMENTS = losses.feature_moments(jnp.array(a(8, 4)))
TRANSFORM = losses.channel_standardization(MOMENTS)
OF_MOMENTS = {"moments": MOMENTS}
STANDARDIZED = {"features": a(4, 4, 4), "transform": TRANSFORM}
RESIZED = {"x": a(2, 4, 4, 3), "size": (2, 3)}

# A valid call of each: the arguments that it must be given.
VALID = {
    losses: {
        **dict.fromkeys(
            (
                *("activation_boundary_loss", "attention_maps", "channel_loss"),
                *("attention_transfer_loss", "attention_transfer_loss_paper"),
                *("class_attention_loss", "cosine_loss", "factor_loss"),
                *("hierarchical_context_loss", "hint_loss", "hint_loss_paper"),
                *("masked_generation_loss", "partial_l2_loss", "selectivity_loss"),
                *("cosine_smooth_l1_loss", "cosine_smooth_l1_map_loss"),
                *("position_similarity_loss", "smooth_l1_loss"),
                "token_gram_loss",
            ),
            both(a(4, 4, 4, 3)),
        ),
        **dict.fromkeys(
            (
                *("angle_loss", "attention_map_loss", "attention_map_loss_paper"),
                *("correlation_loss", "distance_loss", "fsp_matrix_loss"),
                *("fsp_matrix_loss_paper", "patient_loss", "probability_loss"),
                "similarity_loss",
            ),
            both(a(4, 6)),
        ),
        **dict.fromkeys(
            (
                *("attention_distribution_loss", "attention_score_loss"),
                "attention_score_loss_code",
            ),
            both(a(4, 2, 3, 3)),
        ),
        **dict.fromkeys(("kd_loss", "dist_loss", "soft_cross_entropy_loss"), LOGITS),
        "attention_energy": {"features": a(4, 4, 4, 3), "size": (2, 2)},
        "attention_map": {"features": a(4, 4, 4, 3)},
        "attention_map_code": {"features": a(4, 4, 4, 3)},
        "batch_norm_margin": {"scale": a(3), "bias": a(3)},
        "class_activation_map": {"features": a(4, 4, 4, 3), "kernel": a(3, 10)},
        "contrastive_log_constant": SCORES,
        "contrastive_loss": {
            "student": a(4, 6),
            "teacher": a(4, 3, 6),
            "size": 50,
            "log_constant": 4.0,
        },
        "contrastive_scores_loss": SCORES | {"log_constant": 4.0},
        "binary_kd_loss": LOGITS,
        "hard_label_loss": LOGITS,
        "decoupled_kd_loss": LOGITS | {"label": LABEL},
        **dict.fromkeys(("fsp_loss", "fsp_loss_paper"), both(tuple(FLOW.values()))),
        **dict.fromkeys(("fsp_matrix", "fsp_matrix_paper"), FLOW),
        "margin_relu": {"features": a(4, 4, 4, 3), "margin": a(3)},
        "queue_similarity_loss": both(a(4, 6)) | {"queue": a(3, 6)},
        "relation_loss": both(a(4, 4, 6)) | {"heads": 2},
        "similarity_matrix": {"features": a(4, 6)},
        **dict.fromkeys(
            (
                *("channel_standardization", "global_standardization"),
                *("hadamard_whitening", "pca_whitening", "phi_standardization"),
                "zca_whitening",
            ),
            OF_MOMENTS,
        ),
        "feature_moments": {"features": a(4, 4, 4)},
        "layer_normalize": {"features": a(4, 4, 4)},
        "merge_moments": {"first": MOMENTS, "second": MOMENTS},
        **dict.fromkeys(
            ("restore_features", "standardize_features"),
            STANDARDIZED,
        ),
        "standardize_logits": {"logits": a(4, 10)},
        "variational_loss": both(a(4, 4, 4, 3)) | {"scale": a(3)},
    },
    methods: {
        **dict.fromkeys(
            (
                *("activation_boundary", "attention_transfer", "channel_wise"),
                *("correlation_congruence", "cosine", "dense_matching"),
                *("factor_transfer", "fitnets"),
                *("masked_generation", "orthogonal_projection", "overhaul"),
                *("paraphrase", "patient"),
                *("probability_transfer", "relational", "review", "selectivity"),
                *("similarity_preserving", "token_gram", "variational"),
            ),
            PAIRS,
        ),
        **dict.fromkeys(("class_attention", "crd", "queue_similarity", "simkd"), PAIR),
        **dict.fromkeys(
            (
                *("binary_kd", "decoupled_kd", "dense_kd", "dist"),
                *("kd", "soft_targets", "standardized_kd"),
            ),
            NOTHING,
        ),
        "crd_bytes": {"negatives": methods.BatchNegatives(), "size": 50, "batch": 4},
        "explained_variance": {"predicted": a(4, 3), "target": a(4, 3)},
        "flows": {"pairs": [("a", "b"), ("c", "d")]},
        "fsp": {"pairs": [(("a", "b"), ("c", "d"))]},
        "lambda_decay": {
            "initial": 4.0,
            "final": 1.0,
            "start": 1,
            "saturate": 3,
            "steps_per_epoch": 10,
        },
        **dict.fromkeys(
            ("masked_channels", "masked_positions"),
            MASK,
        ),
        "minilm": {"relations": [("a", "b")], "heads": 2},
        "reused_classifier": {
            "projected": a(4, 2, 2, 5),
            "classifier": {"kernel": a(5, 10), "bias": a(10)},
        },
        "tinybert": {"hidden_pairs": [("a", "b")]},
        "warm_up": {"weight": 1.0, "epochs": 3, "steps_per_epoch": 10},
    },
    method: {
        "over_pairs": {"loss": losses.hint_loss},
    },
    metrics: {
        **dict.fromkeys(("absolute_error", "binary_accuracy", "f1"), TARGETS),
        **dict.fromkeys(("accuracy", "intersection_over_union"), CLASSIFIED),
    },
    objective: {
        "objective": {"one": METHOD},
        "teacher_dropping": {"one": METHOD},
        "weighted": {"method": METHOD, "weight": 1.0},
    },
    task: {"task": {"loss": optax.softmax_cross_entropy_with_integer_labels}},
    pairing: {
        **dict.fromkeys(
            ("first_pair", "stage_pairs", "suggest_pairs"),
            both({f"conv{number}": LAYER for number in range(3)}),
        ),
        "head": {"layers": {"pool": VECTOR, "classifier": VECTOR}},
        "linearly_explained": {"fit": (a(4, 3), a(4, 5)), "on": (a(4, 3), a(4, 5))},
    },
    probes: {
        "knn_scores": {
            "features": a(4, 6),
            "known": a(4, 6),
            "labels": LABEL,
            "classes": 3,
            "k": 2,
        },
        "linear_scores": {
            "features": a(4, 6),
            "known": a(4, 6),
            "labels": LABEL,
            "classes": 3,
        },
    },
    regressors: {
        **dict.fromkeys(
            (
                *("bottleneck", "conv", "fit", "layer_norm_mlp", "linear", "mlp"),
                *("orthogonal", "resampled", "valid_conv"),
            ),
            SIZES,
        ),
        **dict.fromkeys(("bilinear_resize", "nearest_resize"), RESIZED),
        "identity": both((4, 4, 3)),
        "to_grid": {"tokens": a(2, 16, 3)},
        "to_tokens": {"maps": a(2, 4, 4, 3)},
    },
    memory: {
        "by_class": {"labels": LABEL},
        "draw_others": {"classes": CLASSES, "keys": KEYS, "label": LABEL, "count": 5},
        "draw_same": {"classes": CLASSES, "keys": KEYS, "label": LABEL},
        "draw_shared": {"classes": CLASSES, "key": KEY, "label": LABEL, "count": 5},
        "enqueue": {"queue": a(8, 6), "embeddings": a(4, 6)},
        "init": {"key": KEY, "size": 8},
        "update": {"bank": BANK, "index": LABEL, **both(a(4, 6))},
    },
    networks: {"computed_in": {"network": NETWORK, "dtype": "bfloat16"}},
    teachers: {
        "from_teacher": {"method": METHOD, "name": "big"},
        "moving_average": both(VARIABLES),
        "seeing": {"network": NETWORK, "view": jnp.abs},
        "self_taught": {"method": METHOD},
        "together": {"one": NETWORK},
    },
    oriented: {
        "distillation_oriented": {"momentum": 0.9, "delta": 0.05, "task": "task"}
    },
    views: {
        "at_head": {"method": METHOD, "student": "head"},
        "viewed": {"method": METHOD, "student": jnp.abs},
    },
}
MADE_INSIDE = "takes what the library itself has made and checked"
LATER = "takes functions and trees, and sees what they are when a stage is initialized"
PLACES = "takes meshes and devices, which are JAX's and say themselves what they miss"
NOT_FUZZED = {
    methods: dict.fromkeys(("hard_labels", "regression_kd"), "they take no arguments"),
    memory: dict.fromkeys(
        (
            *(
                "batch_rows",
                "labeled",
                "scores_by_rows",
                "select",
                "set_once",
                "shared_rows",
            ),
            "split_rows",
        ),
        MADE_INSIDE,
    ),
    method: dict.fromkeys(
        (
            *("hints_of", "nothing", "one_per_example", "output_of", "pairs_apart"),
            *("reduced", "total", "union"),
        ),
        MADE_INSIDE,
    ),
    objective: {"check_weight": MADE_INSIDE},
    regressors: dict.fromkeys(("apply", "init"), MADE_INSIDE),
    views: {"through": MADE_INSIDE},
    networks: dict.fromkeys(
        (
            *("calibrated", "fake_quantized", "function", "join", "linen"),
            *("renormalized", "split"),
        ),
        LATER,
    ),
    balance: {"check_balance": MADE_INSIDE, "rebalanced": LATER},
    uncertainty: {"uncertain": LATER},
    debugging: dict.fromkeys(
        (
            "checked",
            "look",
            "raising",
            "watched",
            "watching",
        ),
        LATER,
    ),
    stages: dict.fromkeys(
        (
            *("checked", "distillation_stage", "hint_stage", "image", "silent_terms"),
            "student_variables",
        ),
        LATER,
    ),
    networks_nnx: dict.fromkeys(("nnx", "nnx_update"), LATER),
    pairing: {
        **dict.fromkeys(
            (
                *("candidates", "choose", "depth_of", "doubts_of_depth"),
                *("doubts_of_explained", "nearest_in_depth", "remarks"),
            ),
            MADE_INSIDE,
        ),
        **dict.fromkeys(("alignment", "measure"), LATER),
    },
    population: dict.fromkeys(("population", "reweighted"), LATER),
    sharding: dict.fromkeys(
        (
            *("automatic", "in_automatic_mesh", "is_explicit", "on_automatic"),
            *("alike", "batch_axes", "check_batch", "check_even", "check_rules"),
            *("check_spans", "data_mesh", "from_process", "make_mesh", "over_batch"),
            *("place", "replicated", "shares", "spread", "stored", "whole"),
        ),
        PLACES,
    ),
}

ARRAYS = (
    *(a(), a(0), a(4), a(4, 0), a(0, 10), a(4, 3), a(4, 6), a(4, 10), a(4, 1, 1)),
    *(a(4, 2, 3), a(4, 4, 4, 3), a(2, 4, 4, 4, 3), a(0, 4, 4, 3), a(4, 0, 0, 3)),
    *(np.ones((4, 10), np.int32), np.ones((4, 6), bool), np.ones(4, bool)),
    *(np.ones((4, 4, 4, 3), jnp.bfloat16), np.ones((4, 10), np.float16)),
    *(np.ones((4, 10), np.complex64), np.array(["a"]), np.array([None]), KEY, KEYS),
)
NUMBERS = (
    *(math.nan, math.inf, -math.inf, -1, 0, 0.5, 3, True, 10**30, 10**400, 1e300, 1j),
    *(np.float32(2), np.int64(2), np.bool_(True)),
)
OTHERS = (
    *(None, "", "a", b"x", {}, [], (), [None], {"a": 1}, {"a": "b"}, {1, 2}, object()),
    *(jnp.abs, int, ("a", "b"), [("a",)], [("a", "b", "c")], [("a", 1)], ["ab"]),
    *(METHOD, NETWORK, BANK, (0, 0, 3), (4, 4, 3), (-1, 4, 3), (4,), [1, 2, 3], LAYER),
)
CALLS = {
    f"{module.__name__.removeprefix('hintjax.')}.{name}": (
        getattr(module, name),
        arguments,
    )
    for module, rows in VALID.items()
    for name, arguments in rows.items()
}
EXAMPLES = {"quick": 12, "long": 200}


def public(module):
    """Names of a module's functions that are there to be called."""
    names = getattr(module, "__all__", vars(module))
    return {
        name
        for name in names
        if isinstance(vars(module).get(name), types.FunctionType)
        and (
            hasattr(module, "__all__")
            or vars(module)[name].__module__ == module.__name__
        )
        and not name.startswith("_")
    }


def test_every_public_function_has_a_row():
    rows = {
        module: {*VALID.get(module, ()), *NOT_FUZZED.get(module, ())}
        for module in (*VALID, *NOT_FUZZED)
    }
    for module, named in rows.items():
        assert named == public(module), module
        assert not VALID.get(module, {}).keys() & NOT_FUZZED.get(module, {}).keys()
    known = {getattr(module, name) for module, named in rows.items() for name in named}
    for name in hintjax.__all__:
        found = getattr(hintjax, name)
        assert not isinstance(found, types.FunctionType) or found in known, name


def is_array(x):
    return isinstance(x, jax.Array) or (
        isinstance(x, np.ndarray) and x.dtype.kind not in "OU"
    )


def traced(function, valid, arguments, evaluate=False):
    """The result, on shapes alone where arrays are what the function computes with."""
    computed = {
        name
        for name, value in valid.items()
        if any(map(is_array, jax.tree.leaves(value)))
    } | {"where", "valid"}
    plain = {name: x for name, x in arguments.items() if name not in computed}
    inputs = {name: x for name, x in arguments.items() if name in computed}
    leaves, tree = jax.tree.flatten(inputs, is_leaf=lambda x: x is None)
    arrays = {number: x for number, x in enumerate(leaves) if is_array(x)}
    results = []

    def call(arrays):
        given = [arrays.get(number, x) for number, x in enumerate(leaves)]
        results.append(function(**plain, **tree.unflatten(given)))

    if arrays and not evaluate:
        jax.eval_shape(call, arrays)
    else:
        call(arrays)
    return results[0]


def drawn(valid, parameters, draw):
    """Arguments of which one or two are not what they should be."""
    anything = st.sampled_from((*ARRAYS, *NUMBERS, *OTHERS))
    arrays = [name for name, value in valid.items() if is_array(value)]
    way = draw(st.sampled_from(["one", "one", "two", "alike", "unknown"]))
    if way == "unknown":
        return valid | {"reduction": draw(anything)}
    if way == "alike" and len(arrays) > 1:  # peers that agree reach what is behind
        return valid | dict.fromkeys(arrays, draw(st.sampled_from(ARRAYS)))
    names = st.lists(
        st.sampled_from(parameters), min_size=1, max_size=2 if way == "two" else 1
    )
    return valid | {name: draw(anything) for name in draw(names)}


def shown(arguments):
    return {
        name: f"{x.dtype} {x.shape}" if is_array(x) else x
        for name, x in arguments.items()
    }


def survives(name, arguments):
    """Whether the call was accepted; it may be refused, in a sentence."""
    function, valid = CALLS[name]
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        traced(function, valid, arguments)
    except (ValueError, TypeError) as error:
        said = str(error)
        assert SENTENCE.match(said) or PYTHONS_OWN.match(said), (shown(arguments), said)
        assert len(said) < 2000
        return False
    return True


def is_as_documented(name, arguments):
    """What was accepted has the annotated result, if it has the annotated arguments."""
    function, valid = CALLS[name]
    jaxtyping.config.update("jaxtyping_disable", False)
    try:
        traced(function, valid, arguments)
    except jaxtyping.TypeCheckError as error:
        assert "checking the return value" not in str(error), shown(arguments)


def has_no_nan(name, arguments):
    """Finite numbers give numbers."""
    function, valid = CALLS[name]
    numbers = [x for x in jax.tree.leaves(arguments) if isinstance(x, float)]
    if not all(map(math.isfinite, numbers)):
        return
    jaxtyping.config.update("jaxtyping_disable", True)
    for leaf in jax.tree.leaves(traced(function, valid, arguments, evaluate=True)):
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
            assert not np.isnan(leaf).any(), shown(arguments)


def parameters_of(function, valid):
    kinds = inspect.signature(function).parameters.values()
    named = [p.name for p in kinds if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return named or [*valid]


def fuzzed(name, examples, evaluate):
    function, valid = CALLS[name]
    parameters = parameters_of(function, valid)

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(data=st.data())
    def run(data):
        arguments = drawn(valid, parameters, data.draw)
        if survives(name, arguments):
            is_as_documented(name, arguments)
            if evaluate:
                has_no_nan(name, arguments)

    run()


@pytest.mark.parametrize("name", CALLS)
def test_a_valid_call_is_accepted(unchecked, name):
    assert survives(name, CALLS[name][1])
    is_as_documented(name, CALLS[name][1])


@pytest.mark.parametrize("name", CALLS)
def test_a_function_refuses_in_a_sentence_what_it_cannot_take(unchecked, name):
    fuzzed(name, EXAMPLES["quick"], evaluate=False)


@pytest.mark.long
@pytest.mark.parametrize("name", CALLS)
def test_a_function_survives_many_calls_that_nobody_meant(unchecked, name):
    fuzzed(name, EXAMPLES["long"], evaluate=True)
