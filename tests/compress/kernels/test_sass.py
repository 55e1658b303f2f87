from __future__ import annotations

import sys

import pytest

from compress.kernels import model, sass
from compress.kernels.sass import disassemble, disassembler, loads_under_way
from compress.kernels.toolchain import Source, compile_for, header_folders, load_nvrtc
from runtime.errors import EdgestillError, UnavailableError


def listing(*instructions):
    """As nvdisasm prints them; what ends with a colon is a label."""
    lines = [
        text if text.endswith(":") else f"        /*{16 * place:04x}*/  {text} ;"
        for place, text in enumerate(instructions)
    ]
    return "\n".join([".text.kernel_f16:", *lines, ""])


def counted(*instructions):
    return loads_under_way(listing(".L_x_1:", *instructions, "@P0 BRA `(.L_x_1)"))["kernel_f16"]


@pytest.mark.parametrize(
    ("instructions", "loads"),
    [
        ([], 0),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "FADD R9, R4, R5"], 1),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "@!P1 LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10]"], 2),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "FADD R1, R7, R0", "LDG.E.128 R8, desc[UR4][R2.64]"], 1),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "MOV R5, RZ", "LDG.E.128 R8, desc[UR4][R2.64]"], 1),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R6.64]"], 1),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R4, desc[UR4][R2.64]"], 1),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E R8, desc[UR4][R2.64]"], 1),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "BRA `(.L_x_9)", "LDG.E.128 R8, desc[UR4][R2.64]"], 1),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "@P1 EXIT", "LDG.E.128 R8, desc[UR4][R2.64]"], 2),
        (["LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]"] * 3, 3),
        (["LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]", "DEPBAR.LE SB0, 0x0"] * 2, 1),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64]"], 2),
    ],
    ids=[
        "none",
        "used at once",
        "two together",
        "used before the next",
        "overwritten before the next",
        "address of the next",
        "into the same registers",
        "a single value beside it",
        "what follows a jump",
        "what follows a conditional exit",
        "copies",
        "copies waited for",
        "both kinds",
    ],
)
def test_loads_are_counted_until_the_first_is_needed(instructions, loads):
    assert counted(*instructions) == loads


def test_loads_outside_of_loops_do_not_count():
    one = "LDG.E.128 R{}, desc[UR4][R2.64]"
    assert loads_under_way(listing(one.format(4), one.format(8), "EXIT")) == {"kernel_f16": 0}
    loop = (one.format(4), one.format(8), ".L_x_1:", one.format(12), "@P0 BRA `(.L_x_1)", "EXIT")
    assert loads_under_way(listing(*loop)) == {"kernel_f16": 1}


def test_each_kernel_has_its_own_count():
    text = listing(".L_x_1:", "LDG.E.128 R4, desc[UR4][R2.64]", "@P0 BRA `(.L_x_1)")
    both = "header\n" + text + text.replace("kernel_f16", "kernel_f32").replace("LDG", "LDS")
    assert loads_under_way(both) == {"kernel_f16": 1, "kernel_f32": 0}


@pytest.fixture(scope="module")
def compiler_and_disassembler():
    try:
        header_folders()
        load_nvrtc()
        disassembler()
    except UnavailableError as error:
        pytest.skip(str(error))


def test_a_disassembled_kernel_shows_its_loads(compiler_and_disassembler, monkeypatch, tmp_path):
    monkeypatch.setattr("compress.kernels.toolchain.FOLDER", tmp_path)
    (tmp_path / "sum").mkdir()
    (tmp_path / "sum" / "kernel.cu").write_text(
        """extern "C" __global__ void sum(const float4* x, float* to, int n) {
            float sum = 0.0f;
        #pragma unroll 1
            for (int i = threadIdx.x; i < n; i += 1024) {
                const float4 a = x[i], b = x[i + 256], c = x[i + 512];
                sum += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w + c.x + c.y * c.z + c.w;
            }
            to[threadIdx.x] = sum;
        }"""
    )
    assert loads_under_way(disassemble(compile_for(Source("sum"), "sm_90").code)) == {"sum": 3}


def test_what_is_no_cubin_is_refused(compiler_and_disassembler):
    with pytest.raises(EdgestillError, match=r"^nvdisasm: "):
        disassemble(b"no cubin")


def test_without_the_disassembler_the_remedy_is_told(monkeypatch):
    disassembler.cache_clear()
    monkeypatch.setattr(sass.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    try:
        with pytest.raises(UnavailableError, match=r"nvdisasm.*pip install nvidia-cuda-nvdisasm"):
            disassembler()
    finally:
        disassembler.cache_clear()


def test_no_kernel_takes_more_or_has_less_under_way_than_the_model_says(compiler_and_disassembler):
    for name, found in model.found_kernels().items():
        assumed = model.KERNELS[name]
        assert found.registers <= assumed.registers, name
        assert found.static_shared <= assumed.static_shared, name
        assert found.loads >= assumed.loads, name
