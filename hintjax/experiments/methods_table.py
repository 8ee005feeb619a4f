"""The table of all methods that the command knows."""

import inspect
import re

from hintjax.experiments import recipes
from hintjax.experiments.recipes import Recipe

RECIPES: dict[str, Recipe] = {
    "ab": recipes.AB,
    "at": recipes.AT,
    "backprop": recipes.backprop,
    "catkd": recipes.CAT_KD,
    "cc": recipes.CC,
    "cosine": recipes.COSINE,
    "crd": recipes.CRD,
    "crd_in_batch": recipes.CRD_IN_BATCH,
    "crd_shared": recipes.CRD_SHARED,
    "cwd": recipes.CWD,
    "dist": recipes.DIST,
    "dkd": recipes.DKD,
    "fitnet": recipes.FITNETS_JOINTLY,
    "fitnets": recipes.FITNETS,
    "fsp": recipes.FSP,
    "ft": recipes.FT,
    "kd": recipes.KD,
    "mgd": recipes.MGD,
    "minilm": recipes.MINILM,
    "nst": recipes.NST,
    "ofd": recipes.OFD,
    "pkd": recipes.PKD,
    "pkt": recipes.PKT,
    "review": recipes.REVIEW,
    "rkd": recipes.RKD,
    "simkd": recipes.SIMKD,
    "soft": recipes.SOFT,
    "sp": recipes.SP,
    "std_kd": recipes.STANDARDIZED_KD,
    "tinybert": recipes.TINYBERT,
    "vid": recipes.VID,
}


def methods_table() -> str:
    """The table of `hintjax methods`, read off recipes and docstrings."""
    columns = ("name", "method", "transfers", "attaches to", "trains", "weight")
    rows = [(*columns, "reference", "file"), ("---",) * 8]
    for name, recipe in RECIPES.items():
        if recipe is recipes.backprop:
            continue
        method = recipe.method
        text = inspect.getdoc(method)
        summary = re.sub(r" \(see .*|\.$", "", text.splitlines()[0])
        where = inspect.getdoc(recipe.where)
        returned = " ".join(_section(text, "Returns").split())
        trains = re.search(r"trains (.*?)(?:[.;,]| beside)(?: |$)", returned)
        rows.append(
            (
                f"`{name}`",
                f"`{method.__name__}`",
                summary,
                where[0].lower() + where[1:].rstrip("."),
                trains[1] if trains else "nothing",
                _weight(recipe),
                " ".join(_section(text, "References").split()).rstrip("."),
                f"`{method.__module__.replace('.', '/')}.py`",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _section(text, name):
    """What a docstring says under a heading."""
    found = re.search(rf"^{name}:\n((?:(?: .*)?\n?)+)", text, re.MULTILINE)
    return found[1] if found else ""


def _weight(recipe):
    if isinstance(recipe, recipes.BeforeTask):
        return "alone, in a hint stage before the task"
    if isinstance(recipe, recipes.Alone):
        return "alone, without the task"
    number = recipe.weight
    shown = f"{number:g}" if isinstance(number, float) else str(number)
    task = recipe.task_weight
    return f"{shown}, the task {task:g}" if task != 1 else shown
