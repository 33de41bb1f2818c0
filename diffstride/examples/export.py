"""A network of learned strides as an ONNX file that onnxruntime runs.

python3 -m diffstride.examples.export, some 20 seconds on two CPU cores.
"""

import numpy as np
import onnxruntime

from diffstride import DiffStride, freeze, resnet

model = resnet.resnet18(num_output_classes=10, pooling_cls=DiffStride)
model.build((None, 32, 32, 3))  # And then trained.
freeze(model).export('resnet18.onnx', format='onnx')

session = onnxruntime.InferenceSession('resnet18.onnx')
name = session.get_inputs()[0].name
(logits,) = session.run(None, {name: np.zeros((5, 32, 32, 3), 'float32')})
