"""Experts on several devices: plans of which device computes what, in whole numbers, and what they would cost."""

from spectralmoe.parallel.controls import plan_random_spill
from spectralmoe.parallel.cost import Cost
from spectralmoe.parallel.least_loaded import plan_least_loaded
from spectralmoe.parallel.plan import Copy, Interval, Plan, plan_native
from spectralmoe.parallel.replicas import plan_replicas
from spectralmoe.parallel.what_if import compare_plans, describe_plan, scaled_load

__all__ = [
    "Copy",
    "Cost",
    "Interval",
    "Plan",
    "compare_plans",
    "describe_plan",
    "plan_least_loaded",
    "plan_native",
    "plan_random_spill",
    "plan_replicas",
    "scaled_load",
]
