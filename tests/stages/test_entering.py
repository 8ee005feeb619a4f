"""The door of a stage: forms with one meaning are accepted, others get one sentence."""

import functools
import re
from typing import NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from flax.training.train_state import TrainState

import hintjax as hj
from hintjax import _checks
from hintjax.stages import entering

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("unchecked")]

KEY = jax.random.key(0)
CLASSES = 3
X = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 2, 2, 1)
LABEL = np.arange(4, dtype=np.int32) % CLASSES
BATCH = {"image": X, "label": LABEL}
SENTENCE = re.compile(r"[\w. ]+: expected [^\n]+, got [^\n]+\.")
CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels


class Net(nn.Module):
    """Two layers with BatchNorm; the output is in one of several forms."""

    form: str = "array"

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(4, name="low")(x.reshape(len(x), -1)))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return FORMS[self.form](nn.Dense(CLASSES, name="head")(x), x)


@flax.struct.dataclass
class Known:
    """A dataclass that JAX knows as a tree."""

    logits: jax.Array
    embedding: jax.Array


class Unknown:
    """An object that JAX does not know as a tree."""

    def __init__(self, logits):
        self.logits = logits


class Named(NamedTuple):
    logits: jax.Array
    embedding: jax.Array


FORMS = {
    "array": lambda logits, x: logits,
    "tuple": lambda logits, x: (logits, x),
    "list": lambda logits, x: [logits, x],
    "named": Named,
    "dict": lambda logits, x: {"logits": logits, "embedding": x},
    "nested": lambda logits, x: {"heads": (logits, x)},
    "dataclass": Known,
    "unknown": lambda logits, x: Unknown(logits),
    "none": lambda logits, x: None,
}
NETWORK = hj.linen(Net())
FLAX = jax.tree.map(np.asarray, Net().init(KEY, X))
VARIABLES = hj.split(FLAX)
TRAIN_STATE = TrainState.create(
    apply_fn=Net().apply, params=FLAX["params"], tx=optax.sgd(0.1)
)


def task(**how):
    return hj.task(CROSS_ENTROPY, **how)


def stage_of(method, student=NETWORK, teacher=NETWORK, **how):
    return hj.distillation_stage(student, teacher, method, optax.sgd(0.1), **how)


STAGE = stage_of(hj.objective(task=task(), kd=hj.kd()))
MESHED = stage_of(hj.kd(), mesh=hj.data_mesh(jax.devices()[:2]))


def begun(stage=STAGE, key=KEY, student=VARIABLES, teacher=VARIABLES, batch=BATCH, **k):
    """The shapes of the first state: nothing is compiled."""
    return jax.eval_shape(lambda: stage.init(key, student, teacher, batch, **k))


@functools.cache
def first():
    return begun()


def sentence(call):
    with pytest.raises(hj.Refusal) as error:
        call()
    text = str(error.value)
    assert SENTENCE.match(text), text
    return text


# What is accepted

SAME = {
    "variables": VARIABLES,
    "pair": tuple(VARIABLES),
    "flax": FLAX,
    "frozen": freeze(FLAX),
    "arrays": jax.tree.map(jnp.asarray, FLAX),
}


@pytest.mark.parametrize("form", SAME)
def test_variables_of_every_form_begin_the_same_state(form):
    state = begun(student=SAME[form], teacher=SAME[form])
    assert jax.tree.structure(state) == jax.tree.structure(first())


@pytest.mark.parametrize("mesh", [None, 2], ids=["alone", "mesh"])
@pytest.mark.parametrize("form", ["flax", "frozen"])
def test_a_teacher_may_be_flax_variables_in_every_call(form, mesh):
    mesh = mesh and hj.data_mesh(jax.devices()[:mesh])
    stage = stage_of(hj.kd(), mesh=mesh)
    state = begun(stage)
    for name in ("teach", "update", "evaluate", "report"):
        got, want = (
            jax.eval_shape(getattr(stage, name), state, teacher, BATCH)
            for teacher in (SAME[form], VARIABLES)
        )
        assert jax.tree.structure(got) == jax.tree.structure(want)


def test_a_raw_key_is_a_key():
    assert begun(key=jax.random.PRNGKey(0)).key.shape == (2,)


def test_a_moving_average_accepts_flax_variables():
    got = hj.moving_average(FLAX, VARIABLES, 0.5)
    assert isinstance(got, hj.Variables)
    jax.tree.map(np.testing.assert_allclose, got, VARIABLES)


def test_a_population_accepts_flax_variables_of_one_student_or_of_each():
    crowd = hj.population(STAGE, 2, together=False)
    keys = jax.random.split(KEY, 2)
    for students in (FLAX, VARIABLES, [freeze(FLAX), VARIABLES]):
        members = crowd.init(list(keys), students, FLAX, BATCH)
        for state in members:
            got = hj.student_variables(state)
            jax.tree.map(np.testing.assert_array_equal, got, VARIABLES)


def test_the_checks_are_made_once_in_many_calls(monkeypatch):
    """A compiled step costs what it cost before: nothing is checked in it again."""
    network = hj.linen(nn.Dense(CLASSES))
    method = hj.objective(task=task())
    inputs = lambda batch: batch["image"].reshape(4, 4)
    stage = stage_of(method, network, None, inputs=inputs)
    state = stage.init(KEY, network.init(KEY, X.reshape(4, 4)), None, BATCH)
    state, _ = stage.update(state, None, BATCH)
    monkeypatch.setattr("hintjax.stages.entering.check_batch", None)
    monkeypatch.setattr("hintjax.stages.entering.check_state", None)
    stage.update(state, None, BATCH)


# Variables

VARIABLES_OF_OTHER_FORMS = {
    "bare": (FLAX["params"], "hintjax.Variables(params, {})"),
    "frozen bare": (freeze(FLAX["params"]), "hintjax.split({'params': params"),
    "a TrainState": (TRAIN_STATE, "hintjax.Variables(state.params, {})"),
    "a state": (first, "hintjax.student_variables(state)"),
    "none": (None, "the network's init"),
    "an array": (X, "float32 (4, 2, 2, 1)"),
    "a module": (Net(), "Net"),
    "three": ((1, 2, 3), "tuple of 3 entries"),
    "no entries": ({}, "dict with no entries"),
}


@pytest.mark.parametrize("form", VARIABLES_OF_OTHER_FORMS)
def test_a_student_of_another_form_is_refused(form):
    given, words = VARIABLES_OF_OTHER_FORMS[form]
    text = sentence(lambda: begun(student=given() if given is first else given))
    assert text.startswith("stage: expected the student's variables") and words in text


@pytest.mark.parametrize("name", ["init", "teach", "update", "evaluate", "report"])
@pytest.mark.parametrize("form", ["bare", "a TrainState", "a state"])
def test_a_teacher_of_another_form_is_refused_in_every_call(name, form):
    given, words = VARIABLES_OF_OTHER_FORMS[form]
    teacher = given() if given is first else given

    def call():
        if name == "init":
            return begun(teacher=teacher)
        return jax.eval_shape(
            lambda state: getattr(STAGE, name)(state, teacher, BATCH), first()
        )

    text = sentence(call)
    assert text.startswith("stage: expected the teacher's variables") and words in text


def test_no_teacher_says_so():
    assert "the teacher's variables, got None" in sentence(lambda: begun(teacher=None))


@pytest.mark.parametrize("dtype", [np.int8, np.bool_])
def test_a_parameter_that_cannot_be_trained_is_refused(dtype):
    params = {**FLAX["params"], "codes": {"kernel": np.zeros(3, dtype)}}
    student = hj.Variables(params, VARIABLES.state)
    text = sentence(lambda: begun(student=student))
    assert f"{np.dtype(dtype)} at 'codes/kernel'" in text and "the state" in text
    assert begun(teacher=student)  # a teacher is not trained


@pytest.mark.parametrize(
    "call",
    [
        lambda: hj.moving_average(FLAX["params"], VARIABLES),
        lambda: hj.moving_average(VARIABLES, TRAIN_STATE),
        lambda: hj.student_variables((first(), {})),
        lambda: hj.student_variables(VARIABLES),
        lambda: hj.linen(Net),
        lambda: hj.nnx(Net()),
        lambda: hj.nnx(3),
        lambda: hj.nnx_update(Net(), VARIABLES),
        lambda: hj.hint_stage(Net(), NETWORK, hj.fitnets([("a", "b")]), optax.sgd(1.0)),
        lambda: stage_of(hj.kd(), teacher=Net()),
        lambda: stage_of(hj.kd(), student=VARIABLES),
        lambda: hj.population(hj.kd(), 2),
    ],
)
def test_functions_beside_a_stage_refuse_other_forms_too(call):
    sentence(call)


BROKEN = {
    "a missing parameter": ({"low": FLAX["params"]["low"]}, VARIABLES.state),
    "no statistics": (VARIABLES.params, {}),
    "params twice": (FLAX, VARIABLES.state),
    "another shape": (
        {**FLAX["params"], "head": {"kernel": np.ones((4, 9)), "bias": np.ones(9)}},
        VARIABLES.state,
    ),
    "no dict": (X, {}),
    "state of None": (VARIABLES.params, None),
}


@pytest.mark.parametrize("case", BROKEN)
def test_variables_of_another_module_are_refused(case):
    text = sentence(lambda: begun(teacher=hj.Variables(*BROKEN[case])))
    assert text.startswith("Net: expected") and "hintjax.split(variables)" in text
    assert "https" not in text


# Keys, data and states


@pytest.mark.parametrize(
    "key", [0, None, 1.5, np.uint32(0), VARIABLES, X], ids=lambda key: type(key)
)
def test_a_key_of_another_form_is_refused(key):
    text = sentence(lambda: begun(key=key))
    assert "key to be a key of jax.random" in text and "jax.random.key(0)" in text


def test_several_keys_are_refused():
    assert "key<fry> (3,)" in sentence(lambda: begun(key=jax.random.split(KEY, 3)))


@pytest.mark.parametrize("keys", [0, KEY, X], ids=["int", "one", "array"])
def test_a_population_needs_a_key_for_each_student(keys):
    crowd = hj.population(STAGE, 2)
    text = sentence(lambda: crowd.init(keys, VARIABLES, VARIABLES, BATCH))
    assert "jax.random.split(key, 2)" in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": LABEL}, "hintjax.Data(labels)"),
        ({"data": hj.Data([0, 1, 2])}, "labels to be an array with one row per"),
        ({"data": hj.Data(np.array("a"))}, "labels to be an array with one row per"),
        ({"carry": (1, {})}, "the last state of the earlier stage"),
        ({"carry": VARIABLES}, "the last state of the earlier stage"),
    ],
)
def test_data_and_carry_of_another_form_are_refused(given, words):
    assert words in sentence(lambda: begun(**given))


@pytest.mark.parametrize("name", ["update", "evaluate", "report"])
def test_a_state_with_its_metrics_is_no_state(name):
    def call(state):
        return getattr(STAGE, name)((state, {}), VARIABLES, BATCH)

    text = sentence(lambda: jax.eval_shape(call, first()))
    assert "state to be State, got tuple of 2 entries" in text


def test_what_was_taught_is_features():
    def call(state):
        return STAGE.step(state, VARIABLES, BATCH)

    assert "stage.teach" in sentence(lambda: jax.eval_shape(call, first()))


# Batches

BATCHES_OF_OTHER_FORMS = {
    "pair": ((X, LABEL), '{"image": images, "label": labels}'),
    "list": ([X, LABEL], "list of 2 entries"),
    "array": (X, "a dict of arrays"),
    "none": (None, "got None"),
    "named tuple": (Named(X, LABEL), "Named with the fields"),
    "unequal": ({"image": X, "label": LABEL[:3]}, "4 of 'image', 3 of 'label'"),
    "unequal inside": (
        {**BATCH, "more": {"mask": np.ones((5, 2))}},
        "5 of 'more/mask'",
    ),
    "empty": ({"image": X[:0], "label": LABEL[:0]}, "at least one example"),
    "no entries": ({}, "entries"),
    "a number": ({**BATCH, "label": 3}, "'label'"),
    "a scalar": ({**BATCH, "scale": np.float32(3)}, "'scale' to have one row"),
    "a list of labels": ({**BATCH, "label": [0, 1, 2, 0]}, "'label/0'"),
}


@pytest.mark.parametrize("name", ["init", "teach", "update", "evaluate", "report"])
@pytest.mark.parametrize("form", BATCHES_OF_OTHER_FORMS)
def test_a_batch_of_another_form_is_refused(name, form):
    batch, words = BATCHES_OF_OTHER_FORMS[form]

    def call():
        if name == "init":
            return begun(batch=batch)
        return jax.eval_shape(getattr(STAGE, name), first(), VARIABLES, batch)

    text = sentence(call)
    assert text.startswith("batch: expected") and words in text


@pytest.mark.parametrize("form", ["pair", "unequal", "array"])
def test_a_batch_of_another_form_is_refused_on_a_mesh(form):
    stage = stage_of(hj.kd(), mesh=hj.data_mesh(jax.devices()[:2]))
    batch, words = BATCHES_OF_OTHER_FORMS[form]
    for call in (stage.update, stage.evaluate):
        sentence(lambda call=call: jax.eval_shape(call, first(), VARIABLES, batch))
    assert words in sentence(lambda: begun(stage, batch=batch))


@pytest.mark.parametrize(
    "label", [np.array(list("abca")), "abc", np.array([None] * 4), object()]
)
def test_an_entry_that_is_no_array_of_numbers_is_refused(label):
    text = sentence(lambda: begun(batch={**BATCH, "label": label}))
    assert "'label' to be an array of JAX or NumPy" in text


@pytest.mark.parametrize("mesh", [None, 2], ids=["alone", "mesh"])
@pytest.mark.parametrize("name", ["update", "evaluate", "report"])
def test_texts_that_enter_after_init_are_refused(name, mesh):
    """JAX refuses them before it traces: the sentence comes from the same door."""
    stage = STAGE if mesh is None else MESHED
    call = getattr(stage, name)
    texts = np.array(list("abca"))
    for label in (texts, list(texts), "abc", texts.astype(object)):
        batch = {**BATCH, "name": label}
        text = sentence(lambda batch=batch: call(first(), VARIABLES, batch))
        assert text.startswith("batch: expected 'name")
        if mesh is None and name != "report":
            checked = functools.partial(getattr(hj.checked(stage), name), first())
            assert text == sentence(functools.partial(checked, VARIABLES, batch))
    teacher = hj.Variables({"low": {"kernel": "no array"}}, {})
    text = sentence(lambda: call(first(), teacher, BATCH))
    assert "'no array' at 'low/kernel'" in text
    wrong = sentence(lambda: call((first(), {}), VARIABLES, BATCH))
    assert "state to be State" in wrong


@pytest.mark.parametrize("name", ["update", "evaluate"])
def test_a_state_of_a_stage_with_other_terms_is_refused(name):
    term = hj.crd(HINTS[0], negatives=hj.SharedNegatives(4))
    stage = stage_of(hj.objective(task=task(), crd=term))
    batch = {**BATCH, "index": LABEL}
    call = functools.partial(jax.eval_shape, getattr(stage, name))
    text = sentence(lambda: call(first(), VARIABLES, batch))
    assert "with the terms ['task', 'crd'], got ['kd', 'task']" in text


def test_members_of_another_form_and_texts_are_refused_by_a_population():
    crowd = hj.population(STAGE, 2, together=False)
    members = first(), first()  # the shapes will do: nothing is computed
    texts = {**BATCH, "name": np.array(list("abca"))}
    text = sentence(lambda: crowd.update(members, VARIABLES, texts))
    assert "'name' to be an array" in text
    text = sentence(lambda: crowd.update((members, {}), VARIABLES, BATCH))
    assert "population: expected the members of a population, got tuple of 2" in text


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_variables_that_are_no_arrays_are_refused(whose):
    given = hj.Variables({"low": {"kernel": "no array"}}, {})
    text = sentence(lambda: begun(**{whose: given}))
    assert f"the {whose}'s variables to be arrays, got 'no array' at 'low/" in text


def test_an_index_on_the_host_is_checked_at_every_update():
    """An array on a device is not: reading it would wait for the device."""
    stage = stage_of(hj.crd(HINTS[0], negatives=hj.SharedNegatives(4)))
    data = hj.Data(np.arange(9, dtype=np.int32) % 3)
    batch = {**BATCH, "index": np.array([0, 1, 2, 9], np.int32)}
    state = begun(stage, batch={**batch, "index": LABEL}, data=data)
    wanted = "batch: expected 'index' in 0..8, as the method reads it, got 9."
    assert wanted in sentence(lambda: stage.update(state, VARIABLES, batch))
    for fine in (
        {**batch, "where": np.arange(4) < 3},
        {**batch, "where": jnp.arange(4) < 3},
        {**batch, "index": jnp.asarray(batch["index"])},
        {**batch, "index": batch["index"].astype(np.float32)},
    ):
        entering.check_limits(fine, {"index": 9}, entering.is_numpy)
    short = {**batch, "where": np.ones(3, bool)}
    text = sentence(lambda: stage.update(state, VARIABLES, short))
    assert "where to be bool (4,), got bool (3,)" in text
    # An example of a validation split has another index.
    with pytest.raises(TypeError, match="ShapeDtypeStruct"):
        stage.evaluate(state, VARIABLES, batch)


def test_an_entry_of_keys_is_an_array():
    assert begun(batch={**BATCH, "key": jax.random.split(KEY, 4)})


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (
            lambda batch: batch["pixels"],
            "'pixels' in the batch, got ['image', 'label']",
        ),
        (lambda batch: None, "arrays with one row for each example"),
        (lambda batch: len(batch), "arrays with one row for each example"),
    ],
)
@pytest.mark.parametrize("which", ["inputs", "teacher_inputs"])
def test_inputs_that_are_not_in_the_batch_are_named(which, inputs, words):
    stage = stage_of(hj.kd(), **{which: inputs})
    text = sentence(lambda: begun(stage))
    assert text.startswith(f"{which}: expected") and words in text


def test_an_error_inside_the_function_of_inputs_is_its_own():
    stage = stage_of(hj.kd(), inputs=lambda batch: {}["image"])
    with pytest.raises(KeyError):
        begun(stage)


# Entries that methods read

HINTS = [("low", "low")]
READING = {
    "task": (task(), {"image": X}, "'label'"),
    "task of another name": (task(label="kind"), BATCH, "'kind'"),
    "decoupled_kd": (hj.decoupled_kd(), {"image": X}, "'label'"),
    "crd": (hj.crd(HINTS[0]), BATCH, "'index'"),
    "crd without labels": (
        hj.crd(HINTS[0], negatives=hj.SharedNegatives(4)),
        {"image": X, "index": LABEL},
        "'label'",
    ),
    "crd in the batch": (
        hj.crd(HINTS[0], negatives=hj.BatchNegatives()),
        {"image": X},
        "'label'",
    ),
    "given": (hj.crd(HINTS[0], negatives=hj.GivenNegatives()), BATCH, "'candidates'"),
    "padding": (hj.cosine(HINTS, padding="mask"), BATCH, "'mask'"),
}


@pytest.mark.parametrize("case", READING)
def test_a_method_names_the_entry_that_it_misses(case):
    method, batch, words = READING[case]
    stage = stage_of(hj.objective(term=method))
    data = hj.Data(np.arange(9, dtype=np.int32) % 3)
    text = sentence(lambda: begun(stage, batch=batch, data=data))
    assert f"expected {words} in the batch, got {sorted(batch)}" in text


@pytest.mark.parametrize("label", [{"fine": LABEL}, (LABEL, LABEL), None])
@pytest.mark.parametrize("method", [task(), hj.decoupled_kd()], ids=["task", "dkd"])
def test_labels_in_a_container_are_refused(method, label):
    stage = stage_of(hj.objective(term=method))
    batch = {**BATCH, "label": label}
    state = begun(stage)
    call = functools.partial(jax.eval_shape, stage.update, state, VARIABLES, batch)
    text = sentence(call)
    assert "'label'" in text and "Name the labels with label=." in text
    update = hj.checked(stage).update
    assert text == sentence(lambda: jax.eval_shape(update, state, VARIABLES, batch))


def test_needed_gives_the_entry_itself():
    assert _checks.needed("kd", BATCH, "label") is LABEL


# Outputs


READERS = {"kd": hj.kd(), "dist": hj.dist(), "task": task()}


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"array", "none"}))
@pytest.mark.parametrize(
    ("name", "whose"),
    [(name, "student") for name in READERS] + [("kd", "teacher"), ("dist", "teacher")],
)
def test_an_output_of_several_arrays_is_refused_before_training(form, name, whose):
    networks = {"student": NETWORK, "teacher": NETWORK, whose: hj.linen(Net(form))}
    stage = stage_of(hj.objective(term=READERS[name]), **networks)
    text = sentence(lambda: begun(stage))
    assert "call=" in text and f"at_head(method, {whose}=" in text or form == "unknown"


@pytest.mark.parametrize("name", READERS)
def test_no_output_at_all_is_refused(name):
    stage = stage_of(hj.objective(term=READERS[name]), hj.linen(Net("none")))
    with pytest.raises(
        hj.Refusal, match="output of the student to be one array, got N"
    ):
        jax.eval_shape(stage.update, begun(stage), VARIABLES, BATCH)


@pytest.mark.parametrize(
    ("form", "path"),
    [
        ("tuple", ":out[0]"),
        ("list", ":out[0]"),
        ("named", ":out[logits]"),
        ("named", ":out[0]"),
        ("dict", ":out[logits]"),
        ("nested", ":out[heads][0]"),
        ("dataclass", ":out[logits]"),
    ],
)
def test_one_of_several_outputs_is_chosen_by_its_path(form, path):
    network = hj.linen(Net(form))
    method = hj.objective(
        task=hj.at_head(task(), student=path),
        kd=hj.at_head(hj.kd(), student=path, teacher=path),
    )
    stage = stage_of(method, network, network)
    metrics = jax.eval_shape(stage.update, begun(stage), VARIABLES, BATCH)[1]
    assert metrics["task/accuracy"].shape == ()


def test_kd_of_several_teachers_needs_from_teacher():
    both = hj.together(big=NETWORK, vit=NETWORK)
    theirs = both.init(KEY, X)
    stage = stage_of(hj.objective(kd=hj.kd()), NETWORK, both)
    text = sentence(lambda: begun(stage, teacher=theirs))
    assert "from_teacher(method, name)" in text and "['big', 'vit']" in text
    stage = stage_of(hj.objective(kd=hj.from_teacher(hj.kd(), "vit")), NETWORK, both)
    assert begun(stage, teacher=theirs)


def test_from_teacher_needs_together():
    for name, teacher in (("big", NETWORK), ("huge", hj.together(big=NETWORK))):
        stage = stage_of(hj.from_teacher(hj.kd(), name), NETWORK, teacher)
        theirs = teacher.init(KEY, X)
        text = sentence(lambda s=stage, t=theirs: begun(s, teacher=t))
        assert text.startswith("from_teacher: expected the outputs of together(")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"mesh": jax.devices()}, "mesh to be Mesh or Layout or None, got list"),
        ({"inputs": "image"}, "inputs to be a function, got 'image'"),
        ({"teacher_inputs": lambda: X}, r"teacher_inputs to take \(batch\), got \(\)"),
    ],
    ids=["mesh", "inputs", "teacher_inputs"],
)
def test_settings_of_another_form_are_refused_when_a_stage_is_made(how, words):
    with pytest.raises(hj.Refusal, match=words):
        hj.distillation_stage(NETWORK, NETWORK, hj.kd(), optax.sgd(0.1), **how)
