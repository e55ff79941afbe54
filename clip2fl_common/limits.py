"""How large what a run is made of may be, stated once for all that check it.

The bounds are far above what a federation of images needs. Something larger is an
error or an attack: a card that names an image size of a million would make a
prediction allocate more memory than a machine has.
"""

# Side of an image in pixels.
MIN_IMAGE_SIZE = 8
MAX_IMAGE_SIZE = 1024
# Width of a model's features; the widest teachers of open_clip have 1,280.
MAX_FEATURE_DIM = 16_384
# ImageNet-21k has 21,841 classes.
MAX_CLASSES = 32_768
# Characters in the name of a class, a classifier, a phase.
MAX_NAME_LENGTH = 500
