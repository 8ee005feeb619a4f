"""The command `methods`: the table of all methods, for a terminal or in Markdown."""

from hintjax.experiments import attachment
from hintjax.experiments.methods_table import METHODS
from hintjax.experiments.recipes import Alone, BeforeTask, Beside, Where

# Where a recipe attaches its method, in words.
ATTACHED: dict[Where, str] = {
    attachment.outputs: "the outputs",
    attachment.middle: "the middle of both networks",
    attachment.stages: "the ends of the stages",
    attachment.last_stage: "the end of the last stage",
    attachment.middle_stage: "the end of the middle stage",
    attachment.first_and_stages: "the first layers and the ends of the stages",
    attachment.before_relu: "the ends of the stages, before their ReLU",
    attachment.but_last: "the ends of the stages without the last stage",
    attachment.hidden_and_scores: (
        "the ends of the stages (a third of the blocks each), and their attention "
        "scores"
    ),
    attachment.last_relations: "queries, keys and values of the last blocks",
    attachment.pooled: "the pooled vectors, which the classifiers read",
    attachment.stages_and_pooled: (
        "the ends of the stages (the teacher's before their ReLU), and the pooled "
        "vectors"
    ),
    attachment.last_maps: "the last maps, which are pooled for the classifiers",
}


def markdown() -> str:
    """The table of all methods as the page `hintjax/methods/README.md` has it."""
    columns = ("name", "method", "transfers", "attaches to", "trains", "weight")
    rows = [(*columns, "reference", "file"), ("---",) * 8]
    for name, named in METHODS.items():
        method = named.recipe.method
        rows.append(
            (
                f"`{name}`",
                f"`{method.__name__}`",
                f"{named.title}: {named.transfers}",
                ATTACHED[named.recipe.where],
                named.trains,
                _weight(named.recipe),
                named.reference,
                f"`{method.__module__.replace('.', '/')}.py`",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def show(*, in_markdown: bool = False) -> None:
    """Prints the table for a terminal, or in Markdown.

    Args:
        in_markdown: whether to print `markdown()`, which has more columns.
    """
    if in_markdown:
        print(markdown())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console = Console(highlight=False, width=min(max(console.width, 80), 120))
    rows = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    rows.add_column("--method", no_wrap=True)
    rows.add_column("what the student learns", ratio=3)
    rows.add_column("attaches to", ratio=2)
    rows.add_column("weight", width=14)
    for name, named in METHODS.items():
        learns = f"{named.title}: {named.transfers}".replace("`", "")
        row = (name, learns, ATTACHED[named.recipe.where], _weight(named.recipe))
        rows.add_row(*row)
    rows.add_row("backprop", "the task alone, without a teacher", "", "")
    console.print(rows)
    print(
        "Change the attachment points with --pairs and the weights with --weight and\n"
        "--task-weight. `hintjax methods --markdown` adds the papers and the files."
    )


def _weight(recipe: Beside | BeforeTask | Alone) -> str:
    """The weights of the method and of the task, in words."""
    match recipe:
        case BeforeTask():
            return "alone, in a hint stage"
        case Alone():
            return "alone, without the task"
    number = recipe.weight
    shown = f"{number:g}" if isinstance(number, float) else str(number)
    task = recipe.task_weight
    return f"{shown}, the task {task:g}" if task != 1 else shown
