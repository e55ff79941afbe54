"""Upper and lower bounds on a run's inputs, defined once for all checks.

The bounds are far above what a federation of images needs. A larger value is an error
or an attack: with an image size of a million in a model card, a prediction would
allocate more memory than a machine has.
"""

# Side of an image in pixels.
MIN_IMAGE_SIZE = 8
MAX_IMAGE_SIZE = 1024
# Width of a model's features; the widest teachers of open_clip have 1,280.
MAX_FEATURE_DIM = 16_384
# ImageNet-21k has 21,841 classes.
MAX_CLASSES = 32_768
# Most characters in the name of a class, a classifier or a phase.
MAX_NAME_LENGTH = 500
