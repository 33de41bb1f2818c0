"""What differs between the backends of Keras: when values are known."""

import keras
import numpy as np
from keras import ops


def sizes_must_be_constant():
    """Whether XLA compiles what is being traced or will be."""
    if keras.backend.backend() == 'tensorflow':
        import tensorflow as tf
        from tensorflow.python.ops import control_flow_util

        graph = tf.compat.v1.get_default_graph()
        return control_flow_util.GraphOrParentsInXlaContext(graph)
    return keras.backend.backend() == 'jax'


def is_symbolic():
    """Whether values of tensors are not known now."""
    if keras.backend.backend() == 'tensorflow':
        import tensorflow as tf

        return not tf.executing_eagerly()
    return False


def value_of(variable):
    """The present value of a variable as NumPy, while tracing too."""
    if keras.backend.backend() == 'tensorflow':
        import tensorflow as tf

        with tf.init_scope():
            return variable.value.numpy()
    if keras.backend.backend() == 'jax':
        return np.asarray(variable._value)
    return ops.convert_to_numpy(variable.value)
