"""Experts on several devices: plans of which device computes which tokens, their cost, and a dispatch by them.

``parallelize_experts`` puts expert parallelism into a model; the rest is for planning and for planners of your own.
"""

from spectralmoe.parallel.cost import Cost
from spectralmoe.parallel.expert_parallel import ExpertParallel, Planner
from spectralmoe.parallel.least_loaded import plan_least_loaded
from spectralmoe.parallel.parallelize import clip_gradients, expert_parameters, parallelize_experts, shard_experts
from spectralmoe.parallel.plan import Copy, Interval, Plan, plan_native
from spectralmoe.parallel.planners import LeastLoaded
from spectralmoe.parallel.replicas import plan_replicas
from spectralmoe.parallel.what_if import compare_plans, describe_plan, scaled_load

__all__ = [
    "Copy",
    "Cost",
    "ExpertParallel",
    "Interval",
    "LeastLoaded",
    "Plan",
    "Planner",
    "clip_gradients",
    "compare_plans",
    "describe_plan",
    "expert_parameters",
    "parallelize_experts",
    "plan_least_loaded",
    "plan_native",
    "plan_replicas",
    "scaled_load",
    "shard_experts",
]
