"""One run from its config: data, teacher, student, phases, and what is left on disk.

A run directory holds config.yaml, metrics.jsonl, TensorBoard events, checkpoints,
and, when it is finished, the student alone (`student/`, an Orbax tree that a plain
`module.apply` takes) and result.json. Runs of one `Setting` share the data on the
device and their compiled programs.
"""

import dataclasses
import functools
import importlib
import inspect
import json
import os
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hintjax import config as configs
from hintjax._checks import message
from hintjax.checkpoint import load_tree, save_tree
from hintjax.config import Config
from hintjax.data import (
    Augment,
    Dataset,
    Split,
    Standardize,
    evaluation_batches,
    fits_on_device,
    load,
    steps_per_epoch,
)
from hintjax.export import deployed, deployed_variables
from hintjax.method import Data
from hintjax.networks import Network, Variables, Wants, join, linen, split
from hintjax.networks_nnx import nnx
from hintjax.places import Places
from hintjax.processes import agree, each, told
from hintjax.recipes import Recipe, Step, backprop
from hintjax.rundir import owned, read_json, write_text
from hintjax.sharding import Layout, make_mesh, over_batch, place, shares, spread
from hintjax.spikes import SpikeGuard
from hintjax.stages import distillation_stage, hint_stage, student_variables
from hintjax.train import (
    Fitted,
    Phase,
    Program,
    evaluate,
    fit,
    on_device,
    program,
    streamed,
)

RESULT = "result.json"
DEPLOYED = "deployed"  # what is shipped of a student that does not stand alone
EVALUATION_BATCH = 500
_JUDGED = 1000  # validation examples on which a teacher is judged, at most
# Of a config: what says nothing of one run's training, or is known better otherwise
# (a teacher by its fingerprint), and what may change when a run goes on.
_ELSEWHERE = (
    *("compare", "data_dir", "rates", "seeds"),
    *("teacher", "teacher_at_least", "teacher_epochs"),
)
_HARMLESS = (
    *("checkpoint_every", "checkpoint_seconds"),
    *("debug", "devices", "dispatch", "fsdp"),
)


class Setting(NamedTuple):
    """What runs share.

    Attributes:
        config: the run's, or the comparison's.
        dataset: decoded, on the host.
        inputs: one image, for shapes.
        student: the network.
        teacher: the network; None if no teacher is needed.
        places: where methods attach to the networks.
        layout: the mesh that they train on; None for a single device.
        programs: compiled stages by name, epochs and kind; filled as they are used.
    """

    config: Config
    dataset: Dataset
    inputs: jax.Array
    student: Network
    teacher: Network | None
    places: Places
    layout: Layout | None
    programs: dict[Any, Program]


def factory(name: str) -> Callable[..., Any]:
    """What `package.module:name` names.

    Raises:
        ValueError: if there is no such factory.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        do = "For instance hintjax.models:resnet20."
        raise ValueError(message("model", "package.module:factory", repr(name), do))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            message("model", f"to import {module_name}", f"{error}")
        ) from None
    if not hasattr(module, attribute):
        near = ", ".join(configs.nearest(attribute, dir(module)))
        do = f"Nearest: {near}."
        wanted = f"a factory in {module_name}"
        raise ValueError(message("model", wanted, attribute, do))
    made = getattr(module, attribute)
    parameters = _parameters(made)
    missing = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in ("self", "classes", "rngs")
    ]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if missing or not ("classes" in parameters or any_name):
        takes = ", ".join(missing or parameters) or "nothing"
        got = f"one that wants {takes}"
        wanted = f"{name} to be a factory, called as {attribute}(classes=...)"
        raise ValueError(message("model", wanted, got))
    return made


def network(name: str, classes: int) -> Network:
    """The network that a factory makes.

    Args:
        name: of the factory, which is called as factory(classes=...) and makes a Flax
            Linen module or a `Network`; or as factory(classes=..., rngs=...), if it
            takes `rngs`, and makes a Flax NNX model.
        classes: of the data set.

    Returns:
        The network.

    Raises:
        ValueError: if there is no such factory, or it makes something else.
    """
    made = factory(name)
    if _takes_rngs(made):
        return nnx(functools.partial(made, classes=classes))
    made = made(classes=classes)
    if isinstance(made, Network):
        return made
    if isinstance(made, nn.Module):
        return linen(made)
    wanted = f"{name} to make a Flax Linen module or a hintjax.Network"
    do = "A factory of NNX models takes rngs."
    raise ValueError(message("model", wanted, type(made).__name__, do))


def _attribute(name, classes, attribute, missing):
    """What a factory's module says of itself, such as its preactivations."""
    made = factory(name)
    if _takes_rngs(made):
        return missing
    return getattr(made(classes=classes), attribute, missing)


def _takes_rngs(made):
    return "rngs" in _parameters(made)


def _parameters(made):
    """What a factory is called with; nothing, if it cannot be called or does not say."""
    # The class of an NNX model hides the parameters of its __init__.
    called = made.__init__ if isinstance(made, type) else made
    try:
        return inspect.signature(called).parameters
    except (TypeError, ValueError):
        return {}


def prepare(config: Config, *, teach: bool = False) -> Setting:
    """Reads the data and builds the networks of a run; trains nothing.

    Args:
        config: the run's.
        teach: whether it needs a teacher.

    Returns:
        The setting, with pairs as configured or else suggested by depth.
    """
    dataset = each(
        lambda: load(
            config.dataset, config.data_dir, limit=config.limit, size=config.size
        )
    )
    if jax.process_count() > 1:
        agree("data", _seen(dataset))
    steps_per_epoch(dataset.train.n, config.batch_size)  # raises
    layout = mesh_of(config)
    inputs = jnp.zeros((1, *dataset.train.shape), jnp.float32)
    student = each(lambda: network(config.student, dataset.classes))
    teacher = teacher_network(config, dataset.classes) if teach else None
    factories = [config.student, *([_factory(config)] if teach else [])]

    def said(attribute, missing):
        return tuple(
            _attribute(name, dataset.classes, attribute, missing) for name in factories
        )

    places = Places(
        student=layers(student, inputs),
        teacher=layers(teacher, inputs) if teach else {},
        pairs=tuple(map(configs.parse_pair, config.pairs)),
        preactivations=said("preactivations", {}),
        norms=said("norms", {})[-1],
        class_tokens=said("class_tokens", 0),
        examples=dataset.train.n,
    )
    return Setting(config, dataset, inputs, student, teacher, places, layout, {})


def mesh_of(config: Config) -> Layout | None:
    """The mesh that a config asks for; None if that is one device.

    Raises:
        ValueError: if there are not so many devices, or they cannot share a batch.
    """
    devices = jax.devices()
    wanted = config.devices or len(devices)
    if wanted > len(devices) or (jax.process_count() > 1 and wanted < len(devices)):
        least = "at most" if jax.process_count() == 1 else "all"
        got = f"{wanted} of {jax.device_count()}"
        raise ValueError(message("config", f"{least} the devices that are here", got))
    if wanted % config.fsdp:
        got = f"{config.fsdp} with {wanted} devices"
        raise ValueError(message("config", "fsdp to divide the devices", got))
    if config.batch_size % wanted:
        low = config.batch_size // wanted * wanted
        sizes = " or ".join(str(n) for n in (low, low + wanted) if n)
        do = f"Use {sizes}, or fewer --devices."
        text = f"a batch_size that {wanted} devices can share evenly"
        raise ValueError(message("config", text, f"{config.batch_size}", do))
    if wanted == 1:
        return None
    shares = {"fsdp": config.fsdp} if config.fsdp > 1 else {}
    return Layout(make_mesh(**shares, devices=devices[:wanted]))


def layers(network: Network, inputs: jax.Array) -> dict[str, jax.ShapeDtypeStruct]:
    """The layers of a network for such inputs, found without computing anything."""
    variables = jax.eval_shape(network.init, jax.random.key(0), inputs)
    return network.layers(*variables, inputs)


def teacher_network(config: Config, classes: int) -> Network:
    """The network of the configured teacher, whether it is trained yet or not."""
    if ":" not in config.teacher:
        load_student(config.teacher)  # raises if it is not finished, or no teacher
    name = _factory(config)
    return each(lambda: network(name, classes))


def _seen(dataset: Dataset) -> dict[str, Any]:
    """What tells data sets apart; of what lies on a disk not every image is read."""
    found = {
        "classes": dataset.classes,
        "mean and std": [array.tolist() for array in dataset.standardize],
    }
    for name in ("train", "validation", "test"):
        split = getattr(dataset, name)
        sums = map(np.ascontiguousarray, split) if isinstance(split, Split) else ()
        found[name] = [split.n, *split.shape, *map(zlib.crc32, sums)]
    return found


def _factory(config):
    """The factory of the configured teacher."""
    if ":" in config.teacher:
        return config.teacher
    return run_config(Path(config.teacher)).student


def teacher_variables(config: Config, run_dir: Path, **how: Any) -> Variables:
    """The teacher's variables: from the run that left them, or trained now.

    Args:
        config: of the run that needs a teacher.
        run_dir: of that run; a teacher that is trained goes to `run_dir/teacher`.
        **how: see `run`.
    """
    if ":" not in config.teacher:
        return load_student(config.teacher)[1]
    path = run_dir / "teacher"
    if read_json(path / RESULT) is None:
        own = dataclasses.replace(
            config,
            method="backprop",
            student=config.teacher,
            epochs=config.teacher_epochs,
            hint_epochs=None,
            limit=None,
            pairs=(),
            weight=None,
            task_weight=None,
            cosine=False,
        )
        run(prepare(own), path, backprop, resume=True, **how)
    return load_student(path)[1]


def load_student(
    run_dir: str | os.PathLike[str], *, hints_only: bool = False
) -> tuple[Network, Variables]:
    """The student that a finished run left, with its network.

    Args:
        run_dir: of the run.
        hints_only: take also a student whose own output was not trained, since it is
            deployed with other parts; see `load_deployed`.

    Raises:
        ValueError: if the run has none.
    """
    path = Path(run_dir).expanduser()
    config = run_config(path)

    def classes():
        if not (path / "student").exists():
            do = f"Finish it with `hintjax resume {path}`."
            raise ValueError(message("teacher", f"a student in {path}", "none", do))
        if (path / DEPLOYED).exists() and not hints_only:
            wanted = f"a student in {path} that stands alone"
            got = f"one of {config.method}, which is deployed with other parts"
            raise ValueError(message("teacher", wanted, got))
        return json.loads((path / RESULT).read_text())["classes"]

    made = network(config.student, told(classes))
    return made, split(load_tree(path / "student"))


def run_config(run_dir: Path) -> Config:
    """The config of a run directory, in all processes."""
    return configs.from_dict(told(lambda: dataclasses.asdict(configs.load(run_dir))))


def load_deployed(
    setting: Setting, run_dir: str | os.PathLike[str], recipe: Recipe
) -> tuple[Network, Variables]:
    """What a finished run ships: its student, or the network that its method says.

    Args:
        setting: of the run.
        run_dir: of the run.
        recipe: of the run.
    """
    path = Path(run_dir).expanduser()
    if not (path / DEPLOYED).exists():
        return load_student(path)
    per_epoch = steps_per_epoch(setting.dataset.train.n, setting.config.batch_size)
    method = recipe(setting.config, setting.places, per_epoch)[-1].method
    variables = Variables(**load_tree(path / DEPLOYED))
    return deployed(setting.student, setting.teacher, method), variables


def accuracy(
    network: Network, variables: Variables, split: Split, standardize: Standardize
) -> float:
    """The share of a split that a network gets right."""
    apply = jax.jit(
        lambda variables, images: network.apply(
            *variables, images, wants=Wants(output=True), train=False
        )[0].output.argmax(-1)
    )
    right = 0
    for batch in evaluation_batches(split, EVALUATION_BATCH, standardize):
        found = apply(variables, batch["image"]) == batch["label"]
        right += int((found & batch["where"]).sum())
    return right / split.n


def check(setting: Setting, recipe: Recipe) -> list[Step]:
    """Traces every phase of a recipe on shapes alone: what cannot work raises here.

    Args:
        setting: of the run.
        recipe: its phases.

    Returns:
        The phases.
    """
    config, train = setting.config, setting.dataset.train
    key, size = jax.random.key(0), config.batch_size
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    image = jax.ShapeDtypeStruct((size, *train.shape), jnp.float32)
    batch = {"image": image, "label": of((size,)), "index": of((size,))}
    student, teacher = (
        None if network is None else jax.eval_shape(network.init, key, setting.inputs)
        for network in (setting.student, setting.teacher)
    )
    per_epoch = steps_per_epoch(train.n, size)
    state, steps = None, list(recipe(config, setting.places, per_epoch))
    for step in steps:
        stage = _phase(setting, step, config, per_epoch).program.stage
        carry = state if step.carry else None
        data = Data(of((train.n,)))
        state = jax.eval_shape(stage.init, key, student, teacher, batch, data, carry)
        jax.eval_shape(stage.update, state, teacher, batch)
    return steps


def run(
    setting: Setting,
    run_dir: Path,
    recipe: Recipe,
    *,
    teacher: Variables | None = None,
    hints: Variables | None = None,
    initial: Network | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    **how: Any,
) -> tuple[Fitted, dict[str, Any]]:
    """One run, from the data to the student on disk.

    Args:
        setting: what it shares with other runs.
        run_dir: where it leaves everything.
        recipe: its phases.
        teacher: the teacher's variables.
        hints: the variables of the hint stage's teacher, if that is another one.
        initial: the network that initialises the student, if that differs.
        learning_rate: instead of the config's.
        seed: instead of the config's.
        **how: resume and show, see `fit`.

    Returns:
        How it went, and what result.json says.
    """
    config = setting.config
    config = dataclasses.replace(
        config,
        learning_rate=learning_rate or config.learning_rate,
        seed=config.seed if seed is None else seed,
    )
    with owned(run_dir):
        if not told((run_dir / configs.FILE).exists):
            configs.save(config, run_dir)
        return _run(setting, config, run_dir, recipe, teacher, hints, initial, **how)


def _run(setting, config, run_dir, recipe, teacher, hints, initial, **how):
    dataset = setting.dataset
    initialise, feeding, fitting = jax.random.split(jax.random.key(config.seed), 3)
    augment, layout = Augment(pad=config.pad, flip=config.flip), setting.layout
    mesh = layout and layout.mesh
    if layout is not None:
        teacher, hints = (
            None if variables is None else place(variables, layout)
            for variables in (teacher, hints)
        )
    if fits_on_device(dataset.train):
        feed = on_device(dataset, config.batch_size, feeding, mesh)
    else:
        feed = streamed(dataset, config.batch_size, config.seed, augment, mesh)
    steps = recipe(config, setting.places, feed.per_epoch)
    phases = [
        _phase(setting, step, config, feed.per_epoch)._replace(
            teacher=hints if step.hints_only and hints is not None else teacher
        )
        for step in steps
    ]
    batches = functools.partial(_batches, setting)
    validation = functools.partial(batches, dataset.validation)
    if fits_on_device(dataset.validation):
        validation = functools.partial(list, list(validation()))
    fitted = fit(
        run_dir,
        phases,
        feed,
        (initial or setting.student).init(initialise, setting.inputs),
        key=fitting,
        validation=validation,
        evaluate_every=config.evaluate_every,
        checkpoint_every=config.checkpoint_every,
        checkpoint_seconds=config.checkpoint_seconds,
        identity={
            name: value
            for name, value in dataclasses.asdict(config).items()
            if name not in _ELSEWHERE
        },
        harmless=_HARMLESS,
        dispatch=config.dispatch,
        debug=config.debug,
        **how,
    )
    stage = phases[-1].program.stage
    result = {"steps": fitted.steps, "seconds": round(fitted.seconds, 2)}
    result["spent"] = {name: round(s, 2) for name, s in fitted.spent.items()}
    result |= {"boundaries": list(fitted.boundaries), "classes": dataset.classes}
    for name in ("validation", "test"):
        found = evaluate(stage, fitted.state, teacher, batches(getattr(dataset, name)))
        result |= {f"{name}/{key}": value for key, value in found.items()}
        result[f"{name}/accuracy"] = next(
            value for key, value in found.items() if key.endswith("/accuracy")
        )
    save_tree(run_dir / "student", join(student_variables(fitted.state)))
    method = steps[-1].method
    if method.deploy is not None:
        parts = (fitted.state, method, setting.teacher, teacher, setting.inputs)
        save_tree(run_dir / DEPLOYED, deployed_variables(*parts)._asdict())
    write_text(run_dir / RESULT, json.dumps(result, indent=1))
    return fitted, result


def _batches(setting, split):
    """A split to evaluate on, in batches that all devices can share."""
    mesh = setting.layout and setting.layout.mesh
    parts = 1 if mesh is None else shares(mesh)
    size = -(-EVALUATION_BATCH // parts) * parts
    found = evaluation_batches(split, size, setting.dataset.standardize)
    return found if mesh is None else (spread(b, over_batch(mesh)) for b in found)


def check_teacher(setting: Setting, variables: Variables) -> float:
    """Warns about a teacher that knows little of the validation split.

    It is looked at whenever a run begins or goes on, and so with a few examples, which
    are spread over the split. Usually such a teacher was trained on inputs that were
    standardised otherwise, or on labels in another order; what its hints are worth is
    then doubtful.

    Args:
        setting: of the run.
        variables: the teacher's.

    Returns:
        Its accuracy.
    """
    config, dataset = setting.config, setting.dataset
    n = dataset.validation.n
    few = np.linspace(0, n - 1, min(n, _JUDGED)).astype(int)
    split = dataset.validation.read(few)
    found = accuracy(setting.teacher, variables, split, dataset.standardize)
    if found < config.teacher_at_least:
        warnings.warn(
            f"teacher {config.teacher}: {100 * found:.1f} % of {split.n} validation "
            f"examples are right, less than {100 * config.teacher_at_least:.0f} %. Was it trained "
            f"on inputs that were standardised in another way, or with other labels? "
            f"--teacher-at-least says what is enough.",
            stacklevel=2,
        )
    return found


def _phase(setting, step, config, per_epoch):
    label = (step.name, step.epochs, step.hints_only)
    if label not in setting.programs:
        setting.programs[label] = program(
            _stage(setting, step, config, per_epoch),
            config.batch_size,
            Augment(pad=config.pad, flip=config.flip),
            setting.layout and setting.layout.mesh,
        )

    def adjust(state):
        rate = jnp.asarray(config.learning_rate, jnp.float32)
        opt_state = optax.tree.set(state.opt_state, learning_rate=rate)
        return state._replace(opt_state=opt_state)

    return Phase(
        name=step.name,
        program=setting.programs[label],
        steps=step.epochs * per_epoch,
        carry=step.carry,
        patience=config.patience if step.hints_only else None,
        adjust=adjust,
    )


def _stage(setting, step, config, per_epoch):
    optimiser = _optimiser(config, step.epochs * per_epoch)
    networks = (setting.student, setting.teacher, step.method, optimiser)
    factor = config.spike_factor
    how = {
        "mesh": setting.layout,
        "accumulate": config.accumulate,
        "spikes": None if factor is None else SpikeGuard(factor),
    }
    if step.hints_only:
        return hint_stage(*networks, **how)
    return distillation_stage(*networks, rates=step.rates, **how)


def _optimiser(config, steps):
    """The learning rate is in the state, so that one program serves every rate."""
    decay, rate = config.weight_decay, config.learning_rate
    if config.optimizer == "adam":
        made = optax.inject_hyperparams(optax.adamw)(rate, weight_decay=decay)
    else:
        sgd = functools.partial(optax.sgd, momentum=0.9, nesterov=True)
        made = optax.chain(
            optax.add_decayed_weights(decay), optax.inject_hyperparams(sgd)(rate)
        )
    if config.cosine:
        made = optax.chain(
            made, optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, steps))
        )
    return made
