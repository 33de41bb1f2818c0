"""A small drawn dataset that needs detail along the width only.

    import tensorflow_datasets as tfds
    from diffstride.examples import gratings  # registers 'gratings'

    train, test = tfds.load('gratings', split=['train', 'test'])

It is drawn in seconds, without a download.
"""

import numpy as np
import tensorflow_datasets as tfds

SIZE = 32
# Cycles per image width, one per class. A stride of 3 keeps frequencies up
# to 32 / (2 * 3) = 5.3 cycles: every class lies above.
FREQUENCIES = (6, 7, 8, 9, 10, 11, 12, 13)
TRAIN_EXAMPLES = 4000
TEST_EXAMPLES = 1000


def draw(labels, rng):
    """Draws one grating per label.

    The image is round(255 * clip(I, 0, 1)), where x and y count pixels,
    N = 32 and f = FREQUENCIES[label], in cycles per image:

        I(y, x) = brightness
            + contrast * cos(2 pi (f x / N + v y / N) + phase)
            + slope_x * (x / (N - 1) - 1/2)
            + slope_y * (y / (N - 1) - 1/2)
            + noise(y, x)

    All but f is drawn anew for each image, and the same way for all classes:

        v           U(-1.5, 1.5) cycles per image: a slight tilt
        phase       U(0, 2 pi)
        brightness  U(0.4, 0.6)
        contrast    U(0.1, 0.3)
        slope_x     U(-0.2, 0.2) over the width
        slope_y     U(-0.2, 0.2) over the height
        noise       normal, standard deviation 0.1, for each pixel

    The random phase makes the mean image of every class flat, so a linear
    readout of the pixels cannot tell them apart.

    Args:
        labels: integers in 0 .. len(FREQUENCIES) - 1, [n].
        rng: the numpy.random.Generator to draw from.

    Returns:
        uint8 images, [n, 32, 32, 1].
    """

    def uniform(low, high):
        return rng.uniform(low, high, (len(labels), 1, 1))

    x = np.arange(SIZE)
    y = x[:, None]
    across = np.asarray(FREQUENCIES)[labels][:, None, None]
    cycles = (across * x + uniform(-1.5, 1.5) * y) / SIZE
    grating = np.cos(2 * np.pi * cycles + uniform(0, 2 * np.pi))
    image = uniform(0.4, 0.6) + uniform(0.1, 0.3) * grating
    image += uniform(-0.2, 0.2) * (x / (SIZE - 1) - 0.5)
    image += uniform(-0.2, 0.2) * (y / (SIZE - 1) - 0.5)
    image += rng.normal(0, 0.1, image.shape)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)[..., None]


class Gratings(tfds.core.GeneratorBasedBuilder):
    """Oriented gratings, classified by their frequency along the width.

    Eight balanced classes; 4,000 training and 1,000 test images [32, 32, 1].
    Fine detail along the width tells the class. Along the height the image
    varies slowly, and in the same way for all classes. So a good stride is
    small along the width and may be large along the height.
    """

    VERSION = tfds.core.Version('1.0.0')
    # TFDS looks for checksums beside this path. There are none, and so it
    # need not know where the package lies, be it read-only or zipped.
    code_path = None

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description='Gratings; the class is their frequency along the'
            ' width, 6 to 13 cycles per image.',
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(SIZE, SIZE, 1)),
                    'label': tfds.features.ClassLabel(
                        names=[f'{f} cycles' for f in FREQUENCIES]
                    ),
                }
            ),
            supervised_keys=('image', 'label'),
        )

    def _split_generators(self, dl_manager):
        return {
            'train': self._generate_examples(TRAIN_EXAMPLES, seed=0),
            'test': self._generate_examples(TEST_EXAMPLES, seed=1),
        }

    def _generate_examples(self, count, seed):
        labels = np.arange(count) % len(FREQUENCIES)
        images = draw(labels, np.random.default_rng(seed))
        for index, (image, label) in enumerate(zip(images, labels)):
            yield index, {'image': image, 'label': label}
