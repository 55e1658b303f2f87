from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime.errors import EngineError, InputError
from runtime.layers import (
    EngineLayer,
    TensorType,
    convolution_types,
    facts_of,
    layers_file,
    layers_in_json,
    layers_in_log,
    moved_bytes,
    moves_more,
    read_layers,
    save_layers,
)

LOG = """Layers:
Name: entry^bb^signal^2_myl0_0, LayerType: signal, Inputs: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 
Name: __myl_CorrSilu_myl0_1, LayerType: runtime_fusion, Inputs: [ { Name: a, Dimensions: [1,4,160,160], Strides: [102400,1,640,4], StrideOrder: [3,0,2,1], Datatype: Half, Format: (NHWC) Channel major format }], Constants: [ { Name: w, Dimensions: [8,4,6,6], Strides: [144,1,24,4], StrideOrder: [3,0,2,1], Datatype: Half, Format: (NHWC) Channel major format }], Outputs: [ { Name: b, Dimensions: [1,8,80,80], Strides: [51200,1,640,8], StrideOrder: [3,0,2,1], Datatype: Half, Format: (NHWC) Channel major format }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: stem][ONNX Layer: stem.sigmoid][ONNX Layer: stem.silu]
Name: down.0_U54_myl0_3, LayerType: correlation, Inputs: [ { Name: b, Dimensions: [-1,8,80,80], Strides: [51200,1,640,8], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }, { Name: c, Dimensions: [], Strides: [], StrideOrder: [], Datatype: Float, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: d, Dimensions: [-1,8,40,40], Strides: [12800,1,320,8], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], TacticName: x, StreamId: 0, Metadata: [ONNX Layer: down.0][ONNX Layer: down.0]

I/O Tensors:
 Name: canvas, IOMode: Input, DataType: UInt8
"""  # noqa: E501, W291


def conv(dtype: str, side: int, out: str = "") -> EngineLayer:
    shape = (1, 8, side, side)
    return EngineLayer(
        "c", "CaskConvolution", ("conv",), (TensorType(dtype, shape),), (TensorType(out or dtype, shape),)
    )


def test_layers_of_the_log_have_types_operators_and_bytes():
    first, second = layers_in_log(LOG)
    assert first.to_row() == {
        "name": "__myl_CorrSilu_myl0_1",
        "kind": "runtime_fusion",
        "inputs": "Half [1,4,160,160]",
        "outputs": "Half [1,8,80,80]",
        "moved_bytes": 2 * (4 * 160 * 160 + 8 * 80 * 80),
        "operators": "stem, stem.sigmoid, stem.silu",
    }
    assert second.inputs == (TensorType("Int8", (-1, 8, 80, 80)), TensorType("Float", ()))
    assert second.operators == ("down.0",)
    assert second.moved_bytes == 8 * 80 * 80 + 4 + 4 * 8 * 40 * 40
    assert convolution_types((first, second)) == {"Half -> Half": 1, "Int8 -> Float": 1}


@pytest.mark.parametrize(
    ("before", "after"), [("LayerType: correlation, ", ""), ("Datatype: Int8", "Datatype: Fp3")], ids=["row", "type"]
)
def test_a_line_that_is_not_understood_is_an_error(before, after):
    with pytest.raises(EngineError, match="not understood"):
        layers_in_log(LOG.replace(before, after))


@pytest.mark.parametrize(
    ("key", "half", "int8"),
    [
        ("Format/Datatype", "Channel major FP16 format where channel % 8 == 0", "Row major linear INT8 format"),
        ("Format/Datatype", "Half", "Int8"),
        ("Datatype", "Half", "Int8"),
    ],
)
def test_layers_of_the_inspector_are_those_of_the_log(key, half, int8):
    def tensor(kind, *shape):
        return {"Name": "t", "Location": "Device", "Dimensions": list(shape), key: kind}

    layer = {
        "Name": "stem.conv + PWN(stem.silu)",
        "LayerType": "CaskConvolution",
        "Inputs": [tensor(int8, 1, 4, 160, 160)],
        "Outputs": [tensor(half, 1, 8, 80, 80)],
        "Metadata": "[ONNX Layer: stem][ONNX Layer: stem.silu]",
    }
    (found,) = layers_in_json(json.dumps({"Layers": [layer], "Bindings": []}))
    assert found.types == "Int8 -> Half"
    assert found.operators == ("stem", "stem.silu")
    assert found.moved_bytes == 4 * 160 * 160 + 2 * 8 * 80 * 80


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": ["stem", "silu"]}', '{"Layers": [{"Name": "a"}]}'])
def test_an_inspector_that_gives_names_alone_is_an_error(text):
    with pytest.raises(EngineError, match="EngineInspector's layers are not understood"):
        layers_in_json(text)


def test_layers_are_read_beside_the_plan_that_they_are_of(tmp_path: Path):
    plan, layers = tmp_path / "toy.plan", layers_in_log(LOG)
    assert read_layers(plan, "a" * 64) == ()
    save_layers(plan, "a" * 64, layers)
    assert layers_file(plan).name == "toy.plan.layers.json"
    assert read_layers(plan, "a" * 64) == layers
    assert read_layers(plan, "b" * 64) == (), "they are of another build"


@pytest.mark.parametrize(
    "text", ["[]", '{"sha256": "a"}', '{"sha256": "a", "layers": [1]}', '{"sha256": "a", "layers": [{}]}', "hello"]
)
def test_a_damaged_list_is_one_line(tmp_path: Path, text: str):
    layers_file(tmp_path / "toy.plan").write_text(text)
    with pytest.raises(InputError, match=r"toy\.plan\.layers\.json") as caught:
        read_layers(tmp_path / "toy.plan", "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "fp16", "reason"),
    [
        ([conv("Int8", 100, "Float")], [conv("Half", 100)], "its INT8 moves 0.4 MB a call, FP16 moves 0.3"),
        ([conv("Int8", 100, "Half")], [conv("Half", 100)], ""),
        ([conv("Float", 100)], [conv("Half", 100)], ""),
        ([conv("Int8", 100, "Float")], [], ""),
        ([], [conv("Half", 100)], ""),
    ],
    ids=["more", "fewer", "no INT8", "FP16 not known", "layers not known"],
)
def test_int8_is_no_gain_where_it_moves_more_bytes_than_fp16(layers, fp16, reason):
    assert moves_more(layers, fp16) == reason


def test_the_facts_of_no_layers_are_empty():
    assert facts_of(()) == {}
    facts = facts_of([conv("Half", 4)])
    assert (facts["convolutions"], facts["moved_bytes"]) == ({"Half -> Half": 1}, moved_bytes([conv("Half", 4)]))
