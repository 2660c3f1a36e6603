"""Compiles a Mamba layer of 16 channels by AOTInductor, for any number of steps.

python export_model.py model.pt2
"""

import sys

import torch

import recurra


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = recurra.nn.Mamba(16)
        self.norm = torch.nn.RMSNorm(16)

    def forward(self, x):  # (1, T, 16)
        return x + self.mixer(self.norm(x))[0]


torch.manual_seed(0)
steps = torch.export.Dim("T", min=1, max=65536)
with torch.no_grad():
    program = torch.export.export(
        Model().eval(), (torch.randn(1, 100, 16),), dynamic_shapes={"x": {1: steps}}
    )
    torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
