"""The `edgestill` command with one distillation loss more, which recipes and `--set` weigh by its name.

python examples/custom_loss.py run recipe.yaml --set 'distill.losses={soft: 1, objectness_l1: 0.5}'
python examples/custom_loss.py distill --data data.yaml --teacher teacher.safetensors --scale p --set ...
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.cli import main
from compress.losses.distill import LOSSES, Context, DistillLoss, Outputs


class ObjectnessL1(DistillLoss):
    """Sum over levels of mean |sigmoid(o_S) - sigmoid(o_T)|, o the objectness logits of cells and anchors."""

    name = "objectness_l1"
    compares_heads = True

    def compare(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        objectness = [
            (s[..., 4].float().sigmoid(), t[..., 4].float().sigmoid())
            for s, t in zip(student.raw, teacher.raw, strict=True)
        ]
        return torch.stack([(s - t).abs().mean() for s, t in objectness]).sum()


LOSSES[ObjectnessL1.name] = ObjectnessL1

if __name__ == "__main__":
    main()
