"""What can be trained; a file a task."""

from mnv2_fused.trainer.tasks.base import Task
from mnv2_fused.trainer.tasks.classification import Classification
from mnv2_fused.trainer.tasks.detection import Detection
from mnv2_fused.trainer.tasks.segmentation import Segmentation

TASKS: dict[str, Task] = {task.name: task for task in (Classification(), Detection(), Segmentation())}

__all__ = ["TASKS", "Task"]
