"""Error messages: the caller, what it wanted, what it got, what to do."""

import ast
import copy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import _checks

pytestmark = pytest.mark.quick


def test_a_message_is_one_sentence_and_what_to_do():
    got = _checks.message("loss", "a", "b", "Do c.")
    assert got == "loss: expected a, got b. Do c."
    assert _checks.message("loss", "a", "b") == "loss: expected a, got b."


def test_same_shape_names_all_shapes():
    one, other = jnp.zeros((2, 3)), jnp.zeros((2, 1))
    _checks.same_shape("loss", student=one, teacher=one)
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(2, 1\)"):
        _checks.same_shape("loss", student=one, teacher=other)


def test_same_leading_looks_past_the_last_axes():
    one, other = jnp.zeros((2, 4, 3)), jnp.zeros((2, 5, 7))
    _checks.same_leading("loss", 2, student=one, teacher=other)
    with pytest.raises(
        ValueError, match=r"student \(2, 4, 3\) and teacher \(2, 5, 7\)"
    ):
        _checks.same_leading("loss", 1, student=one, teacher=other)


def test_rank_names_the_layout():
    with pytest.raises(ValueError, match=r"x to have at least 3 axes \(h w c\), got"):
        _checks.rank("loss", 3, "h w c", x=jnp.zeros((2, 3)))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_positive(value):
    with pytest.raises(ValueError, match=f"loss: expected T to be > 0, got {value}"):
        _checks.positive("loss", T=value)


def test_positive_lets_traced_numbers_through():
    def f(value):
        _checks.positive("loss", T=value)
        return value

    assert jax.jit(f)(-1.0) == -1


@pytest.mark.parametrize("value", [0, 1.0, "2"])
def test_positive_int(unchecked, value):
    with pytest.raises(ValueError, match="n to be an integer >= 1, got"):
        _checks.positive_int("loss", n=value)


def test_nearest_is_best_first_and_never_empty():
    names = ["stem", "group1/block0", "group2/block0", "head"]
    assert _checks.nearest("group2/blok0", names)[0] == "group2/block0"
    assert len(_checks.nearest("?", names)) == 3
    assert _checks.nearest("?", []) == []


@pytest.mark.parametrize(
    "value",
    ["", "2", None, True, 1j, [1.0], {}, jnp.ones(2), jnp.zeros((0,)), object()],
)
def test_what_is_no_number_is_described(unchecked, value):
    with pytest.raises(ValueError, match=r"loss: expected T to be > 0, got .+"):
        _checks.positive("loss", T=value)


def test_a_number_from_outside_of_a_trace_is_checked_in_it(unchecked):
    good, bad = jnp.asarray([2.0, -2.0])

    def scaled(x, by):
        _checks.positive("loss", T=by)
        return x * by

    assert jax.jit(lambda x: scaled(x, good))(1.0) == 2
    with pytest.raises(ValueError, match="loss: expected T to be > 0, got -2.0"):
        jax.jit(lambda x: scaled(x, bad))(1.0)


@pytest.mark.parametrize("value", [10**400, 10**30, 1e300])
def test_a_number_that_no_32_bits_hold_is_refused(unchecked, value):
    with pytest.raises(ValueError, match="loss: expected T to fit in 32 bits"):
        _checks.positive("loss", T=value)


@pytest.mark.parametrize("value", [True, 2**31, None, float("nan"), jnp.ones(3)])
def test_what_is_no_integer_is_described(unchecked, value):
    with pytest.raises(ValueError, match="loss: expected n to be an integer >= 0"):
        _checks.integer("loss", 0, n=value)


@pytest.mark.parametrize("value", [True, [True, False], "all", jnp.ones(2)])
def test_a_mask_is_an_array(unchecked, value):
    with pytest.raises(ValueError, match=r"loss: expected where to be bool \(2,\)"):
        _checks.mask("loss", value, (2,))


def test_kinds_and_functions(unchecked):
    _checks.instance("f", (str, int), name="a", kind=1)
    with pytest.raises(TypeError, match="f: expected name to be str or int, got None"):
        _checks.instance("f", (str, int), name=None)
    with pytest.raises(TypeError, match="f: expected name to be str or None, got 3"):
        _checks.instance("f", (str, type(None)), name=3)
    with pytest.raises(TypeError, match="f: expected do to be int, got 'x'"):
        _checks.instance("f", int, do="x")  # a user may give a term this name
    _checks.function("f", view=abs)
    with pytest.raises(TypeError, match="f: expected view to be a function, got 3"):
        _checks.function("f", view=3)


def test_a_function_of_other_arguments_is_refused_before_it_is_called():
    def good(x, train, *, scale=1):
        raise AssertionError

    _checks.accepts("f", ("x",), ("train",), good=good, any=lambda *a, **k: a)
    _checks.accepts("f", ("x",), built_in=max)  # Python does not know its parameters
    with pytest.raises(
        TypeError, match=r"f: expected g to take \(x, train=\), got \(x"
    ):
        _checks.accepts("f", ("x",), ("train",), g=lambda x: x)


def test_numpys_integers_are_integers(unchecked):
    _checks.positive_int("loss", n=np.int64(3))
    with pytest.raises(ValueError, match="n to be an integer >= 1, got"):
        _checks.positive_int("loss", n=np.int64(0))


# Sentences inside another error's message, caught in the function that raises them.
INSIDE = {"training/sealed.py", "weights/safetensors.py"}


@pytest.mark.parametrize("kind", ["ValueError", "TypeError", "OSError"])
def test_every_error_about_input_is_a_refusal(kind):
    """The command shows a `Refusal` as a sentence, and any other error as a defect."""
    package = Path(_checks.__file__).parent
    raised = {
        f"{path.relative_to(package)}:{node.lineno}"
        for path in package.rglob("*.py")
        if str(path.relative_to(package)) not in INSIDE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and ast.unparse(node.exc.func) == kind
    }
    assert raised == set()


def test_a_refusal_is_also_the_error_that_python_has_for_it():
    assert issubclass(_checks.Refusal, ValueError)
    assert issubclass(_checks.WrongType, (TypeError, _checks.Refusal))
    full = _checks.FileRefusal(28, "save: nothing was written", "run")
    assert isinstance(full, OSError) and full.errno == 28
    assert isinstance(full, _checks.Refusal)
    copied = copy.copy(_checks.WrongType("kd: expected a, got b."))
    assert type(copied) is _checks.WrongType and str(copied) == "kd: expected a, got b."
