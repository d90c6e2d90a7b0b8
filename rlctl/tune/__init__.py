"""Hyperparameter search that does not mistake luck for skill.

Every trial is judged on several seeds (and tasks); poor ones are stopped early by their intermediate evaluations; the
best ones, which were also the luckiest, are run again on fresh seeds beside the default settings, and only what is then
separated from the default is called better.
"""

from rlctl.tune.runner import Cell, ExecutorRunner, Handle, Runner, local
from rlctl.tune.space import Param, parse_param
from rlctl.tune.study import Plan, Tuner

__all__ = ["Cell", "ExecutorRunner", "Handle", "Param", "Plan", "Runner", "Tuner", "local", "parse_param"]
