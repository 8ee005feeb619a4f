"""The application: runs, comparisons and reports that the command is made of.

The options of a run are a `config`, and `setting` makes its parts: data, `tasks`,
networks (`factories`), `devices`, and the layers to match (`attachment`). `recipes` are
the published ways to train with each method, and `methods_table` names them. `phases`
compiles a recipe, `run` trains, and `finished` reads the results.

A teacher is named (`teacher`), trained or loaded (`teaching`, `pretrained`), and its
features may be stored (`caching`, `cached_teacher`) or standardized (`standardizing`).

Before a run, `forecast` tells its cost and `doubts` what may be wrong. After it,
`explained` says how much of the hint the student explains (from `feature_maps`), and
`report` writes a page with `pictures`. A `comparison` has several runs, a table
(`comparison_table`, with the `statistics` of its seeds) and a picture
(`comparison_picture`).

`commands` lists the commands with their options. Most commands work in a file of their
own: `distill` (with resume), which runs the `plan` of a config, `evaluating` (eval,
cache), `listing` (methods), `suggestion` (suggest), `probing` (probe), `exporting`
(export), `measuring` (measure).
`tuning` is the folder of `hintjax tune`. `launch` starts and ends one process among
several.
"""
