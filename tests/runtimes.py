"""The runtimes of exported models, each as a function of its inputs."""

import pytest
import tensorflow as tf

# Keras sets `np.object` for tf2onnx, which NumPy warns of.
exports_to_onnx = pytest.mark.filterwarnings(
    'ignore:In the future `np.object` will be defined:FutureWarning'
)


def served(path):
    loaded = tf.saved_model.load(path)
    return lambda x: loaded.serve(x)


def run_by_onnxruntime(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    return lambda x: session.run(None, {entry.name: x})[0]


def run_by_litert(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path)
    entry = interpreter.get_input_details()[0]['index']

    def run(x):
        interpreter.resize_tensor_input(entry, x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(entry, x)
        interpreter.invoke()
        result = interpreter.get_output_details()[0]['index']
        return interpreter.get_tensor(result)

    return run


RUNTIMES = {
    'tf_saved_model': ('', served),
    'onnx': ('.onnx', run_by_onnxruntime),
    'litert': ('.tflite', run_by_litert),
}
