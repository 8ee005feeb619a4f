"""Pictures by matplotlib, one file for each kind."""
