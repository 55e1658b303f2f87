"""A teacher that trains along with its student: on the labels alone, while the student also learns from its outputs.

The student sees the teacher's outputs of the same batch without gradient, so its losses move no weight of the teacher.
"""

from __future__ import annotations

import copy

import torch

from compress.compute.device import pick_device, to_device
from compress.compute.timing import Stopwatch
from compress.config import DistillConfig
from compress.log import Log
from compress.models import YOLOv5
from compress.training.checks import PROBE_IMAGES
from compress.training.objective import Objective, detection_loss

MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2}
"""Tensors that an optimiser keeps for each parameter."""
BYTES = 4
"""Training keeps float32 weights, gradients, moments and averages."""


def join(objective: Objective, teacher: YOLOv5, config: DistillConfig, device: str, log: Log) -> None:
    """Make the teacher a part of the objective that trains too, and log what that costs."""
    objective.teacher = Objective(teacher.requires_grad_(True), detection_loss(teacher, config))
    log(joint_cost_line(objective.model, teacher, config, pick_device(device)))


def joint_cost_line(student: YOLOv5, teacher: YOLOv5, config: DistillConfig, device: torch.device) -> str:
    """One line: the time of both networks' forward and backward, measured on copies, and the teacher's memory."""
    images = torch.full((PROBE_IMAGES, 3, config.imgsz, config.imgsz), 0.5, device=device)
    networks = {name: to_device(copy.deepcopy(net).train(), device) for name, net in (("s", student), ("t", teacher))}
    watch = Stopwatch(device)
    for _ in range(2):  # the first round warms up
        watch.seconds.clear()
        for name, network in networks.items():
            with watch.phase(name):
                torch.stack([level.square().mean() for level in network(images)]).sum().backward()
    student_ms, teacher_ms = (1e3 * watch.seconds[name] / PROBE_IMAGES for name in networks)
    copies = 3 + MOMENTS[config.optimizer.name]
    size_mib = copies * BYTES * sum(parameter.numel() for parameter in teacher.parameters()) / 2**20
    return (
        f"joint: the teacher trains too, {teacher_ms:.1f} ms an image beside the student's {student_ms:.1f} ms, and "
        f"{size_mib:.0f} MiB for its weights, gradients, moments and average, beside its activations"
    )
