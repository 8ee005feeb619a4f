"""The application: runs, comparisons and reports that the command is made of."""
