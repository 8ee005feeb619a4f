"""The report of a run or of a comparison: one HTML page, made from files alone.

`end_of_run` writes the files that a report needs beside the metrics: `facts` and the
picture `attention`. `report` writes report.html from these files: `ran` reads them,
and `of_run`, `of_comparison` and `of_runs` are the three pages. Their parts are
`curves`, `classes` and `parts`, numbers in words are `words`, pictures are `drawn`, and
`page` is HTML.
"""
