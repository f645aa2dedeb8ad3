"""What a distillation step takes of a device's memory: worked out, and tracked without one."""

from sadkern.plan.estimate import Estimate, estimate, largest_batch
from sadkern.plan.setting import Setting

__all__ = ["Estimate", "Setting", "estimate", "largest_batch"]
