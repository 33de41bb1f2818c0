"""Keras callbacks that log learned strides and keep them within a budget."""

import math
import os
from typing import Any

import gin
import keras
import numpy as np
from keras import tree

from diffstride import backend, counting, models, validation
from diffstride.budget import check_budget, strides_within
from diffstride.macs import MacsOfStrides
from diffstride.pooling import DiffStride, diffstride_layers, spatial_axes

# The most that the logarithm of a stride moves while it is learned, and in one
# step.
_LONGEST_WAY = 8.0
_LONGEST_STEP = 0.1
# Each later vote multiplies the weight of a vote by this: about ten count.
_MEMORY = 0.9
_ADAM_AND_KIN = (
    keras.optimizers.Adam,  # AdamW is one, too.
    keras.optimizers.Adamax,
    keras.optimizers.Nadam,
    keras.optimizers.Lamb,
)
_AXES = {
    1: ('time',),
    2: ('height', 'width'),
    3: ('depth', 'height', 'width'),
}


@gin.register(module='callbacks')
class StrideLogger(keras.callbacks.Callback):
    """Adds every stride, output size and the MACs to the logs of each epoch.

    The names are 'stride/<layer>/<axis>', 'size/<layer>/<axis>' in samples, and
    'macs', those of one image as `complexity` counts them. Callbacks that come
    after this one (CSVLogger, TensorBoard) receive them, and so does `History`.

    Args:
        input_shape: The shape of the input for which sizes and MACs are logged,
            see `complexity`; None for the input shape of the model. If it is
            not known, only strides are logged.
        log_dir: The folder in which TensorBoard finds an image of each layer's
            mask, in 'masks': white for what is kept, the mean in the middle.
            None for no images. They need TensorFlow.

    Raises:
        ValueError: If an argument is out of its range. Before training, if two
            layers of the model have the same name.

    Example:

    >>> model.fit(x, y, callbacks=[StrideLogger(), TensorBoard('logs')])
    """

    def __init__(
        self,
        input_shape: Any = None,
        log_dir: str | os.PathLike | None = None,
    ):
        super().__init__()
        validation.require(
            input_shape is None
            or all(
                size is None or validation.is_integer(size, least=1)
                for size in tree.flatten(input_shape)
            ),
            '`input_shape` must be None or [height, width, channels]',
            input_shape=input_shape,
        )
        validation.require(
            log_dir is None or isinstance(log_dir, (str, os.PathLike)),
            '`log_dir` must be the path of a folder, or None',
            log_dir=log_dir,
        )
        self.input_shape = input_shape
        self.log_dir = log_dir
        self._writer = None

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        names = [layer.name for layer in diffstride_layers(model)]
        validation.require(
            len(set(names)) == len(names),
            'Layers of a model must differ in `name` to be logged',
            name=names,
        )

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is None:
            return
        layers = diffstride_layers(self.model)
        for layer in layers:
            for axis, stride in zip(_AXES[layer.rank], layer.stride_values):
                logs[f'stride/{layer.name}/{axis}'] = stride
        shape = self.input_shape or counting.known_input_shape(self.model)
        if shape is None or None in tree.flatten(shape):
            return
        rows, calls = counting.measure(self.model, shape)
        logs['macs'] = sum(row.macs or 0 for row in rows.values())
        for layer in layers:
            for call in calls.get(layer, [])[-1:]:
                sizes = [call.outputs[-1][axis] for axis in spatial_axes(layer)]
                for axis, size in zip(_AXES[layer.rank], sizes):
                    logs[f'size/{layer.name}/{axis}'] = size
                if self.log_dir is not None:
                    self._write_mask(epoch, layer, call.inputs[-1])

    def _write_mask(self, epoch, layer, shape):
        import tensorflow as tf

        if self._writer is None:
            self._writer = tf.summary.create_file_writer(
                os.path.join(self.log_dir, 'masks')
            )
        sizes = [shape[axis] for axis in spatial_axes(layer)]
        with self._writer.as_default(epoch):
            image = np.atleast_2d(layer.mask(sizes))
            while image.ndim > 2:
                image = image[len(image) // 2]  # The plane of the mean.
            tf.summary.image(f'mask/{layer.name}', image[None, ..., None])

    def on_train_end(self, logs: dict | None = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@gin.register(module='callbacks')
class UpdateSizes(keras.callbacks.Callback):
    """Lets the output sizes of a compiled model follow its strides by epochs.

    With `model.compile(jit_compile=True)` on TensorFlow, XLA needs static
    sizes. This makes them static at the start of each epoch. A model is
    compiled again only if a size has changed, or a stride where TensorFlow does
    not know the size of the input. Elsewhere this updates sizes that are static
    already; others follow by themselves.

    Example:

    >>> for layer in diffstride_layers(model):
    ...     layer.make_sizes_static()  # Keras asks for it in `compile`.
    >>> model.compile('adam', 'mse', jit_compile=True)
    >>> model.fit(x, y, epochs=10, callbacks=[UpdateSizes()])
    """

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        uses_xla = (
            self.model.jit_compile and keras.backend.backend() == 'tensorflow'
        )
        for layer in _learned_layers(self.model):
            if uses_xla or layer.state.has_static_sizes:
                layer.make_sizes_static()


@gin.register(module='callbacks')
class StrideBudget(StrideLogger):
    """Learns strides within a budget of multiply-accumulates.

    Training has two phases. At first strides are learned. They start on the
    budget and stay on it, so a larger map of one layer is paid for by the
    others. Each batch has one vote on the direction of a step, by the gradient
    that the optimizer sees and whatever its size, so that a single wild one
    moves nothing. A step goes where the votes of about ten batches lead on
    average: it is short where they do not agree. Its largest length does not
    depend on the learning rate: 0 at first, largest in the middle of learning,
    and 0 again at the end. Where the strides come to rest, the loss cannot fall
    by an exchange of MACs between two of them. Then the sizes that use the
    budget up are set, the strides are held, and the rest of the training fits
    the weights to maps whose sizes do not change any more.

    It adds to the logs what `StrideLogger` does, and 'strides_held', 1 or 0. A
    budget above the MACs of the initial strides is used up, too. A model whose
    strides are held already is trained as it is, so that a training that was
    interrupted goes on as it would have; `layer.release()` starts anew. List
    `EarlyStopping(restore_best_weights=True)` before it: weights that it
    restores from the first phase are then held within the budget, too.

    Args:
        macs: The budget, in multiply-accumulates for one image as `complexity`
            counts them. Either `macs` or `share` must be given.
        share: The budget as a share of the MACs at the initial strides.
        learn: How long strides are learned: a share of the epochs of `fit` as
            a float above 0 and at most 1, or a number of epochs as an int.
        spread: The standard deviation of noise that is added to the logarithms
            of the strides for each step, at first; it falls to 0 at the end of
            learning. With noise the network sees frequencies on both sides of
            its band edges, so learning leaves poor strides, but the weights fit
            less well. Use it, with about 0.8, to search strides, and train new
            weights at those it finds. 0 for none. The noise depends on epoch
            and step alone. XLA, whose sizes are constants, excludes it.
        input_shape: See `StrideLogger`.
        log_dir: See `StrideLogger`.

    Raises:
        ValueError: If an argument is out of its range. Before training, if the
            budget is impossible, with the least possible one; if the model has
            no DiffStride layers; or if its MACs cannot be counted.

    Example:

    >>> model.fit(x, y, epochs=20, callbacks=[StrideBudget(share=0.5)])
    """

    def __init__(
        self,
        macs: float | None = None,
        share: float | None = None,
        learn: float | int = 0.5,
        spread: float = 0.0,
        input_shape: Any = None,
        log_dir: str | os.PathLike | None = None,
    ):
        super().__init__(input_shape, log_dir)
        check_budget(macs, share)
        validation.require(
            validation.is_integer(learn, least=1)
            or (isinstance(learn, float) and 0 < learn <= 1),
            '`learn` must be a share above 0 and at most 1, or an integer '
            'number of epochs, at least 1',
            learn=learn,
        )
        self.macs = macs
        self.share = share
        self.learn = learn
        self.spread = validation.finite('spread', spread, least=0)
        self._macs_of: MacsOfStrides | None = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        validation.require(
            diffstride_layers(self.model),
            '`model` must have DiffStride layers',
            model=self.model.name,
        )
        validation.require(
            not (self.spread and self.model.jit_compile),
            '`spread` must be 0 in a model that XLA compiles, whose sizes are '
            'constants: compile it with jit_compile=False',
            spread=self.spread,
        )
        self._macs_of = None  # It is set while strides are learned.
        self._budget = 0.0
        self._moments: dict[str, list] = {}
        self._epochs_begun = 0
        self._steps: int | None = None
        layers = _learned_layers(self.model)
        if layers:
            self._macs_of = MacsOfStrides(self.model, self.input_shape, layers)
            self._budget = self._macs_of.budget(self.macs, self.share)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epochs_begun = epoch + 1
        if self._macs_of is None:
            return
        if epoch >= self._epochs_of_learning:
            self._hold()
            return
        if self._steps is None:
            self._steps = self.params.get('steps')
        validation.require(
            self._steps is not None or self._epochs_of_learning > 1,
            '`learn` must be more than one epoch of data whose number of '
            'batches is not known',
            learn=self.learn,
        )
        if epoch == 0:
            strides = self._macs_of.strides()
            strides = self._macs_of.project(strides, self._budget)
            self._macs_of.assign(strides)
        self._strides = self._drawn = self._macs_of.strides()
        # Votes end with an epoch: an interrupted training goes on alike.
        self._last_step, self._votes = None, np.zeros(len(self._strides))
        if self.model.jit_compile:  # Else every new size is compiled.
            for layer in self._macs_of.layers:
                layer.make_sizes_static()

    @property
    def _epochs_of_learning(self):
        if isinstance(self.learn, float):
            return math.ceil(self.learn * self.params['epochs'])
        return self.learn

    def on_train_batch_begin(
        self, batch: int, logs: dict | None = None
    ) -> None:
        if self._macs_of is None or not self.spread:
            return
        draws = np.random.default_rng([self._epochs_begun, batch])
        spread = self.spread * (1 - self._done(batch))
        self._drawn = self._move(spread * draws.normal(size=len(self._strides)))

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if self._macs_of is None:
            return
        self._batches = batch + 1
        models.sync(self.model)
        # They are not held, so the weights alone tell them.
        weights = [layer.strides for layer in self._macs_of.layers]
        step = _values_of(weights) - self._drawn
        if np.any(step):
            self._votes += (1 - _MEMORY) * (self._vote(step) - self._votes)
            self._strides = self._move(self._length(batch) * self._votes)
        elif self.spread:  # The optimizer gathers gradients.
            self._macs_of.assign(self._strides)
        self._drawn = self._strides

    def _move(self, step):
        """Assigns and returns strides on the budget, a step from those learned.

        The step is one of logarithms, [n].
        """
        moved = self._macs_of.along(self._strides, step)
        moved = self._macs_of.project(moved, self._budget).astype('float32')
        self._macs_of.assign(moved)
        return moved.astype(float)

    def _vote(self, step):
        """Returns where one batch would move the logarithms of strides, [n].

        A step of the optimizer averages many gradients. This recovers the
        newest one, g ~ step - momentum * (the step before), takes the part that
        keeps the MACs, and scales its largest component to 1.
        """
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, 'inner_optimizer', optimizer)
        momentum, squares = getattr(optimizer, 'momentum', 0.0), None
        means = self._kept('momentum')
        if isinstance(optimizer, keras.optimizers.SGD):
            if means is not None:  # A step of Nesterov's looks ahead of them.
                step = means
        elif isinstance(optimizer, _ADAM_AND_KIN) and means is not None:
            # The step is the mean divided by the root of a mean square.
            step, momentum = -means, optimizer.beta_1
        else:
            squares = self._kept('velocity')
        before, self._last_step = self._last_step, step
        if before is None:
            return np.zeros(len(step))
        gradient = step - momentum * before
        if squares is not None:
            gradient *= np.sqrt(squares)
        vote = self._macs_of.tangent(self._drawn, self._drawn * gradient)
        longest = np.max(np.abs(vote))
        return vote / longest if 0 < longest < math.inf else 0 * self._strides

    def _done(self, batch):
        """Returns the share of learning that is over after a batch."""
        if self._steps is None:  # The first epoch counts them.
            return 0.0
        done = self._steps * (self._epochs_begun - 1) + batch + 1
        return min(1.0, done / (self._steps * self._epochs_of_learning))

    def _length(self, batch):
        """Returns how far the logarithm of a stride moves at most in a step.

        It rises slowly from 0, since at first the weights tell little about
        strides, and falls to 0 at the end of learning.
        """
        done = self._done(batch)
        total = (self._steps or 1) * self._epochs_of_learning
        # The integral of x^2 (1 - x)^2 from 0 to 1 is 1 / 30.
        length = 30 * _LONGEST_WAY / total * done**2 * (1 - done) ** 2
        return min(length, _LONGEST_STEP)

    def _kept(self, kind):
        """Returns what the optimizer keeps for each stride, [n], or None."""
        if kind not in self._moments:
            found = {x.name: x for x in self.model.optimizer.variables}
            names = [
                f'{layer.strides.path}_{kind}'.replace('/', '_')
                for layer in self._macs_of.layers
            ]
            self._moments[kind] = [found.get(x) for x in names]
        moments = self._moments[kind]
        if any(x is None for x in moments):
            return None
        return _values_of(moments)

    def _hold(self):
        macs_of, self._macs_of = self._macs_of, None
        strides = strides_within(macs_of, macs_of.strides(), self._budget)
        macs_of.assign(strides)
        for layer in macs_of.layers:
            layer.hold()
        if self.params.get('verbose'):
            learned = ', '.join(
                f'{layer.name} {[round(x, 2) for x in layer.stride_values]}'
                for layer in macs_of.layers
            )
            print(
                f'\nStrides are held at {learned}: '
                f'{macs_of.count(strides):,} of {self._budget:,.0f} MACs'
            )

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        if self._steps is None and self._macs_of is not None:
            self._steps = self._batches
        if logs is not None:
            logs['strides_held'] = int(not _learned_layers(self.model))

    def on_train_end(self, logs: dict | None = None) -> None:
        super().on_train_end(logs)
        is_over = 0 < self._epochs_of_learning <= self._epochs_begun
        layers = _learned_layers(self.model)
        if self._budget and layers and (is_over or self.model.stop_training):
            if self._macs_of is None:  # EarlyStopping has restored weights.
                self._macs_of = MacsOfStrides(
                    self.model, self.input_shape, layers
                )
            self._hold()


def _values_of(variables):
    return np.concatenate([backend.stored_values(x) for x in variables])


def _learned_layers(model: keras.Model) -> list[DiffStride]:
    """Returns the layers whose strides are learned and change sizes."""
    return [
        layer
        for layer in diffstride_layers(model)
        if layer.trainable and layer.cropping and not layer.held
    ]
