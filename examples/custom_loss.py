"""Add a distillation loss to the table of losses, and distil a student with it.

python examples/custom_loss.py --data data.yaml --teacher runs/recipe/teacher/teacher.safetensors --out runs/custom
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.config import DistillConfig
from compress.data.dataset_yaml import load_data
from compress.distill import distill
from compress.losses.distill import LOSSES, DistillLoss, Outputs
from runtime.errors import EdgestillError


class ObjectnessL1(DistillLoss):
    """Sum over levels of mean |sigmoid(o_S) - sigmoid(o_T)|, o the objectness logits of cells and anchors."""

    compares_heads = True

    def compare(self, student: Outputs, teacher: Outputs) -> Tensor:
        pairs = zip(student.raw, teacher.raw, strict=True)
        return torch.stack([(s[..., 4].sigmoid() - t[..., 4].sigmoid()).abs().float().mean() for s, t in pairs]).sum()


LOSSES["objectness_l1"] = ObjectnessL1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data.yaml")
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint that knows the classes of the data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the training")
    parser.add_argument("--scale", default="p", help="size of the student (default: p)")
    parser.add_argument("--epochs", type=int, default=60, help="(default: 60)")
    parser.add_argument("--imgsz", type=int, default=320, help="side of the images in pixels (default: 320)")
    parser.add_argument("--weight", type=float, default=1.0, help="of the loss (default: 1)")
    options = parser.parse_args(arguments)
    losses = {"obj_kd": 1.0, "objectness_l1": options.weight}
    config = DistillConfig(epochs=options.epochs, imgsz=options.imgsz, losses=losses)
    try:
        data = load_data(options.data)
        result = distill(config, data=data, teacher=options.teacher, out=options.out, scale=options.scale)
    except EdgestillError as error:
        sys.exit(f"error: {error}")
    print(f"{result.best}: mAP50-95 {result.metrics['metrics/mAP_0.5:0.95']:.4f}")


if __name__ == "__main__":
    main()
