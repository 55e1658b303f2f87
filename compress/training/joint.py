"""A teacher that trains along with its student: on the labels alone, while the student also learns from its outputs.

The student sees the teacher's outputs of the same batch without gradient, so its losses move no weight of the teacher.
"""

from __future__ import annotations

from compress.config import DistillConfig
from compress.models import YOLOv5
from compress.training.objective import Objective, detection_loss


def join(objective: Objective, teacher: YOLOv5, config: DistillConfig) -> None:
    """Make the teacher a part of the objective that trains too."""
    objective.teacher = Objective(teacher.requires_grad_(True), detection_loss(teacher, config))
