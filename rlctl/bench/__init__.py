"""Benchmarks: a suite of algorithms, tasks and seeds, run cell by cell until every cell is finished.

suite.py     YAML -> a validated plan of cells
ledger.py    what has happened to each cell, on disk; one driver at a time
driver.py    starts cells, keeps count, retries, stops
executors/   where cells run: this machine, Ray, Slurm
worker.py    one cell in a process of its own
cost.py      steps and hours before they are spent
view.py      the table on a terminal, lines in a pipe
"""
