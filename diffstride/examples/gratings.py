"""A small drawn dataset that needs fine detail along the width only.

    import tensorflow_datasets as tfds
    from diffstride.examples import gratings  # registers 'gratings'

    train, test = tfds.load('gratings', split=['train', 'test'])

It is drawn in seconds, without a download.
"""

import numpy as np
import tensorflow_datasets as tfds

SIZE = 32
CLASSES = 8
# The gratings in every image, in cycles per image width. A stride of 3 keeps
# the first three of them, those up to 32 / (2 * 3) = 5.3 cycles.
FREQUENCIES = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
# The phases of the gratings, in radians, are what makes a class.
PHASES = np.random.default_rng(0).uniform(
    0, 2 * np.pi, (CLASSES, len(FREQUENCIES))
)
TRAIN_EXAMPLES = 4000
TEST_EXAMPLES = 1000


def draw(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws one image of vertical stripes per label.

    The stripes are a sum of ten gratings. All classes have the same ten, of
    equal amplitude, and so the same spectrum; they differ in the phases of the
    gratings relative to each other. The image is round(255 * clip(I, 0, 1)),
    where x and y count pixels and N = 32:

        I(y, x) = 1/2 + noise(y, x)
            + contrast * sum_f cos(2 pi f (x - s(y)) / N + PHASES[label, f])
        s(y) = shift + bend * cos(2 pi y / N + turn)

    All but the phases is drawn anew for each image, and the same way for all
    classes:

        contrast    U(0.024, 0.040), for stripes of 0.05 to 0.09 RMS
        shift       U(0, N) pixels
        bend        U(-0.3, 0.3) pixels: stripes are nearly straight
        turn        U(0, 2 pi)
        noise       normal, standard deviation 0.17, for each pixel

    Along the width the stripes need frequencies up to 12 of 16 cycles.
    Along the height an image changes slowly, so that averaging rows removes
    noise and nothing else.

    The labels are integers in 0 .. CLASSES - 1, [n]; the images are uint8
    [n, 32, 32, 1].
    """

    def uniform(low, high):
        return rng.uniform(low, high, (len(labels), 1, 1))

    x = np.arange(SIZE)
    y = x[:, None]
    bend = uniform(-0.3, 0.3)
    wave = np.cos(2 * np.pi * y / SIZE + uniform(0, 2 * np.pi))
    position = x - uniform(0, SIZE) - bend * wave
    stripes = sum(
        np.cos(2 * np.pi * frequency * position / SIZE + phases[:, None, None])
        for frequency, phases in zip(FREQUENCIES, PHASES[labels].T)
    )
    image = 0.5 + uniform(0.024, 0.040) * stripes
    image += rng.normal(0, 0.17, image.shape)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)[..., None]


class Gratings(tfds.core.GeneratorBasedBuilder):
    """Vertical stripes, classified by their pattern along the width.

    Eight balanced classes; 4,000 training and 1,000 test images [32, 32, 1].
    Fine detail along the width tells the class. Along the height there is
    nothing but noise to average. So a good stride is small along the width and
    large along the height.
    """

    VERSION = tfds.core.Version('2.0.0')
    # TFDS looks for checksums beside this path. There are none, and so it
    # need not know where the package lies, be it read-only or zipped.
    code_path = None

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description='Vertical stripes of ten gratings, 3 to 12 cycles per'
            ' image; the class is the phases between them.',
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(SIZE, SIZE, 1)),
                    'label': tfds.features.ClassLabel(
                        names=[f'pattern {i + 1}' for i in range(CLASSES)]
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
        labels = np.arange(count) % CLASSES
        images = draw(labels, np.random.default_rng(seed))
        for index, (image, label) in enumerate(zip(images, labels)):
            yield index, {'image': image, 'label': label}
