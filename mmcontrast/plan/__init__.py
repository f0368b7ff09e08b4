"""`mmcontrast plan`: compute whether a batch fits on a device and what a sample costs, without weights, data or a GPU."""

from mmcontrast.plan.memory import CannotBePlanned
from mmcontrast.plan.result import GIB, Plan, TowerPlan
from mmcontrast.plan.run import plan_run, without_downloads
from mmcontrast.plan.table import plan_table

__all__ = ["GIB", "CannotBePlanned", "Plan", "TowerPlan", "plan_run", "plan_table", "without_downloads"]
