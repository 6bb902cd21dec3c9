"""Converts TensorFlow's DeepLabv3: ``python examples/convert_deeplab_tflite.py IN.tflite OUT.safetensors [STRIDE]``.

IN is DeepLabv3 on MobileNetV2, float or uint8; STRIDE is its output stride, 16 by default. Needs ai-edge-litert.
"""

import sys

import torch
from ai_edge_litert.interpreter import Interpreter
from safetensors.torch import save_file

graph = Interpreter(sys.argv[1])
details = {detail["index"]: detail for detail in graph.get_tensor_details()}


def constant(index):
    """A weight or bias in float32."""
    values, quantised = graph.get_tensor(index), details[index]["quantization_parameters"]
    if quantised["scales"].size:
        values = (values - quantised["zero_points"]) * quantised["scales"]
    return torch.from_numpy(values.astype("float32"))


convs = [op for op in graph._get_ops_details() if op["op_name"] in ("CONV_2D", "DEPTHWISE_CONV_2D")]
names = [f"backbone.features.{i}" for i in ("0.0", "1.conv.0.0", "1.conv.1")]
names += [f"backbone.features.{i}.conv.{j}" for i in range(2, 18) for j in ("0.0", "1.0", "2")]
convs[51:-2] = sorted(convs[51:-2], key=lambda op: details[op["outputs"][0]]["shape"][1] > 1)  # the pooled one first
names += ["classifier.pool.0", *(f"classifier.aspp{i}.0" for i in range(len(convs) - 54)), "classifier.project.0"]
tensors = {}
for name, op in zip([*names, "classifier.logits"], convs, strict=True):
    weight, bias = constant(op["inputs"][1]), constant(op["inputs"][2])
    axes = (0, 3, 1, 2) if op["op_name"] == "CONV_2D" else (3, 0, 1, 2)
    tensors[f"{name}.weight"] = weight.permute(*axes).contiguous()
    norm = name if name == "classifier.logits" else name[:-1] + str(int(name[-1]) + 1)
    tensors[f"{norm}.bias"] = bias
    if norm != name:  # batch norm was folded at the source, so it becomes an identity
        for key, value in (("weight", 1), ("running_mean", 0), ("running_var", 1 - 1e-5)):
            tensors[f"{norm}.{key}"] = torch.full_like(bias, value)
save_file(tensors, sys.argv[2], {"convention": "tensorflow", "output_stride": (sys.argv[3:] or ["16"])[0]})
print(f"{len(convs)} convolutions")
